"""Answers of /chat/completions and /completions: what is charged, what the client gets, and how a stream is stopped.

The end of a stopped stream is checked chunk by chunk, and the official SDK reads the beginning of an answer followed
by the proxy's end from a real socket. Sources: docs/wire.md, sections 2.2 and 2.3 (usage in streams);
docs/threats.md, T36 and T39 to T45 and "What is charged for strange usage".
"""

import json
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import LengthFinishReasonError
from openai.lib.streaming.chat import AsyncChatCompletionStream
from openai.types.chat import ChatCompletion

from proxy.errors import UpstreamError
from proxy.formats.chat import (
    extra_members,
    is_finish_chunk,
    with_timings,
    without_timings,
    without_usage,
)
from proxy.formats.endpoints import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    IMAGES,
    Endpoint,
    EndpointName,
)
from proxy.formats.meter import JSON, Meter
from proxy.formats.request import Request
from proxy.formats.sse import Event, Splitter
from proxy.formats.surfaces import error_event, meter_of
from proxy.formats.texts import plain_text, texts_in
from proxy.policy.amounts import AtLeast, Exactly, Tokens, Usage
from proxy.simulator.text import Endpoint as Simulated
from tests.formats.streams import (
    ANYTHING,
    ASKED,
    COUNTED,
    DONE,
    FINISH,
    GREETING,
    HONEST,
    REPORTED,
    TEXT,
    UNASKED,
    UNCOUNTED,
    USED,
    WITH_USAGE,
    ZEROS,
    beginning,
    chunk,
    count,
    end_of,
    ending_of,
    event,
    message,
    new,
    parsed,
    request,
    sdk_reading,
    simulated,
    stopped,
    usage_chunk,
    usage_of,
    watch,
    whole,
)

LARGE = {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50}

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
    """llama.cpp sends one behind the end of each choice, with the same input each time; others send one for all."""
    several = request(n=3)
    first, longer = event(usage_chunk()), {**HONEST, "completion_tokens": 7}
    second = event(usage_chunk({**longer, "completion_tokens_details": {"reasoning_tokens": 2}}))
    each = TEXT + FINISH + first + TEXT + FINISH + second + FINISH + second
    assert usage_of(each + DONE, several) == Exactly(Tokens(11, 5 + 7 + 7, reasoning=4))
    assert usage_of(TEXT + first + DONE, several) == REPORTED
    assert usage_of(event(usage_chunk({"total_tokens": -1})) + FINISH + first + DONE, several) == REPORTED


def test_a_usage_chunk_of_several_choices_that_is_repeated_counts_once() -> None:
    """Only a usage chunk behind the end of a choice may be that of the choice. Others state all choices again."""
    several, end = request(n=2), FINISH + FINISH + event(usage_chunk()) + event(usage_chunk())
    assert usage_of(TEXT + end + DONE, several) == REPORTED
    running = event(usage_chunk({**HONEST, "completion_tokens": 2, "total_tokens": 13}))
    assert usage_of(running + TEXT + running + end + DONE, several) == REPORTED
    assert usage_of(TEXT + end + running + DONE, several) == AtLeast(Tokens(11, 12))


def test_running_usage_of_one_of_several_choices_is_ignored() -> None:
    """vLLM reports the usage of that choice only. The texts are counted until the usage of all choices comes."""
    several = request(n=2, stream_options={"include_usage": True})
    text = event(chunk("Hello", usage={**HONEST, "completion_tokens": 1})) * 2
    meter, shown = watch(text, several)
    assert (meter.usage(), meter.output_seen, meter.input_stated) == (AtLeast(Tokens(0, 10)), 10, None)
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
        (
            event(usage_chunk({**HONEST, "completion_tokens": 7})) + event(usage_chunk()) + DONE,
            Exactly(Tokens(11, 7)),
        ),
        (TEXT + event(usage_chunk(LARGE)) + event(usage_chunk(ZEROS)) + DONE, Exactly(Tokens(20, 30))),
        (event(usage_chunk(ZEROS)) + TEXT + event(usage_chunk(LARGE)) + DONE, Exactly(Tokens(20, 30))),
        (TEXT + event(usage_chunk({"prompt_tokens": 11})) + event(usage_chunk({"completion_tokens": 5})), REPORTED),
        (TEXT + event(usage_chunk({"total_tokens": 16})) + event(usage_chunk()) + DONE, REPORTED),
        (TEXT + event(usage_chunk({"total_tokens": 16})) + event(usage_chunk(ZEROS)) + DONE, Exactly(Tokens(0, 16))),
        (TEXT + event(usage_chunk({"completion_tokens": 5})) + event(usage_chunk(ZEROS)) + DONE, COUNTED),
        (event(usage_chunk(ZEROS)) + TEXT + event(usage_chunk({"completion_tokens": 5})) + DONE, COUNTED),
        (event(usage_chunk(ZEROS)) + TEXT + event(usage_chunk({"total_tokens": 16})) + DONE, Exactly(Tokens(0, 16))),
        (
            TEXT + event(usage_chunk({"total_tokens": 9})) + event(usage_chunk({"total_tokens": 8})) + DONE,
            AtLeast(Tokens(0, 12)),
        ),
        (TEXT + event(usage_chunk(ZEROS)) + DONE, COUNTED),
        (event(usage_chunk(ZEROS)) + TEXT + DONE, COUNTED),
        (event(chunk("")) + FINISH + event(usage_chunk(ZEROS)) + DONE, AtLeast(Tokens(0, 0))),
        (
            event(chunk("")) + FINISH + event(usage_chunk({**HONEST, "prompt_tokens": 0, "total_tokens": 5})) + DONE,
            AtLeast(Tokens(0, 5)),
        ),
        (TEXT + event(usage_chunk({**ZEROS, "prompt_tokens": 11})) + DONE, AtLeast(Tokens(11, 12))),
        (TEXT + event(usage_chunk({"prompt_tokens": 11, "total_tokens": 11})) + DONE, AtLeast(Tokens(11, 12))),
    ],
)
def test_the_largest_usage_counts(stream: bytes, expected: Usage) -> None:
    """On any chunk, even beside the last choice or after [DONE].

    An output of 0 counts only if there is neither text nor more, an input of 0 never: the caller counts it.

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
        (ZEROS, COUNTED),
        ({"prompt_tokens": 11}, AtLeast(Tokens(11, 12))),
        ({"prompt_tokens": 11, "completion_tokens": None}, AtLeast(Tokens(11, 12))),
        ({"prompt_tokens": 11, "completion_tokens": 0}, AtLeast(Tokens(11, 12))),
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
    is_counted = isinstance(expected, AtLeast)
    assert meter.usage() == (AtLeast(Tokens(expected.tokens.input, 0)) if is_counted else expected)
    assert meter.uncounted_texts == (["Hello world!"] if is_counted else [])
    assert meter.output_with(12) == max(12, expected.tokens.output)


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


@pytest.mark.parametrize(
    "choices", [None, {}, {"a": 1}, "text", 5, [None], ["text", 5], [[]], [{"delta": None}], [{"delta": []}]]
)
def test_choices_of_any_type_are_forwarded(choices: object) -> None:
    """Wrong types raise nothing."""
    raw = event({"id": "c", "choices": choices})
    assert watch(raw)[1] == watch(raw, request(n=2))[1] == raw


def test_all_choices_are_counted() -> None:
    """Three choices have three times the text of one."""
    texts = [{"index": index, "text": "x" * 40, "finish_reason": None} for index in range(3)]
    assert usage_of(event({"choices": texts}), request(COMPLETIONS, n=3)) == AtLeast(Tokens(0, 120))


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
    assert (meter.output_seen, meter.input_stated) == (0, 11)
    meter, _ = watch(RUNNING)
    assert (meter.output_seen, meter.input_stated) == (4, 11)


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
    # One that falls contradicts an earlier one, so it is at least all that was counted.
    assert usage_of(stuck + event(chunk("6", usage=so_far(3)))) == AtLeast(Tokens(11, 5 + 6))
    assert usage_of(stuck + event(chunk("6", usage=so_far(7)))) == Exactly(Tokens(11, 7))
    assert usage_of(event(chunk("Hello", usage=so_far(0)))) == AtLeast(Tokens(11, 5))
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


# ------------------------------------------------------------------------------------------------ timings (llama.cpp)


TIMINGS = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 1e-05, "predicted_n": 5, "predicted_ms": 12.0}


def watch_llamacpp(stream: bytes, of: Request = UNASKED) -> tuple[Meter, bytes]:
    """Feed a whole stream of llama.cpp; return the meter and the bytes for the client."""
    meter, splitter = new(of, kind="llamacpp"), Splitter()
    shown = b"".join(meter.see_event(each) for each in splitter.feed(stream))
    return meter, shown + meter.end()


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
    assert usage_of(TEXT + last + event(usage_chunk()) + DONE) == Exactly(Tokens(11, 5, cached=4))
    assert usage_of(TEXT + event(chunk(finish="stop", timings={"predicted_n": 5})) + DONE) == COUNTED


def test_nothing_is_removed_if_the_upstream_rejected_the_option() -> None:
    """Everything that it sends was then sent unasked."""
    for kind, text in (("vllm", RUNNING), ("llamacpp", TIMED)):
        meter = new(kind=kind)
        meter.stop_stripping()
        stream = text + event(chunk(finish="stop", usage=None)) + event(usage_chunk(timings=TIMINGS)) + DONE
        assert b"".join(meter.see_event(each) for each in Splitter().feed(stream)) == stream
        assert meter.usage() == (Exactly(Tokens(11, 5, cached=4)) if kind == "llamacpp" else REPORTED)


def timings(output: int, **more: object) -> dict:
    """The timings that llama.cpp writes on every chunk if `timings_per_token` is set."""
    return {**TIMINGS, "predicted_n": output, **more}


TIMED = event(chunk("Hello", timings=timings(3))) + event(chunk(" world!", timings=timings(5)))


def test_the_usage_of_a_cut_stream_of_llama_cpp_is_exact() -> None:
    """The input, with its cached part, is known from the first text on."""
    cut = TIMED[: TIMED.index(b"\n\n") + 2]
    meter, shown = watch_llamacpp(cut)
    assert shown == event(chunk("Hello"))
    assert (meter.usage(), meter.output_seen, meter.input_stated) == (Exactly(Tokens(11, 3, cached=4)), 3, 11)
    assert watch_llamacpp(cut + event(chunk("12345")))[0].usage() == AtLeast(Tokens(11, 8, cached=4))


@pytest.mark.parametrize("more", [{}, {"timings_per_token": False}, {"stream_options": {"include_usage": False}}])
def test_running_timings_are_removed_without_a_trace(more: dict) -> None:
    """The finish chunk has timings, as without the option, whether or not a usage chunk follows."""
    last = event(chunk(finish="stop", timings=timings(5)))
    meter, shown = watch_llamacpp(TIMED + FINISH + event(usage_chunk(timings=timings(5))) + DONE, request(**more))
    assert (meter.usage(), shown) == (Exactly(Tokens(11, 5, cached=4)), TEXT + last + DONE)
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
        assert meter.usage() == Exactly(Tokens(11, 5, cached=4))


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
    meter = meter_of(of, count=count, kind="llamacpp")
    meter.see_whole(json.dumps({**answer, "usage": HONEST}).encode())
    assert meter.usage() == (REPORTED if expected is None else AtLeast(Tokens(*expected)))
    assert meter.uncounted_texts == texts
    assert meter.input_stated == (None if of.has_several_prompts else 11)


def test_without_usage_all_choices_are_counted() -> None:
    """Also at llama.cpp, whose usage would cover only one."""
    meter = meter_of(request(stream=False, n=2), count=count, kind="llamacpp")
    meter.see_whole(json.dumps({"choices": [message("a"), message("b")]}).encode())
    assert (meter.usage(), meter.uncounted_texts, meter.input_stated) == (UNCOUNTED, ["a", "b"], None)


# ------------------------------------------------------------------------------------- cutting members out of a chunk


SHORT_USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
SHORT_TIMINGS = {"prompt_n": 7, "predicted_n": 5}


def event_of(text):
    """One event of a stream."""
    [event_of] = Splitter().feed(f"data: {text}\n\n".encode())
    return event_of


def stripped(text):
    """The event of this chunk without its usage."""
    return without_usage(event_of(text), json.loads(text)).decode()


@pytest.mark.parametrize(
    ("before", "member", "after"),
    [
        ('{"id":"1"', ',"usage":null', "}"),
        ('{"id": "1"', ', "usage": null', "}"),
        ("{", '"usage":null,', '"id":"1"}'),
        ("{", '"usage": null, ', '"id": "1"}'),
        ('{"id":"1"', f',"usage":{json.dumps(SHORT_USAGE, separators=(",", ":"))}', ',"x":2}'),
        ('{"choices":[{"text":"\\"usage\\":null"}]', ',"usage":null', "}"),
        ('{"note":"usage"', ',"usage":null', "}"),
        ('{"in":{"x":1', "", ',"usage":null},"y":1}'),
    ],
)
def test_only_the_usage_member_is_cut_out(before, member, after):
    """Every other byte stays, even if the word "usage" occurs elsewhere in the chunk."""
    if member:
        assert stripped(before + member + after) == f"data: {before}{after}\n\n"
    else:
        whole = json.loads(before + after)
        assert json.loads(stripped(json.dumps({**whole, "usage": None})).removeprefix("data: ")) == whole


def test_a_member_that_cannot_be_cut_out_leads_to_a_new_serialization():
    """With spaces in unusual places the client gets the same chunk in other bytes."""
    assert stripped('{"id" : "1" , "usage" : null}') == 'data: {"id":"1"}\n\n'


@given(st.dictionaries(st.sampled_from(["id", "usage_of", "x"]), st.text() | st.none() | st.just({"usage": None})))
def test_all_other_members_stay(others):
    """Whatever their names and values are."""
    shown = stripped(json.dumps({**others, "usage": SHORT_USAGE}))
    assert json.loads(shown.removeprefix("data: ")) == others


def test_extra_members_are_those_beyond_the_common_ones():
    """A member that is null does not count."""
    assert extra_members({"id": "1", "usage": SHORT_USAGE, "timings": SHORT_TIMINGS, "x": None}) == {"timings"}


@pytest.mark.parametrize(
    ("choices", "is_finish"),
    [([{"finish_reason": "stop"}], True), ([{"finish_reason": None}], False), ([], False), (None, False)],
)
def test_a_finish_chunk_has_one_choice_with_a_reason(choices, is_finish):
    """With several choices no chunk is the last of all of them."""
    assert is_finish_chunk({"choices": choices}) is is_finish


@pytest.mark.parametrize("gap", ["", " "])
def test_timings_are_moved_to_the_finish_chunk(gap):
    """They become its last member; if their bytes can't be copied, the chunk is serialized anew."""
    last = b'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
    of = f'{{"choices":[],"timings"{gap}:{json.dumps(SHORT_TIMINGS)}}}'
    moved = with_timings(last, json.loads(last[6:]), event_of(of), json.loads(of))
    assert json.loads(moved[6:]) == {"choices": [{"finish_reason": "stop"}], "timings": SHORT_TIMINGS}
    assert moved.endswith(b"\n\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"a":1.50,"timings":{"n":1,"ms":1e-05}}', '{"a":1.50}'),
        ('{"a":"\\u00e9,\\"timings\\":{}","timings":{"n":1},"b":2}', '{"a":"\\u00e9,\\"timings\\":{}","b":2}'),
        ('{"a":1.50, "timings": {"n":1}}', '{"a":1.5}'),
        ('{"a":{"x":1,"timings":{"n":1}},"timings":3}', '{"a":{"x":1,"timings":{"n":1}}}'),
        ('{"timings":3,"a":{"x":1,"timings":{"n":1}}}', '{"a":{"x":1,"timings":{"n":1}}}'),
    ],
)
def test_only_the_timings_are_cut_out(text, shown):
    """If that is not safe, the chunk is serialized anew: 1.50 then becomes 1.5."""
    assert without_timings(event_of(text), json.loads(text)) == b"data: " + shown.encode() + b"\n\n"


# ------------------------------------------------------------------------------------------- streams that are stopped


def piece(index: int = 0, finish: str | None = None, **more: Any) -> JSON:
    """A chunk of a chat stream with a word, or with a finish reason."""
    choice = {"index": index, "delta": {} if finish else {"content": "x"}, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def finished_choices(end: list[JSON]) -> list[int]:
    """The indices of the choices that an end finishes. Each must have its own chunk with the reason `length`."""
    finished = [each["choices"][0] for each in end if each["choices"]]
    assert all(each["finish_reason"] == "length" and each["logprobs"] is None for each in finished)
    assert all(len(each["choices"]) < 2 for each in end)
    return [each["index"] for each in finished]


@pytest.mark.parametrize(
    ("passed", "finished", "missing"),
    [
        ([], False, [0, 1, 2]),
        ([piece(0), piece(1), piece(2)], False, [0, 1, 2]),
        ([piece(0), piece(1, "stop"), piece(2)], False, [0, 2]),
        ([piece(2, "stop"), piece(0, "tool_calls")], False, [1]),
        ([piece(0, "stop"), piece(1, "stop"), piece(2, "stop")], True, []),
        ([piece(0, "stop"), piece(0, "stop"), piece(0, "stop")], False, [1, 2]),
        ([{"choices": [piece(index, "stop")["choices"][0] for index in range(3)]}], True, []),
        ([piece(0, ""), piece(1, ""), piece(2, "")], False, [0, 1, 2]),
        ([piece(3, "stop"), piece(-1, "stop"), piece(2**70, "stop")], False, [0, 1, 2]),
        ([piece(0, "stop"), piece(1, "stop"), piece(-1, "stop")], False, [2]),
        ([{"choices": [{"finish_reason": "stop"}]}], False, [1, 2]),
    ],
    ids=[
        *("nothing passed", "none finished", "one finished", "two finished", "all finished", "the same choice again"),
        *("all in one chunk", "an empty reason is none", "not requested", "negative", "no index means 0"),
    ],
)
def test_every_choice_finishes_once(passed: list[JSON], finished: bool, missing: list[int]) -> None:
    """Choices without a finish reason get one; the others are left alone."""
    ending = ending_of("chat", passed, choices=3)
    assert ending.has_finished == finished
    assert finished_choices(parsed(ending.at_limit(USED, shows_usage=False))) == missing
    assert end_of("chat", passed, choices=3, shows_usage=True)[-1]["usage"] == HONEST


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([None, "stop", "length"]))), st.integers(1, 6))
def test_every_choice_has_exactly_one_finish_reason(history: list[tuple[int, str | None]], choices: int) -> None:
    """In any order of words and finish reasons, the proxy adds a reason only to a choice that has none."""
    ending = ending_of("chat", [piece(index, finish) for index, finish in history], choices=choices)
    theirs = {index for index, finish in history if finish and index < choices}
    ours = finished_choices(parsed(ending.at_limit(USED, shows_usage=False)))
    assert sorted([*theirs, *ours]) == list(range(choices))
    assert ending.has_finished == (not ours)


HEADS: list[tuple[list[JSON], JSON]] = [
    ([piece()], {}),
    (
        [piece(system_fingerprint="fp", service_tier="flex", obfuscation="xy", timings={})],
        {"system_fingerprint": "fp"},
    ),
    ([piece(service_tier="flex"), piece()], {"service_tier": "flex"}),
    ([piece(system_fingerprint="a"), piece(system_fingerprint="b")], {"system_fingerprint": "b"}),
    # Azure's first chunk, and one of its annotations in the middle.
    ([{"id": "", "model": "", "created": 0, "choices": [], "prompt_filter_results": []}, piece()], {}),
    ([piece(), {"id": "", "model": "", "created": 0, "choices": []}], {}),
]


@pytest.mark.parametrize(("passed", "more"), HEADS)
def test_the_end_repeats_the_members_that_all_chunks_share(passed: list[JSON], more: JSON) -> None:
    """Id, time, model and the like are repeated; members of a single chunk are not."""
    for each in end_of("chat", passed, shows_usage=True):
        head = {name: value for name, value in each.items() if name not in ("choices", "usage")}
        expected = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", **more}
        assert {name: head.get(name) for name in expected} == expected
        assert head.keys() <= {*expected, "service_tier"}


@pytest.mark.parametrize(
    ("endpoint", "prefix", "object"),
    [("chat", "chatcmpl-", "chat.completion.chunk"), ("completions", "cmpl-", "text_completion")],
)
def test_an_answer_of_which_nothing_passed(endpoint: EndpointName, prefix: str, object: str) -> None:
    """The end is a complete stream, with an id that is clearly not one of the upstream's."""
    cut, usage = end_of(endpoint, [], shows_usage=True)
    for each in (cut, usage):
        assert (each["id"], each["object"], each["created"], each["model"]) == (f"{prefix}unknown", object, 0, "")
    assert "usage" not in cut


def test_the_first_chunk_of_a_choice_states_the_role() -> None:
    """If a chunk of the choice has passed, the delta is empty."""
    begun, new = end_of("chat", [piece(0)], choices=2)
    assert begun["choices"][0]["delta"] == {}
    assert new["choices"][0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("passed", "shows_usage", "expected"),
    [
        ([piece(usage=None)], True, [None, HONEST]),
        ([piece()], True, ["none", HONEST]),
        ([piece(usage={"prompt_tokens": 0})], True, ["none", HONEST]),
        ([piece(usage=None)], False, ["none"]),
        ([piece()], False, ["none"]),
    ],
    ids=["null before", "left out before", "counts before", "null, but removed for the client", "not requested"],
)
def test_usage_is_written_only_if_requested(passed: list[JSON], shows_usage: bool, expected: list[object]) -> None:
    """It is one chunk without choices. The other chunks of the end have null only if those before them had it."""
    assert [each.get("usage", "none") for each in end_of("chat", passed, shows_usage=shows_usage)] == expected


CHOICE = st.fixed_dictionaries({}, optional={"index": ANYTHING, "finish_reason": ANYTHING}) | ANYTHING
ANY_CHUNK = st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3) | st.fixed_dictionaries(
    {"type": ANYTHING},
    optional={
        "delta": ANYTHING,
        "text": ANYTHING,
        "choices": st.lists(CHOICE, max_size=3) | ANYTHING,
        "usage": ANYTHING,
        "id": ANYTHING,
    },
)


@given(st.lists(ANY_CHUNK, max_size=8), st.sampled_from(["chat", "completions"]), st.integers(1, 3))
def test_any_chunk_leaves_a_readable_end(passed: list[JSON], endpoint: EndpointName, choices: int) -> None:
    """Whatever JSON an upstream sends, nothing is raised and the end states the usage."""
    end = end_of(endpoint, passed, choices=choices, shows_usage=True)
    assert end[-1]["usage"] == HONEST


# ------------------------------------------------------------------------------------------- read by the official SDK


async def cut_completion(stream: AsyncChatCompletionStream[Any]) -> ChatCompletion:
    """The completion that the SDK assembled. The SDK raises it inside an error if the answer was cut by length."""
    with pytest.raises(LengthFinishReasonError) as cut:
        await stream.get_final_completion()
    return cut.value.completion


@pytest.mark.parametrize("usage", [{}, WITH_USAGE], ids=["no usage", "usage"])
@pytest.mark.parametrize("crlf", [False, True], ids=["lf", "crlf"])
@pytest.mark.parametrize("words", [0, 1, 7])
async def test_the_sdk_reads_a_chat_that_was_stopped(words: int, crlf: bool, usage: JSON) -> None:
    """With both of the SDK's APIs: all words, cut by length, and usage if and only if it was requested."""
    newline = b"\r\n" if crlf else b"\n"
    passed = beginning(simulated(Simulated.CHAT, crlf=crlf, **usage), words)
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in parsed(passed))
    async with sdk_reading(stopped(Simulated.CHAT, passed, shows_usage=bool(usage), newline=newline)) as sdk:
        read = [each async for each in await sdk.chat.completions.create(model="m", messages=GREETING, stream=True)]
        async with sdk.chat.completions.stream(model="m", messages=GREETING) as stream:
            events = [event async for event in stream]
            final = await cut_completion(stream)
    choices = [choice for each in read for choice in each.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    assert {(each.id, each.created, each.model) for each in read} == {("x1", 7, "m")}
    shown = [each.usage.to_dict() for each in read if each.usage]
    assert shown == [HONEST] * bool(usage)
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (text, "length")
    assert final.choices[0].message.role == "assistant"
    assert bool(final.usage) == bool(usage)
    assert [event.type for event in events if event.type.endswith(".done")] == ["content.done"] * bool(words)


async def test_the_sdk_reads_three_choices_of_which_one_had_finished() -> None:
    """The finished choice keeps its reason, the others are cut by length, and each has its own words."""
    stream = simulated(Simulated.CHAT, n=3)
    passed = beginning(stream, 200, closing=1)  # all words of all of them
    texts = ["", "", ""]
    for each in parsed(passed):
        for choice in each["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    async with (
        sdk_reading(stopped(Simulated.CHAT, passed, choices=3)) as sdk,
        sdk.chat.completions.stream(model="m", messages=GREETING, n=3) as reading,
    ):
        final = await cut_completion(reading)
    assert [choice.finish_reason for choice in final.choices] == ["stop", "length", "length"]
    assert [choice.message.content for choice in final.choices] == texts


async def test_the_sdk_reads_choices_that_had_not_begun() -> None:
    """Each is an empty message of the assistant, with a role and content."""
    passed = beginning(simulated(Simulated.CHAT), 3)
    async with (
        sdk_reading(stopped(Simulated.CHAT, passed, choices=2)) as sdk,
        sdk.chat.completions.stream(model="m", messages=GREETING, n=2) as reading,
    ):
        final = await cut_completion(reading)
    assert [choice.finish_reason for choice in final.choices] == ["length", "length"]
    assert (final.choices[1].message.role, final.choices[1].message.content) == ("assistant", "")


async def test_the_sdk_reads_a_chat_that_was_stopped_in_a_tool_call() -> None:
    """The finish reason says that the arguments are incomplete; the SDK has those that passed."""
    opening = simulated(Simulated.CHAT).opening
    request = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "look", "arguments": ""}}
    calls = [{"tool_calls": [request]}, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": [1'}}]}]
    deltas = [piece(choices=[{"index": 0, "delta": delta, "finish_reason": None}], id="x1") for delta in calls]
    passed = opening[0] + b"".join(b"data: " + json.dumps(delta).encode() + b"\n\n" for delta in deltas)
    async with (
        sdk_reading(stopped(Simulated.CHAT, passed)) as sdk,
        sdk.chat.completions.stream(model="m", messages=GREETING) as stream,
    ):
        final = await cut_completion(stream)
    (choice,) = final.choices
    assert choice.finish_reason == "length"
    (made,) = [request.to_dict() for request in choice.message.tool_calls or ()]
    assert made["function"] == {"name": "look", "arguments": '{"a": [1', "parsed_arguments": None}


@pytest.mark.parametrize("usage", [{}, WITH_USAGE], ids=["no usage", "usage"])
async def test_the_sdk_reads_completions_that_were_stopped(usage: JSON) -> None:
    """All words of both choices, cut by length, and usage if and only if it was requested."""
    passed = beginning(simulated(Simulated.COMPLETIONS, n=2, **usage), 6)
    expected = ["", ""]
    for each in parsed(passed):
        expected[each["choices"][0]["index"]] += each["choices"][0]["text"]
    async with sdk_reading(stopped(Simulated.COMPLETIONS, passed, choices=2, shows_usage=bool(usage))) as sdk:
        read = [each async for each in await sdk.completions.create(model="m", prompt="x", n=2, stream=True)]
    texts, reasons = ["", ""], []
    for each in read:
        for choice in each.choices:
            texts[choice.index] += choice.text
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (texts, reasons) == (expected, ["length", "length"])
    assert [each.usage.to_dict() for each in read if each.usage] == [HONEST] * bool(usage)


# -------------------------------------------------------------------------------------------------- errors in streams


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS, IMAGES], ids=lambda endpoint: endpoint.name)
def test_an_error_in_a_stream_of_chunks_is_a_chunk(endpoint: Endpoint) -> None:
    """`data: {"error": …}` makes every SDK raise (wire §2.1). A stream that ends early would look like success."""
    error = UpstreamError("It broke\nhalf way.")
    event = error_event(endpoint, error)
    assert event == b"data: " + json.dumps(error.body(), separators=(",", ":")).encode() + b"\n\n"


def test_an_input_of_0_is_counted_by_the_caller() -> None:
    """No prompt is empty, but some servers state 0 if they read it from their cache. The output counts as stated."""
    zero = {"prompt_tokens": 0, "completion_tokens": 5, "total_tokens": 5}
    meter = whole({"choices": [{"message": {"content": "Hello world!"}}], "usage": zero})
    assert (meter.usage(), meter.input_stated, meter.uncounted_texts) == (AtLeast(Tokens(0, 5)), None, [])
    assert usage_of(TEXT + event(usage_chunk(zero)) + DONE) == AtLeast(Tokens(0, 5))
    assert usage_of(event(chunk("a", usage={**zero, "completion_tokens": 1}))) == AtLeast(Tokens(0, 1))
    timings = {"prompt_n": 0, "cache_n": 0, "predicted_n": 1}
    assert watch(event(chunk("a", timings=timings)), kind="llamacpp")[0].input_stated is None
    embedding = whole({"data": [], "usage": {"prompt_tokens": 0, "total_tokens": 0}}, EMBEDDINGS)
    assert (embedding.usage(), embedding.input_stated) == (AtLeast(Tokens(0, 0)), None)
    assert whole({"choices": [message("Hi")], "usage": {"total_tokens": 16}}).input_stated == 0


@pytest.mark.parametrize("endpoint", [CHAT, EMBEDDINGS], ids=["chat", "embeddings"])
def test_a_total_beyond_what_the_call_could_have_used_is_ignored(endpoint: Endpoint) -> None:
    """If it is all that is stated: more than the bounds of the input and, if the endpoint generates, the output."""
    bound = 2000 + 50 * endpoint.generates
    for total in (bound, bound + 1, 9_999_999):
        meter = meter_of(request(endpoint, stream=False), count=count, output_bound=50, input_bound=2000)
        meter.see_whole(json.dumps({"choices": [message("Hi")], "usage": {"total_tokens": total}}).encode())
        assert meter.usage().tokens.input + meter.usage().tokens.output == (total if total == bound else 0)


def test_additional_tokens_count_beside_an_output_that_is_not_stated() -> None:
    """The output is counted, and they come on top of it, whole and streamed."""
    usage = {"prompt_tokens": 11, "reasoning_tokens": 100}
    meter = meter_of(request(stream=False), count=count, extra_usage=["reasoning_tokens"])
    meter.see_whole(json.dumps({"choices": [message("Hello world!")], "usage": usage}).encode())
    assert (meter.usage(), meter.uncounted_texts) == (AtLeast(Tokens(11, 100)), ["Hello world!"])
    assert meter.output_with(12) == 112
    meter = meter_of(UNASKED, count=count, extra_usage=["reasoning_tokens"])
    for each in Splitter().feed(TEXT + event(usage_chunk(usage)) + DONE):
        meter.see_event(each)
    assert (meter.usage(), meter.output_seen) == (AtLeast(Tokens(11, 112)), 112)


@pytest.mark.parametrize("later", [{"prompt_tokens": 11, "completion_tokens": 7}, {"prompt_tokens": 11}, ZEROS, None])
def test_additional_tokens_of_an_earlier_usage_count(later: dict | None) -> None:
    """A usage without them takes nothing away, and they never stand for text: that is counted beside them."""
    meter = meter_of(UNASKED, count=count, extra_usage=["citation_tokens"])
    running = {"prompt_tokens": 11, "completion_tokens": 2, "citation_tokens": 20}
    stream = event(chunk("Hi", usage=running)) + (b"" if later is None else event(usage_chunk(later))) + DONE
    for each in Splitter().feed(stream):
        meter.see_event(each)
    assert meter.usage() == Exactly(Tokens(11, 27 if later and later.get("completion_tokens") else 22))
    meter = meter_of(UNASKED, count=count, extra_usage=["citation_tokens"])
    for each in Splitter().feed(TEXT + event(usage_chunk({**ZEROS, "prompt_tokens": 11, "citation_tokens": 20}))):
        meter.see_event(each)
    assert meter.usage() == AtLeast(Tokens(11, 32))


@given(
    choice=st.fixed_dictionaries(
        {"delta": st.dictionaries(st.sampled_from(["content", "role", "refusal"]), st.text(max_size=3) | st.none())},
        optional={
            "index": st.just(0),
            "finish_reason": st.none() | st.just("stop"),
            "logprobs": st.just({"content": [{"token": "x"}]}),
            "text": st.text(max_size=3),
            "usage": st.just({"completion_tokens": 3}),
        },
    ),
    more=st.lists(st.just({"delta": {"content": "y"}}), max_size=1),
)
def test_the_text_of_a_plain_chunk_is_its_only_text(choice: dict[str, Any], more: list[Any]) -> None:
    """What the short way finds, the walk through all members finds as well; a chunk with anything else is walked."""
    text = plain_text([choice, *more])
    delta, names = choice["delta"], {"delta", "index", "finish_reason", "logprobs"}
    is_plain = not more and choice.keys() <= names and delta.keys() == {"content"} and delta["content"] is not None
    assert (text is not None) == is_plain
    if is_plain:
        assert [*texts_in([choice])] == ([text] if text else [])
