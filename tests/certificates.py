"""Certificates for TLS servers of tests, made without another library: ECDSA on P-256 (FIPS 186-5), X.509 (RFC 5280).

The numbers that have to be secret are not: these keys must protect nothing.

    authority = Authority("Test CA")
    certificate, key = authority.issue("127.0.0.1")     # PEM
"""

import base64
import hashlib
import ssl
from ipaddress import ip_address
from pathlib import Path

# The curve y² = x³ - 3x + b over the integers modulo P, and its generator G of the prime order N.
_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)
_Point = tuple[int, int] | None

_COMMON_NAME = "2.5.4.3"
_ECDSA_SHA256 = "1.2.840.10045.4.3.2"
_EC_KEY, _P256 = "1.2.840.10045.2.1", "1.2.840.10045.3.1.7"
_SUBJECT_KEY, _KEY_USAGE, _ALT_NAME, _BASIC, _AUTHORITY_KEY = (f"2.5.29.{n}" for n in (14, 15, 17, 19, 35))


class Authority:
    """An authority with a certificate of its own, in `pem`."""

    def __init__(self, name: str) -> None:
        self._name = _name(name)
        # The name of its file in a folder of OpenSSL, which looks for the subject in lower case.
        self.subject_hash = hashlib.sha1(_common_name(name.lower())).digest()[3::-1].hex()
        self._key = _number(name)
        self.pem = _pem("CERTIFICATE", self._certificate(self._name, self._key, host=None))

    def issue(self, host: str) -> tuple[str, str]:
        """A certificate for a server with this name or address, and its key."""
        key = _number(host)
        public = _public(key)
        private = _seq(
            _int(1),
            _tlv(0x04, key.to_bytes(32, "big")),
            _tlv(0xA0, _oid(_P256)),
            _tlv(0xA1, _bits(public)),
        )
        return _pem("CERTIFICATE", self._certificate(_name(host), key, host=host)), _pem("EC PRIVATE KEY", private)

    def server(self, host: str, folder: Path) -> ssl.SSLContext:
        """What a server with this name or address needs for TLS. Its files are written into the folder."""
        (folder / "certificate.pem").write_text(self.issue(host)[0])
        (folder / "key.pem").write_text(self.issue(host)[1])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        return context

    def _certificate(self, subject: bytes, key: int, *, host: str | None) -> bytes:
        extensions = [
            _extension(_SUBJECT_KEY, _tlv(0x04, _key_id(key))),
            _extension(_AUTHORITY_KEY, _seq(_tlv(0x80, _key_id(self._key)))),
        ]
        if host is None:
            extensions += [
                _extension(_BASIC, _seq(_tlv(0x01, b"\xff")), is_critical=True),
                _extension(_KEY_USAGE, _tlv(0x03, b"\x01\x06"), is_critical=True),  # sign certificates and lists
            ]
        else:
            extensions.append(_extension(_ALT_NAME, _seq(_alternative_name(host))))
        algorithm = _seq(_oid(_ECDSA_SHA256))
        to_sign = _seq(
            _tlv(0xA0, _int(2)),  # version 3
            _int(_number(f"serial {key}") >> 128),
            algorithm,
            self._name,
            _seq(_tlv(0x17, b"200101000000Z"), _tlv(0x17, b"491231235959Z")),
            subject,
            _seq(_seq(_oid(_EC_KEY), _oid(_P256)), _bits(_public(key))),
            _tlv(0xA3, _seq(*extensions)),
        )
        return _seq(to_sign, algorithm, _bits(_sign(self._key, to_sign)))


def _number(text: str) -> int:
    """A number that belongs to this text, in the range of private keys."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") % (_N - 1) + 1


def _add(one: _Point, other: _Point) -> _Point:
    if one is None or other is None:
        return one or other
    (x1, y1), (x2, y2) = one, other
    if x1 == x2 and (y1 + y2) % _P == 0:
        return None
    slope = (3 * x1 * x1 - 3) * pow(2 * y1, -1, _P) if one == other else (y2 - y1) * pow(x2 - x1, -1, _P)
    x = (slope * slope - x1 - x2) % _P
    return x, (slope * (x1 - x) - y1) % _P


def _times(factor: int) -> tuple[int, int]:
    """`factor` times the generator."""
    found: _Point = None
    doubled: _Point = _G
    while factor:
        found = _add(found, doubled) if factor & 1 else found
        doubled, factor = _add(doubled, doubled), factor >> 1
    assert found is not None
    return found


def _public(key: int) -> bytes:
    x, y = _times(key)
    return b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")


def _key_id(key: int) -> bytes:
    return hashlib.sha1(_public(key)).digest()


def _sign(key: int, data: bytes) -> bytes:
    digest = int.from_bytes(hashlib.sha256(data).digest(), "big")
    once = _number(f"{key} {digest}")
    r = _times(once)[0] % _N
    return _seq(_int(r), _int(pow(once, -1, _N) * (digest + r * key) % _N))


def _tlv(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = (length.bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + length.to_bytes(size, "big") + content


def _seq(*items: bytes) -> bytes:
    return _tlv(0x30, b"".join(items))


def _int(number: int) -> bytes:
    return _tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _bits(content: bytes) -> bytes:
    return _tlv(0x03, b"\0" + content)


def _oid(dotted: str) -> bytes:
    first, second, *others = map(int, dotted.split("."))
    content = bytearray((40 * first + second,))
    for number in others:
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.insert(0, number & 0x7F | 0x80)
        content += bytes(digits)
    return _tlv(0x06, bytes(content))


def _name(text: str) -> bytes:
    return _seq(_common_name(text))


def _common_name(text: str) -> bytes:
    return _tlv(0x31, _seq(_oid(_COMMON_NAME), _tlv(0x0C, text.encode())))


def _alternative_name(host: str) -> bytes:
    try:
        return _tlv(0x87, ip_address(host).packed)
    except ValueError:
        return _tlv(0x82, host.encode())


def _extension(oid: str, content: bytes, *, is_critical: bool = False) -> bytes:
    return _seq(_oid(oid), *([_tlv(0x01, b"\xff")] if is_critical else []), _tlv(0x04, content))


def _pem(label: str, der: bytes) -> str:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n"
