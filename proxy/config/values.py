"""What a single value of quotas.yaml may look like: names, numbers, addresses, keys.

Each function takes a value, gives what is kept of it, and raises ValueError with a sentence of what is wrong and
what to write instead. Values that are or may hold a secret (keys, URLs) are never part of a sentence.
"""

import re
from difflib import get_close_matches
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import SplitResult, urlsplit
from zoneinfo import ZoneInfo, available_timezones

from proxy.policy.amounts import TOKENS_MAX
from proxy.policy.policy import DEFAULT, EVERYONE, Secret, digest
from proxy.policy.windows import Duration, parse_per

KEY_CHARACTERS_MIN = 24
WAIT_MS_MAX = 600_000
_DAY_MS = 86_400_000
_MODEL_NAME_MAX = 200

NAME = re.compile(r"^(?!\.\.?$)[A-Za-z0-9._-]{1,100}$")
_USER_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9._@+-]{1,254}")
_COUNT = re.compile(r"(0|[1-9][0-9]{0,14}|[1-9][0-9]{0,2}(?:_[0-9]{3}){1,4})([kM]?)")
_TIMES = {"": 1, "k": 1_000, "M": 1_000_000}
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9]([A-Za-z0-9.-]{0,252})?)):([0-9]{1,5})")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::[1-9][0-9]{0,4})?")
_VISIBLE = re.compile(r"[!-~]+")
_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_UTC = ZoneInfo("UTC")


def name(text: str) -> str:
    """The name of a group, quota, upstream or admin: it becomes a part of ids, paths and labels."""
    if not NAME.fullmatch(text):
        raise ValueError("this is no name; write letters, digits, dots, dashes and underscores, at most 100")
    return text


def user_name(text: str) -> str:
    """The name of a user, which may be an e-mail address."""
    if not _USER_NAME.fullmatch(text):
        raise ValueError("this is no user's name; write letters, digits and . _ - @ +, at most 254")
    return text


def group_name(text: str) -> str:
    """The name of a group, which must not merely look like a reserved one."""
    for reserved in (EVERYONE, DEFAULT):
        if text.lower() == reserved != text:
            raise ValueError(f'"{text}" is not the reserved group; write "{reserved}", or another name')
    return name(text)


def wait_ms(value: object) -> int:
    """How long a call may wait, as a duration, in milliseconds; 0 for not at all."""
    if value in (0, "0", "0s"):
        return 0
    length = parse_per(value, _UTC) if isinstance(value, str) and not value.isalpha() else None
    if not isinstance(length, Duration) or length.length_ms > WAIT_MS_MAX:
        raise ValueError("this is no time to wait; write a duration such as 30s, at most 10m, or 0s for none")
    return length.length_ms


def ledger_wait_ms(value: object) -> int:
    """How long a call may wait for the database, in milliseconds: for a commit it always has to."""
    length_ms = wait_ms(value)
    if length_ms < 1000:
        raise ValueError("this is shorter than a commit may take; write 1s or more")
    return length_ms


def keep_ms(value: object) -> int:
    """How long records are kept, in milliseconds."""
    length = parse_per(value, _UTC) if isinstance(value, str) else None
    if not isinstance(length, Duration) or length.length_ms < _DAY_MS:
        raise ValueError(
            "this is no time to keep records; write a duration of 1d or more such as 90d, or null for ever"
        )
    return length.length_ms


def model_name(text: str) -> str:
    """A model's name as clients write it, or "*" for all others."""
    if any(sign in text for sign in "*?[") and text != "*":
        raise ValueError('models are listed by their whole names; "*" alone opens the list to all others')
    return glob(text)


def served_name(text: str) -> str:
    """What an upstream calls a model."""
    if text == "*":
        raise ValueError('"*" is no model of an upstream; write its name, or leave "model" out')
    return model_name(text)


def glob(text: str) -> str:
    """A pattern for model names."""
    if not text.isprintable() or " " in text or not 0 < len(text) <= _MODEL_NAME_MAX:
        raise ValueError(f"this is no model's name; write 1 to {_MODEL_NAME_MAX} visible characters without blanks")
    return text


def one_line(text: str) -> str:
    """Words that are shown to users: one line."""
    text = text.strip()
    if not text.isprintable():
        raise ValueError("this has more than one line, or signs that can't be shown; write one line")
    return text


def count(value: object) -> int:
    """A whole number of tokens or calls."""
    number = _as_count(value)
    if number > TOKENS_MAX:
        raise ValueError(f"this is more than {TOKENS_MAX:,}; write a smaller number")
    return number


def positive(value: object) -> int:
    """A count of at least 1."""
    number = count(value)
    if not number:
        raise ValueError("0 makes no sense here; write at least 1, or leave it out")
    return number


def _as_count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _COUNT.fullmatch(value)):
        return int(match[1].replace("_", "")) * _TIMES[match[2]]
    shown = f'"{value}"' if isinstance(value, str | int) else "this"
    raise ValueError(f"{shown} is no whole number from 0 up; write 200000, 200_000, 200k or 5M")


def per(text: str) -> str:
    """The text of a window. Its zone is known only later, so what it names is made then."""
    parse_per(text, _UTC)
    return text


def zone(text: str) -> str:
    """The name of a time zone."""
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):  # OSError: "Europe" is a folder
        near = get_close_matches(text[:50], available_timezones(), n=1) or ["Europe/Berlin"]
        raise ValueError(f'"{text}" is no time zone; write a name of the IANA list such as {near[0]}') from None
    return text


def address(text: str) -> str:
    """Where to listen: host:port."""
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """The host and the port of an address; an IPv6 host without its brackets."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[4]) > 65_535:
        raise ValueError(
            f'"{text}" is no address; write host:port: 127.0.0.1:8080, [::1]:8080, or 0.0.0.0:8080 for all interfaces'
        )
    if match[1]:
        try:
            IPv6Address(match[1])
        except AddressValueError:
            raise ValueError(f'"{text}" has no IPv6 address in its brackets; write [::1]:8080') from None
    return match[1] or match[2], int(match[4])


def origin(text: str) -> str:
    """A web page's origin as browsers write it, or "*" for any."""
    origin = text.lower().rstrip("/")
    if text != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f'"{text}" is no origin; write scheme://host[:port], as in https://app.example, or "*" for all'
        )
    return origin


def api_version(text: str) -> str:
    """A version of Azure's API, as it stands in a query."""
    if not re.fullmatch(r"20[0-9]{2}-[01][0-9]-[0-3][0-9](-preview)?|v1|preview|latest", text):
        raise ValueError("this is no version of Azure's API; write one such as 2024-10-21, or 2025-04-01-preview")
    return text


def base_url(text: str) -> str:
    """An upstream's address, without a slash at its end. Where a call goes is said here alone, and nothing else."""
    url = _split_url(text)
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("this is no http:// or https:// address; write one such as https://api.openai.com/v1")
    if "@" in url.netloc:
        raise ValueError("this holds a user or a password; write the key as api_key: ${NAME}")
    if "?" in text or "#" in text:
        raise ValueError("this has a query or a fragment; write the address up to its path")
    return text.rstrip("/")


def database(text: str) -> str:
    """The URL of the books' database, without a driver."""
    url = _split_url(text)
    scheme = url.scheme if url else ""
    plain = {"postgres": "postgresql"}.get(scheme, scheme.partition("+")[0])
    if plain != scheme and plain in ("sqlite", "postgresql"):
        raise ValueError(f'"{scheme}://" names no database here; write {plain}:// (the driver is chosen by itself)')
    file = text.removeprefix("sqlite:///")
    if scheme == "sqlite" and (file == text or file.strip("/") in ("", ":memory:")):
        raise ValueError("this names no file for SQLite; write sqlite:///quotas.db, or sqlite:////var/lib/quotas.db")
    if scheme == "postgresql" and not text.startswith("postgresql://"):
        raise ValueError("this names no server; write postgresql://user:password@host/name")
    if scheme not in ("sqlite", "postgresql"):
        raise ValueError("this is no database; write sqlite:///quotas.db, or postgresql://user:password@host/name")
    return text


def _split_url(text: str) -> SplitResult | None:
    """The parts of a URL; None where it is none. Python's own splitting would drop line ends silently."""
    try:
        url = urlsplit(text) if _VISIBLE.fullmatch(text) else None
        return url if url is None or url.port is None or url.port > 0 else None
    except ValueError:
        return None


def key_digest(text: str) -> str:
    """The digest of a user's or an admin's key: of one in plain, or the one that stands there."""
    if text.startswith("sha256:"):
        match = _SHA256.fullmatch(text)
        if not match:
            raise ValueError("this is no digest; write sha256: and 64 hex digits")
        return match[1].lower()
    secret(text)
    if len(text) < KEY_CHARACTERS_MIN:
        raise ValueError(f"this key is too short; write one of {KEY_CHARACTERS_MIN} random characters or more")
    return digest(text)


def secret(value: object) -> Secret:
    """A key that is sent in a header."""
    if value == "":
        raise ValueError("this key is empty; write one, or leave it out")
    if not isinstance(value, str) or not _VISIBLE.fullmatch(value):
        raise ValueError("this key can't be sent in a header; write visible ASCII characters without blanks")
    return Secret(value)
