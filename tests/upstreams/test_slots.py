"""Slots of upstreams: never more than the limit, none lost, and users take turns."""

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstreams.slots import Load, Slots
from tests.stage import until

BOX = "box"
LONG = 1000.0  # seconds that no test waits


def _slots(limit: int, *taken_by: str) -> Slots:
    """The slots of one upstream, and who has some of them."""
    slots = Slots()
    slots.set_limits({BOX: limit})
    for user in taken_by:
        slots.take(BOX, user)
    return slots


class Queue:
    """Calls that wait. `served` has those that got a slot, in this order."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.served: list[str] = []
        self.tasks: dict[str, asyncio.Task[str | None]] = {}

    async def add(self, *calls: str, names: tuple[str, ...] = (BOX,)) -> None:
        """Let calls wait. The name of a call begins with that of its user: `ann 2`."""
        for call in calls:
            before = self._waiting
            self.tasks[call] = asyncio.get_running_loop().create_task(self._wait(call, names))
            await until(lambda: self._waiting > before)  # noqa: B023

    @property
    def _waiting(self) -> int:
        return sum(load.waiting for load in self.slots.loads().values())

    async def _wait(self, call: str, names: tuple[str, ...]) -> str | None:
        name = await self.slots.wait(names, call.split()[0], wait_s=LONG)
        self.served.append(call)
        return name

    async def give_back(self, *users: str) -> list[str]:
        """Give a slot of each of these users back. Returns all calls that were served until now."""
        for user in users:
            self.slots.give_back(BOX, user)
            await asyncio.sleep(0)
        return self.served

    async def cancel(self, *calls: str) -> None:
        """Cancel these calls, and wait until they have left."""
        for call in calls:
            self.tasks[call].cancel()
        await asyncio.gather(*(self.tasks[call] for call in calls), return_exceptions=True)


async def test_an_upstream_is_full_when_all_slots_are_taken() -> None:
    """And no longer when one is given back. Without a limit it never is."""
    slots = _slots(2, "ann", "bob")
    assert slots.is_full(BOX)
    slots.give_back(BOX, "ann")
    assert not slots.is_full(BOX)
    assert not slots.is_full("other")
    assert slots.loads()[BOX] == Load(in_flight=1)


async def test_the_single_call_of_a_user_comes_before_the_many_of_another() -> None:
    """Ann has all 16 slots and 48 calls that wait. Bob's call came last and is the next."""
    queue = Queue(_slots(16, *["ann"] * 16))
    await queue.add(*(f"ann {n}" for n in range(48)))
    await queue.add("bob")
    assert await queue.give_back("ann", "ann") == ["bob", "ann 0"]
    await queue.cancel(*(f"ann {n}" for n in range(1, 48)))


async def test_users_take_turns_and_the_calls_of_one_stay_in_order() -> None:
    """Each user who waits gets a slot before another gets a second one."""
    queue = Queue(_slots(1, "cem"))
    await queue.add("ann 1", "ann 2", "ann 3", "bob 1", "bob 2", "cem 1")
    served = await queue.give_back("cem", "ann", "bob", "cem", "ann", "bob")
    assert served == ["ann 1", "bob 1", "cem 1", "ann 2", "bob 2", "ann 3"]


async def test_a_user_who_comes_again_and_again_does_not_overtake() -> None:
    """Bob's calls come one by one, each after the one before it has ended. Ann's call is overtaken by one alone."""
    queue = Queue(_slots(1, "ann"))
    await queue.add("ann 1", "ann 2", "bob 1")
    assert await queue.give_back("ann") == ["bob 1"]
    queue.slots.give_back(BOX, "bob")
    await queue.add("bob 2")
    assert await queue.give_back("ann") == ["bob 1", "ann 1", "bob 2"]
    await queue.cancel("ann 2")


async def test_a_call_that_got_no_slot_in_time_leaves_the_queue() -> None:
    """The others keep their places."""
    slots = _slots(1, "ann")
    assert await slots.wait([BOX], "bob", wait_s=0.001) is None
    assert slots.loads()[BOX] == Load(in_flight=1, waiting=0)
    slots.give_back(BOX, "ann")
    assert not slots.is_full(BOX)


async def test_a_slot_that_comes_in_the_last_moment_is_taken() -> None:
    """The time is over and a slot is handed to the call, before the call runs again."""
    slots = _slots(1, "ann")
    loop = asyncio.get_running_loop()
    waiting = loop.create_task(slots.wait([BOX], "bob", wait_s=0.001))
    await until(lambda: slots.loads()[BOX].waiting == 1)
    begun = loop.time()
    while loop.time() < begun + 0.002:
        pass  # blocks the loop until the time is over
    loop.call_soon(slots.give_back, BOX, "ann")  # runs before the timer, which is overdue
    assert await waiting == BOX
    assert slots.loads()[BOX] == Load(in_flight=1)


async def test_a_slot_is_not_handed_to_a_call_that_is_cancelled() -> None:
    """Neither if it was cancelled just before, nor if it is cancelled before it runs with its slot."""
    queue = Queue(_slots(1, "cem"))
    await queue.add("ann", "bob", "dan")
    queue.tasks["ann"].cancel()
    queue.slots.give_back(BOX, "cem")  # to bob: ann's task has not run yet
    queue.tasks["bob"].cancel()  # it has not run yet either
    await asyncio.wait(queue.tasks.values())
    assert queue.served == ["dan"]
    assert queue.slots.loads()[BOX] == Load(in_flight=1, waiting=0)


async def test_a_call_waits_for_several_upstreams_and_takes_one_slot() -> None:
    """The first that is free. The slot of the other is for the next call."""
    slots = _slots(1, "ann")
    slots.set_limits({"cloud": 1})
    slots.take("cloud", "ann")
    queue = Queue(slots)
    await queue.add("bob", names=(BOX, "cloud"))
    await queue.add("cem", names=("cloud",))
    slots.give_back("cloud", "ann")
    assert await queue.tasks["bob"] == "cloud"
    assert slots.loads() == {BOX: Load(1, 0), "cloud": Load(1, 1)}
    slots.give_back(BOX, "ann")
    slots.give_back("cloud", "bob")
    assert await queue.tasks["cem"] == "cloud"
    assert slots.loads() == {BOX: Load(0, 0), "cloud": Load(1, 0)}


@pytest.mark.parametrize(("limit", "served"), [(3, ["ann", "bob"]), (None, ["ann", "bob", "cem"])])
async def test_a_raised_limit_serves_calls_that_wait(limit: int | None, served: list[str]) -> None:
    """At once, not when the next call ends."""
    queue = Queue(_slots(1, "dan"))
    await queue.add("ann", "bob", "cem")
    queue.slots.set_limits({BOX: limit, "other": 5})
    await asyncio.sleep(0)
    assert queue.served == served
    await queue.cancel(*queue.tasks.keys() - set(served))


async def test_a_lowered_limit_lets_running_calls_end() -> None:
    """Three calls run when the limit becomes 1. The next one begins when all three have ended."""
    queue = Queue(_slots(3, "ann", "ann", "ann"))
    queue.slots.set_limits({BOX: 1})
    await queue.add("bob")
    assert await queue.give_back("ann", "ann") == []
    assert await queue.give_back("ann") == ["bob"]


async def test_calls_that_began_without_a_limit_count_when_there_is_one() -> None:
    """A reload can set it at any time. An upstream that is no longer named keeps its limit."""
    slots = Slots()
    slots.take(BOX, "ann")
    slots.set_limits({BOX: 1})
    slots.set_limits({})
    assert slots.is_full(BOX)


async def test_nothing_is_kept_of_users_without_calls() -> None:
    """Otherwise it would grow with the number of users."""
    queue = Queue(_slots(1, "ann"))
    await queue.add("bob", "cem")
    assert await queue.give_back("ann", "bob", "cem") == ["bob", "cem"]
    box = queue.slots._upstreams[BOX]
    assert (box.turns, box.queues, box.held, box.in_flight, box.waiting) == ({}, {}, {}, 0, 0)


# -------------------------------------------------------------------------------------------- every possible history

USERS = ("ann", "bob", "cem")
NAMES = (BOX, "cloud")
NUMBER = st.integers(min_value=0, max_value=20)
OPERATIONS = st.one_of(
    st.tuples(st.just("call"), st.sampled_from(USERS), st.sampled_from([(BOX,), ("cloud",), NAMES])),
    st.tuples(st.just("call"), st.just("ann"), st.just((BOX,))),  # often one user has many
    st.tuples(st.sampled_from(["end", "cancel", "end and cancel"]), NUMBER, NUMBER),
    st.tuples(st.just("limit"), st.sampled_from(NAMES), st.one_of(st.none(), st.integers(1, 4))),
)


class History:
    """What calls see of the slots, and whether users took turns.

    `_turns` has the number of each user's last turn at each upstream, `_passed_on` of the last turn that may have
    been passed on because the call was cancelled, and `_waits_since` since when a user waits there without a break.
    """

    def __init__(self) -> None:
        self.slots = Slots()
        self.limits: dict[str, int | None] = {BOX: 2, "cloud": 1}
        self.slots.set_limits(self.limits)
        self.running: list[tuple[str, str]] = []  # upstream and user
        self.waiting: list[tuple[asyncio.Task[None], str, tuple[str, ...]]] = []
        self._now = 0
        self._turns: dict[tuple[str, str], int] = {}
        self._passed_on: dict[tuple[str, str], int] = {}
        self._broken: list[str] = []
        self._waits_since: dict[tuple[str, str], int] = {}

    async def play(self, operation: tuple[Any, ...]) -> None:
        """One operation, and all that follows from it."""
        match operation:
            case "call", user, names:
                self._call(user, names)
            case "end", number, _:
                self._end(number)
            case "cancel", number, _:
                self._cancel(number)
            case "end and cancel", number, other:  # with no turn of the event loop between the two
                self._end(number)
                self._cancel(other, has_turn=True)
            case "limit", name, limit:
                # Calls that run already may be more.
                self.limits[name] = limit
                self.slots.set_limits({name: limit})
        for _ in range(4):
            await asyncio.sleep(0)
        self._forget_those_who_left()
        self._check()

    def _call(self, user: str, names: tuple[str, ...]) -> None:
        free = next((name for name in names if not self.slots.is_full(name)), None)
        if free is not None:
            self.slots.take(free, user)
            self._note_turn(free, user)
            return
        for name in names:
            self._waits_since.setdefault((name, user), self._now)
        task = asyncio.get_running_loop().create_task(self._wait(user, names))
        self.waiting.append((task, user, names))

    async def _wait(self, user: str, names: tuple[str, ...]) -> None:
        name = await self.slots.wait(names, user, wait_s=LONG)
        assert name in names
        self.waiting = [each for each in self.waiting if each[0] is not asyncio.current_task()]
        self._check_fairness(name, user)
        self._note_turn(name, user)

    def _check_fairness(self, name: str, user: str) -> None:
        """Nobody has waited here since before the last turn of this user without a turn of their own."""
        last = self._turns.get((name, user), 0)
        for (at, other), since in self._waits_since.items():
            had = max(self._turns.get((at, other), 0), self._passed_on.get((at, other), 0))
            if at == name and other != user and max(since, had) < last:
                self._broken.append(f"{user} came before {other} at {at}")

    def _note_turn(self, name: str, user: str) -> None:
        self._now += 1
        self.running.append((name, user))
        self._turns[name, user] = self._now
        self._forget_those_who_left()

    def _forget_those_who_left(self) -> None:
        self._waits_since = {
            (name, user): since
            for (name, user), since in self._waits_since.items()
            if any(user == each[1] and name in each[2] for each in self.waiting)
        }

    def _end(self, number: int) -> None:
        if self.running:
            self.slots.give_back(*self.running.pop(number % len(self.running)))

    def _cancel(self, number: int, *, has_turn: bool = False) -> None:
        """Cancel a call. If it may have a slot by now, which it passes on, that was a turn of its user."""
        if self.waiting:
            task, user, names = self.waiting.pop(number % len(self.waiting))
            task.cancel()
            if has_turn:
                self._now += 1
                self._passed_on |= {(name, user): self._now for name in names}

    def _check(self) -> None:
        assert self._broken == []
        loads = self.slots.loads()
        in_flight = Counter(name for name, _ in self.running)
        waiting = Counter(name for _, _, names in self.waiting for name in names)
        for name in NAMES:
            assert loads[name] == Load(in_flight[name], waiting[name])
            assert not waiting[name] or self.slots.is_full(name), "a slot is free and a call waits for it"

    async def end(self) -> None:
        """End all calls, and find nothing left."""
        while self.running or self.waiting:
            await self.play(("end", 0, 0) if self.running else ("cancel", 0, 0))
        for found in self.slots._upstreams.values():
            assert not found.held and not found.turns and not found.queues


@given(st.lists(OPERATIONS, max_size=40))
def test_no_slot_is_lost_and_users_take_turns_in_every_history(operations: list[tuple[Any, ...]]) -> None:
    """Calls come, end and are cancelled, and limits change, in any order. All that wait wait for full upstreams."""

    async def play() -> None:
        history = History()
        for operation in operations:
            before = history.slots.loads()
            await history.play(operation)
            for name, load in history.slots.loads().items():
                limit = history.limits[name]
                assert limit is None or load.in_flight <= max(limit, before[name].in_flight)
        await history.end()

    asyncio.run(play())
