"""Which upstreams accept the option that asks for the usage of a stream. wire §2.2 (who rejects it), §2.3."""

import pytest

from proxy.policy.policy import Kind, Model, Upstream
from proxy.upstreams import usage_option
from proxy.upstreams.usage_option import UsageOptionCache, is_about_usage_option


def model(
    name: str = "prod",
    *,
    kind: Kind = "azure",
    base_url: str = "https://res.openai.azure.com",
    api_version: str | None = None,
) -> Model:
    """A model at such an upstream."""
    return Model("m", Upstream("up", base_url, None, kind=kind, api_version=api_version), name)


@pytest.mark.parametrize(
    ("status", "body", "is_about_it"),
    [
        (400, b'{"error":{"code":"unknown_parameter","param":"stream_options"}}', True),  # OpenAI's like
        (400, b'{"error":{"message":"Unknown parameter: \'stream_options\'"}}', True),  # Azure's old versions
        (422, b'{"detail":[{"loc":["body","stream_options"],"type":"extra_forbidden"}]}', True),  # Mistral
        (400, b'{"object":"error","message":"continuous_usage_stats is not known"}', True),
        (400, b'{"error":{"message":"Bad temperature."}}', False),
        (404, b"stream_options", False),
        (500, b"stream_options", False),
        (200, b"stream_options", False),
    ],
)
def test_an_upstream_says_that_it_takes_no_option(status: int, body: bytes, is_about_it: bool) -> None:
    """By its name, in whatever shape."""
    assert is_about_usage_option(status, body) is is_about_it


def test_an_upstream_is_asked_until_it_refuses_and_again_after_a_while() -> None:
    """Each model at each address for itself."""
    known, other = UsageOptionCache(), model("other")
    assert known.may_ask("/x", model())
    known.note("/x", model(), is_taken=False)
    assert [known.may_ask("/x", model()) for _ in range(102)] == [False] * 100 + [True] * 2
    known.note("/x", model(), is_taken=False)
    assert not known.may_ask("/x", model())
    assert known.may_ask("/y", model())
    assert known.may_ask("/x", other)


def test_one_refusal_means_nothing_where_it_was_taken_before() -> None:
    """Nobody can switch the usage of all others off with a request that is refused for something else."""
    known = UsageOptionCache()
    known.note("/x", model(), is_taken=True)
    known.note("/x", model(), is_taken=False)
    assert known.may_ask("/x", model())


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models come from clients."""
    monkeypatch.setattr(usage_option, "_ADDRESSES_KEPT", 2)
    known = UsageOptionCache()
    known.note("/1", model(), is_taken=False)
    known.note("/2", model(), is_taken=True)
    known.note("/3", model(), is_taken=False)
    assert known.may_ask("/1", model())
    assert not known.may_ask("/3", model())
