"""The users and keys of the database, on both engines: what is found, what is added, and what a change raises."""

import asyncio
from ipaddress import ip_network

import orjson
import pytest
import sqlalchemy as sa

from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import Cuts, KeyUse, OwnedKey, User, UserId
from proxy.ledger.schema import SCHEMA, api_keys, identities, users
from proxy.ledger.sqlite import SqliteStore
from proxy.ledger.store import StoreUnavailable
from proxy.policy.key import Key
from proxy.policy.quota import Globs
from tests.builders import NOON
from tests.directory import insert, key_row, user_row

MINUTE = 60_000
ANN = UserId("database", "ann")
WEBUI_ANN = UserId("webui", "ann")


@pytest.fixture
def database(store):
    return DirectoryDatabase(store, now=lambda: NOON)


async def test_each_change_has_a_version_of_its_own(database):
    """Also if several are made at the same time. One that fails raises nothing."""
    versions = await asyncio.gather(
        *(insert(database, users, **user_row(UserId("database", f"user {number}"))) for number in range(10))
    )
    assert sorted(versions) == list(range(2, 12))
    with pytest.raises(RuntimeError):
        async with database.change():
            raise RuntimeError
    assert await database.version() == 11


async def test_a_key_is_found_by_its_digest_as_it_was_made(database):
    """With all that narrows it."""
    whole = key_row(
        "testtest22",
        ANN,
        label="ci",
        groups=orjson.dumps(["batch"]).decode(),
        networks=orjson.dumps(["10.0.0.0/8", "2001:db8::/32"]).decode(),
        models=orjson.dumps(["gpt-*"]).decode(),
        tag="nightly",
        takes_tag_header=True,
        expires_at=NOON + MINUTE,
        revoked_at=NOON,
    )
    await insert(database, api_keys, **whole)
    await insert(database, api_keys, **key_row("testtest33", WEBUI_ANN))
    assert await database.find_key("digest of testtest22") == OwnedKey(
        Key(
            "testtest22",
            label="ci",
            groups=("batch",),
            models=Globs(["gpt-*"]),
            networks=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")),
            expires_at=NOON + MINUTE,
            revoked_at=NOON,
            tag="nightly",
            takes_tag_header=True,
        ),
        ANN,
    )
    assert await database.find_key("digest of testtest33") == OwnedKey(Key("testtest33"), WEBUI_ANN)
    assert await database.find_key("digest of another") is None


async def test_a_key_for_no_group_is_not_one_for_all(database):
    """An empty list narrows to nothing."""
    await insert(database, api_keys, **key_row("testtest22", ANN, groups="[]", models="[]", networks="[]"))
    key = (await database.find_key("digest of testtest22")).key
    assert (key.groups, key.models, key.networks) == ((), Globs([]), ())


async def test_a_user_is_found_by_source_and_id(database):
    """One id of two sources is two users."""
    await insert(database, users, **user_row(ANN, groups='["staff","lab"]', email="ann@example.org"))
    assert await database.find_user(ANN) == User(ANN, ("staff", "lab"), "ann@example.org")
    assert await database.find_user(WEBUI_ANN) is None
    await insert(database, users, **user_row(WEBUI_ANN, disabled_at=NOON))
    assert await database.find_user(WEBUI_ANN) == User(WEBUI_ANN, is_disabled=True)
    await insert(database, users, **user_row(UserId("webui", "bob"), forgotten_at=NOON))
    assert (await database.find_user(UserId("webui", "bob"))).is_disabled


@pytest.mark.parametrize(
    ("linked", "found"),
    [(ANN, User(ANN, ("staff",))), (UserId("file", "ann"), User(UserId("file", "ann")))],
    ids=["to a user of the database", "to one of the file, which has no row"],
)
async def test_a_linked_identity_leads_to_its_user(database, linked, found):
    """Also if it had a row of its own before."""
    await insert(database, users, **user_row(ANN, groups='["staff"]'))
    await insert(database, users, **user_row(WEBUI_ANN, groups='["lab"]'))
    row = {"source": "webui", "id": "ann", "user_source": linked.source, "user_id": linked.id}
    await insert(database, identities, **row)
    assert await database.find_user(WEBUI_ANN) == found
    assert await database.find_user(ANN) == User(ANN, ("staff",))


@pytest.mark.parametrize(
    "id", ["Åsa", "A\u030asa", "asa", "Asa", "山田/花子", "a/b:c", "😀", "%", "_", "' OR 1=1", "x" * 400]
)
async def test_ids_are_compared_letter_by_letter(database, id):
    """Ids that are equal but for case or Unicode's normal form are of different users."""
    await database.add_seen_user(UserId("webui", id), None, users_max=9)
    for other in ("Åsa", "A\u030asa", "asa", "Asa", id):
        found = await database.find_user(UserId("webui", other))
        assert (found is not None) == (other == id)


async def test_a_source_never_has_more_users_than_it_may(database):
    """However many arrive at the same time. Those who are there are found, and other sources have their own bound."""
    arrivals = [UserId("webui", f"user {number % 40}") for number in range(120)]
    added = await asyncio.gather(*(database.add_seen_user(each, "x@example.org", users_max=25) for each in arrivals))
    admitted = {user.identity for user in added if user is not None}
    assert len(admitted) == 25
    for identity in set(arrivals):
        found = await database.find_user(identity)
        assert found == (User(identity, email="x@example.org") if identity in admitted else None)
    assert await database.add_seen_user(UserId("other", "user 1"), None, users_max=25) is not None
    assert await database.version() == 1


async def test_cuts_are_those_of_later_changes(database):
    """A process that has seen version 2 ends the calls of what version 3 cut off."""
    await insert(database, api_keys, **key_row("cut-at-two", ANN, cut_version=2))
    await insert(database, api_keys, **key_row("cut-at-three", ANN, cut_version=3))
    await insert(database, api_keys, **key_row("never-cut", ANN))
    await insert(database, users, **user_row(ANN, cut_version=3))
    assert await database.cuts_since(2) == Cuts(frozenset({"cut-at-three"}), frozenset({ANN}))
    assert not await database.cuts_since(3)


async def test_the_last_use_of_keys_never_goes_back(database, store):
    """Replicas write what they have seen, at different times. The address is the one of that use."""
    ids = [f"key {number:04}" for number in range(1100)]
    async with database.change() as (connection, _):
        await connection.execute(sa.insert(api_keys), [key_row(id, ANN) for id in ids])
    first, later, earlier = KeyUse(NOON, "192.0.2.1"), KeyUse(NOON + MINUTE, None), KeyUse(NOON - MINUTE, "192.0.2.2")
    await database.note_used(dict.fromkeys(ids, first))
    await database.note_used({ids[0]: later, ids[1]: earlier, ids[2]: KeyUse(NOON, "192.0.2.3"), "of no row": first})
    async with store.transaction() as connection:
        rows = await connection.execute(sa.select(api_keys.c.id, api_keys.c.used_at, api_keys.c.used_from))
        used = {id: KeyUse(*use) for id, *use in rows}
    assert used == dict.fromkeys(ids, first) | {ids[0]: later}


async def test_noting_keys_as_used_never_deadlocks_with_a_change_of_several(database):
    """A change takes rows in any order, for example all keys of a user."""
    ids = [f"key {number:04}" for number in range(200)]
    async with database.change() as (connection, _):
        await connection.execute(sa.insert(api_keys), [key_row(id, ANN) for id in ids])

    async def revoke_all():
        for _ in range(10):
            async with database.change() as (connection, _):
                for id in reversed(ids):
                    await connection.execute(sa.update(api_keys).where(api_keys.c.id == id).values(revoked_at=NOON))

    async def note():
        for number in range(30):
            await database.note_used(dict.fromkeys(ids, KeyUse(NOON + number, "192.0.2.1")))

    await asyncio.gather(revoke_all(), note())


async def test_a_database_without_its_version_is_unavailable(database, store):
    """Somebody has emptied the table. No process may go on with what it remembers, and there is no error of ours."""
    async with store.transaction(writes=True) as connection:
        await connection.execute(
            sa.text(f"DELETE FROM {'' if isinstance(store, SqliteStore) else SCHEMA + '.'}directory")
        )
    with pytest.raises(StoreUnavailable, match="restore a backup"):
        await database.version()
