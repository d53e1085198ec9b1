"""The commands `usage` and `explain`."""

from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import click

from proxy.administration.directory import UserRecord
from proxy.commands.context import (
    NO,
    Context,
    command_options,
    duration_ms,
    give_up,
    run,
    show,
    show_csv,
    show_json,
    show_table,
    time_text,
)
from proxy.identity.authentication import Caller
from proxy.identity.directory import DATABASE, FILE
from proxy.ledger.queries import DAY_MS, DIMENSIONS, Dimension, Used, oldest_call
from proxy.ledger.queries import usage as usage_of
from proxy.policy.admission import NotAdmitted, decide
from proxy.policy.key import Key
from proxy.policy.quota import Demand
from proxy.policy.status import QuotaStatus, quota_statuses
from proxy.server import wall_clock_ms


@click.command("usage")
@click.option("--user", help="Only calls of this user.")
@click.option("--group", help="Only calls that this group admitted.")
@click.option("--model", help="Only calls of this model.")
@click.option("--key", help="Only calls with the key of this id.")
@click.option("--tag", help="Only calls with this tag.")
@click.option("--since", default="7d", show_default=True, help="From the UTC day on that began this long ago.")
@click.option("--by", type=click.Choice(DIMENSIONS), default="user", show_default=True)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@command_options
def usage(
    user: str | None,
    group: str | None,
    model: str | None,
    key: str | None,
    tag: str | None,
    since: str,
    by: Dimension,
    as_csv: bool,
    path: str,
    as_json: bool,
) -> None:
    """Print what ended calls have used. Days are those of UTC, as they are recorded."""
    since_ms = wall_clock_ms() - duration_ms(since)

    async def work(context: Context) -> tuple[dict[str | int, Used], int | None]:
        subject = None if user is None else context.administration.resolve(user).subject
        asked = {"user": subject, "group": group, "model": model, "key": key, "tag": tag}
        where: Any = {name: value for name, value in asked.items() if value is not None}
        async with context.store.transaction() as connection:
            return await usage_of(connection, since_ms, by, where), await oldest_call(connection)

    found, oldest = run(path, work)
    rows = [(_value(value), used) for value, used in sorted(found.items(), key=_order)]
    if as_json:
        show_json([{by: value, **asdict(used)} for value, used in rows])
        return
    heads = (by, *(each.name for each in fields(Used)))
    cells = [(value, *asdict(used).values()) for value, used in rows]
    if as_csv:
        show_csv(heads, cells)
        return
    show_table([head.upper().replace("_", " ") for head in heads], cells)
    if (by in ("key", "tag") or key or tag) and oldest is not None and oldest > since_ms + DAY_MS:
        click.echo(f"The oldest recorded call is of {_day(oldest)}: older ones are not in this report.", err=True)


def _value(value: str | int) -> str:
    return _day(value) if isinstance(value, int) else value


def _day(at: int) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).strftime("%Y-%m-%d")


def _order(item: tuple[str | int, Used]) -> tuple[int, str]:
    """Days come in their order, and of all others those that used most come first."""
    value, used = item
    return (value, "") if isinstance(value, int) else (-used.input_tokens - used.output_tokens, value)


# ------------------------------------------------------------------------------------------------------------ explain


@dataclass(frozen=True, slots=True)
class _Explained:
    """Why a user is admitted to a model or not. `refusal` is the decision for the smallest call; None: admitted."""

    user: UserRecord
    reason: str | None
    statuses: tuple[QuotaStatus, ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()
    refusal: NotAdmitted | None = None


@click.command("explain")
@click.argument("user")
@click.argument("model")
@command_options
def explain(user: str, model: str, path: str, as_json: bool) -> None:
    """Say which quotas bind USER on MODEL, what is left of them, and whether a small call would be admitted now."""

    async def work(context: Context) -> tuple[Context, _Explained]:
        return context, await _explain(context, user, model)

    context, found = run(path, work)
    if as_json:
        _show_explained_json(context, found)
    else:
        _show_explained(context, found, model)
    if found.reason is not None or found.refusal is not None:
        raise SystemExit(NO)


async def _explain(context: Context, name: str, model: str) -> _Explained:
    record = await context.administration.user(context.administration.resolve(name))
    policy, catalog = context.snapshot.policy, context.snapshot.catalog
    if record.disabled_at is not None:
        return _Explained(record, "the user is disabled")
    groups = tuple(group for group in policy.groups if group in record.groups)
    caller = Caller(record.identity.subject, groups, Key(""), record.identity.source)
    found = catalog.model(model)
    if found is None:
        return _Explained(record, "there is no such model in `models`")
    if not context.snapshot.may_use(caller, found.matched_name):
        return _Explained(record, "none of the lists of models of the user's groups has this model")
    bound = context.snapshot.binding(caller, found.matched_name)
    if bound is None:
        return _Explained(record, "no quota of the user's groups covers this model, and `unmatched` is refuse")
    binding = bound.for_user(caller.user)
    counters = await context.store.read_counters(binding.keys())
    now = wall_clock_ms()
    decision = decide(Demand(input=1, output_maximum=1, smallest=1), binding, counters, now)
    return _Explained(
        record,
        None,
        tuple(quota_statuses(binding, counters, now).values()),
        tuple(tuple(quota.id for quota in each.quotas) for each in binding.alternatives()),
        decision if isinstance(decision, NotAdmitted) else None,
    )


def _show_explained_json(context: Context, found: _Explained) -> None:
    refusal = found.refusal
    show_json(
        {
            "user": found.user.identity.subject,
            "groups": list(found.user.groups),
            "admitted": found.reason is None and refusal is None,
            "reason": found.reason or (None if refusal is None else refusal.verdict.name.lower()),
            "admitted_at": None if refusal is None else refusal.admissible_at,
            "alternatives": [list(each) for each in found.alternatives],
            "quotas": [status.as_json(context.config.policy.zone) for status in found.statuses],
        }
    )


def _show_explained(context: Context, found: _Explained, model: str) -> None:
    config = context.config
    subject = found.user.identity.subject
    source = {FILE: "the file", DATABASE: "the database"}.get(found.user.identity.source, "a header source")
    given = "an administrator" if source == "a header source" else source
    groups = f"{', '.join(found.user.groups)} (by {given})" if found.user.groups else "no group"
    show(f"{subject} is in {groups}.")
    if source == "a header source":
        show("The groups that its source sends come with each request, and are not known here.")
    if found.reason is not None:
        give_up(f"A call to {model} is refused: {found.reason}.", NO)
    heads = ("QUOTA", "MEASURE", "LIMIT", "USED", "HELD", "LEFT", "RESETS")
    rows: list[tuple[object, ...]] = []
    for status in found.statuses:
        counter = status.counter
        for limit in status.quota.limits:
            level = (limit.measure.total(counter.used), limit.measure.total(counter.held), status.remaining(limit))
            resets = time_text(config, counter.window.resets_at) if counter.is_open else "with the first call"
            rows.append((status.quota.id, limit.measure.value, limit.maximum, *level, resets))
    show_table(heads, rows)
    if len(found.alternatives) > 1:
        sets = " or ".join("{" + ", ".join(each) + "}" for each in found.alternatives)
        show(f"Enough must be left of all quotas of one of these sets: {sets}.")
    if found.refusal is None:
        show(f"A small call to {model} is admitted now.")
        return
    at = found.refusal.admissible_at
    when = "no reset helps" if at is None else f"admitted again at {time_text(config, at)}"
    blocks = ", ".join(dict.fromkeys(block.quota.id for block in found.refusal.blocks))
    give_up(f"A call to {model} is refused by {blocks} ({found.refusal.verdict.name.lower()}): {when}.", NO)
