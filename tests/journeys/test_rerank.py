"""/rerank and /score through the whole running proxy: what is sent, answered and charged."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bare_upstream import bare_upstream
from tests.stage import stage

pytestmark = [pytest.mark.every_engine, pytest.mark.journey]

POLICY = """
models:
  ranker: {upstream: simulated, model: bge-reranker-v2-m3}
groups:
  staff: {quotas: {daily: {tokens: %d, requests: 100, per: day}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
"""
PATHS = ["/v1/rerank", "/v2/rerank", "/rerank", "/openai/v1/rerank"]
QUERY = "a quiet river"
DOCUMENTS = ["a quiet river flows", {"text": "a lamp"}, "the river"]
# The query with each of three documents: 3 × 3 + 4 + 2 + 2.
TOKENS = 17


def rerank(simulate: str = "", **more: Any) -> dict[str, Any]:
    """A request of TOKENS tokens."""
    return {"model": "ranker", "query": QUERY, "documents": DOCUMENTS, "metadata": {"simulate": simulate}, **more}


@pytest.mark.parametrize("path", PATHS)
async def test_a_rerank_is_a_request_and_its_stated_input(tmp_path: Path, path: str) -> None:
    """It is served at the paths of all vendors, and goes to `base_url` + /rerank. The answer passes as it is."""
    async with stage(POLICY % 1000, folder=tmp_path) as on:
        reply = await on.post(path, rerank(top_n=2))
        assert reply.status == 200
        assert reply.json()["results"] == [
            {"index": 0, "relevance_score": 1.0},
            {"index": 1, "relevance_score": 0.333},
        ]
        assert reply.json()["usage"] == {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
        [received] = on.simulator.requests
        assert (received.path, json.loads(received.body)["model"]) == ("/v1/rerank", "bge-reranker-v2-m3")
        await on.all_settled()
        assert await on.used() == (TOKENS, 0)
        quota = await on.quota("staff/daily")
        assert (quota["requests"]["used"], quota["tokens"]["used"]) == (1, TOKENS)
        assert [row["endpoint"] for row in await on.rows("calls")] == ["rerank"]
        await on.audit()


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_a_score_is_a_request_and_its_stated_input(tmp_path: Path, path: str) -> None:
    """One text with two others."""
    async with stage(POLICY % 1000, folder=tmp_path) as on:
        body = {"model": "ranker", "text_1": "a river", "text_2": ["a river", "a lamp"], "metadata": {}}
        reply = await on.post(path, body)
        assert [each["score"] for each in reply.json()["data"]] == [1.0, 0.5]
        assert on.simulator.requests[-1].path == "/v1/score"
        await on.all_settled()
        assert await on.used() == (8, 0)


async def test_an_input_that_is_not_stated_is_counted(tmp_path: Path) -> None:
    """The query with each document, and four tokens around each pair."""
    async with stage(POLICY % 1000, folder=tmp_path) as on:
        assert (await on.post("/v1/rerank", rerank("no_usage"))).status == 200
        await on.all_settled()
        assert await on.used() == (TOKENS + 3 * 4, 0)


async def test_a_rerank_near_the_limit_is_counted_and_then_refused(tmp_path: Path) -> None:
    """Its bytes would not fit. The first fits when it is counted, and the second does not."""
    async with stage(POLICY % 40, folder=tmp_path) as on:
        assert (await on.post("/v1/rerank", rerank())).status == 200
        await on.all_settled()
        refused = await on.post("/v1/rerank", rerank())
        assert (refused.status, refused.error["type"]) == (429, "insufficient_quota")
        assert on.simulator.received == 1


async def test_a_query_that_is_read_too_often_never_fits(tmp_path: Path) -> None:
    """A short body, of which the model would read 200 times as much."""
    async with stage(POLICY % 1000, folder=tmp_path) as on:
        reply = await on.post("/v1/rerank", rerank(query="word " * 50, documents=["x"] * 200))
        assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


async def test_a_model_is_required(tmp_path: Path) -> None:
    """TEI's clients name none; they have to here."""
    async with stage(POLICY % 1000, folder=tmp_path) as on:
        reply = await on.post("/rerank", {"query": QUERY, "texts": ["x"]})
        assert (reply.status, reply.error["param"]) == (400, "model")


async def test_a_list_of_scores_passes_unchanged_and_is_counted(tmp_path: Path) -> None:
    """TEI answers with a list and without a usage. A text in it may look like an id of an account."""
    body = b'[ {"index": 0, "text": "org-0123456789abcdefghijklmn and sk-other", "score": 0.98} ]'

    async def serve(_: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await writer.drain()

    async with bare_upstream(serve) as upstream, stage(POLICY % 1000, folder=tmp_path, upstream=upstream.url) as on:
        request = {"model": "ranker", "query": QUERY, "texts": ["a river"], "metadata": {}}
        reply = await on.post("/rerank", request)
        assert (reply.status, reply.body) == (200, body)
        await on.all_settled()
        assert await on.used() == (3 + 2 + 4, 0)
        [row] = await on.rows("calls")
        assert (row["outcome"], row["provenance"]) == ("complete", "at_least")
