"""One change by an administrator: a transaction, its conditions, and its row in the audit log."""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.identity.database import DirectoryDatabase
from proxy.ledger.schema import audit, directory

REASON_CHARACTERS_MAX = 500

T = TypeVar("T")


class ChangeRefused(Exception):
    """The change is not possible. `field` is what was wrong: user, group, label, key and so on."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NotFound(ChangeRefused):
    """There is no such user, key, group, quota or other resource."""


class Conflict(ChangeRefused):
    """What is to be made is there already, or what is to be changed is in a state that does not allow it."""


class PreconditionFailed(ChangeRefused):
    """Somebody has changed the resource since the client read it (`If-Match`, RFC 9110 §13.1.1)."""


def check_reason(reason: str, *, is_required: bool = False) -> None:
    """Raise ChangeRefused unless the audit log can show this as the reason of a change."""
    if is_required and not reason.strip():
        raise ChangeRefused("reason", "write why")
    if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
        raise ChangeRefused("reason", f"write it in one line of at most {REASON_CHARACTERS_MAX} characters")


@dataclass(frozen=True, slots=True)
class Author:
    """Who makes a change: `cli:ann` or `admin:ops`; from which address, and with which request (None: a command)."""

    actor: str
    address: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request says of its change.

    - `if_match`: the ETag that the resource must have; None: any. `is_creation`: there must be none.
    - `idempotency_key`: a repeated creation with the same one finds what the first made. `fingerprint` identifies the
      content of the request, so that another request with the same key is noticed.
    - `is_trial`: nothing is kept.
    """

    if_match: str | None = None
    is_creation: bool = False
    idempotency_key: str | None = None
    fingerprint: str = ""
    is_trial: bool = False


@dataclass
class Change:
    """A change within its transaction: the version that it makes, and what its row in the audit log says.

    `repeated` is the target of the earlier change with the same idempotency key; then nothing is to be done again.
    """

    connection: AsyncConnection
    version: int
    target: str
    conditions: Conditions = Conditions()
    repeated: str | None = None
    before: Mapping[str, object] | None = None
    after: Mapping[str, object] | None = None

    def note(self, before: Mapping[str, object] | None, after: Mapping[str, object] | None) -> None:
        """Note the members that differ, for the audit log."""
        self.before, self.after = before, after

    def check_match(self, etag: str | None) -> None:
        """Raise PreconditionFailed unless the resource is what the client read. None: there is none now."""
        wanted = self.conditions.if_match
        if self.conditions.is_creation and etag is not None:
            raise PreconditionFailed("if-none-match", "there is one already: read it, and change it with If-Match")
        if wanted is None or (wanted == "*" and etag is not None):
            return
        if etag is None or etag not in [each.strip() for each in wanted.split(",")]:
            raise PreconditionFailed(
                "if-match", "this was changed since you read it: read it again, and repeat your change on that"
            )


@dataclass(frozen=True)
class Changes:
    """Makes changes for one author. `now` gives ms since 1970. Methods raise StoreUnavailable."""

    database: DirectoryDatabase
    author: Author
    now: Callable[[], int]
    conditions: Conditions = Conditions()

    def as_trial(self) -> "Changes":
        """The same, but nothing is kept."""
        return replace(self, conditions=replace(self.conditions, is_trial=True))

    @asynccontextmanager
    async def begin(self, action: str, target: str, *, is_of_policy: bool = False) -> AsyncIterator[Change]:
        """A change and its row in the audit log, in one transaction, which waits for those before it.

        `is_of_policy` says that the policy in force changes, not only users or keys. The block may raise
        ChangeRefused; then nothing is changed. Raises Conflict if the idempotency key was used for another request.
        """
        try:
            async with self.database.change() as (connection, version):
                change = Change(connection, version, target, self.conditions)
                change.repeated = await self._earlier(connection, action)
                yield change
                if self.conditions.is_trial or change.repeated is not None:
                    raise _RollBack
                if is_of_policy:
                    await connection.execute(sa.update(directory).values(policy_version=version))
                await connection.execute(sa.insert(audit).values(**self._row(change, action)))
        except _RollBack:
            pass

    def _row(self, change: Change, action: str) -> dict[str, Any]:
        key = self.conditions.idempotency_key
        return {
            "id": f"aud_{change.version:016x}",  # so rows sort in the order of the changes
            "at": self.now(),
            "actor": self.author.actor,
            "action": action,
            "target": change.target,
            "before": as_json(change.before),
            "after": as_json(change.after),
            "address": self.author.address,
            "request_id": self.author.request_id,
            "idempotency_key": key,
            "fingerprint": None if key is None else f"{action} {self.conditions.fingerprint}",
        }

    async def _earlier(self, connection: AsyncConnection, action: str) -> str | None:
        key = self.conditions.idempotency_key
        if key is None:
            return None
        same = (audit.c.actor == self.author.actor, audit.c.idempotency_key == key)
        row = (await connection.execute(sa.select(audit.c.target, audit.c.fingerprint).where(*same))).first()
        if row is None:
            return None
        if row.fingerprint != f"{action} {self.conditions.fingerprint}":
            raise Conflict("idempotency-key", "this Idempotency-Key was used for another request; use a new one")
        found: str = row.target
        return found


class _RollBack(Exception):
    """Ends a transaction of which nothing is to be kept."""


def valid(field: str, check: Callable[[str], T], text: str) -> T:
    """The value of a text, by a rule of `config.values`. Raises ChangeRefused with the name of the field."""
    try:
        return check(text)
    except ValueError as error:
        raise ChangeRefused(field, f'"{text[:60]}": {error}') from None


def etag_of(value: object) -> str:
    """The entity tag of a resource, from its JSON members (RFC 9110 §8.8.3). It is the same as long as they are."""
    content = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return f'"{hashlib.sha256(content).hexdigest()[:20]}"'


def as_json(value: object) -> str | None:
    """A value as the JSON text of a column; None stays NULL."""
    return None if value is None else orjson.dumps(value).decode()
