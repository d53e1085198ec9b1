"""The commands `keys`, `users` and `whoami`."""

import csv
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
from multidict import CIMultiDict

from proxy.administration.directory import LISTED_MAX
from proxy.administration.pages import Paging, cursor_of
from proxy.administration.records import ImportedUser, KeyLimits, KeyRecord, UserRecord
from proxy.commands.context import (
    NO,
    WRONG,
    Context,
    command_options,
    dry_run_option,
    duration_ms,
    give_up,
    names_text,
    read_input,
    run,
    show,
    show_csv,
    show_json,
    show_table,
    time_text,
    until_ms,
)
from proxy.config.loader import Config
from proxy.config.values import KEY_CHARACTERS_MIN, digest
from proxy.errors import InvalidKey, ProxyError
from proxy.identity.authentication import Caller
from proxy.identity.directory import UserId
from proxy.identity.keys import KEY_HEADERS, NewKey

_IMPORT_COLUMNS = ("id", "email", "groups")
_IMPORT_BYTES_MAX = 10_000_000
# With these reasons, a key or token could be one of the file that is not known because it can't be read.
_OPEN_REASONS = ("unknown", "malformed", "signed header: wrong signature")
_UNREAD_KEYS = (
    "keys of the file are not known here, and this may be one of them: {names} can't be read; set the variables, and "
    "give this user the right to read the files (systemd has them only while the service runs)"
)

# --------------------------------------------------------------------------------------------------------------- keys


@click.group("keys")
def keys() -> None:
    """Make, list, find, revoke and rotate the keys of users."""


@keys.command("create")
@click.argument("user")
@click.option("--group", "groups", multiple=True, help="Only this group of the user may admit its calls. Repeatable.")
@click.option("--label", default="", help="What the key is for, as lists and the log show it.")
@click.option("--expires", help="When it ends: a duration such as 90d, a day such as 2027-01-01, or an instant.")
@click.option("--from", "networks", multiple=True, metavar="NET", help="Only from here, as 10.0.0.0/8. Repeatable.")
@click.option("--model", "models", multiple=True, help="Only these models, by name or pattern. Repeatable.")
@click.option("--tag", default="", help="A text that is recorded with its calls, for reports.")
@click.option("--tag-header", is_flag=True, help="Let requests send another tag in X-Quota-Tag.")
@command_options
def keys_create(
    user: str,
    groups: tuple[str, ...],
    label: str,
    expires: str | None,
    networks: tuple[str, ...],
    models: tuple[str, ...],
    tag: str,
    tag_header: bool,
    path: str,
    as_json: bool,
) -> None:
    """Make a key for USER, and print it once. Only its digest is stored."""

    async def work(context: Context) -> NewKey:
        administration = context.administration
        limits = KeyLimits(label, groups, models, networks, until_ms(context.config, expires), tag, tag_header)
        return await administration.create_key(administration.resolve(user), limits)

    _show_new(run(path, work), as_json)


@keys.command("list")
@click.option("--user", help="Only keys of this user.")
@click.option("--text", default="", help="Only keys whose id, label or user contains this.")
@click.option("--after", default="", metavar="ID", help="Begin behind this key.")
@click.option("--limit", type=click.IntRange(1, LISTED_MAX), default=100, show_default=True)
@command_options
def keys_list(user: str | None, text: str, after: str, limit: int, path: str, as_json: bool) -> None:
    """List the keys of the database. Those of the file are in the file."""

    async def work(context: Context) -> tuple[Config, list[KeyRecord]]:
        administration = context.administration
        owner = None if user is None else administration.resolve(user)
        return context.config, await administration.keys(owner=owner, text=text, after=after, limit=limit)

    _show_keys(*run(path, work), as_json)


@keys.command("find")
@click.argument("text", required=False)
@command_options
def keys_find(text: str | None, path: str, as_json: bool) -> None:
    """Find keys by a TEXT of their id, label or user; without it, those in a log or diff on standard input."""

    async def work(context: Context) -> tuple[Config, list[KeyRecord], tuple[str, ...]]:
        found = [] if text is None else await context.administration.keys(text=text, limit=LISTED_MAX)
        if found:
            return context.config, found, ()
        found = await context.administration.find_keys(read_input() if text is None else text)
        # A text on standard input may have several keys, of which some are found and some are not known.
        return context.config, found, context.unread_keys if text is None or not found else ()

    config, found, unread = run(path, work, asks_keys=True)
    if found:
        _show_keys(config, found, as_json)
    if unread:
        give_up(_UNREAD_KEYS.format(names=names_text(unread)), WRONG)
    if not found:
        give_up("There is no such key here.", NO)


@keys.command("show")
@click.argument("id")
@command_options
def keys_show(id: str, path: str, as_json: bool) -> None:
    """Show the key with this ID."""

    async def work(context: Context) -> tuple[Config, list[KeyRecord]]:
        return context.config, [await context.administration.key(id)]

    _show_keys(*run(path, work), as_json)


@keys.command("revoke")
@click.argument("id")
@click.option("--cut", is_flag=True, help="End its running calls at once; they are charged what they used.")
@command_options
def keys_revoke(id: str, cut: bool, path: str, as_json: bool) -> None:
    """Refuse the key with this ID from now on, on every replica within two seconds."""

    async def work(context: Context) -> tuple[Config, list[KeyRecord]]:
        return context.config, [await context.administration.revoke_key(id, cut=cut)]

    _show_keys(*run(path, work), as_json)


@keys.command("rotate")
@click.argument("id")
@click.option("--overlap", default="24h", show_default=True, help="How long the old key stays valid; 0s: not at all.")
@command_options
def keys_rotate(id: str, overlap: str, path: str, as_json: bool) -> None:
    """Make a key with the limits of the one with this ID, which ends after the overlap. Print the new one once."""

    async def work(context: Context) -> NewKey:
        overlap_ms = 0 if overlap in ("0", "0s") else duration_ms(overlap)
        return await context.administration.rotate_key(id, overlap_ms=overlap_ms)

    _show_new(run(path, work), as_json)


@keys.command("hash")
@click.argument("key", required=False)
def keys_hash(key: str | None) -> None:
    """Print the `sha256:…` of a key, for the config. Without KEY, ask for it, so it is in no shell's history."""
    key = key or click.prompt("Key", hide_input=True)
    if len(key) < KEY_CHARACTERS_MIN:
        give_up(f"A key needs {KEY_CHARACTERS_MIN} characters or more.", WRONG)
    click.echo(f"sha256:{digest(key)}")


def _show_new(new: NewKey, as_json: bool) -> None:
    if as_json:
        show_json({"id": new.id, "key": new.text})
    else:
        show(new.text)
        click.echo(f"This is the key {new.id}. It is shown only now.", err=True)


def _show_keys(config: Config, records: Iterable[KeyRecord], as_json: bool) -> None:
    if as_json:
        show_json([record.as_json() for record in records])
        return
    heads = ("ID", "USER", "LABEL", "LIMITS", "EXPIRES", "REVOKED", "LAST USED", "USED FROM", "MADE BY")
    rows = []
    for record in records:
        key = record.key
        times = [time_text(config, at) for at in (key.expires_at, key.revoked_at, record.used_at)]
        names = (key.id, record.owner.subject, key.label, _limits(record))
        rows.append((*names, *times, record.used_from, record.created_by))
    show_table(heads, rows)


def _limits(record: KeyRecord) -> str:
    """What a key narrows, in one cell."""
    key = record.key
    parts = {
        "groups": ",".join(key.groups or ()),
        "models": ",".join(key.models.texts if key.models is not None else ()),
        "from": ",".join(str(network) for network in key.networks),
        "tag": key.tag,
    }
    return " ".join(f"{name}={value}" for name, value in parts.items() if value)


# -------------------------------------------------------------------------------------------------------------- users


@click.group("users")
def users() -> None:
    """List, add, change, disable and forget users. USER is a name, or SOURCE:ID."""


@users.command("list")
@click.option("--text", default="", help="Only users whose id or e-mail address contains this.")
@click.option("--after", default="", metavar="USER", help="Begin behind this one, as SOURCE:ID.")
@click.option("--limit", type=click.IntRange(1, LISTED_MAX), default=100, show_default=True)
@command_options
def users_list(text: str, after: str, limit: int, path: str, as_json: bool) -> None:
    """List the users: of the file, made here, and named by header sources."""

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        administration = context.administration
        cursor = cursor_of(administration.place(UserId.of_subject(after))) if after else None
        return context.config, list((await administration.users(Paging(cursor, limit), text=text)).data)

    _show_users(*run(path, work), as_json)


@users.command("show")
@click.argument("user")
@command_options
def users_show(user: str, path: str, as_json: bool) -> None:
    """Show one user."""

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        administration = context.administration
        return context.config, [await administration.user(administration.resolve(user))]

    _show_users(*run(path, work), as_json)


@users.command("add")
@click.argument("id")
@click.option("--group", "groups", multiple=True, help="A group of the policy. Repeatable.")
@click.option("--email", help="For lists and searches.")
@click.option("--service", is_flag=True, help="It is a program and no person.")
@command_options
def users_add(id: str, groups: tuple[str, ...], email: str | None, service: bool, path: str, as_json: bool) -> None:
    """Add a user of the source `database`. Make a key for it with `keys create`."""

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        added = await context.administration.add_user(id, groups=groups, email=email, is_service=service)
        return context.config, [added]

    _show_users(*run(path, work), as_json)


@users.command("set")
@click.argument("user")
@click.option("--group", "groups", multiple=True, help="The user's groups from now on. Repeatable.")
@click.option("--no-groups", is_flag=True, help="The user is in no group from now on.")
@click.option("--email", help='For lists and searches; "" removes it.')
@click.option("--identity", metavar="SOURCE:ID", help="Whom a header source knows by this id is this user from now.")
@click.option("--remove-identity", metavar="SOURCE:ID", help="Whom a header source knows by this id is itself again.")
@command_options
def users_set(
    user: str,
    groups: tuple[str, ...],
    no_groups: bool,
    email: str | None,
    identity: str | None,
    remove_identity: str | None,
    path: str,
    as_json: bool,
) -> None:
    """Change the groups, the e-mail address or the identities of a user."""
    if groups and no_groups:
        raise click.UsageError("--group and --no-groups contradict each other; leave one out")
    if not (groups or no_groups or email is not None or identity or remove_identity):
        raise click.UsageError("say what to change: --group, --no-groups, --email, --identity or --remove-identity")

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        administration = context.administration
        who = administration.resolve(user)
        if groups or no_groups or email is not None:
            await administration.set_user(who, groups=groups if groups or no_groups else None, email=email)
        if remove_identity:
            await administration.unlink(UserId.of_subject(remove_identity))
        if identity:
            await administration.link(UserId.of_subject(identity), who)
        return context.config, [await administration.user(who)]

    _show_users(*run(path, work), as_json)


@users.command("disable")
@click.argument("user")
@click.option("--cut", is_flag=True, help="End the user's running calls at once; they are charged what they used.")
@command_options
def users_disable(user: str, cut: bool, path: str, as_json: bool) -> None:
    """Refuse all calls of a user from now on, on every replica within two seconds."""

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        administration = context.administration
        return context.config, [await administration.disable_user(administration.resolve(user), cut=cut)]

    _show_users(*run(path, work), as_json)


@users.command("enable")
@click.argument("user")
@command_options
def users_enable(user: str, path: str, as_json: bool) -> None:
    """Let a disabled user call again."""

    async def work(context: Context) -> tuple[Config, list[UserRecord]]:
        administration = context.administration
        return context.config, [await administration.enable_user(administration.resolve(user))]

    _show_users(*run(path, work), as_json)


@users.command("forget")
@click.argument("user")
@command_options
def users_forget(user: str, path: str, as_json: bool) -> None:
    """Make the records of a user anonymous, revoke its keys and end its calls.

    The name is free when the windows of its counters have ended.
    """

    async def work(context: Context) -> str:
        return await context.administration.forget(context.administration.resolve(user))

    pseudonym = run(path, work)
    if as_json:
        show_json({"pseudonym": pseudonym})
    else:
        show(f"The records of {user} belong to {pseudonym} now.")


@users.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@dry_run_option
@click.option("--keys", "makes_keys", is_flag=True, help="Make a key for each added user, and print them as CSV.")
@command_options
def users_import(file: Path, dry_run: bool, makes_keys: bool, path: str, as_json: bool) -> None:
    """Add or change the users of a CSV file with the columns id, email and groups (separated by spaces).

    A column that the file does not have stays as it is; an empty cell removes what was there.
    """
    lines = list(_imported(file))

    async def work(context: Context) -> tuple[dict[str, list[str]], list[tuple[str, str, str]]]:
        administration = context.administration
        importing = replace(administration, changes=administration.changes.as_trial()) if dry_run else administration
        done = await importing.import_users(lines)
        made = []
        for id in done.added if makes_keys and not dry_run else ():
            new = await administration.create_key(UserId("database", id), KeyLimits(label="import"))
            made.append((id, new.id, new.text))
        lists = {"added": list(done.added), "changed": list(done.changed), "unchanged": list(done.unchanged)}
        return lists, made

    done, made = run(path, work)
    if as_json:
        show_json({**done, "keys": [{"user": user, "id": id, "key": text} for user, id, text in made]})
        return
    if made:
        show_csv(("user", "key_id", "key"), made)
    would = "would be " if dry_run else ""
    counts = ", ".join(f"{len(ids)} {would}{name}" for name, ids in done.items())
    click.echo(f"{counts}.", err=True)


def _imported(file: Path) -> Iterable[ImportedUser]:
    """The users of a CSV file. Exits with what is wrong and in which line."""
    try:
        if file.stat().st_size > _IMPORT_BYTES_MAX:
            give_up(f"{file} has more than {_IMPORT_BYTES_MAX:,} bytes: divide it", WRONG)
        text = file.read_text("utf-8-sig")  # spreadsheets begin UTF-8 with a mark
    except (OSError, UnicodeError) as error:
        give_up(f"{file} can't be read as UTF-8 ({error}): save it as CSV in UTF-8", WRONG)
    # As a file and not as lines: a line end within quotes belongs to its cell, where it is refused.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if "id" not in names or len(names) > len(set(names)) or not set(names) <= set(_IMPORT_COLUMNS):
            give_up(f"{file}:1: the first line must name the columns: id, and if wanted email and groups", WRONG)
        for row in reader:
            if None in row or None in row.values():
                give_up(f"{file}:{reader.line_num}: this line has not as many cells as the first one", WRONG)
            groups = tuple(row["groups"].replace(";", " ").split()) if "groups" in row else None
            email = row["email"].strip() if "email" in row else None
            yield ImportedUser(reader.line_num, row["id"].strip(), groups, email)
    except csv.Error as error:
        give_up(f"{file}:{reader.line_num + 1}: this is no CSV ({error}): save it again from the spreadsheet", WRONG)


def _show_users(config: Config, records: Iterable[UserRecord], as_json: bool) -> None:
    if as_json:
        show_json([record.as_json() for record in records])
        return
    heads = ("USER", "GROUPS", "EMAIL", "STATE", "MADE", "MADE BY", "ALSO")
    rows = []
    for record in records:
        kind = "service" if record.is_service else ""
        if record.disabled_at is not None:
            kind = "disabled" if record.forgotten_at is None else "forgotten"
        made = (time_text(config, record.created_at), record.created_by)
        also = " ".join(identity.subject for identity in record.linked)
        rows.append((record.identity.subject, " ".join(record.groups), record.email, kind, *made, also))
    show_table(heads, rows)


# ------------------------------------------------------------------------------------------------------------- whoami


@click.command("whoami")
@click.option("--peer", default="127.0.0.1", show_default=True, help="The address that the request comes from.")
@command_options
def whoami(peer: str, path: str, as_json: bool) -> None:
    """Say who a key or the headers on standard input are: one key, or lines such as `X-Forwarded-User: ann`."""

    async def work(context: Context) -> tuple[Caller | ProxyError, tuple[str, ...]]:
        try:
            return await context.snapshot.authentication.identify(_headers(read_input()), peer, peer), ()
        except ProxyError as error:
            is_open = isinstance(error, InvalidKey) and error.reason in _OPEN_REASONS
            return error, context.unread_keys if is_open else ()

    found, unread = run(path, work, asks_keys=True)
    if unread:
        give_up(_UNREAD_KEYS.format(names=names_text(unread)), WRONG)
    if isinstance(found, ProxyError):
        reason = found.reason if isinstance(found, InvalidKey) else found.message
        if as_json:
            show_json({"user": None, "reason": reason})
            raise SystemExit(NO)
        give_up(f"Nobody: {reason}.", NO)
    if as_json:
        key = {"id": found.key.id, "label": found.key.label}
        show_json({"user": found.user, "source": found.source, "groups": list(found.groups), "key": key})
        return
    groups = f"in {', '.join(found.groups)}" if found.groups else "in no group"
    show(f"{found.user}, of the source {found.source}, {groups}, by the key {found.key.label or found.key.id}.")


def _headers(text: str) -> CIMultiDict[str]:
    """The headers in a text; one line that is no header of a key is a key, which may have a colon."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].partition(":")[0].strip().lower() not in KEY_HEADERS:
        return CIMultiDict({"Authorization": f"Bearer {lines[0].strip()}"})
    pairs = [line.partition(":") for line in lines]
    return CIMultiDict([(name.strip(), value.strip()) for name, colon, value in pairs if colon])
