"""How many requests for stored responses a user may send.

No quota counts them, but the operator's rate limit at the upstream does.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from zoneinfo import ZoneInfo

from proxy.errors import TooManyReads
from proxy.policy.status import seconds_up
from proxy.policy.windows import rfc3339

# How many requests for stored responses one user may have open at a time, and begin within any 60 seconds. An agent
# reads a response once or twice; a program that reads in a loop would use the operator's rate limit at the upstream.
READS_AT_ONCE_MAX = 4
READS_PER_MINUTE_MAX = 60
_MINUTE_MS = 60_000
# How long a read that is refused because of others in progress should wait, in seconds. Most take less than that.
_BUSY_S = 1


class ReadLimit:
    """Bounds the requests for stored responses of each user, in this process. `now` gives ms since 1970.

    It remembers the users of the last minute only. Every request counts, also for ids that do not exist, but not
    those that it refuses.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self._open: Counter[str] = Counter()  # by user
        self._begun: dict[str, deque[int]] = {}  # when requests began, by user; the latest user is the last

    def __len__(self) -> int:
        """How many users it remembers."""
        return len(self._begun)

    @contextmanager
    def read(self, user: str, *, zone: ZoneInfo) -> Iterator[None]:
        """Within the block a request of this user is open. Raises TooManyReads.

        Example with 60 a minute: the first of 60 requests began at 12:00:10. The next one is refused until 12:01:10,
        and `Retry-After` says how many seconds that is from now.
        """
        now = self._now()
        begun = self._recent(user, now)
        self._forget_inactive_users(now)
        if len(begun) >= READS_PER_MINUTE_MAX:
            raise _too_often(begun[0] + _MINUTE_MS, now=now, zone=zone)
        if self._open[user] >= READS_AT_ONCE_MAX:
            raise TooManyReads(
                f"You may have {READS_AT_ONCE_MAX} requests for stored responses open at once. Try again when "
                "one has ended.",
                headers={"retry-after": str(_BUSY_S)},
                members={"retry_after": _BUSY_S},
            )
        begun.append(now)
        self._begun.pop(user, None)
        self._begun[user] = begun  # again, as the last
        self._open[user] += 1
        try:
            yield
        finally:
            self._open -= Counter([user])  # this also removes users without an open request

    def _recent(self, user: str, now: int) -> deque[int]:
        """When this user's requests of the last minute began."""
        begun = self._begun.get(user, deque())
        while begun and not _is_recent(begun[0], now):
            begun.popleft()
        return begun

    def _forget_inactive_users(self, now: int) -> None:
        """Forget users whose latest request is not of the last minute. The user whose request is oldest is first."""
        while self._begun:
            user, begun = next(iter(self._begun.items()))
            if begun and _is_recent(begun[-1], now):
                return
            del self._begun[user]


def _is_recent(instant: int, now: int) -> bool:
    """Whether an instant is in the last minute. A clock that was set back leaves instants in the future."""
    return now - _MINUTE_MS < instant <= now


def _too_often(free_at: int, *, now: int, zone: ZoneInfo) -> TooManyReads:
    """The error until `free_at` (ms), with the same members as the refusal of a quota."""
    wait_s = max(1, seconds_up(free_at - now))
    return TooManyReads(
        f"You may send {READS_PER_MINUTE_MAX} requests for stored responses a minute. Try again in {wait_s} s.",
        headers={"retry-after": str(wait_s)},
        members={"reset_at": rfc3339(free_at, zone), "resets_at": seconds_up(free_at), "retry_after": wait_s},
    )
