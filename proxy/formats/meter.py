"""Measure what one answer uses, from its events or its body, and remove what only the proxy asked for.

A `Meter` is fed one answer in order: the events of a stream, or one whole body. For each event it returns the bytes
for the client. These are the bytes that came, unless the proxy asked for usage in the client's place: then it removes
exactly what came only because of that, such as the usage chunk:

    data: {"choices":[{"delta":{"content":"Hi"}}],"usage":null}    →  the same without `"usage":null`
    data: {"choices":[],"usage":{"prompt_tokens":11,…}}            →  nothing
    data: [DONE]                                                   →  data: [DONE]

The usage can be read at any time, even if the stream broke off; it is what the call is charged.

If the upstream states no usage, the meter counts the texts of a stream itself, each piece as at least one token,
because no server sends a piece for less than a token. So a word that comes in three pieces is at least three tokens,
although the tokenizer may need only two for the whole word.

Pure: no sockets, no clock. Reads the answers of OpenAI's and Anthropic's APIs; `sse` splits a stream into events.
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
from proxy.formats.kinds import kind_of
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.usage import read_timings, read_tokens
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Unspent, Usage

# Members of a choice or an item that contain no text of the model: names and ids, reasons, filter results, the same
# text again as single tokens (logprobs), and audio as base64 (data). Counting them would charge a broken stream
# several times too much.
_NOT_TEXT = frozenset(
    "role type id call_id status finish_reason native_finish_reason stop_reason logprobs prompt_logprobs "
    "content_filter_results data signature".split()
)
# The last event of a stream of images, speech or a transcript.
_MEDIA_ENDS = (
    "image_generation.completed",
    "image_edit.completed",
    "speech.audio.done",
    "transcript.text.done",
    "error",
)
# The members in which a `.done` event of /responses repeats a text as a whole.
_WHOLE_TEXT_MEMBERS = ("text", "refusal", "arguments", "input", "item", "part")
# An event without data that is larger than this is no comment but a piece of an event that was too large to parse.
_COMMENT_BYTES_MAX = 65_536
_BYTES_PER_TOKEN = 4


class Meter:
    """Measures one answer. `count` returns the tokens of a text; it must be fast and must never raise.

    `kind` is the kind of the upstream. The proxy asks vLLM and llama.cpp for the usage so far on every chunk, which
    moves or adds members. They are removed or put back, so that the client gets what it would have got otherwise.

    Public state, updated by each event:

    - `is_at_end`: this event belongs to the end of the answer. True from the usage chunk, `[DONE]`, or the event that
      ends a response or message.
    - `is_over`: the last event has come.
    - `has_error`: the upstream reported an error inside the answer.
    - `chunk`: the JSON object of the event, None if its data is no object.
    - `response_id`: the id under which the upstream stores the response.
    - `uncounted_texts`: the texts of a whole answer without usage. The caller counts them, as that may take long.
    """

    def __init__(
        self,
        request: Request,
        *,
        count: Callable[[str], int],
        kind: str = "openai",
    ) -> None:
        self.is_at_end = False
        self.is_over = False
        self.has_error = False
        self.shows_usage = request.asks_for_usage
        self.chunk: dict[str, Any] | None = None
        self.ending = Ending(request.endpoint.name, choices=request.choices)
        self.response_id: str | None = None
        self.uncounted_texts: list[str] = []
        self._count = count
        self._charge = request.endpoint.charge
        self._generates = request.endpoint.charge == "tokens" and request.endpoint.generates
        self._choices = request.choices
        self._strips_usage = request.adds_usage
        self._strips_running_usage = request.adds_running_usage(kind)
        self._running_usage = kind_of(kind).running_usage
        self._reports_first_choice_only = kind_of(kind).reports_first_choice_only
        self._moves_timings = self._running_usage == "timings" and request.adds_usage and request.choices == 1
        # The finish chunk, kept for one event because it may get the timings: its bytes, and its JSON without usage.
        self._finish_chunk: tuple[bytes, dict[str, Any]] | None = None
        self._has_several_prompts = request.has_several_prompts
        self._is_responses = request.endpoint.is_of_responses
        self._is_messages = request.endpoint.is_of_messages
        self._message_usage: dict[str, Any] = {}  # the usage of a message, merged from its events
        self._is_partial = False  # the reported usage is of the beginning or of one choice, not of the whole answer
        self._media_completed = 0  # how many images, or speech or transcript streams, have ended
        self._reported: Tokens | None = None
        self._counted = 0  # output tokens by our count, in the whole answer
        self._counted_since_report = 0  # the same, since the upstream last reported its usage

    def stop_stripping(self) -> None:
        """Remove nothing from now on: the proxy did not ask for usage after all, so it is meant for the client."""
        self._strips_usage = self._strips_running_usage = self._moves_timings = False

    @property
    def output_seen(self) -> int:
        """The tokens of output that have passed so far; 0 for images and audio, which are known only at their end."""
        if self._charge != "tokens":
            return 0
        return self._counted if self._reported is None else self._reported.output + self._counted_since_report

    @property
    def input_reported(self) -> int | None:
        """The tokens of the input, if the upstream has reported them."""
        if self._reported is None or (self._is_partial and self._has_several_prompts):
            return None
        return self._reported.input

    def see_event(self, event: Event, *, is_cut: bool = False) -> bytes:
        """Measure one event and return the bytes for the client.

        Bytes that are kept for a moment are returned with the next event, or by `flush`. `is_cut` says that the
        stream ended before the event's blank line; then data that can't be parsed is not counted.
        """
        shown = self._see_event(event, is_cut=is_cut)
        if not self._moves_timings:
            return shown
        # If no usage is requested, llama.cpp writes `timings` on the last chunk that has a choice. Because the proxy
        # requests usage, they come on the usage chunk instead, which the client must not see:
        #     data: {"choices":[{"delta":{},"finish_reason":"stop"}]}
        #     data: {"choices":[],"usage":{…},"timings":{…}}
        # So the finish chunk is kept until the next event, and gets the timings if that is the usage chunk.
        kept, self._finish_chunk = self._finish_chunk, None
        chunk = self.chunk or {}
        # If the usage chunk has other members too, it is sent with all of them: it is unknown on which chunk those
        # would have come without our option.
        if kept and shown and not chunk.get("choices") and extra_members(chunk) == {"timings"}:
            return with_timings(*kept, event, chunk)
        if is_finish_chunk(chunk) and "timings" not in chunk:
            without_null = chunk if chunk.get("usage") else {key: v for key, v in chunk.items() if key != "usage"}
            self._finish_chunk, shown = (shown, without_null), b""
        return (kept[0] if kept else b"") + shown

    def flush(self) -> bytes:
        """Return the bytes that were kept; called if no further event comes."""
        kept, self._finish_chunk = self._finish_chunk, None
        return kept[0] if kept else b""

    def see_whole(self, body: bytes) -> None:
        """Measure an answer that is not a stream."""
        self.is_at_end = True
        answer = read_object(body)
        if answer is None:
            # Audio and subtitles are not JSON. Anything else that is not JSON is an error, but it was generated.
            self.has_error = self._charge != "tokens_if_said"
            self.uncounted_texts = [body.decode("utf-8", "replace")] if self._generates else []
            return
        self._see_error(answer)
        if self._is_messages:
            self._see_message_usage(answer.get("usage"))
        elif self._is_responses:
            self._see_response(answer)
        else:
            self._add_usage(answer)
        if self._reported is None and self._generates:
            names = ("content",) if self._is_messages else ("choices", "output")
            self.uncounted_texts = [text for name in names for text in _texts_in(answer.get(name))]
        elif self._reports_first_choice_only:
            self._keep_other_choices(answer.get("choices"))

    def usage(self) -> Usage:
        """The usage as far as it is known now. If the answer does not state the input, the input is 0.

        A usage that was reported before the last text covers only what came before it. Examples:

            the usage chunk reported 11 and 5                Exactly(11, 5)
            12 tokens passed by our count, and the stream
            broke off before any report                      AtLeast(0, 12); the caller adds its count of the input
            vLLM had reported 11 and 4 so far, then text
            of 5 tokens by our count came without a report   AtLeast(11, 9)
        """
        if self._charge == "nothing":
            return Unspent()
        if self._charge == "request":
            return Unspent(requests=1)
        if self._charge == "tokens_if_said":
            return self._media_usage()
        if self._reported is None:
            return AtLeast(Tokens(0, self._counted if self._generates else 0))
        if self._counted_since_report or self._is_partial:
            return AtLeast(Tokens(self._reported.input, self.output_seen, self._reported.cached))
        return Exactly(self._reported)

    def _media_usage(self) -> Usage:
        """The usage of images and audio: the reported tokens if there are any, else one request.

        A stream that broke off has not reported what it cost. TOKENS_MAX then stands for the whole reservation,
        because an estimate is never charged beyond it. An error generated nothing, but its input was read.
        """
        if self._reported is not None and self.is_at_end:
            return Exactly(self._reported)
        if self.has_error:
            return AtLeast(Tokens(0, 0))
        if self.is_at_end:
            return Unspent(requests=1)
        return AtLeast(Tokens(0, TOKENS_MAX))

    # ------------------------------------------------------------------------------------------------------- any
    # event

    def _see_event(self, event: Event, *, is_cut: bool) -> bytes:
        self.chunk = None
        data = event.data
        if data is None:
            if len(event.raw) > _COMMENT_BYTES_MAX:
                self._count_bytes(event.raw)
            return event.raw
        if data.startswith(b"[DONE]"):  # the Python SDK accepts anything that begins so
            self.is_at_end = self.is_over = True
            return event.raw
        self.chunk = chunk = read_object(data)
        if chunk is None:
            # A client may understand data that we can't parse, so it is charged. But no client understands an event
            # that broke off in the middle.
            if not is_cut:
                self._count_bytes(data)
            return event.raw
        if self._charge != "tokens":
            self._see_media_event(chunk)
            return event.raw
        if self._is_responses:
            self._see_response_event(chunk)
            return event.raw
        if self._is_messages:
            self._see_message_event(chunk)
            return event.raw
        return self._see_chunk(chunk, event)

    def _see_error(self, answer: dict[str, Any]) -> None:
        self.has_error = self.has_error or answer.get("error") is not None

    # ------------------------------------------------------------------------------------------------ images and
    # audio

    def _see_media_event(self, chunk: dict[str, Any]) -> None:
        """Record an event of a stream of images or audio. Each choice has its own last event, with its own usage."""
        self._see_error(chunk)
        kind = chunk.get("type")
        self.has_error = self.has_error or kind == "error"
        if kind in _MEDIA_ENDS:
            self._media_completed += 1
            self._add_usage(chunk)
        self.is_at_end = self.is_over = self.is_over or self.has_error or self._media_completed >= self._choices

    def _add_usage(self, answer: dict[str, Any]) -> None:
        """Add the usage that an answer states. An SVG image also states, in `svg_usage`, that of its text model."""
        for name in ("usage", "svg_usage") if self._charge == "tokens_if_said" else ("usage",):
            tokens, before = read_tokens(answer.get(name)), self._reported
            if tokens is not None and before is not None:
                tokens = replace(tokens, input=before.input + tokens.input, output=before.output + tokens.output)
            self._report(tokens)

    # -------------------------------------------------------------------------------------------- chat and
    # completions

    def _see_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        self._see_error(chunk)
        choices = chunk.get("choices")
        if choices:
            self.is_at_end = self.is_over  # text follows, so a usage chunk before it was not the end
            self._count_texts(choices)
        if "usage" not in chunk:
            self._see_running_usage(read_timings(chunk.get("timings")))
            return self._without_running_timings(chunk, event)
        usage = chunk["usage"]
        # OpenAI writes null on every chunk before the last. Ollama's /completions writes three zeros; beside a choice
        # they are a placeholder too. But zeros without a choice are the final usage, and an explicit zero is a zero.
        is_placeholder = usage is None or (isinstance(usage, dict) and bool(choices) and not any(usage.values()))
        if isinstance(usage, dict) and not is_placeholder:
            if not choices:
                return self._see_usage_chunk(chunk, event)
            self._see_running_usage(read_tokens(usage))
            if self._strips_running_usage and self._running_usage == "usage":
                return without_usage(event, chunk)
        return without_usage(event, chunk) if is_placeholder and self._strips_usage else event.raw

    def _see_usage_chunk(self, chunk: dict[str, Any], event: Event) -> bytes:
        """Return the usage chunk as it would have come unasked: not at all, unless it has other members too."""
        # With several choices llama.cpp sends a usage chunk for each as soon as it is finished. So only [DONE] is the
        # end, and the outputs are added; the input is that of the one prompt each time:
        #     {"prompt_tokens":11,"completion_tokens":5} + {"prompt_tokens":11,"completion_tokens":7}  →  11 and 12
        self.is_at_end = self.is_at_end or self._choices == 1
        tokens, before = read_tokens(chunk["usage"]), self._reported
        if tokens and before and self._choices > 1:
            output, reasoning = before.output + tokens.output, before.reasoning + tokens.reasoning
            tokens = replace(tokens, output=output, reasoning=reasoning)
        self._report(tokens)
        if not self._strips_usage:
            return event.raw
        return without_usage(event, chunk) if extra_members(chunk) else b""

    def _see_running_usage(self, tokens: Tokens | None) -> None:
        """Record the usage so far that a chunk states beside its choice.

        With several choices it is the usage of that one choice, so it is ignored. It is also ignored if its output
        does not rise although text has passed: a server that reports 4 tokens on every chunk does not count.
        """
        if (
            self._choices == 1
            and tokens
            and (tokens.output > self._output_reported or not self._counted_since_report)
        ):
            self._report(tokens)

    def _without_running_timings(self, chunk: dict[str, Any], event: Event) -> bytes:
        """Return the chunk without the timings so far. The timings of the finish chunk stay: they come unasked.

        If a stop word ends the answer, llama.cpp sends timings with the last text too; those are removed, and it
        repeats them on the next chunk.
        """
        is_running = self._strips_running_usage and self._running_usage == "timings" and "timings" in chunk
        return without_timings(event, chunk) if is_running and not is_finish_chunk(chunk) else event.raw

    def _keep_other_choices(self, choices: object) -> None:
        """Keep the texts of all choices but the first. llama.cpp reports the usage of the first only."""
        if isinstance(choices, list) and len(choices) > 1 and self._reported is not None:
            self.uncounted_texts = list(_texts_in(choices[1:]))
            self._is_partial = True
            if self._has_several_prompts:  # the reported input is that of the first prompt only
                self._reported = replace(self._reported, input=0, cached=0)

    # ------------------------------------------------------------------------------------------------------
    # /responses

    def _see_response_event(self, chunk: dict[str, Any]) -> None:
        self._see_error(chunk)
        kind, response = chunk.get("type"), chunk.get("response")
        if isinstance(response, dict):
            self._see_response(response)
        if isinstance(kind, str) and kind in RESPONSE_ENDS:
            self.is_at_end = self.is_over = True
            self.has_error = self.has_error or kind in ("error", "response.failed")
            if self._reported is None and isinstance(response, dict):
                self._count_missing(response.get("output"))
        elif isinstance(kind, str) and kind.endswith(".delta") and isinstance(delta := chunk.get("delta"), str):
            self._count_texts(delta)
        elif isinstance(kind, str) and kind.endswith(".done"):
            self._count_missing([chunk.get(name) for name in _WHOLE_TEXT_MEMBERS])

    def _see_response(self, response: dict[str, Any]) -> None:
        """Record the id of a response, and its usage if it has one."""
        name, tools = response.get("id"), response.get("tool_usage")
        if isinstance(name, str) and RESPONSE_ID.fullmatch(name):
            self.response_id = name
        tokens = read_tokens(response.get("usage"))
        # The image tool reports its tokens separately; they are not included in `usage`.
        drawn = read_tokens(tools.get("image_gen")) if isinstance(tools, dict) else None
        if tokens and drawn:
            tokens = replace(tokens, input=tokens.input + drawn.input, output=tokens.output + drawn.output)
        self._report(tokens)

    # ----------------------------------------------------------------------------------------------------
    # /v1/messages

    def _see_message_event(self, event: dict[str, Any]) -> None:
        """Record an event of a message. `message_start` reports the input, each `message_delta` the total so far."""
        kind = event.get("type")
        self.has_error = self.has_error or kind == "error"
        if kind == "message_start":
            message = event.get("message")
            self._see_message_usage(message.get("usage") if isinstance(message, dict) else None, is_early=True)
        elif kind == "content_block_start":
            self.is_at_end = False  # a block follows, so a `message_delta` before it was not the end
            self._count_texts(event.get("content_block"))
        elif kind == "content_block_delta":
            self.is_at_end = False
            self._count_texts(event.get("delta"))
        elif kind == "message_delta":
            self._see_message_usage(event.get("usage"))
            self.is_at_end = True
        elif kind in ("message_stop", "error"):
            self.is_at_end = self.is_over = True

    def _see_message_usage(self, usage: object, *, is_early: bool = False) -> None:
        """Merge a usage of a message: members that the last one lacks keep the value of an earlier one. Example:

        message_start  {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 1}   input 9
        message_delta  {"output_tokens": 9}                                                    input 9, output 9
        """
        if not isinstance(usage, dict):
            return
        self._message_usage |= {name: value for name, value in usage.items() if value is not None}
        tokens = read_usage(self._message_usage)
        # No message has an empty input. A server that reports 0 at the beginning counts the input at the end.
        if tokens is not None and (tokens.input or not is_early):
            # The early output is a guess at the first tokens. They are counted when they come, so it is left out.
            self._report(replace(tokens, output=0, reasoning=0) if is_early else tokens)
            self._is_partial = is_early

    # --------------------------------------------------------------------------------------------------------
    # counting

    def _count_texts(self, part: object) -> None:
        """Count the texts in a piece of the answer, as at least one token if there is any text."""
        tokens = [self._count(text) for text in _texts_in(part)]
        if tokens:
            self._counted += max(1, sum(tokens))
            self._counted_since_report += max(1, sum(tokens))

    def _count_missing(self, part: object) -> None:
        """Count a text that an event repeats as a whole, as far as it exceeds what was counted so far.

        Some servers send no deltas, or not all. Example: deltas of 5 tokens, then `output_text.done` with 12: 7 are
        added. Then `content_part.done` and `output_item.done` repeat the same 12, and nothing is added.
        """
        missing = sum(map(self._count, _texts_in(part))) - self._counted
        if missing > 0:
            self._counted += missing
            self._counted_since_report += missing

    def _count_bytes(self, data: bytes) -> None:
        """Count data that can't be parsed by its length, at four bytes for a token, rounded up."""
        tokens = -(-len(data) // _BYTES_PER_TOKEN)
        self._counted += tokens
        self._counted_since_report += tokens

    def _report(self, tokens: Tokens | None) -> None:
        if tokens is not None:
            self._reported, self._counted_since_report = tokens, 0

    @property
    def _output_reported(self) -> int:
        return self._reported.output if self._reported else 0


def _texts_in(value: object) -> Iterator[str]:
    """The texts in a part of an answer, at any depth: content, refusals, arguments of tool calls."""
    stack = [value]  # not recursive, so that deep nesting cannot overflow the call stack
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            if value:
                yield value
        elif isinstance(value, list):
            stack += reversed(value)
        elif isinstance(value, dict):
            stack += [part for key, part in reversed(value.items()) if key not in _NOT_TEXT]
