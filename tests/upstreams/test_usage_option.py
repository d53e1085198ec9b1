"""Which upstreams accept the option that asks for the usage of a stream. wire §2.2 (servers that reject it), §2.3."""

import pytest

from proxy.policy.catalog import Model, Upstream
from proxy.upstreams import usage_option
from proxy.upstreams.usage_option import UsageOptionCache, is_about_usage_option


def model(
    name: str = "prod",
    *,
    kind: str = "azure",
    base_url: str = "https://res.openai.azure.com",
    api_version: str | None = None,
) -> Model:
    """A model at an upstream of this kind."""
    return Model("m", Upstream("up", base_url, None, kind=kind, api_version=api_version), name)


@pytest.mark.parametrize(
    ("status", "body", "is_about_it"),
    [
        (400, b'{"error":{"code":"unknown_parameter","param":"stream_options"}}', True),  # OpenAI
        (400, b'{"error":{"message":"Unknown parameter: \'stream_options\'"}}', True),  # Azure's old versions
        (422, b'{"detail":[{"loc":["body","stream_options"],"type":"extra_forbidden"}]}', True),  # Mistral
        (400, b'{"object":"error","message":"continuous_usage_stats is not known"}', True),
        (400, b'{"error":{"message":"Bad temperature."}}', False),
        (404, b"stream_options", False),
        (500, b"stream_options", False),
        (200, b"stream_options", False),
    ],
)
def test_a_rejection_of_the_option_is_recognised(status: int, body: bytes, is_about_it: bool) -> None:
    """By the name of a field that we add, whatever the shape of the error, and only at 400 or 422."""
    assert is_about_usage_option(status, body) is is_about_it


def test_after_a_rejection_a_hundred_calls_go_without_the_option() -> None:
    """Each pair of a model and an address is remembered separately."""
    known, other = UsageOptionCache(), model("other")
    assert known.should_send("/x", model())
    known.note("/x", model(), is_accepted=False)
    assert [known.should_send("/x", model()) for _ in range(102)] == [False] * 100 + [True] * 2
    known.note("/x", model(), is_accepted=False)
    assert not known.should_send("/x", model())
    assert known.should_send("/y", model())
    assert known.should_send("/x", other)


def test_a_rejection_is_ignored_if_the_option_was_accepted_before() -> None:
    """No client can turn off the usage of all others with a request that is rejected for another reason."""
    known = UsageOptionCache()
    known.note("/x", model(), is_accepted=True)
    known.note("/x", model(), is_accepted=False)
    assert known.should_send("/x", model())


def test_the_number_of_remembered_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of models come from clients, so there is no end of them."""
    monkeypatch.setattr(usage_option, "_ADDRESSES_MAX", 2)
    known = UsageOptionCache()
    known.note("/1", model(), is_accepted=False)
    known.note("/2", model(), is_accepted=True)
    known.note("/3", model(), is_accepted=False)
    assert known.should_send("/1", model())
    assert not known.should_send("/3", model())
