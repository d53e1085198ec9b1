"""Scores of documents: what /rerank and /score answer. They read each document together with the query.

    {"results": [{"index": 1, "relevance_score": 0.98}, …], "usage": {"total_tokens": 56}}      Jina, vLLM, llama.cpp
    {"results": […], "meta": {"billed_units": {"search_units": 1}}}                             Cohere
    [{"index": 1, "score": 0.98}, …]                                                            TEI

An answer that states no tokens costs the input as the proxy counts it. Cohere's search units are no tokens. Pure.
"""

from proxy.formats.media import MediaEnding
from proxy.formats.meter import JSON, Ending, Meter
from proxy.formats.request import Request
from proxy.formats.sse import Event
from proxy.formats.texts import read_list
from proxy.formats.usage import Stated, read_usage, usages_beside


class RerankMeter(Meter):
    """Measures the scores of documents. There is no output, and there are no streams."""

    def _new_ending(self, request: Request) -> Ending:
        return MediaEnding()

    def _see_object(self, chunk: JSON, event: Event) -> bytes:
        """Record an event, which no server is known to send."""
        self.has_error = self.has_error or chunk.get("error") is not None
        self._see_answer(chunk)
        return event.raw

    def _see_answer(self, answer: JSON) -> None:
        meta = answer.get("meta")
        stated_by_cohere = [meta.get(name) for name in ("tokens", "billed_units")] if isinstance(meta, dict) else []
        for usage in (answer.get("usage"), *usages_beside(answer), *stated_by_cohere):
            self._see_usage(usage)

    def _see_other_body(self, body: bytes) -> None:
        """Record a list of scores; anything else is an error."""
        scores = read_list(body)
        self.has_error = scores is None
        # As an object, in which errors are looked for as in every answer.
        self.chunk = None if scores is None else {"results": scores}

    def _read(self, usage: object) -> Stated | None:
        """What a usage states. A total is all input, and may be above our bound: some servers add a template."""
        return read_usage(usage)
