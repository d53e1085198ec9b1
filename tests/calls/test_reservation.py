"""A call that was let in ends exactly once, whichever way it is left, and holds more as its answer grows."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.calls import reservation as module
from proxy.calls.reservation import STEP, Reservation
from proxy.calls.token_count import TokenCount
from proxy.formats.endpoints import CHAT
from proxy.formats.meter import Meter
from proxy.formats.request import parse_request
from proxy.formats.sse import Splitter
from proxy.ledger.book import Accepted, Expire, Settle
from proxy.ledger.entry import Entry
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent, Usage
from proxy.policy.policy import Model, Upstream
from proxy.policy.quota import Demand, Quota
from tests.breakage import read_only, writers
from tests.builders import NOON, binding, call, exactly, quota, reserve
from tests.stage import Clock, loaded, until

BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hello world!"}]}'
INPUT = 4 + 3 + 3  # tokens of "user" and the text, what is around a message, and what begins the answer
MODEL = Model("m", Upstream("up", "http://upstream.example/v1", None, "simulator"), "m", encoding="o200k_base")
DAILY = quota("staff/daily", tokens=100_000)
# A stream that asks for 8,000 tokens and holds 1,024 of them to begin with.
STREAM = Demand(input=100, output_maximum=8000, smallest=1024, initial_hold=1024)


class Call:
    """A call that was let in, its ledger, and the room in which it waits for others."""

    def __init__(self, ledger: Ledger, booked: Accepted, daily: Quota) -> None:
        loaded().load(["o200k_base"])
        asked = parse_request(CHAT, BODY)
        count = TokenCount(loaded(), asked, MODEL, body_bytes=len(BODY))
        self.ledger = ledger
        self.room = AdmissionQueue(ledger)
        self.meter = Meter(asked, count=len)  # of its stream each character is a token
        self.reservation = Reservation(ledger, booked, self.meter, binding=binding([daily]), count=count)
        self.reservation.is_sent = True

    def says(self, text: str = "", **usage: int) -> None:
        """Let a chunk of the answer go by, with the usage so far where there is one."""
        chunk = {"choices": [{"index": 0, "delta": {"content": text}}], **({"usage": usage} if usage else {})}
        for event in Splitter().feed(b"data: " + json.dumps(chunk).encode() + b"\n\n"):
            self.meter.see_event(event)

    async def grows(self, wait_s: float = 0) -> bool:
        """Whether its hold covers what has been seen."""
        return await self.reservation.grow(self.room, wait_s=wait_s)

    async def entry(self) -> Entry:
        """How it is in the books."""
        entry = await self.ledger.entry("req_1")
        assert entry is not None
        return entry

    async def counter(self) -> tuple[int, int]:
        """The tokens used and held of its quota."""
        [counter] = (await self.ledger.counters([DAILY.key_for("ann")])).values()
        return counter.used.tokens, counter.held.tokens


@asynccontextmanager
async def _reserved(
    folder: Path,
    demand: Demand | None = None,
    *,
    daily: Quota = DAILY,
    store: SqliteStore | None = None,
    now: Callable[[], int] = lambda: NOON,
) -> AsyncIterator[Call]:
    ledger = Ledger(store or SqliteStore(folder / "quotas.db"), owner="me", now=now, retry_s=0.001)
    await ledger.start()
    try:
        booked = await ledger.reserve(reserve("req_1", binding([daily]), demand or call(100, 200)))
        assert isinstance(booked, Accepted)
        yield Call(ledger, booked, daily)
    finally:
        await ledger.close()


# ------------------------------------------------------------------------------------------------------------ its end


async def test_leaving_without_an_end_settles_what_was_seen(tmp_path: Path) -> None:
    """A bug in the way of a call leaves nothing held: the meter says what passed."""
    async with _reserved(tmp_path) as it:
        with pytest.raises(RuntimeError):
            async with it.reservation:
                it.says("12345678")
                raise RuntimeError
        entry = await it.entry()
        assert (entry.state, entry.outcome) == ("settled", "proxy_broke")
        assert entry.usage == AtLeast(Tokens(INPUT, 8))
        assert await it.counter() == (INPUT + 8, 0)


async def test_leaving_before_it_was_sent_costs_nothing(tmp_path: Path) -> None:
    """The mistake was ours, and nothing can have been used."""
    async with _reserved(tmp_path) as it:
        it.reservation.is_sent = False
        with pytest.raises(RuntimeError):
            async with it.reservation:
                raise RuntimeError
        entry = await it.entry()
        assert (entry.state, entry.outcome, entry.usage) == ("released", "proxy_broke", None)
        assert await it.counter() == (0, 0)


async def test_only_the_first_end_counts(tmp_path: Path) -> None:
    """Settled is settled: neither a second settle nor a release changes it, nor leaving the block."""
    async with _reserved(tmp_path) as it:
        async with it.reservation:
            await it.reservation.settle(exactly(10, 20), "complete")
            await it.reservation.settle(Unspent(), "client_left")
            await it.reservation.release()
        entry = await it.entry()
        assert (entry.usage, entry.outcome) == (exactly(10, 20), "complete")
        assert (it.reservation.charged, it.reservation.outcome) == (exactly(10, 20), "complete")
        assert [counter.used.tokens for counter in it.reservation.counters.values()] == [30]


@pytest.mark.parametrize("outcome", ["upstream_failed", "client_left"])
async def test_release_gives_everything_back(outcome: str, tmp_path: Path) -> None:
    """The upstream never had the call: no tokens, no request, and no window opened; the record says why."""
    async with _reserved(tmp_path) as it:
        async with it.reservation:
            await (it.reservation.release() if outcome == "upstream_failed" else it.reservation.release(outcome))
        assert ((await it.entry()).state, (await it.entry()).outcome) == ("released", outcome)
        assert not any(counter.is_open for counter in it.reservation.counters.values())


async def test_past_its_own_lease_nothing_passes_on_that_is_not_held(tmp_path: Path) -> None:
    """Others may have charged what it held, and let in whom there was room for: it must hold more before, or end.

    That the lease is renewed meanwhile changes nothing; that more is held does.
    """
    clock = Clock(NOON)
    path = tmp_path / "quotas.db"
    with writers() as made:
        store = SqliteStore(path, busy_timeout_s=0)
        async with _reserved(tmp_path, STREAM, store=store, now=clock) as it:
            it.says("x" * 1100)
            clock.ms += LEASE_MS
            with read_only(path, made[-1]):
                assert not await it.grows()
                assert not await it.reservation.covers_whole(it.room)
            await it.ledger.renew_lease()
            with read_only(path, made[-1]):
                assert not await it.grows()
            assert it.reservation.covered == 1024
            assert await it.grows()
            it.says("x" * 1100)
            with read_only(path, made[-1]):
                assert await it.grows()
                assert await it.reservation.covers_whole(it.room)
            assert it.reservation.covered == 2200 + STEP


async def test_a_ledger_that_hangs_holds_an_end_up_for_a_bounded_time(tmp_path: Path) -> None:
    """Past the wait the answer goes out; the end stays queued, and is booked when the ledger is back."""
    async with _reserved(tmp_path) as it:
        other = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await it.reservation.settle(exactly(10, 20), "complete", wait_s=0.01)
        assert (await it.entry()).state == "open"
        other.execute("ROLLBACK")
        other.close()
    reopened = SqliteStore(tmp_path / "quotas.db")
    await reopened.open()
    entry = await reopened.read_entry("req_1")
    assert entry is not None
    assert entry.usage == exactly(10, 20)
    await reopened.close()


@pytest.mark.parametrize(
    ("usage", "charged"),
    [
        (AtLeast(Tokens(90, 190, cached=80)), AtLeast(Tokens(90, 190, cached=80))),
        (AtLeast(Tokens(101, 201)), AtLeast(Tokens(100, 200))),
        (AtLeast(Tokens(90, 5000)), AtLeast(Tokens(90, 200))),
        (AtLeast(Tokens(5000, 190, cached=4000)), AtLeast(Tokens(100, 190, cached=100))),
        (Exactly(Tokens(5000, 6000, cached=4000, reasoning=3000)), None),
        (Unspent(requests=1), None),
    ],
)
async def test_a_guess_never_takes_a_quota_over_its_limit(
    usage: Usage, charged: Usage | None, tmp_path: Path
) -> None:
    """An estimate is charged up to what is held; what the upstream said is the truth, whatever it is."""
    async with _reserved(tmp_path, daily=quota("staff/daily", tokens=300)) as it:
        await it.reservation.settle(usage, "complete")
        charged = charged or usage
        assert ((await it.entry()).usage, it.reservation.charged) == (charged, charged)
        assert await it.counter() == (charged.tokens.input + charged.tokens.output, 0)


@pytest.mark.parametrize(
    ("is_unknown", "charged"), [(False, AtLeast(Tokens(INPUT, 8))), (True, AtLeast(Tokens(100, 200)))]
)
async def test_a_call_that_goes_no_further_is_charged_as_it_can_be_known(
    is_unknown: bool, charged: Usage, tmp_path: Path
) -> None:
    """What passed; all that is held where that says nothing; and nothing more once it has ended."""
    async with _reserved(tmp_path) as it:
        it.says("12345678")
        await it.reservation.end_early("client_left", is_unknown=is_unknown)
        assert ((await it.entry()).usage, it.reservation.outcome) == (charged, "client_left")
        await it.reservation.end_early("stopped", is_unknown=True)
        assert ((await it.entry()).usage, it.reservation.outcome) == (charged, "client_left")


# ---------------------------------------------------------------------------------------------------- what was used


async def test_what_the_upstream_said_is_what_was_used(tmp_path: Path) -> None:
    """To the token, and nothing is counted."""
    async with _reserved(tmp_path) as it:
        it.says("abc", prompt_tokens=40, completion_tokens=2)
        assert await it.reservation.usage() == Exactly(Tokens(40, 2))


async def test_where_it_said_nothing_the_input_is_counted(tmp_path: Path) -> None:
    """By the model's own tokenizer; the bound in bytes is meant to be too large."""
    async with _reserved(tmp_path) as it:
        it.says("abc")
        assert await it.reservation.usage() == AtLeast(Tokens(INPUT, 3))


async def test_an_input_that_was_said_is_not_counted(tmp_path: Path) -> None:
    """Also where the text went on after it."""
    async with _reserved(tmp_path) as it:
        it.says("abc", prompt_tokens=40, completion_tokens=2)
        it.says("abc")
        assert await it.reservation.usage() == AtLeast(Tokens(40, 5))


async def test_the_texts_of_a_whole_answer_are_counted(tmp_path: Path) -> None:
    """Which came without its usage."""
    async with _reserved(tmp_path) as it:
        it.meter.see_whole(b'{"choices": [{"message": {"content": "Hello world!"}}]}')
        assert await it.reservation.usage() == AtLeast(Tokens(INPUT, 3))


# ------------------------------------------------------------------------------------------------- how its hold grows


async def test_a_hold_grows_with_its_answer(tmp_path: Path) -> None:
    """So much may pass as is held: what was seen, and a step beyond it, for one commit in many."""
    async with _reserved(tmp_path, STREAM) as it:
        assert (it.reservation.covered, await it.counter()) == (1024, (0, 1124))
        it.says("x" * 1100)
        assert await it.grows()
        assert it.reservation.covered == 1100 + STEP == it.reservation.entry.hold.output
        assert await it.counter() == (0, 100 + 1100 + STEP)
        assert [counter.held.tokens for counter in it.reservation.counters.values()] == [100 + 1100 + STEP]
        assert it.reservation.whole_hold == AtLeast(Tokens(100, 1100 + STEP))
        assert await it.entry() == it.reservation.entry
        await it.reservation.settle(await it.reservation.usage(), "client_left")
        assert await it.counter() == (INPUT + 1100, 0)


async def test_what_passes_beyond_the_maximum_is_held_where_there_is_room(tmp_path: Path) -> None:
    """The upstream was told 1,500, and either it counts otherwise or it did not read that: what passed is charged."""
    async with _reserved(tmp_path, Demand(input=100, output_maximum=1500, smallest=1024, initial_hold=1024)) as it:
        it.says("x" * 1100)
        assert await it.grows()
        assert (it.reservation.covered, await it.counter()) == (1500, (0, 1600))
        it.says("x" * 900)
        assert await it.grows()
        assert it.reservation.covered >= 2000
        await it.reservation.settle(await it.reservation.usage(), "client_left")
        assert it.reservation.charged == AtLeast(Tokens(INPUT, 2000))


async def test_an_upstream_that_was_told_is_believed_up_to_twice_the_maximum(tmp_path: Path) -> None:
    """Where there is no room for more, our own count does not stop it before, and charges no more than is held."""
    demand = Demand(input=INPUT, output_maximum=1500, smallest=1024, initial_hold=1024)
    async with _reserved(tmp_path, demand, daily=quota("staff/daily", tokens=1500 + INPUT)) as it:
        it.says("x" * 2000)
        assert await it.grows()
        assert it.reservation.covered == 2 * 1500 + 64
        it.says("x" * 1065)
        assert not await it.grows()
        await it.reservation.settle(await it.reservation.usage(), "client_left")
        assert it.reservation.charged == AtLeast(Tokens(INPUT, 1500))


async def test_what_came_whole_though_a_stream_was_asked_is_held_as_far_as_there_is_room(tmp_path: Path) -> None:
    """An upstream that does not stream: what would not have passed in pieces doesn't pass in one."""
    demand = Demand(input=INPUT, output_maximum=1500, smallest=1024, initial_hold=1024)

    def whole(tokens: int) -> bytes:
        return json.dumps({"usage": {"prompt_tokens": INPUT, "completion_tokens": tokens}}).encode()

    for tokens, room_for, is_covered in ((900, 1500, True), (1300, 1500, True), (1500, 1499, False)):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        async with _reserved(folder, demand, daily=quota("staff/daily", tokens=room_for + INPUT)) as it:
            it.meter.see_whole(whole(tokens))
            assert await it.reservation.covers_whole(it.room) is is_covered


async def test_while_the_ledger_is_away_what_came_whole_passes(tmp_path: Path) -> None:
    """As a stream would; its usage is charged at its end."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.meter.see_whole(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 5000}}')
            with read_only(tmp_path / "quotas.db", made[-1]):
                assert await it.reservation.covers_whole(it.room)


async def test_without_a_maximum_it_grows_as_long_as_there_is_room(tmp_path: Path) -> None:
    """Nobody said how long the answer may become, so all of it has to be held."""
    endless = Demand(input=INPUT, output_maximum=4096, smallest=1024, initial_hold=1024, is_unbounded=True)
    async with _reserved(tmp_path, endless, daily=quota("staff/daily", tokens=10_000 + INPUT)) as it:
        for seen in (4000, 8000, 9999):
            it.says("x" * (seen - it.meter.output_seen))
            assert await it.grows()
            assert it.reservation.covered == min(seen + STEP, 10_000)
        it.says("xx")
        assert not await it.grows()
        assert await it.counter() == (0, 10_000 + INPUT)


async def test_at_the_limit_there_is_no_more(tmp_path: Path) -> None:
    """What is left is held to the token, so that what passes is charged up to the limit and not beyond."""
    demand = Demand(input=INPUT, output_maximum=1024, smallest=1024, initial_hold=1024, is_unbounded=True)
    async with _reserved(tmp_path, demand, daily=quota("staff/daily", tokens=1100 + INPUT)) as it:
        assert it.reservation.entry.maximum is None
        it.says("x" * 1101)
        assert not await it.grows()
        await it.reservation.settle(AtLeast((await it.reservation.usage()).tokens), "at_limit")
        assert (await it.entry()).usage == AtLeast(Tokens(INPUT, 1100))
        assert await it.counter() == (INPUT + 1100, 0)


async def test_what_an_input_holds_by_its_bytes_is_given_to_the_answer_first(tmp_path: Path) -> None:
    """Its tokens are counted before a stream is ended: 100 bytes held up what 10 tokens leave room for."""
    async with _reserved(tmp_path, STREAM, daily=quota("staff/daily", tokens=1200)) as it:
        it.says("x" * 1101)
        assert await it.grows()
        assert await it.counter() == (0, INPUT + 1101 + 64)


async def test_it_waits_for_calls_in_flight(tmp_path: Path) -> None:
    """Where only those hold what is left; who won't wait is told so at once."""
    daily = quota("staff/daily", tokens=5000)
    async with _reserved(tmp_path, STREAM, daily=daily) as it:
        other = await it.ledger.reserve(reserve("req_2", binding([daily]), call(100, 3500)))
        assert isinstance(other, Accepted)
        it.says("x" * 2000)
        assert not await it.grows()
        growing = asyncio.get_running_loop().create_task(it.grows(wait_s=50))
        await until(lambda: bool(it.room._extending))
        await it.ledger.end(Settle("nobody's", exactly(0, 0), "complete"))  # so the first answer was "busy"
        assert not growing.done()
        await it.ledger.end(Settle("req_2", exactly(0, 10), "complete"))
        assert await growing
        assert it.reservation.covered == 2000 + STEP


async def test_an_input_that_turned_out_smaller_is_given_back(tmp_path: Path) -> None:
    """As soon as the upstream has said it; a larger one is charged at the end, and takes no hold away."""
    async with _reserved(tmp_path, STREAM) as it:
        it.says("x", prompt_tokens=40, completion_tokens=1100)
        assert await it.grows()
        assert it.reservation.entry.hold == Amount(40, 1100 + STEP, 1)
        assert await it.counter() == (0, 40 + 1100 + STEP)
        it.says("x", prompt_tokens=500, completion_tokens=2500)
        assert await it.grows()
        assert it.reservation.entry.hold == Amount(40, 2500 + STEP, 1)


async def test_while_the_ledger_is_away_an_answer_goes_on(tmp_path: Path) -> None:
    """Nothing can be held; but what passed is charged at its end, and no more than passed."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 1100)
            with read_only(tmp_path / "quotas.db", made[-1]):
                assert await it.grows()
                assert it.reservation.covered == 1100 + STEP
                assert await it.counter() == (0, 1124)
                assert it.reservation.whole_hold == AtLeast(Tokens(100, 1100 + STEP))
                it.says("x" * 2000)
                assert await it.grows()
                assert it.reservation.covered == 3100 + STEP
            await it.reservation.settle(await it.reservation.usage(), "client_left")
            assert await it.counter() == (INPUT + 3100, 0)


async def test_a_ledger_that_is_back_is_asked_again(tmp_path: Path) -> None:
    """For all that has passed meanwhile."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 1100)
            with read_only(tmp_path / "quotas.db", made[-1]):
                assert await it.grows()
            it.says("x" * 1100)
            assert await it.grows()
            assert await it.counter() == (0, 100 + 2200 + STEP)


async def test_while_the_ledger_is_away_nothing_is_charged_beyond_the_maximum(tmp_path: Path) -> None:
    """The answer goes on; but whether there is room for what only our own count sees there, nobody can say."""
    demand = Demand(input=100, output_maximum=1500, smallest=1024, initial_hold=1024)
    with writers() as made:
        async with _reserved(tmp_path, demand, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 4100)
            with read_only(tmp_path / "quotas.db", made[-1]):
                assert await it.grows()
                assert it.reservation.covered > 4100
            await it.reservation.settle(await it.reservation.usage(), "client_left")
            assert await it.counter() == (INPUT + 1500, 0)


async def test_a_ledger_that_hangs_holds_a_stream_up_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past that it goes on, as if the ledger were away; what the ledger does with the wish later harms nobody."""
    monkeypatch.setattr(module, "COMMIT_WAIT_S", 0.01)
    async with _reserved(tmp_path, STREAM) as it:
        other = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        it.says("x" * 1100)
        assert await it.grows()
        assert it.reservation.covered == 1100 + STEP
        other.execute("ROLLBACK")
        other.close()
        await it.reservation.settle(exactly(10, 1100), "complete", wait_s=50)
        assert await it.counter() == (1110, 0)


async def test_a_call_that_was_given_up_for_lost_is_ended(tmp_path: Path) -> None:
    """Its hold is charged and gone; what it used instead is booked at its end, once."""
    async with _reserved(tmp_path, STREAM) as it:
        await it.ledger.end(Expire("req_1"))  # type: ignore[arg-type]
        assert await it.counter() == (1124, 0)
        it.says("x" * 1100)
        assert not await it.grows()
        await it.reservation.settle(await it.reservation.usage(), "at_limit")
        assert await it.counter() == (INPUT + 1024, 0)
