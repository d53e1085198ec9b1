"""Reads the one key from the headers of a request."""

from collections.abc import Iterable

from proxy.errors import InvalidKey

_HEADERS = ("authorization", "api-key", "x-api-key")
# Longer keys are refused unread. A key of this proxy has about 50 characters, a JSON Web Token up to a few thousand.
_KEY_CHARACTERS_MAX = 16_384
# The whitespace that may surround a header's value (RFC 9110 §5.5). `str.strip()` would also remove characters such
# as U+00A0 or a line feed; around a key they make it another key, which is unknown.
_WHITESPACE = " \t"


def presented_key(headers: Iterable[tuple[str, str]]) -> str:
    """The one key in these headers. Raises InvalidKey if there is none, or if two differ.

    The key can be in `Authorization: Bearer`, `api-key` or `x-api-key`, also in several of them if it is the same
    key.
    """
    sent = [(name.lower(), value.strip(_WHITESPACE)) for name, value in headers if name.lower() in _HEADERS]
    keys = {key for name, value in sent if (key := _key_in(name, value))}
    if not keys:
        raise InvalidKey(
            "You didn't send an API key. Send it as `Authorization: Bearer YOUR_KEY` (or `api-key`, `x-api-key`)."
        )
    # Two different Authorization headers are refused even if only one has a key: a server in front of the proxy may
    # have authenticated the other one.
    if len(keys) > 1 or len({value for name, value in sent if name == "authorization"}) > 1:
        raise InvalidKey("This request carries two different API keys. Send one.")
    return keys.pop()


def _key_in(name: str, value: str) -> str:
    if len(value) > _KEY_CHARACTERS_MAX:
        raise InvalidKey(f"An API key has at most {_KEY_CHARACTERS_MAX} characters.")
    if name != "authorization":
        return value
    scheme, _, key = value.partition(" ")
    return key.strip(_WHITESPACE) if scheme.lower() == "bearer" else ""
