"""The table of endpoints: which paths of OpenAI's and Anthropic's surfaces are metered, which lead to what a user
made, and which are refused, and why.

The list is closed. A path that stands nowhere in it is not served, so that what OpenAI adds next month is not open by
accident; one that would leak or go unmetered stands in it with its reason, so that whoever meets it learns why. Paths
are relative to the base URL; in a pattern `{}` is one segment and `**` any number of them.

Beside the metered ones `/models` and `/quota` are answered by the proxy itself, from the policy and the books.
Sources: the published API descriptions of both, and the paths of their SDKs. Pure.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

EndpointName = Literal[
    "chat",
    "completions",
    "embeddings",
    "responses",
    "compact",
    "input_tokens",
    "moderations",
    "images",
    "image_edits",
    "image_variations",
    "speech",
    "transcriptions",
    "translations",
    "messages",
    "count_tokens",
]
# What an answer is charged. `tokens`: those it says, else those that we count. `tokens_if_said`: those it says; one
# that says none is billed by the piece, and counts as a request. `request`: a request and no tokens. `nothing`.
Charge = Literal["tokens", "tokens_if_said", "request", "nothing"]

_ELSEWHERE = "it would change where this call goes or which key it uses, and the proxy decides that"
_REROUTING = dict.fromkeys(
    # LiteLLM's fallbacks and OpenRouter's models and presets name others than the model that is allowed and counted;
    # vLLM's transfers name a server from which it fetches what another call has read.
    (
        "api_base api_key base_url content_policy_fallbacks context_window_fallback_dict context_window_fallbacks "
        "custom_host custom_llm_provider deployment_id extra_body extra_headers fallbacks kv_transfer_params "
        "model_list models preset user_config"
    ).split(),
    _ELSEWHERE,
)
# Azure's own data: searched by the upstream, with its operator's rights. The others search the web: OpenRouter's
# (on each of its endpoints), xAI's and Alibaba's.
_SEARCHES = dict.fromkeys(
    ("data_sources", "plugins", "search_parameters", "enable_search"),
    "the upstream would search by it, and no setting of this proxy opens that. Send what the model is to read",
)
_EVERYWHERE = {**_REROUTING, **_SEARCHES}
STORED = (
    "it refers to things stored at the upstream, in an account that all users share, and the request does not show "
    "their tokens. Send their content instead"
)
_NO_STATE = {
    **_EVERYWHERE,
    "background": "its cost would arise after the answer. Leave it out, and stream the answer if it is long",
    "conversation": STORED,
    "prompt": STORED,
    # vLLM makes it the id of the response, which would then be whosever a client says.
    "request_id": "responses are named by their upstream",
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path that is metered: a POST, open to every user whom a quota covers for the model of the call.

    `maxima` are the fields that bound an answer. Where there are none, `answer_tokens` is held for each, and the
    tokens can't be seen as they come. `default_model` is what the upstream takes where a request names none. `form`
    says what the files are where the request is a form (`multipart/form-data`) and not JSON.
    """

    name: EndpointName
    path: str
    charge: Charge
    maxima: tuple[str, ...] = ()
    answer_tokens: int = 0
    default_model: str | None = None
    form: Literal["audio", "images"] | None = None
    refused: Mapping[str, str] = field(default_factory=lambda: _EVERYWHERE)

    @property
    def generates(self) -> bool:
        """Whether it makes output tokens."""
        return bool(self.maxima or self.answer_tokens)

    @property
    def shows_output(self) -> bool:
        """Whether what it generates passes as text, token by token."""
        return bool(self.maxima)

    @property
    def has_usage_option(self) -> bool:
        """Whether a stream tells its usage only when `stream_options.include_usage` asks for it."""
        return self.name in ("chat", "completions")

    @property
    def has_deployments(self) -> bool:
        """Whether Azure has it under the path of a deployment, whose name is that of the model."""
        return self.path in _OF_DEPLOYMENTS

    @property
    def is_of_responses(self) -> bool:
        """Whether its request is that of /responses: items, tools, and what is stored at the upstream."""
        return self.name in ("responses", "compact", "input_tokens")

    @property
    def is_of_messages(self) -> bool:
        """Whether it is one of Anthropic's surface: its request, its answers, its errors."""
        return self.name in ("messages", "count_tokens")


# As Azure's SDKs address them; all else stands there at /openai itself.
_OF_DEPLOYMENTS = frozenset(
    (
        "/audio/speech",
        "/audio/transcriptions",
        "/audio/translations",
        "/chat/completions",
        "/completions",
        "/embeddings",
        "/images/edits",
        "/images/generations",
    )
)
# Where our paths begin: OpenAI's own, then Azure's newer surface, and its older one but for what has deployments.
PREFIXES = ("/v1", "", "/openai/v1", "/openai")
_PREFIX = re.compile(r"(?:/openai(?:/deployments/[^/]+)?)?(?:/v1)?(?=/)")

CHAT = Endpoint(
    "chat",
    "/chat/completions",
    "tokens",
    maxima=("max_completion_tokens", "max_tokens"),
)
COMPLETIONS = Endpoint("completions", "/completions", "tokens", maxima=("max_tokens",))
EMBEDDINGS = Endpoint("embeddings", "/embeddings", "tokens")
RESPONSES = Endpoint("responses", "/responses", "tokens", maxima=("max_output_tokens",), refused=_NO_STATE)
# A summary in place of a conversation: a pass of the model, whose length no field bounds.
COMPACT = Endpoint("compact", "/responses/compact", "tokens", answer_tokens=8192, refused=_NO_STATE)
INPUT_TOKENS = Endpoint("input_tokens", "/responses/input_tokens", "nothing", refused=_NO_STATE)
MODERATIONS = Endpoint("moderations", "/moderations", "request", default_model="omni-moderation-latest")
# A large picture of high quality has 6,240 tokens (OpenAI's table for gpt-image-1), each partial one 100 more.
_PICTURE_TOKENS = 8192
_ONE_MODEL = {**_EVERYWHERE, "svg": "it names a second model, which no quota would see"}
IMAGES = Endpoint(
    "images",
    "/images/generations",
    "tokens_if_said",
    answer_tokens=_PICTURE_TOKENS,
    default_model="dall-e-2",
    refused=_ONE_MODEL,
)
IMAGE_EDITS = Endpoint(
    "image_edits",
    "/images/edits",
    "tokens_if_said",
    answer_tokens=_PICTURE_TOKENS,
    default_model="dall-e-2",
    form="images",
    refused=_ONE_MODEL,
)
# Only dall-e-2 does it, which is billed by the picture.
IMAGE_VARIATIONS = Endpoint(
    "image_variations", "/images/variations", "request", default_model="dall-e-2", form="images"
)
# 4,096 characters are read aloud in five minutes, at 20 tokens a second. Only `stream_format: "sse"` says tokens.
SPEECH = Endpoint("speech", "/audio/speech", "tokens_if_said", answer_tokens=6144)
# Their usage is in tokens or in seconds: one in seconds is billed by them, and so a request, as is plain text.
TRANSCRIPTIONS = Endpoint(
    "transcriptions", "/audio/transcriptions", "tokens_if_said", answer_tokens=4096, form="audio"
)
TRANSLATIONS = Endpoint("translations", "/audio/translations", "tokens_if_said", answer_tokens=4096, form="audio")
# Anthropic's. What its betas add without a field of its own comes only with a header that the operator lets pass.
_NO_SESSION = {
    **_EVERYWHERE,
    "container": STORED,
    "inference_geo": "it has a price of its own",
    "mcp_servers": "the upstream would call these servers, whose words are input that this request does not show",
}
MESSAGES = Endpoint("messages", "/messages", "tokens", maxima=("max_tokens",), refused=_NO_SESSION)
COUNT_TOKENS = Endpoint("count_tokens", "/messages/count_tokens", "nothing", refused=_NO_SESSION)

METERED = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    COMPACT,
    INPUT_TOKENS,
    MODERATIONS,
    IMAGES,
    IMAGE_EDITS,
    IMAGE_VARIATIONS,
    SPEECH,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    MESSAGES,
    COUNT_TOKENS,
)


# What is remembered, and so what may stand in a path: OpenAI's own, and the longer ones that gateways make of them.
RESPONSE_ID = re.compile(r"[A-Za-z0-9_=-]{1,512}")


@dataclass(frozen=True, slots=True)
class StoredResponsePath:
    """A path to a response that its upstream keeps, open to the user who made it. It costs nothing.

    `of_it` is what of it is meant, `query` are the parameters that pass on.
    """

    method: Literal["GET", "POST", "DELETE"]
    of_it: str = ""
    query: tuple[str, ...] = ()

    def path(self, response_id: str) -> str:
        """The path to this response."""
        return f"/responses/{response_id}{self.of_it}"


# `[]` as the SDKs write lists.
STORED_RESPONSE_PATHS = (
    StoredResponsePath("GET", query=("include", "include[]", "include_obfuscation", "starting_after", "stream")),
    StoredResponsePath("DELETE"),
    StoredResponsePath("POST", "/cancel"),
    StoredResponsePath("GET", "/input_items", query=("after", "include", "include[]", "limit", "order")),
)


@dataclass(frozen=True, slots=True)
class Closed:
    """Paths that are known and not served, and why. `method` may be `*`."""

    method: str
    pattern: str
    reason: str

    def covers(self, method: str, path: str) -> bool:
        """Whether a request falls under it."""
        return self.method in ("*", method) and _matches(self.pattern, path)


_KEYS = (
    "it hands the client a session or a key with which it talks to the upstream directly, past every quota. "
    "Use /responses or /chat/completions"
)
_ADMIN = "it administers the account behind this proxy, which is for its operator alone"
_LATER = "its cost arises after the answer, where no quota can count it. Send the calls one by one"
_SHARED = (
    "it reads or writes what is stored in the upstream account, which all users of this proxy share. "
    "Send what the model is to read within each call"
)
_UNCOUNTED = "this proxy can't count yet what it costs"

CLOSED = (
    Closed("*", "/realtime/**", _KEYS),
    Closed("*", "/live/**", _KEYS),
    Closed("*", "/chatkit/**", _KEYS),
    Closed("*", "/organization/**", _ADMIN),
    Closed("*", "/organizations/**", _ADMIN),
    Closed("*", "/projects/**", _ADMIN),
    Closed("*", "/webhook_endpoints/**", _ADMIN),
    Closed("*", "/webhook_event_types/**", _ADMIN),
    Closed("*", "/safety/**", _ADMIN),
    Closed("*", "/tunnels/**", _ADMIN),
    Closed("*", "/user_profiles/**", _ADMIN),
    Closed("DELETE", "/models/{}", _ADMIN),
    Closed("*", "/batches/**", _LATER),
    Closed("*", "/fine_tuning/**", _LATER),
    Closed("*", "/evals/**", _LATER),
    Closed("*", "/videos/**", _LATER),
    Closed("*", "/containers/**", _LATER),
    Closed("*", "/agents/**", _LATER),
    Closed("*", "/messages/batches/**", _LATER),
    Closed("*", "/deployments/**", _LATER),
    Closed("*", "/deployment_runs/**", _LATER),
    Closed("*", "/dreams/**", _LATER),
    Closed("*", "/environments/**", _LATER),
    Closed("*", "/sessions/**", _LATER),
    Closed("*", "/files/**", _SHARED),
    Closed("*", "/uploads/**", _SHARED),
    Closed("*", "/vector_stores/**", _SHARED),
    Closed("*", "/conversations/**", _SHARED),
    Closed("*", "/assistants/**", _SHARED),
    Closed("*", "/threads/**", _SHARED),
    Closed("*", "/skills/**", _SHARED),
    Closed("*", "/vaults/**", _SHARED),
    Closed("*", "/memory_stores/**", _SHARED),
    Closed("*", "/audio/voices/**", _SHARED),
    Closed("*", "/audio/voice_consents/**", _SHARED),
    Closed("GET", "/chat/completions", _SHARED),
    Closed("GET", "/chat/completions/{}", _SHARED),
    Closed("POST", "/chat/completions/{}", _SHARED),
    Closed("DELETE", "/chat/completions/{}", _SHARED),
    Closed("GET", "/chat/completions/{}/messages", _SHARED),
    Closed("POST", "/complete", _UNCOUNTED),
    Closed("POST", "/decisions", _UNCOUNTED),
    Closed("POST", "/content_provenance_checks", _UNCOUNTED),
)


def closed(method: str, path: str) -> Closed | None:
    """Why a path that is not served is not, where it is one that we know; `path` with any prefix, or none."""
    return next((row for row in CLOSED if row.covers(method, _relative(path))), None)


def is_messages_path(path: str) -> bool:
    """Whether a path is one of Anthropic's surface, metered or not; with any prefix, or none."""
    return _matches("/messages/**", _relative(path))


def _relative(path: str) -> str:
    return _PREFIX.sub("", path, count=1)


def _matches(pattern: str, path: str) -> bool:
    written = re.escape(pattern).replace(re.escape("/**"), "(?:/.*)?").replace(re.escape("{}"), "[^/]+")
    return re.fullmatch(written, path, re.DOTALL) is not None
