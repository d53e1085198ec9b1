"""A key narrows when, from where and for what its owner may call. It never widens."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.key import Key, is_in
from tests.builders import NOON

TEN = ip_network("10.0.0.0/8")
INSIDE, OUTSIDE = ip_address("10.0.0.7"), ip_address("192.0.2.7")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (Key("k"), None),
        (Key("k", expires_at=NOON + 1, networks=(TEN,)), None),
        # By a machine whose clock is ahead.
        (Key("k", revoked_at=NOON + 1), "revoked"),
        (Key("k", expires_at=NOON), "expired"),
        (Key("k", expires_at=NOON - 1), "expired"),
        (Key("k", revoked_at=NOON), "revoked"),
        (Key("k", revoked_at=NOON, expires_at=NOON), "revoked"),
        (Key("k", expires_at=0), "expired"),
    ],
)
def test_a_key_is_valid_until_it_expires_or_is_revoked(key, reason):
    """T6: from that millisecond on it is not."""
    assert key.why_invalid(NOON, INSIDE) == reason


@pytest.mark.parametrize(
    ("address", "networks", "found"),
    [
        ("10.0.0.7", ["10.0.0.0/8"], True),
        ("10.255.255.255", ["192.0.2.0/24", "10.0.0.0/8"], True),
        ("11.0.0.0", ["10.0.0.0/8"], False),
        ("192.0.2.7", ["192.0.2.7/32"], True),
        ("::ffff:10.0.0.7", ["10.0.0.0/8"], True),
        ("::ffff:11.0.0.7", ["10.0.0.0/8"], False),
        ("::ffff:10.0.0.7", ["::/0"], False),
        ("::10.0.0.7", ["10.0.0.0/8"], False),
        ("2001:db8::1", ["2001:db8::/32"], True),
        ("2001:db9::1", ["2001:db8::/32", "0.0.0.0/0"], False),
        ("10.0.0.7", [], False),
    ],
)
def test_an_address_is_in_a_network(address, networks, found):
    """IPv4 that is written as IPv6 is IPv4; otherwise the two never meet."""
    assert is_in(ip_address(address), [ip_network(network) for network in networks]) is found


def test_a_key_is_for_its_networks():
    """An address that is not known is in no network, but a key without networks is valid from everywhere."""
    key = Key("k", networks=(TEN,))
    assert [key.why_invalid(NOON, address) for address in (INSIDE, OUTSIDE, None)] == [
        None,
        "wrong network",
        "wrong network",
    ]
    assert Key("k").why_invalid(NOON, None) is None
    assert not is_in(None, [TEN])


@given(address=st.ip_addresses(v=4), network=st.ip_addresses(v=4), bits=st.integers(0, 32))
def test_a_network_has_the_addresses_that_begin_as_it_does(address, network, bits):
    """As a plain comparison of the leading bits says."""
    expected = int(address) >> (32 - bits) == int(network) >> (32 - bits)
    assert is_in(address, [ip_network((int(network) >> (32 - bits) << (32 - bits), bits))]) is expected
