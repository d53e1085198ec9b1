"""/rerank and /score: what the model reads of a request, and what is charged for the answers of vendors.

The answers are those of the vendors' documents and servers, with other texts.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.formats.body import RequestBody
from proxy.formats.content import Prompt, read_pairs
from proxy.formats.endpoints import RERANK, SCORE
from proxy.formats.meter import Meter
from proxy.formats.reported_error import reports_error
from proxy.formats.request import parse_request
from proxy.formats.strict_json import dump
from proxy.formats.surfaces import meter_of
from proxy.policy.amounts import TOKENS_MAX, AtLeast, Exactly, Tokens, Usage
from tests.formats.streams import count, event, request, watch

RESULTS = [{"index": 1, "relevance_score": 0.98}, {"index": 0, "relevance_score": 0.02}]
DATA = [{"index": 0, "object": "score", "score": 0.98}]


def measured(body: bytes | object) -> Meter:
    """A meter that has seen this answer. The input is 20 tokens by our bound."""
    meter = meter_of(request(RERANK, stream=False), count=count, input_bound=20)
    meter.see_whole(body if isinstance(body, bytes) else json.dumps(body).encode())
    return meter


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        pytest.param(
            {"model": "jina-reranker-v2", "object": "list", "usage": {"total_tokens": 56}, "results": RESULTS},
            Exactly(Tokens(56, 0)),
            id="Jina: a total, also above our bound",
        ),
        pytest.param(
            {
                "id": "rerank-1",
                "model": "bge",
                "usage": {"prompt_tokens": 56, "total_tokens": 56},
                "results": RESULTS,
            },
            Exactly(Tokens(56, 0)),
            id="vLLM: /rerank",
        ),
        pytest.param(
            {"id": "rerank-1", "model": "bge", "usage": {"total_tokens": 56}, "results": RESULTS},
            Exactly(Tokens(56, 0)),
            id="vLLM until 0.10: /rerank",
        ),
        pytest.param(
            {
                "id": "score-1",
                "object": "list",
                "created": 693447,
                "model": "bge",
                "data": DATA,
                "usage": {"prompt_tokens": 17, "total_tokens": 17, "completion_tokens": 0},
            },
            Exactly(Tokens(17, 0)),
            id="vLLM: /score",
        ),
        pytest.param(
            {"id": "score-1", "object": "list", "data": DATA, "usage": {}}, AtLeast(Tokens(0, 0)), id="vLLM: no usage"
        ),
        pytest.param(
            {"model": "x", "object": "list", "usage": {"prompt_tokens": 62, "total_tokens": 62}, "results": RESULTS},
            Exactly(Tokens(62, 0)),
            id="llama.cpp",
        ),
        pytest.param(
            {"object": "list", "data": RESULTS, "model": "rerank-2.5", "usage": {"total_tokens": 26}},
            Exactly(Tokens(26, 0)),
            id="Voyage",
        ),
        pytest.param(
            {
                "results": RESULTS,
                "id": "07734bd2",
                "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
            },
            AtLeast(Tokens(0, 0)),
            id="Cohere: search units are no tokens",
        ),
        pytest.param(
            {
                "results": RESULTS,
                "meta": {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": 71, "output_tokens": 0}},
            },
            Exactly(Tokens(71, 0)),
            id="Cohere: tokens",
        ),
        pytest.param({"results": RESULTS, "meta": "1"}, AtLeast(Tokens(0, 0)), id="another meta"),
        pytest.param(
            {"results": RESULTS, "usage": {"total_tokens": 0}},
            AtLeast(Tokens(0, 0)),
            id="a total of 0 states nothing",
        ),
        pytest.param(
            {"results": RESULTS, "usage": {"total_tokens": -4}}, AtLeast(Tokens(0, 0)), id="a total below 0"
        ),
        pytest.param([{"index": 1, "score": 0.98}], AtLeast(Tokens(0, 0)), id="TEI: a list without a usage"),
        pytest.param([], AtLeast(Tokens(0, 0)), id="an empty list"),
    ],
)
def test_the_stated_input_is_charged(answer: object, usage: Usage) -> None:
    """What is AtLeast gets the proxy's count of the input. There is no output, and no answer is an error."""
    meter = measured(answer)
    assert (meter.usage(), meter.has_error, meter.uncounted_texts) == (usage, False, [])
    assert not reports_error(json.dumps(answer).encode(), meter.chunk)


@pytest.mark.parametrize("body", [b"", b"no JSON", b'[{"index": 1', b'{"results": [', b'"text"', b"1"])
def test_anything_else_than_an_object_or_a_list_is_an_error(body: bytes) -> None:
    """Only the input is charged for it."""
    meter = measured(body)
    assert (meter.has_error, meter.usage(), meter.chunk) == (True, AtLeast(Tokens(0, 0)), None)


def test_an_error_in_the_answer_is_one() -> None:
    """As an object, or in a list."""
    assert measured({"error": {"message": "no"}}).has_error
    failed = [{"error": "no", "error_type": "Backend"}]
    assert reports_error(json.dumps(failed).encode(), measured(failed).chunk)


def test_a_stream_passes_and_its_usage_is_read() -> None:
    """No server is known to send one. It is never ended at a limit, because it has no output."""
    stream = event({"results": RESULTS, "usage": {"total_tokens": 9}})
    meter, shown = watch(stream, request(RERANK))
    assert (shown, meter.usage()) == (stream, Exactly(Tokens(9, 0)))
    assert meter.ending.at_limit(Tokens(9, 0), shows_usage=True) == b""


# ------------------------------------------------------------------------------------------------------- the request


def read(**fields: object) -> Prompt:
    """What the model reads of a request with these fields."""
    return read_pairs(RequestBody({"model": "m", **fields}))


def texts_read(prompt: Prompt) -> list[str]:
    """Every text as often as the model reads it."""
    return sorted([*prompt.texts, *prompt.repeats * prompt.repeated])


@pytest.mark.parametrize(
    ("fields", "texts", "pairs"),
    [
        pytest.param({"query": "q", "documents": ["a", "b", "c"]}, "a b c q q q", 3, id="Cohere, Jina, vLLM"),
        pytest.param({"query": "q", "documents": ["a"]}, "a q", 1, id="one document"),
        pytest.param({"query": "q", "texts": ["a", "b"], "raw_scores": True}, "a b q q", 2, id="TEI"),
        pytest.param({"query": "q", "documents": [{"text": "a"}, {"text": "b"}]}, "a b q q", 2, id="objects"),
        pytest.param(
            {"query": "q", "documents": [{"title": "t", "text": "a"}, "b"], "rank_fields": ["title", "text"]},
            "a b q q t",
            2,
            id="Cohere: several fields",
        ),
        pytest.param({"text_1": "q", "text_2": ["a", "b"]}, "a b q q", 2, id="vLLM: one with several"),
        pytest.param({"text_1": "q", "text_2": "a"}, "a q", 1, id="vLLM: one with one"),
        pytest.param({"text_1": ["p", "q"], "text_2": ["a", "b"]}, "a b p q", 2, id="vLLM: pairs"),
        pytest.param({"queries": ["q"], "documents": ["a", "b"]}, "a b q q", 2, id="vLLM: queries and documents"),
        pytest.param({"queries": "q", "items": ["a", "b"]}, "a b q q", 2, id="vLLM: queries and items"),
        pytest.param({"data_1": "q", "data_2": ["a", "b"]}, "a b q q", 2, id="vLLM: data"),
        pytest.param({"query": "q", "input": ["a", "b"], "top_k": 1}, "a b q q", 2, id="Mixedbread"),
        pytest.param(
            {"query": "q", "documents": ["a", "b"], "instruct": "i", "top_n": 9, "truncate": "END", "user": "u"},
            "a b i i q q",
            2,
            id="an instruction is read with each, and options are not",
        ),
        pytest.param({"query": None, "documents": []}, "", 1, id="nothing"),
        pytest.param({"query": "q", "documents": "a"}, "a q", 1, id="a text in place of the list"),
        pytest.param({"query": 5, "documents": [5, None, True]}, "", 3, id="what is no text"),
    ],
)
def test_the_query_is_read_with_each_document(fields: dict[str, Any], texts: str, pairs: int) -> None:
    """Each pair has four more tokens, which have no bytes of their own."""
    prompt = read(**fields)
    assert texts_read(prompt) == texts.split()
    assert (prompt.overhead, prompt.media_tokens, prompt.repeats) == (4 * pairs, 4 * pairs, pairs - 1)
    assert not prompt.has_hidden_input


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "q", "documents": [{"image": "https://x.example/y.png"}, "b"]},
        {"query": {"image": "https://x.example/y.png"}, "documents": ["a", "b"]},
        {"query": "q", "documents": {"content": [{"type": "video_url", "video_url": {"url": "https://x"}}]}},
        {"query": "q", "documents": ["a"], "chat_template": "{{ query }}"},
        {
            "query": {"content": [{"type": "image_url", "image_url": {"url": "https://x.example/y.png"}}]},
            "documents": ["a", "b"],
        },
    ],
)
def test_what_a_request_does_not_show_is_hidden_input(fields: dict[str, Any]) -> None:
    """Links have any size, and a picture in the query is read with each document."""
    assert read(**fields).has_hidden_input


def test_parts_of_one_message_are_documents_or_one_query() -> None:
    """vLLM's multimodal form."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert texts_read(read(query="q", documents={"content": parts})) == ["a", "b", "q", "q"]
    query = {"content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}
    assert texts_read(read(query=query, documents=["a", "b", "c"])) == ["a", "b", "c", *"ppp", *"qqq"]


def test_long_names_are_read_as_texts() -> None:
    """A prompt can also be written into keys."""
    name = "n" * 41
    assert texts_read(read(**{"query": "q", "documents": ["a", "b"], name: 1})) == ["a", "b", name, name, "q", "q"]


@given(query=st.text(), documents=st.lists(st.text() | st.fixed_dictionaries({"text": st.text()}), max_size=9))
def test_no_more_tokens_are_read_than_the_bound_says(query: str, documents: list[Any]) -> None:
    """With one token for each byte, and four around each pair."""
    body = dump({"model": "m", "query": query, "documents": documents})
    prompt = read(query=query, documents=documents)
    texts = [each if isinstance(each, str) else each["text"] for each in documents]
    pairs = max(1, len(texts))
    true = sum(map(count, texts)) + pairs * (count(query) + 4)
    assert true <= prompt.bound(len(body)) <= true + len(body)
    assert sum(map(count, texts_read(prompt))) + prompt.overhead == true


def test_a_bound_stays_a_number_that_the_ledger_takes() -> None:
    """A megabyte of query and 90,000 documents."""
    prompt = read(query="q" * 2**20 * 16, documents=["a"] * 90_000)
    assert prompt.bound(2**24) == TOKENS_MAX


@pytest.mark.parametrize("endpoint", [RERANK, SCORE])
def test_a_request_needs_a_model_and_may_have_any_field(endpoint: Any) -> None:
    """Those of vendors pass as they are."""
    fields = {"query": "q", "documents": ["a"], "top_n": 3, "return_documents": True, "max_tokens_per_doc": 4096}
    parsed = parse_request(endpoint, json.dumps({"model": "m", **fields}).encode())
    assert (parsed.model, parsed.choices, dict(parsed.body.document)) == ("m", 1, {"model": "m", **fields})
    with pytest.raises(Exception, match='"model" is missing'):
        parse_request(endpoint, json.dumps(fields).encode())
