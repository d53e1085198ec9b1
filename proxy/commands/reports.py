"""The commands `usage`, `explain` and `audit`."""

import json
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any

import click

from proxy.administration.audit import COLUMNS, AuditFilter, AuditRecord, cells
from proxy.administration.audit import audit as audit_page
from proxy.administration.change import NotFound
from proxy.administration.explain import ExplainedRefusal, Explanation
from proxy.administration.explain import explain as explained
from proxy.administration.pages import LIMIT_MAX, Paging
from proxy.administration.refusals import refusal
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
from proxy.config.loader import Config
from proxy.identity.directory import DATABASE, FILE, UserId
from proxy.ledger.queries import DAY_MS, DIMENSIONS, Asked, Dimension, Used, by_time_or_tokens, oldest_call
from proxy.ledger.queries import usage as usage_of
from proxy.server import wall_clock_ms

_REQUEST = "req_"


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
            return await usage_of(connection, by, Asked(since_ms, where=where)), await oldest_call(connection)

    found, oldest = run(path, work)
    rows = [(_value(by, value), used) for value, used in sorted(found.items(), key=by_time_or_tokens)]
    if as_json:
        show_json([{by: value, **asdict(used)} for value, used in rows])
        return
    heads = (by, *(each.name for each in fields(Used)))
    cells = [(value, *asdict(used).values()) for value, used in rows]
    if as_csv:
        show_csv(heads, cells)
        return
    show_table([head.upper().replace("_", " ") for head in heads], cells)
    if (by in ("hour", "key", "tag") or key or tag) and oldest is not None and oldest > since_ms + DAY_MS:
        click.echo(f"The oldest recorded call is of {_day(oldest)}: older ones are not in this report.", err=True)


def _value(by: Dimension, value: str | int) -> str:
    if not isinstance(value, int):
        return value
    return _day(value) if by == "day" else f"{_day(value)} {_utc(value):%H:%M}"


def _day(at: int) -> str:
    return f"{_utc(at):%Y-%m-%d}"


def _utc(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)


# ------------------------------------------------------------------------------------------------------------ explain


@click.command("explain")
@click.argument("user", metavar="USER|REQUEST_ID")
@click.argument("model", required=False)
@command_options
def explain(user: str, model: str | None, path: str, as_json: bool) -> None:
    """Say which quotas bind USER on MODEL, what is left of them, and whether a small call would be admitted now.

    With the id of a request (req_…) that a quota refused: why it was refused.
    """
    if model is None:
        if not user.startswith(_REQUEST):
            raise click.UsageError("name a model too, or the id of a request that was refused (req_…)")
        _explain_refusal(user, path, as_json)
        return

    async def work(context: Context) -> tuple[Config, Explanation]:
        return context.config, await _explained(context, context.administration.resolve(user), model)

    config, found = run(path, work)
    if as_json:
        show_json(asdict(found))
    else:
        _show_explained(config, found)
    if not found.admitted:
        raise SystemExit(NO)


async def _explained(context: Context, user: UserId, model: str) -> Explanation:
    record = await context.administration.user(user)
    async with context.store.transaction() as connection:
        return await explained(connection, context.snapshot, record, model, now=wall_clock_ms)


def _explain_refusal(request_id: str, path: str, as_json: bool) -> None:
    async def work(context: Context) -> tuple[Config, ExplainedRefusal]:
        async with context.store.transaction() as connection:
            found = await refusal(connection, request_id)
        try:
            now = await _explained(context, UserId.of_subject(found.user), found.model)
        except NotFound:
            now = None
        return context.config, ExplainedRefusal(found, now)

    config, found = run(path, work)
    if as_json:
        show_json(asdict(found))
    else:
        _show_refusal(config, found)


def _show_refusal(config: Config, found: ExplainedRefusal) -> None:
    refused = found.refusal
    at, measure = time_text(config, refused.at), refused.measure.replace("_", " ")
    show(f"{refused.request_id}: a call of {refused.user} to {refused.model} was refused by {refused.quota} at {at}.")
    levels = f"{refused.used} used and {refused.held} held of {refused.limit} {measure}"
    again = (
        ""
        if refused.admissible_at is None
        else f" It was admissible from {time_text(config, refused.admissible_at)}."
    )
    show(f"It needed {refused.needed}, with {levels} ({refused.verdict}).{again}")
    if refused.count > 1:
        show(f"{refused.count} calls of this user were refused by this quota in that second.")
    rows = [
        (each["quota"], level["measure"], level["limit"], level["used"], level["held"], level["remaining"])
        for each in (refused.details or {}).get("quotas", ())
        for level in each["limits"]
    ]
    if rows:
        show("The quotas that were asked, as they stood then:")
        show_table(("QUOTA", "MEASURE", "LIMIT", "USED", "HELD", "LEFT"), rows)
    show(
        "The user or the model is not there any more." if found.now is None else f"Now: {_verdict(config, found.now)}"
    )


def _verdict(config: Config, found: Explanation) -> str:
    """The decision about the smallest call, as a sentence."""
    if found.admitted:
        return f"A small call to {found.model} is admitted now."
    if not found.refused_by:
        return f"A call to {found.model} is refused: {found.reason}."
    at = found.admissible_at
    when = "no reset helps" if at is None else f"admitted again at {time_text(config, at)}"
    return f"A call to {found.model} is refused by {', '.join(found.refused_by)} ({found.reason}): {when}."


def _show_explained(config: Config, found: Explanation) -> None:
    source = {FILE: "the file", DATABASE: "the database"}.get(found.source, "a header source")
    given = "an administrator" if source == "a header source" else source
    groups = f"{', '.join(found.groups)} (by {given})" if found.groups else "no group"
    show(f"{found.user} is in {groups}.")
    if source == "a header source":
        show("The groups that its source sends come with each request, and are not known here.")
    if not found.admitted and not found.refused_by:
        give_up(_verdict(config, found), NO)
    heads = ("QUOTA", "MEASURE", "LIMIT", "USED", "HELD", "LEFT", "RESETS")
    rows: list[tuple[object, ...]] = []
    for record in found.quotas:
        resets = time_text(config, record.resets_at) or "with the first call"
        for level in record.limits:
            numbers = (level.measure, level.limit, level.used, level.held, level.remaining)
            rows.append((record.quota, *numbers, resets))
    show_table(heads, rows)
    if len(found.alternatives) > 1:
        sets = " or ".join("{" + ", ".join(each) + "}" for each in found.alternatives)
        show(f"Enough must be left of all quotas of one of these sets: {sets}.")
    if not found.admitted:
        give_up(_verdict(config, found), NO)
    show(_verdict(config, found))


# -------------------------------------------------------------------------------------------------------------- audit


@click.command("audit")
@click.option("--since", default="7d", show_default=True, help="Only changes since so long ago.")
@click.option("--actor", help="Only changes by this author, such as cli:ann or admin:ops.")
@click.option("--target", help="Only changes of this, such as staff/daily or database:bob.")
@click.option("--action", help="Only changes of this kind, such as quota.set.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@command_options
def audit(
    since: str, actor: str | None, target: str | None, action: str | None, as_csv: bool, path: str, as_json: bool
) -> None:
    """Print who changed what, the newest change first."""
    asked = AuditFilter(wall_clock_ms() - duration_ms(since), None, actor, target, action)

    async def work(context: Context) -> tuple[Config, list[AuditRecord]]:
        found: list[AuditRecord] = []
        after = None
        while True:
            async with context.store.transaction() as connection:
                page = await audit_page(connection, asked, Paging(after, LIMIT_MAX))
            found += page.data
            after = page.next
            if after is None:
                return context.config, found

    config, records = run(path, work)
    if as_json:
        show_json([asdict(record) for record in records])
    elif as_csv:
        show_csv(COLUMNS, map(cells, records))
    else:
        rows = [
            (time_text(config, each.at), each.actor, each.action, each.target, each.address, _differences(each))
            for each in records
        ]
        show_table(("AT", "BY", "ACTION", "TARGET", "FROM", "CHANGED"), rows)


def _differences(record: AuditRecord) -> str:
    """The members that differ, as `name: before → after`."""
    before, after = record.before or {}, record.after or {}
    return ", ".join(
        f"{name}: {_json(before.get(name))} → {_json(after.get(name))}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
