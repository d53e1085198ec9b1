"""What a worker is told of what it shares with the others."""

import os
import socket

import pytest

from proxy.config.loader import Address
from proxy.server import InheritedResources
from proxy.workers import address_of, listen, receive

WHOLE = InheritedResources("me", "sqlite:///q.db", api=(3, 4), admin=(5,), lock=6, metrics="/tmp/x", dead=("you",))


@pytest.mark.parametrize("share", [WHOLE, InheritedResources("me", "postgresql://u:secret@h/d")])
def test_what_was_written_is_received(share: InheritedResources) -> None:
    """To the last field, through a socket, however it is cut into pieces."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = share.to_line()
        ours.send(line[:7])
        ours.send(line[7:])
        assert receive(theirs) == share


def test_what_another_release_wrote_is_received() -> None:
    """A restart starts the code that is on the disk by then: what it doesn't know means nothing to it."""
    assert InheritedResources.from_line(
        b'{"owner": "me", "database": "d", "api": [3], "later": 1}'
    ) == InheritedResources("me", "d", api=(3,))


def test_who_has_no_parent_is_told() -> None:
    """It died before it had written anything."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(OSError, match="parent"):
        receive(theirs)


def test_the_numbers_are_of_all_that_is_inherited() -> None:
    """Also the lock, where there is one."""
    assert WHOLE.descriptors == (3, 4, 5, 6)
    assert InheritedResources("me", "d", api=(3,)).descriptors == (3,)


def test_a_host_may_stand_for_several_addresses() -> None:
    """Each of them is listened at; the first is shown."""
    [only] = listen(Address("127.0.0.1", 0))
    with only:
        assert address_of([only]) == Address("127.0.0.1", only.getsockname()[1])
        socket.create_connection(only.getsockname()).close()
        assert not os.get_inheritable(only.fileno())
    assert address_of([]) is None


def test_a_port_that_is_taken_leaves_nothing_open() -> None:
    """Where a host has several addresses, those that were free are given back."""
    before = os.listdir("/dev/fd")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen(Address("localhost", taken.getsockname()[1]))
    assert os.listdir("/dev/fd") == before
