"""What costs or reaches beyond what quotas see is refused unless the policy allows it, and the message says how."""

import pytest

from proxy.errors import InvalidRequest
from proxy.formats.endpoints import (
    CHAT,
    COMPACT,
    COMPLETIONS,
    COUNT_TOKENS,
    INPUT_TOKENS,
    MESSAGES,
    RESPONSES,
    Endpoint,
)
from proxy.formats.restrictions import check_allowance
from proxy.policy.policy import Allow
from tests.formats.test_request import parse

NOTHING = Allow()
OF_RESPONSES = [RESPONSES, COMPACT, INPUT_TOKENS]


def ids(value: object) -> str | None:
    """Endpoints by their names."""
    return value.name if isinstance(value, Endpoint) else None


def check(endpoint: Endpoint, allow: Allow = NOTHING, **fields: object) -> None:
    """Check a call with these fields."""
    check_allowance(parse(endpoint, **fields), allow)


def refused(endpoint: Endpoint, allow: Allow = NOTHING, **fields: object) -> InvalidRequest:
    """The error with which such a call is refused."""
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
    """They loop there, and each round costs tokens that nothing here bounds; also where they come in by an item."""
    given = [{"type": "function", "name": "f"}, tool]
    assert refused(endpoint, tools=given).param == "tools"
    assert refused(endpoint, input=["text", {"type": "additional_tools", "tools": given}]).param == "tools"
    within = [{"type": "namespace", "name": "n", "tools": given}]
    assert refused(endpoint, tools=within).param == "tools"
    assert refused(endpoint, tools=[{"type": "namespace", "tools": within}]).param == "tools"
    assert refused(endpoint, input=[{"type": "tool_search_output", "tools": within}]).param == "tools"


def test_tools_that_the_client_runs_are_open() -> None:
    """Functions and custom tools are text in and text out, and so are groups of them (Codex sends such) and a search
    among them that the client makes; what is no list is for the upstream to refuse."""
    schema = {"type": "object", "properties": {"file_id": {"type": "string"}, "container": {"type": "string"}}}
    check(RESPONSES, tools=[{"type": "function", "name": "f", "parameters": schema}, {"type": "custom", "name": "c"}])
    group = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": schema}]}
    check(RESPONSES, tools=[group, {"type": "tool_search", "execution": "client", "parameters": schema}])
    check(RESPONSES, input=[{"type": "additional_tools", "tools": [group, {"type": "namespace", "tools": [group]}]}])
    check(RESPONSES, tools={"type": "web_search"})
    check(RESPONSES, input=[{"type": "additional_tools", "tools": [{"type": "function", "name": "f"}]}])
    check(RESPONSES, input=[{"type": "mcp_list_tools", "tools": [{"name": "f"}]}])  # what a server once listed
    check(CHAT, tools=[{"type": "function"}])


@pytest.mark.parametrize("endpoint", [MESSAGES, COUNT_TOKENS], ids=ids)
def test_anthropic_s_own_tools_are_open_only_by_their_types(endpoint: Endpoint) -> None:
    """What the vendor says of them to its model is input that the request doesn't show; a user's own need no type."""
    own = [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g", "input_schema": {}}]
    check(endpoint, tools=own)
    for kind in ("web_search_20250305", "bash_20250124"):
        error = refused(endpoint, tools=[*own, {"type": kind, "name": "t"}])
        assert f'"allow: {{tools: [{kind}]}}"' in error.message
        check(endpoint, Allow(frozenset([kind])), tools=[*own, {"type": kind, "name": "t"}])
    assert refused(endpoint, tools=["web_search"]).param == "tools"
    assert refused(RESPONSES, tools=[{"name": "f"}]).param == "tools"  # there it would need its type


def test_a_tool_without_a_type_is_for_its_user_to_mend() -> None:
    """No setting of the operator's could open it."""
    message = refused(RESPONSES, tools=[{"name": "f"}]).message
    assert ('says its "type"' in message, "allow" in message) == (True, False)


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES], ids=ids)
def test_the_type_of_a_tool_has_one_spelling(endpoint: Endpoint) -> None:
    """Behind a gateway in Go the last of two wins, in whatever case; the parameters of a function are its user's."""
    own = {"type": "custom", "name": "f", "input_schema": {"Type": "x", "Tools": []}}
    check(endpoint, tools=[own])
    for twin in ("Type", "TYPE", "Tools", "tool\u017f"):
        with pytest.raises(InvalidRequest) as caught:
            check(endpoint, tools=[{**own, twin: "web_search"}])
        assert (caught.value.status, caught.value.param) == (400, "tools")


def test_tools_that_are_allowed_are_open_and_no_others() -> None:
    """By the very type that the request names."""
    allow = Allow(frozenset(["web_search", "mcp", "code_interpreter"]))
    check(RESPONSES, allow, tools=[{"type": "web_search"}, {"type": "mcp", "server_url": "https://a.example"}])
    check(RESPONSES, allow, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    inner = {"type": "function", "name": "f", "parameters": {"file_id": {}}}
    check(RESPONSES, allow, tools=[{"type": "namespace", "name": "n", "tools": [inner]}])
    error = refused(RESPONSES, allow, tools=[{"type": "web_search_preview"}])
    assert '"allow: {tools: [web_search_preview]}"' in error.message
    assert refused(RESPONSES, tools=[{"type": "x" * 900}]).param == "tools"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "file_search", "vector_store_ids": ["vs_1"]},
        {"type": "code_interpreter", "container": "cntr_1"},
        {"type": "code_interpreter", "container": {"type": "auto", "file_ids": ["file_1"]}},
        {"type": "shell", "environment": {"type": "container_reference", "container_id": "cntr_1"}},
        {"type": "shell", "environment": {"skills": [{"type": "skill_reference", "skill_id": "skill_1"}]}},
        {"type": "image_generation", "input_image_mask": {"file_id": "file_1"}},
    ],
)
def test_an_allowed_tool_reaches_nothing_that_is_stored(tool: dict) -> None:
    """Whoever stored it: the account is everybody's."""
    assert "stored at the upstream" in refused(RESPONSES, Allow(frozenset([tool["type"]])), tools=[tool]).message


def test_other_vendors_have_tools_of_their_own_in_chat() -> None:
    """Which they run themselves, as on /responses."""
    own = {"type": "function", "function": {"name": "f"}}
    assert "tools: [browser_search]" in refused(CHAT, tools=[own, {"type": "browser_search"}]).message
    check(CHAT, Allow(frozenset(["browser_search"])), tools=[own, {"type": "browser_search"}])


def test_search_in_chat_is_a_tool_too() -> None:
    """It stands in a field of its own there."""
    error = refused(CHAT, web_search_options={})
    assert (error.param, "tools: [web_search]" in error.message) == ("web_search_options", True)
    check(CHAT, Allow(frozenset(["web_search"])), web_search_options={})
    assert refused(COMPLETIONS, web_search_options={}).param == "web_search_options"
    for unused in (None, False):
        check(CHAT, web_search_options=unused)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES], ids=ids)
def test_a_tier_of_service_has_its_price(endpoint: Endpoint) -> None:
    """The usual ones are open, of others those that are allowed."""
    for usual in (None, "auto", "default", "standard_only"):
        check(endpoint, service_tier=usual)
    assert '"allow: {service_tiers: [priority]}"' in refused(endpoint, service_tier="priority").message
    check(endpoint, Allow(service_tiers=frozenset(["priority"])), service_tier="priority")
    for other in ("flex", "PRIORITY", ["priority"], {"priority": 1}, True):
        assert (
            refused(endpoint, Allow(service_tiers=frozenset(["priority"])), service_tier=other).param
            == "service_tier"
        )


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES], ids=ids)
def test_nothing_is_kept_where_the_operator_says_so(endpoint: Endpoint) -> None:
    """At the upstream it would stay for a month, in an account that everybody shares."""
    for unused in (None, False):
        check(endpoint, Allow(store=False), store=unused)
    for used in (True, "true", 1):
        assert '"allow: {store: true}"' in refused(endpoint, Allow(store=False), store=used).message
        check(endpoint, store=used)
