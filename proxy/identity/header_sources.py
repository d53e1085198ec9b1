"""Reads who the user is from the headers of a trusted user interface or proxy.

Such a source has a key of its own and the networks that it connects from. Its headers count only in a request that
has both. What it sends is checked strictly, because a doubled or damaged header could make one user another: every
header of the source may be there at most once, and ids are compared exactly, as the source writes them.

If the source signs a header (HS256, RFC 7515 and RFC 7519), its plain headers count for nothing. The algorithm and
the secret are those of the source's configuration; nothing in the token's own header chooses them.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import jwt

from proxy.config.loader import HeaderSource, SignedHeader
from proxy.config.values import is_email, why_no_id
from proxy.errors import InvalidKey
from proxy.identity.keys import Headers
from proxy.policy.key import is_in

_TOKEN_CHARACTERS_MAX = 8192
_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# How far the clocks of the source and of the proxy may differ, in seconds.
_LEEWAY_S = 30
# Open WebUI's tokens are valid for 300 s. One that is valid for long is as good as a key, so it is refused.
_LIFETIME_S_MAX = 3600
_TIME_MAX = 10**12
_REQUIRED = ["exp", "iat", "iss", "sub"]
# Times are checked below, by the clock that the proxy is given.
_OPTIONS: Any = {"require": _REQUIRED, "verify_exp": False, "verify_iat": False, "verify_nbf": False}


@dataclass(frozen=True, slots=True)
class SentUser:
    """The user that a source names: the id there, and the groups of the policy that this source gives the user."""

    id: str
    email: str | None
    groups: frozenset[str]


def is_from(source: HeaderSource, peer: IPv4Address | IPv6Address | None) -> bool:
    """Whether a connection from this address may be one of the source. None: the address is not known."""
    return not source.networks or is_in(peer, source.networks)


def sent_user(source: HeaderSource, headers: Headers, now: int) -> SentUser:
    """The user that these headers of the source name. `now` is in ms.

    Raises InvalidKey with the reason for the log.
    """
    if source.signed is None:
        assert source.user is not None, "the schema demands user or signed"
        id = _required(_value(headers, source.user, "user header"), "user header")
        email = _optional(_value(headers, source.email, "email header"), "email header")
        listed = (_value(headers, source.groups, "groups header") or "").split(",")
        names = [name.strip(" \t") for name in listed]
    else:
        claims = _claims(source.signed, headers, now)
        id = _required(_text(claims.get(source.signed.user), "claim of the user"), "claim of the user")
        email = _optional(_text(claims.get(source.signed.email), "claim of the e-mail"), "claim of the e-mail")
        names = _names(claims.get(source.signed.groups) if source.signed.groups else None)
    if source.emails_verified and email is not None and is_email(email):
        names = [*names, email]
    return SentUser(id, email, frozenset(source.map[name] for name in names if name in source.map))


def refused(reason: str) -> InvalidKey:
    """The 401 for a request that has the key of a source and names no user who may call. Only the log has the reason.

    The text is the same for all reasons, because it reaches the source's users.
    """
    return InvalidKey(
        "This request does not name a user who may call. Ask the operator of this proxy, whose log says why.",
        reason=reason,
    )


def _value(headers: Headers, name: str | None, what: str) -> str | None:
    """The value of a header that may be there once; None if it is not there."""
    values = [] if name is None else headers.getall(name, [])
    if len(values) > 1:
        raise refused(f"{what} sent twice")
    if not values:
        return None
    value = values[0].strip(" \t")
    if not value.isprintable():  # bytes that are not UTF-8 arrive as surrogates, which are not printable
        raise refused(f"{what} not printable")
    return value


def _required(value: str | None, what: str) -> str:
    if value is None:
        raise refused(f"{what} missing")
    reason = why_no_id(value)
    if reason is not None:
        raise refused(f"{what} {reason}")
    return value


def _optional(value: str | None, what: str) -> str | None:
    return _required(value, what) if value else None


def _text(claim: object, what: str) -> str | None:
    if claim is not None and not isinstance(claim, str):
        raise refused(f"{what} not text")
    return claim


def _names(claim: object) -> list[str]:
    """The groups in a claim, which is a list of texts."""
    if claim is None:
        return []
    if not isinstance(claim, list) or not all(isinstance(name, str) for name in claim):
        raise refused("claim of the groups not a list")
    return claim


def _claims(signed: SignedHeader, headers: Headers, now: int) -> dict[str, Any]:
    """The claims of the one valid token in these headers."""
    token = _required_token(_value(headers, signed.header, "signed header"))
    try:
        claims: dict[str, Any] = jwt.decode(
            token, signed.secret.reveal(), algorithms=["HS256"], issuer=signed.issuer, options=_OPTIONS
        )
    # Deeply nested JSON in the token's header is parsed before the signature is verified.
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise refused(f"signed header: {_WHY.get(type(error), 'malformed')}") from None
    reason = _why_untimely(claims, now / 1000)
    if reason is not None:
        raise refused(f"signed header: {reason}")
    return claims


# What the log says for the errors of the library, whose own texts quote the token.
_WHY: dict[type[Exception], str] = {
    jwt.InvalidSignatureError: "wrong signature",
    jwt.InvalidAlgorithmError: "wrong algorithm",
    jwt.InvalidIssuerError: "wrong issuer",
    jwt.InvalidAudienceError: "for another audience",
    jwt.MissingRequiredClaimError: "claim missing",
}


def _required_token(token: str | None) -> str:
    if not token:
        raise refused("signed header missing" if token is None else "signed header empty")
    if len(token) > _TOKEN_CHARACTERS_MAX:
        raise refused("signed header too long")
    if not _TOKEN.fullmatch(token):
        raise refused("signed header: malformed")
    return token


def _why_untimely(claims: dict[str, Any], now_s: float) -> str | None:
    """Why a token is not valid at this time (RFC 7519 §4.1.4 to §4.1.6); None if it is."""
    not_before = claims.get("nbf", claims["iat"])
    issued, expires = claims["iat"], claims["exp"]
    if not all(_is_time(at) for at in (issued, not_before, expires)):
        return "no time"
    if expires + _LEEWAY_S <= now_s:
        return "expired"
    if max(issued, not_before) > now_s + _LEEWAY_S:
        return "not valid yet"
    if not 0 < expires - issued <= _LIFETIME_S_MAX:
        return "valid for too long"
    return None


def _is_time(value: object) -> bool:
    """Whether a claim is a time in seconds, and not NaN, infinite or a number with hundreds of digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TIME_MAX
