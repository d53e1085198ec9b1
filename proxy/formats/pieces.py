"""Calls that are billed by the piece: by the image, the second or the character.

On some endpoints (`Endpoint.by_piece`) a part of the models is billed in tokens, which their answers state, and the
others by the piece. The names tell them apart:

    gpt-image-1 on /images/generations                             states its tokens
    dall-e-3, tts-1, whisper-1; any model on /images/variations    state none
    speech as bytes; a transcript as plain text or subtitles       state none, whatever the model
    any other name                                                 may state them: they count if they come

A quota of tokens cannot count a call that states none. So such a call needs a quota that counts its request
(`certain_uses_of`), or a price in tokens: `tokens_per_request` and `tokens_per_image` of the model.

The name is the one at the upstream, because the name that clients use may be an alias.
Sources: OpenAI's published API description; docs/wire.md, section 1.6. Pure.
"""

from proxy.formats.endpoints import (
    IMAGE_EDITS,
    IMAGE_ENDPOINTS,
    IMAGE_VARIATIONS,
    IMAGES,
    SPEECH,
    TRANSCRIPTIONS,
    Endpoint,
    EndpointName,
)
from proxy.formats.request import Request
from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.catalog import Model
from proxy.policy.quota import Globs

# The models whose answers state tokens. `-20*` are dated releases. gpt-4o-transcribe-diarize is not among them: it
# may state seconds instead.
_IMAGE_MODELS = Globs(("gpt-image-*", "chatgpt-image-*"))
_STATING: dict[EndpointName, Globs] = {
    IMAGES.name: _IMAGE_MODELS,
    IMAGE_EDITS.name: _IMAGE_MODELS,
    SPEECH.name: Globs(("gpt-*-tts", "gpt-*-tts-20*")),
    TRANSCRIPTIONS.name: Globs(("gpt-4o*-transcribe", "gpt-4o*-transcribe-20*")),
}
# The models whose answers never state tokens, with the endpoint that they are for.
_NEVER_STATING = (
    (Globs(("dall-e*", "dalle*")), IMAGES),
    (Globs(("tts-*",)), SPEECH),
    (Globs(("whisper*",)), TRANSCRIPTIONS),
)


def endpoint_by_piece(upstream_model: str) -> Endpoint | None:
    """The endpoint of a model whose answers never state tokens, by its name at the upstream; None for others."""
    name = _bare(upstream_model)
    return next((endpoint for globs, endpoint in _NEVER_STATING if globs.match(name)), None)


def states_tokens(request: Request, target: Model) -> bool | None:
    """Whether the answer of this target states its tokens; None if neither the name nor the request says so.

    It does on all endpoints that are not billed by the piece; for those the proxy counts the text otherwise.
    """
    endpoint, format_ = request.endpoint, request.body.document.get("response_format")
    if not endpoint.by_piece:
        return True
    has_no_json = (endpoint is SPEECH and not request.stream) or format_ in ("text", "srt", "vtt")
    if endpoint is IMAGE_VARIATIONS or has_no_json or endpoint_by_piece(target.upstream_model):
        return False
    stating = _STATING.get(endpoint.name)
    is_plain = endpoint is not TRANSCRIPTIONS or format_ in (None, "json")
    return True if stating is not None and is_plain and stating.match(_bare(target.upstream_model)) else None


def price_of(request: Request, target: Model) -> int:
    """What an answer that states no tokens costs, in tokens of output, as the configuration says; 0 for no price."""
    if not request.endpoint.by_piece:
        return 0
    each = target.tokens_per_image or 0 if request.endpoint in IMAGE_ENDPOINTS else 0
    return min((target.tokens_per_request or 0) + each * request.choices, TOKENS_MAX)


def uses_of(request: Request, target: Model) -> Uses:
    """What a call can use at this target.

    If it is not known whether the answer will state tokens, it can use them, also if there is a price: they are
    charged if they come.
    """
    if states_tokens(request, target) is not False:
        return request.endpoint.uses
    return Uses.OUTPUT if price_of(request, target) else Uses.REQUEST


def certain_uses_of(request: Request, model: Model) -> Uses:
    """What a call is certain to be counted by, whichever target answers it. Everything, if that is no question.

    Moderations, embeddings and token counts are not billed by the piece: every quota covers them, also one that
    counts nothing of them.
    """
    if not request.endpoint.by_piece:
        return Uses.INPUT_AND_OUTPUT
    return min((_certain_uses_at(request, target) for target in model.targets), key=lambda uses: len(uses.value))


def _certain_uses_at(request: Request, target: Model) -> Uses:
    if states_tokens(request, target):
        return Uses.INPUT_AND_OUTPUT
    return Uses.OUTPUT if price_of(request, target) else Uses.REQUEST


def _bare(upstream_model: str) -> str:
    """The name without what a gateway puts before it: `openai/gpt-image-1`. Vendors ignore the case."""
    return upstream_model.rpartition("/")[2].casefold()
