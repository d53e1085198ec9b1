"""What one answer used, learned by watching it go by.

A meter is fed an answer in order, as events of a stream or as one whole body, and says of each event what the
client is to see of it: the very bytes that came, unless we asked for usage in the client's place; then the chunk
that came only because of that is taken out again, and nothing else. It can be asked for the usage at any moment,
also after a broken stream: what it knows then is what gets settled.

Where the upstream is silent it counts by itself: the texts of a stream as they pass, each piece at least one token,
since no server sends a piece for less. So the tokens of a word that came in pieces are more than those of the word.

Pure: no sockets, no clock. Knows the answers of the OpenAI format and of Anthropic's; framing comes from `sse`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from proxy.formats.anthropic import read_usage
from proxy.formats.chunks import (
    extra_members,
    is_finish_chunk,
    read_object,
    with_timings,
    without_timings,
    without_usage,
)
from proxy.formats.ending import RESPONSE_ENDS, Ending
from proxy.formats.endpoints import RESPONSE_ID
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.usage import read_timings, read_tokens
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Unspent, Usage
from proxy.policy.policy import Kind

# What stands inside a choice and is no text that the model wrote: names, verdicts, the text once more as single
# tokens, sound as base64.
_NOT_TEXT = frozenset(
    "role type id call_id status finish_reason native_finish_reason stop_reason logprobs prompt_logprobs "
    "content_filter_results data signature".split()
)
# With one of these a stream ends that is no text: the picture is painted, the sound made, the words written down.
_DONE = ("image_generation.completed", "image_edit.completed", "speech.audio.done", "transcript.text.done", "error")
# Where an event of /responses says a text as a whole.
_SAID_AT_ONCE = ("text", "refusal", "arguments", "input", "item", "part")
# What has no data and is larger than this is no comment.
_COMMENT_BYTES_MAX = 65_536
_BYTES_PER_TOKEN = 4


class Meter:
    """Watches one answer. `count` says how many tokens a piece of text has; it must be quick and never fail.

    `kind` is that of its upstream. What we ask of vLLM and llama.cpp beyond the usage at the end, and what llama.cpp
    would have put on the last chunk had we not asked, is taken out or put back as its client would have seen it.
    """

    def __init__(
        self,
        request: Request,
        *,
        count: Callable[[str], int],
        kind: Kind = "openai",
    ) -> None:
        self.is_at_end = False
        self.is_over = False
        self.has_error = False
        self.shows_usage = request.asks_for_usage
        self.chunk: dict[str, Any] | None = None  # what the last event said
        self.ending = Ending(request.endpoint.name, choices=request.choices)
        self.response_id: str | None = None  # by which the upstream keeps what it made
        self.uncounted_texts: list[str] = []  # the texts of a whole answer that came without its usage
        self._count = count
        self._charge = request.endpoint.charge
        self._generates = request.endpoint.charge == "tokens" and request.endpoint.generates
        self._choices = request.choices
        self._strips = request.adds_usage
        self._strips_running = request.adds_running_usage(kind)
        self._is_llama = kind == "llamacpp"
        self._moves_timings = self._is_llama and request.adds_usage and request.choices == 1
        self._last: tuple[bytes, dict[str, Any]] | None = None  # the chunk with the finish_reason, until timings come
        self._has_several_prompts = request.has_several_prompts
        self._is_responses = request.endpoint.is_of_responses
        self._is_messages = request.endpoint.is_of_messages
        self._said: dict[str, Any] = {}  # of the usage of a message, whose fields come one after the other
        self._is_partial = False  # what was reported is of the beginning, or of one choice, and not of all
        self._done = 0  # of the choices of an answer that is no text
        self._reported: Tokens | None = None
        self._counted = 0  # in all that passed
        self._counted_since = 0  # the usage was last reported

    def stop_stripping(self) -> None:
        """The usage was not asked for after all, so what is said of it was meant for the client."""
        self._strips = self._strips_running = self._moves_timings = False

    @property
    def output_seen(self) -> int:
        """How many tokens of output have passed, as far as is known: of what is no text none, until its end."""
        if self._charge != "tokens":
            return 0
        return self._counted if self._reported is None else self._reported.output + self._counted_since

    @property
    def input_reported(self) -> int | None:
        """The tokens of the input, where the upstream has said them."""
        if self._reported is None or (self._is_partial and self._has_several_prompts):
            return None
        return self._reported.input

    def see_event(self, event: Event, *, is_cut: bool = False) -> bytes:
        """Take note of one event and return what of it the client is to see.

        `is_at_end` turns true with the event from which on everything belongs to the end of the answer: the
        usage chunk, `[DONE]`, or the event that ends a response; `is_over` with the last event there is. What is
        kept for a moment comes with the next event, or from `rest`.
        """
        shown = self._see_event(event, is_cut=is_cut)
        if not self._moves_timings:
            return shown
        last, self._last = self._last, None
        chunk = self.chunk or {}
        if last and shown and not chunk.get("choices") and extra_members(chunk) == {"timings"}:
            return with_timings(*last, event, chunk)
        if is_finish_chunk(chunk) and "timings" not in chunk:
            said = chunk if chunk.get("usage") else {key: value for key, value in chunk.items() if key != "usage"}
            self._last, shown = (shown, said), b""
        return (last[0] if last else b"") + shown

    def rest(self) -> bytes:
        """What was kept, where no further event comes."""
        last, self._last = self._last, None
        return last[0] if last else b""

    def _see_event(self, event: Event, *, is_cut: bool) -> bytes:
        self.chunk = None
        data = event.data
        if data is None:
            if len(event.raw) > _COMMENT_BYTES_MAX:  # a piece of an event that is too large to be read
                self._see_unread(event.raw)
            return event.raw
        if data.startswith(b"[DONE]"):
            self.is_at_end = self.is_over = True
            return event.raw
        self.chunk = chunk = read_object(data)
        if chunk is None:
            if not is_cut:  # the beginning of an event says nothing to anybody
                self._see_unread(data)
            return event.raw
        if self._charge != "tokens":
            self._see_step(chunk)
            return event.raw
        if self._is_responses:
            self._see_response_event(chunk)
            return event.raw
        if self._is_messages:
            self._see_message_event(chunk)
            return event.raw
        return self._see_chunk(chunk, event)

    def see_whole(self, body: bytes) -> None:
        """Take note of an answer that is not a stream."""
        self.is_at_end = True
        answer = read_object(body)
        if answer is None:
            self.has_error = self._charge != "tokens_if_said"  # sound is no JSON, nor are subtitles
            self.uncounted_texts = [body.decode("utf-8", "replace")] if self._generates else []
            return
        self._see_error(answer)
        if self._is_messages:
            self._see_usage(answer.get("usage"))
        elif self._is_responses:
            self._note_response(answer)
        else:
            self._add(answer)
        if self._reported is None and self._generates:
            names = ("content",) if self._is_messages else ("choices", "output")
            self.uncounted_texts = [text for name in names for text in _texts(answer.get(name))]
        elif self._is_llama:
            self._see_others(answer.get("choices"))

    def _see_others(self, choices: object) -> None:
        """Keep the texts of all choices but the first: llama.cpp says the usage of that one and its prompt alone."""
        if isinstance(choices, list) and len(choices) > 1 and self._reported is not None:
            self.uncounted_texts = list(_texts(choices[1:]))
            self._is_partial = True
            if self._has_several_prompts:
                self._reported = replace(self._reported, input=0, cached=0)

    def usage(self) -> Usage:
        """What was used, as far as is known now; without an input where the answer doesn't say it.

        A usage that was reported before the last of the text covers what came before it, and no more.
        """
        if self._charge == "nothing":
            return Unspent()
        if self._charge == "request":
            return Unspent(requests=1)
        if self._charge == "tokens_if_said":
            return self._usage_if_said()
        if self._reported is None:
            return AtLeast(Tokens(0, self._counted if self._generates else 0))
        if self._counted_since or self._is_partial:
            return AtLeast(Tokens(self._reported.input, self.output_seen, self._reported.cached))
        return Exactly(self._reported)

    def _usage_if_said(self) -> Usage:
        """The usage of what is no text: as it was said, or a request; all that is held, where it broke off."""
        if self._reported is not None and self.is_at_end:
            return Exactly(self._reported)
        if self.has_error:
            return AtLeast(Tokens(0, 0))
        if self.is_at_end:
            return Unspent(requests=1)
        return AtLeast(Tokens(0, TOKENS_MAX))

    def _see_step(self, chunk: dict[str, Any]) -> None:
        """Take note of an event of a stream that is no text: of each of its choices the last one says the usage."""
        self._see_error(chunk)
        kind = chunk.get("type")
        self.has_error = self.has_error or kind == "error"
        if kind in _DONE:
            self._done += 1
            self._add(chunk)
        self.is_at_end = self.is_over = self.is_over or self.has_error or self._done >= self._choices

    def _add(self, answer: dict[str, Any]) -> None:
        """Add up what an answer says of itself: a drawing says apart what the model used that wrote it."""
        for name in ("usage", "svg_usage") if self._charge == "tokens_if_said" else ("usage",):
            tokens, before = read_tokens(answer.get(name)), self._reported
            if tokens is not None and before is not None:
                tokens = replace(tokens, input=before.input + tokens.input, output=before.output + tokens.output)
            self._report(tokens)

    def _note_response(self, response: dict[str, Any]) -> None:
        """Take note of a response's id, and of its usage once it has one: what a tool drew is not in it."""
        name, tools = response.get("id"), response.get("tool_usage")
        if isinstance(name, str) and RESPONSE_ID.fullmatch(name):
            self.response_id = name
        tokens = read_tokens(response.get("usage"))
        drawn = read_tokens(tools.get("image_gen")) if isinstance(tools, dict) else None
        if tokens and drawn:
            tokens = replace(tokens, input=tokens.input + drawn.input, output=tokens.output + drawn.output)
        self._report(tokens)

    def _see_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        self._see_error(chunk)
        choices = chunk.get("choices")
        if choices:
            self.is_at_end = self.is_over  # a usage chunk that came early was not the end
            self._see_texts(choices)
        if "usage" not in chunk:
            self._see_running(read_timings(chunk.get("timings")))
            return self._without_running_timings(chunk, event)
        usage = chunk["usage"]
        # Zeros beside a choice are no count but a place kept for one, and so is null.
        is_placeholder = usage is None or (isinstance(usage, dict) and bool(choices) and not any(usage.values()))
        if isinstance(usage, dict) and not is_placeholder:
            if not choices:
                return self._see_usage_chunk(chunk, event)
            self._see_running(read_tokens(usage))
            if self._strips_running and not self._is_llama:
                return without_usage(event, chunk)
        return without_usage(event, chunk) if is_placeholder and self._strips else event.raw

    def _see_running(self, tokens: Tokens | None) -> None:
        # Beside one of several choices it is the usage of that one alone, and one that doesn't rise is none.
        if self._choices == 1 and tokens and (tokens.output > self._output_reported or not self._counted_since):
            self._report(tokens)

    def _without_running_timings(self, chunk: dict[str, Any], event: Event) -> bytes:
        """Return the chunk without the timings so far, but for the end's, which come unasked.

        Behind a stop word they come with the last of the text too; there they are lost, and said on the next chunk.
        """
        is_running = self._strips_running and self._is_llama and "timings" in chunk and not is_finish_chunk(chunk)
        return without_timings(event, chunk) if is_running else event.raw

    def _see_usage_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        """Return the chunk as it would have come unasked: not at all, unless it carries something else too."""
        # llama.cpp sends one for each of several choices, as soon as it is finished: then only [DONE] is the end, and
        # what they say of their outputs adds up.
        self.is_at_end = self.is_at_end or self._choices == 1
        tokens, before = read_tokens(chunk["usage"]), self._reported
        if tokens and before and self._choices > 1:
            output, reasoning = before.output + tokens.output, before.reasoning + tokens.reasoning
            tokens = replace(tokens, output=output, reasoning=reasoning)
        self._report(tokens)
        if not self._strips:
            return event.raw
        return without_usage(event, chunk) if extra_members(chunk) else b""

    def _see_response_event(self, chunk: dict[str, Any]) -> None:
        self._see_error(chunk)
        kind, response = chunk.get("type"), chunk.get("response")
        if isinstance(response, dict):
            self._note_response(response)
        if isinstance(kind, str) and kind in RESPONSE_ENDS:
            self.is_at_end = self.is_over = True
            self.has_error = self.has_error or kind in ("error", "response.failed")
            if self._reported is None and isinstance(response, dict):
                self._see_at_least(response.get("output"))
        elif isinstance(kind, str) and kind.endswith(".delta") and isinstance(delta := chunk.get("delta"), str):
            self._see_texts(delta)
        elif isinstance(kind, str) and kind.endswith(".done"):
            self._see_at_least([chunk.get(name) for name in _SAID_AT_ONCE])

    def _see_message_event(self, event: dict[str, Any]) -> None:
        """Take note of an event of a message: its beginning says the input, and each `message_delta` all so far."""
        kind = event.get("type")
        self.has_error = self.has_error or kind == "error"
        if kind == "message_start":
            message = event.get("message")
            self._see_usage(message.get("usage") if isinstance(message, dict) else None, is_early=True)
        elif kind == "content_block_start":
            self.is_at_end = False  # a usage in between was not the end's
            self._see_texts(event.get("content_block"))
        elif kind == "content_block_delta":
            self.is_at_end = False
            self._see_texts(event.get("delta"))
        elif kind == "message_delta":
            self._see_usage(event.get("usage"))
            self.is_at_end = True
        elif kind in ("message_stop", "error"):
            self.is_at_end = self.is_over = True

    def _see_usage(self, usage: object, *, is_early: bool = False) -> None:
        """Read the usage of a message. What its end leaves out is as its beginning said."""
        if not isinstance(usage, dict):
            return
        self._said |= {name: value for name, value in usage.items() if value is not None}
        tokens = read_usage(self._said)
        # No input is empty: who begins with 0 doesn't know it yet.
        if tokens is not None and (tokens.input or not is_early):
            # The output of the beginning is a guess at its first words, which are counted when they come.
            self._report(replace(tokens, output=0, reasoning=0) if is_early else tokens)
            self._is_partial = is_early

    def _see_texts(self, part: object) -> None:
        tokens = [self._count(text) for text in _texts(part)]
        if tokens:
            self._counted += max(1, sum(tokens))
            self._counted_since += max(1, sum(tokens))

    def _see_at_least(self, part: object) -> None:
        """Count a text that is said once more as a whole, as far as it did not come in pieces."""
        missing = sum(map(self._count, _texts(part))) - self._counted
        if missing > 0:
            self._counted += missing
            self._counted_since += missing

    def _see_unread(self, data: bytes) -> None:
        """Count what can't be read by its bytes: somebody may read it all the same."""
        self._counted += -(-len(data) // _BYTES_PER_TOKEN)
        self._counted_since += -(-len(data) // _BYTES_PER_TOKEN)

    @property
    def _output_reported(self) -> int:
        return self._reported.output if self._reported else 0

    def _report(self, tokens: Tokens | None) -> None:
        if tokens is not None:
            self._reported, self._counted_since = tokens, 0

    def _see_error(self, answer: dict[str, Any]) -> None:
        self.has_error = self.has_error or answer.get("error") is not None


def _texts(value: object) -> Iterator[str]:
    """The texts in a part of an answer, however it is nested (content, refusals, arguments of tool calls)."""
    waiting = [value]  # not recursive: no depth overflows the stack
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if value:
                yield value
        elif isinstance(value, list):
            waiting += reversed(value)
        elif isinstance(value, dict):
            waiting += [part for key, part in reversed(value.items()) if key not in _NOT_TEXT]
