"""A meter measures an answer exactly, and returns the bytes that the client would have got without the proxy.

Sources: docs/wire.md, sections 2.2 and 2.3 (usage in streams) and 2.4 (events of /responses); docs/threats.md, T36
and T39 to T45 and "What is charged for strange usage". The true usage of an answer there is 11 tokens of input and 5
of output.
"""

import json
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.endpoints import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    EMBEDDINGS,
    IMAGES,
    INPUT_TOKENS,
    MESSAGES,
    MODERATIONS,
    RESPONSES,
    SPEECH,
    Endpoint,
)
from proxy.formats.meter import Meter
from proxy.formats.request import Request, parse_request
from proxy.formats.sse import Event, Splitter
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Unspent, Usage

HONEST = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
DONE = b"data: [DONE]\n\n"


def request(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A streamed request. It does not ask for usage unless `fields` do."""
    return parse_request(endpoint, json.dumps({"model": "m", "stream": True, **fields}).encode())


UNASKED = request()
ASKED = request(stream_options={"include_usage": True})


def count(text: str) -> int:
    """A simple tokenizer: one token for each byte."""
    return len(text.encode("utf-8", "surrogatepass"))


def new(of: Request = UNASKED, *, kind: str = "openai") -> Meter:
    """A new meter."""
    return Meter(of, count=count, kind=kind)


def watch(
    stream: bytes, of: Request = UNASKED, cuts: list[int] | None = None, *, kind: str = "openai"
) -> tuple[Meter, bytes]:
    """Feed a whole stream, cut at these offsets; return the meter and the bytes for the client."""
    meter, splitter = new(of, kind=kind), Splitter()
    offsets = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    shown = b"".join(
        meter.see_event(event) for start, end in pairwise(offsets) for event in splitter.feed(stream[start:end])
    )
    return meter, shown + splitter.end()


def usage_of(stream: bytes, of: Request = UNASKED) -> Usage:
    """The usage of a stream."""
    return watch(stream, of)[0].usage()


def whole(body: bytes | dict, endpoint: Endpoint = CHAT) -> Meter:
    """A meter that has seen this whole answer."""
    meter = new(request(endpoint, stream=False))
    meter.see_whole(body if isinstance(body, bytes) else json.dumps(body).encode())
    return meter


def event(document: object, spaced: bool = False) -> bytes:
    """An event with this JSON, without spaces unless `spaced`."""
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(document, separators=separators, ensure_ascii=spaced).encode() + b"\n\n"


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> dict:
    """A chunk of a chat stream with one choice."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def usage_chunk(usage: object = None, **more: object) -> dict:
    """The chunk that is sent only if usage is requested."""
    return {**chunk(), "choices": [], "usage": HONEST if usage is None else usage, **more}


TEXT = event(chunk("Hello")) + event(chunk(" world!"))  # two chunks, 12 bytes
FINISH = event(chunk(finish="stop"))
COUNTED = AtLeast(Tokens(0, 12))
REPORTED = Exactly(Tokens(11, 5))
UNCOUNTED = AtLeast(Tokens(0, 0))  # a whole answer without usage: the caller counts its texts


# ------------------------------------------------------------------------------------------- the end of a chat stream


def test_the_usage_chunk_is_charged_and_removed() -> None:
    """If the client did not ask for usage, it gets no chunk without a choice (T36)."""
    meter, shown = watch(TEXT + FINISH + event(usage_chunk()) + DONE)
    assert shown == TEXT + FINISH + DONE
    assert meter.usage() == REPORTED
    assert isinstance(meter.usage(), Exactly)
    assert not meter.has_error


def test_a_client_that_asked_for_usage_gets_it() -> None:
    """The stream is forwarded byte for byte."""
    null = event(chunk("Hello", usage=None), spaced=True)
    stream = null + event(chunk(" ", usage=ZEROS)) + FINISH + event(usage_chunk()) + DONE
    meter, shown = watch(stream, ASKED)
    assert shown == stream
    assert meter.usage() == REPORTED


def test_the_end_begins_with_the_usage_chunk_and_is_over_with_done() -> None:
    """Everything from the usage chunk on is kept until the call is settled."""
    meter = new()
    states = []
    for raw in (event(chunk("Hello")), FINISH, event(usage_chunk()), DONE):
        (seen,) = Splitter().feed(raw)
        meter.see_event(seen)
        states.append((meter.is_at_end, meter.is_over))
    assert states == [(False, False), (False, False), (True, False), (True, True)]


def test_the_meter_exposes_the_object_of_the_last_event() -> None:
    """The ending is built from these objects. It is None if the event has no JSON object."""
    meter = new()
    for raw, chunk_of_event in (
        (event(chunk("Hello")), chunk("Hello")),
        (b": ping\n\n", None),
        (event(usage_chunk()), usage_chunk()),
        (b"data: [1]\n\n", None),
        (event({"x": 1}), {"x": 1}),
        (DONE, None),
    ):
        meter.see_event(Splitter().feed(raw)[0])
        assert meter.chunk == chunk_of_event


@pytest.mark.parametrize(
    ("of", "begins"),
    [(UNASKED, b"data: {"), (request(COMPLETIONS), b"data: {"), (request(RESPONSES), b"event: response.")],
)
def test_the_ending_fits_the_request(of: Request, begins: bytes) -> None:
    """It has the format of the endpoint, and as many choices as were requested."""
    meter = new(of)
    assert meter.ending.at_limit(Tokens(11, 5), shows_usage=meter.shows_usage).startswith(begins)
    both = new(request(n=2)).ending.at_limit(Tokens(11, 5), shows_usage=False)
    assert both.count(b'"finish_reason":"length"') == 2
    assert [new(each).shows_usage for each in (UNASKED, ASKED)] == [False, True]


def test_without_usage_done_is_the_end() -> None:
    """Also with trailing characters, which the Python SDK accepts as the end."""
    for end in (b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"):
        meter, shown = watch(TEXT + FINISH + end)
        assert (meter.is_at_end, meter.is_over) == (True, True)
        assert shown == TEXT + FINISH + end
        assert meter.usage() == COUNTED
        assert not isinstance(meter.usage(), Exactly)


def test_with_several_choices_a_usage_chunk_is_not_yet_the_end() -> None:
    """llama.cpp sends one as soon as one choice is finished; the chunks of the others must not be kept (T45)."""
    several = request(n=2, stream_options={"include_usage": True})
    meter, shown = watch(TEXT + event(usage_chunk()), several)
    assert (meter.is_at_end, shown) == (False, TEXT + event(usage_chunk()))
    assert watch(TEXT + event(usage_chunk()) + DONE, several)[0].is_over


def test_the_usage_chunks_of_several_choices_add_up() -> None:
    """llama.cpp sends one for each choice, with the same input each time; others send one for all."""
    several = request(n=3)
    longer = {**HONEST, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 2}}
    each = event(usage_chunk()) + TEXT + event(usage_chunk(longer)) + event(usage_chunk(longer))
    assert usage_of(TEXT + each + DONE, several) == Exactly(Tokens(11, 5 + 7 + 7, reasoning=4))
    assert usage_of(TEXT + event(usage_chunk()) + DONE, several) == REPORTED
    assert usage_of(event(usage_chunk({"total_tokens": -1})) + event(usage_chunk()) + DONE, several) == REPORTED


def test_running_usage_of_one_of_several_choices_is_ignored() -> None:
    """vLLM reports the usage of that choice only. The texts are counted until the usage of all choices comes."""
    several = request(n=2, stream_options={"include_usage": True})
    text = event(chunk("Hello", usage={**HONEST, "completion_tokens": 1})) * 2
    meter, shown = watch(text, several)
    assert (meter.usage(), meter.output_seen, meter.input_reported) == (AtLeast(Tokens(0, 10)), 10, None)
    assert shown == text
    assert usage_of(text + event(usage_chunk()) + DONE, several) == REPORTED


def test_a_stream_without_done_is_forwarded_as_it_is() -> None:
    """No [DONE] is added, and the bytes of an unfinished event are forwarded too (T40)."""
    meter, shown = watch(TEXT + b"data: {", ASKED)
    assert shown == TEXT + b"data: {"
    assert (meter.is_at_end, meter.is_over, meter.has_error) == (False, False, False)
    assert meter.usage() == COUNTED


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (TEXT + event(chunk(finish="stop", usage=HONEST)) + DONE, REPORTED),
        (event(chunk("Hello", usage={**HONEST, "completion_tokens": 1})) + event(usage_chunk()) + DONE, REPORTED),
        (
            event(usage_chunk()) + event(usage_chunk({**HONEST, "completion_tokens": 7})) + DONE,
            Exactly(Tokens(11, 7)),
        ),
        (event(usage_chunk()) + event(usage_chunk({**HONEST, "prompt_tokens": -1})) + DONE, REPORTED),
        (event(usage_chunk()) + TEXT + event(chunk(usage=ZEROS)) + DONE, AtLeast(Tokens(11, 5 + 12))),
        (TEXT + event(chunk("!", usage=HONEST)) + event(chunk(finish="stop")) + DONE, REPORTED),
        (TEXT + DONE + event(usage_chunk()), REPORTED),
        (event({"usage": HONEST}) + DONE, REPORTED),
        (TEXT + event(usage_chunk(ZEROS)) + DONE, Exactly(Tokens(0, 0))),
    ],
)
def test_the_last_valid_usage_counts(stream: bytes, expected: Usage) -> None:
    """On any chunk, even beside the last choice or after [DONE]. An explicit zero at the end is a zero.

    A usage before the last text covers what came before it; the text after it is counted.
    """
    for of in (UNASKED, ASKED):
        assert usage_of(stream, of) == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (HONEST, REPORTED),
        ({"prompt_tokens": 11, "completion_tokens": 5}, REPORTED),
        ({**HONEST, "total_tokens": 9999}, REPORTED),
        ({"prompt_tokens": "11", "completion_tokens": "5"}, REPORTED),
        ({"prompt_tokens": 11.0, "completion_tokens": 5.0}, REPORTED),
        ({"total_tokens": 16}, Exactly(Tokens(0, 16))),
        ({**HONEST, "prompt_tokens_details": {"cached_tokens": 9}}, Exactly(Tokens(11, 5, cached=9))),
        ({**HONEST, "completion_tokens_details": {"reasoning_tokens": 4000}}, Exactly(Tokens(11, 5, reasoning=5))),
        ({**HONEST, "completion_tokens": 1_000_000}, Exactly(Tokens(11, 1_000_000))),
        (ZEROS, Exactly(Tokens(0, 0))),
        ({**HONEST, "prompt_tokens": 11.7}, COUNTED),
        ({**HONEST, "completion_tokens": -5}, COUNTED),
        ({**HONEST, "completion_tokens": True}, COUNTED),
        ({**HONEST, "completion_tokens": [5]}, COUNTED),
        ({**HONEST, "prompt_tokens": 10**30}, COUNTED),
        ({**HONEST, "prompt_tokens": 2**63}, COUNTED),
        ({"prompt_tokens": None, "completion_tokens": None}, COUNTED),
        ({}, COUNTED),
        ([11, 5], COUNTED),
        ("16", COUNTED),
        (16, COUNTED),
        (True, COUNTED),
    ],
)
def test_strange_usage_is_charged_or_the_text_is_counted(usage: object, expected: Usage) -> None:
    """There is never an exception, and never a charge of an absurd number (T43)."""
    assert usage_of(TEXT + event(usage_chunk(usage)) + DONE) == expected
    meter = whole({"choices": [{"message": {"content": "Hello world!"}}], "usage": usage})
    assert meter.usage() == (UNCOUNTED if expected == COUNTED else expected)
    assert meter.uncounted_texts == (["Hello world!"] if expected == COUNTED else [])


def test_a_usage_chunk_with_nan_is_removed_and_not_charged() -> None:
    """NaN is no count, so the text is counted. But some clients parse it, so it is a usage chunk all the same."""
    raw = b'data: {"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":5}}\n\n'
    meter, shown = watch(TEXT + raw + DONE)
    assert (meter.usage(), shown) == (COUNTED, TEXT + DONE)
    assert watch(TEXT + raw + DONE, ASKED)[1] == TEXT + raw + DONE


def test_text_with_an_unpaired_surrogate_is_counted() -> None:
    """It is not valid JSON, and neither is NaN, but Python's parser accepts both."""
    raw = b'data: {"choices":[{"index":0,"delta":{"content":"ab\\ud800"},"x":NaN}]}\n\n'
    meter, shown = watch(raw)
    assert (meter.usage(), shown) == (AtLeast(Tokens(0, 5)), raw)


# ---------------------------------------------------------------------------------------------------- what is removed


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system_fingerprint": "fp", "service_tier": "default", "obfuscation": "xyz"},
        {"prompt_filter_results": None, "timings": None, "error": None},
    ],
)
def test_a_chunk_with_only_usage_is_dropped(more: dict) -> None:
    """Members that any chunk may have, and null members, do not count: the client misses nothing."""
    assert watch(TEXT + event(usage_chunk(**more)) + DONE)[1] == TEXT + DONE


@pytest.mark.parametrize(
    "more",
    [
        {"prompt_filter_results": [{"prompt_index": 0}]},
        {"prompt_annotations": []},
        {"timings": {"prompt_n": 11, "predicted_n": 5}},
        {"moderation": {}},
        {"error": {"message": "x"}},
        {"x_vendor": 0},
    ],
)
@pytest.mark.parametrize("spaced", [False, True])
def test_a_usage_chunk_with_other_members_is_kept_without_its_usage(more: dict, spaced: bool) -> None:
    """llama.cpp's timings and Azure's filter results would have come without the proxy too."""
    meter, shown = watch(TEXT + event(usage_chunk(**more), spaced) + DONE)
    expected = {name: value for name, value in usage_chunk(**more).items() if name != "usage"}
    assert shown == TEXT + event(expected) + DONE
    assert meter.usage() == REPORTED
    assert meter.is_at_end


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b'{"id":"1","choices":[],"usage":null}', b'{"id":"1","choices":[]}'),
        (b'{"id":"1","usage":null,"choices":[]}', b'{"id":"1","choices":[]}'),
        (b'{"usage":null,"id":"1","choices":[]}', b'{"id":"1","choices":[]}'),
        (b'{"id": "1", "choices": [], "usage": null}', b'{"id": "1", "choices": []}'),
        (b'{"id": "1", "usage": null, "choices": []}', b'{"id": "1", "choices": []}'),
        (b'{"usage": null, "id": "1", "choices": []}', b'{"id": "1", "choices": []}'),
        (b'{ "id":1.50,"x":1E5,"y":"\\u00e9\\/","usage":null }', b'{ "id":1.50,"x":1E5,"y":"\\u00e9\\/" }'),
        # Strings that look like the member, or are the word itself.
        (rb'{"t":",\"usage\":null","usage":null}', rb'{"t":",\"usage\":null"}'),
        (rb'{"t":"\\",  "usage": null, "u":"usage"}', rb'{"t":"\\",  "u":"usage"}'),
        (b'{"usage":null,"t":"usage", "n":1.0}', b'{"t":"usage", "n":1.0}'),
        (b'{"t":"usage", "n":1.0, "usage": null}', b'{"t":"usage", "n":1.0}'),
        # Members of that name in inner objects stay.
        (b'{"a":{"usage":null},"n":1.0,"usage":null}', b'{"a":{"usage":null},"n":1.0}'),
        (b'{"a":{"x":1,"usage":null},"n":1.0,"usage":null}', b'{"a":{"x":1,"usage":null},"n":1.0}'),
        (b'{"a":{"x":1,"usage":null,"y":2},"n":1.0,"usage":null}', b'{"a":{"x":1,"usage":null,"y":2},"n":1.0}'),
        (b'{"usage":null,"a":{"x":1,"usage":null}}', b'{"a":{"x":1,"usage":null}}'),
        (
            b'{"a":[{"usage":null},{"usage":null}],"usage":null,"n":1.0}',
            b'{"a":[{"usage":null},{"usage":null}],"n":1.0}',
        ),
    ],
)
@pytest.mark.parametrize(
    "frame", [b"data: %b\n\n", b"data:%b\r\n\r\n", b": hi\ndata: %b\n\n", b"event: e\rdata: %b\r\r"]
)
def test_only_the_null_usage_is_cut_out(raw: bytes, shown: bytes, frame: bytes) -> None:
    """It is there only because the proxy asked. Numbers, escapes and line ends stay as they were."""
    assert json.loads(shown) == {name: value for name, value in json.loads(raw).items() if name != "usage"}
    assert watch(frame % raw)[1] == frame % shown


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b'{"id":1 ,  "usage" : null}', b'{"id":1}'),
        (b'{"id":1,"us\\u0061ge":null}', b'{"id":1}'),
        (b'{"a":{"x":1,"usage":null},"usage" : null}', b'{"a":{"x":1,"usage":null}}'),
        (b'{"usage":null}', b"{}"),
    ],
)
def test_a_chunk_with_an_unusual_spelling_is_serialized_anew(raw: bytes, shown: bytes) -> None:
    """The result has the same members, and no other member is removed by mistake."""
    assert watch(b"data: %b\r\n\r\n" % raw)[1] == b"data: %b\n\n" % shown


def test_json_over_several_data_lines_is_serialized_anew() -> None:
    """If the member can't be cut out, the event becomes one line with the same content."""
    raw = b'data: {"id":1,"a":{"usage":null},\ndata: "usage":null}\n\n'
    assert watch(raw)[1] == event({"id": 1, "a": {"usage": None}})


def test_zeros_on_every_chunk_are_placeholders() -> None:
    """Ollama's /completions sends them if usage is requested. They are no usage, and not for the client."""
    completions = request(COMPLETIONS)

    def text(**more: object) -> bytes:
        return event({"id": "c", "choices": [{"text": "Hello world!", "index": 0, "finish_reason": None}], **more})

    with_zeros = text(usage=ZEROS)
    assert watch(with_zeros + with_zeros, completions)[1] == text() + text()
    assert usage_of(with_zeros, completions) == COUNTED  # the stream broke off here; the answer is not free
    assert usage_of(with_zeros + event(usage_chunk()) + DONE, completions) == REPORTED
    asked = request(COMPLETIONS, stream_options={"include_usage": True})
    assert watch(with_zeros, asked)[1] == with_zeros


def test_usage_beside_a_choice_is_not_removed() -> None:
    """Some upstreams send it there unasked, so the client would have got it without the proxy."""
    stream = TEXT + event(chunk(finish="stop", usage=HONEST)) + DONE
    assert watch(stream)[1] == stream


def test_a_usage_that_is_neither_null_nor_an_object_is_not_removed() -> None:
    """It did not come because usage was requested."""
    for usage in ("16", 16, [], False):
        stream = event(chunk("x", usage=usage)) + event(usage_chunk(usage)) + DONE
        assert watch(stream)[1] == stream


WORDS = ["a", "é😀", "usage", '"usage"', ',"usage":null', '"usage": null, ', "data: [DONE]", "\\", '\\"', "\n\n", " "]
texts = st.lists(st.sampled_from(WORDS), max_size=3).map("".join)
inner = st.fixed_dictionaries({}, optional={"usage": st.none() | texts, "x": st.integers() | texts | st.floats(0, 1)})
deltas = st.fixed_dictionaries({}, optional={"content": texts, "reasoning_content": texts, "vendor": inner})
choices = st.lists(st.fixed_dictionaries({"index": st.just(0), "delta": deltas}), max_size=2)
chunks = st.fixed_dictionaries(
    {"id": texts, "choices": choices}, optional={"created": st.integers(), "vendor": inner}
)
rendering = st.fixed_dictionaries(
    {
        "end": st.sampled_from(["\n", "\r\n", "\r"]),
        "start": st.sampled_from(["data: ", "data:", ": note{end}data: ", "{end}data: "]),
        "separators": st.sampled_from([(",", ":"), (", ", ": ")]),
        "ensure_ascii": st.booleans(),
    }
)


def render(document: object, how: dict) -> bytes:
    """One event, with the line ends, spaces and escapes of some server."""
    text = json.dumps(document, separators=how["separators"], ensure_ascii=how["ensure_ascii"])
    return (how["start"].format(end=how["end"]) + text + 2 * how["end"]).encode()


@given(
    documents=st.lists(st.tuples(chunks, st.integers(0, 3)), max_size=5),
    how=rendering,
    cuts=st.lists(st.integers(0, 900), max_size=6),
    with_usage_chunk=st.booleans(),
)
def test_the_client_gets_what_it_would_have_got_without_the_proxy(
    documents: list, how: dict, cuts: list[int], with_usage_chunk: bool
) -> None:
    """From a stream with `usage: null` on every chunk and the usage chunk, exactly these are removed."""
    with_usage, without = b"", b""
    for document, place in documents:
        members = list(document.items())
        members.insert(min(place, len(members)), ("usage", None))
        with_usage += render(dict(members), how)
        without += render(document, how)
    # A comment before the usage chunk belongs to the same event and is dropped with it, so there is none here.
    with_usage += render(usage_chunk(), {**how, "start": "data: "}) if with_usage_chunk else b""
    done = b"data: [DONE]" + 2 * how["end"].encode()
    meter, shown = watch(with_usage + done, cuts=cuts)
    assert shown == without + done
    assert isinstance(meter.usage(), Exactly) == with_usage_chunk
    assert watch(with_usage + done, ASKED, cuts)[1] == with_usage + done


@given(
    documents=st.lists(st.tuples(chunks.filter(lambda chunk: chunk["choices"]), st.integers(1, 9)), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 900), max_size=6),
)
def test_running_usage_is_removed_without_a_trace(documents: list, end: str, cuts: list[int]) -> None:
    """From a stream of vLLM with the usage so far on every chunk, exactly that is removed."""
    how = {"end": end, "start": "data: ", "separators": (",", ":"), "ensure_ascii": False}
    without = b"".join(render(document, how) for document, _ in documents)
    outputs = [*accumulate(output for _, output in documents)]
    running = b"".join(
        render({**document, "usage": so_far(output)}, how)
        for (document, _), output in zip(documents, outputs, strict=True)
    )
    meter, shown = watch(running, cuts=cuts, kind="vllm")
    assert shown == without
    if documents:
        assert meter.usage() == Exactly(Tokens(11, outputs[-1]))
    assert watch(running, ASKED, cuts)[1] == running


@given(pieces=st.lists(st.sampled_from([TEXT, b"\n", b"\r", b"data: ", b"{", b'"usage":', b"}", b"null", b"\xff"])))
def test_data_that_cannot_be_parsed_is_forwarded(pieces: list[bytes]) -> None:
    """Whatever comes, nothing is raised, and no stream without usage is changed (T41)."""
    stream = b"".join(pieces)
    assert watch(stream, ASKED)[1] == stream
    shown = watch(stream)[1]
    if b"usage" not in stream:
        assert shown == stream


# ----------------------------------------------------------------------------------------------- running usage (vLLM)


def so_far(output: int, **more: object) -> dict:
    """The usage so far that vLLM writes on each chunk, with the members in its order."""
    return {"prompt_tokens": 11, "total_tokens": 11 + output, "completion_tokens": output, **more}


ROLE = event(chunk(usage=so_far(0)))
RUNNING = ROLE + event(chunk("Hello", usage=so_far(3))) + event(chunk(" world!", usage=so_far(4)))


def test_the_usage_of_a_cut_stream_is_exact() -> None:
    """If each chunk reports the usage so far, it is exact at any point, and the input is known from the start."""
    assert usage_of(RUNNING) == Exactly(Tokens(11, 4))
    assert isinstance(usage_of(RUNNING), Exactly)
    assert usage_of(ROLE) == Exactly(Tokens(11, 0))
    meter, _ = watch(ROLE)
    assert (meter.output_seen, meter.input_reported) == (0, 11)
    meter, _ = watch(RUNNING)
    assert (meter.output_seen, meter.input_reported) == (4, 11)


def test_text_after_the_last_report_is_added() -> None:
    """The usage is then no longer exact, until the next report."""
    meter, _ = watch(RUNNING + event(chunk("12345")))
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(11, 4 + 5)), 9)
    cached = event(chunk("a", usage=so_far(4, prompt_tokens_details={"cached_tokens": 9})))
    assert usage_of(cached + event(chunk("12345"))) == AtLeast(Tokens(11, 9, cached=9))
    meter, _ = watch(RUNNING + event(chunk("12345")) + event(chunk("6", usage=so_far(6))))
    assert (meter.usage(), meter.output_seen) == (Exactly(Tokens(11, 6)), 6)


def test_an_invalid_report_is_ignored() -> None:
    """The report before it counts, with the text since then."""
    assert usage_of(RUNNING + event(chunk("12345", usage=so_far(-1)))) == AtLeast(Tokens(11, 9))
    assert usage_of(event(chunk("12345", usage=so_far(-1)))) == AtLeast(Tokens(0, 5))


def test_a_report_that_does_not_rise_with_the_text_is_ignored() -> None:
    """It covers only what came before, or the server does not update it. So each text beside it is counted."""
    stuck = event(chunk("Hello", usage=so_far(4))) + event(chunk("12345", usage=so_far(4)))
    assert usage_of(stuck) == AtLeast(Tokens(11, 4 + 5))
    assert usage_of(stuck + event(chunk("6", usage=so_far(3)))) == AtLeast(Tokens(11, 4 + 6))
    assert usage_of(stuck + event(chunk("6", usage=so_far(7)))) == Exactly(Tokens(11, 7))
    assert usage_of(event(chunk("Hello", usage=so_far(0)))) == AtLeast(Tokens(0, 5))
    assert usage_of(RUNNING + event(chunk(finish="stop", usage=so_far(4)))) == Exactly(Tokens(11, 4))


def test_the_usage_chunk_after_running_usage_ends_the_answer() -> None:
    """It is treated as if there had been no reports before it."""
    meter, shown = watch(RUNNING + FINISH + event(usage_chunk()) + DONE, ASKED, kind="vllm")
    assert (meter.usage(), meter.is_over) == (REPORTED, True)
    assert shown == event(chunk()) + TEXT + FINISH + event(usage_chunk()) + DONE


@pytest.mark.parametrize("of", [UNASKED, ASKED])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_the_running_usage_is_cut_out(of: Request, end: str) -> None:
    """If only the proxy asked for it. Numbers, escapes and line ends stay as they were."""
    raw = (
        '{"id":"1.50","n":1.50,"choices":[{"index":0,"delta":{"content":"\\u00e9 ,\\"usage\\":{}"},"logprobs":null}]'
        ',"usage":{"prompt_tokens":11,"total_tokens":12,"completion_tokens":1,"prompt_tokens_details":null}}'
    )
    frame = f"data: %s{end}{end}"
    meter, shown = watch((frame % raw).encode(), of, kind="vllm")
    assert shown.decode() == frame % (raw[: raw.rindex(',"usage"')] + "}")
    assert meter.usage() == Exactly(Tokens(11, 1))


def test_running_usage_that_the_proxy_did_not_ask_for_is_forwarded() -> None:
    """The stream is forwarded byte for byte."""
    assert watch(RUNNING, ASKED)[1] == RUNNING
    assert watch(RUNNING)[1] == RUNNING  # some servers send it unasked


def test_placeholders_are_removed_beside_running_usage() -> None:
    """Null and zeros are removed, as in a stream without running usage."""
    zeros = event(chunk("a", usage=ZEROS)) + event(chunk("b", usage=None)) + event(chunk("c", usage=so_far(3)))
    assert watch(zeros, kind="vllm")[1] == event(chunk("a")) + event(chunk("b")) + event(chunk("c"))


# ---------------------------------------------------------------------------------------------- streams without usage


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        (b'data: {"choices":[{"delta":{"content":"\n\n', 9),
        (b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n', 10),
        (b"data: null\n\n", 1),
        (b'data: ["Hello"]\n\n', 3),
        (b"data: <html>\n\n", 2),
        (b'data: {"a":' + b"[" * 2000 + b"]" * 2000 + b"}\n\n", 1002),
        (b"data: \n\n", 0),
        (b"data\n\n", 0),
        (b": OPENROUTER PROCESSING\n\n", 0),
        (b"event: ping\n\n", 0),
        (b"\n", 0),
        (b"id: 1\n\n", 0),
        (b": " + b"x" * 65_532 + b"\n\n", 0),
    ],
)
def test_events_that_are_no_chunk_are_forwarded(raw: bytes, tokens: int) -> None:
    """In the middle of a stream (T41). A client may understand data that can't be parsed here, so its bytes count.

    Comments and events without data count as nothing.
    """
    meter, shown = watch(TEXT + raw + event(usage_chunk()) + DONE)
    assert shown == TEXT + raw + DONE
    assert meter.usage() == REPORTED
    meter, _ = watch(TEXT + raw)
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 12 + tokens)), 12 + tokens)
    assert usage_of(event(chunk("a", usage=so_far(1))) + raw) == (
        AtLeast(Tokens(11, 1 + tokens)) if tokens else Exactly(Tokens(11, 1))
    )


@pytest.mark.parametrize(
    "choices", [None, {}, "text", 5, [None], ["text", 5], [[]], [{"delta": None}], [{"delta": []}]]
)
def test_choices_of_any_type_are_forwarded(choices: object) -> None:
    """Wrong types raise nothing."""
    raw = event({"id": "c", "choices": choices})
    assert watch(raw)[1] == raw


def test_an_event_too_large_to_parse_is_forwarded() -> None:
    """It comes in large pieces without data, whose bytes count. A last piece that is small counts as nothing."""
    meter = new()
    for raw, seen in ((b"x" * 65_537, 16_385), (b"x\n", 16_385), (b"y" * 80_000, 36_385)):
        assert meter.see_event(Event(raw, None, None)) == raw
        assert meter.output_seen == seen
    assert meter.usage() == AtLeast(Tokens(0, 36_385))
    assert meter.chunk is None


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x" * 400},
        {"refusal": "x" * 400},
        {"reasoning_content": "x" * 400},
        {"reasoning": "x" * 400},
        {"thinking_blocks": [{"type": "thinking", "thinking": "x" * 400}]},
        {
            "tool_calls": [
                {"index": 0, "id": "c", "type": "function", "function": {"name": "f" * 5, "arguments": "x" * 395}}
            ]
        },
        {"function_call": {"name": "f", "arguments": "x" * 399}},
        {"audio": {"id": "a", "data": "AAAA" * 999, "transcript": "x" * 400}},
        {"content": "é" * 200},
        {"content": "😀" * 100},
    ],
)
def test_all_text_of_the_model_is_counted(delta: dict) -> None:
    """Tool calls, refusals and visible reasoning are output like any text."""
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": None}
    assert usage_of(event({"choices": [choice]})) == AtLeast(Tokens(0, 400))


@pytest.mark.parametrize(
    "choice",
    [
        {"delta": {"role": "assistant", "content": ""}},
        {"delta": {}, "finish_reason": "stop", "stop_reason": "</s>", "native_finish_reason": "end_turn"},
        {"delta": {}, "content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}},
        {"delta": {}, "logprobs": {"content": [{"token": "Hello", "top_logprobs": [{"token": "Hi"}]}]}},
        {"text": "", "logprobs": {"tokens": ["Hello"], "top_logprobs": [{"Hi": -1}]}},
        {"delta": {"content": None, "tool_calls": None}, "index": 17},
    ],
)
def test_other_members_of_a_choice_are_not_counted(choice: dict) -> None:
    """Filter results, reasons and logprobs would make a broken stream several times too expensive."""
    assert usage_of(event({"choices": [choice]})) == AtLeast(Tokens(0, 0))


def test_a_chunk_with_text_is_at_least_one_token() -> None:
    """Servers send a chunk for each token, even if the tokenizer counts 0 for a piece of a character."""
    meter = Meter(UNASKED, count=lambda text: 0)
    for _ in range(50):
        meter.see_event(Splitter().feed(event(chunk("a")))[0])
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 50)), 50)
    assert usage_of(event(chunk("a" * 400)) * 2) == AtLeast(Tokens(0, 800))
    assert usage_of(event(chunk(""))) == AtLeast(Tokens(0, 0))


def test_all_choices_are_counted() -> None:
    """Three choices have three times the text of one."""
    texts = [{"index": index, "text": "x" * 40, "finish_reason": None} for index in range(3)]
    assert usage_of(event({"choices": texts}), request(COMPLETIONS, n=3)) == AtLeast(Tokens(0, 120))


def test_before_the_first_event_the_usage_is_zero() -> None:
    """The caller adds the input of a call that was sent and never answered."""
    assert usage_of(b"") == AtLeast(Tokens(0, 0))
    assert new().usage() == AtLeast(Tokens(0, 0))
    assert (new().output_seen, new().input_reported, new().uncounted_texts) == (0, None, [])


@pytest.mark.parametrize(
    "error", [{"error": {"message": "It broke. " * 40}}, {"error": "It broke. " * 40}, {"type": "error", "error": {}}]
)
@pytest.mark.parametrize("of", [UNASKED, ASKED, request(RESPONSES)])
def test_an_error_event_is_noted_and_not_counted_as_output(error: dict, of: Request) -> None:
    """It may come in an answer with status 200; its message is no text of the model (T44)."""
    meter, shown = watch(event(error) + DONE, of)
    assert meter.has_error
    assert shown == event(error) + DONE
    assert meter.usage() == AtLeast(Tokens(0, 0))


def test_text_before_an_error_is_counted() -> None:
    """So is text in the same chunk; and a usage in the same chunk is charged."""
    with_error = event(chunk("Hello!", finish="error", error={"message": "It broke."}))
    assert usage_of(with_error + with_error + DONE) == COUNTED
    assert usage_of(TEXT + event({"error": {"message": "It broke."}, "choices": [], "usage": HONEST})) == REPORTED
    assert not watch(event(chunk("Hello", error=None)))[0].has_error


def test_an_error_stays_noted() -> None:
    """vLLM sends [DONE] after it, others send more chunks."""
    assert watch(event({"error": {}}) + TEXT + event(usage_chunk()) + DONE)[0].has_error


# --------------------------------------------------------------------------------------------------------- /responses


def response_event(kind: str, **more: object) -> bytes:
    """An event of a response."""
    return f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": 1, **more})


RESPONSE_USAGE = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}
HELLO = response_event("response.output_text.delta", delta="Hello") + response_event(
    "response.output_text.delta", delta=" world!"
)


@pytest.mark.parametrize(
    ("kind", "has_error"),
    [("response.completed", False), ("response.incomplete", False), ("response.failed", True), ("error", True)],
)
@pytest.mark.parametrize(
    ("response", "expected"), [({"usage": RESPONSE_USAGE}, REPORTED), ({}, COUNTED), ({"usage": None}, COUNTED)]
)
def test_a_response_ends_with_one_of_four_events(kind: str, has_error: bool, response: dict, expected: Usage) -> None:
    """With each of them the reported usage is charged, or else the counted text; all bytes are forwarded."""
    stream = (
        response_event("response.created", response={"usage": None}) + HELLO + response_event(kind, response=response)
    )
    meter, shown = watch(stream, request(RESPONSES))
    assert shown == stream
    assert (meter.is_at_end, meter.is_over, meter.has_error) == (True, True, has_error)
    assert meter.usage() == expected


def test_a_flat_error_ends_a_response() -> None:
    """`{"type":"error","code":…,"message":…}` contains no response."""
    meter, _ = watch(
        HELLO + response_event("error", code="server_error", message="It broke.", param=None), request(RESPONSES)
    )
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, COUNTED)


def test_events_before_the_end_of_a_response_are_not_kept() -> None:
    """Nothing is kept, and text that `.done` events repeat is counted once."""
    stream = b"".join(
        [
            response_event("response.created", response={"usage": None, "error": None}),
            HELLO,
            response_event("response.output_text.done", text="Hello world"),
            response_event("response.output_item.done", item={"content": [{"text": "Hello world"}]}),
        ]
    )
    meter, shown = watch(stream, request(RESPONSES))
    assert (meter.is_at_end, meter.has_error, shown) == (False, False, stream)
    assert meter.usage() == COUNTED


@pytest.mark.parametrize(
    "events",
    [
        response_event("response.output_text.done", text="Hello world!"),
        response_event("response.refusal.done", refusal="Hello world!"),
        response_event("response.function_call_arguments.done", arguments="Hello world!"),
        response_event("response.custom_tool_call_input.done", input="Hello world!"),
        response_event("response.content_part.done", part={"type": "output_text", "text": "Hello world!"}),
        response_event("response.output_item.done", item={"type": "message", "content": [{"text": "Hello world!"}]}),
        response_event("response.completed", response={"output": [{"content": [{"text": "Hello world!"}]}]}),
        response_event("response.output_text.delta", delta="Hello")
        + response_event("response.output_text.done", text="Hello world!"),
    ],
)
def test_a_text_that_comes_only_as_a_whole_is_counted(events: bytes) -> None:
    """Some servers send no deltas, or not all. Text that came in deltas is not counted again."""
    assert usage_of(events, request(RESPONSES)) == COUNTED
    assert usage_of(events * 3, request(RESPONSES)) == (
        AtLeast(Tokens(0, 12 + 2 * 5)) if b".delta" in events else COUNTED
    )


def test_the_id_of_a_response_is_known_from_its_first_event() -> None:
    """Also from a whole response. A value that could not be used in a path is ignored."""
    begun = response_event("response.created", response={"id": "resp_1"})
    assert new(request(RESPONSES)).response_id is None
    assert watch(begun, request(RESPONSES))[0].response_id == "resp_1"
    strange = response_event("response.completed", response={"id": "resp/../2"})
    assert watch(begun + strange, request(RESPONSES))[0].response_id == "resp_1"
    assert whole({"id": "resp_3"}, RESPONSES).response_id == "resp_3"
    for strange in (None, 3, ["resp_3"], "", "x" * 600):
        assert whole({"id": strange}, RESPONSES).response_id is None
    assert whole({"id": "chatcmpl-1"}).response_id is None


@pytest.mark.parametrize(
    ("tools", "tokens"),
    [
        ({"image_gen": {"input_tokens": 7, "output_tokens": 272, "total_tokens": 279}}, Tokens(17, 277)),
        ({"image_gen": {"input_tokens": 0, "output_tokens": 0}, "web_search": {"num_requests": 2}}, Tokens(10, 5)),
        ({"image_gen": None}, Tokens(10, 5)),
        ("none", Tokens(10, 5)),
    ],
)
def test_the_tokens_of_the_image_tool_are_added_to_the_usage(tools: object, tokens: Tokens) -> None:
    """The usage of a response does not include them. Without that usage nothing is exact."""
    response = {"id": "resp_1", "usage": {"input_tokens": 10, "output_tokens": 5}, "tool_usage": tools}
    assert whole(response, RESPONSES).usage() == Exactly(tokens)
    assert usage_of(response_event("response.completed", response=response), request(RESPONSES)) == Exactly(tokens)
    del response["usage"]
    assert isinstance(whole(response, RESPONSES).usage(), AtLeast)


def test_a_done_after_a_response_is_accepted() -> None:
    """Some compatible servers send it."""
    end = response_event("response.completed", response={"usage": RESPONSE_USAGE})
    meter, shown = watch(HELLO + end + DONE, request(RESPONSES))
    assert (meter.is_over, meter.usage(), shown) == (True, REPORTED, HELLO + end + DONE)


@pytest.mark.parametrize(
    ("kind", "delta", "tokens"),
    [
        ("response.refusal.delta", "x" * 400, 400),
        ("response.function_call_arguments.delta", "x" * 400, 400),
        ("response.reasoning_summary_text.delta", "x" * 400, 400),
        ("response.custom_tool_call_input.delta", "é" * 200, 400),
        ("response.output_text.delta", "", 0),
        ("response.output_text.delta", None, 0),
        ("response.output_text.delta", {"text": "x"}, 0),
        ("response.output_text.done", "x" * 400, 0),
        (None, "x" * 400, 0),
        (7, "x" * 400, 0),
    ],
)
def test_every_delta_of_text_is_counted(kind: object, delta: object, tokens: int) -> None:
    """Whatever it is a part of. The padding in `obfuscation` is not counted."""
    raw = event({"type": kind, "delta": delta, "obfuscation": "xyz" * 99, "item_id": "m" * 99})
    assert usage_of(raw, request(RESPONSES)) == AtLeast(Tokens(0, tokens))


@pytest.mark.parametrize("response", [None, "x", [], {"usage": []}, {"usage": {"input_tokens": -1}}])
def test_an_end_event_with_an_invalid_response_ends_it(response: object) -> None:
    """The text is then counted by the proxy."""
    meter, _ = watch(HELLO + response_event("response.completed", response=response), request(RESPONSES))
    assert (meter.is_over, meter.usage()) == (True, COUNTED)


# ------------------------------------------------------------------------------------------------------ whole answers


def message(content: str, **more: object) -> dict:
    """A choice of a whole chat answer."""
    return {"message": {"role": "assistant", "content": content, **more.pop("members", {})}, **more}


ITEM = {"type": "message", "status": "completed", "role": "assistant", "content": [{"text": "Hello world"}]}
TOKENS = {"content": [{"token": "Hello", "top_logprobs": [{"token": "Hi"}]}]}


@pytest.mark.parametrize(
    ("endpoint", "answer", "texts"),
    [
        (CHAT, {"choices": [message("Hello world")]}, ["Hello world"]),
        (CHAT, {"choices": [message("Hello world")], "error": None}, ["Hello world"]),
        (CHAT, {"choices": [message("x" * 40)] * 3}, ["x" * 40] * 3),
        (CHAT, {"choices": [message("a", members={"refusal": "b" * 8}, logprobs=TOKENS)]}, ["a", "b" * 8]),
        (COMPLETIONS, {"choices": [{"text": "Hello world"}]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM], "usage": None}, ["Hello world"]),
        (EMBEDDINGS, {"data": [{"embedding": "AAAA" * 99}]}, []),
        (EMBEDDINGS, {"choices": [{"text": "Hello world"}]}, []),
        (CHAT, {}, []),
    ],
)
def test_a_whole_answer_without_usage_keeps_its_texts(endpoint: Endpoint, answer: dict, texts: list[str]) -> None:
    """The caller counts them, because that may take long. They are not included in the usage."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, texts)
    assert meter.is_at_end
    assert not meter.has_error


@pytest.mark.parametrize(
    ("endpoint", "answer", "expected"),
    [
        (CHAT, {"choices": [message("Hello world")], "usage": HONEST}, REPORTED),
        (COMPLETIONS, {"choices": [{"text": "Hello world"}], "usage": ZEROS}, Exactly(Tokens(0, 0))),
        (RESPONSES, {"output": [ITEM], "usage": RESPONSE_USAGE}, REPORTED),
        (RESPONSES, {"status": "incomplete", "output": [], "usage": RESPONSE_USAGE}, REPORTED),
        (EMBEDDINGS, {"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Exactly(Tokens(9, 0))),
    ],
)
def test_a_whole_answer_is_charged_its_usage(endpoint: Endpoint, answer: dict, expected: Usage) -> None:
    """The usage is exact, and there is no text left to count."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (expected, [])
    assert isinstance(meter.usage(), Exactly)
    assert meter.is_at_end
    assert not meter.has_error


@pytest.mark.parametrize(
    ("of", "answer", "expected", "texts"),
    [
        (request(stream=False, n=3), {"choices": [message("a"), message("b"), message("c")]}, (11, 5), ["b", "c"]),
        (request(stream=False, n=3), {"choices": [message("a")]}, None, []),
        (request(stream=False, n=3), {"choices": 3}, None, []),
        (request(stream=False), {"choices": [message("a"), message("b")]}, (11, 5), ["b"]),
        (
            request(COMPLETIONS, stream=False, prompt="x", n=2),
            {"choices": [{"text": "a"}, {"text": "b"}]},
            (11, 5),
            ["b"],
        ),
        (
            request(COMPLETIONS, stream=False, prompt=["x", "y"]),
            {"choices": [{"text": "a"}, {"text": "b"}]},
            (0, 5),
            ["b"],
        ),
    ],
)
def test_usage_of_the_first_choice_only(
    of: Request, answer: dict, expected: tuple[int, int] | None, texts: list[str]
) -> None:
    """llama.cpp reports no more. The texts of the other choices are kept; with several prompts no input is known."""
    meter = Meter(of, count=count, kind="llamacpp")
    meter.see_whole(json.dumps({**answer, "usage": HONEST}).encode())
    assert meter.usage() == (REPORTED if expected is None else AtLeast(Tokens(*expected)))
    assert meter.uncounted_texts == texts
    assert meter.input_reported == (None if of.has_several_prompts else 11)


def test_without_usage_all_choices_are_counted() -> None:
    """Also at llama.cpp, whose usage would cover only one."""
    meter = Meter(request(stream=False, n=2), count=count, kind="llamacpp")
    meter.see_whole(json.dumps({"choices": [message("a"), message("b")]}).encode())
    assert (meter.usage(), meter.uncounted_texts, meter.input_reported) == (UNCOUNTED, ["a", "b"], None)


def test_an_error_in_a_whole_answer_is_noted() -> None:
    """The status is 200. The message of the error costs nothing, text that was generated before it does (T44)."""
    error = {"error": {"message": "It broke. " * 40, "code": 500}}
    assert whole(error).has_error
    assert (whole(error).usage(), whole(error).uncounted_texts) == (UNCOUNTED, [])
    assert whole({**error, "choices": [{"message": {"content": "Hello world"}}]}).uncounted_texts == ["Hello world"]
    assert whole({**error, "usage": HONEST}).usage() == REPORTED
    failed = {"status": "failed", "output": [], "usage": RESPONSE_USAGE, **error}
    assert whole(failed, RESPONSES).usage() == REPORTED


@pytest.mark.parametrize("body", [b"x" * 400, b"\xff" * 400, b"[" * 400, b'"' + b"x" * 398 + b'"', b"7" * 400])
def test_a_body_that_is_no_object_is_counted_in_full(body: bytes) -> None:
    """It was generated, although it is no valid answer. Embeddings generate nothing."""
    meter = whole(body)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, [body.decode(errors="replace")])
    assert (whole(body, EMBEDDINGS).usage(), whole(body, EMBEDDINGS).uncounted_texts) == (UNCOUNTED, [])
    assert meter.has_error


def test_a_stream_in_answer_to_a_request_without_stream_is_measured() -> None:
    """The format of the answer decides. The proxy did not ask for usage, so nothing is removed."""
    null = event(chunk("Hello", usage=None))
    meter, shown = watch(null + event(usage_chunk()) + DONE, request(stream=False))
    assert (meter.usage(), shown) == (REPORTED, null + event(usage_chunk()) + DONE)


def test_a_usage_chunk_that_came_early_is_not_the_end() -> None:
    """The text after it is sent at once again. After [DONE] everything belongs to the end."""
    meter = new()
    usage = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
    word = b'{"choices": [{"delta": {"content": "x"}}]}'
    seen = []
    for data in (usage, word, b"[DONE]", word):
        meter.see_event(Event(raw=b"data: " + data + b"\n\n", name=None, data=data))
        seen.append(meter.is_at_end)
    assert seen == [True, False, True, True]


def test_an_event_that_broke_off_is_not_counted() -> None:
    """A complete event that can't be parsed is counted by its bytes, but no client understands half an event."""
    meter = new()
    half = Event(raw=b'data: {"choices": [{"del', name=None, data=b'{"choices": [{"del')
    assert meter.see_event(half, is_cut=True) == half.raw
    assert meter.output_seen == 0


# ------------------------------------------------------------------------------ images, audio, moderations and counts

MEDIA_USAGE = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}


def media_stream(*documents: dict) -> bytes:
    """A stream of these events."""
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in documents)


def test_a_moderation_costs_a_request_and_a_token_count_costs_nothing() -> None:
    """Whatever the answer is, and even if it does not arrive."""
    for body in ({"results": []}, {"usage": MEDIA_USAGE}, b"no JSON"):
        assert whole(body, MODERATIONS).usage() == Unspent(requests=1)
        assert whole(body, INPUT_TOKENS).usage() == Unspent()
    assert new(request(MODERATIONS)).usage() == Unspent(requests=1)
    assert whole(b"no JSON", MODERATIONS).has_error


@pytest.mark.parametrize("endpoint", [IMAGES, SPEECH])
def test_images_and_audio_are_charged_the_tokens_that_they_report(endpoint: Endpoint) -> None:
    """Without a report the answer counts as one request, whether it is JSON or audio. An error costs its input."""
    assert whole({"usage": MEDIA_USAGE}, endpoint).usage() == Exactly(Tokens(11, 5))
    assert whole({"data": []}, endpoint).usage() == Unspent(requests=1)
    assert whole({"usage": {"type": "duration", "seconds": 7}}, endpoint).usage() == Unspent(requests=1)
    sound = whole(b"ID3\xff", endpoint)
    assert (sound.usage(), sound.has_error, sound.uncounted_texts) == (Unspent(requests=1), False, [])
    assert whole({"error": {"message": "no"}}, endpoint).usage() == AtLeast(Tokens(0, 0))


def test_the_separate_usage_of_an_svg_image_is_added() -> None:
    """Both usages are billed."""
    drawing = {
        "usage": MEDIA_USAGE,
        "svg_usage": {"model": "m", "input_tokens": 100, "output_tokens": 50, "total_tokens": 150},
    }
    assert whole(drawing, IMAGES).usage() == Exactly(Tokens(111, 55))
    assert whole({"svg_usage": MEDIA_USAGE}, IMAGES).usage() == Exactly(Tokens(11, 5))


def test_a_compaction_without_usage_is_counted() -> None:
    """It is billed in tokens like any response."""
    assert whole({"output": [], "usage": MEDIA_USAGE}, COMPACT).usage() == Exactly(Tokens(11, 5))
    silent = whole({"output": [{"type": "compaction", "id": "c", "encrypted_content": "secret"}]}, COMPACT)
    assert (silent.usage(), silent.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["secret"])


@pytest.mark.parametrize(
    ("endpoint", "step", "end"),
    [
        (IMAGES, "image_generation.partial_image", "image_generation.completed"),
        (SPEECH, "speech.audio.delta", "speech.audio.done"),
    ],
)
def test_a_stream_of_images_or_audio_reports_its_usage_at_its_end(endpoint: Endpoint, step: str, end: str) -> None:
    """Every event is forwarded unchanged. If the stream breaks off before its end, the whole hold is charged."""
    of = request(endpoint)
    begun, done = media_stream({"type": step, "b64_json": "AAAA"}), media_stream({"type": end, "usage": MEDIA_USAGE})
    meter, shown = watch(begun, of)
    assert (shown, meter.output_seen, meter.is_over) == (begun, 0, False)
    assert meter.usage() == AtLeast(Tokens(0, TOKENS_MAX))
    meter, shown = watch(begun + done, of)
    assert (shown, meter.output_seen, meter.is_at_end, meter.is_over) == (begun + done, 0, True, True)
    assert meter.usage() == Exactly(Tokens(11, 5))
    assert usage_of(begun + media_stream({"type": end}), of) == Unspent(requests=1)
    assert usage_of(begun + DONE, of) == Unspent(requests=1)


def test_the_usages_of_several_images_in_a_stream_add_up() -> None:
    """A stream that ends after the first image has not reported the second, so the whole hold is charged."""
    first = media_stream({"type": "image_generation.completed", "usage": MEDIA_USAGE})
    assert usage_of(first + first, request(IMAGES, n=2)) == Exactly(Tokens(22, 10))
    assert usage_of(first, request(IMAGES, n=2)) == AtLeast(Tokens(0, TOKENS_MAX))


@pytest.mark.parametrize("error", [{"type": "error", "message": "no"}, {"error": {"message": "no"}}])
def test_a_stream_of_images_with_an_error_has_no_output(error: dict) -> None:
    """Only its input is charged, which the caller adds."""
    meter, _ = watch(media_stream(error), request(IMAGES))
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, AtLeast(Tokens(0, 0)))


# ------------------------------------------------------------------------------------------------ timings (llama.cpp)

TIMINGS = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 1e-05, "predicted_n": 5, "predicted_ms": 12.0}


def watch_llamacpp(stream: bytes, of: Request = UNASKED) -> tuple[Meter, bytes]:
    """Feed a whole stream of llama.cpp; return the meter and the bytes for the client."""
    meter, splitter = new(of, kind="llamacpp"), Splitter()
    shown = b"".join(meter.see_event(each) for each in splitter.feed(stream))
    return meter, shown + meter.flush()


@pytest.mark.parametrize("spaced", [False, True])
def test_timings_are_moved_to_the_chunk_that_has_them_without_the_option(spaced: bool) -> None:
    """That is the finish chunk. Their bytes are copied, and the usage chunk is removed."""
    meter, shown = watch_llamacpp(TEXT + FINISH + event(usage_chunk(timings=TIMINGS), spaced) + DONE)
    raw = event(usage_chunk(timings=TIMINGS), spaced)
    timings = raw[raw.index(b'"timings"') : raw.rindex(b"}")]
    assert shown == TEXT + FINISH.replace(b"}\n\n", b"," + timings + b"}\n\n") + DONE
    assert meter.usage() == REPORTED


def test_timings_before_other_members_are_moved_too() -> None:
    """The finish chunk is then serialized anew; a `usage: null` on it is removed."""
    usage_event = event({"timings": TIMINGS, **usage_chunk()})
    expected = {**chunk(finish="stop"), "timings": TIMINGS}
    for last in (FINISH, event(chunk(finish="stop", usage=None))):
        _, shown = watch_llamacpp(TEXT + last + usage_event + DONE)
        assert [json.loads(each.data or b"") for each in Splitter().feed(shown)[-2:-1]] == [expected]
    _, shown = watch_llamacpp(event(chunk(finish="stop", usage=HONEST)) + usage_event)
    assert json.loads(Splitter().feed(shown)[0].data or b"") == {**expected, "usage": HONEST}


@pytest.mark.parametrize(
    "after",
    [
        b"",
        DONE,
        b": note\n\n" + DONE,
        event(chunk("more")) + DONE,
        FINISH + DONE,
        event(chunk(finish="stop", timings=TIMINGS)) + DONE,
        event({"x": 1}),
        event({**chunk("x"), "choices": [7]}),
    ],
)
def test_a_finish_chunk_is_not_lost_if_no_timings_follow(after: bytes) -> None:
    """It is kept for one event at most."""
    assert watch_llamacpp(TEXT + FINISH + after)[1] == TEXT + FINISH + after


def test_a_usage_chunk_with_timings_and_other_members_stays() -> None:
    """It is unknown on which chunk the other members would have come without the option."""
    more = usage_chunk(timings=TIMINGS, x_vendor=1)
    shown = watch_llamacpp(FINISH + event(more))[1]
    assert shown == FINISH + event({name: value for name, value in more.items() if name != "usage"})
    assert watch_llamacpp(FINISH + event(usage_chunk()) + DONE)[1] == FINISH + DONE


@pytest.mark.parametrize(
    ("of", "last"),
    [(ASKED, usage_chunk(timings=TIMINGS)), (request(n=2), chunk(timings=TIMINGS))],
    ids=["usage requested", "several choices"],
)
def test_timings_stay_if_usage_was_requested_or_there_are_several_choices(of: Request, last: dict) -> None:
    """A client that asked for usage gets the usage chunk; of several choices each has its own timings."""
    stream = TEXT + FINISH + event(last) + DONE
    assert watch_llamacpp(stream, of)[1] == stream


def test_timings_are_the_usage_if_there_is_no_other() -> None:
    """The input is the sum of the evaluated and the cached tokens."""
    last = event(chunk(finish="stop", timings=TIMINGS))
    assert watch(TEXT + last + DONE)[0].usage() == Exactly(Tokens(11, 5, cached=4))
    assert usage_of(TEXT + last + event(usage_chunk()) + DONE) == REPORTED
    assert usage_of(TEXT + event(chunk(finish="stop", timings={"predicted_n": 5})) + DONE) == COUNTED


def test_nothing_is_removed_if_the_upstream_rejected_the_option() -> None:
    """Everything that it sends was then sent unasked."""
    for kind, text in (("vllm", RUNNING), ("llamacpp", TIMED)):
        meter = new(kind=kind)
        meter.stop_stripping()
        stream = text + event(chunk(finish="stop", usage=None)) + event(usage_chunk(timings=TIMINGS)) + DONE
        assert b"".join(meter.see_event(each) for each in Splitter().feed(stream)) == stream
        assert meter.usage() == REPORTED


def timings(output: int, **more: object) -> dict:
    """The timings that llama.cpp writes on every chunk if `timings_per_token` is set."""
    return {**TIMINGS, "predicted_n": output, **more}


TIMED = event(chunk("Hello", timings=timings(3))) + event(chunk(" world!", timings=timings(5)))


def test_the_usage_of_a_cut_stream_of_llama_cpp_is_exact() -> None:
    """The input, with its cached part, is known from the first text on."""
    cut = TIMED[: TIMED.index(b"\n\n") + 2]
    meter, shown = watch_llamacpp(cut)
    assert shown == event(chunk("Hello"))
    assert (meter.usage(), meter.output_seen, meter.input_reported) == (Exactly(Tokens(11, 3, cached=4)), 3, 11)
    assert watch_llamacpp(cut + event(chunk("12345")))[0].usage() == AtLeast(Tokens(11, 8, cached=4))


@pytest.mark.parametrize("more", [{}, {"timings_per_token": False}, {"stream_options": {"include_usage": False}}])
def test_running_timings_are_removed_without_a_trace(more: dict) -> None:
    """The finish chunk has timings, as without the option, whether or not a usage chunk follows."""
    last = event(chunk(finish="stop", timings=timings(5)))
    meter, shown = watch_llamacpp(TIMED + FINISH + event(usage_chunk(timings=timings(5))) + DONE, request(**more))
    assert (meter.usage(), shown) == (REPORTED, TEXT + last + DONE)
    meter, shown = watch_llamacpp(TIMED + last + DONE, request(**more))
    assert (meter.usage(), shown) == (Exactly(Tokens(11, 5, cached=4)), TEXT + last + DONE)


def test_a_client_that_asked_for_usage_gets_the_timings_on_the_usage_chunk() -> None:
    """That is where llama.cpp writes them for such a request."""
    end = event(usage_chunk(timings=timings(5))) + DONE
    assert watch_llamacpp(TIMED + FINISH + end, ASKED)[1] == TEXT + FINISH + end


def test_a_client_that_asked_for_running_timings_gets_them() -> None:
    """The stream is forwarded byte for byte."""
    assert watch_llamacpp(TIMED + DONE, request(timings_per_token=True))[1] == TIMED + DONE


def test_running_timings_of_several_choices_stay() -> None:
    """The proxy does not ask for them if there are several choices."""
    assert watch_llamacpp(TIMED + DONE, request(n=2))[1] == TIMED + DONE


def test_a_completion_of_llama_cpp_keeps_usage_and_timings_at_its_end() -> None:
    """They come on the last chunk, beside its choice, whether or not they are requested."""
    pieces = [
        {"choices": [{"text": "Hello", "finish_reason": None}]},
        {"choices": [{"text": "", "finish_reason": "stop"}]},
    ]
    first, last = ({**piece, "timings": timings(5)} for piece in pieces)
    stream = event(first) + event({**last, "usage": HONEST}) + DONE
    for of in (request(COMPLETIONS), request(COMPLETIONS, stream_options={"include_usage": True})):
        meter, shown = watch_llamacpp(stream, of)
        assert shown == event(pieces[0]) + event({**last, "usage": HONEST}) + DONE
        assert meter.usage() == REPORTED


# ------------------------------------------------------------------------------------------------------- /v1/messages

MESSAGE = request(MESSAGES, max_tokens=50)


def message_event(kind: str, **more: object) -> bytes:
    """An event of a message."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()


def delta(kind: str, **more: object) -> bytes:
    """A piece of the first content block."""
    return message_event("content_block_delta", index=0, delta={"type": kind, **more})


START = message_event(
    "message_start",
    message={
        "id": "msg_1",
        "content": [],
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 5,
            "output_tokens": 1,
        },
    },
)
BLOCK = message_event("content_block_start", index=0, content_block={"type": "text", "text": ""})
BLOCK_STOP = message_event("content_block_stop", index=0)
STOP = message_event("message_stop")


def message_delta(**usage: object) -> bytes:
    """The event that states the stop reason and the usage."""
    return message_event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


def test_a_message_is_charged_the_usage_at_its_end() -> None:
    """Input that the end does not repeat is taken from the beginning. The stream is forwarded unchanged."""
    stream = (
        START
        + BLOCK
        + message_event("ping")
        + delta("text_delta", text="hi")
        + BLOCK_STOP
        + message_delta(output_tokens=9)
        + STOP
    )
    meter, shown = watch(stream, MESSAGE)
    assert meter.usage() == Exactly(Tokens(11, 9, cached=5))
    assert shown == stream
    assert meter.is_over


def test_an_input_of_0_at_the_beginning_is_ignored() -> None:
    """Some servers count only at the end. The hold for the input must not shrink to 0."""
    start = message_event("message_start", message={"usage": {"input_tokens": 0, "output_tokens": 0}})
    meter, _ = watch(start + BLOCK + delta("text_delta", text="hello"), MESSAGE)
    assert (meter.input_reported, meter.usage()) == (None, AtLeast(Tokens(0, 5)))
    assert usage_of(start + BLOCK + message_delta(input_tokens=7, output_tokens=2) + STOP, MESSAGE) == Exactly(
        Tokens(7, 2)
    )


def test_the_last_usage_of_a_message_counts() -> None:
    """Each states the total so far, so they are not added. A later one may correct the input."""
    stream = START + BLOCK + delta("text_delta", text="hi") + message_delta(output_tokens=3)
    meter, _ = watch(
        stream + message_delta(output_tokens=9, input_tokens=6, cache_read_input_tokens=0) + STOP, MESSAGE
    )
    assert meter.usage() == Exactly(Tokens(8, 9))


def test_a_cut_message_is_charged_its_input_and_the_text_that_passed() -> None:
    """The input is known from the first event. The output stated there is ignored: it is counted when it comes."""
    assert usage_of(START, MESSAGE) == AtLeast(Tokens(11, 0, cached=5))
    meter, _ = watch(START + BLOCK + delta("text_delta", text="hello"), MESSAGE)
    assert meter.usage() == AtLeast(Tokens(11, 5, cached=5))
    assert (meter.input_reported, meter.output_seen, meter.is_at_end) == (11, 5, False)


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        (delta("text_delta", text="hello"), 5),
        (delta("thinking_delta", thinking="hello"), 5),
        (delta("input_json_delta", partial_json='{"a":'), 5),
        (delta("input_json_delta", partial_json=""), 0),
        (delta("signature_delta", signature="c2lnbmF0dXJl"), 0),
        (delta("what_comes_next", words="hello"), 5),
        (
            message_event("content_block_start", index=1, content_block={"type": "tool_use", "id": "t", "name": "f"}),
            1,
        ),
        (message_event("content_block_start", index=1, content_block={"type": "text", "text": "hello"}), 5),
        (message_event("content_block_delta"), 0),
        (message_event("message_start", message="?"), 0),
        (message_event("message_delta", usage="?"), 0),
        (message_event("ping"), 0),
    ],
)
def test_all_text_of_a_message_is_counted(event: bytes, tokens: int) -> None:
    """Text, thinking, and the names and inputs of tool calls; but not signatures and ids."""
    assert usage_of(START + event, MESSAGE) == AtLeast(Tokens(11, tokens, cached=5))


def test_a_message_without_usage_is_counted() -> None:
    """Compatible servers may send none. An invalid usage is treated as none."""
    stream = BLOCK + delta("text_delta", text="hello") + BLOCK_STOP + message_delta(output_tokens="many") + STOP
    assert usage_of(stream, MESSAGE) == AtLeast(Tokens(0, 5))


def test_the_end_of_a_message_begins_with_its_usage() -> None:
    """It is kept from there on until the call is settled. If a block follows, that was not the end."""
    meter, splitter = new(MESSAGE), Splitter()
    stops = []
    for event in splitter.feed(
        START + BLOCK + BLOCK_STOP + message_delta(output_tokens=1) + BLOCK + delta("text_delta") + STOP
    ):
        meter.see_event(event)
        stops.append((meter.is_at_end, meter.is_over))
    assert stops == [(False, False)] * 3 + [(True, False)] + [(False, False)] * 2 + [(True, True)]


def test_an_error_ends_a_message() -> None:
    """The text before it is charged."""
    meter, _ = watch(
        START + delta("text_delta", text="hi") + message_event("error", error={"type": "api_error"}), MESSAGE
    )
    assert (meter.has_error, meter.is_over, meter.usage()) == (True, True, AtLeast(Tokens(11, 2, cached=5)))


def test_a_whole_message_is_charged_its_usage_or_counted() -> None:
    """Without usage the texts of all its blocks are kept."""
    body = {
        "content": [{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "b"}}]
    }
    meter = new(MESSAGE)
    meter.see_whole(json.dumps({**body, "usage": {"input_tokens": 3, "output_tokens": 2}}).encode())
    assert (meter.usage(), meter.uncounted_texts) == (Exactly(Tokens(3, 2)), [])
    meter = new(MESSAGE)
    meter.see_whole(json.dumps(body).encode())
    assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["hi", "f", "b"])
