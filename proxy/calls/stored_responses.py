"""Responses that an upstream stores. They belong to the user whose call produced them.

All users share one account at the upstream, and the upstream would give a response to anyone who knows its id. So the
id is looked up in the ledger first. The answer is the same if no such response exists, if it is another user's, and
if the upstream has deleted it: a user who tries ids learns nothing.

Nothing here is metered. A response was charged when it was produced. If its stream is read again, it reports the same
usage once more, and that is not charged a second time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlencode

from proxy.calls.call import Call, Responder
from proxy.errors import PreviousNotFound, ProxyError, ResponseNotFound, UpstreamError
from proxy.formats.endpoints import RESPONSE_ID, StoredResponsePath
from proxy.formats.reported_error import PieceMask
from proxy.ledger.entry import Entry
from proxy.ledger.ledger import Ledger
from proxy.policy.catalog import Catalog, Model, Upstream
from proxy.upstreams.addresses import address_at
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.failures import failure_of, masked
from proxy.upstreams.headers import JSON_HEADERS, to_client, to_upstream

# How much of an id is repeated in an error. Ids come from clients and may have any length.
_ID_CHARACTERS_MAX = 80


@dataclass(frozen=True, slots=True)
class StoredResponseQuery:
    """A user's request for a stored response.

    `parameters` is the client's query; only known parameters are forwarded.
    """

    route: StoredResponsePath
    response_id: str
    parameters: Sequence[tuple[str, str]]
    user: str
    catalog: Catalog

    def address(self, upstream: Upstream, *, api_version: str | None) -> str:
        """The path and query at this upstream, without its `base_url`."""
        address = address_at(upstream, self.route.path(self.response_id), api_version=api_version)
        query = urlencode([(name, value) for name, value in self.parameters if name in self.route.query])
        return address + ("&" if "?" in address else "?") + query if query else address


class StoredResponses:
    """Finds the owner of a response in the ledger, and the upstream that stores it."""

    def __init__(self, ledger: Ledger, upstreams: Upstreams) -> None:
        self.ledger = ledger
        self._upstreams = upstreams

    async def with_previous(self, call: Call) -> Call:
        """The call with the previous response that it continues, and only the targets at the upstream that stores it.

        Raises PreviousNotFound unless the previous response is the user's own, and LedgerUnavailable.
        """
        response_id = call.request.previous_response_id
        if response_id is None:
            return call
        entry = await self._own_entry(response_id, call.caller.user)
        targets = [target for target in call.model.targets if entry and target.upstream.name == entry.labels.upstream]
        if not targets:
            raise _previous_not_found(response_id, call.model)
        first, *others = targets
        return replace(call, previous=entry, model=replace(first, others=tuple(others)))

    async def forward(self, query: StoredResponseQuery, client: Responder) -> None:
        """Send the request to the upstream that stores the response, and its answer to the client.

        Raises ResponseNotFound, LedgerUnavailable, UpstreamError. It may be cancelled at any time, because nothing is
        reserved.
        """
        entry = await self._own_entry(query.response_id, query.user)
        upstream = query.catalog.upstreams.get(entry.labels.upstream) if entry else None
        if upstream is None:
            raise _not_found(query.response_id)
        headers = to_upstream(client.headers, kind=upstream.kind, api_key=upstream.api_key)
        address = query.address(upstream, api_version=client.api_version)
        async with self._upstreams.send(upstream, address, b"", headers, method=query.route.method) as answer:
            if answer.status == 404:
                raise _not_found(query.response_id)  # deleted there; the same words as for an unknown id
            if answer.status // 100 != 2:
                await _forward_error(answer, upstream, client)
            elif await answer.carries_events():
                await _forward_stream(answer, client, PieceMask(partial(masked, upstream=upstream)))
            else:
                mask = PieceMask(partial(masked, upstream=upstream))
                body = mask.feed(await answer.read()) + mask.end()
                client.send(answer.status, to_client(answer.headers, is_stream=False), body)

    async def _own_entry(self, response_id: str, user: str) -> Entry | None:
        """The ledger entry of the call that produced the response; None unless that call was this user's."""
        if not RESPONSE_ID.fullmatch(response_id):
            return None
        entry = await self.ledger.response_entry(response_id)
        return entry if entry is not None and entry.labels.user == user else None


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{response_id[:_ID_CHARACTERS_MAX]}' not found.")


def _previous_not_found(response_id: str, model: Model) -> PreviousNotFound:
    text = f"Previous response with id '{response_id[:_ID_CHARACTERS_MAX]}' not found."
    if not model.allows.store:  # this depends on the model alone, so it does not tell whose the response is
        text += " This model's responses are not stored: send the earlier messages again in `input`."
    return PreviousNotFound(text, param="previous_response_id")


async def _forward_stream(answer: Answer, client: Responder, mask: PieceMask) -> None:
    await client.start(answer.status, to_client(answer.headers, is_stream=True))
    try:
        async for chunk in answer.chunks():
            await client.write(mask.feed(chunk))
            if client.is_disconnected:
                return
    except UpstreamError:
        # The connection is cut instead of sending an error event: the event could end up inside the one that broke
        # off.
        client.abort()
    else:
        await client.write(mask.end())
        await client.end()


async def _forward_error(answer: Answer, upstream: Upstream, client: Responder) -> None:
    failure = failure_of(answer.status, await answer.error_body(), answer.retry_after, upstream)
    if isinstance(failure, ProxyError):
        raise failure
    client.send(failure.status, JSON_HEADERS, failure.body)
