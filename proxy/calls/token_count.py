"""The number of tokens of one call, for the cases in which the upstream does not report it.

Most calls are never counted. The input is counted in two cases: if so little of a quota is left that a bound in bytes
would refuse, delay or shorten a call that fits, and if an answer broke off or came without its usage. It is counted
at most once, and not on the event loop.

Example: a prompt of 8,000 bytes is bounded by 8,000 tokens, because a token has at least one byte. With a million
tokens available this bound is good enough. With 6,000 available it would refuse a call that has about 2,000 tokens,
so the prompt is counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from proxy.calls.tokenizer import BYTES_PER_TOKEN, Encoding, Tokenizers
from proxy.formats.content import Prompt, read_pairs, read_prompt, with_files, with_images, with_previous
from proxy.formats.estimate import counted, estimate_demand, with_context
from proxy.formats.pieces import price_of, states_tokens
from proxy.formats.request import Request
from proxy.ledger.entry import Entry
from proxy.policy.amounts import TOKENS_MAX, Exactly
from proxy.policy.catalog import Model
from proxy.policy.quota import Demand

# The texts of an input are kept until the call ends, in case they have to be counted at the end. If they have more
# characters than this, they are counted before the call is sent instead, and not kept while the answer streams.
_KEPT_CHARACTERS_MAX = 2**20


class TokenCount:
    """The tokens of one call. `prompt` is that of its request, `body_bytes` the length of the body that is sent.

    `previous` is the call that produced the response which this one continues.

    `unstated_price` is what an answer costs that states no tokens, in tokens of output; None if the configuration
    names no price. `should_state_tokens` is whether this is an image, speech or transcript of a model that states
    them.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        request: Request,
        model: Model,
        *,
        prompt: Prompt,
        body_bytes: int,
        previous: Entry | None = None,
    ) -> None:
        if prompt.images:
            prompt = with_images(prompt, model=model.upstream_model)
        if request.form is not None:
            sizes = [file.size for file in request.form.files]
            prompt = with_files(prompt, sizes, are_audio=request.endpoint.form == "audio", context=model.context)
        if previous is not None:
            prompt = with_previous(prompt, _total_tokens(previous, model))
        self.demand = estimate_demand(request, model, prompt, body_bytes=body_bytes)
        is_by_piece = request.endpoint.by_piece
        self.unstated_price = (price_of(request, model) or None) if is_by_piece else None
        self.should_state_tokens = is_by_piece and states_tokens(request, model) is True
        self._tokenizers = tokenizers
        self._model = model
        self._prompt = prompt
        self._body_bytes = body_bytes
        self._is_counted = False
        self._text_tokens: int | None = None

    @cached_property
    def encoding(self) -> Encoding:
        """The encoding of the model. Most calls are never counted, and don't ask for it."""
        return self._tokenizers.encoding_of(self._model)

    def count_output(self, text: str) -> int:
        """The tokens of a piece of an answer, counted while it passes."""
        return self._tokenizers.count(text, self.encoding.name)

    async def ready(self) -> None:
        """Wait until the table is read by which the pieces of an answer are counted."""
        await self._tokenizers.ready(self.encoding.name)

    @property
    def has_hidden_input(self) -> bool:
        """Whether the model reads input that the request does not show."""
        return self._prompt.has_hidden_input

    @property
    def lacks_context(self) -> bool:
        """Whether only the model's context bounds the input, and the configuration does not state it."""
        return self._prompt.has_hidden_input and self._model.context is None

    def set_context(self, context: int) -> None:
        """Set the context that the upstream states, in tokens. Its effect is that of a configured one."""
        self._model = replace(self._model, context=context)
        self.demand = with_context(self.demand, self._prompt, context=context)

    async def count_large_input(self) -> None:
        """Count the input now if it is large, and drop its texts."""
        if self._body_bytes > _KEPT_CHARACTERS_MAX and sum(map(len, self._prompt.texts)) > _KEPT_CHARACTERS_MAX:
            await self._count()

    async def exact_demand(self) -> Demand:
        """The demand with the input counted. If that fails, the bound in bytes stays and counts as exact."""
        text_tokens, is_guess = await self._count(), self.encoding.is_guess
        return counted(self.demand, self._model, self._prompt, text_tokens=text_tokens, is_guess=is_guess)

    async def input_upper_bound(self) -> int:
        """The most tokens that the input can have, including input that the request does not show."""
        demand = await self.exact_demand()
        return demand.input + demand.hidden_input

    async def input_tokens(self) -> int:
        """An estimate of the tokens of the input. If they cannot be counted, four bytes are taken for a token.

        The bound is not used for this, because it is deliberately too high: it would charge four times too much.
        """
        text_tokens = await self._count()
        if text_tokens is None:
            text_bytes = self._prompt.text_bytes(self._body_bytes)
            return -(-text_bytes // BYTES_PER_TOKEN) + self._prompt.media_tokens
        return text_tokens + self._prompt.overhead

    async def output_tokens(self, texts: Sequence[str]) -> int:
        """An estimate of the tokens of these texts of an answer."""
        tokens = await self._tokenizers.count_all(texts, self.encoding.name) if texts else 0
        if tokens is not None:
            return tokens
        return -(-sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // BYTES_PER_TOKEN)

    async def _count(self) -> int | None:
        if not self._is_counted:
            self._is_counted = True
            texts, self._prompt = self._prompt.texts, replace(self._prompt, texts=())
            self._text_tokens = await self._tokenizers.count_all(texts, self.encoding.name)
            if self._prompt.repeats and self._text_tokens is not None:
                again = await self._tokenizers.count_all(self._prompt.repeated, self.encoding.name)
                repeated = None if again is None else self._prompt.repeats * again
                self._text_tokens = None if repeated is None else self._text_tokens + repeated
        return self._text_tokens


def prompt_of(request: Request) -> Prompt:
    """What a model reads of a request. It is the same for all targets, so it is read once for each call."""
    if request.endpoint.surface == "rerank":
        return read_pairs(request.body)
    is_chat = request.endpoint.name in ("chat", "messages") or request.endpoint.is_of_responses
    return read_prompt(request.body, is_chat=is_chat)


def _total_tokens(entry: Entry, model: Model) -> int | None:
    """The input and output of a response, as its upstream reported them, but at most the model's context.

    None if the upstream did not report them.
    """
    if not isinstance(entry.usage, Exactly):
        return None
    tokens = entry.usage.tokens
    return min(tokens.input + tokens.output, model.context or TOKENS_MAX)
