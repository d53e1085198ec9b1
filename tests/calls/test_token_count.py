"""The tokens of one call are counted only if needed, with its model's tokenizer, and at most once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from proxy.calls.token_count import TokenCount, prompt_of
from proxy.calls.tokenizer import Tokenizers
from proxy.formats.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES, Endpoint
from proxy.formats.request import forwarded_body
from proxy.formats.strict_json import dump
from proxy.ledger.book import Settle
from proxy.policy.amounts import AtLeast, Tokens
from proxy.policy.catalog import Model, Upstream
from tests.builders import binding, exactly, reserve
from tests.builders import call as demand
from tests.formats.test_request import parse
from tests.ledger.test_rows import book_after
from tests.stage import loaded

UPSTREAM = Upstream("up", "http://upstream.example/v1", None, "openai")
GPT_4O = Model("m", UPSTREAM, "gpt-4o")
UNKNOWN = Model("m", UPSTREAM, "what-comes-next")  # its tokenizer is a guess
PROSE = "The quick brown fox jumps over the lazy dog. " * 100  # ten tokens each time
HELLO: Any = [{"role": "user", "content": "Hello world!"}]
IMAGE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000}}


class RecordingTokenizers(Tokenizers):
    """Tokenizers that record how many characters each request has. They have no tables unless `known` is given."""

    def __init__(self, known: Tokenizers | None = None) -> None:
        super().__init__(())
        self.given: list[int] = []
        self._known = known

    async def count_all(self, texts: Sequence[str], encoding: str, *, timeout_s: float = 10) -> int | None:
        self.given.append(sum(map(len, texts)))
        return await self._known.count_all(texts, encoding, timeout_s=timeout_s) if self._known else None


def tokenizers() -> Tokenizers:
    """The tokenizers that all tests share, with the two tables that are needed here."""
    loaded().load(["o200k_base", "cl100k_base"])
    return loaded()


def counted(tokenizer: Tokenizers, model: Model = GPT_4O, endpoint: Endpoint = CHAT, **fields: object) -> TokenCount:
    """The count of a call with these fields, whose body has been sent and freed."""
    request = parse(endpoint, **fields)
    count = TokenCount(
        tokenizer,
        request,
        model,
        prompt=prompt_of(request),
        body_bytes=len(forwarded_body(request, model)),
    )
    request.body.free()
    return count


@pytest.mark.parametrize(
    ("endpoint", "fields", "tokens"),
    [
        (CHAT, {"messages": HELLO}, 4 + 6),
        (CHAT, {"messages": [{"role": "user", "content": PROSE}]}, 1 + 1001 + 6),
        (RESPONSES, {"input": HELLO}, 4 + 6),
        (COMPLETIONS, {"prompt": PROSE}, 1001),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 3),
        (EMBEDDINGS, {"input": ["Hello world!", "Hello world!"]}, 6),
        (RERANK, {"query": "Hello world!", "documents": ["Hello world!", "Hello world!"]}, 2 * (3 + 3 + 4)),
    ],
)
async def test_an_input_is_counted_as_the_model_reads_it(endpoint: Endpoint, fields: dict, tokens: int) -> None:
    """Its texts and the frame around messages. For prose the bound in bytes is four times as much."""
    count = counted(tokenizers(), GPT_4O, endpoint, **fields)
    assert await count.input_tokens() == tokens
    assert await count.exact_demand() == replace(count.demand, input=tokens, is_estimated=False)
    assert count.demand.is_estimated


async def test_with_a_guessed_tokenizer_half_as_much_again_is_held() -> None:
    """If there is room. What was counted is charged."""
    count = counted(tokenizers(), UNKNOWN, messages=[{"role": "user", "content": PROSE}])
    demand = await count.exact_demand()
    assert (demand.input, demand.hidden_input) == (1008, 1002 // 2)
    assert await count.input_upper_bound() == 1008 + 1002 // 2
    assert await count.input_tokens() == 1008


async def test_the_upper_bound_of_an_input_includes_hidden_input() -> None:
    """For a request that refers to other content it is the model's context, for others the counted tokens."""
    model = replace(GPT_4O, context=128_000)
    assert await counted(tokenizers(), model, messages=HELLO).input_upper_bound() == 10
    open_ended = counted(tokenizers(), model, messages=HELLO, chat_template="{{ anything }}")
    assert await open_ended.input_upper_bound() == 128_000
    assert (await open_ended.exact_demand()).input < 100
    unknown = counted(RecordingTokenizers(), messages=HELLO)
    assert await unknown.input_upper_bound() == unknown.demand.input


async def test_the_previous_response_is_part_of_the_input() -> None:
    """Its reported usage, but at most the model's context. If the usage is an estimate, it is hidden input."""
    book = book_after(reserve("1", binding(), demand()), Settle("1", exactly(300, 200), "complete"))
    exact = book.entries["1"]
    estimated = replace(exact, usage=AtLeast(Tokens(300, 200)))
    for model, previous, tokens, hidden_input in (
        (GPT_4O, exact, 500, 0),
        (replace(GPT_4O, context=400), exact, 400, 0),
        (replace(GPT_4O, context=4000), estimated, 0, 4000 - 10),
        (GPT_4O, estimated, 0, 0),
    ):
        request = parse(RESPONSES, input=HELLO, previous_response_id="resp_1")
        count = TokenCount(tokenizers(), request, model, prompt=prompt_of(request), body_bytes=100, previous=previous)
        assert count.demand.input == 100 + tokens
        counted_demand = await count.exact_demand()
        assert (counted_demand.input, counted_demand.hidden_input) == (10 + tokens, hidden_input)
        assert await count.input_tokens() == 10 + tokens


async def test_the_configured_encoding_is_used() -> None:
    """Another encoding gives another number for the same text."""
    text = "надо посчитать " * 50
    demands = {
        encoding: await counted(
            tokenizers(), replace(UNKNOWN, encoding=encoding), COMPLETIONS, prompt=text
        ).exact_demand()
        for encoding in ("o200k_base", "cl100k_base")
    }
    assert 0 < demands["o200k_base"].input < demands["cl100k_base"].input
    count = counted(tokenizers(), replace(UNKNOWN, encoding="cl100k_base"), COMPLETIONS, prompt=text)
    assert await count.input_tokens() == demands["cl100k_base"].input
    assert await count.output_tokens([text]) == demands["cl100k_base"].input
    assert count.count_output(text) == demands["cl100k_base"].input


async def test_without_a_table_a_query_is_estimated_with_each_document() -> None:
    """Its bytes count once for each of them, and the four tokens around each pair are added."""
    count = counted(RecordingTokenizers(), GPT_4O, RERANK, query=PROSE, documents=["x"] * 3)
    assert count.demand.input == len(dump({"model": "gpt-4o", "query": PROSE, "documents": ["x"] * 3})) + (
        2 * len(PROSE) + 3 * 4
    )
    assert await count.exact_demand() == replace(count.demand, is_estimated=False)
    assert await count.input_tokens() == -(-(count.demand.input - 12) // 4) + 12


async def test_without_a_table_the_input_is_bounded_by_its_bytes() -> None:
    """The bound is final, so the ledger does not ask for a count again. Charged is one token for four bytes."""
    count = counted(RecordingTokenizers(), messages=HELLO)
    assert await count.exact_demand() == replace(count.demand, is_estimated=False)
    assert await count.input_tokens() == -(-count.demand.input // 4)


async def test_without_a_table_an_image_has_its_set_price() -> None:
    """Its base64 does not count as text."""
    content = [{"type": "text", "text": "What is this?"}, IMAGE]
    count = counted(RecordingTokenizers(), messages=[{"role": "user", "content": content}])
    price = 85 + 8 * 170
    assert await count.input_tokens() == -(-(count.demand.input - price) // 4) + price
    image_only = counted(tokenizers(), messages=[{"role": "user", "content": [IMAGE]}])
    assert await image_only.input_tokens() == price + 1 + 6


async def test_an_input_is_counted_at_most_once() -> None:
    """Whichever method asks, and also if counting failed."""
    for recording in (RecordingTokenizers(tokenizers()), RecordingTokenizers()):
        count = counted(recording, messages=HELLO)
        assert recording.given == []
        for _ in range(2):
            await count.exact_demand()
            await count.input_tokens()
        assert recording.given == [len("user" + "Hello world!")]


async def test_a_large_input_is_counted_before_it_is_sent() -> None:
    """Its texts are not kept while the answer streams. Small inputs are kept, and usually never counted."""
    recording = RecordingTokenizers(tokenizers())
    small = counted(recording, GPT_4O, COMPLETIONS, prompt="a " * 2**19)
    await small.count_large_input()
    assert recording.given == []
    large = counted(recording, GPT_4O, COMPLETIONS, prompt=["a " * 2**19, "b"])
    await large.count_large_input()
    assert recording.given == [2**20 + 1]
    tokens = await large.input_tokens()
    await large.count_large_input()
    assert recording.given == [2**20 + 1]
    assert 2**19 <= tokens < 2**19 + 200  # the end of each slice may be a token of its own


async def test_the_texts_of_an_answer_are_counted() -> None:
    """In one request. Without texts the tokenizer is not asked."""
    recording = RecordingTokenizers(tokenizers())
    count = counted(recording, messages=HELLO)
    assert await count.output_tokens([]) == 0
    assert recording.given == []
    assert await count.output_tokens(["Hello world!", "Hello"]) == 4
    assert count.count_output("Hello world!") == 3


async def test_without_a_table_four_bytes_of_an_answer_are_one_token() -> None:
    """Rounded up, for any text."""
    count = counted(RecordingTokenizers(), messages=HELLO)
    assert await count.output_tokens(["abcd", "e"]) == 2
    assert await count.output_tokens(["é" * 4]) == 2
    assert await count.output_tokens(["\ud800"]) == 1
    assert await count.output_tokens([]) == 0
    assert count.count_output("abcde") == 2
