"""What differs between kinds of upstream is said once, and everything else asks for it.

wire §1.4 (which fields an upstream really reads), §2.3 (asking for the usage of a stream).
"""

import json

import pytest

from proxy.config.json_schema import json_schema
from proxy.formats.body import RequestBody
from proxy.formats.content import read_prompt
from proxy.formats.endpoints import CHAT, METERED, Endpoint
from proxy.formats.kinds import CHOICE_COUNT_FIELDS, KINDS, LEAST_MAXIMUM, MAXIMUM_FIELDS, kind_of
from proxy.formats.restrictions import CHECKED_FIELDS
from tests.formats.test_request import GENERATING, READS, WRITES, targets

kinds = pytest.mark.parametrize("kind", KINDS)


@targets
def test_maximum_fields_are_those_that_the_upstream_reads(kind: str, endpoint: Endpoint) -> None:
    """The estimate believes only these fields. The first is the one that is written."""
    fields = kind_of(kind).maximum_fields(endpoint)
    assert set(fields) == READS[kind, endpoint.name]
    assert fields[0] == WRITES.get((kind, endpoint.name), endpoint.maxima[0])


@pytest.mark.parametrize("kind", KINDS)
def test_minus_one_means_no_maximum_and_so_may_0(kind: str) -> None:
    """0 does at Ollama, and at gateways in front of OpenAI's API that leave it out. OpenAI itself refuses it."""
    for endpoint in GENERATING:
        if endpoint.surface not in kind_of(kind).surfaces:
            continue
        may_be_left_out = kind in ("openai", "azure") and endpoint.name in ("chat", "responses")
        assert kind_of(kind).is_endless(-1, endpoint)
        assert kind_of(kind).is_endless(0, endpoint) == (kind == "ollama" or may_be_left_out)
        assert not kind_of(kind).is_endless(1, endpoint)


def test_a_kind_is_configured_by_its_name() -> None:
    """The JSON Schema and error messages list the names in the order of the table."""
    schema = json.loads(json_schema())
    assert schema["$defs"]["Upstream"]["properties"]["kind"]["enum"] == list(KINDS)
    assert list(KINDS) == ["openai", "azure", "anthropic", "vllm", "ollama", "llamacpp", "simulator"]


def test_only_anthropic_and_the_simulator_serve_anthropic_s_api() -> None:
    """Nothing is translated: each kind serves one of the two APIs, but the simulator has both."""
    assert [name for name, kind in KINDS.items() if "messages" in kind.surfaces] == ["anthropic", "simulator"]
    assert [name for name, kind in KINDS.items() if "chat" not in kind.surfaces] == ["anthropic"]
    assert {endpoint.name for endpoint in METERED if endpoint.surface == "messages"} == {"messages", "count_tokens"}


def test_answers_are_read_to_their_end_where_they_are_billed_all_the_same() -> None:
    """Hosted APIs bill an answer whose client has left; servers of one's own stop."""
    assert [name for name, kind in KINDS.items() if kind.on_disconnect == "stop"] == ["vllm", "ollama", "llamacpp"]


@kinds
def test_the_fields_of_every_kind_are_checked_and_not_read_as_text(kind: str) -> None:
    """A model may be served by several kinds, so a field is checked whichever of them gets the call."""
    of = KINDS[kind]
    own = {name for names in of.own_maximum_fields.values() for name in names}
    assert own <= set(MAXIMUM_FIELDS) == LEAST_MAXIMUM.keys()
    assert set(of.own_choice_count_fields) < set(CHOICE_COUNT_FIELDS)
    assert own.union(of.own_choice_count_fields) <= CHECKED_FIELDS
    body = RequestBody({name: "any" for name in (*own, *of.own_choice_count_fields)})
    assert read_prompt(body, is_chat=False).texts == ()


@kinds
def test_the_option_for_running_usage_is_written_so_that_it_is_found_again(kind: str) -> None:
    """What the proxy writes is what it looks for in a client's request. Other options stay."""
    of = KINDS[kind]
    document: dict[str, object] = {"stream_options": {"include_usage": True}}
    assert not of.asks_for_running_usage(document)
    of.add_running_usage(document)
    assert of.asks_for_running_usage(document) == (of.running_usage is not None)
    assert (of.running_usage is None) == (of.running_usage_option is None)
    if of.running_usage_option is None:
        assert document == {"stream_options": {"include_usage": True}}
    else:
        assert f'"{of.running_usage_option}": true' in json.dumps(document)
        assert document["stream_options"]["include_usage"]  # type: ignore[index]
    without: dict[str, object] = {"stream_options": None}
    of.add_running_usage(without)
    assert of.asks_for_running_usage(without) == (of.running_usage is not None)


def test_which_kinds_take_names_in_any_case() -> None:
    """Azure's deployments, and Ollama's models, which also have a default tag, namespace and host."""
    spellings = {name: kind.naming.spellings("Llama3") for name, kind in KINDS.items()}
    assert spellings.pop("azure") == ("llama3",)
    assert spellings.pop("ollama")[:3] == ("llama3", "llama3:latest", "library/llama3")
    assert set(spellings.values()) == {()}
    same = {kind_of("ollama").naming.spellings(name) for name in ("x", "X:LATEST", "registry.ollama.ai/library/x")}
    assert len(same) == 1


def test_the_beta_header_is_anthropic_s_alone() -> None:
    """Other kinds would be sent a header that they do not know."""
    assert [name for name, kind in KINDS.items() if kind.beta_header] == ["anthropic"]
    assert [name for name, kind in KINDS.items() if kind.usual_betas] == ["anthropic"]
    assert KINDS["anthropic"].maximum_fields(CHAT) == CHAT.maxima
