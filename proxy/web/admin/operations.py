"""The operations of the admin API: a row for each, and how a request becomes a call of its handler.

A resource is a class whose constructor takes what it needs, with a handler for each operation and one method that
returns the rows:

    class Widgets:
        def operations(self) -> list[Operation]:
            return [
                reads("/widgets", self._list, "List the widgets."),
                edits("PUT", "/widgets/{id}", self._set, "Change a widget."),
            ]

        async def _list(self, request: AdminRequest[WidgetQuery, None]) -> Page[Widget]: ...
        async def _set(self, request: AdminRequest[ChangeQuery, Change]) -> Answer[Widget]: ...

The row says who may do it (`roles`), and the handler's annotations what the query, the body and the answer are. From
them come the checks of path, query, body and headers, the answer's JSON, and the OpenAPI document. A handler returns
a value of its type, or an `Answer` with headers beside it; if it writes a response itself, the row has the type. It
raises what `administration` raises, and `Problem`.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import NoneType
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import orjson
from aiohttp import hdrs, web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from proxy.administration.change import Author, Conditions
from proxy.administration.pages import LIMIT, LIMIT_MAX, Paging
from proxy.config.loader import ConnectionLimits
from proxy.formats.strict_json import parse_object, refuse_equal_keys
from proxy.identity.keys import NewKey
from proxy.policy.admin import Admin, Role
from proxy.web.admin.access import Access, Login
from proxy.web.admin.problems import Problem, invalid, method_not_allowed
from proxy.web.body import defer_continue, read_body
from proxy.web.body_memory import REQUEST_BYTES_MAX, BodyMemory, BodyShare
from proxy.web.middleware import LOG_LINE

API = "/admin/api"
BODY_BYTES_MAX = 2**20
JSON = "application/json"

# Who may do what. A manager's reads are restricted to its groups (`AdminRequest.groups`).
ANYBODY: frozenset[Role] = frozenset()  # without a key: the login itself
READERS: frozenset[Role] = frozenset(["administrator", "viewer"])
ALL_ROLES: frozenset[Role] = READERS | {"manager"}
ADMINISTRATORS: frozenset[Role] = frozenset(["administrator"])
MANAGERS: frozenset[Role] = ADMINISTRATORS | {"manager"}

_PARAMETER = re.compile(r"\{([a-z_]+)\}")
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")
_ANY = re.compile(r"\*")
_ETAG = r'(?:W/)?"[!#-~]*"'
_ETAGS = re.compile(rf"\*|{_ETAG}(?:[ \t]*,[ \t]*{_ETAG})*")

# Ms since 1970, up to the year 9999.
Instant = Annotated[int, Field(ge=0, le=253_402_300_799_999, json_schema_extra={"format": "epoch-ms"})]

Q = TypeVar("Q")
B = TypeVar("B")
A = TypeVar("A")


class Fields(BaseModel):
    """The fields of a query or of a body. Unknown ones are refused, and nothing is converted to another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class NoQuery(Fields):
    """No query parameters."""


class PageQuery(Fields):
    """Which page of a list is asked for."""

    after: str | None = Field(None, max_length=1000, description="The `next` of the page before.")
    limit: int = Field(LIMIT, ge=1, le=LIMIT_MAX, description="How many entries the page has at most.")

    @property
    def paging(self) -> Paging:
        """The page that is asked for."""
        return Paging(self.after, self.limit)


class ChangeQuery(Fields):
    """What every change takes."""

    dry_run: bool = Field(False, description="Whether the change is only tried: its answer says what it would do.")


@dataclass(frozen=True, slots=True)
class AdminRequest(Generic[Q, B]):
    """A request whose admin may make it, and whose parts are valid.

    `path` has the values of the path's parameters, decoded. `groups` are those of which the admin sees something;
    None: all. `raw` is the server library's request, for handlers that read or write it themselves.
    """

    login: Login
    path: Mapping[str, str]
    query: Q
    body: B
    author: Author
    conditions: Conditions
    raw: web.Request

    @property
    def groups(self) -> Collection[str] | None:
        """The groups to which the answer is to be restricted; None: all."""
        return self.login.admin.restricted_to


@dataclass(frozen=True, slots=True)
class NewKeyAnswer:
    """A key that was made. `key` is null if the request repeats an earlier one, or is only a trial."""

    id: str
    key: str | None

    @classmethod
    def of(cls, new: NewKey, request: AdminRequest[Any, Any]) -> "NewKeyAnswer":
        """The answer to a request that has made this key."""
        return cls(new.id, None if request.conditions.is_trial else new.text or None)


@dataclass(frozen=True, slots=True)
class Answer(Generic[A]):
    """A value with the entity tag of the resource, or further headers, beside it."""

    value: A
    etag: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[AdminRequest[Any, Any]], Awaitable[Any]]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path. See the module's docstring for what is made of it.

    - `path` is below `/admin/api`, with parameters as `{name}`.
    - `answer` is the type of the answer's value, of which pydantic makes the JSON; None: the answer has no body.
    - `query` and `body` are what validates them. The query of a change includes `dry_run`, see `ChangeQuery`.
    - `is_change`: something may be different afterwards. By default, all but GET.
    - `needs_match`: it changes a resource that is there, so `If-Match` is required. If it `may_create` the resource
      too, `If-None-Match: *` says that there must be none yet.
    - `is_repeatable`: a repeated request with the same `Idempotency-Key` does nothing again.
    - `content_type` is that of the answer if it is not JSON. `has_csv`: the query can ask for CSV instead.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    handler: Handler
    summary: str
    answer: Any
    roles: frozenset[Role] = READERS
    query: type[Fields] = NoQuery
    body: type[Fields] | None = None
    status: int = 200
    is_change: bool = False
    needs_match: bool = False
    may_create: bool = False
    is_repeatable: bool = False
    body_bytes_max: int = BODY_BYTES_MAX
    content_type: str = JSON
    has_csv: bool = False

    @property
    def parameters(self) -> Sequence[str]:
        """The names of the parameters of its path."""
        return _PARAMETER.findall(self.path)

    def has_path(self, path: str) -> bool:
        """Whether a path of a request, as it was sent, is its path."""
        fixed = map(re.escape, _PARAMETER.split(API + self.path)[::2])  # each second part is a name
        return re.fullmatch("[^/]+".join(fixed), path) is not None

    @property
    def id(self) -> str:
        """Its name, for the OpenAPI document: `get_users_user` for `GET /users/{user}`."""
        words = re.findall(r"[a-z0-9]+", self.path.replace("-", "_").replace("_", ""))
        return "_".join([self.method.lower(), *words])


def reads(path: str, handler: Handler, summary: str, **more: Any) -> Operation:
    """The row of a GET. Viewers and administrators may do it unless `roles` says otherwise."""
    given = {**_annotated(handler), **more}
    return Operation(method="GET", path=path, handler=handler, summary=summary, **given)


def changes(
    method: Literal["POST", "PUT", "PATCH", "DELETE"], path: str, handler: Handler, summary: str, **more: Any
) -> Operation:
    """The row of a change. Only administrators may do it unless `roles` says otherwise."""
    given = {"roles": ADMINISTRATORS, "is_change": True, **_annotated(handler), **more}
    return Operation(method=method, path=path, handler=handler, summary=summary, **given)


def creates(path: str, handler: Handler, summary: str, **more: Any) -> Operation:
    """The row of a POST that makes a resource. It can be repeated."""
    return changes("POST", path, handler, summary, status=201, is_repeatable=True, **more)


def edits(
    method: Literal["POST", "PUT", "PATCH", "DELETE"], path: str, handler: Handler, summary: str, **more: Any
) -> Operation:
    """The row of a change of a resource that is there, which `If-Match` has to name as it was read."""
    return changes(method, path, handler, summary, needs_match=True, **more)


def _annotated(handler: Handler) -> dict[str, Any]:
    """The types of the query, the body and the answer of a handler."""
    hints = get_type_hints(handler)
    query, body = get_args(hints["request"])
    answer = hints["return"]
    if get_origin(answer) is Answer:
        [answer] = get_args(answer)
    types = {"query": query, "body": body, "answer": answer}
    return {name: None if type is NoneType else type for name, type in types.items()}


class Operations:
    """Serves these rows. `after_change` is awaited after each change, to bring it into force in this process."""

    def __init__(
        self,
        operations: Iterable[Operation],
        *,
        access: Access,
        limits: ConnectionLimits,
        after_change: Callable[[], Awaitable[object]],
    ) -> None:
        self._operations = tuple(operations)
        self._adapters = {each.id: TypeAdapter(each.answer) for each in self._operations if each.answer is not None}
        self._access = access
        self._limits = limits
        self._after_change = after_change
        self._memory = BodyMemory(REQUEST_BYTES_MAX)

    def routes(self) -> list[web.RouteDef]:
        """The routes, for an application's router. The last ones take every other path below `/admin/api`."""
        rows = []
        for each in self._operations:
            more = {"allow_head": False} if each.method == hdrs.METH_GET else {}
            handler = partial(self._run, each)
            # By default a parameter has no braces, which a name of a user may have.
            path = API + _PARAMETER.sub(r"{\1:[^/]+}", each.path)
            rows.append(web.route(each.method, path, handler, expect_handler=defer_continue, **more))
        others = [
            web.route("*", path, self._other, expect_handler=defer_continue) for path in (API, API + "/{path:.*}")
        ]
        return [*rows, *others]

    async def _other(self, request: web.Request) -> web.StreamResponse:
        """A path, or a method of a path, that there is not. Who has no key does not learn which there are."""
        await self._access.identify(request)
        allowed = [each.method for each in self._operations if each.has_path(request.rel_url.raw_path)]
        if allowed:
            raise method_not_allowed(request.method, allowed)
        raise Problem("not-found", "There is nothing at this path.")

    async def _run(self, operation: Operation, request: web.Request) -> web.StreamResponse:
        login = await self._login(operation, request)
        query = _query_of(operation, request)
        conditions = _conditions(operation, request, query)
        body = None
        if operation.body is not None:
            body = await self._body(operation, request, login.admin)
        elif request.body_exists:
            raise Problem("bad-request", "This operation takes no body.")
        if conditions.idempotency_key is not None:
            conditions = _with_fingerprint(conditions, request, body)
        line = request[LOG_LINE]
        author = Author(f"admin:{login.admin.name}", line.address, line.request_id)
        asked = AdminRequest(login, dict(request.match_info), query, body, author, conditions, request)
        result = await operation.handler(asked)
        if operation.is_change and not conditions.is_trial:
            await self._after_change()
        return self._response(operation, result)

    async def _login(self, operation: Operation, request: web.Request) -> Login:
        """Who is asking, and may do this. Raises Problem."""
        if not operation.roles:
            return _NOBODY
        login = await self._access.identify(request)
        if login.expires_at is not None and operation.method != hdrs.METH_GET:
            self._access.check_same_origin(request)
        if login.admin.role not in operation.roles:
            raise Problem("forbidden", f"A {login.admin.role} may not do this: ask an administrator.")
        return login

    async def _body(self, operation: Operation, request: web.Request, admin: Admin) -> Fields:
        assert operation.body is not None
        if not request.body_exists:
            data: bytes | bytearray = b"{}"
        elif request.content_type != JSON:
            raise Problem("unsupported-type", f"Send the body as JSON, with Content-Type: {JSON}.")
        else:
            share = BodyShare(self._memory, admin.name, None)
            try:
                data = await read_body(request, self._limits, share, bytes_max=operation.body_bytes_max)
            finally:
                share.free()
            # They refuse more than pydantic's parser: two spellings of a key, and equal keys.
            parse_object(data, frozenset())
            refuse_equal_keys(data)
        try:
            return operation.body.model_validate_json(bytes(data))
        except ValidationError as error:
            # Its parser refuses what the other one takes: a half of a pair of surrogates.
            is_json = error.errors(include_input=False)[0]["type"] != "json_invalid"
            raise invalid("validation" if is_json else "bad-request", error) from None

    def _response(self, operation: Operation, result: Any) -> web.StreamResponse:
        if isinstance(result, web.StreamResponse):
            return result
        answer = result if isinstance(result, Answer) else Answer(result)
        headers = {**answer.headers, **({} if answer.etag is None else {"etag": answer.etag})}
        if operation.answer is None:
            return web.Response(status=operation.status, headers=headers)
        body = self._adapters[operation.id].dump_json(answer.value)
        return web.Response(status=operation.status, headers={**headers, "content-type": JSON}, body=body)


# Who asks for an operation that needs no key.
_NOBODY = Login(Admin("", "viewer"))


def _query_of(operation: Operation, request: web.Request) -> Fields:
    """The valid query. Raises Problem for unknown and repeated parameters, and for wrong values."""
    for name in request.query:
        if len(request.query.getall(name)) > 1:
            raise Problem("bad-request", "A query parameter is there twice.", field=name[:100])
    try:
        return operation.query.model_validate_strings(dict(request.query))
    except ValidationError as error:
        raise invalid("bad-request", error) from None


def _conditions(operation: Operation, request: web.Request, query: Fields) -> Conditions:
    """What the headers say of a change. Raises Problem."""
    if not operation.is_change:
        return Conditions()
    match = _one_header(request, hdrs.IF_MATCH, _ETAGS, "an entity tag, as the answer's ETag has it")
    is_creation = False
    if operation.may_create:
        is_creation = _one_header(request, hdrs.IF_NONE_MATCH, _ANY, "*") is not None
    if match is None and operation.needs_match and not is_creation:
        creates = " Send If-None-Match: * if there is none yet." if operation.may_create else ""
        raise Problem(
            "precondition-required",
            f"Read the resource first and send its ETag as If-Match, so that you change what you have seen.{creates}",
            field="If-Match",
        )
    key = None
    if operation.is_repeatable:
        key = _one_header(request, "Idempotency-Key", _IDEMPOTENCY_KEY, "1 to 255 visible ASCII characters")
    is_trial = isinstance(query, ChangeQuery) and query.dry_run
    return Conditions(if_match=match, is_creation=is_creation, idempotency_key=key, is_trial=is_trial)


def _one_header(request: web.Request, name: str, form: re.Pattern[str], what: str) -> str | None:
    """The value of a header that may be there once; None if it is not there."""
    values = request.headers.getall(name, [])
    if not values:
        return None
    if len(values) > 1 or not form.fullmatch(values[0]):
        raise Problem("bad-request", f"The header {name} must be {what}, and be there once.", field=name)
    return values[0]


def _with_fingerprint(conditions: Conditions, request: web.Request, body: Fields | None) -> Conditions:
    """The conditions with what identifies the content of the request."""
    content = (request.path, sorted(request.query.items()), None if body is None else body.model_dump_json())
    fingerprint = hashlib.sha256(orjson.dumps(content)).hexdigest()
    return replace(conditions, fingerprint=fingerprint)
