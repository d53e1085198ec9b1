"""Groups and quotas at run time: each change is one transaction, checked as the file is, and in the audit log."""

import asyncio
from dataclasses import replace

import orjson
import pytest
import sqlalchemy as sa

from proxy.administration.change import (
    Author,
    ChangeRefused,
    Changes,
    Conditions,
    Conflict,
    NotFound,
    PreconditionFailed,
)
from proxy.administration.directory import DirectoryAdministration, set_groups_of_file_user
from proxy.administration.effects import Effects
from proxy.administration.policy import ModelQuota, PolicyAdministration
from proxy.administration.policy_rows import read_version
from proxy.config.loader import load_text
from proxy.config.overlay import _parsed, overlaid
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import FileDirectory, UserId
from proxy.ledger.book import Reserve, Settle
from proxy.ledger.entry import CallLabels
from proxy.ledger.schema import audit, grants, users
from proxy.ledger.store import StoreUnavailable
from tests.builders import NOON, binding, call, exactly, quota
from tests.directory import add_user

FILE = """
upstreams: {simulated: {base_url: "http://127.0.0.1:9"}}
groups:
  staff: {quotas: {daily: {tokens: 200k, per: day}}}
  admins: {unlimited: true}
users:
  alice: {groups: [staff]}
  bob: {groups: [staff]}
"""
DAILY = {"tokens": 1000, "per": "day"}


@pytest.fixture
def database(store):
    return DirectoryDatabase(store, now=lambda: NOON)


@pytest.fixture
def admin(database):
    return PolicyAdministration(
        Changes(database, Author("cli:ops", "192.0.2.7", "req_7"), lambda: NOON), load_text(FILE)
    )


def under(admin, **conditions):
    """The same administration, for a request with these conditions."""
    return replace(admin, changes=replace(admin.changes, conditions=Conditions(**conditions)))


async def audited(admin):
    """The rows of the audit log, oldest first."""
    async with admin.changes.database.read() as connection:
        rows = (await connection.execute(sa.select(audit).order_by(audit.c.id))).mappings().all()
    decoded = ((row, *(row[name] and orjson.loads(row[name]) for name in ("before", "after"))) for row in rows)
    return [(row["action"], row["target"], before, after) for row, before, after in decoded]


async def in_force(admin):
    """The policy that the file and what was made result in."""
    return overlaid(admin.file, await admin.made()).config.policy


# ------------------------------------------------------------------------------------------------------------- quotas


async def test_a_quota_is_made_for_a_group_of_the_file_and_shown_as_yaml(admin):
    record, effects, _ = await admin.set_quota("staff", "weekly", {"tokens": "1M", "requests": 50, "per": "week"})
    assert (record.id, record.origin, record.created_by) == ("staff/weekly", "database", "cli:ops")
    assert (record.fields.tokens, record.fields.requests, record.fields.per) == (1_000_000, 50, "week")
    assert effects == Effects(members=2)
    made = load_text(record.yaml + "upstreams: {simulated: {base_url: 'http://127.0.0.1:9'}}\n")
    assert made.policy.groups["staff"].quotas == (await in_force(admin)).groups["staff"].quotas[1:]
    assert await audited(admin) == [
        ("quota.set", "staff/weekly", None, {"tokens": 1_000_000, "requests": 50, "per": "week"})
    ]


async def test_the_audit_row_says_from_where_and_with_which_request(admin):
    await admin.set_quota("staff", "weekly", DAILY)
    async with admin.changes.database.read() as connection:
        row = (await connection.execute(sa.select(audit))).one()
        assert await read_version(connection) == int(row.id.removeprefix("aud_"), 16)
    assert (row.at, row.actor, row.address, row.request_id) == (NOON, "cli:ops", "192.0.2.7", "req_7")


@pytest.mark.parametrize(
    ("fields", "field", "text"),
    [
        ({"tokens": -1, "per": "day"}, "tokens", "not a whole number from 0 up"),
        ({"tokens": 5, "per": "dayly"}, "per", "is no window"),
        ({"tokens": 5}, "per", "missing"),
        ({"tokns": 5, "per": "day"}, "tokns", 'did you mean "tokens"?'),
        ({"per": "day"}, "tokens", "limits nothing"),
        ({"tokens": None, "per": "day"}, "tokens", "limits nothing"),
        ({"tokens": 5, "per": "day", "models": []}, "models", "no entries"),
        ({"requests": 5, "per": "day", "overdraft": 5}, "tokens", "overdraft needs"),
    ],
)
async def test_a_quota_is_checked_as_in_the_file_and_the_error_names_the_field(admin, fields, field, text):
    with pytest.raises(ChangeRefused, match=text.replace("?", r"\?")) as error:
        await admin.set_quota("staff", "weekly", fields)
    assert error.value.field == field
    assert await audited(admin) == []


@pytest.mark.parametrize(
    ("group", "name", "error", "text"),
    [
        ("staff", "daily", Conflict, "is a quota of the file"),
        ("admins", "daily", Conflict, "is unlimited"),
        ("nobody", "daily", Conflict, "there is no group"),
        ("staff", "a b", ChangeRefused, "not a valid name"),
    ],
)
async def test_a_quota_that_would_have_no_effect_is_refused(admin, group, name, error, text):
    with pytest.raises(error, match=text):
        await admin.set_quota(group, name, DAILY)


async def test_an_edit_replaces_all_fields_so_a_blank_limit_is_cleared(admin):
    await admin.set_quota("staff", "weekly", {"tokens": 1000, "requests": 5, "per": "day"})
    first = await admin.quota("staff", "weekly")
    record, *_ = await admin.set_quota("staff", "weekly", {"tokens": None, "requests": 5, "per": "6h"})
    assert (record.fields.tokens, record.fields.requests, record.fields.per) == (None, 5, "6h")
    assert record.etag != first.etag
    assert (await audited(admin))[-1][2:] == (
        {"tokens": 1000, "requests": 5, "per": "day"},
        {"requests": 5, "per": "6h"},
    )


async def test_a_deleted_quota_is_gone_and_its_counters_are_not(admin, store):
    await admin.set_quota("staff", "weekly", DAILY)
    ann = binding([quota("staff/weekly", tokens=1000)], user="alice")
    labels = CallLabels("alice", "m", "chat", "u")
    await store.apply(
        [Reserve("req_1", "me", labels, ann, call(10, 10)), Settle("req_1", exactly(10, 5), "complete")], NOON
    )
    await admin.delete_quota("staff", "weekly")
    assert [each.id for each in (await admin.quotas()).data] == ["staff/daily"]
    with pytest.raises(NotFound, match="there is no quota staff/weekly"):
        await admin.delete_quota("staff", "weekly")
    await admin.set_quota("staff", "weekly", {"tokens": 15, "per": "day"})
    [counter] = (await store.read_counters(ann.keys())).values()
    assert counter.used.input + counter.used.output == 15


async def test_the_effects_of_a_change_count_members_and_who_is_over_now(admin, store, database):
    await add_user(database, "carl", groups=["staff"])
    await add_user(database, "dora", groups=["lab"])
    await admin.set_quota("staff", "weekly", DAILY)
    for name, used in (("alice", 15), ("carl", 900)):
        ann = binding([quota("staff/weekly", tokens=1000)], user=name)
        labels = CallLabels(name, "m", "chat", "u")
        act = [Reserve(name, "me", labels, ann, call(used, 10)), Settle(name, exactly(used, 0), "complete")]
        await store.apply(act, NOON)
    trial = under(admin, is_trial=True)
    record, effects, sentence = await trial.set_quota("staff", "weekly", {"tokens": 500, "per": "day"})
    assert record.fields.tokens == 500
    assert (effects.members, effects.members_over) == (3, 1)
    assert sentence == "Each of 3 members may use 500 tokens a day of any model; 1 of them would be over now."
    _, shared, _ = await trial.set_quota("staff", "weekly", {"tokens": 500, "per": "day", "shared": True})
    assert shared.members_over == 0  # the pot starts at 0
    deleted = await trial.delete_quota("staff", "weekly")
    assert deleted == Effects(members=3)
    assert (await admin.quota("staff", "weekly")).fields.tokens == 1000
    assert len(await audited(admin)) == 1


async def test_a_quota_that_can_never_refuse_is_a_warning_and_not_a_mistake(admin):
    _, effects, _ = await admin.set_quota("staff", "loose", {"tokens": "300k", "per": "day"})
    assert effects.warnings == ("staff/loose can never refuse a call: staff/daily is used up first",)
    _, again, _ = await admin.set_quota("staff", "other", {"requests": 9, "per": "day"})
    assert again.warnings == ()


# ---------------------------------------------------------------------------------------------- If-Match, whole sets


async def test_the_second_of_two_administrators_is_told(admin):
    first, *_ = await admin.set_quota("staff", "weekly", DAILY)
    await under(admin, if_match=first.etag).set_quota("staff", "weekly", {"tokens": 2000, "per": "day"})
    with pytest.raises(PreconditionFailed):
        await under(admin, if_match=first.etag).set_quota("staff", "weekly", {"tokens": 3000, "per": "day"})
    with pytest.raises(PreconditionFailed):
        await under(admin, if_match=first.etag).delete_quota("staff", "weekly")
    with pytest.raises(PreconditionFailed):
        await under(admin, is_creation=True).set_quota("staff", "weekly", DAILY)
    assert (await admin.quota("staff", "weekly")).fields.tokens == 2000


async def test_of_concurrent_edits_on_one_version_one_wins(admin):
    first, *_ = await admin.set_quota("staff", "weekly", DAILY)
    edits = (
        under(admin, if_match=first.etag).set_quota("staff", "weekly", {"tokens": tokens, "per": "day"})
        for tokens in range(2000, 2008)
    )
    results = await asyncio.gather(*edits, return_exceptions=True)
    assert [type(each) for each in results if not isinstance(each, tuple)] == [PreconditionFailed] * 7


async def test_the_whole_set_of_a_group_is_replaced_in_one_change(admin):
    """One changed, one dropped, one added."""
    for name in ("one", "two"):
        await admin.set_quota("staff", name, {"requests": 5, "per": "day"})
    before = await admin.quotas(group="staff")
    wanted = {"two": {"requests": 7, "per": "day"}, "three": {"requests": 9, "per": "6h"}}
    after, _, sentences = await under(admin, if_match=before.etag).set_quotas("staff", wanted)
    assert [each.id for each in after.data] == ["staff/daily", "staff/two", "staff/three"]
    assert sentences == [
        f"Each of 2 members may use {allowed} of any model; none of them is over now."
        for allowed in ("200,000 tokens a day", "7 requests a day", "9 requests in 6 hours from the first call")
    ]
    action, target, was, now = (await audited(admin))[-1]
    assert (action, target) == ("quotas.set", "staff")
    assert set(was) == {"staff/one", "staff/two"}
    assert set(now) == {"staff/two", "staff/three"}
    with pytest.raises(PreconditionFailed):
        await under(admin, if_match=before.etag).set_quotas("staff", {})


async def test_a_quota_without_effect_is_described_as_such(admin):
    await admin.set_quota("staff", "weekly", DAILY)
    file = load_text(FILE.replace("staff: {quotas: {daily: {tokens: 200k, per: day}}}", "staff: {unlimited: true}"))
    _, _, sentences = await replace(admin, file=file).set_quotas("staff", {"weekly": DAILY})
    assert sentences == ['It has no effect: the group "staff" is unlimited.']


async def test_one_mistake_in_a_set_changes_nothing(admin):
    await admin.set_quota("staff", "one", {"requests": 5, "per": "day"})
    with pytest.raises(ChangeRefused):
        await admin.set_quotas(
            "staff", {"two": {"requests": 7, "per": "day"}, "bad": {"requests": "x", "per": "day"}}
        )
    assert [each.id for each in (await admin.quotas(group="staff")).data] == ["staff/daily", "staff/one"]


async def test_the_quotas_of_a_model_over_all_groups_are_replaced_in_one_change(admin):
    """As the seed's form saves: a row for each group."""
    await admin.create_group("lab")
    first = [ModelQuota("staff", {"tokens": 10, "per": "24h"}), ModelQuota("lab", {"requests": 3, "per": "1h"})]
    await admin.set_model_quotas("meta/llama-3", first)
    assert [each.id for each in (await admin.quotas(model="meta/llama-3")).data] == [
        "staff/meta-llama-3",
        "lab/meta-llama-3",
    ]
    after, *_ = await admin.set_model_quotas("meta/llama-3", [ModelQuota("lab", {"tokens": 9, "per": "7d"}, "own")])
    [record] = after.data
    assert (record.id, record.fields.models, record.fields.tokens) == ("lab/own", ["meta/llama-3"], 9)
    with pytest.raises(Conflict, match="for other models"):
        await admin.set_model_quotas("o3", [ModelQuota("lab", {"tokens": 9, "per": "7d"}, "own")])
    with pytest.raises(ChangeRefused, match="given twice"):
        await admin.set_model_quotas("o3", [ModelQuota("lab", {"tokens": 9, "per": "7d"})] * 2)


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (ModelQuota("staff", {"tokens": "x", "per": "day"}), "quotas.1.tokens"),
        (ModelQuota("staff", {"tokens": 9, "per": "zz"}), "quotas.1.per"),
        (ModelQuota("staff", {"tokens": 9, "per": "day"}, "a/b"), "quotas.1.name"),
        (ModelQuota("staff", {"tokens": 9, "per": "day"}, "daily"), "quotas.1.id"),
        (ModelQuota("staff", {"tokens": 9, "per": "day"}, "other"), "quotas.1.name"),
        (ModelQuota("staff", {"tokens": 9, "per": "day"}), "quotas.1.name"),
        (ModelQuota("stuff", {"tokens": 9, "per": "day"}), "quotas.1.group"),
    ],
)
async def test_a_mistake_in_a_set_names_the_row(admin, second, field):
    """A form shows it at the field of that row. `staff/daily` is in the file, `staff/other` is for other models."""
    await admin.set_quota("staff", "other", {"tokens": 1, "per": "day"})
    with pytest.raises(ChangeRefused) as raised:
        await admin.set_model_quotas("o3", [ModelQuota("staff", {"tokens": 9, "per": "day"}), second])
    assert raised.value.field == field
    if second.name != "other" and second.name is not None:
        with pytest.raises(ChangeRefused) as raised:
            await admin.set_quotas("staff", {"first": {"tokens": 9, "per": "day"}, second.name: second.fields})
        assert raised.value.field == field


# ------------------------------------------------------------------------------------------------------------- groups


async def test_groups_are_made_behind_those_of_the_file_and_put_in_order(admin):
    for name in ("lab", "art"):
        await admin.create_group(name, models=["gpt-*"])
    await admin.order_groups(["art", "lab"])
    records = await admin.groups()
    assert [(each.name, each.origin, each.position) for each in records] == [
        ("staff", "file", 0),
        ("admins", "file", 1),
        ("art", "database", 2),
        ("lab", "database", 3),
    ]
    with pytest.raises(ChangeRefused, match="name each group"):
        await admin.order_groups(["art"])


async def test_a_group_that_is_there_is_no_new_one_and_a_group_of_the_file_is_not_changed(admin):
    await admin.create_group("lab")
    for name in ("lab", "staff"):
        with pytest.raises(Conflict):
            await admin.create_group(name)
    for change in (admin.set_group("staff", unlimited=True), admin.delete_group("staff")):
        with pytest.raises(Conflict, match="change the file"):
            await change
    with pytest.raises(ChangeRefused, match="only in case"):
        await admin.create_group("Everyone")
    with pytest.raises(ChangeRefused, match="no entries"):
        await admin.create_group("art", models=[])


async def test_a_group_with_quotas_does_not_become_unlimited(admin):
    await admin.create_group("lab")
    await admin.set_quota("lab", "daily", DAILY)
    with pytest.raises(Conflict, match="is unlimited"):
        await admin.set_group("lab", unlimited=True)
    record, _ = await admin.set_group("lab", models=["o3"])
    assert (record.models, record.unlimited, record.quotas) == (("o3",), False, ("lab/daily",))


async def test_a_deleted_group_takes_its_quotas_and_members_with_it(admin, database):
    await admin.create_group("lab")
    await admin.set_quota("lab", "daily", DAILY)
    carl = await add_user(database, "carl", groups=["staff", "lab"])
    await admin.delete_group("lab")
    assert [each.id for each in (await admin.quotas()).data] == ["staff/daily"]
    assert (await database.find_user(carl)).groups == ("staff",)
    await admin.create_group("lab")
    assert (await admin.quotas(group="lab")).data == ()
    assert (await database.find_user(carl)).groups == ("staff",)


async def test_a_repeated_creation_finds_what_the_first_made(admin):
    once = under(admin, idempotency_key="k1", fingerprint="a")
    first, _ = await once.create_group("lab")
    second, _ = await once.create_group("lab")
    assert second == first
    with pytest.raises(Conflict, match="another request"):
        await under(admin, idempotency_key="k1", fingerprint="b").create_group("art")
    assert len(await audited(admin)) == 1


async def test_users_of_the_file_and_of_the_database_become_members(admin, database):
    await admin.create_group("lab")
    directory = DirectoryAdministration(
        admin.changes,
        FileDirectory(admin.file.users),
        ("staff", "admins", "lab"),
        file_group_names=("staff", "admins"),
    )
    carl = await add_user(database, "carl", groups=["staff"])
    assert (await directory.set_member("lab", carl, is_member=True)).groups == ("staff", "lab")
    assert (await directory.set_member("lab", UserId("file", "bob"), is_member=True)).groups == ("staff", "lab")
    users_in_force = {user.name: user.groups for user in overlaid(admin.file, await admin.made()).config.users}
    assert users_in_force == {"alice": ("staff",), "bob": ("staff", "lab")}
    with pytest.raises(ChangeRefused, match="change the file"):
        await directory.set_member("staff", UserId("file", "bob"), is_member=False)
    await directory.set_member("lab", UserId("file", "bob"), is_member=False)
    assert (await admin.made()).groups_of == {}


# ------------------------------------------------------------------------------------------------------------- import


async def test_a_file_is_taken_over_with_its_order_and_members(admin):
    """Whoever wants to leave the YAML removes the groups there afterwards."""
    imported = load_text(
        FILE.replace("admins:", "lab: {quotas: {pot: {shared: true, tokens: 5M, per: month}}}\n  admins:")
    )
    ids, _ = await admin.import_file(imported)
    assert ids == ("staff/daily", "lab/pot")
    without = "upstreams: {simulated: {base_url: 'http://127.0.0.1:9'}}\nusers: {alice: {}, bob: {}}\n"
    left = overlaid(load_text(without), await admin.made())
    assert left.without_effect == ()
    assert left.config.policy.groups == imported.policy.groups
    assert [user.groups for user in left.config.users] == [("staff",), ("staff",)]
    again, effects = await admin.import_file(imported)
    assert (again, effects) == (ids, Effects())


async def test_an_import_leaves_other_groups_and_their_members(admin, database):
    """Of the groups in the file, members are those whom the file names."""
    await admin.create_group("lab")
    async with database.change() as (connection, _):
        await set_groups_of_file_user(connection, "alice", ["lab", "admins"], at=NOON, by="x")
    await admin.import_file(load_text(FILE))
    assert (await admin.made()).groups_of["alice"] == ("staff", "lab")
    assert [group.name for group in (await admin.made()).groups] == ["staff", "admins", "lab"]


async def test_users_of_a_deleted_row_leave_nothing_broken(admin, database):
    """A membership of a user who is not in the file any more has no effect."""
    await admin.create_group("lab")
    async with database.change() as (connection, _):
        row = {"source": "file", "id": "gone", "groups": '["lab"]', "is_service": False}
        await connection.execute(sa.insert(users).values(**row, created_at=NOON, created_by="x"))
    assert [user.name for user in overlaid(admin.file, await admin.made()).config.users] == ["alice", "bob"]


async def test_a_quota_of_the_file_is_not_deleted_here(admin):
    """Nor does the audit log say that it was."""
    with pytest.raises(Conflict, match="is a quota of the file"):
        await admin.delete_quota("staff", "daily")
    assert await audited(admin) == []


async def test_the_effects_of_deleting_a_group_count_its_members(admin, database):
    """Those of the file and of the database, as they were before; a trial says the same."""
    await admin.create_group("art")
    await admin.set_quota("art", "daily", DAILY)
    directory = DirectoryAdministration(
        admin.changes,
        FileDirectory(admin.file.users),
        ("staff", "admins", "art"),
        file_group_names=("staff", "admins"),
    )
    await add_user(database, "dora", groups=["art"])
    await directory.set_member("art", UserId("file", "alice"), is_member=True)
    trial = await under(admin, is_trial=True).delete_group("art")
    assert trial == await admin.delete_group("art")
    assert trial.members == 2


async def test_a_change_reads_no_other_quota_again(admin):
    """All quotas are looked at whenever one changes. With 10,000 of them, reading each anew took seconds."""
    _parsed.cache_clear()
    for number in range(5):
        await admin.set_quota("staff", f"q{number}", DAILY)
    assert _parsed.cache_info().misses == 5


async def test_a_wrong_name_is_answered_with_names_of_the_same_group_only(admin):
    """A manager may ask, who does not see the quotas of other groups."""
    await admin.create_group("lab")
    await admin.set_quota("lab", "dailys", DAILY)
    with pytest.raises(NotFound) as caught:
        await admin.quota("staff", "dailyz")
    assert "daily" in str(caught.value)
    assert "lab" not in str(caught.value)


class Away(DirectoryDatabase):
    """A database that can't be read any more once a change is made."""

    def read(self):
        raise StoreUnavailable("it is away")


async def test_a_change_that_is_made_is_not_answered_as_if_it_had_failed(admin, store):
    """Its effects are read afterwards. A trial has nothing else to say, so it fails."""
    away = replace(admin, changes=replace(admin.changes, database=Away(store, now=lambda: NOON)))
    record, effects, sentence = await away.set_quota("staff", "hours", DAILY)
    assert record.id == "staff/hours"
    assert "The change is made" in effects.warnings[0]
    assert sentence == "Each member may use 1,000 tokens a day of any model."
    assert (await admin.quota("staff", "hours")).fields.tokens == 1000
    with pytest.raises(StoreUnavailable):
        await replace(away, changes=away.changes.as_trial()).set_quota("staff", "more", DAILY)


async def test_a_grant_of_a_later_release_is_left_out(admin, store):
    """It may have measures that this release does not know. All else is read."""
    await admin.set_quota("staff", "hours", DAILY)
    row = {"id": "grt_1", "quota_id": "staff/hours", "measure": "images", "amount": 5, "until": NOON + 1000}
    async with store.transaction(writes=True) as connection:
        await connection.execute(sa.insert(grants).values(**row, reason="x", created_at=NOON, created_by="cli:ops"))
    made = await admin.made()
    assert ([quota.id for quota in made.quotas], made.grants) == (["staff/hours"], ())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["lab"], []),
        (["lab", "staff"], ["staff"]),
        (["staff", "lab"], ["staff"]),
        (["staff", "lab", "xlab"], ["staff", "xlab"]),
        (["xlab", "labx", "lab.x"], ["xlab", "labx", "lab.x"]),
    ],
)
async def test_a_deleted_group_leaves_the_other_groups_of_its_members(admin, store, before, after):
    """Their lists are changed as texts, with one statement for 100,000 members."""
    await admin.create_group("lab")
    async with store.transaction(writes=True) as connection:
        row = {"source": "database", "id": "ann", "groups": orjson.dumps(before).decode(), "is_service": False}
        await connection.execute(sa.insert(users).values(**row, created_at=NOON, created_by="cli:ops"))
    await admin.delete_group("lab")
    async with store.transaction() as connection:
        assert await connection.scalar(sa.select(users.c.groups)) == orjson.dumps(after).decode()


async def test_a_group_is_not_deleted_with_a_quota_that_nobody_has_seen(admin):
    """Another administrator has made it meanwhile."""
    record, _ = await admin.create_group("lab")
    await admin.set_quota("lab", "daily", DAILY)
    with pytest.raises(PreconditionFailed):
        await under(admin, if_match=record.etag).delete_group("lab")
    await under(admin, if_match=(await admin.group("lab")).etag).delete_group("lab")
