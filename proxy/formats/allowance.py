"""What a request may use only if the policy allows it (`allow` in quotas.yaml).

It costs or reaches more than quotas can see. Tools that run at the upstream repeat model calls there, with the
operator's key. Anthropic's own tools add input that the request does not show. A service tier changes the price. The
message says which setting allows it. References to stored things stay refused inside tools that are allowed. What is
always refused is in `restrictions`. Pure.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from proxy.errors import InvalidRequest
from proxy.formats.body import RequestBody, is_run_by_client
from proxy.formats.endpoints import Endpoint
from proxy.formats.restrictions import MEMBERS_OF_ITEMS, SHOWN_CHARACTERS, STORED, is_used
from proxy.formats.strict_json import plain_name, walk
from proxy.policy.catalog import Allow

# Tiers at the usual price; null means the default. OpenAI has `auto` and `default`, Anthropic `auto` and
# `standard_only`.
_USUAL_TIERS = (None, "auto", "default", "standard_only")
# Members of a tool that name things which any user may have stored in the upstream account.
_STORED_THING_FIELDS = frozenset(
    map(
        plain_name,
        "collection_id collection_ids container_id file_id file_ids knowledge_base_id knowledge_base_ids "
        "knowledge_id library_id library_ids skill_id vector_store_id vector_store_ids".split(),
    )
)
# Members of a tool that are tools of the upstream, whatever its type says. LiteLLM reads
# {"type": "function", "google_search": {}} as Google's search.
_TOOL_MEMBERS = {
    plain_name(name): name
    for name in (
        "code_execution code_interpreter computer_use enterprise_web_search file_search google_maps google_search "
        "google_search_retrieval mcp retrieval url_context web_browser web_fetch web_search x_search"
    ).split()
}
# Keys of tools that are no spelling of those. Nearly all tools have no others.
_KEYS_OF_TOOLS = frozenset("type function name description parameters strict input_schema cache_control".split())
# The fields that may need permission.
_FIELDS = frozenset(("web_search_options", "service_tier", "store"))


def check_allowance(endpoint: Endpoint, body: RequestBody, allow: Allow) -> None:
    """Raise InvalidRequest if a call uses something that is not allowed for its model."""
    document = body.document
    if not body.tools and _FIELDS.isdisjoint(document):
        return
    for tool in body.tools:
        if not (isinstance(tool, dict) and _KEYS_OF_TOOLS.issuperset(tool)):
            _refuse_other_case(tool)
        if not _runs_at_client(tool, endpoint):
            _check_tool(tool, allow)
        for type_ in _tools_inside(tool):
            _check_type(type_, allow, param="tools")
    if is_used(document.get("web_search_options")):
        _check_type("web_search", allow, param="web_search_options")
    tier = document.get("service_tier")
    if tier not in _USUAL_TIERS and not (isinstance(tier, str) and tier in allow.service_tiers):
        shown = str(tier)[:SHOWN_CHARACTERS]
        raise _not_allowed(f'"service_tier": "{shown}"', f"service_tiers: [{shown}]", param="service_tier")
    if is_used(document.get("store")) and not allow.store:
        raise _not_allowed('"store"', "store: true", param="store")


def has_effects(endpoint: Endpoint, body: RequestBody) -> bool:
    """Whether a call does more at its upstream than to generate an answer: it has tools run there, or stores it."""
    document = body.document
    return (
        any(not _runs_at_client(tool, endpoint) or any(_tools_inside(tool)) for tool in body.tools)
        or is_used(document.get("web_search_options"))
        or is_used(document.get("store"))
    )


def _runs_at_client(tool: object, endpoint: Endpoint) -> bool:
    """Whether the client runs this tool. A tool without a type is one only on /messages, where it means `custom`."""
    has_type = isinstance(tool, dict) and tool.get("type") is not None
    return is_run_by_client(tool) and (has_type or endpoint.is_of_messages)


def _tools_inside(tool: object) -> Iterable[str]:
    """The types of the upstream's own tools that are hidden in a tool of another type.

    They are members beside those of its type, and Kimi's functions, whose names begin with "$": `$web_search`.
    """
    if not isinstance(tool, dict):
        return
    for name, value in () if _KEYS_OF_TOOLS.issuperset(tool) else tool.items():
        type_ = _TOOL_MEMBERS.get(plain_name(name))
        if type_ is not None and is_used(value) and type_ != tool.get("type"):
            yield type_
    function = tool.get("function")
    for named in (tool, function):
        name = named.get("name") if isinstance(named, dict) else None
        if is_run_by_client(tool) and isinstance(name, str) and name.startswith("$"):
            yield name


def _refuse_other_case(tool: object) -> None:
    """Refuse `Type` and `Tools`: Go's decoder accepts them for `type` and `tools`, even beside these.

    A gateway in Go would read {"type": "function", "Type": "web_search"} as a web search.
    """
    for name in tool if isinstance(tool, dict) else ():
        if name != (plain := plain_name(name)) and plain in MEMBERS_OF_ITEMS:
            raise InvalidRequest(f'Write "{plain}" and not "{name}" in a tool.', param="tools")


def _check_tool(tool: object, allow: Allow) -> None:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        text = 'Each tool must be an object with a "type", such as "function".'
        raise InvalidRequest(text, param="tools", code="unsupported_parameter")
    _check_type(tool["type"], allow, param="tools")
    # The tools of a group are checked one by one (`RequestBody.tools`). They are left out here, because the
    # parameters of a function may have any name, such as "file_id".
    own = {name: value for name, value in tool.items() if name != "tools"}
    for value in walk(own):
        if isinstance(value, dict):
            _check_members(value)


def _check_type(type_: str, allow: Allow, *, param: str) -> None:
    if type_ not in allow.tools:
        shown = type_[:SHOWN_CHARACTERS]
        raise _not_allowed(f'A tool of type "{shown}", which the upstream defines,', f"tools: [{shown}]", param=param)


def _check_members(part: Mapping[str, Any]) -> None:
    """Refuse names of stored things. A container must be a new one, `{"type": "auto"}`: any other may be shared."""
    for name, value in part.items():
        plain = plain_name(name)
        is_stored = plain in _STORED_THING_FIELDS and value not in (None, [])
        if is_stored or (plain == "container" and value not in (None, [], {"type": "auto"})):
            raise InvalidRequest(
                f'"{name[:SHOWN_CHARACTERS]}" can\'t be used in tools here: {STORED}.',
                param="tools",
                code="unsupported_parameter",
            )


def _not_allowed(what: str, setting: str, *, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what} can't be used here. The operator of this proxy can allow it for a model or an upstream, with "
        f'"allow: {{{setting}}}".',
        param=param,
        code="unsupported_parameter",
    )
