"""The kinds of upstream: everything that differs between vendors and servers, with one object for each kind.

`Kind` is OpenAI's API as OpenAI serves it, which most gateways copy. Each subclass overrides what its server does
otherwise. A new kind is one class here and its row in `KINDS`; nothing else asks for a kind by its name. A policy has
the name of a kind as text, which the configuration checks against `KINDS`.

Sources: the vendors' published API descriptions, and the source code of vLLM, Ollama and llama.cpp for the fields
that they really read. Pure.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from proxy.formats.endpoints import METERED, Endpoint, EndpointName, SurfaceName
from proxy.policy.catalog import Naming, OnDisconnect, Secret, Upstream

# The latest dated version of Azure's API that is not a preview. It is sent if neither the client nor the
# configuration names one.
_AZURE_VERSION = "2024-10-21"
# The first version with `stream_options` and `max_completion_tokens`. With an older one, streams would not report
# their usage, and a maximum that we write would be answered with 400. Requests of older clients mean the same in this
# one.
_AZURE_OLDEST = "2024-09-01"
_DATED = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9](?:-preview)?")
# Azure's newer API at /openai/v1 takes one of these versions, or none.
_UNDATED = re.compile(r"v1|preview|latest")

# The `anthropic-version` that is sent for a client that names none: the first that was published, because every
# compatible server knows it.
_ANTHROPIC_VERSION = "2023-06-01"
# The values of `anthropic-beta` that are forwarded for every user. They change neither the price of a token nor what
# a request can reach. They add request fields (effort, system messages between turns, which parts of the history to
# leave out, the scope of a cached prefix), allow thinking between tool calls, report the thinking tokens, and name
# the client. Claude Code 2.1 sends all of them, and the fields of its requests need them.
# Not in the list: `context-1m-…`, whose long inputs cost more; `fast-mode-…`, `compact-…` and `advisor-tool-…`, which
# cost more by themselves; and the betas for files, servers (MCP), skills and the web, which reach other systems.
_USUAL_BETAS = frozenset(
    (
        "claude-code-20250219",
        "context-management-2025-06-27",
        "effort-2025-11-24",
        "interleaved-thinking-2025-05-14",
        "mid-conversation-system-2026-04-07",
        "prompt-caching-scope-2026-01-05",
        "thinking-token-count-2026-05-13",
    )
)
_BEARER = ("authorization", "Bearer ")
# OpenAI's default for `max_tokens` on /completions.
_COMPLETIONS_DEFAULT = 16
# OpenAI's models without hidden reasoning, by the beginning of their names. All other models of OpenAI, also future
# ones, are assumed to reason.
_WITHOUT_HIDDEN_REASONING = tuple("babbage-002 chatgpt-4o davinci-002 gpt-3.5 gpt-35 gpt-4".split())


class Kind:
    """An upstream with OpenAI's API, and the behaviour of all kinds that override nothing.

    `surfaces` are those that it serves; nothing is translated from one to the other. `on_disconnect` is the
    default of that setting: hosted APIs bill an answer whose client has left, so it is read to its usage.
    """

    surfaces: ClassVar[frozenset[SurfaceName]] = frozenset(("chat", "responses", "media", "rerank"))
    on_disconnect: ClassVar[OnDisconnect] = "drain"
    # Whether the configuration of an upstream may name an `api_version`.
    has_api_version: ClassVar[bool] = False
    # Which names it takes for the same model.
    naming: ClassVar[Naming] = Naming()

    # The header that carries its key, and what comes before the key.
    key_header: ClassVar[tuple[str, str]] = _BEARER
    # Headers that are sent if the client sends none of that name.
    default_headers: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # Headers that are sent with each request for a stream.
    stream_headers: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # The header in which a client names betas, and the betas that every user may name.
    beta_header: ClassVar[str | None] = None
    usual_betas: ClassVar[frozenset[str]] = frozenset()

    # The fields that bound an answer, for the endpoints on which it reads other ones than OpenAI. The first is the
    # one to write.
    own_maximum_fields: ClassVar[Mapping[EndpointName, tuple[str, ...]]] = MappingProxyType({})
    # The smallest number in a field in which a negative number means "no maximum"; 0 in all others.
    least_maximum: ClassVar[Mapping[str, int]] = MappingProxyType({})
    # Numbers below this one mean "no maximum", by endpoint; elsewhere numbers below 0. OpenAI refuses 0 on chat and
    # /responses. Gateways written in Go leave a 0 out (`omitempty`), so that nothing bounds the answer.
    smallest_bounds: ClassVar[Mapping[EndpointName, int]] = MappingProxyType({"chat": 1, "responses": 1})
    # The least maximum that it accepts, by endpoint; elsewhere 1.
    least_accepted: ClassVar[Mapping[EndpointName, int]] = MappingProxyType({"responses": 16})
    # Its own names for `n`, the number of answers.
    own_choice_count_fields: ClassVar[tuple[str, ...]] = ()
    # The maximum that it applies on /completions if a request states none; None for no maximum.
    completions_default: ClassVar[int | None] = _COMPLETIONS_DEFAULT
    # Whether an answer ends at the latest where the model's context ends. Ollama and llama.cpp can drop the beginning
    # of the context and go on.
    ends_at_context: ClassVar[bool] = True
    # Whether each of its answers has a maximum that does not depend on the model's configuration.
    bounds_answers: ClassVar[bool] = False

    # How a stream reports its usage so far on each chunk if the option for it is written: as `usage` or as `timings`.
    # None: there is no such option.
    running_usage: ClassVar[Literal["usage", "timings"] | None] = None
    # The name of that option in the request. An upstream that rejects the option repeats it.
    running_usage_option: ClassVar[str | None] = None
    # Whether the usage of a whole answer with several choices covers the first choice only.
    states_first_choice_only: ClassVar[bool] = False

    # The path of its list of models; None: it has no list of the names that a call takes.
    models_path: ClassVar[str | None] = "/models"
    # Whether it serves its one model under any name.
    ignores_model_names: ClassVar[bool] = False
    # Whether it may store responses under their ids, so that one whose answer was cut has to be deleted there.
    stores_responses: ClassVar[bool] = True

    # The surface of its error bodies, in which they are forwarded; None for OpenAI's.
    error_surface: ClassVar[SurfaceName | None] = None

    def address(
        self, upstream: Upstream, path: str, *, deployment: str | None = None, api_version: str | None = None
    ) -> str:
        """What is appended to the upstream's `base_url`: the path, and a query if this kind needs one.

        `path` is OpenAI's. Only Azure differs: it has some paths below the name of a `deployment`, and the version of
        its API in the query. `api_version` is the client's. It is sent only if that API has such versions and streams
        report their usage in it. Otherwise the version in the upstream's configuration is sent.
        """
        return path

    def maximum_fields(self, endpoint: Endpoint) -> tuple[str, ...]:
        """The fields that bound an answer on this endpoint; the first is the one to write."""
        return self.own_maximum_fields.get(endpoint.name, endpoint.maxima)

    def is_endless(self, number: int, endpoint: Endpoint) -> bool:
        """Whether it may read a number in a field that bounds an answer as "no maximum"."""
        return number < self.smallest_bounds.get(endpoint.name, 0)

    def least_written(self, endpoint: Endpoint) -> int:
        """The least maximum that can be written into a request: for less it answers 400, or reads no maximum."""
        return max(1, self.smallest_bounds.get(endpoint.name, 1), self.least_accepted.get(endpoint.name, 1))

    def hides_reasoning(self, upstream_model: str) -> bool:
        """Whether a model reasons in tokens that the answer does not show, judged by its name.

        OpenAI's models do unless they are known not to, which is the careful assumption for models of the future.
        """
        name = upstream_model.removeprefix("ft:")  # fine-tuned: ft:gpt-4o-mini:acme::x
        return not name.startswith(_WITHOUT_HIDDEN_REASONING)

    def asks_for_running_usage(self, document: Mapping[str, Any]) -> bool:
        """Whether the client itself has written the option for `running_usage`."""
        return False

    def add_running_usage(self, document: dict[str, Any]) -> None:
        """Write the option for `running_usage` into the document that is forwarded."""

    def key_headers(self, api_key: Secret | None, *, is_access_token: bool = False) -> dict[str, str]:
        """The header that carries its key; none if it has no key.

        An access token of OAuth 2.0 is always sent as a bearer token (RFC 6750), also to Azure and Anthropic.
        """
        name, before = _BEARER if is_access_token else self.key_header
        return {} if api_key is None else {name: before + api_key.reveal()}


class _WithVisibleReasoning(Kind):
    """A kind that streams the reasoning of its models, whatever they are called."""

    def hides_reasoning(self, upstream_model: str) -> bool:
        return False


class _OwnServer(_WithVisibleReasoning):
    """A server of the operator's own. It stops when its client disconnects, and does not bill."""

    on_disconnect = "stop"
    smallest_bounds = MappingProxyType({})
    least_accepted = MappingProxyType({})


class Azure(Kind):
    """Azure OpenAI. It has a path for each deployment, and the version of its API in the query.

    The names of deployments say nothing, so each of their models is assumed to reason, unless its name is one of
    OpenAI's that does not.
    """

    has_api_version = True
    naming = Naming(any_case=True)
    key_header = ("api-key", "")
    models_path = None  # it lists models that could be deployed; calls name deployments

    def address(
        self, upstream: Upstream, path: str, *, deployment: str | None = None, api_version: str | None = None
    ) -> str:
        """The path of the deployment and the version: /openai/deployments/prod/chat/completions?api-version=…"""
        if upstream.base_url.endswith("/v1"):
            version = _matching(_UNDATED, api_version) or upstream.api_version
            return path + (f"?api-version={version}" if version else "")
        requested = _matching(_DATED, api_version)
        # Versions are ISO dates, so they compare as texts: "2024-08-01-preview" < "2024-09-01".
        is_new_enough = requested is not None and requested >= _AZURE_OLDEST
        version = requested if is_new_enough else upstream.api_version or _AZURE_VERSION
        root = "" if upstream.base_url.endswith("/openai") else "/openai"
        # Every character is quoted, so that a name such as "../x" stays one path segment.
        below = f"/deployments/{quote(deployment, safe='')}" if deployment is not None else ""
        return f"{root}{below}{path}?api-version={version}"


class Anthropic(_WithVisibleReasoning):
    """Anthropic's API. It requires a maximum in every request."""

    surfaces = frozenset(("messages",))
    key_header = ("x-api-key", "")
    default_headers = MappingProxyType({"anthropic-version": _ANTHROPIC_VERSION})
    beta_header = "anthropic-beta"
    usual_betas = _USUAL_BETAS
    bounds_answers = True
    error_surface = "messages"
    models_path = "/models?limit=1000"  # by default a page has 20


class VLLM(_OwnServer):
    """vLLM. `stream_options.continuous_usage_stats` asks for `usage` on each chunk."""

    running_usage = "usage"
    running_usage_option = "continuous_usage_stats"

    def asks_for_running_usage(self, document: Mapping[str, Any]) -> bool:
        options = document.get("stream_options")
        return isinstance(options, dict) and bool(options.get("continuous_usage_stats"))

    def add_running_usage(self, document: dict[str, Any]) -> None:
        document["stream_options"] = {**(document.get("stream_options") or {}), "continuous_usage_stats": True}


class Ollama(_OwnServer):
    """Ollama. Its struct has only `max_tokens`, so lowering `max_completion_tokens` would bound nothing."""

    naming = Naming(
        any_case=True, default_tag=":latest", default_namespace="library/", default_host="registry.ollama.ai/"
    )
    own_maximum_fields = MappingProxyType({"chat": ("max_tokens",)})
    ends_at_context = False
    stores_responses = False
    smallest_bounds = MappingProxyType(dict.fromkeys(("chat", "completions", "responses"), 1))
    completions_default = None


class LlamaCpp(_OwnServer):
    """llama.cpp's server. `n_predict` overrides all other maxima, on each of its endpoints; -1 is no maximum.

    It copies the other fields to `n_predict`, so -1 means the same in them.
    """

    own_maximum_fields = MappingProxyType(
        {
            "chat": ("n_predict", "max_completion_tokens", "max_tokens"),
            "completions": ("n_predict", "max_completion_tokens", "max_tokens"),
            "responses": ("max_output_tokens", "n_predict", "max_completion_tokens", "max_tokens"),
        }
    )
    least_maximum = MappingProxyType(
        dict.fromkeys(("n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens"), -1)
    )
    ends_at_context = False
    own_choice_count_fields = ("n_cmpl",)  # overrides `n`
    stores_responses = False
    ignores_model_names = True
    completions_default = None
    running_usage = "timings"
    running_usage_option = "timings_per_token"
    states_first_choice_only = True
    # It announces `keep-alive` and closes the connection after a stream all the same. If the connection were pooled,
    # the next call would be written to a closed socket.
    stream_headers = MappingProxyType({"connection": "close"})

    def asks_for_running_usage(self, document: Mapping[str, Any]) -> bool:
        return bool(document.get("timings_per_token"))

    def add_running_usage(self, document: dict[str, Any]) -> None:
        document["timings_per_token"] = True


class Simulator(_WithVisibleReasoning):
    """The simulator of this project. It serves both APIs, and its answers have a maximum of their own."""

    surfaces = frozenset(("chat", "responses", "messages", "media", "rerank"))
    bounds_answers = True
    smallest_bounds = MappingProxyType({})
    least_accepted = MappingProxyType({})


# In the order in which the configuration's JSON Schema and its error messages list them.
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "openai": Kind(),
        "azure": Azure(),
        "anthropic": Anthropic(),
        "vllm": VLLM(),
        "ollama": Ollama(),
        "llamacpp": LlamaCpp(),
        "simulator": Simulator(),
    }
)


# The kind of a name. The configuration accepts no other names.
kind_of: Callable[[str], Kind] = KINDS.__getitem__


def _matching(pattern: re.Pattern[str], api_version: str | None) -> str | None:
    return api_version if api_version and pattern.fullmatch(api_version) else None


def _unique(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


# Every field that bounds an answer on some endpoint or at some kind of upstream, and the least number in it at any.
MAXIMUM_FIELDS = _unique(
    *(name for endpoint in METERED for name in endpoint.maxima),
    *(name for kind in KINDS.values() for names in kind.own_maximum_fields.values() for name in names),
)
LEAST_MAXIMUM: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(MAXIMUM_FIELDS, 0)
    | {name: least for kind in KINDS.values() for name, least in kind.least_maximum.items()}
)
# Every field that states the number of answers to one prompt.
CHOICE_COUNT_FIELDS = _unique("n", *(name for kind in KINDS.values() for name in kind.own_choice_count_fields))
