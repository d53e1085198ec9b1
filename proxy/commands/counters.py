"""The commands `grant`, `grants` and `reset`: more of a quota for a while, and counters that begin anew."""

from collections.abc import Sequence
from dataclasses import asdict

import click

from proxy.administration.counters import Reset, ResetTarget, make_reset
from proxy.administration.grants import GrantAdministration, GrantRecord, NewGrant
from proxy.administration.pages import LIMIT_MAX, Page, Paging
from proxy.commands.context import (
    Command,
    Context,
    command_options,
    dry_run_option,
    run,
    show_json,
    show_table,
    time_text,
    until_ms,
)
from proxy.config import values
from proxy.config.loader import Config
from proxy.policy.amounts import QUANTITIES, Measure


def _measure_options(command: Command) -> Command:
    """An option for each measure that a quota can limit."""
    for measure in reversed(Measure):
        flag = f"--{measure.value.replace('_', '-')}"
        command = click.option(flag, measure.value, metavar="N", help=f"So many {measure.unit} more.")(command)
    return command


@click.command("grant")
@click.argument("user", required=False)
@click.option("--group", help="Instead of a user: for each of its members, or for the pot that they share.")
@click.option("--quota", required=True, metavar="GROUP/NAME", help="The quota whose limit is raised.")
@_measure_options
@click.option("--until", "end", required=True, metavar="WHEN", help="A duration (24h), a day, or an instant.")
@click.option("--reason", required=True, help="Why, in one line; the audit log keeps it.")
@dry_run_option
@command_options
def grant(
    user: str | None,
    group: str | None,
    quota: str,
    end: str,
    reason: str,
    dry_run: bool,
    path: str,
    as_json: bool,
    **amounts: str | None,
) -> None:
    """Raise a limit of a quota by so much until an instant: for USER, or with --group for all its members."""
    if (user is None) is (group is None):
        raise click.UsageError("say for whom: a user, or --group")
    if group is not None and quota.partition("/")[0] != group:
        raise click.UsageError(f"{quota} is no quota of {group}; write --quota {group}/NAME")
    [(measure, amount), *others] = [each for each in amounts.items() if each[1] is not None] or [("", None)]
    if amount is None or others:
        raise click.UsageError(f"say how much, with one of {', '.join(f'--{_flag(name)}' for name in amounts)}")
    try:
        number = values.count(amount)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"--{_flag(measure)}") from None

    async def work(context: Context) -> tuple[Config, GrantRecord]:
        name = None if user is None else (await context.user(user)).identity.subject
        until = until_ms(context.config, end) or 0
        administration = _administration(context, dry_run=dry_run)
        return context.config, await administration.create(NewGrant(quota, name, measure, number, until, reason))

    config, record = run(path, work)
    _show_grants(config, [record], as_json)
    if dry_run:
        click.echo("Nothing is changed: this is what would be granted.", err=True)


def _flag(name: str) -> str:
    return name.replace("_", "-")


@click.group("grants")
def grants() -> None:
    """List and end grants. `grant` makes one."""


@grants.command("list")
@click.option("--quota", metavar="GROUP/NAME", help="Only grants on this quota.")
@click.option("--user", help="Only grants for this user.")
@click.option("--ended", is_flag=True, help="Also those that have ended.")
@click.option("--after", metavar="CURSOR", help="Begin behind the page that ended with this.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True)
@command_options
def grants_list(
    quota: str | None, user: str | None, ended: bool, after: str | None, limit: int, path: str, as_json: bool
) -> None:
    """List the running grants."""

    async def work(context: Context) -> tuple[Config, Page[GrantRecord]]:
        subject = None if user is None else context.administration.resolve(user).subject
        administration = _administration(context)
        page = await administration.grants(quota=quota, user=subject, ended=ended, paging=Paging(after, limit))
        return context.config, page

    config, page = run(path, work)
    _show_grants(config, page.data, as_json)
    if page.next is not None and not as_json:
        click.echo(f"There are more: --after {page.next}", err=True)


@grants.command("end")
@click.argument("id")
@dry_run_option
@command_options
def grants_end(id: str, dry_run: bool, path: str, as_json: bool) -> None:
    """End the grant with this ID now. What was used of it stays used."""

    async def work(context: Context) -> tuple[Config, GrantRecord]:
        return context.config, await _administration(context, dry_run=dry_run).end(id)

    config, record = run(path, work)
    _show_grants(config, [record], as_json)


def _administration(context: Context, *, dry_run: bool = False) -> GrantAdministration:
    return GrantAdministration(context.changes.as_trial() if dry_run else context.changes, context.config)


def _show_grants(config: Config, records: Sequence[GrantRecord], as_json: bool) -> None:
    if as_json:
        show_json([asdict(record) for record in records])
        return
    rows = []
    for record in records:
        until = time_text(config, record.until)
        ended = time_text(config, record.ended_at)
        amount = f"{record.amount} {record.measure}"
        rows.append(
            (record.id, record.quota, record.user or "(all)", amount, until, ended, record.created_by, record.reason)
        )
    show_table(("ID", "QUOTA", "USER", "MORE", "UNTIL", "ENDED", "MADE BY", "REASON"), rows)


# -------------------------------------------------------------------------------------------------------------- reset


@click.command("reset")
@click.argument("user", required=False)
@click.option("--group", help="The counters of this group's quotas: its members' and its pots.")
@click.option("--quota", metavar="GROUP/NAME", help="Only those of this quota.")
@click.option("--reason", default="", help="Why, in one line; the audit log keeps it.")
@dry_run_option
@command_options
def reset(
    user: str | None, group: str | None, quota: str | None, reason: str, dry_run: bool, path: str, as_json: bool
) -> None:
    """Set what USER, or with --group a group, has used to 0.

    Windows keep their beginnings and ends, and calls in flight are charged when they end.
    """

    async def work(context: Context) -> Reset:
        subject = None if user is None else (await context.user(user)).identity.subject
        changes = context.changes.as_trial() if dry_run else context.changes
        return await make_reset(changes, context.snapshot.policy, ResetTarget(subject, group, quota), reason=reason)

    done = run(path, work)
    if as_json:
        show_json(asdict(done))
        return
    heads = ("QUOTA", "COUNTERS", *(f"{name.upper()} USED" for name in QUANTITIES))
    show_table(heads, [(each.quota, each.counters, *each.used.values()) for each in done.quotas])
    would = "would be" if dry_run else "are"
    click.echo(f"{done.counters} counters {would} reset; those that had used nothing are not among them.", err=True)
