"""What the directory remembers is right, bounded, and used for a minute while the database is away."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from structlog.testing import capture_logs

from proxy.errors import DirectoryUnavailable
from proxy.identity.directory import Cuts, Directory, KeyUse, OwnedKey, User, UserId
from proxy.policy.key import Key
from tests.builders import NOON, DirectoryStoreOf
from tests.stage import fast_timers, until

T = TypeVar("T")

ANN = UserId("database", "ann")
ANN_KEY = OwnedKey(Key("key-of-ann"), ANN)
REVOKED = OwnedKey(Key("key-of-ann", revoked_at=NOON), ANN)
WEBUI_USER = UserId("open-webui", "7f3c")


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


class Store(DirectoryStoreOf):
    """A database that answers a lookup with what it had when the lookup began. `hold` keeps later answers back."""

    def __init__(self) -> None:
        super().__init__([User(ANN, ("staff",))], {"ann": ANN_KEY})
        self.answers = asyncio.Event()
        self.answers.set()
        self.added = 0

    def hold(self) -> asyncio.Event:
        """From now on answer nothing until the result is set."""
        self.answers = asyncio.Event()
        return self.answers

    def go_on(self) -> None:
        """From now on answer at once."""
        self.answers = asyncio.Event()
        self.answers.set()

    async def version(self) -> int:
        return await self._held(super().version())

    async def find_key(self, digest: str) -> OwnedKey | None:
        return await self._held(super().find_key(digest))

    async def add_seen_user(self, identity: UserId, email: str | None, *, users_max: int) -> User | None:
        self.added += 1
        return await super().add_seen_user(identity, email, users_max=users_max)

    async def _held(self, found: Awaitable[T]) -> T:
        answers, value = self.answers, await found
        await answers.wait()
        return value


@pytest.fixture
async def store() -> Store:
    return Store()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(store: Store, clock: Clock) -> Callable[..., Directory]:
    return lambda **more: Directory(store, clock=clock, now=lambda: NOON, **more)


@pytest.fixture
async def directory(make: Callable[..., Directory]) -> Directory:
    directory = make()
    await directory.poll()
    return directory


async def test_who_was_looked_up_is_remembered(directory: Directory, store: Store, clock: Clock) -> None:
    """A call of a user who was seen before costs no query, as long as nothing changes."""
    for _ in range(100):
        clock.s += 1
        await directory.poll()
        assert await directory.key("ann") == ANN_KEY
        assert await directory.user(ANN) == User(ANN, ("staff",))
    assert store.asked == ["ann", ANN]
    assert directory.entries == {"keys": 1, "users": 1}


async def test_a_change_is_in_force_after_the_next_poll(directory: Directory, store: Store) -> None:
    """Not before it: the process that made the change is another one."""
    await directory.key("ann")
    store.keys["ann"], store.number = REVOKED, 2
    assert await directory.key("ann") == ANN_KEY
    await directory.poll()
    assert await directory.key("ann") == REVOKED
    assert store.asked == ["ann", "ann"]


async def test_who_shows_changes_is_told_between_which_versions_they_are(
    make: Callable[..., Directory], store: Store
) -> None:
    """Not at the first poll, and not if nothing has changed."""
    told: list[tuple[int, int]] = []
    directory = make(on_change=lambda old, new: told.append((old, new)))
    for number in (1, 1, 3, 3, 4):
        store.number = number
        await directory.poll()
    assert told == [(1, 3), (3, 4)]


async def test_a_lookup_that_began_before_a_change_is_not_remembered(directory: Directory, store: Store) -> None:
    """T150: it has read the key as it was before. Requests that come after the change do not wait for it either."""
    answers = store.hold()
    before = asyncio.ensure_future(directory.key("ann"))
    await until(lambda: store.asked == ["ann"])
    store.keys["ann"], store.number = REVOKED, 2
    store.go_on()
    changes = directory.changes
    await directory.poll()
    assert directory.changes == changes + 1
    assert await directory.key("ann") == REVOKED
    answers.set()
    assert await before == ANN_KEY
    assert await directory.key("ann") == REVOKED


async def test_a_change_between_the_question_and_the_start_of_its_lookup(directory: Directory) -> None:
    """Everything is forgotten when the lookup was entered and has not begun to run: it still answers, and ends."""
    before = asyncio.ensure_future(directory.key("ann"))
    await asyncio.sleep(0)  # it has entered its lookup, which is to run next
    directory.forget_all()
    after = asyncio.ensure_future(directory.key("ann"))
    assert [await before, await after] == [ANN_KEY, ANN_KEY]
    assert directory.entries["keys"] == 1


async def test_a_lookup_between_the_change_and_the_poll_is_forgotten(directory: Directory, store: Store) -> None:
    """The poll reads the version, the change is made, a lookup reads its result, and the poll ends: in any order."""
    store.hold()
    poll = asyncio.ensure_future(directory.poll())
    lookup = asyncio.ensure_future(directory.key("ann"))
    await until(lambda: store.asked == ["ann"])
    store.keys["ann"], store.number = REVOKED, 2
    store.answers.set()
    await poll
    assert await lookup == ANN_KEY
    await directory.poll()
    assert await directory.key("ann") == REVOKED


async def test_all_who_ask_for_a_key_at_once_wait_for_one_query(directory: Directory, store: Store) -> None:
    """Also if the one that came first leaves."""
    store.hold()
    waiting = [asyncio.ensure_future(directory.key("ann")) for _ in range(200)]
    await until(lambda: store.asked == ["ann"])
    waiting[0].cancel()
    store.answers.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [ANN_KEY] * 199
    assert store.asked == ["ann"]


async def test_a_wrong_key_is_looked_up_once_a_second(directory: Directory, store: Store, clock: Clock) -> None:
    """Then the database is asked again, since the key may have been made in the meantime."""
    for _ in range(100):
        assert await directory.key("wrong") is None
    assert store.asked == ["wrong"]
    clock.s += 1
    assert await directory.key("wrong") is None
    store.keys["wrong"] = ANN_KEY
    clock.s += 1
    assert await directory.key("wrong") == ANN_KEY
    assert store.asked == ["wrong"] * 3


async def test_wrong_keys_displace_no_right_ones(make: Callable[..., Directory], store: Store, clock: Clock) -> None:
    """T5: 10,000 wrong keys of a good form in a minute. What is remembered of them is bounded too."""
    directory = make(entries_max=50)
    await directory.poll()
    await directory.key("ann")
    await directory.user(ANN)
    for number in range(10_000):
        assert await directory.key(f"wrong {number}") is None
        assert await directory.user(UserId("database", f"wrong {number}")) is None
        clock.s += 60 / 10_000
        await directory.poll()
    store.asked.clear()
    assert await directory.key("ann") == ANN_KEY
    assert await directory.user(ANN) is not None
    assert store.asked == []
    assert len(directory._keys.unknown) == len(directory._users.unknown) == 50


async def test_at_most_as_many_are_remembered_as_stated(make: Callable[..., Directory], store: Store) -> None:
    """T71: the one that was used longest ago goes first. So a million users need no more memory than that."""
    directory = make(entries_max=10)
    store.keys = {f"key {number}": OwnedKey(Key(f"id {number}"), ANN) for number in range(100)}
    for number in range(100):
        await directory.key(f"key {number}")
        await directory.key("key 0")
    assert directory.entries["keys"] == 10
    store.asked.clear()
    await directory.key("key 0")
    await directory.key("key 99")
    assert store.asked == []
    await directory.key("key 50")
    assert store.asked == ["key 50"]


# --------------------------------------------------------------------------------------------------------- outages


async def test_while_the_database_is_away_known_callers_are_identified_for_a_minute(
    directory: Directory, store: Store, clock: Clock
) -> None:
    """T151: a caller who is not known gets a 503: its key may be right. After the minute nobody is identified."""
    await directory.key("ann")
    store.fails = True
    with capture_logs() as logs:
        for _ in range(60):
            clock.s += 1
            await directory.poll()
            assert await directory.key("ann") == ANN_KEY
            with pytest.raises(DirectoryUnavailable):
                await directory.key("new")
            with pytest.raises(DirectoryUnavailable):
                await directory.seen_user(WEBUI_USER, None, users_max=9)
        clock.s += 1
        await directory.poll()
        with pytest.raises(DirectoryUnavailable):
            await directory.key("ann")
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("warning", "the directory of users can't be read")
    ]


async def test_after_an_outage_everybody_is_identified_again(
    directory: Directory, store: Store, clock: Clock
) -> None:
    """What was remembered before is used again if nothing has changed meanwhile, and the log says that it is over."""
    await directory.key("ann")
    store.fails = True
    clock.s += 3600
    with capture_logs() as logs:
        await directory.poll()
        store.fails = False
        await directory.poll()
    assert [line["log_level"] for line in logs] == ["warning", "info"]
    assert await directory.key("ann") == ANN_KEY
    assert store.asked == ["ann"]


async def test_a_change_during_an_outage_is_seen_after_it(directory: Directory, store: Store) -> None:
    """The number has changed, however long nobody could read it."""
    await directory.key("ann")
    store.fails = True
    await directory.poll()
    store.keys["ann"], store.number, store.fails = REVOKED, 7, False
    await directory.poll()
    assert await directory.key("ann") == REVOKED


async def test_a_database_that_does_not_answer_is_away(directory: Directory, store: Store) -> None:
    """T151: a lookup takes seconds at most, and the next poll is made."""
    store.hold()
    with fast_timers(100), capture_logs() as logs:
        lookups = [asyncio.ensure_future(directory.key(name)) for name in ("ann", "new", "newer")]
        await directory.poll()
        found = await asyncio.gather(*lookups, return_exceptions=True)
    assert [type(each) for each in found] == [DirectoryUnavailable] * 3
    assert [line["reason"] for line in logs] == ["it did not answer in time"]
    store.answers.set()
    assert await directory.key("ann") == ANN_KEY


async def test_a_poll_does_not_wait_for_lookups(directory: Directory, store: Store) -> None:
    """T5: however many unknown keys are tried, a change is noticed. Two lookups ask the database at a time."""
    store.hold()
    lookups = [asyncio.ensure_future(directory.key(f"wrong {number}")) for number in range(100)]
    await until(lambda: len(store.asked) == 2)
    store.number = 2
    lookups_answers = store.answers
    store.go_on()
    changes = directory.changes
    await directory.poll()
    assert directory.changes == changes + 1
    assert len(store.asked) == 2
    lookups_answers.set()
    assert await asyncio.gather(*lookups) == [None] * 100


async def test_closing_ends_the_lookups(directory: Directory, store: Store) -> None:
    """Who waits for one is told."""
    store.hold()
    lookup = asyncio.ensure_future(directory.key("ann"))
    await until(lambda: store.asked == ["ann"])
    await directory.close()
    with pytest.raises(asyncio.CancelledError):
        await lookup


async def test_the_last_use_of_a_key_is_written(directory: Directory, store: Store) -> None:
    """When, to the minute, and from which address."""
    directory.note_used(ANN_KEY.key, "192.0.2.1")
    await directory.write_used()
    assert store.used == {"key-of-ann": KeyUse(NOON, "192.0.2.1")}


# ------------------------------------------------------------------------------------------------------------- cuts


async def test_cuts_are_reported_once(make: Callable[..., Directory], store: Store) -> None:
    """And again if they could not be read in full. Those from before the start are of no call."""
    reported: list[Cuts] = []
    directory = make(on_cut=reported.append)
    store.cuts = cut = Cuts(frozenset({"key-of-ann"}), frozenset({ANN}))
    await directory.poll()
    assert reported == []
    store.number = 2
    await directory.poll()
    await directory.poll()
    assert reported == [cut]
    store.number, store.cuts = 3, Cuts()
    await directory.poll()
    assert reported == [cut]


# ------------------------------------------------------------------------------------------- users of header sources


async def test_a_user_of_a_header_source_is_added_once(directory: Directory, store: Store) -> None:
    """From then on it is found like any other."""
    for _ in range(3):
        user = await directory.seen_user(WEBUI_USER, "ann@example.org", users_max=9)
        assert user == User(WEBUI_USER, email="ann@example.org")
    assert store.added == 1


async def test_a_source_that_is_full_is_asked_once_a_second(directory: Directory, store: Store, clock: Clock) -> None:
    """Adding takes the lock of the database, which calls may wait for."""
    for number in range(100):
        assert await directory.seen_user(UserId("open-webui", f"user {number}"), None, users_max=1) is None
    assert store.added == 1
    clock.s += 1
    assert await directory.seen_user(UserId("open-webui", "user 7"), None, users_max=9) is not None
    assert await directory.seen_user(UserId("other", "user 7"), None, users_max=9) is not None


@pytest.mark.parametrize("id", ["n" * 600, "a\nb", "a\0b", "\udcff", "a\x7fb"])
async def test_an_id_that_records_can_t_have_is_nobody(id: str, directory: Directory, store: Store) -> None:
    """T153: it would be refused by the ledger, or by the database with an error. So it is not asked for."""
    identity = UserId("open-webui", id)
    assert await directory.user(identity) is None
    assert await directory.seen_user(identity, None, users_max=9) is None
    assert (store.asked, store.added) == ([], 0)


@pytest.mark.parametrize("id", ["Åsa", "A\u030asa", "asa", "Asa", "山田/花子", "a/b:c", "😀", "x" * 400])
async def test_ids_are_compared_letter_by_letter(id: str, directory: Directory, store: Store) -> None:
    """Ids that are equal but for case or Unicode's normal form are of different users."""
    await directory.seen_user(UserId("open-webui", id), None, users_max=9)
    for other in ("Åsa", "A\u030asa", "asa", "Asa"):
        found = await directory.user(UserId("open-webui", other))
        assert (found is not None) == (other == id)
    assert UserId.of_subject(UserId("open-webui", id).subject) == UserId("open-webui", id)
