"""Which upstreams accept the option by which we ask for the usage of a stream, remembered as calls go by.

A stream of OpenAI's format states its usage only if `stream_options.include_usage` asks for it, so we ask if the client
did not. An upstream that does not know the option answers 400. It then gets the call again without the option, and the
next hundred calls go without it too. Pure.
"""

from proxy.policy.policy import Model

# What we write into the request to hear the usage of a stream. Whoever does not take it names one of these.
_OPTION = (b"stream_options", b"include_usage", b"continuous_usage_stats", b"timings_per_token")
# OpenAI's and vLLM's status for a field that is not known or not allowed, and FastAPI's and Mistral's.
_NOT_TAKEN = (400, 422)
# So many calls go without the option before it is tried again. Azure is said to refuse it beside pictures: one
# such call must not leave all others uncounted for good.
_CALLS_WITHOUT = 100
_ADDRESSES_KEPT = 4096


def is_about_usage_option(status: int, body: bytes) -> bool:
    """Whether an answer says that the option in which we ask for the usage of a stream is not taken."""
    return status in _NOT_TAKEN and any(name in body for name in _OPTION)


class UsageOptionCache:
    """Which addresses take the option in which we ask for usage, learned as calls go by."""

    def __init__(self) -> None:
        # By the upstream's base_url, the address there, and the model.
        self._taken: set[tuple[str, str, str]] = set()
        self._calls_without: dict[tuple[str, str, str], int] = {}

    def may_ask(self, address: str, model: Model) -> bool:
        """Whether a call that is sent there now may ask; one that may not is one of the hundred that go without."""
        key = _key(address, model)
        left = self._calls_without.pop(key, 0)
        if left:
            self._calls_without[key] = left - 1
        return not left

    def note(self, address: str, model: Model, *, is_taken: bool) -> None:
        """Take note that a call was let through with the option, or only without it.

        Where it was taken once a refusal speaks of that one request.
        """
        key = _key(address, model)
        # With an open list of models there is no end of names.
        if len(self._taken) + len(self._calls_without) >= _ADDRESSES_KEPT:
            self._taken.clear()
            self._calls_without.clear()
        if is_taken:
            self._taken.add(key)
        elif key not in self._taken:
            self._calls_without[key] = _CALLS_WITHOUT


def _key(address: str, model: Model) -> tuple[str, str, str]:
    return model.upstream.base_url, address, model.upstream_model
