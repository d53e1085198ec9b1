"""The surfaces: for each format of answers its meter, the event that states an error inside a stream, and the body of
an error.

A new format of streams is one module with a meter, an ending and an error event, one row here, and its name in
`endpoints`. Pure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proxy.errors import ProxyError
from proxy.formats import chat, messages, responses
from proxy.formats.chat import chat_meter
from proxy.formats.endpoints import Endpoint, SurfaceName
from proxy.formats.media import MediaMeter
from proxy.formats.messages import MessagesMeter
from proxy.formats.meter import Meter
from proxy.formats.request import Request
from proxy.formats.rerank import RerankMeter
from proxy.formats.responses import ResponsesMeter


@dataclass(frozen=True, slots=True)
class Surface:
    """One format of answers. The meter makes the ending of its streams itself."""

    meter: Callable[..., Meter]
    error_event: Callable[[ProxyError], bytes]
    error_body: Callable[[ProxyError], Mapping[str, object]] = ProxyError.body


SURFACES: dict[SurfaceName, Surface] = {
    "chat": Surface(chat_meter, chat.error_event),
    "responses": Surface(ResponsesMeter, responses.error_event),
    "messages": Surface(MessagesMeter, messages.error_event, messages.error_body),
    "media": Surface(MediaMeter, chat.error_event),
    "rerank": Surface(RerankMeter, chat.error_event),
}


def meter_of(
    request: Request,
    *,
    count: Callable[[str], int],
    kind: str = "openai",
    output_bound: int | None = None,
    input_bound: int | None = None,
    extra_usage: Sequence[str] = (),
) -> Meter:
    """A new meter for the answer to this request; see `Meter` for the parameters.

    If `output_bound` is None, it is that of a call that states no maximum.
    """
    meter = SURFACES[request.endpoint.surface].meter(request, count=count, kind=kind)
    meter.extra_usage = extra_usage
    meter.input_bound = input_bound
    if output_bound is not None:
        meter.output_bound = output_bound
    return meter


def error_event(endpoint: Endpoint, error: ProxyError) -> bytes:
    """An error inside a stream of this endpoint, in the form at which the SDKs raise an exception."""
    return SURFACES[endpoint.surface].error_event(error)
