"""The endpoints of OpenAI's and Anthropic's APIs: which paths are metered, which lead to stored responses, which are
refused and why.

The list is closed: a path that is not in it is not served, so a path that a vendor adds next month is not open by
accident. Known paths that would leak data or escape metering are listed with the reason, which the error message
states. Paths are relative to the base URL. In a pattern `{}` is one segment and `**` any number of segments.

`/models` and `/quota` are answered by the proxy itself, from the policy and the ledger.
Sources: the published API descriptions of both vendors, and the paths in their SDKs. Pure.
"""

import re
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from proxy.policy.amounts import Uses

EndpointName = Literal[
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "score",
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
# The format of an endpoint's answers, streams and errors; `surfaces` has a row for each.
#   chat        a stream of chunks with choices, ended by [DONE]; also embeddings and moderations, which do not stream
#   responses   the events and objects of /responses
#   messages    Anthropic's events, objects and errors
#   media       images, speech, transcripts: their output is known only at the end, and may be no JSON
#   rerank      the scores of documents, as an object or as a list
SurfaceName = Literal["chat", "responses", "messages", "media", "rerank"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One metered path. Its method is POST. A user may call it for each model that a quota of the user covers.

    If it is billed by the piece, one of these quotas must also count the call. `/models` does not ask for that: it
    lists `dall-e-3` for a user whose quotas count only tokens, and each call to it is refused.

    `uses` is what a call can use. It decides which quotas can refuse the call, and what the call is charged.
    `by_piece` says that some models of this endpoint are billed by the image, the second or the character, and their
    answers state no tokens; `pieces` tells them apart. On other endpoints the proxy counts the tokens that an answer
    does not state.

    `maxima` are the fields that bound an answer; the first is the one to write. If there are none, the output can't
    be counted while it streams, and `answer_tokens` are reserved for each answer. `default_model` is what the
    upstream uses if a request names no model. `form` says what the files are if the request is a form
    (`multipart/form-data`) and not JSON. Which fields it refuses is in `restrictions`. `aliases` are whole paths at
    which it is served too; at the upstream the call goes to `path`.

    What follows from these:

    - `generates`: it produces output tokens.
    - `shows_output`: its output is text, which can be counted while it streams.
    - `has_usage_option`: a stream reports its usage only if `stream_options.include_usage` asks for it.
    - `has_deployments`: Azure serves it under `/deployments/{model}`.
    - `is_of_responses`: its request has the format of /responses: items, tools, references to stored things.
    - `is_of_messages`: its requests, answers and errors have Anthropic's format.
    """

    name: EndpointName
    path: str
    surface: SurfaceName
    uses: Uses
    by_piece: bool = False
    maxima: tuple[str, ...] = ()
    answer_tokens: int = 0
    default_model: str | None = None
    form: Literal["audio", "images"] | None = None
    aliases: tuple[str, ...] = ()
    generates: bool = field(init=False)
    shows_output: bool = field(init=False)
    has_usage_option: bool = field(init=False)
    has_deployments: bool = field(init=False)
    is_of_responses: bool = field(init=False)
    is_of_messages: bool = field(init=False)

    def __post_init__(self) -> None:
        """Derive what every call asks for."""
        for name, value in (
            ("generates", self.uses is Uses.INPUT_AND_OUTPUT),
            ("shows_output", bool(self.maxima)),
            ("has_usage_option", self.name in ("chat", "completions")),
            ("has_deployments", self.path in _OF_DEPLOYMENTS),
            ("is_of_responses", self.surface == "responses"),
            ("is_of_messages", self.surface == "messages"),
        ):
            object.__setattr__(self, name, value)


# Azure's SDK sends these to /openai/deployments/{model}/…, and all others to /openai/….
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
# The prefixes under which all paths are served: OpenAI's base URL, a base URL without /v1, Azure's newer API, and
# Azure's older API (for the paths without deployments).
PREFIXES = ("/v1", "", "/openai/v1", "/openai")
_PREFIX = re.compile(r"(?:/openai(?:/deployments/[^/]+)?)?(?:/v1)?(?=/)")

CHAT = Endpoint(
    "chat",
    "/chat/completions",
    "chat",
    Uses.INPUT_AND_OUTPUT,
    maxima=("max_completion_tokens", "max_tokens"),
)
COMPLETIONS = Endpoint("completions", "/completions", "chat", Uses.INPUT_AND_OUTPUT, maxima=("max_tokens",))
EMBEDDINGS = Endpoint("embeddings", "/embeddings", "chat", Uses.INPUT)
# Jina, vLLM, llama.cpp, TEI and others serve /rerank, with or without /v1; Cohere with /v1 and /v2. The `base_url` of
# the upstream says which version it is.
RERANK = Endpoint("rerank", "/rerank", "rerank", Uses.INPUT, aliases=("/v2/rerank",))
SCORE = Endpoint("score", "/score", "rerank", Uses.INPUT)  # vLLM's
RESPONSES = Endpoint("responses", "/responses", "responses", Uses.INPUT_AND_OUTPUT, maxima=("max_output_tokens",))
# The model summarises a conversation; no field bounds the length of the summary.
COMPACT = Endpoint("compact", "/responses/compact", "responses", Uses.INPUT_AND_OUTPUT, answer_tokens=8192)
INPUT_TOKENS = Endpoint("input_tokens", "/responses/input_tokens", "responses", Uses.NOTHING)
MODERATIONS = Endpoint("moderations", "/moderations", "media", Uses.REQUEST, default_model="omni-moderation-latest")
# A large image of high quality has 6,240 tokens (OpenAI's table for gpt-image-1), and each partial image 100 more.
_IMAGE_TOKENS = 8192
IMAGES = Endpoint(
    "images",
    "/images/generations",
    "media",
    Uses.INPUT_AND_OUTPUT,
    by_piece=True,
    answer_tokens=_IMAGE_TOKENS,
    default_model="dall-e-2",
)
IMAGE_EDITS = Endpoint(
    "image_edits",
    "/images/edits",
    "media",
    Uses.INPUT_AND_OUTPUT,
    by_piece=True,
    answer_tokens=_IMAGE_TOKENS,
    default_model="dall-e-2",
    form="images",
)
# Only dall-e-2 has it, which is billed by the image.
IMAGE_VARIATIONS = Endpoint(
    "image_variations",
    "/images/variations",
    "media",
    Uses.INPUT_AND_OUTPUT,
    by_piece=True,
    answer_tokens=_IMAGE_TOKENS,
    default_model="dall-e-2",
    form="images",
)
IMAGE_ENDPOINTS = (IMAGES, IMAGE_EDITS, IMAGE_VARIATIONS)
# The longest input, 4,096 characters, is five minutes of speech. At 20 tokens a second that is 6,000 tokens. Only a
# stream with `stream_format: "sse"` reports its tokens.
SPEECH = Endpoint("speech", "/audio/speech", "media", Uses.INPUT_AND_OUTPUT, by_piece=True, answer_tokens=6144)
# They report usage in tokens, or in seconds if the model is billed by time, or not at all (plain text, subtitles).
# The last two are billed by the piece.
TRANSCRIPTIONS = Endpoint(
    "transcriptions",
    "/audio/transcriptions",
    "media",
    Uses.INPUT_AND_OUTPUT,
    by_piece=True,
    answer_tokens=4096,
    form="audio",
)
TRANSLATIONS = Endpoint(
    "translations",
    "/audio/translations",
    "media",
    Uses.INPUT_AND_OUTPUT,
    by_piece=True,
    answer_tokens=4096,
    form="audio",
)
# Anthropic's endpoints.
MESSAGES = Endpoint("messages", "/messages", "messages", Uses.INPUT_AND_OUTPUT, maxima=("max_tokens",))
COUNT_TOKENS = Endpoint("count_tokens", "/messages/count_tokens", "messages", Uses.NOTHING)

METERED = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RERANK,
    SCORE,
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


# Only ids of this form are recorded, and only they are accepted in a path. OpenAI's ids match, and so do the longer
# ones that gateways make of them.
RESPONSE_ID = re.compile(r"[A-Za-z0-9_=-]{1,512}")


@dataclass(frozen=True, slots=True)
class StoredResponsePath:
    """A path to a response that the upstream stores. Only the user who created the response may call it. It is free.

    `suffix` comes after the id of the response; `query` are the query parameters that are forwarded.
    """

    method: Literal["GET", "POST", "DELETE"]
    suffix: str = ""
    query: tuple[str, ...] = ()

    def path(self, response_id: str) -> str:
        """The path for this response, relative to the base URL."""
        return f"/responses/{response_id}{self.suffix}"


# The SDKs write a list as `include[]=a&include[]=b`.
STORED_RESPONSE_PATHS = (
    StoredResponsePath("GET", query=("include", "include[]", "include_obfuscation", "starting_after", "stream")),
    StoredResponsePath("DELETE"),
    StoredResponsePath("POST", "/cancel"),
    StoredResponsePath("GET", "/input_items", query=("after", "include", "include[]", "limit", "order")),
)


@dataclass(frozen=True, slots=True)
class Closed:
    """Paths that are known and not served, and the reason. `method` may be `*`."""

    method: str
    pattern: str
    reason: str

    def covers(self, method: str, path: str) -> bool:
        """Whether this row applies to a request; `path` is relative to the base URL."""
        return self.method in ("*", method) and _matches(self.pattern, path)


_KEYS = (
    "it hands the client a session or a key with which it talks to the upstream directly, past every quota. "
    "Use /responses or /chat/completions"
)
_ADMIN = "it administers the upstream account, which only the operator of this proxy may do"
_LATER = "its cost arises after the answer, where no quota can count it. Send the calls one by one"
_SHARED = (
    "it reads or writes what is stored in the upstream account, which all users of this proxy share. "
    "Send the content within each call"
)
_UNCOUNTED = "this proxy can't count its cost yet"

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


# The words in the paths that are served, or refused with a reason.
_WORDS = frozenset(
    word
    for path in (
        *PREFIXES,
        *(path for endpoint in METERED for path in (endpoint.path, *endpoint.aliases)),
        *(stored.path("{}") for stored in STORED_RESPONSE_PATHS),
        *(row.pattern for row in CLOSED),
        "/openai/deployments",
        "/models",
        "/quota",
    )
    for word in path.split("/")
) - {"{}", "**"}


# What is served, relative to the base URL, for `served_instead`.
_SERVED = (
    *(("POST", endpoint.path) for endpoint in METERED),
    *((stored.method, stored.path("{}")) for stored in STORED_RESPONSE_PATHS),
    *(("GET", path) for path in ("/models", "/quota", "/quota/usage", "/quota/events")),
)
# None of them has more segments.
_SEGMENTS_MAX = 3
# A path to something that is stored has no more words, with the empty one before its first slash. A client may send
# thousands of slashes.
_KNOWN_WORDS_MAX = 6
# How much of an unknown path an answer repeats.
_SHOWN_CHARACTERS = 80
_BASE_OF_DEPLOYMENT = re.compile(r"/openai/deployments/[^/]+")


def served_instead(method: str, path: str) -> str | None:
    """What a client probably means by a request for an unknown path, and what to change; None if nothing is like it.

    POST /v1//chat/completions     "POST /v1/chat/completions: remove the slash at the end of the client's base_url"
    POST /v1/Embeddings            "POST /v1/embeddings, in lower case"
    GET /v1/embeddings             "POST /v1/embeddings"
    """
    segments = [segment for segment in path.split("/") if segment]
    for start in range(max(0, len(segments) - _SEGMENTS_MAX), len(segments)):
        base, tail = ("".join(f"/{segment}" for segment in part) for part in (segments[:start], segments[start:]))
        served = [row for row in _SERVED if _matches(row[1], tail.lower())]
        if served:
            right_method, pattern = next((row for row in served if row[0] == method), served[0])
            right_base, change = _correction(path, base, is_lower_case=_matches(pattern, tail))
            is_served = not change and right_method == method
            shown = f"{right_method} {right_base}{pattern.replace('{}', '{id}')}{change}"
            return None if is_served else shown
    return None


def _correction(path: str, base: str, *, is_lower_case: bool) -> tuple[str, str]:
    """The base of the path to use instead of this one, which ends in a served one, and what to change."""
    lowered = base.lower()
    is_base = lowered in PREFIXES or _BASE_OF_DEPLOYMENT.fullmatch(base) is not None
    right = (lowered if lowered in PREFIXES else base) if is_base else "/v1"
    if not is_base and lowered.endswith("/v1"):
        return right, f": remove {base[:-3][:_SHOWN_CHARACTERS]} from the client's base_url"
    if not is_base:
        return right, f": write /v1 instead of {base[:_SHOWN_CHARACTERS]} in the client's base_url"
    if "//" in path:
        return right, ": remove the slash at the end of the client's base_url"
    if path.endswith("/"):
        return right, ", without the slash at the end"
    return right, "" if is_lower_case and base == right else ", in lower case"


def known_beginning(path: str) -> str:
    """An unknown path as far as its words are known, for the log: `/v1/files/…` of `/v1/files/file-123`.

    The rest may be an id, or by mistake a key.
    """
    words = path.split("/")
    known = list(takewhile(_WORDS.__contains__, words[:_KNOWN_WORDS_MAX]))
    return "/".join(known if len(known) == len(words) else [*known, "…"])


def closed(method: str, path: str) -> Closed | None:
    """The row that says why this path is refused; None if it is unknown. `path` may have any of the prefixes."""
    return next((row for row in CLOSED if row.covers(method, _relative(path))), None)


def is_messages_path(path: str) -> bool:
    """Whether a path belongs to Anthropic's API, metered or not. `path` may have any of the prefixes."""
    return _matches("/messages/**", _relative(path))


def _relative(path: str) -> str:
    return _PREFIX.sub("", path, count=1)


def _matches(pattern: str, path: str) -> bool:
    expression = re.escape(pattern).replace(re.escape("/**"), "(?:/.*)?").replace(re.escape("{}"), "[^/]+")
    return re.fullmatch(expression, path, re.DOTALL) is not None
