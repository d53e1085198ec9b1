"""What a key narrows: when, from where, and for which of its owner's groups and models it is valid.

A key never widens what its owner may do. Its calls always count for the owner. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from proxy.policy.quota import Globs

Network = IPv4Network | IPv6Network

# A tag is recorded with every call, so it is short.
TAG_CHARACTERS_MAX = 64

# Why a key is not valid now, as the log says it. The caller gets the same sentence for all of them.
Invalid = Literal["expired", "revoked", "wrong network"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a user. `id` names it in lists and in the log, and says nothing about the secret.

    Instants are in ms. `expires_at` and `revoked_at` are None if that never happens. `groups` are those of the
    owner's groups that may admit its calls, and `models` those that it may call; None: all. `networks` are where its
    requests may come from; none: from everywhere. `tag` is recorded with its calls. If `takes_tag_header`, a request
    may send another one in `X-Quota-Tag`.
    """

    id: str
    label: str = ""
    groups: tuple[str, ...] | None = None
    models: Globs | None = None
    networks: tuple[Network, ...] = ()
    expires_at: int | None = None
    revoked_at: int | None = None
    tag: str = ""
    takes_tag_header: bool = False

    def why_invalid(self, now: int, address: IPv4Address | IPv6Address | None) -> Invalid | None:
        """Why it is not valid now from this address; None if it is. An unknown address is in no network."""
        # Whenever that was: the clock of the machine that revoked it may be ahead of this one's.
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        if self.networks and not is_in(address, self.networks):
            return "wrong network"
        return None


def is_in(address: IPv4Address | IPv6Address | None, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of the networks. An IPv4 address that is written as IPv6 counts as IPv4.

    Example: a listener on [::] sees 10.0.0.7 as ::ffff:10.0.0.7.
    """
    if address is None:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return any((mapped or address) in network for network in networks)
