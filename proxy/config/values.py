"""The rules of single values in quotas.yaml: names, numbers, addresses, keys.

Each function takes a value, returns it in the form that the rest of the proxy uses, and raises ValueError with a text
that says what is wrong and what to write instead. A text never quotes a value that is a secret or may contain one
(keys and URLs).
"""

import hashlib
import re
import ssl
from datetime import date, datetime, time
from difflib import get_close_matches
from ipaddress import AddressValueError, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import Literal
from urllib.parse import SplitResult, parse_qs, urlsplit
from zoneinfo import ZoneInfo, available_timezones

from proxy.config.suggestions import (
    as_duration,
    count_text,
    means_no_limit,
    similar_count,
    similar_duration,
    similar_window,
)
from proxy.formats.usage import STANDARD_FIELDS
from proxy.policy.amounts import TOKENS_MAX
from proxy.policy.catalog import Secret
from proxy.policy.key import TAG_CHARACTERS_MAX, Network
from proxy.policy.policy import DEFAULT, EVERYONE
from proxy.policy.windows import parse_per

# Only a key's SHA-256 digest is stored. 24 random characters out of 64 are 144 bits: no search finds the key.
KEY_CHARACTERS_MIN = 24
WAIT_MS_MAX = 600_000
_DAY_MS = 86_400_000
_LONGEST_MS = 2**63
_EVERY_MS_MIN = 10_000
# The largest body of a request; see `web.body_memory`.
BODY_MEMORY_MIN = 32 * 2**20
_MODEL_NAME_MAX = 200
# The longest id, e-mail address or name of a group that a header source may send, in characters.
ID_CHARACTERS_MAX = 256
# RFC 7518 §3.2: a key of HS256 has at least the 256 bits of the hash.
_SIGNING_SECRET_BYTES_MIN = 32

# Not "." and "..": names become segments of URL paths, where those two mean other paths.
NAME = re.compile(r"^(?!\.\.?$)[A-Za-z0-9._-]{1,100}$")
_FIELD = re.compile(r"[A-Za-z0-9_-]{1,100}")
_USER_NAME = re.compile(r"(?!\.\.?$)[A-Za-z0-9._@+-]{1,254}")
# Underscores only between thousands: 200_000 is a number, 20_0000 is more likely a typing error.
_COUNT = re.compile(r"(0|[1-9][0-9]{0,14}|[1-9][0-9]{0,2}(?:_[0-9]{3}){1,4})(?:(?:\.([0-9]{1,6}))?([kM]))?")
_TIMES = {"": 1, "k": 1_000, "M": 1_000_000}
_MINUTES_OR_MONTHS = re.compile(r"([2-9]|[1-9][0-9])M")
# [IPv6]:port or host:port
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9]([A-Za-z0-9.-]{0,252})?)):([0-9]{1,5})")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::[1-9][0-9]{0,4})?")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_PATH_PREFIX = re.compile(r"(?:/[A-Za-z0-9_-]{1,63}){1,8}")
# What paths of the API begin with, so a prefix can't.
_SERVED_WORDS = ("v1", "v2", "openai", "usage", "healthz", "readyz")
# How other programs write a variable of the environment: $NAME, and LiteLLM os.environ/NAME.
_VARIABLE = re.compile(r"(?:\$|os\.environ/)[A-Za-z_][A-Za-z0-9_]*|\$\([A-Za-z_][A-Za-z0-9_]*\)")
_VISIBLE_ASCII = re.compile(r"[!-~]+")
# An HTTP header's name (RFC 9110 §5.6.2), in the characters that servers and proxies let through.
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,99}")
# These say who calls in another way, or belong to the connection or to the body.
_OTHER_HEADERS = frozenset(
    "authorization proxy-authorization api-key x-api-key cookie host connection content-length content-type "
    "transfer-encoding forwarded x-forwarded-for x-quota-tag x-quota-max-wait".split()
)
# What the proxy writes itself into each request to an upstream, and what is meant for one connection (RFC 9110
# §7.6.1). A fixed Idempotency-Key would have all users get the answer to the first call.
_WRITTEN_HEADERS = frozenset(
    "host content-length content-type content-encoding transfer-encoding accept-encoding connection keep-alive "
    "proxy-connection te trailer upgrade expect idempotency-key".split()
)
_UPSTREAM_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]{0,8190}[!-~])?")
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]*-----END CERTIFICATE-----")
# The value of `proxy` that stands for no proxy, whatever the environment says.
NO_PROXY: Literal["none"] = "none"
_DATE = re.compile(r"2[0-9]{3}-[0-9]{2}-[0-9]{2}")
_INSTANT = re.compile(
    r"2[0-9]{3}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?(Z|[+-][0-9]{2}:[0-9]{2})", re.IGNORECASE
)
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")
_PERCENTAGE = re.compile(r"([0-9]{1,6})%")
_PERCENT_MAX = 1000
_SHA256 = re.compile(r"sha256:([0-9a-fA-F]{64})")
_UTC = ZoneInfo("UTC")


def name(text: str) -> str:
    """The name of a group, quota, upstream or admin key. It becomes a part of ids, URL paths and metric labels."""
    if not NAME.fullmatch(text):
        raise ValueError("this is not a valid name; use 1 to 100 letters, digits, dots, hyphens and underscores")
    return text


def derived_name(text: str) -> str:
    """A valid name that resembles a text, such as a model's name: `meta/llama-3` gives `meta-llama-3`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:100] or "model"


def user_name(text: str) -> str:
    """The name of a user, which may be an e-mail address."""
    if not _USER_NAME.fullmatch(text):
        raise ValueError("this is not a valid user name; use 1 to 254 letters, digits and . _ - @ +")
    return text


def group_name(text: str) -> str:
    """The name of a group. One that differs from a reserved name only in case (Everyone) is an error."""
    for reserved in (EVERYONE, DEFAULT):
        if text.lower() == reserved != text:
            raise ValueError(
                f'"{text}" differs from the reserved group "{reserved}" only in case; '
                f'write "{reserved}", or another name'
            )
    return name(text)


def wait_ms(value: object) -> int:
    """A duration of at most 10 minutes, in milliseconds. 0 for none."""
    if value in (0, "0", "0s"):
        return 0
    remedy = "write one such as 30s, at most 10m, or 0s for none"
    return _duration_ms(value, "this is not a valid duration here", remedy, bounds=(1, WAIT_MS_MAX))


def timeout_ms(value: object) -> int:
    """A time limit of 1 second to 1 day, in milliseconds."""
    remedy = "write one from 1s to 24h, such as 30s or 10m"
    return _duration_ms(value, "this is not a valid time limit", remedy, bounds=(1, _DAY_MS))


def ledger_wait_ms(value: object) -> int:
    """A duration of 1 second to 10 minutes, in milliseconds. Every call waits for a commit, so 0s would fail all."""
    length_ms = wait_ms(value)
    if length_ms < 1000:
        raise ValueError("this is shorter than a commit may take; write 1s or more")
    return length_ms


def heartbeat_ms(value: object) -> int:
    """A duration of 1 second to 10 minutes, in milliseconds."""
    length_ms = wait_ms(value)
    if length_ms < 1000:
        raise ValueError("this is too short for a heartbeat; write 1s or more, as in 15s, or remove it for none")
    return length_ms


def keep_ms(value: object) -> int:
    """How long records are kept, in milliseconds: 1 day or more."""
    what = "this is not a valid time to keep records"
    remedy = "write 1d or more, as in 90d, or null to keep them forever"
    return _duration_ms(value, what, remedy, unit="d", bounds=(_DAY_MS, _LONGEST_MS))


def every_s(value: object) -> int:
    """How often a key is fetched, in seconds: 10 seconds to 1 day."""
    what = "this is not how often a key can be fetched"
    remedy = "write a time from 10s to 24h, as in 45m"
    return _duration_ms(value, what, remedy, bounds=(_EVERY_MS_MIN, _DAY_MS)) // 1000


def _duration_ms(value: object, what: str, remedy: str, *, unit: str = "s", bounds: tuple[int, int]) -> int:
    """The milliseconds of a duration within these bounds.

    For another value, `what` says that it is none, and `remedy` what to write, unless a duration is suggested. `unit`
    is that of a number alone.
    """
    length = as_duration(value)
    if length is not None and bounds[0] <= length.length_ms <= bounds[1]:
        return length.length_ms
    meant = similar_duration(value, unit=unit, bounds=bounds)
    suggestion = f'did you mean "{meant}"?' if meant else remedy
    raise ValueError(f"{what}; {suggestion}")


def model_name(text: str) -> str:
    """A model's name as clients write it, or "*" for all other names. Patterns such as `gpt-*` are for quotas."""
    if any(sign in text for sign in "*?[") and text != "*":
        raise ValueError(
            'models are listed by their whole names; write the whole name, or "*" alone to allow all other names'
        )
    return glob(text)


def served_name(text: str) -> str:
    """A model's name at its upstream."""
    if text == "*":
        raise ValueError('"*" is not the name of a model at an upstream; write its name, or remove "model"')
    return model_name(text)


def field_name(text: str) -> str:
    """The name of a field at the top level of a request's body."""
    if text.lower() in ("model", "messages", "input"):
        raise ValueError(f"every request has {text}, so no call could be made; remove it")
    if not _FIELD.fullmatch(text):
        raise ValueError(
            "this is not the name of a field; write one of the top level of requests, in letters, digits, _ and -, "
            "as in provider"
        )
    return text


def glob(text: str) -> str:
    """A pattern for model names."""
    if not text.isprintable() or " " in text or not 0 < len(text) <= _MODEL_NAME_MAX:
        raise ValueError(f"this is not a valid model name; use 1 to {_MODEL_NAME_MAX} visible characters, no spaces")
    return text


def usage_field(text: str) -> str:
    """A member of a usage object whose tokens are output, in addition to the output that it states."""
    if text in STANDARD_FIELDS:
        raise ValueError("this member is read anyway; write only members that total_tokens does not include")
    if not text.isprintable() or " " in text or not 0 < len(text) <= _MODEL_NAME_MAX:
        raise ValueError(
            f"this is not a member of a usage; use 1 to {_MODEL_NAME_MAX} visible characters, no spaces, such as "
            "citation_tokens"
        )
    return text


def one_line(text: str) -> str:
    """One line of text that is shown to users, without spaces around it."""
    text = text.strip()
    if not text.isprintable():
        raise ValueError("this has more than one line, or characters that can't be printed; write one line of text")
    return text


def count(value: object) -> int:
    """A whole number of tokens or calls, at most 10^12. Text may have underscores and the suffix k or M."""
    number = _as_count(value)
    if number > TOKENS_MAX:
        raise ValueError(f"this is more than {TOKENS_MAX:,}; write a smaller number")
    return number


def positive(value: object) -> int:
    """A count of at least 1."""
    number = count(value)
    if not number:
        raise ValueError("0 is not allowed here; write 1 or more, or remove the key")
    return number


def body_memory(value: object) -> int:
    """A number of bytes that has room for the largest body, 32 MiB."""
    number = count(value)
    if number < BODY_MEMORY_MIN:
        raise ValueError("this has no room for the largest body, which has 33,554,432 bytes; write 34M or more")
    return number


def _as_count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _COUNT.fullmatch(value)):
        whole, decimals, suffix = match.groups(default="")
        # In integers: 1.2345k is 1234 and 5 tenths.
        divisor: int = 10 ** len(decimals)
        number, rest = divmod(int(whole.replace("_", "") + decimals) * _TIMES[suffix], divisor)
        if not rest:
            return number
        raise ValueError(f'"{value}" is not a whole number; write {count_text(number)} or {count_text(number + 1)}')
    shown = f'"{value}"' if isinstance(value, str | int) else "this"
    raise ValueError(f"{shown} is not a whole number from 0 up; {_count_hint(value)}")


def _count_hint(value: object) -> str:
    if isinstance(value, str | int) and means_no_limit(value):
        return "for no limit, remove the key"
    meant = similar_count(value) if isinstance(value, str) else None
    return f"did you mean {meant}?" if meant else "write one such as 200000, 200_000, 200k or 5M"


def per(text: str) -> str:
    """The text of a window. It is checked here and parsed again when the policy's time zone is known."""
    try:
        parse_per(text, _UTC)
    except ValueError:
        if match := _MINUTES_OR_MONTHS.fullmatch(text):
            raise ValueError(
                f'"{text}" could be minutes or months: write "{match[1]}m" for minutes, '
                f'or "{30 * int(match[1])}d" for as many months of 30 days'
            ) from None
        if text in ("M", "1M") or (meant := similar_window(text)) is None:
            raise
        raise ValueError(f'"{text}" is no window: did you mean "{meant}"?') from None
    return text


def zone(text: str) -> str:
    """The name of a time zone in the IANA database."""
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):  # OSError: "Europe" is a directory of the database
        raise ValueError(f'"{text}" is not a time zone; write an IANA name such as {_similar_zone(text)}') from None
    return text


def _similar_zone(text: str) -> str:
    """The time zone with the most similar name, or of this city: `Asia/Tokyo` for `tokyo`."""
    known = sorted(available_timezones())
    city = text[:50].strip().lower().replace(" ", "_")
    of_city = [name for name in known if "/" in name and name.lower().rpartition("/")[2] == city]
    return (of_city or get_close_matches(text[:50], known, n=1) or ["Europe/Berlin"])[0]


def address(text: str) -> str:
    """The address of a listener, as host:port."""
    split_address(text)
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host and port of a listener's address. An IPv6 host comes without its brackets."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[4]) > 65_535:
        raise ValueError(
            f'"{text}" is not an address; '
            "write host:port, as in 127.0.0.1:8080, [::1]:8080, or 0.0.0.0:8080 for all interfaces"
        )
    if match[1]:
        try:
            IPv6Address(match[1])
        except AddressValueError:
            raise ValueError(f'"{text}" has no IPv6 address in its brackets; write one, as in [::1]:8080') from None
    return match[1] or match[2], int(match[4])


def origin(text: str) -> str:
    """The origin of a web page as browsers send it (RFC 6454: lower case, no path), or "*" for any."""
    origin = text.lower().rstrip("/")
    if text != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f'"{text}" is not an origin; write scheme://host[:port], as in https://app.example, or "*" for all'
        )
    return origin


def server_url(text: str) -> str:
    """The address of a listener as its clients see it: an origin, without the port that its scheme implies."""
    found = text.lower().rstrip("/")
    scheme, _, host = found.partition("://")
    if scheme not in ("http", "https") or not _ORIGIN.fullmatch(found):
        raise ValueError(
            "this is not the address of a server; write https://host[:port] without a path, as in "
            "https://quotas.example"
        )
    return f"{scheme}://{host.removesuffix({'http': ':80', 'https': ':443'}[scheme])}"


def path_prefix(text: str) -> str:
    """The beginning of all paths of the API, such as /llm."""
    if not _PATH_PREFIX.fullmatch(text) or text.split("/")[1] in _SERVED_WORDS:
        raise ValueError(
            f'"{text}" is not a prefix of paths; write one or more words of letters, digits, - and _, each with a '
            "slash before it and none at the end, as in /llm. The first must not be one that the API has itself: "
            f"{', '.join(_SERVED_WORDS)}"
        )
    return text


def host_name(text: str) -> str:
    """The name of a host, in lower case, without a port."""
    if not _HOST_NAME.fullmatch(text):
        raise ValueError("this is not the name of a host; write it without scheme and port, as in quotas.example")
    return text.lower()


def network(value: object) -> Network:
    """A network such as 10.0.0.0/8, or one address. One in IPv4 is written as IPv4."""
    try:
        # A zone, as in fe80::1%eth0, is a name on one machine alone.
        found = ip_network(value, strict=False) if isinstance(value, str) and "%" not in value else None
    except ValueError:
        found = None
    if found is None:
        raise ValueError("this is not a network; write one such as 10.0.0.0/8, 192.0.2.7 or fd00::/8")
    if ip_interface(str(value)).ip != found.network_address:
        raise ValueError(f"this is an address inside of a network; write {found} for the whole network")
    if isinstance(found, IPv6Network) and found.network_address.ipv4_mapped is not None:
        # Addresses are compared as IPv4 (see `policy.key.is_in`), so this network would contain none.
        raise ValueError("this is IPv4 in the form of IPv6; write the IPv4 network, as in 10.0.0.0/8")
    return found


def expiry(value: object) -> date | datetime:
    """When a key expires: a day, whose beginning in the policy's time zone is meant, or an instant."""
    text = value if isinstance(value, str) else ""
    try:
        if _DATE.fullmatch(text):
            return date.fromisoformat(text)
        if _INSTANT.fullmatch(text):
            return datetime.fromisoformat(text.upper())
    except ValueError:  # 2027-02-30
        pass
    raise ValueError(
        "this is not a day or an instant; write one such as 2027-01-01 (it ends when that day begins), "
        "2027-01-01T12:00Z or 2027-01-01T12:00+01:00"
    )


def expiry_ms(at: date | datetime, zone: ZoneInfo) -> int:
    """Ms since 1970. A day is meant from its beginning on: with `expires: 2027-01-01`, 2026-12-31 is the last day."""
    instant = at if isinstance(at, datetime) else datetime.combine(at, time(), zone)
    return round(instant.timestamp() * 1000)


def tag(text: str) -> str:
    """What is recorded with calls for reports."""
    text = one_line(text)
    if not 0 < len(text) <= TAG_CHARACTERS_MAX:
        raise ValueError(f"this is not a valid tag; write 1 to {TAG_CHARACTERS_MAX} characters, or remove it")
    return text


def label(text: str) -> str:
    """The name of a key in the log and in lists."""
    text = one_line(text)
    if not 0 < len(text) <= 100:
        raise ValueError("this is not a valid label; write 1 to 100 characters, or remove it")
    return text


def source_name(text: str) -> str:
    """The name of a source of users, other than the two that always exist."""
    # "forgotten" is the source of pseudonyms, which records get for users who were forgotten.
    if text.lower() in ("file", "database", "forgotten"):
        raise ValueError(f'"{text}" is the name of another source of users; write another name')
    return name(text)


def header_name(text: str) -> str:
    """The name of a header that says who the user is."""
    if text.lower() in _OTHER_HEADERS:
        raise ValueError(f"the header {text} has another meaning; write the one that only your own proxy or UI sets")
    if not _HEADER.fullmatch(text):
        raise ValueError("this is not the name of a header; write one such as X-Forwarded-User")
    return text


def outside_id(text: str) -> str:
    """A user's id, or the name of a group, in a source outside of this file. It is compared exactly."""
    if why_no_id(text) is not None or text != text.strip():
        raise ValueError(
            f"this is not an id that a source can send; write 1 to {ID_CHARACTERS_MAX} visible characters, "
            "without spaces around them"
        )
    return text


def why_no_id(text: str) -> str | None:
    """Why a text can't be a user's id, an e-mail address or the name of a group; None if it can.

    Bytes that are not UTF-8 arrive as surrogates, which are not printable.
    """
    if not text:
        return "empty"
    if len(text) > ID_CHARACTERS_MAX:
        return "too long"
    return None if text.isprintable() else "not printable"


def is_email(text: str) -> bool:
    """Whether an id has the form of an e-mail address."""
    return _EMAIL.fullmatch(text) is not None


def signing_secret(value: object) -> Secret:
    """The secret that signs with HS256."""
    found = secret(value)
    if len(found.reveal().encode()) < _SIGNING_SECRET_BYTES_MIN:
        raise ValueError(
            f"this secret is too short to sign with; use {_SIGNING_SECRET_BYTES_MIN} random characters or more, in "
            "both programs"
        )
    return found


def percentage(value: object) -> int:
    """A whole percentage such as 50%, at most 1000%."""
    match = _PERCENTAGE.fullmatch(value) if isinstance(value, str) else None
    if not match or int(match[1]) > _PERCENT_MAX:
        raise ValueError(f"this is not a percentage; write a whole one from 0% to {_PERCENT_MAX}%, as in 50%")
    return int(match[1])


def command_word(text: str) -> str:
    """The program of a command, or one of its arguments. No text quotes it: it may be a secret."""
    if "\0" in text or not is_unicode(text):
        raise ValueError("this has a character that no argument of a program can have; remove it")
    return text


def token_url(text: str) -> str:
    """Where access tokens are issued. The secret is sent there, so only to this machine without TLS."""
    url = _split_url(text)
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(
            "this is not an https:// address; write one such as "
            "https://login.microsoftonline.com/TENANT/oauth2/v2.0/token"
        )
    if "@" in url.netloc:
        raise ValueError("this contains a user or a password; write those as client_id and client_secret")
    if "#" in text:
        raise ValueError("this has a fragment; remove it")
    if url.scheme == "http" and not _is_loopback(url.hostname):
        raise ValueError("the client's secret would be sent without TLS; write https://")
    return text


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def client_secret(value: object) -> Secret:
    """The secret of an OAuth client, which is sent in a form, so any text will do."""
    if not isinstance(value, str) or not is_unicode(value):
        raise ValueError("this secret is not text; put it in quotes")
    if not value.strip():
        raise ValueError("this secret is empty; write one, as in ${CLIENT_SECRET}")
    return Secret(value)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded. A variable of the environment that is not UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def api_version(text: str) -> str:
    """A version of Azure's API, as it is sent in the query `api-version`."""
    if not re.fullmatch(r"20[0-9]{2}-[01][0-9]-[0-3][0-9](-preview)?|v1|preview|latest", text):
        raise ValueError("this is not a version of Azure's API; write one such as 2024-10-21 or 2025-04-01-preview")
    return text


def base_url(text: str) -> str:
    """An upstream's address without a slash at its end.

    It decides where calls go and nothing else: credentials belong in `api_key`, and a query or fragment could not
    be joined with the path of a call.
    """
    url = _split_url(text)
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("this is not an http:// or https:// address; write one such as https://api.openai.com/v1")
    if "@" in url.netloc:
        raise ValueError("this contains a user or a password; remove it, and write the key as api_key: ${NAME}")
    if "?" in text or "#" in text:
        raise ValueError("this has a query or a fragment; write the address up to its path")
    return text.rstrip("/")


def proxy_url(value: object) -> Secret | Literal["none"]:
    """The address of an HTTP proxy, with its user and password if it wants them, or `none`."""
    if value == NO_PROXY:
        return NO_PROXY
    url = _split_url(value) if isinstance(value, str) else None
    if url is not None and url.scheme in ("https", "socks4", "socks4a", "socks5", "socks5h"):
        raise ValueError(
            f"proxies are spoken to in HTTP, not in {url.scheme}; write the http:// address of one that supports "
            "CONNECT, which upstreams with https:// are reached through"
        )
    if url is None or url.scheme != "http" or not url.hostname:
        raise ValueError(
            "this is not the address of a proxy; write http://host:port, http://user:password@host:port, or none"
        )
    if _has_cut_credentials(url):
        raise ValueError(
            "the user or the password in this URL has a character that ends it; write ${PASSWORD} for it alone, or "
            "percent-encode / ? # and @ in it"
        )
    if url.path not in ("", "/") or url.query:
        raise ValueError("this address has a path; write http://host:port alone")
    return Secret(str(value))


def upstream_header(text: str) -> str:
    """The name of a header that is sent to an upstream, in lower case."""
    name = text.lower()
    if name == "proxy-authorization":
        raise ValueError("this header is for the proxy; write its user and password into the URL in proxy")
    if name in _WRITTEN_HEADERS:
        raise ValueError(f"{text} belongs to the connection or to the body, and is written by the proxy; remove it")
    if not _UPSTREAM_HEADER.fullmatch(text):
        raise ValueError("this is not the name of a header; write one such as X-Tenant, in letters, digits, - and _")
    return name


def header_value(value: object) -> Secret:
    """The value of a header, which may be a secret."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not _HEADER_VALUE.fullmatch(text):
        raise ValueError(
            "this is not the value of a header; write text in ASCII on one line, without spaces around it, in quotes"
        )
    return Secret(text)


def certificates(content: bytes) -> str:
    """The certificates in a PEM file, without what is written around them."""
    found = b"\n".join(_CERTIFICATE.findall(content)).decode("ascii", "replace")
    if not found:
        raise ValueError(
            "this file has no certificate; write the path of a PEM file with -----BEGIN CERTIFICATE----- in it"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found)
    except (ssl.SSLError, ValueError):
        raise ValueError("a certificate in this file can't be read; copy the file again") from None
    return found


def database(text: str) -> str:
    """The URL of the ledger's database, without a driver (`sqlite+aiosqlite://` is an error).

    A URL of PostgreSQL may have several hosts with commas in between, as for its own programs.
    """
    url = _split_hosts(text)
    scheme = url.scheme if url else ""
    plain = {"postgres": "postgresql"}.get(scheme, scheme.partition("+")[0])
    if plain != scheme and plain in ("sqlite", "postgresql"):
        raise ValueError(f'"{scheme}://" is not supported; write {plain}:// (the proxy chooses the driver)')
    # sqlite:////var/lib/quotas.db names an absolute path. ":memory:" would lose the usage at a restart.
    file = text.removeprefix("sqlite:///")
    if scheme == "sqlite" and (file == text or file.strip("/") in ("", ":memory:")):
        raise ValueError("this names no file for SQLite; write sqlite:///quotas.db, or sqlite:////var/lib/quotas.db")
    if scheme == "postgresql" and not text.startswith("postgresql://"):
        raise ValueError("this names no PostgreSQL server; write postgresql://user:password@host/name")
    if scheme not in ("sqlite", "postgresql"):
        raise ValueError("this is not a database; write sqlite:///quotas.db, or postgresql://user:password@host/name")
    if scheme == "postgresql" and url and _has_cut_credentials(url):
        raise ValueError(
            "the user or the password in this URL has a character that ends it; write ${PASSWORD} for it alone, or "
            "percent-encode / ? # and @ in it"
        )
    if url and (wanted := parse_qs(url.query).get("target_session_attrs", ["any"])[0]) not in _SESSIONS_THAT_WRITE:
        raise ValueError(
            f"target_session_attrs={wanted} asks for a server that can't write; remove it, or write primary"
        )
    return text


# Of several hosts the primary is used, whatever of these is written: the other values ask for a standby.
_SESSIONS_THAT_WRITE = ("any", "primary", "read-write")


def _split_hosts(text: str) -> SplitResult | None:
    """The parts of a URL that may have several hosts, with the first one; None if one of them makes it no URL.

    Raises ValueError if one of several hosts is empty.
    """
    try:
        netloc = urlsplit(text).netloc
    except ValueError:
        return None
    user, at, hosts = netloc.rpartition("@")
    if "," in hosts and not all(host.partition(":")[0] for host in hosts.split(",")):
        raise ValueError("one of the hosts in this URL is empty; write host1,host2 without a comma before or after")
    urls = [_split_url(text.replace(netloc, f"{user}{at}{host}", 1)) for host in hosts.split(",")]
    return urls[0] if all(urls) else None


def _has_cut_credentials(url: SplitResult) -> bool:
    """Whether the password has a character that ends it.

    With postgresql://u:1/2@host a parser takes u for the host and 1 for the port.
    """
    behind = url.path or url.query
    return bool(url.fragment) or "@" in behind or url.netloc.count("@") > 1


def _split_url(text: str) -> SplitResult | None:
    """The parts of a URL, or None if the text is not one.

    Only visible ASCII is accepted, because `urlsplit` silently drops line ends: "https://a\\n/v1" would pass.
    """
    try:
        url = urlsplit(text) if _VISIBLE_ASCII.fullmatch(text) else None
        # Reading `port` raises ValueError for one above 65535; port 0 can't be connected to.
        return url if url is None or url.port is None or url.port > 0 else None
    except ValueError:
        return None


def key_digest(text: str) -> str:
    """The SHA-256 digest of a user's or admin's key in lower-case hex, from the key itself or from `sha256:…`."""
    if text.startswith("sha256:"):
        match = _SHA256.fullmatch(text)
        if not match:
            raise ValueError("this is not a digest; write sha256: and 64 hex digits")
        return match[1].lower()
    secret(text)
    if len(text) < KEY_CHARACTERS_MIN:
        raise ValueError(f"this key is too short; use one of {KEY_CHARACTERS_MIN} random characters or more")
    return digest(text)


def digest(key: str) -> str:
    """SHA-256 of a key, in hex. Keys are long and random, so a plain hash cannot be reversed by trying keys."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def secret(value: object) -> Secret:
    """A key that is sent in a header. Line ends and non-ASCII text are rejected: they would break the header."""
    if value == "":
        raise ValueError("this key is empty; write one, or remove it")
    if isinstance(value, str) and _VARIABLE.fullmatch(value):
        raise ValueError("this is the name of a variable and not its value; write ${NAME}, with braces")
    if not isinstance(value, str) or not _VISIBLE_ASCII.fullmatch(value):
        raise ValueError("this key can't be sent in a header; use visible ASCII characters without spaces")
    return Secret(value)
