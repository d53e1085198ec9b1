"""Which upstreams accept the option that asks for the usage of a stream, learned from their answers.

A stream of OpenAI's format reports its usage only if `stream_options.include_usage` asks for it, so we ask if the
client did not. An upstream that does not know the option answers 400 or 422. Then it gets the call again without the
option, and the next hundred calls to the same address and model go without it too. Pure.
"""

from proxy.formats.kinds import KINDS
from proxy.policy.catalog import Model

# The fields that we write into a request to get the usage of a stream. An upstream that rejects one names it.
_OPTION_FIELDS = (
    b"stream_options",
    b"include_usage",
    *(kind.running_usage_option.encode() for kind in KINDS.values() if kind.running_usage_option is not None),
)
# For a field that is not known or not allowed, OpenAI and vLLM answer 400, FastAPI and Mistral 422.
_REJECTION_STATUSES = (400, 422)
# How many calls go without the option before it is tried again. Azure is said to reject it in requests with images:
# one such call must not leave all others uncounted for good.
_CALLS_WITHOUT = 100
# Names of models come from clients, so the number of addresses has a bound.
_ADDRESSES_MAX = 4096


def is_about_usage_option(status: int, body: bytes) -> bool:
    """Whether an error answer says that the upstream does not accept the option."""
    return status in _REJECTION_STATUSES and any(field in body for field in _OPTION_FIELDS)


class UsageOptionCache:
    """Which addresses accept the option, as one process has seen it."""

    def __init__(self) -> None:
        # How many calls go without the option; None once it was accepted. The keys are the upstream's base_url, the
        # address there, and the model.
        self._calls_without: dict[tuple[str, str, str], int | None] = {}

    def should_send(self, address: str, model: Model) -> bool:
        """Whether the call that is about to be sent may have the option.

        If not, the call counts as one of the hundred that go without it.
        """
        key = _key(address, model)
        remaining = self._calls_without.get(key)
        if remaining:
            self._calls_without[key] = remaining - 1
        return not remaining

    def note(self, address: str, model: Model, *, is_accepted: bool) -> None:
        """Note that a call succeeded with the option, or only without it.

        Once an address has accepted the option, a later rejection concerns that one request and is ignored. Otherwise
        one client could turn off the usage of all others with a request that is rejected for another reason.
        """
        key = _key(address, model)
        if len(self._calls_without) >= _ADDRESSES_MAX:
            self._calls_without.clear()
        if is_accepted:
            self._calls_without[key] = None
        elif self._calls_without.get(key, 0) is not None:
            self._calls_without[key] = _CALLS_WITHOUT


def _key(address: str, model: Model) -> tuple[str, str, str]:
    return model.upstream.base_url, address, model.upstream_model
