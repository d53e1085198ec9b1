"""What a request may use that costs, or reaches, beyond what quotas see: only what the policy allows.

Tools that run at the upstream loop there on our key, those of Anthropic's bring input that the request doesn't show,
and a tier of service changes the price. Each is refused unless the model, or its upstream, allows it, and the message
says with which words. What stands for things stored in the account that all users share stays refused within tools
that are allowed. Pure.
"""

from collections.abc import Mapping
from typing import Any

from proxy.errors import InvalidRequest
from proxy.formats.content import is_run_by_client, offered_tools
from proxy.formats.endpoints import STORED, Endpoint
from proxy.formats.request import Request
from proxy.policy.policy import Allow

# They cost no more than what is usual; null means the same. The last is Anthropic's, where `auto` is the other one.
_USUAL_TIERS = (None, "auto", "default", "standard_only")
# Members of tools that name what is stored in the account, whoever stored it.
_NAMES_OF_STORED = frozenset("container_id file_id file_ids skill_id vector_store_id vector_store_ids".split())
_SHOWN = 40


def check_allowance(request: Request, allow: Allow) -> None:
    """Raise InvalidRequest where a call uses what is not allowed."""
    document = request.document
    for tool in offered_tools(document):
        _refuse_spellings(tool)
        if not _runs_at_client(tool, request.endpoint):
            _check_tool(tool, allow)
    if document.get("web_search_options") not in (None, False):
        _check_kind("web_search", allow, param="web_search_options")
    tier = document.get("service_tier")
    if tier not in _USUAL_TIERS and not (isinstance(tier, str) and tier in allow.service_tiers):
        shown = str(tier)[:_SHOWN]
        raise _not_allowed(f'"service_tier": "{shown}"', f"service_tiers: [{shown}]", param="service_tier")
    if document.get("store") not in (None, False) and not allow.store:
        raise _not_allowed('"store"', "store: true", param="store")


def _runs_at_client(tool: object, endpoint: Endpoint) -> bool:
    """Whether it is for the client to run; on Anthropic's surface such a tool need not say its type."""
    has_type = isinstance(tool, dict) and tool.get("type") is not None
    return is_run_by_client(tool) and (has_type or endpoint.is_of_messages)


def _refuse_spellings(tool: object) -> None:
    """Refuse a type in another case: Go's decoder takes it for the type, also where that stands beside it."""
    for name in tool if isinstance(tool, dict) else ():
        if name != (plain := name.casefold()) and plain in ("type", "tools"):
            raise InvalidRequest(f'Write "{plain}" and not "{name}" in a tool.', param="tools")


def _check_tool(tool: object, allow: Allow) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        text = 'Each of "tools" must be an object that says its "type", such as "function".'
        raise InvalidRequest(text, param="tools", code="unsupported_parameter")
    _check_kind(tool["type"], allow, param="tools")
    # What is within it was handed out by itself; the schema of a function may name its parameters as it likes.
    waiting: list[object] = [{name: value for name, value in tool.items() if name != "tools"}]
    while waiting:  # not recursive: no depth overflows the stack
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            _check_members(value)
            waiting += value.values()


def _check_kind(kind: str, allow: Allow, *, param: str) -> None:
    if kind not in allow.tools:
        shown = kind[:_SHOWN]
        raise _not_allowed(
            f'A tool of type "{shown}", which is the upstream\'s own,', f"tools: [{shown}]", param=param
        )


def _check_members(part: Mapping[str, Any]) -> None:
    """Refuse what names stored things; a container may only be a new one."""
    for name, value in part.items():
        is_stored = name in _NAMES_OF_STORED and value not in (None, [])
        if is_stored or (name == "container" and value not in (None, {"type": "auto"})):
            raise InvalidRequest(
                f'"{name}" can\'t be used in tools here: {STORED}.', param="tools", code="unsupported_parameter"
            )


def _not_allowed(what: str, setting: str, *, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} can't be used here. The operator of this proxy can open it for a model or an upstream, with "
        f'"allow: {{{setting}}}".',
        param=param,
        code="unsupported_parameter",
    )
