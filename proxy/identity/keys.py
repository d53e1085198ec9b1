"""Headers to a user: which key was sent, and whose it is.

Keys are known by their SHA-256 only, over the full length. "Not mine" and "wrong" sound alike: an answer must
not tell a prober which part of a key was right.
"""

from collections.abc import Iterable, Mapping

from proxy.errors import InvalidKey
from proxy.policy.policy import Policy, User, digest

_HEADERS = ("authorization", "api-key", "x-api-key")
# The longest that is looked at; a key of ours has some 50 characters, a JSON web token up to a few thousand.
_KEY_CHARACTERS_MAX = 16_384
# What may stand around a header's value (RFC 9110 §5.5). Anything else is a part of the key, and so a wrong key.
_BLANKS = " \t"


def identify(headers: Iterable[tuple[str, str]], policy: Policy) -> User:
    """The user whose key these headers carry; raises InvalidKey.

    The key may travel as `Authorization: Bearer`, `api-key` or `x-api-key`, also in several of them, as long as
    it is the same one.
    """
    name = _whose(presented_key(headers), policy.key_digests)
    if name is None or name not in policy.users:
        raise InvalidKey(
            "This API key is not known here. Use the key you were given for this proxy, not one of the upstream's."
        )
    return policy.users[name]


def identify_admin(headers: Iterable[tuple[str, str]], policy: Policy) -> str:
    """The name of the admin whose key these headers carry; raises InvalidKey."""
    name = _whose(presented_key(headers), policy.admin_digests)
    if name is None:
        raise InvalidKey("This is not an admin key of this proxy.")
    return name


def presented_key(headers: Iterable[tuple[str, str]]) -> str:
    """The one key in these headers; raises InvalidKey where there is none, or two that differ."""
    sent = [(name.lower(), value.strip(_BLANKS)) for name, value in headers if name.lower() in _HEADERS]
    keys = {key for name, value in sent if (key := _key_in(name, value))}
    if not keys:
        raise InvalidKey(
            "You didn't send an API key. Send it as `Authorization: Bearer YOUR_KEY` (or `api-key`, `x-api-key`)."
        )
    if len(keys) > 1 or len({value for name, value in sent if name == "authorization"}) > 1:
        raise InvalidKey("This request carries two different API keys. Send one.")
    return keys.pop()


def _key_in(name: str, value: str) -> str:
    if len(value) > _KEY_CHARACTERS_MAX:
        raise InvalidKey(f"An API key has at most {_KEY_CHARACTERS_MAX} characters.")
    if name != "authorization":
        return value
    scheme, _, key = value.partition(" ")
    return key.strip(_BLANKS) if scheme.lower() == "bearer" else ""


def _whose(key: str, digests: Mapping[str, str]) -> str | None:
    """Whom this key belongs to. What is looked up is a digest, so the time taken says nothing about the key."""
    presented = digest(key)
    return digests.get(presented)
