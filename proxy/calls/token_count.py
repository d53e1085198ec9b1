"""How many tokens one call has, where the upstream doesn't say it: counted off the event loop, when it matters.

Nobody has to, most of the time. Its input is counted where little is left of a quota, so that a bound in bytes would
refuse or shorten what fits; and where an answer broke off, or came without its usage. Counted at most once.
"""

from collections.abc import Callable, Sequence

from proxy.calls.tokenizer import BYTES_PER_TOKEN, Tokenizers
from proxy.formats.content import read_prompt, with_files, with_previous
from proxy.formats.estimate import counted, estimate_demand
from proxy.formats.request import Request
from proxy.ledger.entry import Entry
from proxy.policy.amounts import TOKENS_MAX, Exactly
from proxy.policy.policy import Model
from proxy.policy.quota import Demand

# The texts of an input are kept until its call ends, in case they have to be counted. Those that have more characters
# than this are counted before the call is sent instead.
_KEPT_CHARACTERS_MAX = 2**20


class TokenCount:
    """The tokens of one call. `body_bytes` is the length of the body that is sent.

    `previous` is the call that made what this one goes on from.
    """

    def __init__(
        self,
        tokenizers: Tokenizers,
        request: Request,
        model: Model,
        *,
        body_bytes: int,
        previous: Entry | None = None,
    ) -> None:
        is_chat = request.endpoint.name in ("chat", "messages") or request.endpoint.is_of_responses
        prompt = read_prompt(request.document, model=model.upstream_model, is_chat=is_chat)
        if request.form is not None:
            sizes = [file.size for file in request.form.files]
            prompt = with_files(prompt, sizes, are_audio=request.endpoint.form == "audio", context=model.context)
        if previous is not None:
            prompt = with_previous(prompt, _total_of(previous, model))
        self.demand = estimate_demand(request, model, prompt, body_bytes=body_bytes)
        self._tokenizers = tokenizers
        self._model = model
        self._encoding = tokenizers.encoding_of(model)
        self._prompt = prompt
        self._texts: Sequence[str] | None = prompt.texts  # None once they are counted
        self._text_tokens: int | None = None
        self._text_bytes = body_bytes - prompt.opaque_bytes

    @property
    def piece(self) -> Callable[[str], int]:
        """What counts the pieces of an answer as they pass."""
        return self._tokenizers.count_by(self._encoding.name)

    async def before_it_is_sent(self) -> None:
        """Count a large input now, and let go of its texts."""
        if sum(map(len, self._texts or ())) > _KEPT_CHARACTERS_MAX:
            await self._count()

    async def exact_demand(self) -> Demand:
        """The demand with the input counted, or, where that fails, bounded by its bytes for good."""
        text_tokens, is_guess = await self._count(), self._encoding.is_guess
        return counted(self.demand, self._model, self._prompt, text_tokens=text_tokens, is_guess=is_guess)

    async def most_of_input(self) -> int:
        """The most that the input can be, what is not shown of it included."""
        demand = await self.exact_demand()
        return demand.input + demand.hidden_input

    async def of_input(self) -> int:
        """About how many tokens the input has; never the bound, which is meant to be too large."""
        text_tokens = await self._count()
        if text_tokens is None:
            return -(-self._text_bytes // BYTES_PER_TOKEN) + self._prompt.media_tokens
        return text_tokens + self._prompt.overhead

    async def of_output(self, texts: Sequence[str]) -> int:
        """About how many tokens these texts of an answer have."""
        tokens = await self._tokenizers.count_all(texts, self._encoding.name) if texts else 0
        if tokens is not None:
            return tokens
        return -(-sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // BYTES_PER_TOKEN)

    async def _count(self) -> int | None:
        if self._texts is not None:
            texts, self._texts = self._texts, None
            self._text_tokens = await self._tokenizers.count_all(texts, self._encoding.name)
        return self._text_tokens


def _total_of(entry: Entry, model: Model) -> int | None:
    """The tokens of a response in all, as its upstream said them; no more than what the model can read."""
    if not isinstance(entry.usage, Exactly):
        return None
    tokens = entry.usage.tokens
    return min(tokens.input + tokens.output, model.context or TOKENS_MAX)
