"""Groups and quotas that are made at run time, beside those of the file.

All changes have one form: `MadePolicy` is read in the transaction, a pure function makes another one of it, and the
difference is written (`policy_rows`). A quota has the same fields and checks as in the file, by the same code.

A counter belongs to the id of its quota. So a quota that is changed keeps its usage, and one that is deleted and made
again within its window goes on counting.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.change import Change, ChangeRefused, Changes, Conflict, NotFound, etag_of, valid
from proxy.administration.effects import Effects, Reach, effects_of
from proxy.administration.policy_rows import read_made, remove_members, set_groups_of_file_user, write_made
from proxy.config import values
from proxy.config.document import to_yaml
from proxy.config.loader import Config
from proxy.config.messages import read_quota
from proxy.config.overlay import MadeGroup, MadePolicy, MadeQuota, Overlaid, overlaid
from proxy.config.schema import Quota as QuotaSection
from proxy.config.sentences import quota_sentence
from proxy.config.suggestions import did_you_mean
from proxy.ledger.store import StoreUnavailable
from proxy.policy.amounts import Measure
from proxy.policy.quota import Quota

Origin = Literal["file", "database"]
Fields = Mapping[str, object]
_NOT_READ = "The change is made. Whom it touches is not known, because the database can't be reached right now."


@dataclass(frozen=True, slots=True)
class QuotaRecord:
    """A quota as administrators see it.

    `fields` are those of the file. `without_effect` says why a quota that was made at run time does not count now;
    None: it counts. `yaml` is what the file would have. `etag` changes with the fields. `created_at` is in ms; None:
    it is the file's.
    """

    id: str
    group: str
    name: str
    origin: Origin
    fields: QuotaSection
    yaml: str
    etag: str
    without_effect: str | None = None
    created_at: int | None = None
    created_by: str | None = None


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """A group as administrators see it, at its place in the order in which groups admit calls.

    `models` are those that its members may use; None: it has no list. `quotas` are the ids of its quotas in order.
    """

    name: str
    position: int
    origin: Origin
    models: tuple[str, ...] | None
    unlimited: bool
    quotas: tuple[str, ...]
    etag: str
    without_effect: str | None = None
    created_at: int | None = None
    created_by: str | None = None


@dataclass(frozen=True, slots=True)
class QuotaSet:
    """Quotas that are changed together: all of a group, or all for one model. `etag` changes with any of them."""

    data: tuple[QuotaRecord, ...]
    etag: str


@dataclass(frozen=True, slots=True)
class ModelQuota:
    """The quota of a group for one model, to be set. `name` None: one is derived from the model's name."""

    group: str
    fields: Fields
    name: str | None = None


@dataclass(frozen=True)
class PolicyAdministration:
    """The changes and lists of groups and quotas. `file` is the file in force, without what was made at run time.

    Methods raise ChangeRefused and StoreUnavailable.
    """

    changes: Changes
    file: Config

    # Reading

    async def made(self) -> MadePolicy:
        """What was made at run time."""
        async with self.changes.database.read() as connection:
            return await read_made(connection, self.changes.now())

    async def quotas(self, *, group: str | None = None, model: str | None = None) -> QuotaSet:
        """The quotas in the order of the policy: of one group, or whose `models` are this name alone."""
        return await asyncio.to_thread(_quota_set, self.file, await self.made(), group=group, model=model)

    async def quota(self, group: str, name: str) -> QuotaRecord:
        """One quota."""
        return await asyncio.to_thread(_quota_record, self.file, await self.made(), group, name)

    async def groups(self) -> tuple[GroupRecord, ...]:
        """The groups in the order of the policy."""
        return tuple(await asyncio.to_thread(_group_records, self.file, await self.made()))

    @staticmethod
    def order_etag(records: Iterable[GroupRecord]) -> str:
        """Changes with the order of the groups that were made at run time."""
        return etag_of([record.name for record in records if record.origin == "database"])

    async def group(self, name: str) -> GroupRecord:
        """One group."""
        return _group_record(self.file, await self.made(), name)

    # Quotas

    async def set_quota(self, group: str, name: str, fields: Fields) -> tuple[QuotaRecord, Effects, str]:
        """Make a quota, or change its fields: all that are not given have their defaults. A limit of None is none.

        Returns a sentence about it too, as do the changes of several quotas.
        """
        quota = self._checked_quota(group, name, fields)
        async with self._policy_change("quota.set", quota.id) as change:
            before = await self._read(change)
            after = _with_quotas(before, [quota])
            await self._write_quota(change, before, after, quota.id)
        record = _quota_record(self.file, after, group, name)
        effects, [sentence] = await self._described(before, after, [record])
        return record, effects, sentence

    async def delete_quota(self, group: str, name: str) -> Effects:
        """Delete a quota. Calls in flight go on, and its counters stay until their windows end."""
        id = f"{group}/{name}"
        async with self._policy_change("quota.delete", id) as change:
            before = await self._read(change)
            _find_quota(self.file, before, group, name)  # raises NotFound
            if all(quota.id != id for quota in before.quotas):
                raise Conflict("id", f"{id} is a quota of the file: change the file")
            after = _without_quotas(before, {id})
            await self._write_quota(change, before, after, id)
        return await self._effects(before, after)

    async def set_quotas(self, group: str, wanted: Mapping[str, Fields]) -> tuple[QuotaSet, Effects, list[str]]:
        """Replace all quotas of a group that were made at run time, in this order."""
        made = []
        for number, (name, fields) in enumerate(wanted.items()):
            with _in_row(number):
                made.append(self._checked_quota(group, name, fields))
        return await self._replace("quotas.set", group, made, lambda quota: quota.group == group, group=group)

    async def set_model_quotas(self, model: str, wanted: Iterable[ModelQuota]) -> tuple[QuotaSet, Effects, list[str]]:
        """Replace the quotas of all groups that were made at run time for this model name alone."""
        valid("model", values.glob, model)
        derived = values.derived_name(model)
        made = []
        for number, each in enumerate(wanted):
            with _in_row(number):
                fields = {**each.fields, "models": [model]}
                made.append(self._checked_quota(each.group, each.name or derived, fields))
        return await self._replace(
            "quotas.set_for_model", model, made, lambda quota: _is_for(quota, model), model=model
        )

    async def _replace(
        self,
        action: str,
        target: str,
        made: Sequence[MadeQuota],
        is_replaced: Callable[[MadeQuota], bool],
        **listed: str,
    ) -> tuple[QuotaSet, Effects, list[str]]:
        ids = [quota.id for quota in made]
        for number, id in enumerate(ids):
            if id in ids[:number]:
                text = f"{id} is given twice; give each quota of a group its own name"
                raise ChangeRefused(f"quotas.{number}.name", text)
        async with self._policy_change(action, target) as change:
            before = await self._read(change)
            change.check_match(_set_etag(_listed(before, **listed)))
            gone = {quota.id for quota in before.quotas if is_replaced(quota)} - set(ids)
            taken = [quota.id for quota in before.quotas if quota.id in ids and not is_replaced(quota)]
            if taken:
                text = f"{taken[0]} is a quota for other models; give this one another name"
                raise Conflict(f"quotas.{ids.index(taken[0])}.name", text)
            after = _with_quotas(_without_quotas(before, gone), made)
            changed = [*gone, *ids]
            await self._check(before, after, changed, rows=ids)
            change.note(_documents(before, changed), _documents(after, changed))
            await write_made(change.connection, before, after)
        shown = await asyncio.to_thread(_quota_set, self.file, after, **listed)
        return shown, *await self._described(before, after, shown.data)

    # Groups

    async def create_group(
        self, name: str, *, models: Sequence[str] | None = None, unlimited: bool = False
    ) -> tuple[GroupRecord, Effects]:
        """Make a group, behind all others."""
        valid("name", values.group_name, name)
        group = self._made_group(name, models, unlimited=unlimited)
        async with self._policy_change("group.create", name) as change:
            before = await self._read(change)
            if change.repeated is not None:
                return _group_record(self.file, before, name), Effects()
            if name in self.file.policy.groups or any(each.name == name for each in before.groups):
                raise Conflict("name", f'there is a group "{name}" already; change it, or choose another name')
            after = replace(before, groups=(*before.groups, group))
            await self._check(before, after, [name])
            change.note(None, _group_document(group))
            await write_made(change.connection, before, after)
        return _group_record(self.file, after, name), await self._effects(before, after)

    async def set_group(
        self, name: str, *, models: Sequence[str] | None = None, unlimited: bool = False
    ) -> tuple[GroupRecord, Effects]:
        """Change the models of a group (None: no list), and whether it is unlimited."""
        group = self._made_group(name, models, unlimited=unlimited)
        async with self._policy_change("group.set", name) as change:
            before = await self._read(change)
            was = self._changeable_group(change, before, name)
            changed = replace(group, created_at=was.created_at, created_by=was.created_by)
            after = replace(before, groups=tuple(changed if each is was else each for each in before.groups))
            await self._check(before, after, [name, *(quota.id for quota in before.quotas if quota.group == name)])
            change.note(_group_document(was), _group_document(changed))
            await write_made(change.connection, before, after)
        return _group_record(self.file, after, name), await self._effects(before, after)

    async def delete_group(self, name: str) -> Effects:
        """Delete a group with its quotas. Its members are then not in it, also if it is made again."""
        was_made = await self.made()
        effects = await self._effects(was_made, _without_group(was_made, name))  # while it has its members
        async with self._policy_change("group.delete", name) as change:
            before = await self._read(change)
            was = self._changeable_group(change, before, name)
            after = _without_group(before, name)
            documents = {quota.name: quota.document for quota in before.quotas if quota.group == name}
            change.note({**_group_document(was), "quotas": documents}, None)
            await write_made(change.connection, before, after)
            await remove_members(change.connection, name)
        return effects

    async def order_groups(self, names: Sequence[str]) -> tuple[tuple[GroupRecord, ...], Effects]:
        """Put the groups that were made at run time into this order. It must name each of them once."""
        async with self._policy_change("group.order", "groups") as change:
            before = await self._read(change)
            current = [group.name for group in before.groups]
            change.check_match(self.order_etag(_group_records(self.file, before)))
            if sorted(names) != sorted(current):
                own = ", ".join(current) or "none"
                raise ChangeRefused("names", f"name each group that was made at run time once: {own}")
            by_name = {group.name: group for group in before.groups}
            after = replace(before, groups=tuple(by_name[name] for name in names))
            change.note({"order": current}, {"order": list(names)})
            await write_made(change.connection, before, after)
        return tuple(_group_records(self.file, after)), await self._effects(before, after)

    async def import_file(self, imported: Config) -> tuple[tuple[str, ...], Effects]:
        """Take over the groups, their quotas and the groups of users of a file. Returns the ids of the quotas.

        Usage is kept, because counters belong to the ids. What the file in force has under the same name wins until
        it is removed there. Doing it again sets everything to what the file says. Other groups, and who is in them,
        stay.
        """
        now, by = self.changes.now(), self.changes.author.actor
        made = [
            MadeGroup(group.name, None if group.models is None else group.models.texts, group.unlimited, now, by)
            for group in imported.policy.groups.values()
        ]
        quotas = [
            MadeQuota(quota.group, quota.name, document_of(quota), now, by)
            for group in imported.policy.groups.values()
            for quota in group.quotas
        ]
        async with self._policy_change("policy.import", "groups") as change:
            before = await self._read(change)
            names = {group.name for group in made}
            others = tuple(group for group in before.groups if group.name not in names)
            kept = {user: [name for name in of if name not in names] for user, of in before.groups_of.items()}
            members = {user.name: (*user.groups, *kept.get(user.name, ())) for user in imported.users if user.groups}
            after = _with_quotas(before, quotas)
            after = replace(after, groups=(*made, *others), groups_of={**before.groups_of, **members})
            change.note(None, {"groups": sorted(names), "quotas": sorted(quota.id for quota in quotas)})
            await write_made(change.connection, before, after)
            await self._write_members(change.connection, before.groups_of, after.groups_of)
        return tuple(quota.id for quota in quotas), await self._effects(before, after)

    # Parts

    def _policy_change(self, action: str, target: str) -> AbstractAsyncContextManager[Change]:
        return self.changes.begin(action, target, is_of_policy=True)

    async def _read(self, change: Change) -> MadePolicy:
        return await read_made(change.connection, self.changes.now())

    async def _effects(self, before: MadePolicy, after: MadePolicy) -> Effects:
        effects, _ = await self._described(before, after, ())
        return effects

    async def _described(
        self, before: MadePolicy, after: MadePolicy, records: Sequence[QuotaRecord]
    ) -> tuple[Effects, list[str]]:
        """What a change does to members, and a sentence about each quota. Read after it, so that nobody waits."""
        is_trial = self.changes.conditions.is_trial
        was, will = await asyncio.to_thread(lambda: (overlaid(self.file, before), overlaid(self.file, after)))
        quotas, reach = will.config.policy.quotas, dict[str, Reach]()
        described = [quotas[record.id] for record in records if record.without_effect is None]
        try:
            async with self.changes.database.read() as connection:
                now = self.changes.now()
                effects, reach = await effects_of(connection, was.config, will.config, now=now, reach_of=described)
        except StoreUnavailable:
            if is_trial:
                raise
            effects = Effects(warnings=(_NOT_READ,))  # the change is made, so it must not be answered as if it failed
        unknown = Reach(None, 0)
        sentences = {
            quota.id: quota_sentence(quota, *reach.get(quota.id, unknown), is_trial=is_trial) for quota in described
        }
        return effects, [
            sentences.get(record.id) or f"It has no effect: {record.without_effect}." for record in records
        ]

    async def _write_quota(self, change: Change, before: MadePolicy, after: MadePolicy, id: str) -> None:
        was = next((quota for quota in before.quotas if quota.id == id), None)
        change.check_match(None if was is None else _etag(was.document))
        await self._check(before, after, [id])
        change.note(_documents(before, [id]).get(id), _documents(after, [id]).get(id))
        await write_made(change.connection, before, after)

    async def _check(
        self, before: MadePolicy, after: MadePolicy, ids: Collection[str], *, rows: Sequence[str] = ()
    ) -> None:
        """Raise ChangeRefused if something that is changed would have no effect. `rows` are the ids of a set."""
        wanted = set(ids)
        found = await asyncio.to_thread(overlaid, self.file, after)
        problems = [each for each in found.without_effect if each.id in wanted]
        if not problems:
            return
        was = await asyncio.to_thread(overlaid, self.file, before)
        already = {each.id for each in was.without_effect}
        for problem in problems:
            if problem.id not in already:
                field = f"quotas.{rows.index(problem.id)}.group" if problem.id in rows else "id"
                raise Conflict(field, f"{problem.id} would have no effect: {problem.reason}")

    def _checked_quota(self, group: str, name: str, fields: Fields) -> MadeQuota:
        """The quota of these fields. Raises ChangeRefused with the name of the field."""
        valid("name", values.name, name)
        in_file = self.file.policy.groups.get(group)
        if in_file is not None and any(quota.name == name for quota in in_file.quotas):
            raise Conflict("id", f"{group}/{name} is a quota of the file: change the file, or use another name")
        given = {field: value for field, value in fields.items() if value is not None}
        section, findings = read_quota(given)
        if section is None:
            field = findings[0].path[0] if findings[0].path else next(iter(Measure)).value
            raise ChangeRefused(str(field), findings[0].text)
        document = section.model_dump(exclude_defaults=True)
        return MadeQuota(group, name, document, self.changes.now(), self.changes.author.actor)

    def _made_group(self, name: str, models: Sequence[str] | None, *, unlimited: bool) -> MadeGroup:
        if models is not None and not models:
            raise ChangeRefused("models", "this has no entries; add at least one, or leave it out for every model")
        for model in models or ():
            valid("models", values.glob, model)
        listed = None if models is None else tuple(models)
        return MadeGroup(name, listed, unlimited, self.changes.now(), self.changes.author.actor)

    def _changeable_group(self, change: Change, made: MadePolicy, name: str) -> MadeGroup:
        found = next((group for group in made.groups if group.name == name), None)
        if found is None:
            record = _group_record(self.file, made, name)  # raises NotFound
            raise Conflict("name", f'"{record.name}" is a group of the file: change the file')
        change.check_match(_group_etag(found, _quota_names(made).get(name, ())))
        return found

    async def _write_members(
        self, connection: AsyncConnection, before: Mapping[str, Sequence[str]], after: Mapping[str, Sequence[str]]
    ) -> None:
        for user, names in after.items():
            if tuple(before.get(user, ())) != tuple(names):
                await set_groups_of_file_user(
                    connection, user, names, at=self.changes.now(), by=self.changes.author.actor
                )


@contextmanager
def _in_row(number: int) -> Iterator[None]:
    """Name the field of a refusal as in the body of a change of several quotas: `quotas.1.tokens`."""
    try:
        yield
    except ChangeRefused as refused:
        refused.field = f"quotas.{number}.{refused.field}"
        raise


def document_of(quota: Quota) -> dict[str, object]:
    """The fields of a quota as the file would have them, without those that have their defaults."""
    fields: dict[str, object] = {
        "models": list(quota.models.texts),
        **{limit.measure.value: limit.maximum for limit in quota.limits},
        "per": quota.per.text,
        "shared": quota.shared,
        "enforce": quota.enforce,
        "overdraft": quota.overdraft,
    }
    return QuotaSection.model_validate(fields).model_dump(exclude_defaults=True)


# ----------------------------------------------------------------------------------------------------- pure functions


def _with_quotas(made: MadePolicy, changed: Sequence[MadeQuota]) -> MadePolicy:
    """The same with these quotas, each at the place of the one with its id, or behind the others."""
    new = {quota.id: quota for quota in changed}
    kept = [
        replace(new.pop(was.id), created_at=was.created_at, created_by=was.created_by) if was.id in new else was
        for was in made.quotas
    ]
    return replace(made, quotas=(*kept, *new.values()))


def _without_quotas(made: MadePolicy, ids: Collection[str]) -> MadePolicy:
    return replace(made, quotas=tuple(quota for quota in made.quotas if quota.id not in ids))


def _without_group(made: MadePolicy, name: str) -> MadePolicy:
    groups = tuple(group for group in made.groups if group.name != name)
    return replace(made, groups=groups, quotas=tuple(quota for quota in made.quotas if quota.group != name))


def _documents(made: MadePolicy, ids: Collection[str]) -> dict[str, Any]:
    return {quota.id: dict(quota.document) for quota in made.quotas if quota.id in ids}


def _group_document(group: MadeGroup) -> dict[str, object]:
    return {"models": None if group.models is None else list(group.models), "unlimited": group.unlimited}


def _group_etag(group: MadeGroup, quota_names: Sequence[str]) -> str:
    """Also changes with the names of its quotas, because a group is deleted with them."""
    return etag_of([group.name, _group_document(group), list(quota_names)])


def _quota_names(made: MadePolicy) -> dict[str, list[str]]:
    """The names of the quotas that were made at run time, by their groups."""
    names: dict[str, list[str]] = {}
    for quota in made.quotas:
        names.setdefault(quota.group, []).append(quota.name)
    return names


def _etag(document: Mapping[str, object]) -> str:
    return etag_of(dict(document))


def _is_for(quota: MadeQuota, model: str) -> bool:
    return quota.document.get("models") == [model]


def _listed(made: MadePolicy, *, group: str | None = None, model: str | None = None) -> list[MadeQuota]:
    """The quotas that were made at run time: of one group, or whose models are this name alone."""
    return [
        quota
        for quota in made.quotas
        if (group is None or quota.group == group) and (model is None or _is_for(quota, model))
    ]


def _set_etag(listed: Iterable[MadeQuota]) -> str:
    return etag_of([[quota.id, dict(quota.document)] for quota in listed])


def _quota_set(file: Config, made: MadePolicy, *, group: str | None = None, model: str | None = None) -> QuotaSet:
    if group is not None:
        _group_record(file, made, group)  # raises NotFound
    listed = _listed(made, group=group, model=model)
    of_file = [
        quota
        for name, each in file.policy.groups.items()
        for quota in each.quotas
        if (group is None or name == group) and (model is None or quota.models.texts == (model,))
    ]
    return QuotaSet(tuple(_quota_records(overlaid(file, made), of_file, listed)), _set_etag(listed))


def _quota_records(found: Overlaid, of_file: Iterable[Quota], listed: Iterable[MadeQuota]) -> list[QuotaRecord]:
    problems = {each.id: each.reason for each in found.without_effect}
    order = {name: index for index, name in enumerate(found.config.policy.groups)}
    records = [_record(quota.group, quota.name, document_of(quota), "file") for quota in of_file]
    for quota in listed:
        record = _record(quota.group, quota.name, quota.document, "database")
        reason = problems.get(quota.id)
        records.append(
            replace(record, without_effect=reason, created_at=quota.created_at, created_by=quota.created_by)
        )
    return sorted(records, key=lambda record: order.get(record.group, len(order)))


def _record(group: str, name: str, document: Mapping[str, object], origin: Origin) -> QuotaRecord:
    # A release with other fields may have written it; then it has no effect, and what this release knows is shown.
    section, _ = read_quota(document)
    known: dict[str, Any] = {field: document[field] for field in QuotaSection.named_fields() if field in document}
    shown = section or QuotaSection.model_construct(**known)
    yaml = to_yaml({"groups": {group: {"quotas": {name: dict(document)}}}})
    return QuotaRecord(f"{group}/{name}", group, name, origin, shown, yaml, _etag(document))


def _quota_record(file: Config, made: MadePolicy, group: str, name: str) -> QuotaRecord:
    found = _find_quota(file, made, group, name)
    of_file, listed = ([found], []) if isinstance(found, Quota) else ([], [found])
    [record] = _quota_records(overlaid(file, made), of_file, listed)
    return record


def _find_quota(file: Config, made: MadePolicy, group: str, name: str) -> Quota | MadeQuota:
    """The quota of this name; of two, that of the file, which wins. Raises NotFound."""
    in_file = file.policy.groups.get(group)
    known: dict[str, Quota | MadeQuota] = {quota.name: quota for quota in made.quotas if quota.group == group}
    known |= {quota.name: quota for quota in (() if in_file is None else in_file.quotas)}
    if name not in known:
        # Only names of the same group, because whoever asks may see no other.
        hint = did_you_mean(name, known)
        raise NotFound("id", f"there is no quota {group}/{name}; {hint or 'list them to see their ids'}")
    return known[name]


def _group_records(file: Config, made: MadePolicy) -> list[GroupRecord]:
    found = overlaid(file, made)
    problems = {each.id: each.reason for each in found.without_effect}
    by_name = {group.name: group for group in made.groups}
    names = _quota_names(made)
    records = []
    for position, group in enumerate(found.config.policy.groups.values()):
        of_database = None if group.name in file.policy.groups else by_name[group.name]
        models = None if group.models is None else group.models.texts
        shown = of_database or MadeGroup(group.name, models, group.unlimited)
        records.append(
            GroupRecord(
                group.name,
                position,
                origin="file" if of_database is None else "database",
                models=models,
                unlimited=group.unlimited,
                quotas=tuple(quota.id for quota in group.quotas),
                etag=_group_etag(shown, names.get(group.name, ())),
                created_at=None if of_database is None else of_database.created_at,
                created_by=None if of_database is None else of_database.created_by,
            )
        )
    hidden = [group for group in made.groups if group.name in problems]
    return records + [
        GroupRecord(
            group.name,
            len(records),
            origin="database",
            models=group.models,
            unlimited=group.unlimited,
            quotas=(),
            etag=_group_etag(group, names.get(group.name, ())),
            without_effect=problems[group.name],
            created_at=group.created_at,
            created_by=group.created_by,
        )
        for group in hidden
    ]


def _group_record(file: Config, made: MadePolicy, name: str) -> GroupRecord:
    records = _group_records(file, made)
    found = next((record for record in records if record.name == name), None)
    if found is None:
        hint = did_you_mean(name, [record.name for record in records])
        raise NotFound("group", f'there is no group "{name}"; {hint or "list them to see their names"}')
    return found
