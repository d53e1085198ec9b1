"""Keys: reads the one key from the headers of a request, and makes new ones.

A key that the proxy makes is `lqp_`, an id, a secret and a checksum:

    lqp_7k2mq9xw4b_Vf3…(32 characters)…9QaB3dEf
        id         secret              checksum of everything before it

The id names the key in lists and in the log. It is random and says nothing of the user. The checksum tells a typing
error from a wrong key without a query, and lets a scanner of git histories find keys and nothing else: the pattern is
`KEY_PATTERN`. Only the digest of the whole key is stored.
"""

import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

from multidict import MultiMapping

from proxy.config.values import digest
from proxy.errors import InvalidKey

# The headers of a request or an answer, whose names are found in any case.
Headers = MultiMapping[str]

KEY_HEADERS = ("authorization", "api-key", "x-api-key")
# Longer keys are refused unread. A key of this proxy has about 50 characters, a JSON Web Token up to a few thousand.
_KEY_CHARACTERS_MAX = 16_384
# The whitespace that may surround a header's value (RFC 9110 §5.5). `str.strip()` would also remove characters such
# as U+00A0 or a line feed; around a key they make it another key, which is unknown.
_WHITESPACE = " \t"

PREFIX = "lqp_"
# Without 0, 1, i, l and o, which look alike: ids are read out on the telephone.
_ID_CHARACTERS = "23456789abcdefghjkmnpqrstuvwxyz"
_ID_LENGTH = 10
_SECRET_CHARACTERS = string.ascii_letters + string.digits
_SECRET_LENGTH = 32  # of 62 characters each: 190 bits
_CHECKSUM_LENGTH = 6  # 62^6 is more than 2^32
KEY_PATTERN = re.compile(
    rf"lqp_([{_ID_CHARACTERS}]{{{_ID_LENGTH}}})_[A-Za-z0-9]{{{_SECRET_LENGTH + _CHECKSUM_LENGTH}}}(?![A-Za-z0-9])"
)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made. `text` is shown once and never stored; it is empty if the key is not new."""

    id: str
    text: str = field(repr=False)

    @property
    def digest(self) -> str:
        """What is stored of it: its SHA-256, in hex."""
        return digest(self.text)


def random_id() -> str:
    """A random id of ten characters, which people can read out."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def make_key() -> NewKey:
    """A new key with a random id and a random secret."""
    id = random_id()
    secret = "".join(secrets.choice(_SECRET_CHARACTERS) for _ in range(_SECRET_LENGTH))
    start = f"{PREFIX}{id}_{secret}"
    return NewKey(id, start + _checksum(start))


def id_of(key: str) -> str | None:
    """The id of a key that this proxy may have made; None if its form or its checksum is wrong."""
    match = KEY_PATTERN.fullmatch(key)
    if match is None or _checksum(key[:-_CHECKSUM_LENGTH]) != key[-_CHECKSUM_LENGTH:]:
        return None
    return match[1]


def _checksum(text: str) -> str:
    """The CRC-32 of a text, in six digits of base 62."""
    number, digits = zlib.crc32(text.encode()), ""
    for _ in range(_CHECKSUM_LENGTH):
        number, rest = divmod(number, len(_SECRET_CHARACTERS))
        digits = _SECRET_CHARACTERS[rest] + digits
    return digits


def presented_key(headers: Headers) -> str:
    """The one key in these headers. Raises InvalidKey if there is none, or if two differ.

    The key can be in `Authorization: Bearer`, `api-key` or `x-api-key`, also in several of them if it is the same
    key.
    """
    keys, authorizations = set(), set()
    for name in KEY_HEADERS:
        for value in headers.getall(name, ()):
            key = value = value.strip(_WHITESPACE)
            if len(value) > _KEY_CHARACTERS_MAX:
                raise InvalidKey(f"An API key has at most {_KEY_CHARACTERS_MAX} characters.", reason="key too long")
            if name == "authorization":
                authorizations.add(value)
                scheme, _, rest = value.partition(" ")
                key = rest.strip(_WHITESPACE) if scheme.lower() == "bearer" else ""
            if key:
                keys.add(key)
    if not keys:
        raise InvalidKey(
            "You didn't send an API key. Send it as `Authorization: Bearer YOUR_KEY` (or `api-key`, `x-api-key`).",
            reason="no key",
        )
    # Two different Authorization headers are refused even if only one has a key: a server in front of the proxy may
    # have authenticated the other one.
    if len(keys) > 1 or len(authorizations) > 1:
        raise InvalidKey("This request carries two different API keys. Send one.", reason="two keys")
    return keys.pop()
