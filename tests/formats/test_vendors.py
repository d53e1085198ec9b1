"""The usage that vendors and servers state, whole and streamed, and what is charged for it.

Each row is a documented or observed usage with its source and its right value. Vendors differ in where the usage is,
in what the output includes, and in what comes beside it.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.formats.endpoints import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Endpoint
from proxy.formats.meter import JSON
from proxy.formats.sse import Splitter
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import AtLeast, Exactly, Tokens
from tests.formats.streams import DONE, chunk, count, event, message, request, usage_chunk

TEXTS = ("Hello", " world!")


@dataclass(frozen=True)
class Vendor:
    """What a vendor states. `place` says where a stream has it; `running` is the usage on the chunks before."""

    source: str
    usage: JSON
    charged: Tokens
    place: str = "chunk"
    endpoint: Endpoint = CHAT
    kind: str = "openai"
    extra: tuple[str, ...] = ()
    running: JSON | None = None
    whole_place: str = "usage"

    def whole(self) -> JSON:
        """An answer that is not streamed."""
        answer = _WHOLE[self.endpoint.name]
        if self.whole_place == "choice":
            [choice] = answer["choices"]
            return {**answer, "choices": [{**choice, "usage": self.usage}]}
        return {**answer, "usage": self.usage}

    def stream(self) -> bytes:
        """A streamed answer."""
        return _STREAMS[self.place](self)


_WHOLE: dict[str, JSON] = {
    "chat": {"id": "c", "object": "chat.completion", "choices": [message("Hello world!")]},
    "completions": {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": "Hello world!"}]},
    "responses": {"id": "resp_1", "output": [{"type": "message", "content": [{"text": "Hello world!"}]}]},
    "messages": {"id": "msg_1", "type": "message", "content": [{"type": "text", "text": "Hello world!"}]},
}


def _texts(vendor: Vendor) -> bytes:
    more: Any = {} if vendor.running is None else {"usage": vendor.running}
    return b"".join(event(chunk(text, **more)) for text in TEXTS)


def _in_a_chunk_of_its_own(vendor: Vendor) -> bytes:
    return _texts(vendor) + event(chunk(finish="stop")) + event(usage_chunk(vendor.usage)) + DONE


def _on_the_finish_chunk(vendor: Vendor) -> bytes:
    return _texts(vendor) + event(chunk(finish="stop", usage=vendor.usage)) + DONE


def _in_the_choice(vendor: Vendor) -> bytes:
    last = chunk(finish="stop")
    last["choices"][0]["usage"] = vendor.usage
    return _texts(vendor) + event(last) + DONE


def _in_x_groq(vendor: Vendor) -> bytes:
    first = event(chunk("", x_groq={"id": "req_1"}))
    return first + _texts(vendor) + event(chunk(finish="stop", x_groq={"id": "req_1", "usage": vendor.usage})) + DONE


def _of_a_completion(vendor: Vendor) -> bytes:
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    pieces = [{"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": zeros} for text in TEXTS]
    return b"".join(map(event, pieces)) + event({"choices": [], "usage": vendor.usage}) + DONE


def _of_a_response(vendor: Vendor) -> bytes:
    events: list[JSON] = [{"type": "response.created", "response": {"id": "resp_1", "usage": None}}]
    events += [{"type": "response.output_text.delta", "delta": text} for text in TEXTS]
    events.append({"type": "response.completed", "response": {"id": "resp_1", "usage": vendor.usage}})
    return b"".join(map(event, events))


def _of_a_message(vendor: Vendor) -> bytes:
    start = {name: value for name, value in vendor.usage.items() if not name.startswith("output")}
    events: list[JSON] = [{"type": "message_start", "message": {"usage": {**start, "output_tokens": 1}}}]
    events += [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}} for text in TEXTS]
    events += [
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": vendor.usage},
        {"type": "message_stop"},
    ]
    return b"".join(map(event, events))


_STREAMS = {
    "chunk": _in_a_chunk_of_its_own,
    "finish": _on_the_finish_chunk,
    "choice": _in_the_choice,
    "x_groq": _in_x_groq,
    "completion": _of_a_completion,
    "response": _of_a_response,
    "message": _of_a_message,
}


def _usage(input_tokens: int, output_tokens: int, total: int | None = None, **more: Any) -> JSON:
    total = input_tokens + output_tokens if total is None else total
    return {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": total, **more}


VENDORS = {
    "OpenAI": Vendor(
        "OpenAI API reference, the chat completion object; openai-python types/completion_usage.py",
        _usage(
            19,
            30,
            prompt_tokens_details={"cached_tokens": 8, "audio_tokens": 0},
            completion_tokens_details={
                "reasoning_tokens": 20,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        ),
        Tokens(19, 30, cached=8, reasoning=20),
    ),
    "OpenAI responses": Vendor(
        "OpenAI API reference, the response object; openai-python types/responses/response_usage.py",
        {
            "input_tokens": 36,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 87,
            "output_tokens_details": {"reasoning_tokens": 64},
            "total_tokens": 123,
        },
        Tokens(36, 87, reasoning=64),
        place="response",
        endpoint=RESPONSES,
    ),
    "Azure": Vendor(
        "Azure OpenAI reference, chat completions with API version 2024-10-21",
        _usage(33, 557, completion_tokens_details={"reasoning_tokens": 448}, prompt_tokens_details=None),
        Tokens(33, 557, reasoning=448),
        kind="azure",
    ),
    "Anthropic": Vendor(
        "Anthropic API reference, Messages and prompt caching; anthropic-sdk-python types/usage.py",
        {
            "input_tokens": 31,
            "cache_creation_input_tokens": 100,
            "cache_read_input_tokens": 20,
            "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 12,
            "service_tier": "standard",
        },
        Tokens(151, 12, cached=20),
        place="message",
        endpoint=MESSAGES,
        kind="anthropic",
    ),
    "Gemini": Vendor(
        "Gemini API, OpenAI compatibility: thoughts are only in the total (numbers of mozilla-ai/any-llm issue 1290)",
        _usage(20, 198, 623),
        Tokens(20, 603),
        place="finish",
        running=_usage(20, 0, 425),
    ),
    "Gemini, all thoughts": Vendor(
        "Gemini API, OpenAI compatibility: an answer that its maximum ended while the model was thinking",
        _usage(10, 0, 215),
        Tokens(10, 205),
    ),
    "xAI": Vendor(
        "xAI documentation, chat completions of grok-3-mini and grok-4: reasoning is beside completion_tokens",
        _usage(
            32,
            9,
            135,
            prompt_tokens_details={"text_tokens": 32, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 6},
            completion_tokens_details={"reasoning_tokens": 94, "audio_tokens": 0},
            num_sources_used=0,
        ),
        Tokens(32, 103, cached=6, reasoning=94),
        place="finish",
        running=_usage(32, 1, 127, completion_tokens_details={"reasoning_tokens": 94}),
    ),
    "Mistral": Vendor(
        "Mistral API reference, chat: the usage is on the last chunk, beside its choice",
        _usage(16, 34, prompt_audio_seconds=None, num_cached_tokens=0),
        Tokens(16, 34),
        place="finish",
    ),
    "DeepSeek": Vendor(
        "DeepSeek API documentation, context caching and reasoning models: hits and misses are parts of the prompt",
        _usage(
            1200,
            300,
            prompt_cache_hit_tokens=1024,
            prompt_cache_miss_tokens=176,
            completion_tokens_details={"reasoning_tokens": 250},
        ),
        Tokens(1200, 300, cached=1024, reasoning=250),
    ),
    "Groq": Vendor(
        "Groq API reference, chat; groq-python types/chat/chat_completion_chunk.py (x_groq.usage)",
        _usage(18, 556, queue_time=0.03, prompt_time=0.0004, completion_time=0.46, total_time=0.46),
        Tokens(18, 556),
        place="x_groq",
    ),
    "Kimi": Vendor(
        "Moonshot AI platform documentation, streaming; earendil-works/pi issue 2017 (choices[0].usage)",
        _usage(19, 21, cached_tokens=10),
        Tokens(19, 21, cached=10),
        place="choice",
    ),
    "Kimi, whole": Vendor(
        "the same place in an answer that is not streamed",
        _usage(19, 21, cached_tokens=10),
        Tokens(19, 21, cached=10),
        place="choice",
        whole_place="choice",
    ),
    "Perplexity": Vendor(
        "Perplexity API documentation, sonar-deep-research: citations and reasoning are beside the total",
        _usage(33, 700, citation_tokens=2000, num_search_queries=18, reasoning_tokens=9000),
        Tokens(33, 11_700, reasoning=9000),
        place="finish",
        extra=("reasoning_tokens", "citation_tokens"),
        running=_usage(33, 1),
    ),
    "Perplexity sonar": Vendor(
        "Perplexity API documentation, sonar: with a cost, and no additional tokens",
        _usage(8, 439, search_context_size="low", cost={"total_cost": 0.006, "request_cost": 0.005}),
        Tokens(8, 439),
        place="finish",
        extra=("reasoning_tokens", "citation_tokens"),
    ),
    "OpenRouter": Vendor(
        "OpenRouter documentation, usage accounting",
        _usage(
            194,
            2,
            cost=0.95,
            cost_details={"upstream_inference_cost": 19},
            prompt_tokens_details={"cached_tokens": 0, "cache_write_tokens": 100, "audio_tokens": 0},
            completion_tokens_details={"reasoning_tokens": 0},
        ),
        Tokens(194, 2),
        place="finish",
    ),
    "Cohere": Vendor(
        "Cohere documentation, Compatibility API",
        _usage(10, 22),
        Tokens(10, 22),
        place="finish",
    ),
    "vLLM": Vendor(
        "vLLM entrypoints/openai/protocol.py, UsageInfo, with continuous_usage_stats",
        {"prompt_tokens": 40, "total_tokens": 47, "completion_tokens": 7, "prompt_tokens_details": None},
        Tokens(40, 7),
        kind="vllm",
        running={"prompt_tokens": 40, "total_tokens": 42, "completion_tokens": 2},
    ),
    "vLLM, null": Vendor(
        "vLLM entrypoints/openai/protocol.py: completion_tokens may be null",
        {"prompt_tokens": 40, "total_tokens": 47, "completion_tokens": None},
        Tokens(40, 7),
        kind="vllm",
    ),
    "SGLang": Vendor(
        "SGLang srt/entrypoints/openai/protocol.py, UsageInfo: reasoning_tokens at the top are a part of the output",
        _usage(25, 110, prompt_tokens_details={"cached_tokens": 4}, reasoning_tokens=90),
        Tokens(25, 110, cached=4, reasoning=90),
    ),
    "Ollama": Vendor(
        "Ollama openai/openai.go, type Usage, and middleware/openai.go",
        _usage(26, 298),
        Tokens(26, 298),
        kind="ollama",
    ),
    "Ollama completions": Vendor(
        "Ollama middleware/openai.go: zeros on each chunk of a completion before the last",
        _usage(26, 298),
        Tokens(26, 298),
        kind="ollama",
        endpoint=COMPLETIONS,
        place="completion",
    ),
    "llama.cpp": Vendor(
        "llama.cpp tools/server/README.md and server-task.cpp",
        _usage(44, 48, prompt_tokens_details={"cached_tokens": 40}),
        Tokens(44, 48, cached=40),
        kind="llamacpp",
    ),
    "LM Studio": Vendor(
        "LM Studio documentation, OpenAI compatibility and REST endpoints",
        _usage(24, 53, completion_tokens_details={"reasoning_tokens": 12}),
        Tokens(24, 53, reasoning=12),
    ),
    "LM Studio messages": Vendor(
        "LM Studio documentation, Anthropic compatibility",
        {"input_tokens": 24, "output_tokens": 53},
        Tokens(24, 53),
        place="message",
        endpoint=MESSAGES,
        kind="anthropic",
    ),
}


@pytest.mark.parametrize("asks", [False, True], ids=["unasked", "asked"])
@pytest.mark.parametrize("vendor", VENDORS.values(), ids=VENDORS)
def test_the_usage_of_a_vendor_is_charged_exactly(vendor: Vendor, asks: bool) -> None:
    """Whole and streamed, whether or not the client asked for the usage of the stream."""
    of = request(vendor.endpoint, **({"stream_options": {"include_usage": True}} if asks else {}), max_tokens=4096)
    whole, streamed = (
        meter_of(of, count=count, kind=vendor.kind, output_bound=4096, extra_usage=vendor.extra) for _ in range(2)
    )
    whole.see_whole(json.dumps(vendor.whole()).encode())
    for each in Splitter().feed(vendor.stream()):
        streamed.see_event(each)
    assert (whole.usage(), whole.uncounted_texts) == (Exactly(vendor.charged), [])
    assert (streamed.usage(), streamed.output_seen) == (Exactly(vendor.charged), vendor.charged.output)


@pytest.mark.parametrize("place", ["choice", "x_groq", "finish"])
def test_usage_that_a_vendor_writes_unasked_passes_unchanged(place: str) -> None:
    """The client would have got it without the proxy. Only the usage chunk that the proxy asked for is removed."""
    vendor = Vendor("", _usage(19, 21), Tokens(19, 21), place=place)
    stream = vendor.stream()
    asked = stream.removesuffix(DONE) + event(usage_chunk(vendor.usage)) + DONE
    meter = meter_of(request(), count=count)
    assert b"".join(meter.see_event(each) for each in Splitter().feed(asked)) == stream
    assert meter.usage() == Exactly(vendor.charged)


def test_the_usages_of_several_choices_are_added() -> None:
    """Inside the choices each states its own output. The sum is at most what the call could have used."""
    several = request(n=2, stream=False)

    def answer(*outputs: int, **more: Any) -> bytes:
        choices = [{**message("a"), "index": at, "usage": _usage(11, each)} for at, each in enumerate(outputs)]
        return json.dumps({"choices": choices, **more}).encode()

    for outputs, charged in (((5, 7), 12), ((60, 60), 100), ((200, 200), 200), ((5, 7, 9), 12)):
        meter = meter_of(several, count=count, output_bound=100)
        meter.see_whole(answer(*outputs))
        assert meter.usage() == Exactly(Tokens(11, charged))
    meter = meter_of(several, count=count, output_bound=100)
    meter.see_whole(answer(5, 7, usage=_usage(11, 12)))
    assert meter.usage() == Exactly(Tokens(11, 12))


def test_a_choice_that_states_its_usage_twice_is_counted_once() -> None:
    """Of each choice the largest counts, whichever chunk it is on."""
    meter = meter_of(request(n=2), count=count)
    for index, output in ((0, 3), (1, 4), (0, 5), (1, 0)):
        piece = chunk("a")
        piece["choices"][0] |= {"index": index, "usage": _usage(11, output)}
        for each in Splitter().feed(event(piece)):
            meter.see_event(each)
    assert meter.usage() == Exactly(Tokens(11, 9))


@pytest.mark.parametrize("choices", [1, 2])
def test_a_usage_in_a_choice_that_falls_is_charged_at_least_the_text(choices: int) -> None:
    """As everywhere else: an upstream that contradicts itself is not believed against our own count."""
    meter = meter_of(request(n=choices), count=count)
    for output in (2, 1):
        for index in range(choices):
            piece = chunk("xxx")
            piece["choices"][0] |= {"index": index, "usage": _usage(11, output)}
            for each in Splitter().feed(event(piece)):
                meter.see_event(each)
    assert meter.usage() == AtLeast(Tokens(11, 6 * choices))


def test_until_each_choice_has_stated_its_usage_the_texts_are_counted() -> None:
    """A stream that breaks off after the usage of the first choice is not charged that choice alone."""
    meter = meter_of(request(n=2), count=count)
    for index, more in ((0, {}), (1, {}), (0, {"usage": _usage(11, 1)})):
        piece = chunk("abc")
        piece["choices"][0] |= {"index": index, **more}
        for each in Splitter().feed(event(piece)):
            meter.see_event(each)
    assert meter.usage() == AtLeast(Tokens(0, 9))


def test_the_usage_in_a_choice_is_no_text() -> None:
    """Its numbers may be written as text."""
    usage = {"prompt_tokens": "x", "completion_tokens": "1234", "currency": "USD"}
    meter = meter_of(request(stream=False), count=count)
    meter.see_whole(json.dumps({"choices": [{**message("a"), "usage": usage}]}).encode())
    assert meter.uncounted_texts == ["a"]


@pytest.mark.parametrize(
    "event_of",
    [
        {"usage": _usage(11, 5)},
        {"x_vendor": {"usage": _usage(11, 5)}},
        {"choices": [{"index": 0, "delta": {}, "usage": _usage(11, 5)}]},
    ],
)
def test_a_usage_beside_a_response_is_charged(event_of: JSON) -> None:
    """A gateway may write it on the event instead of in the response."""
    meter = meter_of(request(RESPONSES), count=count)
    for raw in ({"type": "response.output_text.delta", "delta": "a"}, {"type": "response.completed", **event_of}):
        for each in Splitter().feed(event(raw)):
            meter.see_event(each)
    assert meter.usage() == Exactly(Tokens(11, 5))
    meter = meter_of(request(RESPONSES, stream=False), count=count)
    meter.see_whole(json.dumps({"output": [{"content": [{"text": "a"}]}], **event_of}).encode())
    assert (meter.usage(), meter.uncounted_texts) == (Exactly(Tokens(11, 5)), [])


def test_the_table_names_every_vendor() -> None:
    """Each with the source of what it states."""
    named = {name.split(",")[0].split()[0] for name in VENDORS}
    assert named >= {
        *("OpenAI", "Azure", "Anthropic", "Gemini", "xAI", "Mistral", "DeepSeek", "Groq", "Kimi", "Perplexity"),
        *("OpenRouter", "Cohere", "vLLM", "SGLang", "Ollama", "llama.cpp", "LM"),
    }
    assert all(vendor.source for vendor in VENDORS.values())
