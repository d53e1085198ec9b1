"""A meter says to the token what an answer used, and shows a client the bytes that it would have seen without us.

wire §2.2 and §2.3 (usage in streams, and taking it out again), §2.4 (events of /responses); threats T36, T39 to T43
and what is charged for strange usage there. An honest answer there: 11 tokens of input, 5 of output.
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
from proxy.policy.policy import Kind

HONEST = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
DONE = b"data: [DONE]\n\n"


def request(endpoint: Endpoint = CHAT, **fields: object) -> Request:
    """A streamed call that doesn't ask for usage, unless the test says otherwise."""
    return parse_request(endpoint, json.dumps({"model": "m", "stream": True, **fields}).encode())


UNASKED = request()
ASKED = request(stream_options={"include_usage": True})


def count(text: str) -> int:
    """Tokens as easy to tell as none are: one for each byte."""
    return len(text.encode("utf-8", "surrogatepass"))


def new(of: Request = UNASKED, *, kind: Kind = "openai") -> Meter:
    """A meter that has seen nothing yet."""
    return Meter(of, count=count, kind=kind)


def watch(
    stream: bytes, of: Request = UNASKED, cuts: list[int] | None = None, *, kind: Kind = "openai"
) -> tuple[Meter, bytes]:
    """Let a whole stream go by; return the meter, and what the client is shown of it."""
    meter, splitter = new(of, kind=kind), Splitter()
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts or []), len(stream)]
    shown = b"".join(
        meter.see_event(event) for start, end in pairwise(places) for event in splitter.feed(stream[start:end])
    )
    return meter, shown + splitter.end()


def usage_of(stream: bytes, of: Request = UNASKED) -> Usage:
    """What is charged for a stream."""
    return watch(stream, of)[0].usage()


def whole(body: bytes | dict, endpoint: Endpoint = CHAT) -> Meter:
    """A meter that saw a whole answer."""
    meter = new(request(endpoint, stream=False))
    meter.see_whole(body if isinstance(body, bytes) else json.dumps(body).encode())
    return meter


def event(document: object, spaced: bool = False) -> bytes:
    """An event with this JSON, compact unless `spaced`."""
    separators = (", ", ": ") if spaced else (",", ":")
    return b"data: " + json.dumps(document, separators=separators, ensure_ascii=spaced).encode() + b"\n\n"


def chunk(content: str | None = None, finish: str | None = None, **more: object) -> dict:
    """A chunk of a chat stream with one choice."""
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def usage_chunk(usage: object = None, **more: object) -> dict:
    """The chunk that comes only because usage was asked for."""
    return {**chunk(), "choices": [], "usage": HONEST if usage is None else usage, **more}


TEXT = event(chunk("Hello")) + event(chunk(" world!"))  # two chunks, 12 bytes
FINISH = event(chunk(finish="stop"))
OWN_COUNT = AtLeast(Tokens(0, 12))
BOOKED = Exactly(Tokens(11, 5))
UNCOUNTED = AtLeast(Tokens(0, 0))  # of a whole answer the texts are counted elsewhere


# ------------------------------------------------------------------------------------------- the end of a chat stream


def test_the_usage_chunk_is_booked_and_taken_out() -> None:
    """Not asked for: exactly that is charged, and the client sees no chunk without a choice (T36)."""
    meter, shown = watch(TEXT + FINISH + event(usage_chunk()) + DONE)
    assert shown == TEXT + FINISH + DONE
    assert meter.usage() == BOOKED
    assert isinstance(meter.usage(), Exactly)
    assert not meter.has_error


def test_who_asked_for_usage_gets_it() -> None:
    """The stream is the upstream's, byte for byte."""
    null = event(chunk("Hello", usage=None), spaced=True)
    stream = null + event(chunk(" ", usage=ZEROS)) + FINISH + event(usage_chunk()) + DONE
    meter, shown = watch(stream, ASKED)
    assert shown == stream
    assert meter.usage() == BOOKED


def test_the_meter_knows_the_end_before_it_is_passed_on() -> None:
    """From the usage chunk on everything waits for the books; with [DONE] there is no more to come."""
    meter = new()
    states = []
    for raw in (event(chunk("Hello")), FINISH, event(usage_chunk()), DONE):
        (seen,) = Splitter().feed(raw)
        meter.see_event(seen)
        states.append((meter.is_at_end, meter.is_over))
    assert states == [(False, False), (False, False), (True, False), (True, True)]


def test_the_meter_says_what_the_last_event_said() -> None:
    """As the object that it read, for whoever has to write an end to the stream; None where it was none."""
    meter = new()
    for raw, said in (
        (event(chunk("Hello")), chunk("Hello")),
        (b": ping\n\n", None),
        (event(usage_chunk()), usage_chunk()),
        (b"data: [1]\n\n", None),
        (event({"x": 1}), {"x": 1}),
        (DONE, None),
    ):
        meter.see_event(Splitter().feed(raw)[0])
        assert meter.chunk == said


@pytest.mark.parametrize(
    ("of", "begins"),
    [(UNASKED, b"data: {"), (request(COMPLETIONS), b"data: {"), (request(RESPONSES), b"event: response.")],
)
def test_an_end_is_kept_for_the_call_s_own_form(of: Request, begins: bytes) -> None:
    """Of the endpoint that was called, and for so many choices as it asked for."""
    meter = new(of)
    assert meter.ending.at_limit(Tokens(11, 5), shows_usage=meter.shows_usage).startswith(begins)
    both = new(request(n=2)).ending.at_limit(Tokens(11, 5), shows_usage=False)
    assert both.count(b'"finish_reason":"length"') == 2
    assert [new(each).shows_usage for each in (UNASKED, ASKED)] == [False, True]


def test_without_usage_the_end_is_done() -> None:
    """Also in the form with more behind it, which the Python SDK takes for the end."""
    for end in (b"data: [DONE]\n\n", b"data:[DONE]\r\n\r\n", b"data: [DONE] \n\n"):
        meter, shown = watch(TEXT + FINISH + end)
        assert (meter.is_at_end, meter.is_over) == (True, True)
        assert shown == TEXT + FINISH + end
        assert meter.usage() == OWN_COUNT
        assert not isinstance(meter.usage(), Exactly)


def test_with_several_choices_a_usage_chunk_is_not_yet_the_end() -> None:
    """llama.cpp sends one as soon as one of them is finished: the others must not wait for the last (T45)."""
    several = request(n=2, stream_options={"include_usage": True})
    meter, shown = watch(TEXT + event(usage_chunk()), several)
    assert (meter.is_at_end, shown) == (False, TEXT + event(usage_chunk()))
    assert watch(TEXT + event(usage_chunk()) + DONE, several)[0].is_over


def test_the_usage_chunks_of_several_choices_add_up() -> None:
    """llama.cpp sends one for each of them, with the same input each time; others send one for all."""
    several = request(n=3)
    longer = {**HONEST, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 2}}
    each = event(usage_chunk()) + TEXT + event(usage_chunk(longer)) + event(usage_chunk(longer))
    assert usage_of(TEXT + each + DONE, several) == Exactly(Tokens(11, 5 + 7 + 7, reasoning=4))
    assert usage_of(TEXT + event(usage_chunk()) + DONE, several) == BOOKED
    assert usage_of(event(usage_chunk({"total_tokens": -1})) + event(usage_chunk()) + DONE, several) == BOOKED


def test_usage_beside_one_of_several_choices_is_not_that_of_all() -> None:
    """vLLM's is that of the choice whose chunk it is: the texts are counted instead, until the usage of all comes."""
    several = request(n=2, stream_options={"include_usage": True})
    text = event(chunk("Hello", usage={**HONEST, "completion_tokens": 1})) * 2
    meter, shown = watch(text, several)
    assert (meter.usage(), meter.output_seen, meter.input_reported) == (AtLeast(Tokens(0, 10)), 10, None)
    assert shown == text
    assert usage_of(text + event(usage_chunk()) + DONE, several) == BOOKED


def test_a_stream_that_just_ends_is_passed_on_as_it_is() -> None:
    """No [DONE] is forged, and the bytes of an event that wasn't finished go out too (T40)."""
    meter, shown = watch(TEXT + b"data: {", ASKED)
    assert shown == TEXT + b"data: {"
    assert (meter.is_at_end, meter.is_over, meter.has_error) == (False, False, False)
    assert meter.usage() == OWN_COUNT


@pytest.mark.parametrize(
    ("stream", "booked"),
    [
        (TEXT + event(chunk(finish="stop", usage=HONEST)) + DONE, BOOKED),
        (event(chunk("Hello", usage={**HONEST, "completion_tokens": 1})) + event(usage_chunk()) + DONE, BOOKED),
        (
            event(usage_chunk()) + event(usage_chunk({**HONEST, "completion_tokens": 7})) + DONE,
            Exactly(Tokens(11, 7)),
        ),
        (event(usage_chunk()) + event(usage_chunk({**HONEST, "prompt_tokens": -1})) + DONE, BOOKED),
        (event(usage_chunk()) + TEXT + event(chunk(usage=ZEROS)) + DONE, AtLeast(Tokens(11, 5 + 12))),
        (TEXT + event(chunk("!", usage=HONEST)) + event(chunk(finish="stop")) + DONE, BOOKED),
        (TEXT + DONE + event(usage_chunk()), BOOKED),
        (event({"usage": HONEST}) + DONE, BOOKED),
        (TEXT + event(usage_chunk(ZEROS)) + DONE, Exactly(Tokens(0, 0))),
    ],
)
def test_the_last_usage_that_makes_sense_wins(stream: bytes, booked: Usage) -> None:
    """On any chunk, also with the last choice or behind [DONE]; an explicit zero at the end is a zero.

    One before the last of the text covers what came before it, and what came after it is counted.
    """
    for of in (UNASKED, ASKED):
        assert usage_of(stream, of) == booked


@pytest.mark.parametrize(
    ("usage", "booked"),
    [
        (HONEST, BOOKED),
        ({"prompt_tokens": 11, "completion_tokens": 5}, BOOKED),
        ({**HONEST, "total_tokens": 9999}, BOOKED),
        ({"prompt_tokens": "11", "completion_tokens": "5"}, BOOKED),
        ({"prompt_tokens": 11.0, "completion_tokens": 5.0}, BOOKED),
        ({"total_tokens": 16}, Exactly(Tokens(0, 16))),
        ({**HONEST, "prompt_tokens_details": {"cached_tokens": 9}}, Exactly(Tokens(11, 5, cached=9))),
        ({**HONEST, "completion_tokens_details": {"reasoning_tokens": 4000}}, Exactly(Tokens(11, 5, reasoning=5))),
        ({**HONEST, "completion_tokens": 1_000_000}, Exactly(Tokens(11, 1_000_000))),
        (ZEROS, Exactly(Tokens(0, 0))),
        ({**HONEST, "prompt_tokens": 11.7}, OWN_COUNT),
        ({**HONEST, "completion_tokens": -5}, OWN_COUNT),
        ({**HONEST, "completion_tokens": True}, OWN_COUNT),
        ({**HONEST, "completion_tokens": [5]}, OWN_COUNT),
        ({**HONEST, "prompt_tokens": 10**30}, OWN_COUNT),
        ({**HONEST, "prompt_tokens": 2**63}, OWN_COUNT),
        ({"prompt_tokens": None, "completion_tokens": None}, OWN_COUNT),
        ({}, OWN_COUNT),
        ([11, 5], OWN_COUNT),
        ("16", OWN_COUNT),
        (16, OWN_COUNT),
        (True, OWN_COUNT),
    ],
)
def test_strange_usage_is_booked_or_counted_by_ourselves(usage: object, booked: Usage) -> None:
    """What is charged for strange usage (threats): never an exception, never a number that nobody can mean (T43)."""
    assert usage_of(TEXT + event(usage_chunk(usage)) + DONE) == booked
    meter = whole({"choices": [{"message": {"content": "Hello world!"}}], "usage": usage})
    assert meter.usage() == (UNCOUNTED if booked == OWN_COUNT else booked)
    assert meter.uncounted_texts == (["Hello world!"] if booked == OWN_COUNT else [])


def test_a_number_that_no_json_has_leaves_the_rest_to_our_own_count() -> None:
    """`NaN` is no count, but there are clients that read it: it is the usage chunk all the same."""
    raw = b'data: {"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":5}}\n\n'
    meter, shown = watch(TEXT + raw + DONE)
    assert (meter.usage(), shown) == (OWN_COUNT, TEXT + DONE)
    assert watch(TEXT + raw + DONE, ASKED)[1] == TEXT + raw + DONE


def test_text_that_no_json_has_is_text() -> None:
    """Half a surrogate pair, beside numbers that are none: Python's own reader takes both."""
    raw = b'data: {"choices":[{"index":0,"delta":{"content":"ab\\ud800"},"x":NaN}]}\n\n'
    meter, shown = watch(raw)
    assert (meter.usage(), shown) == (AtLeast(Tokens(0, 5)), raw)


# -------------------------------------------------------------------------------------------- what is taken out again


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system_fingerprint": "fp", "service_tier": "default", "obfuscation": "xyz"},
        {"prompt_filter_results": None, "timings": None, "error": None},
    ],
)
def test_a_chunk_that_says_nothing_but_usage_is_dropped(more: dict) -> None:
    """What every chunk has, and what is null, is nothing that the client would miss."""
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
def test_a_chunk_that_says_something_else_too_is_kept_without_its_usage(more: dict, spaced: bool) -> None:
    """llama.cpp's timings and Azure's filter results would have come without us as well (wire §2.3)."""
    meter, shown = watch(TEXT + event(usage_chunk(**more), spaced) + DONE)
    expected = {name: value for name, value in usage_chunk(**more).items() if name != "usage"}
    assert shown == TEXT + event(expected) + DONE
    assert meter.usage() == BOOKED
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
        # Strings that look like it, or are just the word.
        (rb'{"t":",\"usage\":null","usage":null}', rb'{"t":",\"usage\":null"}'),
        (rb'{"t":"\\",  "usage": null, "u":"usage"}', rb'{"t":"\\",  "u":"usage"}'),
        (b'{"usage":null,"t":"usage", "n":1.0}', b'{"t":"usage", "n":1.0}'),
        (b'{"t":"usage", "n":1.0, "usage": null}', b'{"t":"usage", "n":1.0}'),
        # Members of that name inside others stay.
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
def test_a_null_usage_is_cut_out_and_no_other_byte(raw: bytes, shown: bytes, frame: bytes) -> None:
    """`"usage":null` stands there only because we asked; numbers, escapes and line ends stay as they were."""
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
def test_a_spelling_that_nobody_uses_is_written_anew(raw: bytes, shown: bytes) -> None:
    """It says the same, and no other member is taken for it."""
    assert watch(b"data: %b\r\n\r\n" % raw)[1] == b"data: %b\n\n" % shown


def test_json_over_several_data_lines_is_written_anew() -> None:
    """Where the member can't be found in one piece the event says the same in another form."""
    raw = b'data: {"id":1,"a":{"usage":null},\ndata: "usage":null}\n\n'
    assert watch(raw)[1] == event({"id": 1, "a": {"usage": None}})


def test_zeros_on_every_chunk_are_placeholders() -> None:
    """Ollama's /completions send them where usage was asked for: no count, and not for the client (wire §2.2)."""
    completions = request(COMPLETIONS)

    def text(**more: object) -> bytes:
        return event({"id": "c", "choices": [{"text": "Hello world!", "index": 0, "finish_reason": None}], **more})

    with_zeros = text(usage=ZEROS)
    assert watch(with_zeros + with_zeros, completions)[1] == text() + text()
    assert usage_of(with_zeros, completions) == OWN_COUNT  # it broke here: not free
    assert usage_of(with_zeros + event(usage_chunk()) + DONE, completions) == BOOKED
    asked = request(COMPLETIONS, stream_options={"include_usage": True})
    assert watch(with_zeros, asked)[1] == with_zeros


def test_usage_beside_a_choice_is_left_where_it_is() -> None:
    """Some upstreams send it there unasked, so a client would have seen it without us."""
    stream = TEXT + event(chunk(finish="stop", usage=HONEST)) + DONE
    assert watch(stream)[1] == stream


def test_an_odd_usage_is_left_where_it_is() -> None:
    """What is neither null nor an object was not called forth by asking."""
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
    """One event, in the manner of some server."""
    text = json.dumps(document, separators=how["separators"], ensure_ascii=how["ensure_ascii"])
    return (how["start"].format(end=how["end"]) + text + 2 * how["end"]).encode()


@given(
    documents=st.lists(st.tuples(chunks, st.integers(0, 3)), max_size=5),
    how=rendering,
    cuts=st.lists(st.integers(0, 900), max_size=6),
    says_usage=st.booleans(),
)
def test_the_client_sees_what_it_would_have_seen_without_us(
    documents: list, how: dict, cuts: list[int], says_usage: bool
) -> None:
    """A stream with `usage: null` everywhere and the usage chunk comes out as the same stream without them."""
    with_usage, without = b"", b""
    for document, place in documents:
        members = list(document.items())
        members.insert(min(place, len(members)), ("usage", None))
        with_usage += render(dict(members), how)
        without += render(document, how)
    # The usage chunk takes what stands before it in its own event along.
    with_usage += render(usage_chunk(), {**how, "start": "data: "}) if says_usage else b""
    done = b"data: [DONE]" + 2 * how["end"].encode()
    meter, shown = watch(with_usage + done, cuts=cuts)
    assert shown == without + done
    assert isinstance(meter.usage(), Exactly) == says_usage
    assert watch(with_usage + done, ASKED, cuts)[1] == with_usage + done


@given(
    documents=st.lists(st.tuples(chunks.filter(lambda chunk: chunk["choices"]), st.integers(1, 9)), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 900), max_size=6),
)
def test_the_usage_so_far_leaves_no_trace(documents: list, end: str, cuts: list[int]) -> None:
    """A stream as vLLM writes it, with the usage so far on every chunk, comes out as the same stream without."""
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
def test_what_cannot_be_read_passes_on(pieces: list[bytes]) -> None:
    """Whatever comes, nothing is raised, and nothing that holds no usage is changed (T41)."""
    stream = b"".join(pieces)
    assert watch(stream, ASKED)[1] == stream
    shown = watch(stream)[1]
    if b"usage" not in stream:
        assert shown == stream


# -------------------------------------------------------------------------------------------- the usage so far (vLLM)


def so_far(output: int, **more: object) -> dict:
    """The usage that vLLM puts beside each choice, in its order."""
    return {"prompt_tokens": 11, "total_tokens": 11 + output, "completion_tokens": output, **more}


ROLE = event(chunk(usage=so_far(0)))
RUNNING = ROLE + event(chunk("Hello", usage=so_far(3))) + event(chunk(" world!", usage=so_far(4)))


def test_a_stream_that_was_cut_is_known_to_the_token() -> None:
    """Where each chunk says the usage so far: exactly that, however little it was, and the input from the start."""
    assert usage_of(RUNNING) == Exactly(Tokens(11, 4))
    assert isinstance(usage_of(RUNNING), Exactly)
    assert usage_of(ROLE) == Exactly(Tokens(11, 0))
    meter, _ = watch(ROLE)
    assert (meter.output_seen, meter.input_reported) == (0, 11)
    meter, _ = watch(RUNNING)
    assert (meter.output_seen, meter.input_reported) == (4, 11)


def test_text_after_the_last_report_is_counted_on_top() -> None:
    """Then it is no exact number any more, until the next report."""
    meter, _ = watch(RUNNING + event(chunk("12345")))
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(11, 4 + 5)), 9)
    cached = event(chunk("a", usage=so_far(4, prompt_tokens_details={"cached_tokens": 9})))
    assert usage_of(cached + event(chunk("12345"))) == AtLeast(Tokens(11, 9, cached=9))
    meter, _ = watch(RUNNING + event(chunk("12345")) + event(chunk("6", usage=so_far(6))))
    assert (meter.usage(), meter.output_seen) == (Exactly(Tokens(11, 6)), 6)


def test_a_report_that_makes_no_sense_is_none() -> None:
    """The one before it stands, with the text since then."""
    assert usage_of(RUNNING + event(chunk("12345", usage=so_far(-1)))) == AtLeast(Tokens(11, 9))
    assert usage_of(event(chunk("12345", usage=so_far(-1)))) == AtLeast(Tokens(0, 5))


def test_a_report_that_does_not_rise_with_the_text_is_none() -> None:
    """It is about what came before, or a number that nobody keeps: each text beside it is counted."""
    stuck = event(chunk("Hello", usage=so_far(4))) + event(chunk("12345", usage=so_far(4)))
    assert usage_of(stuck) == AtLeast(Tokens(11, 4 + 5))
    assert usage_of(stuck + event(chunk("6", usage=so_far(3)))) == AtLeast(Tokens(11, 4 + 6))
    assert usage_of(stuck + event(chunk("6", usage=so_far(7)))) == Exactly(Tokens(11, 7))
    assert usage_of(event(chunk("Hello", usage=so_far(0)))) == AtLeast(Tokens(0, 5))
    assert usage_of(RUNNING + event(chunk(finish="stop", usage=so_far(4)))) == Exactly(Tokens(11, 4))


def test_the_end_says_the_usage_again() -> None:
    """And ends the answer, as without all those before it."""
    meter, shown = watch(RUNNING + FINISH + event(usage_chunk()) + DONE, ASKED, kind="vllm")
    assert (meter.usage(), meter.is_over) == (BOOKED, True)
    assert shown == event(chunk()) + TEXT + FINISH + event(usage_chunk()) + DONE


@pytest.mark.parametrize("of", [UNASKED, ASKED])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_usage_so_far_is_taken_out_again_and_no_other_byte(of: Request, end: str) -> None:
    """Where we asked for it and the client did not: numbers, escapes and line ends stay as they were."""
    raw = (
        '{"id":"1.50","n":1.50,"choices":[{"index":0,"delta":{"content":"\\u00e9 ,\\"usage\\":{}"},"logprobs":null}]'
        ',"usage":{"prompt_tokens":11,"total_tokens":12,"completion_tokens":1,"prompt_tokens_details":null}}'
    )
    frame = f"data: %s{end}{end}"
    meter, shown = watch((frame % raw).encode(), of, kind="vllm")
    assert shown.decode() == frame % (raw[: raw.rindex(',"usage"')] + "}")
    assert meter.usage() == Exactly(Tokens(11, 1))


def test_who_asked_for_the_usage_so_far_gets_it() -> None:
    """Then it is the client's own, and the stream is the upstream's byte for byte."""
    assert watch(RUNNING, ASKED)[1] == RUNNING
    assert watch(RUNNING)[1] == RUNNING  # some servers send it unasked


def test_a_place_kept_for_usage_is_taken_out_beside_the_usage_so_far() -> None:
    """Null and zeros, as without it."""
    zeros = event(chunk("a", usage=ZEROS)) + event(chunk("b", usage=None)) + event(chunk("c", usage=so_far(3)))
    assert watch(zeros, kind="vllm")[1] == event(chunk("a")) + event(chunk("b")) + event(chunk("c"))


# ----------------------------------------------------------------------------------------------- where no usage comes


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
def test_events_that_are_no_chunk_pass_on(raw: bytes, tokens: int) -> None:
    """In the middle of a stream (T41). What can't be read somebody may read all the same: it costs by its bytes.

    Comments, and events without data, are free.
    """
    meter, shown = watch(TEXT + raw + event(usage_chunk()) + DONE)
    assert shown == TEXT + raw + DONE
    assert meter.usage() == BOOKED
    meter, _ = watch(TEXT + raw)
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 12 + tokens)), 12 + tokens)
    assert usage_of(event(chunk("a", usage=so_far(1))) + raw) == (
        AtLeast(Tokens(11, 1 + tokens)) if tokens else Exactly(Tokens(11, 1))
    )


@pytest.mark.parametrize(
    "strange", [None, {}, "text", 5, [None], ["text", 5], [[]], [{"delta": None}], [{"delta": []}]]
)
def test_choices_of_any_form_pass_on(strange: object) -> None:
    """Wrong types raise nothing; text in them counts."""
    raw = event({"id": "c", "choices": strange})
    assert watch(raw)[1] == raw


def test_an_event_too_large_to_read_passes_on() -> None:
    """It comes in large pieces without data, and costs by its bytes; the last of them may be small."""
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
def test_all_that_the_model_wrote_is_counted(delta: dict) -> None:
    """Tool calls, refusals and shown thoughts cost as much as words."""
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
def test_what_the_model_did_not_write_is_not_counted(choice: dict) -> None:
    """Verdicts, reasons and the same text as single tokens would make a broken stream several times too dear."""
    assert usage_of(event({"choices": [choice]})) == AtLeast(Tokens(0, 0))


def test_a_chunk_of_text_is_a_token_at_least() -> None:
    """Servers send a chunk for each token, also where the pieces of a character come to nothing by themselves."""
    meter = Meter(UNASKED, count=lambda text: 0)
    for _ in range(50):
        meter.see_event(Splitter().feed(event(chunk("a")))[0])
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(0, 50)), 50)
    assert usage_of(event(chunk("a" * 400)) * 2) == AtLeast(Tokens(0, 800))
    assert usage_of(event(chunk(""))) == AtLeast(Tokens(0, 0))


def test_all_choices_are_counted() -> None:
    """Three answers are three times the text."""
    texts = [{"index": index, "text": "x" * 40, "finish_reason": None} for index in range(3)]
    assert usage_of(event({"choices": texts}), request(COMPLETIONS, n=3)) == AtLeast(Tokens(0, 120))


def test_before_anything_came_nothing_is_known() -> None:
    """What the input of a call that was never answered may have cost, others have to say."""
    assert usage_of(b"") == AtLeast(Tokens(0, 0))
    assert new().usage() == AtLeast(Tokens(0, 0))
    assert (new().output_seen, new().input_reported, new().uncounted_texts) == (0, None, [])


@pytest.mark.parametrize(
    "error", [{"error": {"message": "It broke. " * 40}}, {"error": "It broke. " * 40}, {"type": "error", "error": {}}]
)
@pytest.mark.parametrize("of", [UNASKED, ASKED, request(RESPONSES)])
def test_an_error_event_is_seen_and_never_counted_as_output(error: dict, of: Request) -> None:
    """It may come inside a 200; its words are not the model's (T44)."""
    meter, shown = watch(event(error) + DONE, of)
    assert meter.has_error
    assert shown == event(error) + DONE
    assert meter.usage() == AtLeast(Tokens(0, 0))


def test_what_came_before_an_error_is_counted() -> None:
    """Also what came with it, and the usage where it says one."""
    with_error = event(chunk("Hello!", finish="error", error={"message": "It broke."}))
    assert usage_of(with_error + with_error + DONE) == OWN_COUNT
    assert usage_of(TEXT + event({"error": {"message": "It broke."}, "choices": [], "usage": HONEST})) == BOOKED
    assert not watch(event(chunk("Hello", error=None)))[0].has_error


def test_an_error_stays_seen() -> None:
    """vLLM sends [DONE] after it, others more chunks."""
    assert watch(event({"error": {}}) + TEXT + event(usage_chunk()) + DONE)[0].has_error


# --------------------------------------------------------------------------------------------------------- /responses


def response_event(kind: str, **more: object) -> bytes:
    """An event of a response."""
    return f"event: {kind}\n".encode() + event({"type": kind, "sequence_number": 1, **more})


RESPONSE_USAGE = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}
SAID = response_event("response.output_text.delta", delta="Hello") + response_event(
    "response.output_text.delta", delta=" world!"
)


@pytest.mark.parametrize(
    ("kind", "has_error"),
    [("response.completed", False), ("response.incomplete", False), ("response.failed", True), ("error", True)],
)
@pytest.mark.parametrize(
    ("said", "booked"), [({"usage": RESPONSE_USAGE}, BOOKED), ({}, OWN_COUNT), ({"usage": None}, OWN_COUNT)]
)
def test_a_response_ends_in_one_of_four_ways(kind: str, has_error: bool, said: dict, booked: Usage) -> None:
    """Whichever it is: charged if it says its usage, counted if not, and passed on as it came (wire §2.4)."""
    stream = response_event("response.created", response={"usage": None}) + SAID + response_event(kind, response=said)
    meter, shown = watch(stream, request(RESPONSES))
    assert shown == stream
    assert (meter.is_at_end, meter.is_over, meter.has_error) == (True, True, has_error)
    assert meter.usage() == booked


def test_a_flat_error_ends_a_response() -> None:
    """`{"type":"error","code":…,"message":…}` has no response in it."""
    meter, _ = watch(
        SAID + response_event("error", code="server_error", message="It broke.", param=None), request(RESPONSES)
    )
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, OWN_COUNT)


def test_a_response_is_not_over_before_its_end() -> None:
    """Created, in progress, and text that is done: nothing is held back, and nothing counts twice."""
    stream = b"".join(
        [
            response_event("response.created", response={"usage": None, "error": None}),
            SAID,
            response_event("response.output_text.done", text="Hello world"),
            response_event("response.output_item.done", item={"content": [{"text": "Hello world"}]}),
        ]
    )
    meter, shown = watch(stream, request(RESPONSES))
    assert (meter.is_at_end, meter.has_error, shown) == (False, False, stream)
    assert meter.usage() == OWN_COUNT


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
def test_a_text_that_is_only_said_as_a_whole_is_counted(events: bytes) -> None:
    """Some servers send no pieces of it, or not all; and what came in pieces is not counted again."""
    assert usage_of(events, request(RESPONSES)) == OWN_COUNT
    assert usage_of(events * 3, request(RESPONSES)) == (
        AtLeast(Tokens(0, 12 + 2 * 5)) if b".delta" in events else OWN_COUNT
    )


def test_a_response_is_known_by_its_id_as_soon_as_it_begins() -> None:
    """From its first event on, and of a whole one; never by a name that could not stand in a path."""
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
def test_what_a_tool_drew_is_charged_beside_the_usage(tools: object, tokens: Tokens) -> None:
    """It is not in the usage of the response (wire §1.2); without that nothing is known exactly."""
    response = {"id": "resp_1", "usage": {"input_tokens": 10, "output_tokens": 5}, "tool_usage": tools}
    assert whole(response, RESPONSES).usage() == Exactly(tokens)
    assert usage_of(response_event("response.completed", response=response), request(RESPONSES)) == Exactly(tokens)
    del response["usage"]
    assert isinstance(whole(response, RESPONSES).usage(), AtLeast)


def test_a_done_behind_a_response_is_tolerated() -> None:
    """Compatible servers send it."""
    end = response_event("response.completed", response={"usage": RESPONSE_USAGE})
    meter, shown = watch(SAID + end + DONE, request(RESPONSES))
    assert (meter.is_over, meter.usage(), shown) == (True, BOOKED, SAID + end + DONE)


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
    """Whatever it is a part of; the padding against onlookers is not."""
    raw = event({"type": kind, "delta": delta, "obfuscation": "xyz" * 99, "item_id": "m" * 99})
    assert usage_of(raw, request(RESPONSES)) == AtLeast(Tokens(0, tokens))


@pytest.mark.parametrize("response", [None, "x", [], {"usage": []}, {"usage": {"input_tokens": -1}}])
def test_a_strange_end_of_a_response_is_an_end(response: object) -> None:
    """Then our own count stands."""
    meter, _ = watch(SAID + response_event("response.completed", response=response), request(RESPONSES))
    assert (meter.is_over, meter.usage()) == (True, OWN_COUNT)


# ------------------------------------------------------------------------------------------------------ whole answers


def message(content: str, **more: object) -> dict:
    """A choice of a whole chat answer."""
    return {"message": {"role": "assistant", "content": content, **more.pop("said", {})}, **more}


ITEM = {"type": "message", "status": "completed", "role": "assistant", "content": [{"text": "Hello world"}]}
TOKENS = {"content": [{"token": "Hello", "top_logprobs": [{"token": "Hi"}]}]}


@pytest.mark.parametrize(
    ("endpoint", "answer", "texts"),
    [
        (CHAT, {"choices": [message("Hello world")]}, ["Hello world"]),
        (CHAT, {"choices": [message("Hello world")], "error": None}, ["Hello world"]),
        (CHAT, {"choices": [message("x" * 40)] * 3}, ["x" * 40] * 3),
        (CHAT, {"choices": [message("a", said={"refusal": "b" * 8}, logprobs=TOKENS)]}, ["a", "b" * 8]),
        (COMPLETIONS, {"choices": [{"text": "Hello world"}]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM]}, ["Hello world"]),
        (RESPONSES, {"output": [ITEM], "usage": None}, ["Hello world"]),
        (EMBEDDINGS, {"data": [{"embedding": "AAAA" * 99}]}, []),
        (EMBEDDINGS, {"choices": [{"text": "Hello world"}]}, []),
        (CHAT, {}, []),
    ],
)
def test_of_a_whole_answer_without_usage_the_texts_are_kept(
    endpoint: Endpoint, answer: dict, texts: list[str]
) -> None:
    """To be counted by whoever may take the time for it; until then nothing of them is in the usage."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, texts)
    assert meter.is_at_end
    assert not meter.has_error


@pytest.mark.parametrize(
    ("endpoint", "answer", "booked"),
    [
        (CHAT, {"choices": [message("Hello world")], "usage": HONEST}, BOOKED),
        (COMPLETIONS, {"choices": [{"text": "Hello world"}], "usage": ZEROS}, Exactly(Tokens(0, 0))),
        (RESPONSES, {"output": [ITEM], "usage": RESPONSE_USAGE}, BOOKED),
        (RESPONSES, {"status": "incomplete", "output": [], "usage": RESPONSE_USAGE}, BOOKED),
        (EMBEDDINGS, {"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, Exactly(Tokens(9, 0))),
    ],
)
def test_a_whole_answer_is_booked_by_its_usage(endpoint: Endpoint, answer: dict, booked: Usage) -> None:
    """Exactly that, and there is nothing left to count."""
    meter = whole(answer, endpoint)
    assert (meter.usage(), meter.uncounted_texts) == (booked, [])
    assert isinstance(meter.usage(), Exactly)
    assert meter.is_at_end
    assert not meter.has_error


@pytest.mark.parametrize(
    ("of", "answer", "booked", "texts"),
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
def test_usage_that_is_of_the_first_choice_alone(
    of: Request, answer: dict, booked: tuple[int, int] | None, texts: list[str]
) -> None:
    """llama.cpp's: the texts of the others are kept to be counted, and of several prompts no input is known."""
    meter = Meter(of, count=count, kind="llamacpp")
    meter.see_whole(json.dumps({**answer, "usage": HONEST}).encode())
    assert meter.usage() == (BOOKED if booked is None else AtLeast(Tokens(*booked)))
    assert meter.uncounted_texts == texts
    assert meter.input_reported == (None if of.has_several_prompts else 11)


def test_without_usage_all_choices_are_counted() -> None:
    """Also where it would be of one alone."""
    meter = Meter(request(stream=False, n=2), count=count, kind="llamacpp")
    meter.see_whole(json.dumps({"choices": [message("a"), message("b")]}).encode())
    assert (meter.usage(), meter.uncounted_texts, meter.input_reported) == (UNCOUNTED, ["a", "b"], None)


def test_an_error_in_a_whole_answer_is_seen() -> None:
    """Inside a 200: its words cost nothing, what was generated before it does (T44)."""
    error = {"error": {"message": "It broke. " * 40, "code": 500}}
    assert whole(error).has_error
    assert (whole(error).usage(), whole(error).uncounted_texts) == (UNCOUNTED, [])
    assert whole({**error, "choices": [{"message": {"content": "Hello world"}}]}).uncounted_texts == ["Hello world"]
    assert whole({**error, "usage": HONEST}).usage() == BOOKED
    failed = {"status": "failed", "output": [], "usage": RESPONSE_USAGE, **error}
    assert whole(failed, RESPONSES).usage() == BOOKED


@pytest.mark.parametrize("body", [b"x" * 400, b"\xff" * 400, b"[" * 400, b'"' + b"x" * 398 + b'"', b"7" * 400])
def test_a_body_that_is_no_object_counts_in_full(body: bytes) -> None:
    """Whatever it is, it was generated, and it is no answer; but embeddings generate nothing."""
    meter = whole(body)
    assert (meter.usage(), meter.uncounted_texts) == (UNCOUNTED, [body.decode(errors="replace")])
    assert (whole(body, EMBEDDINGS).usage(), whole(body, EMBEDDINGS).uncounted_texts) == (UNCOUNTED, [])
    assert meter.has_error


def test_a_stream_where_a_whole_answer_was_asked_is_read_as_one() -> None:
    """The body's form decides, not what was asked for; nothing was injected, so nothing is taken out."""
    null = event(chunk("Hello", usage=None))
    meter, shown = watch(null + event(usage_chunk()) + DONE, request(stream=False))
    assert (meter.usage(), shown) == (BOOKED, null + event(usage_chunk()) + DONE)


def test_a_usage_chunk_that_came_early_is_not_the_end() -> None:
    """What follows it passes on at once again; after [DONE] nothing does."""
    meter = new()
    usage = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
    word = b'{"choices": [{"delta": {"content": "x"}}]}'
    seen = []
    for data in (usage, word, b"[DONE]", word):
        meter.see_event(Event(raw=b"data: " + data + b"\n\n", name=None, data=data))
        seen.append(meter.is_at_end)
    assert seen == [True, False, True, True]


def test_the_beginning_of_an_event_that_was_cut_off_says_nothing() -> None:
    """A whole one that can't be read costs by its bytes; of one that broke off nobody reads anything."""
    meter = new()
    half = Event(raw=b'data: {"choices": [{"del', name=None, data=b'{"choices": [{"del')
    assert meter.see_event(half, is_cut=True) == half.raw
    assert meter.output_seen == 0


# ---------------------------------------------------------------------------------------------------- what is no text

TOLD = {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}


def steps(*said: dict) -> bytes:
    """A stream of these events."""
    return b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in said)


def test_a_moderation_is_a_request_and_a_count_is_nothing() -> None:
    """Whatever they say, and also where they are not heard to the end."""
    for body in ({"results": []}, {"usage": TOLD}, b"no JSON"):
        assert whole(body, MODERATIONS).usage() == Unspent(requests=1)
        assert whole(body, INPUT_TOKENS).usage() == Unspent()
    assert new(request(MODERATIONS)).usage() == Unspent(requests=1)
    assert whole(b"no JSON", MODERATIONS).has_error


@pytest.mark.parametrize("endpoint", [IMAGES, SPEECH])
def test_tokens_are_charged_where_they_are_said(endpoint: Endpoint) -> None:
    """Else the answer counts as a request, be it JSON or sound; one that is an error costs what was asked."""
    assert whole({"usage": TOLD}, endpoint).usage() == Exactly(Tokens(11, 5))
    assert whole({"data": []}, endpoint).usage() == Unspent(requests=1)
    assert whole({"usage": {"type": "duration", "seconds": 7}}, endpoint).usage() == Unspent(requests=1)
    sound = whole(b"ID3\xff", endpoint)
    assert (sound.usage(), sound.has_error, sound.uncounted_texts) == (Unspent(requests=1), False, [])
    assert whole({"error": {"message": "no"}}, endpoint).usage() == AtLeast(Tokens(0, 0))


def test_a_drawing_says_apart_what_the_model_used_that_wrote_it() -> None:
    """Both are billed."""
    drawing = {
        "usage": TOLD,
        "svg_usage": {"model": "m", "input_tokens": 100, "output_tokens": 50, "total_tokens": 150},
    }
    assert whole(drawing, IMAGES).usage() == Exactly(Tokens(111, 55))
    assert whole({"svg_usage": TOLD}, IMAGES).usage() == Exactly(Tokens(11, 5))


def test_a_compaction_is_counted_where_it_says_no_tokens() -> None:
    """It is billed in tokens like any response."""
    assert whole({"output": [], "usage": TOLD}, COMPACT).usage() == Exactly(Tokens(11, 5))
    silent = whole({"output": [{"type": "compaction", "id": "c", "encrypted_content": "secret"}]}, COMPACT)
    assert (silent.usage(), silent.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["secret"])


@pytest.mark.parametrize(
    ("endpoint", "step", "end"),
    [
        (IMAGES, "image_generation.partial_image", "image_generation.completed"),
        (SPEECH, "speech.audio.delta", "speech.audio.done"),
    ],
)
def test_a_stream_of_what_is_no_text_says_its_usage_at_its_end(endpoint: Endpoint, step: str, end: str) -> None:
    """Every event passes as it came. Before the end nobody knows what it cost: all that is held."""
    of = request(endpoint)
    begun, done = steps({"type": step, "b64_json": "AAAA"}), steps({"type": end, "usage": TOLD})
    meter, shown = watch(begun, of)
    assert (shown, meter.output_seen, meter.is_over) == (begun, 0, False)
    assert meter.usage() == AtLeast(Tokens(0, TOKENS_MAX))
    meter, shown = watch(begun + done, of)
    assert (shown, meter.output_seen, meter.is_at_end, meter.is_over) == (begun + done, 0, True, True)
    assert meter.usage() == Exactly(Tokens(11, 5))
    assert usage_of(begun + steps({"type": end}), of) == Unspent(requests=1)
    assert usage_of(begun + DONE, of) == Unspent(requests=1)


def test_several_pictures_of_a_stream_add_up() -> None:
    """Each says its own; a stream that ends after the first has not said what the second cost."""
    first = steps({"type": "image_generation.completed", "usage": TOLD})
    assert usage_of(first + first, request(IMAGES, n=2)) == Exactly(Tokens(22, 10))
    assert usage_of(first, request(IMAGES, n=2)) == AtLeast(Tokens(0, TOKENS_MAX))


@pytest.mark.parametrize("error", [{"type": "error", "message": "no"}, {"error": {"message": "no"}}])
def test_a_stream_that_says_it_failed_has_generated_nothing(error: dict) -> None:
    """Its input was read."""
    meter, _ = watch(steps(error), request(IMAGES))
    assert (meter.is_over, meter.has_error, meter.usage()) == (True, True, AtLeast(Tokens(0, 0)))


# --------------------------------------------------------------------------------------------- what llama.cpp says

TIMINGS = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 1e-05, "predicted_n": 5, "predicted_ms": 12.0}


def timed(stream: bytes, of: Request = UNASKED) -> tuple[Meter, bytes]:
    """Let a stream of llama.cpp go by; return the meter, and what the client is shown of it."""
    meter, splitter = new(of, kind="llamacpp"), Splitter()
    shown = b"".join(meter.see_event(each) for each in splitter.feed(stream))
    return meter, shown + meter.flush()


@pytest.mark.parametrize("spaced", [False, True])
def test_timings_stand_where_they_would_have_stood_unasked(spaced: bool) -> None:
    """On the last chunk with a choice, to the byte; a chunk without choices is nothing that its client expects."""
    meter, shown = timed(TEXT + FINISH + event(usage_chunk(timings=TIMINGS), spaced) + DONE)
    raw = event(usage_chunk(timings=TIMINGS), spaced)
    timings = raw[raw.index(b'"timings"') : raw.rindex(b"}")]
    assert shown == TEXT + FINISH.replace(b"}\n\n", b"," + timings + b"}\n\n") + DONE
    assert meter.usage() == BOOKED


def test_timings_in_an_odd_place_are_moved_all_the_same() -> None:
    """Then the chunk is written anew; and a `usage: null` on it is none of the client's."""
    odd = event({"timings": TIMINGS, **usage_chunk()})
    expected = {**chunk(finish="stop"), "timings": TIMINGS}
    for last in (FINISH, event(chunk(finish="stop", usage=None))):
        _, shown = timed(TEXT + last + odd + DONE)
        assert [json.loads(each.data or b"") for each in Splitter().feed(shown)[-2:-1]] == [expected]
    _, shown = timed(event(chunk(finish="stop", usage=HONEST)) + odd)
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
def test_a_last_chunk_without_timings_behind_it_is_not_lost(after: bytes) -> None:
    """It was kept for no more than a moment."""
    assert timed(TEXT + FINISH + after)[1] == TEXT + FINISH + after


def test_beside_timings_and_something_else_the_usage_chunk_stays() -> None:
    """Nobody knows where the rest would have stood."""
    more = usage_chunk(timings=TIMINGS, x_vendor=1)
    shown = timed(FINISH + event(more))[1]
    assert shown == FINISH + event({name: value for name, value in more.items() if name != "usage"})
    assert timed(FINISH + event(usage_chunk()) + DONE)[1] == FINISH + DONE


@pytest.mark.parametrize(
    ("of", "last"),
    [(ASKED, usage_chunk(timings=TIMINGS)), (request(n=2), chunk(timings=TIMINGS))],
    ids=["asked", "n"],
)
def test_elsewhere_timings_stay_where_they_are(of: Request, last: dict) -> None:
    """Who asked for the usage gets its chunk, and of several choices each has its own."""
    stream = TEXT + FINISH + event(last) + DONE
    assert timed(stream, of)[1] == stream


def test_timings_say_the_usage_where_nothing_else_does() -> None:
    """What was read and what was known already are the input."""
    last = event(chunk(finish="stop", timings=TIMINGS))
    assert watch(TEXT + last + DONE)[0].usage() == Exactly(Tokens(11, 5, cached=4))
    assert usage_of(TEXT + last + event(usage_chunk()) + DONE) == BOOKED
    assert usage_of(TEXT + event(chunk(finish="stop", timings={"predicted_n": 5})) + DONE) == OWN_COUNT


def test_what_was_not_asked_for_is_the_client_s() -> None:
    """Where the upstream would not take our option, all that it says was said unasked."""
    for kind, text in (("vllm", RUNNING), ("llamacpp", TIMED)):
        meter = new(kind=kind)
        meter.stop_stripping()
        stream = text + event(chunk(finish="stop", usage=None)) + event(usage_chunk(timings=TIMINGS)) + DONE
        assert b"".join(meter.see_event(each) for each in Splitter().feed(stream)) == stream
        assert meter.usage() == BOOKED


def timings(output: int, **more: object) -> dict:
    """What llama.cpp says on every chunk when it is asked to."""
    return {**TIMINGS, "predicted_n": output, **more}


TIMED = event(chunk("Hello", timings=timings(3))) + event(chunk(" world!", timings=timings(5)))


def test_a_stream_of_llama_cpp_that_was_cut_is_known_to_the_token() -> None:
    """The input with the first word, what was in the cache of it included."""
    cut = TIMED[: TIMED.index(b"\n\n") + 2]
    meter, shown = timed(cut)
    assert shown == event(chunk("Hello"))
    assert (meter.usage(), meter.output_seen, meter.input_reported) == (Exactly(Tokens(11, 3, cached=4)), 3, 11)
    assert timed(cut + event(chunk("12345")))[0].usage() == AtLeast(Tokens(11, 8, cached=4))


@pytest.mark.parametrize("more", [{}, {"timings_per_token": False}, {"stream_options": {"include_usage": False}}])
def test_the_timings_so_far_leave_no_trace(more: dict) -> None:
    """They are on the last chunk, where they come unasked; also where no usage comes after them."""
    last = event(chunk(finish="stop", timings=timings(5)))
    meter, shown = timed(TIMED + FINISH + event(usage_chunk(timings=timings(5))) + DONE, request(**more))
    assert (meter.usage(), shown) == (BOOKED, TEXT + last + DONE)
    meter, shown = timed(TIMED + last + DONE, request(**more))
    assert (meter.usage(), shown) == (Exactly(Tokens(11, 5, cached=4)), TEXT + last + DONE)


def test_who_asked_for_the_usage_gets_the_timings_with_it() -> None:
    """There is where they come unasked then."""
    end = event(usage_chunk(timings=timings(5))) + DONE
    assert timed(TIMED + FINISH + end, ASKED)[1] == TEXT + FINISH + end


def test_who_asked_for_the_timings_so_far_gets_them() -> None:
    """They are its own."""
    assert timed(TIMED + DONE, request(timings_per_token=True))[1] == TIMED + DONE


def test_of_several_choices_timings_so_far_stay() -> None:
    """They were not asked for by us."""
    assert timed(TIMED + DONE, request(n=2))[1] == TIMED + DONE


def test_a_completion_ends_with_its_timings() -> None:
    """Its usage stands beside its last choice, asked for or not."""
    pieces = [
        {"choices": [{"text": "Hello", "finish_reason": None}]},
        {"choices": [{"text": "", "finish_reason": "stop"}]},
    ]
    first, last = ({**piece, "timings": timings(5)} for piece in pieces)
    stream = event(first) + event({**last, "usage": HONEST}) + DONE
    for of in (request(COMPLETIONS), request(COMPLETIONS, stream_options={"include_usage": True})):
        meter, shown = timed(stream, of)
        assert shown == event(pieces[0]) + event({**last, "usage": HONEST}) + DONE
        assert meter.usage() == BOOKED


# ----------------------------------------------------------------------------------------------- Anthropic's messages

MESSAGE = request(MESSAGES, max_tokens=50)


def said(kind: str, **more: object) -> bytes:
    """An event of a message."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()


def delta(kind: str, **more: object) -> bytes:
    """A piece of a block."""
    return said("content_block_delta", index=0, delta={"type": kind, **more})


START = said(
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
BLOCK = said("content_block_start", index=0, content_block={"type": "text", "text": ""})
BLOCK_STOP = said("content_block_stop", index=0)
STOP = said("message_stop")


def ended(**usage: object) -> bytes:
    """The event that says all that was used."""
    return said("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


def test_a_message_is_charged_what_its_end_says() -> None:
    """What the end leaves out of the input is as the beginning said it, and nothing of the stream is changed."""
    stream = (
        START + BLOCK + said("ping") + delta("text_delta", text="hi") + BLOCK_STOP + ended(output_tokens=9) + STOP
    )
    meter, shown = watch(stream, MESSAGE)
    assert meter.usage() == Exactly(Tokens(11, 9, cached=5))
    assert shown == stream
    assert meter.is_over


def test_an_input_of_0_at_the_beginning_is_none() -> None:
    """As from servers that count at the end: what is held for the input must not shrink to it."""
    start = said("message_start", message={"usage": {"input_tokens": 0, "output_tokens": 0}})
    meter, _ = watch(start + BLOCK + delta("text_delta", text="hello"), MESSAGE)
    assert (meter.input_reported, meter.usage()) == (None, AtLeast(Tokens(0, 5)))
    assert usage_of(start + BLOCK + ended(input_tokens=7, output_tokens=2) + STOP, MESSAGE) == Exactly(Tokens(7, 2))


def test_the_last_usage_of_a_message_wins() -> None:
    """It counts all so far: it is never added up, and may correct the input."""
    stream = START + BLOCK + delta("text_delta", text="hi") + ended(output_tokens=3)
    meter, _ = watch(stream + ended(output_tokens=9, input_tokens=6, cache_read_input_tokens=0) + STOP, MESSAGE)
    assert meter.usage() == Exactly(Tokens(8, 9))


def test_a_message_that_is_cut_is_charged_its_input_and_what_passed() -> None:
    """The input is known from the first event on; the output that it guesses there is counted when it comes."""
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
        (said("content_block_start", index=1, content_block={"type": "tool_use", "id": "t", "name": "f"}), 1),
        (said("content_block_start", index=1, content_block={"type": "text", "text": "hello"}), 5),
        (said("content_block_delta"), 0),
        (said("message_start", message="?"), 0),
        (said("message_delta", usage="?"), 0),
        (said("ping"), 0),
    ],
)
def test_what_the_model_wrote_is_counted(event: bytes, tokens: int) -> None:
    """Words, thoughts and which tools are called, and with what; signatures and ids are no words of it."""
    assert usage_of(START + event, MESSAGE) == AtLeast(Tokens(11, tokens, cached=5))


def test_without_usage_a_message_is_counted() -> None:
    """As from a server that is like Anthropic's in all else; what makes no sense is no usage."""
    stream = BLOCK + delta("text_delta", text="hello") + BLOCK_STOP + ended(output_tokens="many") + STOP
    assert usage_of(stream, MESSAGE) == AtLeast(Tokens(0, 5))


def test_the_end_of_a_message_begins_with_its_usage() -> None:
    """From there on it waits until it is settled; should a block follow after all, that was not the end."""
    meter, splitter = new(MESSAGE), Splitter()
    stops = []
    for event in splitter.feed(
        START + BLOCK + BLOCK_STOP + ended(output_tokens=1) + BLOCK + delta("text_delta") + STOP
    ):
        meter.see_event(event)
        stops.append((meter.is_at_end, meter.is_over))
    assert stops == [(False, False)] * 3 + [(True, False)] + [(False, False)] * 2 + [(True, True)]


def test_an_error_ends_a_message() -> None:
    """What passed before it is charged."""
    meter, _ = watch(START + delta("text_delta", text="hi") + said("error", error={"type": "api_error"}), MESSAGE)
    assert (meter.has_error, meter.is_over, meter.usage()) == (True, True, AtLeast(Tokens(11, 2, cached=5)))


def test_a_whole_message_says_its_usage_or_is_counted() -> None:
    """All of its blocks, where nothing is said."""
    body = {
        "content": [{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "b"}}]
    }
    meter = new(MESSAGE)
    meter.see_whole(json.dumps({**body, "usage": {"input_tokens": 3, "output_tokens": 2}}).encode())
    assert (meter.usage(), meter.uncounted_texts) == (Exactly(Tokens(3, 2)), [])
    meter = new(MESSAGE)
    meter.see_whole(json.dumps(body).encode())
    assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(0, 0)), ["hi", "f", "b"])
