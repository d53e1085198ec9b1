"""The IP address of a client, also behind proxies that are trusted to say it. Pure."""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from proxy.identity.keys import Headers
from proxy.policy.key import Network, is_in

IpAddress = IPv4Address | IPv6Address

_WITH_PORT = re.compile(r"([0-9.]+)(?::[0-9]{1,5})|\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")


def client_address(peer: str | None, headers: Headers, trusted: Sequence[Network]) -> str:
    """Who sent a request: the rightmost address in `X-Forwarded-For` that is no trusted proxy, else the `peer`.

    The header counts only if the peer itself is a trusted proxy. Each proxy adds the address that it got the request
    from at the right, so what stands to the left of the first untrusted address may be made up:

        peer 10.0.0.1, trusted 10.0.0.0/8, "X-Forwarded-For: 1.2.3.4, 192.0.2.7, 10.0.0.2"  →  192.0.2.7

    An entry may have a port, as Azure's gateways write it. The search stops at the first entry that is no address (a
    name, `unknown`), because nobody can say whether it stands for a trusted proxy. An empty text if the peer has no
    address (a Unix socket).
    """
    if not trusted or not is_in(parse_address(peer), trusted):
        return _shown(peer)
    for entry in reversed(",".join(headers.getall("x-forwarded-for", ())).split(",")):
        text = _without_port(entry.strip(" \t"))
        address = None if "%" in text else parse_address(text)
        if address is None:
            break
        if not is_in(address, trusted):
            return _shown(text)
    return _shown(peer)


def parse_address(text: str | None) -> IpAddress | None:
    """The address in a text; None if it is none. The zone of a link-local address, as in fe80::1%eth0, is dropped."""
    try:
        return None if text is None else ip_address(text.partition("%")[0])
    except ValueError:
        return None


def shared_address(text: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 network of 64 bits. Any other text is left as it is.

    A user of IPv6 usually has a whole /64 network, and could connect from another address of it each time.
    """
    address = parse_address(text)
    if isinstance(address, IPv6Address):
        # An IPv4 client of a dual-stack socket: ::ffff:192.0.2.1.
        return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))
    return text if address is None else str(address)


def _without_port(text: str) -> str:
    """The address of an entry such as 192.0.2.7:4711 or [2001:db8::1]:4711."""
    match = _WITH_PORT.fullmatch(text)
    return text if match is None else match[1] or match[2]


@lru_cache(maxsize=1024)  # all requests of a connection have the same peer
def _shown(text: str | None) -> str:
    """The address as it is logged: IPv4 as IPv4, also if a listener on [::] sees it as ::ffff:192.0.2.7."""
    address = parse_address(text)
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return text or "" if mapped is None else str(mapped)
