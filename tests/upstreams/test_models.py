"""The models that upstreams list: what is read of a list, and when it is fetched (T100)."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.catalog import Model, Secret, Upstream
from proxy.upstreams.client import Upstreams
from proxy.upstreams.models import REFRESH_MS, RETRY_MS, Listed, ModelLists, read_list, shows_account
from tests.bare_upstream import connections
from tests.stage import Clock, fast_timers, until


def listing(*entries: Any, **more: Any) -> bytes:
    """A list in OpenAI's shape; a text is an entry with this id."""
    data = [{"id": entry, "object": "model"} if isinstance(entry, str) else entry for entry in entries]
    return json.dumps({"object": "list", "data": data, **more}).encode()


@pytest.mark.parametrize(
    ("entry", "context"),
    [
        ({"id": "m", "object": "model", "owned_by": "vllm", "root": "m", "max_model_len": 8192}, 8192),  # vLLM
        ({"id": "m", "root": "m", "max_model_len": 131072}, 131072),  # SGLang
        (
            {"id": "m", "meta": {"vocab_type": 2, "n_vocab": 151936, "n_ctx_train": 32768, "size": 1}},
            32768,
        ),  # llama.cpp
        ({"id": "m", "meta": {"n_ctx": 4096, "n_ctx_train": 32768}}, 4096),
        ({"id": "m", "meta": None}, None),
        ({"id": "m", "max_context_length": 32768, "loaded_context_length": 4096}, 4096),  # LM Studio
        ({"id": "m", "context_length": 200000, "top_provider": {"context_length": 100000}}, 200000),  # OpenRouter
        ({"id": "m", "top_provider": {"context_length": 100000}}, 100000),
        ({"id": "m", "context_window": 131072, "max_completion_tokens": 8192}, 131072),  # Groq
        ({"id": "m", "max_context_length": 32768, "capabilities": {}}, 32768),  # Mistral
        ({"id": "m", "metadata": {"context_length": 4096, "pricing": {}}}, 4096),  # DeepInfra
        ({"id": "m", "parameters": {"max_seq_len": 4096}}, 4096),  # TabbyAPI
        ({"type": "model", "id": "m", "display_name": "M", "max_input_tokens": 200000}, 200000),  # Anthropic
        ({"id": "m", "object": "model", "created": 1, "owned_by": "openai"}, None),  # OpenAI, Ollama
        ({"id": "m", "max_model_len": None, "context_length": 5}, 5),
        *(({"id": "m", "max_model_len": strange}, None) for strange in (0, -1, True, "8192", 8192.0, 10**12, [8192])),
        ("m", None),
    ],
)
def test_the_context_of_a_model_is_read_where_its_vendor_states_it(entry: Any, context: int | None) -> None:
    """Only whole numbers of a possible size count."""
    assert read_list(json.dumps({"data": [entry]}).encode()) == {"m": context}
    assert read_list(json.dumps([entry]).encode()) == {"m": context}  # Together


def test_entries_that_no_call_could_name_are_left_out() -> None:
    """Names are checked as those in calls are. The first of two equal names counts, and the number is bounded."""
    names = ["a", "../../x", " b", "", "c\n", "x" * 300, None, 7, "openai/gpt-4o", {"id": ["d"]}, {}, [], "e:latest"]
    entries = [name if isinstance(name, dict) else {"id": name} for name in names]
    assert [*read_list(listing(*entries))] == ["a", "openai/gpt-4o", "e:latest"]
    assert read_list(listing({"id": "a", "max_model_len": 1}, {"id": "a", "max_model_len": 2})) == {"a": 1}
    assert len(read_list(listing(*map(str, range(5000))))) == 1000


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"null", b"{}", b'{"data": {}}', b'{"data": "a"}', b"[", b"7", b"\xff"]
)
def test_what_is_no_list_is_an_error(body: bytes) -> None:
    """So that the list that was known stays in use."""
    with pytest.raises(ValueError, match="list"):
        read_list(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["data", "id", "meta", "max_model_len", "n_ctx"]), inner, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_a_list_of_any_shape_is_read_or_refused(value: Any) -> None:
    """Never another exception."""
    try:
        models = read_list(json.dumps(value).encode())
    except ValueError:
        return
    assert all(name.strip() and (context is None or context > 0) for name, context in models.items())


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("ft:gpt-4o-mini-2024-07-18:acme::abc", True),
        ("openai/ft:gpt-4o:acme::abc", True),
        ("FT:gpt-4o:acme", True),
        ("davinci:ft-acme-2023-01-31", True),
        ("arn:aws:bedrock:us-east-1:123456789012:custom-model/x", True),
        ("projects/acme/locations/us/models/x", True),
        ("accounts/acme/models/x", True),
        ("accounts/fireworks/models/llama-v3", False),
        ("gpt-4o", False),
        ("soft:serve", False),
        ("anthropic/claude-sonnet-4", False),
    ],
)
def test_names_of_fine_tuned_models_show_the_account(name: str, shows: bool) -> None:
    """Those of all vendors whose names do."""
    assert shows_account(name) == shows


# ------------------------------------------------------------------------------------------------- when it is fetched


class Lister:
    """An upstream that answers each request with the next of `answers` (the last one again), or hangs for None."""

    def __init__(self, answers: Sequence[bytes | int | None]) -> None:
        self.answers = list(answers)
        self.heads: list[str] = []
        self.base_url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head.decode())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await reader.read()
        else:
            status, body = (answer, b"{}") if isinstance(answer, int) else (200, answer)
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)
            )
        writer.close()


@asynccontextmanager
async def lister(*answers: bytes | int | None) -> AsyncIterator[tuple[Lister, ModelLists, Upstream, Clock]]:
    """An upstream, its lists, and a clock."""
    source, clock, http = Lister(answers), Clock(), Upstreams()
    http.open()
    lists = ModelLists(http, now=clock)
    async with connections(source.serve) as port:
        base_url = f"http://127.0.0.1:{port}/v1"
        try:
            yield source, lists, Upstream("up", base_url, Secret("sk-secret-0123456789"), "vllm"), clock
        finally:
            await lists.close()
            await http.close()


async def replaced(lists: ModelLists, upstream: Upstream, old: Listed) -> None:
    """Yield to the event loop until the list is no longer the old one."""
    while await lists.of(upstream) == old:  # noqa: ASYNC110 - nothing would set an event
        await asyncio.sleep(0)


async def test_a_list_is_fetched_once_and_again_in_the_background_after_five_minutes() -> None:
    """T100: the first callers share one fetch. Later ones get the old list at once while it is fetched again."""
    async with lister(listing("a"), listing("a", "b")) as (source, lists, upstream, clock):
        found = await asyncio.gather(*(lists.of(upstream) for _ in range(10)))
        assert found == [{"a": None}] * 10
        clock.ms += REFRESH_MS - 1
        assert await lists.of(upstream) == {"a": None}
        assert len(source.heads) == 1
        assert source.heads[0].startswith("GET /v1/models HTTP/1.1\r\n")
        assert "Bearer sk-secret-0123456789" in source.heads[0]
        clock.ms += 1
        assert await lists.of(upstream) == {"a": None}
        await until(lambda: len(source.heads) == 2)
        await replaced(lists, upstream, {"a": None})
        assert await lists.of(upstream) == {"a": None, "b": None}
        assert len(source.heads) == 2


@pytest.mark.parametrize("failure", [500, 404, b"<html>", b"x" * (3 * 2**20), 302])
async def test_a_list_is_kept_through_an_outage(failure: bytes | int, capsys: pytest.CaptureFixture[str]) -> None:
    """It is asked for again after half a minute. The log says why, without the key."""
    async with lister(listing("a"), failure, listing("b")) as (source, lists, upstream, clock):
        assert await lists.of(upstream) == {"a": None}
        clock.ms += REFRESH_MS
        for _ in range(5):
            assert await lists.of(upstream) == {"a": None}
        await until(lambda: "could not be listed" in (seen := capsys.readouterr().out) and "sk-" not in seen)
        assert await lists.of(upstream) == {"a": None}
        assert len(source.heads) == 2
        clock.ms += RETRY_MS
        await replaced(lists, upstream, {"a": None})
        assert await lists.of(upstream) == {"b": None}


async def test_an_error_that_nobody_expects_is_not_repeated_at_each_call(capsys: pytest.CaptureFixture[str]) -> None:
    """The client is not open, which is a fault of ours. The next attempt is half a minute later, as always."""
    clock, upstream = Clock(), Upstream("up", "http://127.0.0.1:1/v1", None, "vllm")
    lists = ModelLists(Upstreams(), now=clock)
    for _ in range(5):
        assert await lists.of(upstream) == {}
    assert capsys.readouterr().out.count("task failed") == 1
    clock.ms += RETRY_MS
    assert await lists.of(upstream) == {}
    assert "task failed" in capsys.readouterr().out
    await lists.close()


async def test_a_first_caller_waits_two_seconds_at_most() -> None:
    """And those that come later do not wait at all while the same fetch runs."""
    async with lister(None) as (source, lists, upstream, _):
        with fast_timers(10):
            loop = asyncio.get_running_loop()
            begun = loop.time()
            assert await lists.of(upstream) == {}
            waited = loop.time() - begun
            assert await lists.of(upstream) == {}
            assert 2 <= waited <= loop.time() - begun < 4
        assert len(source.heads) == 1


async def test_an_upstream_with_another_configuration_gets_a_new_list() -> None:
    """It may be another account. A clock that was set back leaves no list in use for longer."""
    async with lister(listing("a"), listing("b"), listing("c")) as (source, lists, upstream, clock):
        assert await lists.of(upstream) == {"a": None}
        other = replace(upstream, api_key=Secret("sk-other-0123456789"))
        assert await lists.of(other) == {"b": None}
        clock.ms -= 10 * REFRESH_MS
        await replaced(lists, other, {"b": None})
        assert len(source.heads) == 3


async def test_an_azure_upstream_is_not_asked() -> None:
    """It lists models that could be deployed, and calls name deployments. Anthropic is asked for one long page."""
    async with lister(listing("a", has_more=False)) as (source, lists, upstream, _):
        assert await lists.of(replace(upstream, kind="azure")) == {}
        assert source.heads == []
        assert await lists.of(replace(upstream, kind="anthropic")) == {"a": None}
        assert source.heads[0].startswith("GET /v1/models?limit=1000 HTTP/1.1\r\n")
        assert "x-api-key: sk-secret-0123456789" in source.heads[0]
        assert "anthropic-version: " in source.heads[0]


async def test_the_context_is_that_of_the_upstream_s_name_of_the_model() -> None:
    """llama.cpp serves its one model under any name."""
    entry = {"id": "qwen.gguf", "meta": {"n_ctx_train": 4096}}
    async with lister(listing(entry), listing(entry), listing(entry, "b")) as (_, lists, upstream, __):
        assert await lists.context(Model("fast", upstream, "qwen.gguf")) == 4096
        assert await lists.context(Model("fast", upstream, "other")) is None
        single = replace(upstream, kind="llamacpp")
        assert await lists.context(Model("fast", single, "other")) == 4096
        several = replace(upstream, kind="llamacpp", api_key=None)
        assert await lists.context(Model("fast", several, "other")) is None
