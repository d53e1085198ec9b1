"""Which calls are billed by the piece, what quotas count of them, and what they cost.

Sources: OpenAI's API description; docs/wire.md §1.6 (which answers have usage).
"""

from dataclasses import replace
from typing import Any

import pytest

from proxy.formats.content import read_prompt, with_images
from proxy.formats.endpoints import (
    CHAT,
    EMBEDDINGS,
    IMAGE_EDITS,
    IMAGE_VARIATIONS,
    IMAGES,
    METERED,
    SPEECH,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    Endpoint,
)
from proxy.formats.estimate import counted, estimate_demand, largest_demand
from proxy.formats.pieces import certain_uses_of, price_of, states_tokens, uses_of
from proxy.formats.request import Request
from proxy.policy.amounts import TOKENS_MAX, Uses
from proxy.policy.catalog import Model, Upstream
from proxy.policy.quota import Demand
from tests.formats.test_request import ids, parse

UP = Upstream("up", "http://upstream.example/v1", None)


def model(name: str, **known: Any) -> Model:
    """A model that its upstream calls `name`, and clients "alias"."""
    return Model("alias", UP, name, **known)


def sent(endpoint: Endpoint, **fields: Any) -> Request:
    """A request; a form is given as what its fields are parsed to."""
    return parse(endpoint, **{"input": "x", **fields})


def demand(request: Request, target: Model) -> Demand:
    """What a call may use at this target, with a body of 100 bytes."""
    prompt = with_images(read_prompt(request.body, is_chat=False), model=target.upstream_model)
    return estimate_demand(request, target, prompt, body_bytes=100)


@pytest.mark.parametrize(
    ("endpoint", "fields", "name", "states"),
    [
        (IMAGES, {}, "gpt-image-1", True),
        (IMAGES, {}, "gpt-image-1.5-2026-01-01", True),
        (IMAGES, {"stream": True}, "gpt-image-2", True),
        (IMAGES, {}, "openai/GPT-Image-1-mini", True),
        (IMAGE_EDITS, {}, "chatgpt-image-latest", True),
        (IMAGES, {}, "dall-e-3", False),
        (IMAGES, {}, "azure/Dalle3", False),
        (IMAGES, {}, "flux", None),
        (IMAGES, {}, "my-gpt-image-1", None),
        (IMAGES, {}, "gpt-4o-transcribe", None),
        (IMAGE_VARIATIONS, {}, "gpt-image-1", False),
        (SPEECH, {"stream_format": "sse"}, "gpt-4o-mini-tts", True),
        (SPEECH, {"stream_format": "sse"}, "gpt-4o-mini-tts-2025-12-15", True),
        (SPEECH, {"stream_format": "sse"}, "tts-1-hd", False),
        (SPEECH, {"stream_format": "sse"}, "kokoro", None),
        (SPEECH, {"stream_format": "audio"}, "gpt-4o-mini-tts", False),
        (SPEECH, {"stream": True}, "gpt-4o-mini-tts", False),
        (SPEECH, {}, "kokoro", False),
        (TRANSCRIPTIONS, {}, "gpt-4o-transcribe", True),
        (TRANSCRIPTIONS, {"response_format": "json", "stream": True}, "gpt-4o-mini-transcribe-2025-12-15", True),
        (TRANSCRIPTIONS, {"response_format": "text"}, "gpt-4o-transcribe", False),
        (TRANSCRIPTIONS, {"response_format": "srt"}, "gpt-4o-transcribe", False),
        (TRANSCRIPTIONS, {"response_format": "vtt"}, "parakeet", False),
        (TRANSCRIPTIONS, {"response_format": "verbose_json"}, "gpt-4o-transcribe", None),
        (TRANSCRIPTIONS, {"response_format": ["json"]}, "gpt-4o-transcribe", None),
        (TRANSCRIPTIONS, {}, "gpt-4o-transcribe-diarize", None),
        (TRANSCRIPTIONS, {}, "whisper-1", False),
        (TRANSCRIPTIONS, {}, "parakeet", None),
        (TRANSLATIONS, {}, "gpt-4o-transcribe", None),
        (TRANSLATIONS, {}, "whisper-large-v3", False),
        (CHAT, {}, "dall-e-3", True),
        (EMBEDDINGS, {}, "whisper-1", True),
    ],
)
def test_the_endpoint_the_format_and_the_name_say_whether_an_answer_states_tokens(endpoint, fields, name, states):
    """An unknown name says nothing. The name that clients use never counts."""
    assert states_tokens(sent(endpoint, **fields), model(name)) is states


@pytest.mark.parametrize(
    ("name", "known", "uses", "counted_by"),
    [
        ("gpt-image-1", {}, Uses.INPUT_AND_OUTPUT, Uses.INPUT_AND_OUTPUT),
        ("gpt-image-1", {"tokens_per_image": 9}, Uses.INPUT_AND_OUTPUT, Uses.INPUT_AND_OUTPUT),
        ("dall-e-3", {}, Uses.REQUEST, Uses.REQUEST),
        ("dall-e-3", {"tokens_per_image": 9}, Uses.OUTPUT, Uses.OUTPUT),
        ("flux", {}, Uses.INPUT_AND_OUTPUT, Uses.REQUEST),
        ("flux", {"tokens_per_request": 9}, Uses.INPUT_AND_OUTPUT, Uses.OUTPUT),
    ],
)
def test_what_an_image_can_use_and_is_certain_to_be_counted_by(name, known, uses, counted_by):
    """An unknown model may state tokens, so they are reserved, but only its request is certain to be counted."""
    assert (uses_of(sent(IMAGES), model(name, **known)), certain_uses_of(sent(IMAGES), model(name, **known))) == (
        uses,
        counted_by,
    )


@pytest.mark.parametrize(("price", "reserved"), [(200, 8192), (9000, 9000)])
def test_an_unknown_model_with_a_price_reserves_the_tokens_that_it_may_state(price, reserved):
    """They are charged if they come, so less would take a quota over its limit. A larger price is reserved too."""
    target = model("flux", tokens_per_image=price)
    found = demand(sent(IMAGES), target)
    assert (found.output_maximum, found.initial_hold, found.input > 0) == (reserved, reserved, True)
    assert demand(sent(IMAGES), replace(target, max_output_tokens=1000)).output_maximum == max(1000, price)


def test_one_target_without_tokens_makes_the_call_one_that_is_billed_by_the_piece():
    """Any of the targets may answer it. Reserved is the largest demand of all."""
    states, is_by_piece = model("gpt-image-1"), model("dall-e-3")
    for first, second in ((states, is_by_piece), (is_by_piece, states)):
        assert certain_uses_of(sent(IMAGES), replace(first, others=(second,))) is Uses.REQUEST
        both = largest_demand([demand(sent(IMAGES), each) for each in (first, second)])
        assert both == demand(sent(IMAGES), states)
    assert certain_uses_of(sent(IMAGES), replace(states, others=(states,))) is Uses.INPUT_AND_OUTPUT


@pytest.mark.parametrize("endpoint", [each for each in METERED if not each.by_piece], ids=ids)
def test_on_other_endpoints_every_quota_covers_every_call(endpoint: Endpoint):
    """Also moderations, embeddings and token counts, of which some quotas count nothing. A price does not apply."""
    target, request = model("dall-e-3", tokens_per_request=9, tokens_per_image=9), sent(endpoint)
    assert certain_uses_of(request, target) is Uses.INPUT_AND_OUTPUT
    assert (uses_of(request, target), price_of(request, target)) == (endpoint.uses, 0)


@pytest.mark.parametrize(
    ("endpoint", "fields", "known", "price"),
    [
        (IMAGES, {"n": 3}, {"tokens_per_image": 10}, 30),
        (IMAGES, {"n": 3}, {"tokens_per_image": 10, "tokens_per_request": 5}, 35),
        (IMAGES, {"n": None}, {"tokens_per_image": 10}, 10),
        (IMAGE_EDITS, {"n": 2}, {"tokens_per_image": 10}, 20),
        (IMAGE_VARIATIONS, {"n": 2}, {"tokens_per_image": 10}, 20),
        (SPEECH, {"n": 3}, {"tokens_per_request": 5}, 5),
        (SPEECH, {}, {"tokens_per_image": 10}, 0),
        (TRANSCRIPTIONS, {}, {"tokens_per_request": 5, "tokens_per_image": 10}, 5),
        (IMAGES, {"n": 100}, {"tokens_per_image": TOKENS_MAX}, TOKENS_MAX),
    ],
)
def test_a_price_is_that_of_the_request_and_of_each_image(endpoint, fields, known, price):
    """It is reserved at once, as output and without the input."""
    request, target = sent(endpoint, **fields), model("dall-e-3", **known)
    assert price_of(request, target) == price
    uses = Uses.OUTPUT if price else Uses.REQUEST
    assert demand(request, target) == Demand(0, price, price, initial_hold=price, uses=uses)


def test_a_model_that_states_tokens_reserves_at_least_its_price():
    """The price is charged if its answer states none after all."""
    assert demand(sent(IMAGES), model("gpt-image-1", tokens_per_image=10)).output_maximum == 8192
    assert demand(sent(IMAGES), model("gpt-image-1", tokens_per_image=9000)).output_maximum == 9000


def test_a_price_is_not_counted_again():
    """It is no estimate: counting the prompt changes nothing, whatever the model could read."""
    target = model("dall-e-3", tokens_per_image=10, context=9000)
    request = sent(IMAGES, prompt=[{"type": "input_file"}])
    prompt = read_prompt(request.body, is_chat=True)
    found = demand(request, target)
    assert counted(found, target, prompt, text_tokens=5, is_guess=True) == found
