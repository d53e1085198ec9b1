"""A reservation ends exactly once, however its block is left, and its hold grows with the answer."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy.calls import reservation as module
from proxy.calls.reservation import HOLD_STEP, Reservation
from proxy.calls.token_count import TokenCount, prompt_of
from proxy.formats.endpoints import CHAT
from proxy.formats.request import parse_request
from proxy.formats.sse import Splitter
from proxy.formats.surfaces import meter_of
from proxy.ledger.book import Accepted, Expire, Settle
from proxy.ledger.entry import Entry
from proxy.ledger.ledger import LEASE_MS, Ledger
from proxy.ledger.queue import AdmissionQueue
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.amounts import Amount, AtLeast, Exactly, Tokens, Unspent, Usage
from proxy.policy.catalog import Model, Upstream
from proxy.policy.quota import Demand, Quota
from tests.breakage import read_only, writers
from tests.builders import NOON, binding, call, entry_in, exactly, quota, reserve
from tests.sqlite import write_migrated
from tests.stage import Clock, fast_timers, loaded, until

BODY = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "Hello world!"}]}'
INPUT = 4 + 3 + 3  # the tokens of "user" and the text, of the frame of a message, and of the start of the answer
MODEL = Model("m", Upstream("up", "http://upstream.example/v1", None, "simulator"), "m", encoding="o200k_base")
DAILY = quota("staff/daily", tokens=100_000)
# A stream that asks for 8,000 tokens and holds 1,024 at the beginning.
STREAM = Demand(input=100, output_maximum=8000, smallest=1024, initial_hold=1024)


class AdmittedCall:
    """An admitted call, its ledger, and the queue in which it waits for calls in flight."""

    def __init__(self, ledger: Ledger, accepted: Accepted, daily: Quota) -> None:
        loaded().load(["o200k_base"])
        request = parse_request(CHAT, BODY)
        count = TokenCount(loaded(), request, MODEL, prompt=prompt_of(request), body_bytes=len(BODY))
        self.ledger = ledger
        self.queue = AdmissionQueue(ledger)
        self.meter = meter_of(request, count=len)  # each character of its stream is one token
        self.reservation = Reservation(ledger, accepted, binding=binding([daily]))
        self.reservation.begin_attempt(MODEL, self.meter, count=count)

    def says(self, text: str = "", **usage: int) -> None:
        """Pass one chunk of the answer to the meter, with the usage so far if there is one."""
        chunk = {"choices": [{"index": 0, "delta": {"content": text}}], **({"usage": usage} if usage else {})}
        for event in Splitter().feed(b"data: " + json.dumps(chunk).encode() + b"\n\n"):
            self.meter.see_event(event)

    async def grows(self, wait_s: float = 0) -> bool:
        """Grow the hold. Returns whether it covers what the meter has seen."""
        return await self.reservation.grow(self.queue, wait_s=wait_s)

    async def entry(self) -> Entry:
        """Its entry in the ledger."""
        entry = await entry_in(self.ledger, "req_1")
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
) -> AsyncIterator[AdmittedCall]:
    if not (folder / "quotas.db").exists():
        write_migrated(folder / "quotas.db")
    ledger = Ledger(store or SqliteStore(folder / "quotas.db"), owner="me", now=now, retry_s=0.001)
    await ledger.start()
    try:
        accepted = await ledger.reserve(reserve("req_1", binding([daily]), demand or call(100, 200)))
        assert isinstance(accepted, Accepted)
        yield AdmittedCall(ledger, accepted, daily)
    finally:
        await ledger.close()


# ------------------------------------------------------------------------------------------------------------ its end


async def test_the_end_after_a_bug_settles_what_was_seen(tmp_path: Path) -> None:
    """A bug in the path of a call leaves nothing held: what the meter has seen is charged."""
    async with _reserved(tmp_path) as it:
        it.says("12345678")
        await it.reservation.end("proxy_broke")
        entry = await it.entry()
        assert (entry.state, entry.outcome) == ("settled", "proxy_broke")
        assert entry.usage == AtLeast(Tokens(INPUT, 8))
        assert await it.counter() == (INPUT + 8, 0)


async def test_the_end_after_a_bug_before_the_call_was_sent_costs_nothing(tmp_path: Path) -> None:
    """Nothing can have been used, so the reservation is released."""
    async with _reserved(tmp_path) as it:
        it.reservation.is_sent = False
        await it.reservation.end("proxy_broke")
        entry = await it.entry()
        assert (entry.state, entry.outcome, entry.usage) == ("released", "proxy_broke", None)
        assert await it.counter() == (0, 0)


async def test_only_the_first_end_counts(tmp_path: Path) -> None:
    """A settled call is changed neither by a second settle, nor by a release, nor by the end after a bug."""
    async with _reserved(tmp_path) as it:
        await it.reservation.settle(exactly(10, 20), "complete")
        await it.reservation.settle(Unspent(), "client_left")
        await it.reservation.end("upstream_failed")
        await it.reservation.end("proxy_broke")
        entry = await it.entry()
        assert (entry.usage, entry.outcome) == (exactly(10, 20), "complete")
        assert (it.reservation.charged, it.reservation.outcome) == (exactly(10, 20), "complete")
        assert [counter.used.tokens for counter in it.reservation.counters.values()] == [30]


@pytest.mark.parametrize("outcome", ["upstream_failed", "client_left"])
async def test_a_release_charges_nothing_and_frees_the_hold(outcome: str, tmp_path: Path) -> None:
    """No tokens and no request are charged, no window is opened, and the record has the outcome."""
    async with _reserved(tmp_path) as it:
        await it.reservation.settle(None, outcome)
        assert ((await it.entry()).state, (await it.entry()).outcome) == ("released", outcome)
        assert not any(counter.is_open for counter in it.reservation.counters.values())


async def test_after_its_lease_has_lapsed_only_held_output_passes(tmp_path: Path) -> None:
    """Others may have charged the hold and admitted calls in its place, so a stream must extend its hold or end.

    Renewing the lease does not help, a successful extension does.
    """
    clock = Clock(NOON)
    path = tmp_path / "quotas.db"
    with writers() as made:
        store = SqliteStore(path, busy_timeout_s=0)
        async with _reserved(tmp_path, STREAM, store=store, now=clock) as it:
            it.says("x" * 1100)
            clock.ms += LEASE_MS
            with read_only(path, made[-1]), fast_timers(20):
                assert not await it.grows()
                assert not await it.reservation.hold_whole_answer(it.queue)
            await it.ledger.renew_lease()
            with read_only(path, made[-1]), fast_timers(20):
                assert not await it.grows()
            assert it.reservation.covered == 1024
            assert await it.grows()
            it.says("x" * 1100)
            with read_only(path, made[-1]), fast_timers(20):
                assert await it.grows()
                assert await it.reservation.hold_whole_answer(it.queue)
            assert it.reservation.covered == 2200 + HOLD_STEP


async def test_a_ledger_that_hangs_delays_the_end_for_a_limited_time(tmp_path: Path) -> None:
    """After the wait the answer goes out. The settle stays queued, and is committed when the ledger is back."""
    async with _reserved(tmp_path) as it:
        other = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await it.reservation.settle(exactly(10, 20), "complete", wait_s=0.01)
        assert (await it.entry()).state == "open"
        other.execute("ROLLBACK")
        other.close()
    reopened = SqliteStore(tmp_path / "quotas.db")
    await reopened.open()
    entry = await entry_in(reopened, "req_1")
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
async def test_an_estimate_never_takes_a_quota_over_its_limit(
    usage: Usage, charged: Usage | None, tmp_path: Path
) -> None:
    """An estimate is charged up to the hold. Usage that the upstream reported is charged whatever it is."""
    async with _reserved(tmp_path, daily=quota("staff/daily", tokens=300)) as it:
        await it.reservation.settle(usage, "complete")
        charged = charged or usage
        assert ((await it.entry()).usage, it.reservation.charged) == (charged, charged)
        assert await it.counter() == (charged.tokens.input + charged.tokens.output, 0)


@pytest.mark.parametrize(
    ("charges_full_hold", "charged"), [(False, AtLeast(Tokens(INPUT, 8))), (True, AtLeast(Tokens(100, 200)))]
)
async def test_a_call_that_ends_early_is_charged_what_passed_or_its_full_hold(
    charges_full_hold: bool, charged: Usage, tmp_path: Path
) -> None:
    """The full hold is charged if what passed says nothing. A second end changes nothing."""
    async with _reserved(tmp_path) as it:
        it.says("12345678")
        await it.reservation.end("client_left", charges_full_hold=charges_full_hold)
        assert ((await it.entry()).usage, it.reservation.outcome) == (charged, "client_left")
        await it.reservation.end("stopped", charges_full_hold=True)
        assert ((await it.entry()).usage, it.reservation.outcome) == (charged, "client_left")


# ------------------------------------------------------------------------------------------------------------- usage


async def test_reported_usage_is_used(tmp_path: Path) -> None:
    """Exactly as reported, and nothing is counted."""
    async with _reserved(tmp_path) as it:
        it.says("abc", prompt_tokens=40, completion_tokens=2)
        assert await it.reservation.usage() == Exactly(Tokens(40, 2))


async def test_an_unreported_input_is_counted(tmp_path: Path) -> None:
    """With the model's tokenizer. The bound in bytes is deliberately too high."""
    async with _reserved(tmp_path) as it:
        it.says("abc")
        assert await it.reservation.usage() == AtLeast(Tokens(INPUT, 3))


async def test_a_reported_input_is_not_counted(tmp_path: Path) -> None:
    """Even if more text followed the usage."""
    async with _reserved(tmp_path) as it:
        it.says("abc", prompt_tokens=40, completion_tokens=2)
        it.says("abc")
        assert await it.reservation.usage() == AtLeast(Tokens(40, 5))


async def test_the_texts_of_a_whole_answer_without_usage_are_counted(tmp_path: Path) -> None:
    """They cannot be counted while they pass, so they are counted at the end."""
    async with _reserved(tmp_path) as it:
        it.meter.see_whole(b'{"choices": [{"message": {"content": "Hello world!"}}]}')
        assert await it.reservation.usage() == AtLeast(Tokens(INPUT, 3))


async def test_a_usage_without_an_output_is_charged_with_the_counted_text(tmp_path: Path) -> None:
    """The input as stated, and our count of the text. A smaller output that is stated elsewhere changes nothing."""
    async with _reserved(tmp_path) as it:
        it.meter.see_whole(b'{"choices": [{"message": {"content": "Hello world!"}}], "usage": {"prompt_tokens": 11}}')
        assert await it.reservation.usage() == AtLeast(Tokens(11, 3))
        assert it.reservation.meter.input_stated == 11


async def test_of_usages_that_contradict_each_other_none_is_below_the_text(tmp_path: Path) -> None:
    """The text is counted, and the largest output that was stated is the least."""
    for first, second, charged in ((2, 1, 3), (9, 1, 9)):
        folder = tmp_path / str(first)
        folder.mkdir()
        async with _reserved(folder) as it:
            usages = [{"prompt_tokens": 11, "completion_tokens": output} for output in (first, second)]
            choice = {"message": {"content": "Hello world!"}, "usage": usages[1]}
            it.meter.see_whole(json.dumps({"choices": [choice], "usage": usages[0]}).encode())
            assert await it.reservation.usage() == AtLeast(Tokens(11, charged))


# ------------------------------------------------------------------------------------------------ growth of the hold


async def test_a_usage_within_the_hold_is_believed(tmp_path: Path) -> None:
    """The total includes 6,000 tokens beside the output. The call asked for less, until it held more."""
    surplus = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 6045}
    for held, output in ((200, 5), (7000, 6005)):
        folder = tmp_path / str(held)
        folder.mkdir()
        async with _reserved(folder, call(100, held)) as it:
            it.says("Hello", **surplus)
            assert await it.reservation.usage() == Exactly(Tokens(40, output))
            assert it.meter.output_seen == output


async def test_a_hold_that_has_grown_widens_what_is_believed(tmp_path: Path) -> None:
    """Also if it grew beyond what the call asked for, and for the meter of the next attempt."""
    endless = Demand(input=INPUT, output_maximum=4096, smallest=1024, initial_hold=1024, is_unbounded=True)
    async with _reserved(tmp_path, endless) as it:
        assert it.meter.output_bound == 4096
        it.says("x" * 4096)
        assert await it.grows()
        assert it.meter.output_bound == it.reservation.covered == 4096 + HOLD_STEP
        request = parse_request(CHAT, BODY)
        meter = meter_of(request, count=len, output_bound=7)
        count = TokenCount(loaded(), request, MODEL, prompt=prompt_of(request), body_bytes=9)
        it.reservation.begin_attempt(MODEL, meter, count=count)
        assert meter.output_bound == 4096 + HOLD_STEP


async def test_the_hold_grows_with_the_answer(tmp_path: Path) -> None:
    """The hold is what was seen plus one step, so most events need no commit."""
    async with _reserved(tmp_path, STREAM) as it:
        assert (it.reservation.covered, await it.counter()) == (1024, (0, 1124))
        it.says("x" * 1100)
        assert await it.grows()
        assert it.reservation.covered == 1100 + HOLD_STEP == it.reservation.entry.hold.output
        assert await it.counter() == (0, 100 + 1100 + HOLD_STEP)
        assert [counter.held.tokens for counter in it.reservation.counters.values()] == [100 + 1100 + HOLD_STEP]
        assert it.reservation.full_hold == AtLeast(Tokens(100, 1100 + HOLD_STEP))
        assert await it.entry() == it.reservation.entry
        await it.reservation.end("client_left")
        assert await it.counter() == (INPUT + 1100, 0)


async def test_output_beyond_the_maximum_is_held_if_there_is_room(tmp_path: Path) -> None:
    """1,500 was sent. The upstream counts differently or ignores its maximum, and what passed is charged."""
    async with _reserved(tmp_path, Demand(input=100, output_maximum=1500, smallest=1024, initial_hold=1024)) as it:
        it.says("x" * 1100)
        assert await it.grows()
        assert (it.reservation.covered, await it.counter()) == (1500, (0, 1600))
        it.says("x" * 900)
        assert await it.grows()
        assert it.reservation.covered >= 2000
        await it.reservation.end("client_left")
        assert it.reservation.charged == AtLeast(Tokens(INPUT, 2000))


async def test_beyond_the_maximum_the_hold_grows_in_steps_too(tmp_path: Path) -> None:
    """All that passed is held, so it is charged if the upstream states no usage, however far its count was off."""
    async with _reserved(tmp_path, Demand(input=100, output_maximum=1500, smallest=1024, initial_hold=1024)) as it:
        for seen, held in ((1501, 1501 + HOLD_STEP), (3000, 3064), (3065, 3065 + HOLD_STEP)):
            it.says("x" * (seen - it.meter.output_seen))
            assert await it.grows()
            assert it.reservation.covered == it.reservation.entry.hold.output == held
        await it.reservation.end("complete")
        assert it.reservation.charged == AtLeast(Tokens(INPUT, 3065))


async def test_without_room_twice_the_maximum_passes_by_our_count(tmp_path: Path) -> None:
    """The upstream is expected to keep to its maximum by its own count. No more than the hold is charged."""
    demand = Demand(input=INPUT, output_maximum=1500, smallest=1024, initial_hold=1024)
    async with _reserved(tmp_path, demand, daily=quota("staff/daily", tokens=1500 + INPUT)) as it:
        it.says("x" * 2000)
        assert await it.grows()
        assert it.reservation.covered == 2 * 1500 + 64
        it.says("x" * 1065)
        assert not await it.grows()
        await it.reservation.end("client_left")
        assert it.reservation.charged == AtLeast(Tokens(INPUT, 1500))


async def test_a_whole_answer_to_a_stream_request_needs_room_for_all_of_it(tmp_path: Path) -> None:
    """Output that would not have passed as a stream does not pass as a whole answer."""
    demand = Demand(input=INPUT, output_maximum=1500, smallest=1024, initial_hold=1024)

    def whole(tokens: int) -> bytes:
        return json.dumps({"usage": {"prompt_tokens": INPUT, "completion_tokens": tokens}}).encode()

    for tokens, output_room, is_covered in ((900, 1500, True), (1300, 1500, True), (1500, 1499, False)):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        async with _reserved(folder, demand, daily=quota("staff/daily", tokens=output_room + INPUT)) as it:
            it.meter.see_whole(whole(tokens))
            assert await it.reservation.hold_whole_answer(it.queue) is is_covered


async def test_while_the_ledger_is_unavailable_a_whole_answer_passes(tmp_path: Path) -> None:
    """As a stream would. Its usage is charged at the end."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.meter.see_whole(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 5000}}')
            with read_only(tmp_path / "quotas.db", made[-1]), fast_timers(20):
                assert await it.reservation.hold_whole_answer(it.queue)


async def test_without_a_maximum_the_hold_grows_while_there_is_room(tmp_path: Path) -> None:
    """The answer has no known length, so all of it must be held."""
    endless = Demand(input=INPUT, output_maximum=4096, smallest=1024, initial_hold=1024, is_unbounded=True)
    async with _reserved(tmp_path, endless, daily=quota("staff/daily", tokens=10_000 + INPUT)) as it:
        for seen in (4000, 8000, 9999):
            it.says("x" * (seen - it.meter.output_seen))
            assert await it.grows()
            assert it.reservation.covered == min(seen + HOLD_STEP, 10_000)
        it.says("xx")
        assert not await it.grows()
        assert await it.counter() == (0, 10_000 + INPUT)


async def test_at_the_limit_the_hold_does_not_grow(tmp_path: Path) -> None:
    """Everything up to the limit is held, so exactly that is charged."""
    demand = Demand(input=INPUT, output_maximum=1024, smallest=1024, initial_hold=1024, is_unbounded=True)
    async with _reserved(tmp_path, demand, daily=quota("staff/daily", tokens=1100 + INPUT)) as it:
        assert it.reservation.entry.maximum is None
        it.says("x" * 1101)
        assert not await it.grows()
        await it.reservation.end("at_limit")
        assert (await it.entry()).usage == AtLeast(Tokens(INPUT, 1100))
        assert await it.counter() == (INPUT + 1100, 0)


async def test_the_input_is_counted_before_a_stream_is_ended(tmp_path: Path) -> None:
    """100 tokens are held for 100 bytes of input that has 10 tokens. The other 90 go to the answer."""
    async with _reserved(tmp_path, STREAM, daily=quota("staff/daily", tokens=1200)) as it:
        it.says("x" * 1101)
        assert await it.grows()
        assert it.reservation.entry.hold.input == INPUT
        assert await it.counter() == (0, 1200)


async def test_the_input_is_counted_before_a_stream_waits_for_calls_in_flight(tmp_path: Path) -> None:
    """What the count frees is enough, so the stream goes on at once."""
    daily = quota("staff/daily", tokens=1300)
    async with _reserved(tmp_path, STREAM, daily=daily) as it:
        other = await it.ledger.reserve(reserve("req_2", binding([daily]), call(50, 50)))
        assert isinstance(other, Accepted)
        it.says("x" * 1101)
        loop = asyncio.get_running_loop()
        with fast_timers(0.05):  # slow, so that a wait of 1 s takes far longer than the work
            begun_at = loop.time()
            assert await it.grows(wait_s=50)
            assert loop.time() - begun_at < 0.5
        await it.ledger.end(Settle("req_2", exactly(0, 10), "complete"))


async def test_growing_waits_for_calls_in_flight(tmp_path: Path) -> None:
    """If only they hold what is left. Without a wait it fails at once."""
    daily = quota("staff/daily", tokens=5000)
    async with _reserved(tmp_path, STREAM, daily=daily) as it:
        other = await it.ledger.reserve(reserve("req_2", binding([daily]), call(100, 3500)))
        assert isinstance(other, Accepted)
        it.says("x" * 2000)
        assert not await it.grows()
        extending = asyncio.get_running_loop().create_task(it.grows(wait_s=50))
        await until(lambda: bool(it.queue._extending))
        # The ledger works in order: when this operation is done, the first reply, "busy", has arrived.
        await it.ledger.end(Settle("nobody's", exactly(0, 0), "complete"))
        assert not extending.done()
        await it.ledger.end(Settle("req_2", exactly(0, 10), "complete"))
        assert await extending
        assert it.reservation.covered == 2000 + HOLD_STEP


async def test_the_hold_of_an_input_that_is_smaller_than_expected_is_freed(tmp_path: Path) -> None:
    """As soon as the upstream reports it. A larger input is charged at the end and holds no more."""
    async with _reserved(tmp_path, STREAM) as it:
        it.says("x", prompt_tokens=40, completion_tokens=1100)
        assert await it.grows()
        assert it.reservation.entry.hold == Amount(40, 1100 + HOLD_STEP, 1)
        assert await it.counter() == (0, 40 + 1100 + HOLD_STEP)
        it.says("x", prompt_tokens=500, completion_tokens=2500)
        assert await it.grows()
        assert it.reservation.entry.hold == Amount(40, 2500 + HOLD_STEP, 1)


async def test_while_the_ledger_is_unavailable_a_stream_goes_on(tmp_path: Path) -> None:
    """Nothing more can be held. At the end exactly what passed is charged."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 1100)
            with read_only(tmp_path / "quotas.db", made[-1]), fast_timers(20):
                assert await it.grows()
                assert it.reservation.covered == 1100 + HOLD_STEP
                assert await it.counter() == (0, 1124)
                assert it.reservation.full_hold == AtLeast(Tokens(100, 1100 + HOLD_STEP))
                it.says("x" * 2000)
                assert await it.grows()
                assert it.reservation.covered == 3100 + HOLD_STEP
            await it.reservation.end("client_left")
            assert await it.counter() == (INPUT + 3100, 0)


async def test_when_the_ledger_is_back_the_hold_grows_again(tmp_path: Path) -> None:
    """By all that has passed meanwhile."""
    with writers() as made:
        async with _reserved(tmp_path, STREAM, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 1100)
            with read_only(tmp_path / "quotas.db", made[-1]), fast_timers(20):
                assert await it.grows()
            it.says("x" * 1100)
            assert await it.grows()
            assert await it.counter() == (0, 100 + 2200 + HOLD_STEP)


async def test_while_the_ledger_is_unavailable_nothing_beyond_the_maximum_is_charged(tmp_path: Path) -> None:
    """The stream goes on. Output beyond the maximum exists only by our own count and is not held."""
    demand = Demand(input=100, output_maximum=1500, smallest=1024, initial_hold=1024)
    with writers() as made:
        async with _reserved(tmp_path, demand, store=SqliteStore(tmp_path / "quotas.db", busy_timeout_s=0)) as it:
            it.says("x" * 4100)
            with read_only(tmp_path / "quotas.db", made[-1]), fast_timers(20):
                assert await it.grows()
                assert it.reservation.covered > 4100
            await it.reservation.end("client_left")
            assert await it.counter() == (INPUT + 1500, 0)


async def test_a_ledger_that_hangs_delays_a_stream_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After that it goes on as if the ledger were unavailable. An extension that succeeds later does no harm."""
    monkeypatch.setattr(module, "COMMIT_WAIT_S", 0.01)
    async with _reserved(tmp_path, STREAM) as it:
        other = sqlite3.connect(tmp_path / "quotas.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        it.says("x" * 1100)
        assert await it.grows()
        assert it.reservation.covered == 1100 + HOLD_STEP
        other.execute("ROLLBACK")
        other.close()
        await it.reservation.settle(exactly(10, 1100), "complete", wait_s=50)
        assert await it.counter() == (1110, 0)


async def test_a_stream_whose_reservation_has_expired_is_ended(tmp_path: Path) -> None:
    """Its hold has been charged. At its end the charge is corrected, once, to what it used."""
    async with _reserved(tmp_path, STREAM) as it:
        await it.ledger.end(Expire("req_1"))  # type: ignore[arg-type]
        assert await it.counter() == (1124, 0)
        it.says("x" * 1100)
        assert not await it.grows()
        await it.reservation.end("at_limit")
        assert await it.counter() == (INPUT + 1024, 0)
