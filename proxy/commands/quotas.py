"""The commands `quotas`: quotas that are made at run time, beside those of the file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter

from proxy.administration.change import ChangeRefused, NotFound
from proxy.administration.effects import Effects
from proxy.administration.policy import PolicyAdministration, QuotaRecord
from proxy.commands.context import (
    NO,
    Command,
    Context,
    command_options,
    dry_run_option,
    give_up,
    load,
    run,
    show,
    show_json,
    show_table,
)
from proxy.config.document import to_yaml
from proxy.config.json_schema import field_schemas
from proxy.config.loader import Config
from proxy.config.schema import Quota as QuotaSection

_RECORDS, _EFFECTS = TypeAdapter(tuple[QuotaRecord, ...]), TypeAdapter(Effects)
_NAMES_SHOWN = 20


@click.group("quotas")
def quotas() -> None:
    """List all quotas, and make, change, delete and import those that are not in the file."""


@quotas.command("list")
@click.option("--group", help="Only quotas of this group.")
@click.option("--model", help="Only quotas whose models are this name alone.")
@click.option("--yaml", "as_yaml", is_flag=True, help="Print what the file would have.")
@command_options
def quotas_list(group: str | None, model: str | None, as_yaml: bool, path: str, as_json: bool) -> None:
    """List the quotas in the order of the policy."""

    async def work(context: Context) -> tuple[QuotaRecord, ...]:
        return (await _administration(context).quotas(group=group, model=model)).data

    records = run(path, work)
    if as_yaml:
        show(_yaml(records).rstrip("\n"))
    elif as_json:
        show_json(_RECORDS.dump_python(records, mode="json"))
    else:
        _show(records)


def _quota_options(command: Command) -> Command:
    """An option for each field of a quota, so that a new kind of limit is one by itself."""
    for name, schema in reversed(field_schemas(QuotaSection).items()):
        flag, about = f"--{name.replace('_', '-')}", schema["description"]
        if schema.get("type") == "boolean":
            more: dict[str, Any] = {"default": None}
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        elif schema.get("type") == "array":
            more, about = {"multiple": True}, f"{about} Repeatable."
        else:
            more = {"metavar": "|".join(schema.get("enum", ("TEXT",)))}
        command = click.option(flag, name, help=about, **more)(command)
    return command


@quotas.command("set")
@click.argument("quota", metavar="GROUP/NAME")
@_quota_options
@dry_run_option
@command_options
def quotas_set(quota: str, dry_run: bool, path: str, as_json: bool, **options: Any) -> None:
    """Make a quota, or change the fields that are given. Its usage stays. An empty value removes a field."""
    group, name = _parts(quota)
    given = {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in options.items()
        if value not in (None, ())
    }
    if not given:
        raise click.UsageError("say what to set, such as --tokens 200k --per day")

    async def work(context: Context) -> tuple[QuotaRecord, Effects, str]:
        administration = _administration(context, dry_run=dry_run)
        changes, kept = administration.changes, {}
        try:
            was = await administration.quota(group, name)
        except NotFound:
            conditions = replace(changes.conditions, is_creation=True)
        else:
            # The fields that are not given are those that were read. If they have changed meanwhile, it is refused.
            kept = was.fields.model_dump(exclude_defaults=True)
            conditions = replace(changes.conditions, if_match=was.etag)
        fields = {field: value for field, value in {**kept, **given}.items() if value not in ("", [""])}
        changing = replace(administration, changes=replace(changes, conditions=conditions))
        try:
            return await changing.set_quota(group, name, fields)
        except ChangeRefused as error:
            if error.field in options:
                give_up(f"--{error.field.replace('_', '-')}: {error}", NO)
            raise

    record, effects, sentence = run(path, work)
    if as_json:
        [shown] = _RECORDS.dump_python((record,), mode="json")
        show_json({"quota": shown, "effects": _EFFECTS.dump_python(effects, mode="json"), "sentence": sentence})
    else:
        _show([record])
        click.echo(sentence, err=True)
        _show_effects(effects, is_trial=dry_run)


@quotas.command("delete")
@click.argument("quota", metavar="GROUP/NAME")
@dry_run_option
@command_options
def quotas_delete(quota: str, dry_run: bool, path: str, as_json: bool) -> None:
    """Delete a quota that is not in the file. Calls in flight go on.

    One that is made again under this name goes on counting where this one ended, until its window resets.
    """
    group, name = _parts(quota)

    async def work(context: Context) -> Effects:
        return await _administration(context, dry_run=dry_run).delete_quota(group, name)

    effects = run(path, work)
    if as_json:
        show_json({"effects": _EFFECTS.dump_python(effects, mode="json")})
    else:
        show(f"{quota} {'would be' if dry_run else 'is'} deleted.")
        _show_effects(effects, is_trial=dry_run)


@quotas.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@dry_run_option
@command_options
def quotas_import(file: Path, dry_run: bool, path: str, as_json: bool) -> None:
    """Take over the groups of FILE with their quotas, usage and members, so that they can be changed at run time.

    What is then still in the file in force wins, so it says what to remove there.
    """
    imported = load(str(file))

    async def work(context: Context) -> tuple[tuple[str, ...], Effects]:
        return await _administration(context, dry_run=dry_run).import_file(imported)

    ids, effects = run(path, work)
    left = _Left.of(imported)
    if as_json:
        effects_shown = _EFFECTS.dump_python(effects, mode="json")
        show_json({"quotas": ids, "effects": effects_shown, "remove": left.as_json()})
        return
    members = sum(bool(user.groups) for user in imported.users)
    verb = "Would be taken over" if dry_run else "Taken over"
    show(f"{verb}: {len(imported.policy.groups)} groups, {len(ids)} quotas, the groups of {members} users.")
    for line in left.sentences(file):
        show(line)
    _show_effects(effects, is_trial=dry_run)


@dataclass(frozen=True, slots=True)
class _Left:
    """What is to be removed from a file that was imported.

    `groups` go as a whole. Of `needed` only the quotas go, because other parts of the file name these groups.
    `members` are users whose `groups` go; a key of the other ones is for some of their groups.
    """

    groups: tuple[str, ...]
    needed: tuple[str, ...]
    members: tuple[str, ...]

    @classmethod
    def of(cls, imported: Config) -> "_Left":
        """What is to be removed from this file."""
        needed = {name for source in imported.header_sources for name in source.mapped_groups}
        members = []
        for user in imported.users:
            if any(key.groups is not None for key in user.keys.values()):
                needed |= {*user.groups}
            elif user.groups:
                members.append(user.name)
        names = tuple(imported.policy.groups)
        return cls(
            tuple(name for name in names if name not in needed),
            tuple(name for name in names if name in needed),
            tuple(members),
        )

    def as_json(self) -> dict[str, object]:
        """The names."""
        return {"groups": self.groups, "quotas_of": self.needed, "groups_of_users": self.members}

    def sentences(self, file: Path) -> Iterable[str]:
        """What to do next."""
        yield f"As long as {file} has them, it wins. To change them at run time, remove from it:"
        if self.groups:
            yield f"- the groups {_names(self.groups)}"
        if self.needed:
            yield f"- only the quotas of {_names(self.needed)}: `identity` or a key of a user names these groups"
        if self.members:
            yield f"- `groups` of the users {_names(self.members)}"
        yield "Then run `llm-quota-proxy check`, and `quotas list`."


def _names(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _administration(context: Context, *, dry_run: bool = False) -> PolicyAdministration:
    return PolicyAdministration(context.changes.as_trial() if dry_run else context.changes, context.file)


def _parts(quota: str) -> tuple[str, str]:
    group, slash, name = quota.partition("/")
    if not (group and slash and name):
        raise click.BadParameter(f'"{quota}" is not the id of a quota; write GROUP/NAME, such as staff/daily')
    return group, name


def _yaml(records: Iterable[QuotaRecord]) -> str:
    """The part of a file that makes these quotas. Those without effect are left out."""
    groups: dict[str, dict[str, dict[str, object]]] = {}
    for record in records:
        if record.without_effect is None:
            of_group = groups.setdefault(record.group, {"quotas": {}})
            of_group["quotas"][record.name] = record.fields.model_dump(exclude_defaults=True)
    return to_yaml({"groups": groups})


def _show(records: Iterable[QuotaRecord]) -> None:
    rows = []
    for record in records:
        fields: Mapping[str, Any] = record.fields.model_dump(exclude_defaults=True)
        limits = {limit.measure.value: limit.maximum for limit in record.fields.limits()}
        shown = ", ".join(f"{maximum} {measure}" for measure, maximum in limits.items())
        others = (name for name in fields if name not in limits and name not in ("models", "per"))
        more = " ".join(f"{name}={str(fields[name]).lower()}" for name in others)
        origin = "file" if record.origin == "file" else record.created_by or record.origin
        rows.append(
            (record.id, shown, fields.get("per"), " ".join(record.fields.models), more, origin, record.without_effect)
        )
    show_table(("QUOTA", "LIMITS", "PER", "MODELS", "MORE", "FROM", "WITHOUT EFFECT"), rows)


def _show_effects(effects: Effects, *, is_trial: bool) -> None:
    """What a change does, on standard error."""
    if is_trial:
        click.echo("Nothing is changed. This is what the change would do:", err=True)
    click.echo(f"Users of the groups: {effects.members}. At or above a limit now: {effects.members_over}.", err=True)
    for warning in effects.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
