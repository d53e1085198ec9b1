"""The tokens of one call are counted when it matters, by its model's tokenizer, and at most once."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from proxy.calls.token_count import TokenCount
from proxy.calls.tokenizer import Tokenizers
from proxy.formats.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from proxy.formats.request import forwarded_body
from proxy.ledger.book import Settle
from proxy.policy.amounts import AtLeast, Tokens
from proxy.policy.policy import Model, Upstream
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
PICTURE: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000}}


class Watched(Tokenizers):
    """Tokenizers that remember how many characters they were given at a time; without tables unless `known`."""

    def __init__(self, known: Tokenizers | None = None) -> None:
        super().__init__(())
        self.given: list[int] = []
        self._known = known

    async def count_all(self, texts: Sequence[str], encoding: str, *, within_s: float = 10) -> int | None:
        self.given.append(sum(map(len, texts)))
        return await self._known.count_all(texts, encoding, within_s=within_s) if self._known else None


def tokenizers() -> Tokenizers:
    """Those that all tests share, with the two tables that are needed here."""
    loaded().load(["o200k_base", "cl100k_base"])
    return loaded()


def counted(by: Tokenizers, model: Model = GPT_4O, endpoint: Endpoint = CHAT, **fields: object) -> TokenCount:
    """The count of a call with these fields, whose body has been sent and forgotten."""
    request = parse(endpoint, **fields)
    count = TokenCount(by, request, model, body_bytes=len(forwarded_body(request, model)))
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
    ],
)
async def test_an_input_is_counted_as_the_model_reads_it(endpoint: Endpoint, fields: dict, tokens: int) -> None:
    """Its texts, and what is around messages: the bound in bytes is four times as much for prose."""
    count = counted(tokenizers(), GPT_4O, endpoint, **fields)
    assert await count.of_input() == tokens
    assert await count.exact_demand() == replace(count.demand, input=tokens, is_estimated=False)
    assert count.demand.is_estimated


async def test_another_tokenizer_than_the_model_s_may_be_wrong_by_half() -> None:
    """So half as much again is held, if there is room; charged is what was counted."""
    count = counted(tokenizers(), UNKNOWN, messages=[{"role": "user", "content": PROSE}])
    demand = await count.exact_demand()
    assert (demand.input, demand.hidden_input) == (1008, 1002 // 2)
    assert await count.most_of_input() == 1008 + 1002 // 2
    assert await count.of_input() == 1008


async def test_the_most_of_an_input_is_what_is_shown_and_what_is_not() -> None:
    """Of one that refers to something else all of the model's context; of others what was counted."""
    model = replace(GPT_4O, context=128_000)
    assert await counted(tokenizers(), model, messages=HELLO).most_of_input() == 10
    refers = counted(tokenizers(), model, messages=HELLO, chat_template="{{ anything }}")
    assert await refers.most_of_input() == 128_000
    assert (await refers.exact_demand()).input < 100
    unknown = counted(Watched(), messages=HELLO)
    assert await unknown.most_of_input() == unknown.demand.input


async def test_what_a_call_goes_on_from_is_part_of_its_input() -> None:
    """As its upstream said of it in all, and no more than the model reads; else nobody knows how much it is."""
    made = book_after(reserve("1", binding(), demand()), Settle("1", exactly(300, 200), "complete")).entries["1"]
    guessed = replace(made, usage=AtLeast(Tokens(300, 200)))
    for model, previous, tokens, hidden_input in (
        (GPT_4O, made, 500, 0),
        (replace(GPT_4O, context=400), made, 400, 0),
        (replace(GPT_4O, context=4000), guessed, 0, 4000 - 10),
        (GPT_4O, guessed, 0, 0),
    ):
        request = parse(RESPONSES, input=HELLO, previous_response_id="resp_1")
        count = TokenCount(tokenizers(), request, model, body_bytes=100, previous=previous)
        assert count.demand.input == 100 + tokens
        exact = await count.exact_demand()
        assert (exact.input, exact.hidden_input) == (10 + tokens, hidden_input)
        assert await count.of_input() == 10 + tokens


async def test_the_file_says_by_which_tokenizer() -> None:
    """Then nothing is guessed: the same text has other numbers by another encoding."""
    text = "надо посчитать " * 50
    by = {
        encoding: await counted(
            tokenizers(), replace(UNKNOWN, encoding=encoding), COMPLETIONS, prompt=text
        ).exact_demand()
        for encoding in ("o200k_base", "cl100k_base")
    }
    assert 0 < by["o200k_base"].input < by["cl100k_base"].input
    count = counted(tokenizers(), replace(UNKNOWN, encoding="cl100k_base"), COMPLETIONS, prompt=text)
    assert await count.of_input() == by["cl100k_base"].input
    assert await count.of_output([text]) == by["cl100k_base"].input
    assert count.piece(text) == by["cl100k_base"].input


async def test_without_a_table_the_bytes_bound_an_input() -> None:
    """For good, so that nobody asks once more; and four of them make a token where it is to be charged."""
    count = counted(Watched(), messages=HELLO)
    assert await count.exact_demand() == replace(count.demand, is_estimated=False)
    assert await count.of_input() == -(-count.demand.input // 4)


async def test_without_a_table_a_picture_has_its_price() -> None:
    """Its base64 is not read as text."""
    content = [{"type": "text", "text": "What is this?"}, PICTURE]
    count = counted(Watched(), messages=[{"role": "user", "content": content}])
    price = 85 + 8 * 170
    assert await count.of_input() == -(-(count.demand.input - price) // 4) + price
    assert await counted(tokenizers(), messages=[{"role": "user", "content": [PICTURE]}]).of_input() == price + 1 + 6


async def test_an_input_is_counted_at_most_once() -> None:
    """Whoever asks, and also where it failed."""
    for watched in (Watched(tokenizers()), Watched()):
        count = counted(watched, messages=HELLO)
        assert watched.given == []
        for _ in range(2):
            await count.exact_demand()
            await count.of_input()
        assert watched.given == [len("user" + "Hello world!")]


async def test_a_large_input_is_counted_before_it_is_sent() -> None:
    """Its texts aren't kept for as long as a stream may take; smaller ones are, and mostly never counted."""
    watched = Watched(tokenizers())
    small = counted(watched, GPT_4O, COMPLETIONS, prompt="a " * 2**19)
    await small.before_it_is_sent()
    assert watched.given == []
    large = counted(watched, GPT_4O, COMPLETIONS, prompt=["a " * 2**19, "b"])
    await large.before_it_is_sent()
    assert watched.given == [2**20 + 1]
    tokens = await large.of_input()
    await large.before_it_is_sent()
    assert watched.given == [2**20 + 1]
    assert 2**19 <= tokens < 2**19 + 200  # of each slice the end may be a token of its own


async def test_the_texts_of_an_answer_are_counted() -> None:
    """All of them together; none are none, and nobody is asked."""
    watched = Watched(tokenizers())
    count = counted(watched, messages=HELLO)
    assert await count.of_output([]) == 0
    assert watched.given == []
    assert await count.of_output(["Hello world!", "Hello"]) == 4
    assert count.piece("Hello world!") == 3


async def test_without_a_table_the_bytes_of_an_answer_are_a_quarter_of_a_token_each() -> None:
    """Rounded up, and whatever the text is."""
    count = counted(Watched(), messages=HELLO)
    assert await count.of_output(["abcd", "e"]) == 2
    assert await count.of_output(["é" * 4]) == 2
    assert await count.of_output(["\ud800"]) == 1
    assert await count.of_output([]) == 0
    assert count.piece("abcde") == 2
