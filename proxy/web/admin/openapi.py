"""The OpenAPI 3.1 document of the admin API, made from the rows and models that validate the requests."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from proxy import __version__
from proxy.web.admin.access import COOKIE
from proxy.web.admin.operations import API, Fields, Operation
from proxy.web.admin.problems import CONTENT_TYPE, PROBLEMS, ProblemDetails

_REFERENCE = "#/components/schemas/{model}"
_PROBLEM = ("problem", "serialization")
_IN_PATH = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
# The problems that each operation may answer with; others depend on its row.
_ALWAYS = ("bad-request", "wrong-host", "internal", "unavailable")
_ETAGS = r'^(\*|(W/)?"[!#-~]*"([ \t]*,[ \t]*(W/)?"[!#-~]*")*)$'
_WITH_KEY = ("unauthenticated", "forbidden", "too-many-failures")


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The document, as plain data."""
    schemas, components = _schemas(operations)
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(API + each.path, {})[each.method.lower()] = _operation(each, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Administration of llm-quota-proxy",
            "version": __version__,
            "description": "Instants are milliseconds since 1970 (UTC). Changes take `dry_run=true`, which does "
            "nothing and answers what the change would do.",
        },
        "security": [{"key": []}, {"header": []}, {"session": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {code: _problem(code, schemas) for code in PROBLEMS},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An admin key."},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": COOKIE,
                    "description": "A login. Changes also need Sec-Fetch-Site: same-origin, or an equal Origin.",
                },
            },
        },
    }


def _schemas(operations: Sequence[Operation]) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """The schema of each body and answer by the operation's id, and the models that they refer to."""
    inputs: list[tuple[str, Any, TypeAdapter[Any]]] = [(*_PROBLEM, TypeAdapter(ProblemDetails))]
    for each in operations:
        if each.body is not None:
            inputs.append((each.id, "validation", TypeAdapter(each.body)))
        if each.answer is not None:
            inputs.append((each.id, "serialization", TypeAdapter(each.answer)))
    found, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REFERENCE)
    return {(str(key), mode): schema for (key, mode), schema in found.items()}, definitions.get("$defs", {})


def _operation(operation: Operation, schemas: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [operation.path.split("/")[1]],
        "parameters": [
            *({"name": name, **_IN_PATH} for name in operation.parameters),
            *_query_parameters(operation.query),
            *_headers(operation),
        ],
        "responses": _responses(operation, schemas),
    }
    if operation.roles:
        made["description"] = f"For the roles: {', '.join(sorted(operation.roles))}."
    else:
        made["security"] = []
    if operation.body is not None:
        schema = schemas[operation.id, "validation"]
        is_required = any(field.is_required() for field in operation.body.model_fields.values())
        made["requestBody"] = {"required": is_required, "content": {"application/json": {"schema": schema}}}
    return made


def _query_parameters(query: type[Fields]) -> Iterable[dict[str, Any]]:
    schema = query.model_json_schema(ref_template=_REFERENCE)
    assert "$defs" not in schema, "the fields of a query are plain values"
    for name, field in schema.get("properties", {}).items():
        shown = {key: value for key, value in field.items() if key not in ("title", "description")}
        given = {"description": field["description"]} if "description" in field else {}
        yield {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": shown, **given}


def _headers(operation: Operation) -> Iterable[dict[str, Any]]:
    if operation.needs_match:
        text = "The ETag of the resource as it was read. `*` stands for any version."
        yield _header("If-Match", text, _ETAGS, required=not operation.may_create)
    if operation.may_create:
        yield _header("If-None-Match", "There must be no such resource yet.", r"^\*$")
    if operation.is_repeatable:
        text = "Makes a repeated request with the same value do nothing again."
        yield _header("Idempotency-Key", text, "^[!-~]{1,255}$")


def _header(name: str, text: str, pattern: str, *, required: bool = False) -> dict[str, Any]:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "header", "required": required, "description": text, "schema": schema}


def _responses(operation: Operation, schemas: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    done: dict[str, Any] = {"description": "Done." if operation.is_change else "Found."}
    if operation.answer is not None:
        schema = schemas[operation.id, "serialization"]
        done["content"] = {operation.content_type: {"schema": schema}}
        if operation.has_csv:
            done["content"]["text/csv"] = {"schema": {"type": "string"}}
    made: dict[str, Any] = {str(operation.status): done}
    by_status: dict[int, list[str]] = {}
    for code in _problems_of(operation):
        by_status.setdefault(PROBLEMS[code][0], []).append(code)
    for status, codes in sorted(by_status.items()):
        made[str(status)] = {"$ref": f"#/components/responses/{codes[0]}"}
    return made


def _problems_of(operation: Operation) -> Iterable[str]:
    yield from _ALWAYS
    yield from _WITH_KEY if operation.roles else ("unauthenticated", "closed", "cross-site", "too-many-failures")
    if operation.parameters or operation.body is not None or operation.query.model_fields:
        yield "not-found"  # what a parameter or a field names
    if operation.body is not None:
        yield from ("timeout", "too-large", "unsupported-type")
    # A wrong cursor, or a value that the database can't store, is found by the handler.
    yield "validation"
    if operation.is_change:
        yield from ("conflict", "precondition-failed")
    if operation.needs_match:
        yield "precondition-required"


def _problem(code: str, schemas: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    status, title = PROBLEMS[code]
    return {"description": f"{status}: {title}.", "content": {CONTENT_TYPE: {"schema": schemas[_PROBLEM]}}}
