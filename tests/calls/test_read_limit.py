"""How many requests for stored responses a user may send. What its client sees is in test_stored_responses.py."""

from contextlib import ExitStack
from zoneinfo import ZoneInfo

import pytest

from proxy.calls.read_limit import READS_AT_ONCE_MAX, READS_PER_MINUTE_MAX, ReadLimit
from proxy.errors import TooManyReads
from tests.stage import Clock


def test_only_the_users_of_the_last_minute_are_remembered() -> None:
    """However many users come and go, and if the clock is set back."""
    clock, zone = Clock(), ZoneInfo("UTC")
    limit = ReadLimit(clock)

    def read(user: str) -> None:
        with limit.read(user, zone=zone):
            pass

    for number in range(5000):
        clock.ms += 100
        read(f"user-{number}")
        assert len(limit) <= 600
    for _ in range(READS_PER_MINUTE_MAX):
        read("alice")
    clock.ms -= 3_600_000
    read("alice")
    assert len(limit) <= 601
    clock.ms += 3_660_000
    read("bob")
    assert len(limit) == 1


def test_a_refused_read_counts_for_nothing() -> None:
    """Neither among those at once nor among those of a minute; a read that fails frees its place."""
    clock, zone = Clock(), ZoneInfo("UTC")
    limit = ReadLimit(clock)
    with ExitStack() as reads:
        for _ in range(READS_AT_ONCE_MAX):
            reads.enter_context(limit.read("alice", zone=zone))
        for _ in range(READS_PER_MINUTE_MAX):
            with pytest.raises(TooManyReads), limit.read("alice", zone=zone):
                pass
    for _ in range(READS_PER_MINUTE_MAX - READS_AT_ONCE_MAX):
        with pytest.raises(ZeroDivisionError), limit.read("alice", zone=zone):
            raise ZeroDivisionError
    with pytest.raises(TooManyReads), limit.read("alice", zone=zone):
        pass
