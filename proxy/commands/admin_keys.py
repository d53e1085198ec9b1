"""The commands `admin-keys`: keys of the admin API that are made at run time."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import click

from proxy.administration.admin_keys import AdminKeyAdministration, AdminKeyRecord
from proxy.administration.pages import LIMIT_MAX, Page, Paging
from proxy.commands.context import (
    Context,
    command_options,
    run,
    show,
    show_json,
    show_table,
    time_text,
    until_ms,
)
from proxy.config import values
from proxy.config.loader import Config
from proxy.identity.keys import NewKey
from proxy.policy.admin import GRANT_UP_TO, Admin, Role


@click.group("admin-keys")
def admin_keys() -> None:
    """Make, list and revoke keys of the admin API. Those of the file are in the file."""


@admin_keys.command("create")
@click.argument("name")
@click.option("--role", type=click.Choice(get_args(Role)), default="administrator", show_default=True)
@click.option("--group", "groups", multiple=True, help="For a manager: a group that it is for. Repeatable.")
@click.option("--grant-up-to", metavar="PERCENT", help="For a manager: what grants may add to a limit, as in 50%.")
@click.option("--expires", help="When it ends: a duration such as 90d, a day such as 2027-01-01, or an instant.")
@command_options
def admin_keys_create(
    name: str,
    role: Role,
    groups: tuple[str, ...],
    grant_up_to: str | None,
    expires: str | None,
    path: str,
    as_json: bool,
) -> None:
    """Make an admin key called NAME, and print it once. Only its digest is stored."""
    try:
        share = GRANT_UP_TO if grant_up_to is None else values.percentage(grant_up_to)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None

    async def work(context: Context) -> NewKey:
        admin = Admin(name, role, groups, share)
        return await _administration(context).create(admin, expires_at=until_ms(context.config, expires))

    new = run(path, work)
    if as_json:
        show_json({"id": new.id, "key": new.text})
    else:
        show(new.text)
        click.echo(f"This is the admin key {new.id}. It is shown only now.", err=True)


@admin_keys.command("list")
@click.option("--after", metavar="CURSOR", help="Begin behind the page that ended with this.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True)
@command_options
def admin_keys_list(after: str | None, limit: int, path: str, as_json: bool) -> None:
    """List the admin keys of the database."""

    async def work(context: Context) -> tuple[Config, Page[AdminKeyRecord]]:
        return context.config, await _administration(context).keys(Paging(after, limit))

    config, page = run(path, work)
    _show(config, page.data, as_json)
    if page.next is not None and not as_json:
        click.echo(f"There are more: --after {page.next}", err=True)


@admin_keys.command("revoke")
@click.argument("id")
@command_options
def admin_keys_revoke(id: str, path: str, as_json: bool) -> None:
    """Refuse the admin key with this ID, and logins with it, at once."""

    async def work(context: Context) -> tuple[Config, AdminKeyRecord]:
        return context.config, await _administration(context).revoke(id)

    config, record = run(path, work)
    _show(config, [record], as_json)


def _administration(context: Context) -> AdminKeyAdministration:
    return AdminKeyAdministration(context.changes, context.config.admin_keys, context.administration.group_names)


def _show(config: Config, records: Sequence[AdminKeyRecord], as_json: bool) -> None:
    if as_json:
        show_json([asdict(record) for record in records])
        return
    rows = []
    for record in records:
        share = "" if record.grant_up_to is None else f"{record.grant_up_to}%"
        times = [time_text(config, at) for at in (record.expires_at, record.revoked_at)]
        rows.append((record.id, record.name, record.role, ",".join(record.groups or ()), share, *times))
    show_table(("ID", "NAME", "ROLE", "GROUPS", "GRANTS UP TO", "EXPIRES", "REVOKED"), rows)
