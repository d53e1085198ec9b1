"""Requests that cost or reach more than quotas see are refused unless the policy allows them; messages say how."""

import pytest

from proxy.errors import InvalidRequest
from proxy.formats.allowance import check_allowance, has_effects
from proxy.formats.endpoints import CHAT, COMPLETIONS, COUNT_TOKENS, MESSAGES, RESPONSES, Endpoint
from proxy.policy.catalog import Allow
from tests.formats.test_request import parse
from tests.formats.test_restrictions import OF_RESPONSES, ids

NOTHING = Allow()


def check(endpoint: Endpoint, allow: Allow = NOTHING, **fields: object) -> None:
    """Check a request with these fields."""
    check_allowance(endpoint, parse(endpoint, **fields).body, allow)


def not_allowed(endpoint: Endpoint, allow: Allow = NOTHING, **fields: object) -> InvalidRequest:
    """The error with which a request with these fields is refused."""
    with pytest.raises(InvalidRequest) as caught:
        check(endpoint, allow, **fields)
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")
    assert len(caught.value.message) < 300
    return caught.value


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search"},
        {"type": "mcp", "server_url": "http://x"},
        {"type": None},
        {},
        "function",
        None,
        {"type": "tool_search"},
        {"type": "tool_search", "execution": "server"},
        {"type": "namespace", "name": "n"},
    ],
)
@pytest.mark.parametrize("endpoint", OF_RESPONSES, ids=ids)
def test_tools_that_run_at_the_upstream_are_refused(endpoint: Endpoint, tool: object) -> None:
    """Each round there costs tokens that nothing bounds. Tools inside items and groups are refused too."""
    given = [{"type": "function", "name": "f"}, tool]
    assert not_allowed(endpoint, tools=given).param == "tools"
    assert not_allowed(endpoint, input=["text", {"type": "additional_tools", "tools": given}]).param == "tools"
    within = [{"type": "namespace", "name": "n", "tools": given}]
    assert not_allowed(endpoint, tools=within).param == "tools"
    assert not_allowed(endpoint, tools=[{"type": "namespace", "tools": within}]).param == "tools"
    assert not_allowed(endpoint, input=[{"type": "tool_search_output", "tools": within}]).param == "tools"


@pytest.mark.parametrize("endpoint", [CHAT, *OF_RESPONSES, MESSAGES], ids=ids)
@pytest.mark.parametrize(
    "tools",
    [
        {"type": "web_search"},
        {"a": {"type": "web_search"}},
        [[{"type": "web_search"}]],
        "web_search",
        {"type": "namespace", "tools": {"type": "web_search"}},
        {"type": "namespace", "tools": "web_search"},
    ],
)
def test_a_tool_needs_permission_in_any_shape(endpoint: Endpoint, tools: object) -> None:
    """PHP reads a mapping as a list, and lenient servers take a single tool for a list of one."""
    assert not_allowed(endpoint, tools=tools).param == "tools"
    assert not_allowed(endpoint, input={"type": "additional_tools", "tools": tools}).param == "tools"
    assert not_allowed(endpoint, input=[[{"type": "additional_tools", "tools": tools}]]).param == "tools"
    assert not_allowed(endpoint, messages=[{"role": "system", "content": "x", "tools": tools}]).param == "tools"


def test_tools_that_the_client_runs_are_allowed() -> None:
    """Functions, custom tools, groups of them (Codex sends such) and a search that the client makes among them.

    The request shows all that the model reads of them. A tool that is not in a list is checked like one that is.
    """
    schema = {"type": "object", "properties": {"file_id": {"type": "string"}, "container": {"type": "string"}}}
    check(RESPONSES, tools=[{"type": "function", "name": "f", "parameters": schema}, {"type": "custom", "name": "c"}])
    group = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": schema}]}
    check(RESPONSES, tools=[group, {"type": "tool_search", "execution": "client", "parameters": schema}])
    check(RESPONSES, input=[{"type": "additional_tools", "tools": [group, {"type": "namespace", "tools": [group]}]}])
    check(RESPONSES, tools={"type": "function", "name": "f", "parameters": schema})
    check(RESPONSES, tools={"type": "namespace", "name": "n", "tools": {"type": "function", "name": "f"}})
    check(RESPONSES, input=[{"type": "additional_tools", "tools": [{"type": "function", "name": "f"}]}])
    check(
        RESPONSES, input=[{"type": "mcp_list_tools", "tools": [{"name": "f"}]}]
    )  # repeats what a server once listed
    check(CHAT, tools=[{"type": "function"}])


@pytest.mark.parametrize("endpoint", [MESSAGES, COUNT_TOKENS], ids=ids)
def test_tools_that_anthropic_defines_are_allowed_only_by_their_types(endpoint: Endpoint) -> None:
    """Anthropic's description of them is input that the request doesn't show. A user's own tools need no type."""
    own = [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g", "input_schema": {}}]
    check(endpoint, tools=own)
    for kind in ("web_search_20250305", "bash_20250124"):
        error = not_allowed(endpoint, tools=[*own, {"type": kind, "name": "t"}])
        assert f'"allow: {{tools: [{kind}]}}"' in error.message
        check(endpoint, Allow(frozenset([kind])), tools=[*own, {"type": kind, "name": "t"}])
    assert not_allowed(endpoint, tools=["web_search"]).param == "tools"
    assert not_allowed(RESPONSES, tools=[{"name": "f"}]).param == "tools"  # a type is required there


def test_the_error_for_a_tool_without_a_type_names_no_setting() -> None:
    """The user has to correct the request; no setting of the operator allows it."""
    message = not_allowed(RESPONSES, tools=[{"name": "f"}]).message
    assert ('an object with a "type"' in message, "allow" in message) == (True, False)


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=ids)
def test_the_type_of_a_tool_in_another_case_is_refused(endpoint: Endpoint) -> None:
    """A gateway in Go takes the last of two spellings. The parameters of a function may have any name."""
    own = {"type": "custom", "name": "f", "input_schema": {"Type": "x", "Tools": []}}
    check(endpoint, tools=[own])
    for spelling in ("Type", "TYPE", "Tools", "tool\u017f"):
        with pytest.raises(InvalidRequest) as caught:
            check(endpoint, tools=[{**own, spelling: "web_search"}])
        assert (caught.value.status, caught.value.param) == (400, "tools")


def test_a_tool_is_allowed_by_its_exact_type() -> None:
    """Permission for `web_search` does not include `web_search_preview`."""
    allow = Allow(frozenset(["web_search", "mcp", "code_interpreter"]))
    check(RESPONSES, allow, tools=[{"type": "web_search"}, {"type": "mcp", "server_url": "https://a.example"}])
    check(RESPONSES, allow, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    inner = {"type": "function", "name": "f", "parameters": {"file_id": {}}}
    check(RESPONSES, allow, tools=[{"type": "namespace", "name": "n", "tools": [inner]}])
    error = not_allowed(RESPONSES, allow, tools=[{"type": "web_search_preview"}])
    assert '"allow: {tools: [web_search_preview]}"' in error.message
    assert not_allowed(RESPONSES, tools=[{"type": "x" * 900}]).param == "tools"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "file_search", "vector_store_ids": ["vs_1"]},
        {"type": "code_interpreter", "container": "cntr_1"},
        {"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file_1"]}},
        {"type": "shell", "environment": {"type": "container_reference", "container_id": "cntr_1"}},
        {"type": "shell", "environment": {"skills": [{"type": "skill_reference", "skill_id": "skill_1"}]}},
        {"type": "image_generation", "input_image_mask": {"file_id": "file_1"}},
        {"type": "file_search", "Vector_Store_IDs": ["vs_1"]},
        {"type": "file_search", "vectorStoreIds": ["vs_1"]},
        {"type": "document_library", "library_ids": ["lib_1"]},
        {"type": "code_interpreter", "CONTAINER": "cntr_1"},
        {"type": "code_interpreter", "container": ["cntr_1"]},
    ],
)
def test_an_allowed_tool_reaches_nothing_that_is_stored(tool: dict) -> None:
    """All users share the upstream account, so a stored thing may be another user's."""
    assert "stored at the upstream" in not_allowed(RESPONSES, Allow(frozenset([tool["type"]])), tools=[tool]).message


def test_tools_that_other_vendors_run_on_chat_need_permission() -> None:
    """The same as on /responses."""
    own = {"type": "function", "function": {"name": "f"}}
    assert "tools: [browser_search]" in not_allowed(CHAT, tools=[own, {"type": "browser_search"}]).message
    check(CHAT, Allow(frozenset(["browser_search"])), tools=[own, {"type": "browser_search"}])


def test_web_search_options_need_the_permission_for_web_search() -> None:
    """On /chat/completions the tool has a field of its own."""
    error = not_allowed(CHAT, web_search_options={})
    assert (error.param, "tools: [web_search]" in error.message) == ("web_search_options", True)
    check(CHAT, Allow(frozenset(["web_search"])), web_search_options={})
    assert not_allowed(COMPLETIONS, web_search_options={}).param == "web_search_options"
    for unused in (None, False, []):
        check(CHAT, web_search_options=unused)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES], ids=ids)
def test_a_service_tier_other_than_the_usual_needs_permission(endpoint: Endpoint) -> None:
    """It changes the price of the call."""
    for usual in (None, "auto", "default", "standard_only"):
        check(endpoint, service_tier=usual)
    assert '"allow: {service_tiers: [priority]}"' in not_allowed(endpoint, service_tier="priority").message
    check(endpoint, Allow(service_tiers=frozenset(["priority"])), service_tier="priority")
    for other in ("flex", "PRIORITY", ["priority"], {"priority": 1}, True):
        assert (
            not_allowed(endpoint, Allow(service_tiers=frozenset(["priority"])), service_tier=other).param
            == "service_tier"
        )


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES], ids=ids)
def test_store_is_refused_if_the_operator_forbids_it(endpoint: Endpoint) -> None:
    """The upstream would keep the answer for a month, in an account that all users share."""
    for unused in (None, False, []):
        check(endpoint, Allow(store=False), store=unused)
    for used in (True, "true", 1):
        assert '"allow: {store: true}"' in not_allowed(endpoint, Allow(store=False), store=used).message
        check(endpoint, store=used)


@pytest.mark.parametrize(
    ("tool", "type_"),
    [
        ({"type": "function", "google_search": {}}, "google_search"),
        ({"type": "function", "googleSearch": {}}, "google_search"),
        ({"type": "function", "function": {"name": "f"}, "url_context": {}}, "url_context"),
        ({"type": "function", "function": {"name": "$web_search"}}, "$web_search"),
        ({"type": "function", "name": "$web_search"}, "$web_search"),
    ],
)
def test_a_tool_inside_a_function_needs_permission_of_its_own(tool: dict, type_: str) -> None:
    """LiteLLM drops the type and searches. Kimi runs functions whose names begin with "$"."""
    assert f"tools: [{type_}]" in not_allowed(CHAT, tools=[tool]).message
    check(CHAT, Allow(frozenset([type_])), tools=[tool])
    check(CHAT, tools=[{"type": "function", "function": {"name": "google_search"}, "google_search": None}])
    check(MESSAGES, tools=[{"name": "web_search", "input_schema": {"web_search": {}}}])


def test_a_tool_may_have_a_member_of_its_own_type() -> None:
    """Zhipu's tools have their options there."""
    tool = {"type": "web_search", "web_search": {"enable": True}}
    check(CHAT, Allow(frozenset(["web_search"])), tools=[tool])
    both = {**tool, "code_execution": {}}
    assert "[code_execution]" in not_allowed(CHAT, Allow(frozenset(["web_search"])), tools=[both]).message
    assert not_allowed(MESSAGES, tools=[{"google_search": {}}]).param == "tools"


@pytest.mark.parametrize(
    ("endpoint", "fields", "expected"),
    [
        (CHAT, {}, False),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "store": False}, False),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}]}, False),
        (RESPONSES, {"tools": [{"type": "custom", "name": "f"}]}, False),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, True),
        (RESPONSES, {"tools": [{"type": "mcp", "server_label": "a"}]}, True),
        (CHAT, {"tools": [{"type": "function", "google_search": {}}]}, True),
        (CHAT, {"web_search_options": {}}, True),
        (CHAT, {"store": True}, True),
    ],
)
def test_a_call_has_effects_if_tools_run_at_the_upstream_or_it_is_stored(
    endpoint: Endpoint, fields: dict[str, object], expected: bool
) -> None:
    """Only a call without any may be given to a second upstream while the first may still run it."""
    assert has_effects(endpoint, parse(endpoint, **fields).body) is expected
