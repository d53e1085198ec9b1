"""Calls by names that the file does not list, through a running proxy (T24, T33)."""

from pathlib import Path

from tests.stage import stage

CHAT = "/v1/chat/completions"
OPEN = """
models:
  gpt-4o: {upstream: simulated, max_output_tokens: 100}
  "*": {upstream: simulated}
groups:
  staff: {quotas: {frontier: {models: [gpt-4o], requests: 1, per: day}, daily: {requests: 104, per: day}}}
users:
  alice: {groups: [staff], keys: ["key-of-alice-0123456789abcdef"]}
"""


def _ask(model: str, **more: object) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, **more}


async def test_the_103rd_name_is_recorded_as_other_and_counted_like_all(tmp_path: Path) -> None:
    """The records of a day have a bounded number of names, whatever clients make up. Quotas still count each call."""
    async with stage(OPEN, folder=tmp_path) as on:
        for number in range(103):
            assert (await on.post(CHAT, _ask(f"made-up-{number}"))).status == 200
        assert (await on.post(CHAT, _ask("gpt-4o"))).status == 200
        models = [row["model"] for row in await on.rows("calls")]
        assert sorted(set(models)) == sorted(["gpt-4o", "other", *(f"made-up-{number}" for number in range(100))])
        assert models.count("other") == 3
        assert (await on.post(CHAT, _ask("made-up-102"))).status == 429


async def test_a_quota_binds_a_name_in_any_case_where_the_upstream_ignores_case(tmp_path: Path) -> None:
    """The second call is the same model for Ollama. Elsewhere it is another name."""
    for kind, status in (("ollama", 429), ("simulator", 200)):
        folder = tmp_path / kind
        folder.mkdir()
        async with stage(OPEN, folder=folder, kind=kind) as on:
            assert (await on.post(CHAT, _ask("gpt-4o"))).status == 200
            assert (await on.post(CHAT, _ask("GPT-4O"))).status == status
            assert (await on.post(CHAT, _ask("gpt-4o:latest"))).status == status


async def test_what_is_refused_reaches_no_upstream_and_costs_nothing(tmp_path: Path) -> None:
    """Fields of any surface, fields that the operator refuses, and names that ask for the same."""
    async with stage(OPEN, folder=tmp_path, more=", refuse: [provider]") as on:
        for field in ("previous_response_id", "vertex_project", "Provider", "mcpServers"):
            reply = await on.post(CHAT, _ask("gpt-4o", **{field: "x"}))
            assert (reply.status, reply.error["param"]) == (400, reply.error["param"])
        for name in ("@preset/x", "gpt-4o:online"):
            reply = await on.post(CHAT, _ask(name))
            assert (reply.status, reply.error["param"]) == (400, "model")
        assert await on.rows("calls") == []
