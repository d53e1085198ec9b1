"""Which names of models a request may have.

A name is forwarded to the upstream, which may read more into it than a name: `check_name_form` refuses what no server
should get as a name, and `check_model_name` refuses names of unlisted models that ask for what `restrictions` refuses
as a field. At OpenRouter `gpt-4o:online` is `gpt-4o` with `plugins`. Pure.
"""

import re

from proxy.errors import InvalidRequest

_CHARACTERS_MAX = 256
# A segment "." or ".." in a model's name. In Azure's path /deployments/{model}/… it would lead to another deployment,
# even if its slashes are percent-encoded.
_DOT_SEGMENT = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\])")
# What a server with OpenAI's API refuses to an unlisted name because it refuses the same as a field. OpenRouter:
# `@preset/x` and `gpt-4o@preset/x` (preset), `gpt-4o:online` (plugins). AiHubMix: `gpt-4o:surfing` (plugins). Routers
# choose other models themselves, and `openrouter/fusion` asks up to eight (models): `openrouter/auto` and the others
# of OpenRouter, `auto` of several gateways. `~openai/gpt-latest` is whichever model is the newest. LiteLLM reads
# `gpt-4o,o3` as several models (models). Fireworks: `model#deployment` (deployment_id). An address (api_base). No
# model has a `|` in its name. Portkey's `@account/model` chooses the account (organization), but Cloudflare's names
# begin with `@cf/` and `@hf/`. Cloudflare's `dynamic/route` is a router. SGLang's `base:adapter` passes: ":" also
# begins a tag (`llama3:70b`) and a variant (`:free`), so it does not tell an adapter from another model.
_NAME_WITH_ANOTHER_MEANING = re.compile(
    r"@preset(?:/|$)|^@(?!(?:cf|hf)/)[^/]+/|^dynamic/|:(?:online|surfing)(?:$|[:@/])|(?:^|/)auto(?:$|[:@])|(?:^|/)~"
    r"|(?:^|/)openrouter/(?:auto|bodybuilder|free|fusion|pareto)|[,#|]|://",
    re.IGNORECASE,
)


def check_name_form(name: object) -> None:
    """Raise InvalidRequest if no call can name a model so, whatever its endpoint. None: it names no model."""
    if name is None:
        message = '"model" is missing: name the model to use.'
        raise InvalidRequest(message, param="model", code="missing_required_parameter")
    if (
        not isinstance(name, str)
        or not 0 < len(name.strip()) == len(name) <= _CHARACTERS_MAX
        or not name.isprintable()
        or _DOT_SEGMENT.search(name) is not None
    ):
        raise InvalidRequest(
            f'"model" must be a name of 1 to {_CHARACTERS_MAX} printable characters, without blanks around it '
            'and without "." or ".." between slashes.',
            param="model",
        )


def check_model_name(name: str) -> None:
    """Raise InvalidRequest if the name of an unlisted model asks for what is refused as a field."""
    found = _NAME_WITH_ANOTHER_MEANING.search(name)
    if found is not None:
        raise InvalidRequest(
            f'"{found[0]}" can\'t be used in the name of a model here: the upstream would read it as an option that '
            "this proxy refuses as a field. The operator of this proxy can list a model with such a name at its "
            "upstream.",
            param="model",
            code="unsupported_parameter",
        )
