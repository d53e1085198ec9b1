"""The client's address behind trusted proxies (T132)."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.identity.client_address import client_address, parse_address

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
PEER = "10.0.0.1"


def found(*values: str, peer: str | None = PEER) -> str:
    return client_address(peer, CIMultiDict([("X-Forwarded-For", value) for value in values]), TRUSTED)


@pytest.mark.parametrize(
    ("values", "address"),
    [
        ((), PEER),
        (("",), PEER),
        (("192.0.2.7",), "192.0.2.7"),
        (("192.0.2.7, 10.0.0.2",), "192.0.2.7"),
        (("1.2.3.4, 192.0.2.7, 10.0.0.2,10.0.0.3",), "192.0.2.7"),
        (("1.2.3.4, 192.0.2.7", "10.0.0.2"), "192.0.2.7"),
        (("1.2.3.4", "192.0.2.7"), "192.0.2.7"),
        (("192.0.2.7\t, fd00::1",), "192.0.2.7"),
        (("2001:db8::7",), "2001:db8::7"),
        (("::ffff:192.0.2.7",), "192.0.2.7"),
        (("1.2.3.4, 192.0.2.7:4711, 10.0.0.2:80",), "192.0.2.7"),  # with ports, as Azure's gateways write them
        (("[2001:db8::1]:4711",), "2001:db8::1"),
        (("[2001:db8::1]",), "2001:db8::1"),
        (("192.0.2.7, ::ffff:10.0.0.2",), "192.0.2.7"),
        (("10.1.1.1, 10.0.0.2",), PEER),
    ],
)
def test_it_is_the_rightmost_address_that_is_not_trusted(values, address):
    """T132: what stands to the left of it was sent by the client, who can write anything there."""
    assert found(*values) == address


@pytest.mark.parametrize(
    "bad",
    [
        *("unknown", "_hidden", "192.0.2.7:x", "2001:db8::1]:443", "box:443", "box", "10.0.0.1/8", "10.0.0"),
        *(
            "fd00::1%eth0",
            "0x0a000001",
            "010.0.0.1",
            "10.0.0.2 ",
            "٣.2.3.4",
            "10.0.0.2\u00a0",
            "\udcff",
            "\x00",
            "-1",
        ),
    ],
)
def test_the_search_stops_at_what_is_no_address(bad):
    """T132: it could stand for a proxy or not. The entries to its left count for nothing."""
    if bad.strip(" ") != bad:
        bad = f"x{bad}"
    assert found(f"192.0.2.7, {bad}") == PEER
    assert found(f"192.0.2.7, {bad}, 10.0.0.2") == PEER
    assert found(f"{bad}, 192.0.2.7, 10.0.0.2") == "192.0.2.7"


@pytest.mark.parametrize("peer", ["192.0.2.1", "2001:db8::1", "127.0.0.1", "", "box"])
def test_the_header_of_others_is_not_believed(peer):
    """T132: whoever connects without a trusted proxy could write any address there."""
    assert found("1.2.3.4", peer=peer) == peer
    assert client_address(peer, CIMultiDict({"x-forwarded-for": "1.2.3.4"}), []) == peer


def test_a_peer_has_one_form():
    """A listener on [::] sees IPv4 as IPv6; a Unix socket has no address."""
    assert found("192.0.2.7", peer="::ffff:10.0.0.1") == "192.0.2.7"
    assert found(peer="::ffff:192.0.2.1") == "192.0.2.1"
    assert found("192.0.2.7", peer=None) == ""
    assert found(peer="fe80::1%eth0") == "fe80::1%eth0"
    assert parse_address("fe80::1%eth0") == ip_address("fe80::1")
    assert parse_address(None) is parse_address("box") is None


ENTRIES = st.sampled_from(["10.0.0.2", "192.0.2.7", "::ffff:10.9.9.9", "unknown", "1.2.3.4:5", "", " "]) | st.text(
    st.characters(exclude_categories=()), max_size=8
)


@given(values=st.lists(st.lists(ENTRIES, max_size=5).map(",".join), max_size=3), last=st.ip_addresses())
def test_a_client_cannot_choose_its_address(values, last):
    """T132: whatever it sends, the address that the trusted proxy adds is the one that counts, and nothing raises."""
    address = found(*values, str(last))
    if parse_address(str(last)) is not None and not any(
        last in network for network in TRUSTED if network.version == last.version
    ):
        mapped = getattr(last, "ipv4_mapped", None)
        if mapped is None:
            assert address == str(last)
    assert found(*values) == PEER or parse_address(found(*values)) is not None
