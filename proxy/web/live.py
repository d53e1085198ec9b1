"""Makes and connects the parts of a process that show what happens live, and note what needs attention.

calls ─▶ Activity ─▶ Events ─▶ streams of this process
ledger ─┘    │          └────▶ Exchange ◀─▶ the other processes
             └─▶ Notices ─▶ refusals and crossings in the database
"""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from proxy import __version__
from proxy.calls.activity import Activity
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.ledger.ledger import Ledger
from proxy.ledger.notices import Notices
from proxy.ledger.replicas import Replicas
from proxy.ledger.store import Store
from proxy.policy.policy import Policy
from proxy.policy.quota import CounterKey, Quota, user_of
from proxy.upstreams.routing import Cooldowns
from proxy.upstreams.slots import Load, Slots
from proxy.web.events import TICK_S, Events
from proxy.web.exchange import EXCHANGE_S, Exchange

_NOTICES_EVERY_S = 1.0
_CLEAN_EVERY_S = 60.0


class Job(NamedTuple):
    """Something that has to be run again and again, with a pause of `every_s` seconds."""

    name: str
    run: Callable[[], Awaitable[object]]
    every_s: float


@dataclass(frozen=True, slots=True)
class Live:
    """What happens in one process."""

    activity: Activity
    events: Events
    exchange: Exchange
    notices: Notices
    _status: "_Status"

    @classmethod
    def of(cls, store: Store, ledger: Ledger, policies: Policies[Snapshot]) -> "Live":
        """The parts of the process to which this ledger belongs."""
        activity = Activity(now=ledger.now, quota_of=lambda key, at: quota_in(policies.current.policy, key, at))
        ledger.on_replies(activity.replied)
        status = _Status(ledger, policies, activity)
        events = Events(activity, owner=ledger.owner, now=ledger.now, health=status.health)
        replicas = Replicas(store, owner=ledger.owner, now=ledger.now)
        return cls(
            activity,
            events,
            Exchange(events, replicas, now=ledger.now, status=status.whole),
            Notices(store, now=ledger.now),
            status,
        )

    def show_upstreams(self, cooldowns: Cooldowns, slots: Slots) -> None:
        """Show these in the status, with the last failure of each upstream."""
        self._status.cooldowns, self._status.slots = cooldowns, slots

    def jobs(self) -> tuple[Job, ...]:
        """What has to be run again and again."""
        return (
            Job("events", self._tick, TICK_S),
            Job("exchange events", self.exchange.run, EXCHANGE_S),
            Job("note refusals", self._write_notices, _NOTICES_EVERY_S),
            Job("delete old notices", self.notices.clean, _CLEAN_EVERY_S),
        )

    async def close(self) -> None:
        """Note what is left. The jobs must have ended."""
        self.events.tick()
        refused, crossed = self.activity.take_notices(is_last=True)
        self.notices.add(refused, crossed)
        await self.notices.write()

    async def _tick(self) -> None:
        self.events.tick()

    async def _write_notices(self) -> None:
        self.notices.add(*self.activity.take_notices())
        await self.notices.write()


class _Status:
    """The status of a process, as JSON values."""

    def __init__(self, ledger: Ledger, policies: Policies[Snapshot], activity: Activity) -> None:
        self.cooldowns = Cooldowns()
        self.slots = Slots()
        self._ledger = ledger
        self._policies = policies
        self._activity = activity
        self._started_at = ledger.now()

    def health(self) -> dict[str, object]:
        """The part of which each change is an event."""
        reload = self._policies.last_reload
        return {
            "replica": self._ledger.owner,
            "ledger": "ok" if self._ledger.is_healthy else "unavailable",
            "policy": self._policies.current.policy.hash,
            "reloaded_at": reload.at,
            "reload_mistakes": len(reload.mistakes),
        }

    def whole(self) -> dict[str, object]:
        """What the process writes every few seconds."""
        now, snapshot = self._ledger.now(), self._policies.current
        cooldowns, last = self.cooldowns.until(now), self.cooldowns.last
        loads = self.slots.loads()
        return {
            **self.health(),
            "version": __version__,
            "started_at": self._started_at,
            "commit_ms": self._ledger.commit_ms,
            "calls_in_flight": len(self._activity.calls),
            "upstreams": [
                {
                    "name": name,
                    "cooldown_until_at": cooldowns.get(name),
                    "last_failure": None if name not in last else asdict(last[name]),
                    **asdict(loads.get(name, Load())),
                }
                for name in snapshot.catalog.upstreams
            ],
        }


def quota_in(policy: Policy, key: CounterKey, at: int) -> Quota | None:
    """The quota to which a counter belongs, with the limits that are in force for it at this instant (ms)."""
    subject, quota_id = key
    found = policy.quotas.get(quota_id)
    if found is None or not policy.grants:
        return found
    return policy.bound(found).for_user(user_of(subject)).at(at).quotas[0]
