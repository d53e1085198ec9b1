"""LiteLLM's own proxy, the real one, behind this proxy, with both configurations as docs/gateways.md prints them.

LiteLLM forwards to the simulator, so what it reports is compared with what was generated.
"""

import json
import shlex
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from proxy.cli import main
from proxy.simulator.server import Simulator
from proxy.simulator.text import DIMENSIONS
from tests.litellm_proxy import OPENAI_KEY, Gateway, litellm_proxy
from tests.printed import blocks
from tests.stage import UPSTREAM_KEY, Stage, key_of, stage

# The start of LiteLLM counts as part of the first test.
pytestmark = [pytest.mark.journey, pytest.mark.timeout(600)]

(LITELLM,) = blocks("gateways.md", "LiteLLM's side")
(QUOTAS,) = blocks("gateways.md", "This side")
AUTH, TORTURE = blocks("gateways.md", "How exact each side is")
ALICE_KEY = key_of("alice")
POLICY = QUOTAS[QUOTAS.index("models:") :].replace("upstream: litellm", "upstream: simulated")
POLICY = POLICY.replace("${ALICE_KEY}", ALICE_KEY)
CHAT: dict[str, Any] = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Who lives in the forest?"}]}
# Models whose answers at the upstream are directed by their names.
DIRECTED = ("status=400", "status=401", "status=429", "status=500", "tokens=3000+speed=200", "tool")
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One LiteLLM for the tests of this module that run in the same process."""
    faults = LITELLM.replace(
        "general_settings:",
        "\n".join(
            f"  - model_name: {name}\n"
            f"    litellm_params: {{model: openai/gpt-4o+{name}, api_base: https://api.openai.com/v1,"
            " api_key: os.environ/OPENAI_API_KEY}"
            for name in DIRECTED
        )
        + "\ngeneral_settings:",
    )
    with litellm_proxy(faults, tmp_path_factory.mktemp("litellm")) as started:
        yield started


@asynccontextmanager
async def in_front_of(
    gateway: Gateway, folder: Path, policy: str = POLICY, **more: Any
) -> AsyncIterator[tuple[Stage, Simulator]]:
    """A stage in front of the gateway, and the gateway's upstream."""
    models = "".join(f"  {name}: {{upstream: simulated, max_output_tokens: 4096}}\n" for name in DIRECTED)
    policy = policy.replace("groups:", f"{models}groups:", 1)
    async with (
        gateway.upstream() as simulator,
        stage(policy, folder=folder, upstream=gateway.url, **{"kind": "openai", **more}) as on,
    ):
        yield on, simulator


def test_the_printed_configuration_is_without_mistakes(tmp_path: Path) -> None:
    """By the command `check`."""
    (tmp_path / "quotas.yaml").write_text(QUOTAS)
    environ = {"LITELLM_KEY": UPSTREAM_KEY, "ALICE_KEY": ALICE_KEY}
    result = CliRunner().invoke(main, ["check", "--config", str(tmp_path / "quotas.yaml")], env=environ)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.output.lower(), result.output


async def test_what_litellm_reports_is_charged(gateway: Gateway, tmp_path: Path) -> None:
    """Whole and streamed chats with the SDK, tools, embeddings and responses: the usage of the simulator."""
    async with in_front_of(gateway, tmp_path) as (on, simulator):
        sdk = on.sdk()
        for model in ("gpt-4o", "team/fast"):
            whole = await sdk.chat.completions.create(**CHAT | {"model": model})
            assert whole.model == model
            assert whole.usage is not None
            stream = await sdk.chat.completions.create(**CHAT | {"model": model}, **USAGE)
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert len(text.split()) == chunks[-1].usage.completion_tokens
        without = await sdk.chat.completions.create(**CHAT, stream=True)
        assert all([chunk.choices and chunk.usage is None async for chunk in without])
        tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
        called = await sdk.chat.completions.create(**CHAT | {"model": "tool"}, tools=tools)
        assert called.choices[0].message.tool_calls
        embedded = await sdk.embeddings.create(model="embed", input=["a b c", "d"], encoding_format="float")
        assert [len(each.embedding) for each in embedded.data] == [DIMENSIONS, DIMENSIONS]
        answered = await sdk.responses.create(model="gpt-4o", input="Who?")
        assert answered.usage is not None
        await on.all_settled()
        await on.audit()
        rows = await on.rows("calls")
        assert [(row["outcome"], row["provenance"]) for row in rows] == [("complete", "exactly")] * 8
        reported = simulator.reported_usage
        assert await on.used() == (reported.input_tokens + reported.output_tokens, 0)
        listed = {model.id async for model in sdk.models.list()}
        assert {"gpt-4o", "team/fast", "embed"} <= listed


@pytest.mark.parametrize("stream", [False, True])
async def test_litellm_translates_anthropic_s_messages(stream: bool, gateway: Gateway, tmp_path: Path) -> None:
    """For models of OpenAI too. LiteLLM takes the key as Anthropic's clients send it."""
    async with in_front_of(gateway, tmp_path, kind="anthropic") as (on, simulator):
        body = CHAT | {"max_tokens": 40, "stream": stream}
        reply = await on.post("/v1/messages", body)
        assert reply.status == 200, reply.body
        assert b'"output_tokens"' in reply.body
        await on.all_settled()
        (row,) = await on.rows("calls")
        reported = simulator.reported_usage
        assert (row["outcome"], row["provenance"]) == ("complete", "exactly")
        assert (row["input_tokens"], row["output_tokens"]) == (reported.input_tokens, reported.output_tokens)


async def test_nothing_of_litellm_s_own_reaches_the_client(gateway: Gateway, tmp_path: Path) -> None:
    """Its headers state costs, addresses and what its key has spent."""
    async with in_front_of(gateway, tmp_path) as (on, _):
        for body in (CHAT, CHAT | {"stream": True}):
            reply = await on.post("/v1/chat/completions", body)
            assert reply.status == 200
            assert not [name for name in reply.headers if "litellm" in name.lower() or "llm_provider" in name.lower()]
            assert "x-ratelimit-limit-tokens" in reply.headers
            assert reply.headers["x-ratelimit-limit-tokens"] == "200000"


@pytest.mark.parametrize(
    ("model", "raised", "status", "code"),
    [
        ("status=400", openai.BadRequestError, 400, "400"),
        ("status=401", openai.InternalServerError, 502, "upstream_error"),
        ("status=429", openai.RateLimitError, 429, None),
        ("status=500", openai.InternalServerError, 500, "500"),
    ],
)
async def test_litellm_s_errors_reach_the_client_and_cost_no_tokens(
    model: str, raised: type[openai.APIStatusError], status: int, code: str | None, gateway: Gateway, tmp_path: Path
) -> None:
    """In OpenAI's shape; those about the keys of the gateway do not show them."""
    async with in_front_of(gateway, tmp_path, "retry_for: 0s\n" + POLICY) as (on, _):
        with pytest.raises(raised) as error:
            await on.sdk().chat.completions.create(**CHAT | {"model": model})
        assert error.value.status_code == status
        assert code is None or error.value.code == code
        assert "sk-" not in str(error.value)
        await on.all_settled()
        assert await on.used() == (0, 0)


async def test_a_key_that_litellm_does_not_know_is_a_502(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a database LiteLLM answers 400, and the user can do nothing about it."""
    monkeypatch.setattr("tests.stage.UPSTREAM_KEY", "sk-of-nobody-0123456789abcdef")
    async with in_front_of(gateway, tmp_path) as (on, simulator):
        reply = await on.post("/v1/chat/completions", CHAT)
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        assert "key" in reply.error["message"]
        assert simulator.received == 0
        await on.all_settled()
        assert await on.used() == (0, 0)


async def test_a_used_up_quota_is_refused_before_litellm(gateway: Gateway, tmp_path: Path) -> None:
    """With the reset of the quota. Neither LiteLLM nor its upstream sees the refused calls."""
    policy = POLICY.replace("tokens: 200k", "tokens: 200, requests: 2")
    async with in_front_of(gateway, tmp_path, policy) as (on, simulator):
        for _ in range(2):
            reply = await on.post("/v1/chat/completions", CHAT | {"max_tokens": 5})
            assert reply.status == 200, reply.body
        for _ in range(3):
            reply = await on.post("/v1/chat/completions", CHAT | {"max_tokens": 5})
            assert (reply.status, reply.error["code"]) == (429, "insufficient_quota")
            assert reply.error["quotas"][0]["window"]["resets_at"] == reply.error["resets_at"]
            assert int(reply.headers["retry-after"]) > 0
        assert simulator.received == 2


@pytest.mark.parametrize("on_disconnect", ["drain", "stop"])
async def test_a_client_that_leaves_a_stream_is_charged(on_disconnect: str, gateway: Gateway, tmp_path: Path) -> None:
    """`drain` charges what the upstream generated to the end. With `stop` LiteLLM stops its upstream too."""
    async with in_front_of(gateway, tmp_path, on_disconnect=on_disconnect) as (on, simulator):
        body = CHAT | {"model": "tokens=3000+speed=200", "stream": True, "max_tokens": 1500}
        response = await on.http.post(
            f"{on.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {ALICE_KEY}"}
        )
        await response.content.readuntil(b"\n\n")
        await simulator.until(lambda: simulator.chunks_sent >= 3)
        response.close()
        await on.all_settled()
        await simulator.until(lambda: simulator.open_calls == 0)
        (row,) = await on.rows("calls")
        charged = row["output_tokens"]
        if on_disconnect == "drain":
            assert (simulator.disconnects, row["provenance"]) == (0, "exactly")
            assert charged == simulator.reported_usage.output_tokens
        else:
            assert (simulator.disconnects, row["provenance"]) == (1, "at_least")
            assert 0 < charged < 1500


def test_litellm_alone_and_behind_this_proxy(tmp_path: Path) -> None:
    """By the printed command, in less time. What LiteLLM allows alone is printed, and not judged."""
    config = LITELLM.replace("general_settings:", "general_settings:\n  custom_auth: custom_auth.user_api_key_auth")
    with litellm_proxy(config, tmp_path, files={"custom_auth.py": AUTH}) as limited:
        words = {
            "http://127.0.0.1:4000/v1": limited.url,
            "$LIMITED_KEY": "sk-limited-0123456789abcdef",
            "$UNLIMITED_KEY": UPSTREAM_KEY,
            "$UPSTREAM_PORT": str(limited.upstream_port),
            "$OPENAI_API_KEY": OPENAI_KEY,
        }
        _, *arguments = [words.get(word, word) for word in shlex.split(TORTURE.replace("\\\n", " "))]
        arguments[arguments.index("--seconds") + 1] = "5"
        result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code in (0, 1), result.output
    report = json.loads(result.stdout)
    alone, behind = (report[name]["figures"] for name in ("alone", "behind"))
    assert behind["upstream overshoot"]["value"] == 0
    for figures in (alone, behind):
        assert figures["limit"]["value"] == 20_000
        assert figures["foreign answers"]["value"] == 0
        assert 0 < figures["upstream calls"]["value"] < figures["calls"]["value"]
        assert figures["refusals"]["value"] > 0
