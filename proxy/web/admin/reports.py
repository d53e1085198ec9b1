"""What is in force and what happened: usage, models, upstreams, policy, replicas, the audit log, events."""

import asyncio
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web
from pydantic import Field, TypeAdapter

from proxy.administration.audit import COLUMNS, AuditFilter, AuditRecord, audit, cells
from proxy.administration.csv import write_csv
from proxy.administration.pages import Page, Paging
from proxy.administration.replicas import ReplicaRecord, replicas
from proxy.config.reload import Policies, Reload
from proxy.config.sentences import sentences
from proxy.errors import InvalidKey, TooManyStreams
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.ledger.queries import DAY_MS, Asked, Dimension, Used, by_time_or_tokens, usage
from proxy.ledger.store import StoreUnavailable
from proxy.policy.catalog import Model
from proxy.web.admin.access import Access
from proxy.web.admin.operations import (
    ALL_ROLES,
    JSON,
    AdminRequest,
    Fields,
    Instant,
    NoQuery,
    Operation,
    PageQuery,
    changes,
    reads,
)
from proxy.web.admin.policy_check import PolicyCheck, check_policy
from proxy.web.admin.problems import Problem
from proxy.web.admin.resource import Resource
from proxy.web.events import Events, Filter

_CSV = "text/csv; charset=utf-8"
_EVENTS = "text/event-stream"
_USED = tuple(each.name for each in fields(Used))
# How many rows of the audit log are read at a time for an export.
_EXPORTED_AT_ONCE = 1000


class UsageQuery(Fields):
    """Which usage is asked for, and by what it is summed up."""

    by: Dimension = Field("day", description="Days and hours are those of UTC.")
    since: Instant | None = Field(None, description="From this instant's day on (ms). Default: 30 days ago.")
    until: Instant | None = Field(None, description="Before this instant (ms). Default: now.")
    user: str | None = Field(None, max_length=400)
    group: str | None = Field(None, max_length=100, description="Only calls that this group admitted.")
    model: str | None = Field(None, max_length=512)
    key: str | None = Field(None, max_length=100, description="Only calls with the key of this id.")
    tag: str | None = Field(None, max_length=64)
    sort: Literal["value", "tokens", "requests", "calls"] | None = Field(
        None,
        description="By value, or by a number, the largest first. Default: time by value, others by tokens.",
    )
    limit: int = Field(10_000, ge=1, le=100_000, description="How many rows the answer has at most.")
    format: Literal["json", "csv"] = "json"


class AuditQuery(PageQuery):
    """Which changes are asked for."""

    since: Instant | None = Field(None, description="From this instant on (ms).")
    until: Instant | None = Field(None, description="Before this instant (ms).")
    actor: str | None = Field(None, max_length=300, description="Who made them, such as admin:ops or cli:root.")
    target: str | None = Field(None, max_length=400)
    action: str | None = Field(None, max_length=100)
    format: Literal["json", "csv"] = Field("json", description="csv: all of them, and no page.")


class PolicyText(Fields):
    """A file as it would be. References such as ${NAME} stay text: no secret is read."""

    yaml: str = Field(max_length=900_000)


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What the calls of one day (YYYY-MM-DD), hour, user, group, model, key or tag have used."""

    value: str
    calls: int
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: int


# Equal rows are in the order of their values.
_SORTED_BY: dict[str | None, Callable[[tuple[str | int, Used]], Any]] = {
    None: by_time_or_tokens,
    "value": lambda row: row[0],
    "tokens": lambda row: (-row[1].tokens, row[0]),
    "requests": lambda row: (-row[1].requests, row[0]),
    "calls": lambda row: (-row[1].calls, row[0]),
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, by `by`."""

    by: Dimension
    since: int
    data: tuple[UsageRow, ...]


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """Where a model is served."""

    upstream: str
    model: str
    weight: int


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model that the file lists. `*` stands for all others."""

    name: str
    targets: tuple[TargetRecord, ...]
    max_output_tokens: int | None
    context: int | None
    tokens_per_request: int | None
    tokens_per_image: int | None


@dataclass(frozen=True, slots=True)
class ModelList:
    """The models of the file."""

    data: tuple[ModelRecord, ...]


@dataclass(frozen=True, slots=True)
class UpstreamState:
    """An upstream as one process sees it. Its last failure has its instant (ms), an outcome and a reason.

    It has `in_flight` calls, and `waiting` calls wait for a slot of it.
    """

    replica: str
    cooldown_until_at: int | None
    last_failure: dict[str, Any] | None
    in_flight: int
    waiting: int


@dataclass(frozen=True, slots=True)
class UpstreamRecord:
    """An upstream of the file, without its key."""

    name: str
    kind: str
    base_url: str
    has_api_key: bool
    on_disconnect: str
    max_in_flight: int | None
    states: tuple[UpstreamState, ...]


@dataclass(frozen=True, slots=True)
class UpstreamList:
    """The upstreams of the file."""

    data: tuple[UpstreamRecord, ...]


@dataclass(frozen=True, slots=True)
class ReplicaList:
    """The processes that share the database."""

    data: tuple[ReplicaRecord, ...]


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """What is in force in this process, without secrets.

    `file_hash` is that of the file alone, `made_version` the version of what was made at run time. `hashes` are those
    in force in each process, by its name: they are equal once all have the same file and the same additions.
    `sentences` say what each group may use.
    """

    hash: str
    file_hash: str
    made_version: int
    hashes: dict[str, str | None]
    combine: str
    unmatched: str
    timezone: str
    wait_s: float
    help: str
    self_service: bool
    groups: tuple[str, ...]
    sentences: tuple[str, ...]
    last_reload: Reload


_USAGE = TypeAdapter(Usage)


class Reports(Resource):
    """The reports. `made_version` gives that of what is in force here."""

    def __init__(
        self,
        policies: Policies[Snapshot],
        database: DirectoryDatabase,
        *,
        access: Access,
        events: Events,
        made_version: Callable[[], int],
        now: Callable[[], int],
    ) -> None:
        super().__init__(policies, database, now=now)
        self._access = access
        self._events = events
        self._made_version = made_version
        self._checking = asyncio.Lock()

    def operations(self) -> list[Operation]:
        """The rows."""
        return [
            reads("/usage", self._usage, "Show what was used.", answer=Usage, has_csv=True, roles=ALL_ROLES),
            reads("/models", self._models, "List the models of the file."),
            reads("/upstreams", self._upstreams, "List the upstreams, with cooldowns and last failures."),
            reads("/replicas", self._replicas, "List the processes that share the database."),
            reads("/policy", self._policy, "Show the policy in force, without secrets."),
            changes(
                *("POST", "/policy/check", self._check, "Show what a file would change. Nothing is changed."),
                is_change=False,
            ),
            reads(
                *("/audit", self._audit, "List changes by administrators, the newest first."),
                answer=Page[AuditRecord],
                has_csv=True,
                roles=ALL_ROLES,
            ),
            reads(
                *("/events", self._stream, "Follow what happens, as server-sent events; Last-Event-ID resumes."),
                answer=str,
                content_type=_EVENTS,
                roles=ALL_ROLES,
            ),
        ]

    async def _usage(self, request: AdminRequest[UsageQuery, None]) -> web.Response:
        query = request.query
        asked = {name: getattr(query, name) for name in ("user", "group", "model", "key", "tag")}
        where: dict[Any, str] = {name: value for name, value in asked.items() if value is not None}
        since = max(0, self._now() - 30 * DAY_MS) if query.since is None else query.since
        async with self._database.read() as connection:
            found = await usage(connection, query.by, Asked(since, query.until, where, request.groups))
        # In a thread: there may be 100,000 users.
        return await asyncio.to_thread(_usage_answer, query, since, found)

    async def _models(self, request: AdminRequest[NoQuery, None]) -> ModelList:
        models = self._policies.config.catalog.models or {}
        return ModelList(tuple(_model(name, model) for name, model in models.items()))

    async def _upstreams(self, request: AdminRequest[NoQuery, None]) -> UpstreamList:
        async with self._database.read() as connection:
            processes = await replicas(connection, self._now())
        return UpstreamList(
            tuple(
                UpstreamRecord(
                    name,
                    upstream.kind,
                    upstream.base_url,
                    has_api_key=upstream.api_key is not None,
                    on_disconnect=upstream.on_disconnect,
                    max_in_flight=upstream.max_in_flight,
                    states=tuple(_states(name, processes)),
                )
                for name, upstream in self._policies.config.catalog.upstreams.items()
            )
        )

    async def _replicas(self, request: AdminRequest[NoQuery, None]) -> ReplicaList:
        async with self._database.read() as connection:
            return ReplicaList(await replicas(connection, self._now()))

    async def _policy(self, request: AdminRequest[NoQuery, None]) -> PolicyRecord:
        config, file = self._policies.config, self._policies.file
        policy = config.policy
        async with self._database.read() as connection:
            processes = await replicas(connection, self._now())
        return PolicyRecord(
            hash=policy.hash,
            file_hash=file.policy.hash,
            made_version=self._made_version(),
            hashes={each.replica: each.status.get("policy") for each in processes},
            combine=policy.combine,
            unmatched=policy.unmatched,
            timezone=policy.zone.key,
            wait_s=policy.wait_s,
            help=policy.help,
            self_service=policy.self_service,
            groups=tuple(policy.groups),
            sentences=sentences(config),
            last_reload=self._policies.last_reload,
        )

    async def _check(self, request: AdminRequest[NoQuery, PolicyText]) -> PolicyCheck:
        # One at a time: it can take seconds in a thread, and bodies of calls are written to disk by the same threads.
        async with self._checking:
            return await check_policy(request.body.yaml, self._policies.file, self._database, now=self._now())

    async def _audit(self, request: AdminRequest[AuditQuery, None]) -> Page[AuditRecord] | web.StreamResponse:
        query = request.query
        asked = AuditFilter(query.since, query.until, query.actor, query.target, query.action, request.groups)
        if query.format == "csv":
            return await self._exported(request.raw, asked)
        return await self._audited(asked, query.paging)

    async def _exported(self, request: web.Request, asked: AuditFilter) -> web.StreamResponse:
        """All changes as CSV, page by page, so that no long transaction is needed."""
        # The first page is read before the answer begins, because what is wrong with the request shows there.
        page = await self._audited(asked, Paging(limit=_EXPORTED_AT_ONCE))
        response = web.StreamResponse(headers={"content-type": _CSV})
        await response.prepare(request)
        await response.write(_csv_text(COLUMNS, map(cells, page.data)))
        while page.next is not None:
            page = await self._audited(asked, Paging(page.next, _EXPORTED_AT_ONCE))
            await response.write(_csv_text((), map(cells, page.data)))
        await response.write_eof()
        return response

    async def _audited(self, asked: AuditFilter, paging: Paging) -> Page[AuditRecord]:
        async with self._database.read() as connection:
            return await audit(connection, asked, paging)

    async def _stream(self, request: AdminRequest[NoQuery, None]) -> web.StreamResponse:
        async def sees() -> Filter | None:
            """What the admin sees now; None if its key or login has ended."""
            try:
                login = await self._access.identify(request.raw)
            except (InvalidKey, Problem):
                return None
            except StoreUnavailable:
                return Filter.of_groups(request.groups)
            return Filter.of_groups(login.admin.restricted_to)

        try:
            return await self._events.stream(request.raw, Filter.of_groups(request.groups), check=sees)
        except TooManyStreams as error:
            raise Problem("too-many-streams", error.message, headers=error.headers) from None


def _usage_answer(query: UsageQuery, since: int, found: Mapping[str | int, Used]) -> web.Response:
    chosen = sorted(found.items(), key=_SORTED_BY[query.sort])[: query.limit]
    rows = [UsageRow(_shown(value, query.by), **asdict(used)) for value, used in chosen]
    if query.format == "csv":
        body = _csv_text((query.by, *_USED), [list(asdict(row).values()) for row in rows])
        return web.Response(headers={"content-type": _CSV}, body=body)
    body = _USAGE.dump_json(Usage(query.by, since, tuple(rows)))
    return web.Response(headers={"content-type": JSON}, body=body)


def _model(name: str, model: Model) -> ModelRecord:
    targets = tuple(
        TargetRecord(target.upstream.name, target.upstream_model, target.weight) for target in model.targets
    )
    return ModelRecord(
        name,
        targets,
        model.max_output_tokens,
        model.context,
        tokens_per_request=model.tokens_per_request,
        tokens_per_image=model.tokens_per_image,
    )


def _states(upstream: str, processes: tuple[ReplicaRecord, ...]) -> list[UpstreamState]:
    return [
        UpstreamState(
            process.replica,
            found.get("cooldown_until_at"),
            found.get("last_failure"),
            in_flight=found.get("in_flight", 0),  # an older release does not write them
            waiting=found.get("waiting", 0),
        )
        for process in processes
        for found in process.status.get("upstreams", [])
        if found.get("name") == upstream
    ]


def _shown(value: str | int, by: Dimension) -> str:
    if isinstance(value, str):
        return value
    form = "%Y-%m-%dT%H:00Z" if by == "hour" else "%Y-%m-%d"
    return datetime.fromtimestamp(value / 1000, UTC).strftime(form)


def _csv_text(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    write_csv(buffer, heads, rows)
    return buffer.getvalue().encode()
