"""Changes of users and keys on both engines: what each does, what the audit log says of it, and what is refused."""

import asyncio
from dataclasses import replace
from functools import partial

import orjson
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import Author, ChangeRefused, Changes
from proxy.administration.directory import DirectoryAdministration
from proxy.administration.grants import GrantAdministration, NewGrant
from proxy.administration.pages import Paging
from proxy.administration.records import ImportedUser, KeyLimits
from proxy.config.loader import FileUser, load_text
from proxy.config.values import digest
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import FileDirectory, KeyUse, UserId
from proxy.identity.keys import id_of
from proxy.ledger.book import Reserve, Settle
from proxy.ledger.entry import CallLabels, call_id_prefix
from proxy.ledger.schema import api_keys, audit, calls, counters, grants, refusals, usage_by_day, users
from proxy.ledger.sqlite import SqliteStore
from proxy.policy.amounts import Exactly, Tokens
from proxy.policy.key import Key
from tests.builders import DAY, HOUR, NOON, binding, call, quota

FILE_KEY = "sk-alice-0123456789abcdefghijklmnop"
ALICE, BOB = UserId("file", "alice"), UserId("database", "bob")
GROUPS = ("everyone", "default", "staff", "lab")
GRANTING = load_text("""
upstreams: {simulated: {base_url: "http://127.0.0.1:9"}}
groups: {staff: {quotas: {daily: {tokens: 200k, per: day}}}}
""")


class Clock:
    """The time that a test sets."""

    now = NOON

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def admin(store, clock):
    file = FileDirectory([FileUser("alice", ("staff",), {digest(FILE_KEY): Key("0123abcd", label="laptop")})])
    database = DirectoryDatabase(store, now=clock)
    changes = Changes(database, Author("cli:ops"), clock)
    return DirectoryAdministration(changes, file, GROUPS, source_names=("webui",))


async def all_of(admin, table) -> list[dict]:
    async with admin.changes.database.read() as connection:
        return [dict(row) for row in (await connection.execute(sa.select(table))).mappings()]


async def audited(admin) -> list[tuple]:
    """Action, target, before and after of each row of the audit log, oldest first."""
    rows = sorted(await all_of(admin, audit), key=lambda row: row["id"])
    assert {row["actor"] for row in rows} <= {"cli:ops"}
    return [(row["action"], row["target"], *(row[name] and orjson.loads(row[name]) for name in ("before", "after")))
            for row in rows]  # fmt: skip


async def version(admin) -> int:
    return await admin.changes.database.version()


# -------------------------------------------------------------------------------------------------------------- users


async def test_a_user_is_added_changed_disabled_and_enabled(admin, clock):
    """Each change raises the version, so that every replica sees it, and has its row in the audit log."""
    added = await admin.add_user("bob", groups=["lab", "staff", "lab"], email="bob@example.org", is_service=True)
    assert (added.identity, added.groups, added.email, added.is_service) == (
        *(BOB, ("staff", "lab")),  # in the policy's order
        *("bob@example.org", True),
    )
    clock.now += 1
    assert (await admin.set_user(BOB, groups=["lab"])).groups == ("lab",)
    clock.now += 1
    assert (await admin.set_user(BOB, email="")).email is None
    clock.now += 1
    assert (await admin.disable_user(BOB, cut=True)).disabled_at == clock.now
    clock.now += 1
    assert (await admin.enable_user(BOB)).disabled_at is None
    assert await version(admin) == 6
    assert [row["cut_version"] for row in await all_of(admin, users)] == [5]
    assert await audited(admin) == [
        ("user.add", "database:bob", None, {"groups": ["staff", "lab"], "is_service": True}),
        ("user.set", "database:bob", {"groups": ["staff", "lab"]}, {"groups": ["lab"]}),
        ("user.set", "database:bob", {"groups": ["lab"]}, {"groups": ["lab"], "email": "changed"}),
        ("user.disable", "database:bob", {"disabled_at": None}, {"disabled_at": NOON + 3, "cut": True}),
        ("user.enable", "database:bob", {"disabled_at": NOON + 3}, {"disabled_at": None}),
    ]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda admin: admin.add_user("bob"), "id"),
        (lambda admin: admin.add_user(""), "id"),
        (lambda admin: admin.add_user("a\nb"), "id"),
        (lambda admin: admin.add_user("x" * 257), "id"),
        (lambda admin: admin.add_user(" bob"), "id"),
        (lambda admin: admin.add_user("eve", groups=["stuff"]), "groups"),
        (lambda admin: admin.add_user("eve", groups=["everyone"]), "groups"),
        (lambda admin: admin.add_user("eve", email="eve"), "email"),
        (lambda admin: admin.set_user(UserId("database", "zoe"), groups=[]), "user"),
        (lambda admin: admin.set_user(ALICE, groups=[]), "user"),
        (lambda admin: admin.disable_user(ALICE), "user"),
        (lambda admin: admin.enable_user(UserId("database", "zoe")), "user"),
        (lambda admin: admin.forget(ALICE), "user"),
        (lambda admin: admin.forget(UserId("file", "zoe")), "user"),
        (lambda admin: admin.forget(UserId("database", "zoe")), "user"),
        (lambda admin: admin.user(UserId("file", "zoe")), "user"),
        (lambda admin: admin.link(UserId("nowhere", "1"), BOB), "identity"),
        (lambda admin: admin.link(UserId("webui", "a\x00"), BOB), "identity"),
        (lambda admin: admin.link(UserId("webui", "1"), UserId("database", "zoe")), "user"),
        (lambda admin: admin.unlink(UserId("webui", "1")), "identity"),
        (lambda admin: admin.create_key(UserId("database", "zoe"), KeyLimits()), "user"),
        (lambda admin: admin.create_key(BOB, KeyLimits(groups=["lab"])), "groups"),
        (lambda admin: admin.create_key(BOB, KeyLimits(networks=["10.0.0.1/8"])), "networks"),
        (lambda admin: admin.create_key(BOB, KeyLimits(models=["a b"])), "models"),
        (lambda admin: admin.create_key(BOB, KeyLimits(label="a\nb")), "label"),
        (lambda admin: admin.create_key(BOB, KeyLimits(tag="t" * 65)), "tag"),
        (lambda admin: admin.key("nope"), "key"),
        (lambda admin: admin.revoke_key("nope"), "key"),
        (lambda admin: admin.rotate_key("nope", overlap_ms=0), "key"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_and_changes_nothing(admin, change, field):
    """The field is named, and neither the version nor the audit log has a trace."""
    await admin.add_user("bob", groups=["staff"])
    before = (await version(admin), await audited(admin))
    with pytest.raises(ChangeRefused) as caught:
        await change(admin)
    assert caught.value.field == field
    assert (await version(admin), await audited(admin)) == before


async def test_a_name_means_a_user_of_the_file_before_one_of_the_database(admin):
    """Any other user is named with the source."""
    assert admin.resolve("alice") == ALICE
    assert admin.resolve("bob") == BOB
    assert admin.resolve("database:alice") == UserId("database", "alice")
    assert admin.resolve("webui:a:b") == UserId("webui", "a:b")
    with pytest.raises(ChangeRefused, match="no source"):
        await admin.user(admin.resolve("web:1"))


async def test_users_of_a_source_that_was_removed_can_be_forgotten(admin):
    """Or disabled before the source comes back. The configuration does not name it any more."""
    seen = admin.resolve("old:7")
    await admin.changes.database.add_seen_user(seen, "7@example.org", users_max=9)
    assert (await admin.disable_user(seen)).disabled_at == NOON
    assert (await admin.forget(seen)).startswith("forgotten:")


async def test_users_are_listed_in_pages_and_found_by_a_text(admin):
    """A `%` or `_` of the text is no pattern."""
    for name in ("Ann", "a%b", "a_b", "zoë"):
        await admin.add_user(name, email=f"{len(name)}@example.org" if name == "Ann" else None)
    await admin.changes.database.add_seen_user(UserId("webui", "1"), None, users_max=5)
    listed = [each.identity.subject for each in (await admin.users(Paging())).data]
    assert listed == sorted(listed)
    second = Paging((await admin.users(Paging(limit=2))).next, 2)
    assert [each.identity.subject for each in (await admin.users(second)).data] == listed[2:4]
    for text, found in (("ann", ["Ann"]), ("%", ["a%b"]), ("_", ["a_b"]), ("ZO", ["zoë"]), ("3@EX", ["Ann"])):
        assert [each.identity.id for each in (await admin.users(Paging(), text=text)).data] == found


async def test_a_user_of_a_header_source_can_be_another_user(admin):
    """Once linked, the source's user is that one; a second link is refused."""
    await admin.add_user("bob")
    linked = await admin.link(UserId("webui", "7"), BOB)
    assert linked.linked == (UserId("webui", "7"),)
    assert (await admin.changes.database.find_user(UserId("webui", "7"))).identity == BOB
    with pytest.raises(ChangeRefused, match=r"linked to database:bob"):
        await admin.link(UserId("webui", "7"), ALICE)
    await admin.unlink(UserId("webui", "7"))
    assert (await admin.link(UserId("webui", "7"), ALICE)).identity == ALICE
    assert [action for action, *_ in await audited(admin)] == ["user.add", "user.link", "user.unlink", "user.link"]


async def test_a_linked_identity_is_changed_where_it_leads_to(admin):
    """`users disable` of the identity alone would say "disabled", and its person could go on."""
    await admin.add_user("bob", groups=["staff"])
    seen = UserId("webui", "7")
    await admin.changes.database.add_seen_user(seen, None, users_max=9)
    await admin.link(seen, BOB)
    for change in (admin.disable_user, admin.enable_user, partial(admin.set_user, groups=["lab"])):
        with pytest.raises(ChangeRefused, match="database:bob") as caught:
            await change(seen)
        assert caught.value.field == "user"
    await admin.unlink(seen)
    assert (await admin.disable_user(seen)).disabled_at == NOON


async def test_nobody_is_linked_to_a_forgotten_user(admin):
    """The link would lead to whoever gets the name next."""
    await admin.add_user("bob")
    await admin.forget(BOB)
    with pytest.raises(ChangeRefused, match="forgotten"):
        await admin.link(UserId("webui", "7"), BOB)


async def test_an_import_leaves_what_its_lines_do_not_say(admin):
    """A list of addresses takes nobody's groups away."""
    await admin.add_user("bob", groups=["staff"], email="bob@example.org")
    assert (await admin.import_users([ImportedUser(2, "bob", email="b@example.org")])).changed == ("bob",)
    assert (await admin.user(BOB)).groups == ("staff",)
    assert (await admin.import_users([ImportedUser(2, "bob", groups=("lab",))])).changed == ("bob",)
    assert (await admin.user(BOB)).email == "b@example.org"
    assert (await admin.import_users([ImportedUser(2, "bob")])).unchanged == ("bob",)
    assert (await admin.import_users([ImportedUser(2, "bob", groups=(), email="")])).changed == ("bob",)
    assert ((await admin.user(BOB)).groups, (await admin.user(BOB)).email) == ((), None)


async def test_an_import_is_made_as_a_whole_or_not_at_all(admin):
    """A trial changes nothing, a mistake names its line, and the same file again changes nothing."""
    lines = [ImportedUser(2, "ann", ("staff",), "ann@example.org"), ImportedUser(3, "bob")]
    trial = await replace(admin, changes=admin.changes.as_trial()).import_users(lines)
    assert (trial.added, await all_of(admin, users)) == (("ann", "bob"), [])
    for wrong in (ImportedUser(4, "eve", ("stuff",)), ImportedUser(4, "ann"), ImportedUser(4, "")):
        with pytest.raises(ChangeRefused, match="line 4"):
            await admin.import_users([*lines, wrong])
    assert await all_of(admin, users) == []
    assert (await admin.import_users(lines)).added == ("ann", "bob")
    again = await admin.import_users([replace(lines[0], groups=("lab",)), lines[1]])
    assert (again.added, again.changed, again.unchanged) == ((), ("ann",), ("bob",))
    assert (await admin.user(UserId("database", "ann"))).groups == ("lab",)


# --------------------------------------------------------------------------------------------------------------- keys


async def test_a_key_is_made_once_and_narrows_what_was_asked(admin):
    """Its text is nowhere in the database; the audit log says what it may do."""
    await admin.add_user("bob", groups=["staff", "lab"])
    limits = KeyLimits("ci", ["lab"], ["gpt-4o*"], ["10.0.0.0/8", "fd00::/8"], NOON + DAY, "nightly", True)
    new = await admin.create_key(BOB, limits)
    found = await admin.key(new.id)
    assert id_of(new.text) == new.id
    assert found.as_json() == {
        "id": new.id, "user": "database:bob", "label": "ci", "groups": ["lab"], "models": ["gpt-4o*"],
        "networks": ["10.0.0.0/8", "fd00::/8"], "tag": "nightly", "takes_tag_header": True, "expires_at": NOON + DAY,
        "revoked_at": None, "used_at": None, "used_from": None, "created_at": NOON, "created_by": "cli:ops",
        "replaced_by": None,
    }  # fmt: skip
    assert (await admin.changes.database.find_key(digest(new.text))).owner == BOB
    stored = repr([*await all_of(admin, api_keys), *await all_of(admin, audit)])
    assert new.text not in stored
    assert new.text.rpartition("_")[2] not in stored
    action, target, before, after = (await audited(admin))[-1]
    assert (action, target, before, after["user"], after["groups"]) == (
        *("key.create", new.id, None),
        *("database:bob", ["lab"]),
    )
    of_file = await admin.create_key(ALICE, KeyLimits())
    assert (await admin.key(of_file.id)).key.groups is None


async def test_a_revoked_key_stays_revoked(admin, clock):
    """Doing it again does not change when. With `cut`, the version of the change is noted."""
    new = await admin.create_key(ALICE, KeyLimits())
    assert (await admin.revoke_key(new.id)).key.revoked_at == NOON
    clock.now += HOUR
    assert (await admin.revoke_key(new.id, cut=True)).key.revoked_at == NOON
    assert [row["cut_version"] for row in await all_of(admin, api_keys)] == [await version(admin)]
    with pytest.raises(ChangeRefused, match="not valid any more"):
        await admin.rotate_key(new.id, overlap_ms=0)


async def test_a_rotated_key_ends_after_the_overlap(admin, clock):
    """The new one has the same limits; the old one can't be rotated again, and never ends later than before."""
    old = await admin.create_key(ALICE, KeyLimits("ci", tag="nightly", expires_at=NOON + 2 * HOUR))
    new = await admin.rotate_key(old.id, overlap_ms=HOUR)
    ended, begun = await admin.key(old.id), await admin.key(new.id)
    assert (ended.key.expires_at, ended.replaced_by) == (NOON + HOUR, new.id)
    assert replace(begun.key, id=old.id, expires_at=NOON + HOUR) == ended.key
    assert (await admin.changes.database.find_key(digest(new.text))).key.id == new.id
    with pytest.raises(ChangeRefused, match=new.id):
        await admin.rotate_key(old.id, overlap_ms=HOUR)
    await admin.rotate_key(new.id, overlap_ms=DAY)
    assert (await admin.key(new.id)).key.expires_at == NOON + 2 * HOUR
    clock.now += 3 * HOUR
    with pytest.raises(ChangeRefused, match="not valid"):
        await admin.rotate_key(new.id, overlap_ms=HOUR)


async def test_keys_are_found_in_a_log_and_in_a_diff(admin):
    """By the pattern, wherever they stand; a key of the file as a whole word. What only looks like one is not."""
    first, second = [await admin.create_key(ALICE, KeyLimits(label)) for label in ("one", "two")]
    log = f'{{"headers": {{"authorization": "Bearer {first.text}"}}}} lqp_7k2mq9xw4b_short x{second.text[4:]}'
    diff = f'+OPENAI_API_KEY="{second.text}"\n-api_key={FILE_KEY}\n+{second.text}'
    assert [each.key.label for each in await admin.find_keys(log)] == ["one"]
    assert [each.key.label for each in await admin.find_keys(diff)] == ["two", "laptop"]
    assert await admin.find_keys("nothing here") == []
    assert {each.key.id for each in await admin.keys(owner=ALICE)} == {first.id, second.id}
    assert [each.key.id for each in await admin.keys(text="TWO")] == [second.id]
    assert [each.key.id for each in await admin.keys(after=min(first.id, second.id))] == [max(first.id, second.id)]


@pytest.mark.parametrize(
    "text",
    [
        "GET /v1/models?key={}&a=1 HTTP/1.1",
        "https://user:{}@host/",
        "key:{}",
        "Bearer%20{}%0A",
        r'"one\n{}\ntwo"',
        "My key is {}.",
        "key: {}\r\n",
        "https://host/{}/x",
    ],
)
async def test_a_key_of_the_file_is_found_in_addresses_and_escaped_texts(admin, text):
    """Whatever stands around it."""
    assert [each.key.label for each in await admin.find_keys(text.format(FILE_KEY))] == ["laptop"]


async def test_only_the_whole_key_is_found_and_not_its_id(admin):
    """An id is no secret: whoever reads it in a list could have the key of another revoked as leaked."""
    new = await admin.create_key(ALICE, KeyLimits())
    assert await admin.find_keys(f"lqp_{new.id}_{'A' * 38}") == []


async def test_a_key_in_place_of_an_id_is_not_repeated(admin):
    """The errors of commands end up in the logs of others."""
    new = await admin.create_key(ALICE, KeyLimits())
    with pytest.raises(ChangeRefused) as caught:
        await admin.revoke_key(new.text)
    assert new.text[15:20] not in str(caught.value)
    assert "lqp_ID_" in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- forget


async def used(store, *, user: str, number: int, is_open: bool = False) -> None:
    """A call of this user, ended unless `is_open`."""
    labels, who = (
        CallLabels(user, "small", "chat", "openai"),
        binding([quota("staff/daily", tokens=10**6)], user=user),
    )
    id = f"{call_id_prefix(NOON)}{number:020x}"
    await store.apply([Reserve(id, "process-1", labels, who, call(10, 40))], NOON)
    if not is_open:
        await store.apply([Settle(id, Exactly(Tokens(9, 6)), "complete")], NOON)


async def test_a_forgotten_user_is_in_no_record_and_gets_no_fresh_quota(admin, store, clock, rows):
    """The sums stay the same under a pseudonym. The name is free when its windows have ended."""
    await admin.add_user("bob", groups=["staff"], email="bob@example.org")
    new = await admin.create_key(BOB, KeyLimits("bob's laptop"))
    await admin.link(UserId("webui", "7"), BOB)
    for number in range(3):
        await used(store, user=BOB.subject, number=number)
    await store.roll_up(1000, None)
    await used(store, user=BOB.subject, number=3)
    await used(store, user=BOB.subject, number=4, is_open=True)
    granting = GrantAdministration(admin.changes, GRANTING)
    await granting.create(NewGrant("staff/daily", BOB.subject, "tokens", 5, NOON + DAY, "bob asked"))
    await admin.changes.database.note_used({new.id: KeyUse(NOON, "192.0.2.1")})
    assert (await admin.key(new.id)).used_from == "192.0.2.1"
    await rows.refusal(1, BOB.subject, "staff/daily", NOON, details='{"user": "bob"}')
    pseudonym = await admin.forget(BOB)
    assert pseudonym.startswith("forgotten:")
    names = {row["user_name"] for table in (calls, usage_by_day) for row in await all_of(admin, table)}
    assert names == {pseudonym, BOB.subject}  # the call in flight keeps the name until it ends
    [day] = await all_of(admin, usage_by_day)
    assert (day["user_name"], day["calls"], day["input_tokens"]) == (pseudonym, 3, 27)
    assert (await admin.key(new.id)).key.revoked_at == NOON
    assert (await admin.key(new.id)).used_from is None
    # What another process noted before it knew.
    await admin.changes.database.note_used({new.id: KeyUse(NOON + 60_000, "192.0.2.1")})
    shown = repr([await all_of(admin, table) for table in (audit, users)])
    assert "example.org" not in shown
    assert "bob" not in repr([await all_of(admin, table) for table in (audit, grants, refusals)])
    with pytest.raises(ChangeRefused, match="forgotten"):
        await admin.add_user("bob")
    with pytest.raises(ChangeRefused, match="forgotten"):
        await admin.create_key(BOB, KeyLimits())
    with pytest.raises(ChangeRefused, match="forgotten"):
        await admin.enable_user(BOB)

    id = f"{call_id_prefix(NOON)}{4:020x}"
    await store.apply([Settle(id, Exactly(Tokens(9, 6)), "complete")], NOON)
    await store.roll_up(1000, None)  # before the record is anonymous: its sum has the name
    await admin.changes.database.free_forgotten()
    assert (await admin.user(BOB)).forgotten_at is not None
    assert (await admin.key(new.id)).used_from is None
    assert {row["user_name"] for table in (calls, usage_by_day) for row in await all_of(admin, table)} == {pseudonym}
    assert await admin.forget(BOB) == pseudonym
    assert sum(row["calls"] for row in await all_of(admin, usage_by_day)) == 5
    clock.now = max(row["resets_at"] for row in await all_of(admin, counters)) + 1
    await admin.changes.database.free_forgotten()
    assert (await all_of(admin, users), await all_of(admin, counters), await all_of(admin, api_keys)) == ([], [], [])
    assert (await admin.add_user("bob")).forgotten_at is None


async def test_a_user_who_was_taken_out_of_the_file_can_be_forgotten(admin, store):
    """There are only records then."""
    await used(store, user="carl", number=1)
    pseudonym = await admin.forget(UserId("file", "carl"))
    assert {row["user_name"] for row in await all_of(admin, calls)} == {pseudonym}


async def test_many_records_are_made_anonymous_in_steps(admin, store, monkeypatch):
    """No transaction changes more rows than a step has."""
    monkeypatch.setattr("proxy.identity.database._ROWS_AT_ONCE", 2)
    for number in range(5):
        await used(store, user="carl", number=number)
    pseudonym = await admin.forget(UserId("file", "carl"))
    assert {row["user_name"] for row in await all_of(admin, calls)} == {pseudonym}


async def test_what_is_rolled_up_while_a_user_is_forgotten_is_in_the_sums(admin, store):
    """Another process adds to the same sum of a day, and commits only after it was to be renamed."""
    if isinstance(store, SqliteStore):
        pytest.skip("one transaction at a time writes")
    row = {"day": 0, "user_name": "carl", "through": "staff", "model": "fast"} | dict.fromkeys(sums(), 5)
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.insert(usage_by_day), [row, row | {"user_name": "forgotten:x"}])
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.update(usage_by_day).where(usage_by_day.c.user_name == "carl").values(calls=6))
        forgetting = asyncio.create_task(admin.changes.database.make_anonymous("carl", "forgotten:x"))
        waiting = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        async with admin.changes.database.read() as other:
            while not await other.scalar(waiting):
                pass
    await forgetting
    assert await all_of(admin, usage_by_day) == [
        row | {"user_name": "forgotten:x", "calls": 11} | dict.fromkeys(sums()[1:], 10)
    ]


def sums() -> list[str]:
    """The names of the sums of a day."""
    return [column.name for column in usage_by_day.c if not column.primary_key]


async def test_changes_at_the_same_time_are_made_one_after_another(admin):
    """No two of them have one version, and none is lost."""
    await admin.add_user("bob")
    made = await asyncio.gather(*(admin.create_key(BOB, KeyLimits(str(number))) for number in range(10)))
    assert len({new.id for new in made}) == len(await admin.keys(owner=BOB)) == 10
    assert await version(admin) == 12


async def test_a_forgotten_user_is_in_no_import_of_the_audit_log(admin):
    """The lists of an import keep their lengths, and the name is replaced in them."""
    await admin.import_users([ImportedUser(1, "bob"), ImportedUser(2, "bob2")])
    await admin.import_users([ImportedUser(1, "bob", ("staff",))])
    pseudonym = await admin.forget(BOB)
    kept = [orjson.loads(row["after"]) for row in await all_of(admin, audit) if row["action"] == "user.import"]
    assert kept == [{"added": [pseudonym, "bob2"], "changed": []}, {"added": [], "changed": [pseudonym]}]


async def test_an_import_takes_few_statements(admin, monkeypatch):
    """It has SQLite's write lock, for which calls wait: 10,000 users with a few statements each took 24 s."""
    statements = []
    execute = AsyncConnection.execute

    async def counted(connection, statement, *more):
        statements.append(statement)
        return await execute(connection, statement, *more)

    monkeypatch.setattr(AsyncConnection, "execute", counted)
    lines = [ImportedUser(number, f"user-{number}", ("staff",)) for number in range(2000)]
    assert len((await admin.import_users(lines)).added) == 2000
    assert len((await admin.import_users([replace(line, groups=("lab",)) for line in lines])).changed) == 2000
    assert len(statements) < 30
