"""Responses that an upstream stores. They belong to the user whose call produced them.

All users share one account at the upstream, and the upstream would give a response to anyone who knows its id. So the
id is looked up in the ledger first. The answer is the same if no such response exists, if it is another user's, if
its answer did not pass to its end, and if the upstream has deleted it: a user who tries ids learns nothing.

Nothing here is metered. A response was charged when it was produced. If its stream is read again, it reports the same
usage once more, and that is not charged a second time. No quota refuses a read; `ReadLimit` bounds how many there
are.

A response whose answer did not pass to its end was charged what passed, but the upstream may have stored all of it.
Example: a stream is ended at a quota's limit after 2,000 tokens, and the upstream stores 20,000. Such a response
cannot be read or continued, and it is deleted at the upstream. A response without usage whose answer passed to its
end can be read: it was charged what was counted.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import structlog

from proxy.calls.call import Call, Responder
from proxy.calls.read_limit import ReadLimit
from proxy.calls.reservation import Reservation
from proxy.errors import PreviousNotFound, ProxyError, ResponseNotFound, UpstreamError
from proxy.formats.endpoints import RESPONSE_ID, StoredResponsePath
from proxy.formats.kinds import kind_of
from proxy.formats.mask import PieceMask
from proxy.identity.authentication import Caller
from proxy.ledger.entry import Entry
from proxy.ledger.ledger import Ledger
from proxy.policy.catalog import Catalog, Model, Upstream
from proxy.tasks import Tasks
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.failures import failure_of
from proxy.upstreams.headers import JSON_HEADERS, NO_HEADERS, to_client, to_upstream

# How much of an id is repeated in an error. Ids come from clients and may have any length.
_ID_CHARACTERS_MAX = 80

# The pauses before the attempts to delete a response, in seconds. An upstream whose connection was just closed may
# store the response a moment later, and says until then that there is none.
DELETE_PAUSES_S = (0.0, 2.0, 15.0)
_DELETE_S = 10.0
# How long a stop waits for deletions. The pauses are skipped then.
_CLOSE_S = 5.0
# How many deletions may be waiting, for an upstream that does not answer. Further ones are left out.
_DELETIONS_MAX = 256

log = structlog.get_logger("stored responses")


@dataclass(frozen=True, slots=True)
class StoredResponseQuery:
    """A user's request for a stored response.

    `parameters` is the client's query; only known parameters are forwarded.
    """

    route: StoredResponsePath
    response_id: str
    parameters: Sequence[tuple[str, str]]
    caller: Caller
    catalog: Catalog
    zone: ZoneInfo  # of the instants in errors

    def address(self, upstream: Upstream, *, api_version: str | None) -> str:
        """The path and query at this upstream, without its `base_url`."""
        path = self.route.path(self.response_id)
        address = kind_of(upstream.kind).address(upstream, path, api_version=api_version)
        query = urlencode([(name, value) for name, value in self.parameters if name in self.route.query])
        return address + ("&" if "?" in address else "?") + query if query else address


class StoredResponses:
    """Finds the owner of a response in the ledger, and the upstream that stores it. `now` gives ms since 1970.

    `delete_pauses_s` has a pause for each attempt to delete a response, in seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        upstreams: Upstreams,
        *,
        now: Callable[[], int],
        delete_pauses_s: Sequence[float] = DELETE_PAUSES_S,
    ) -> None:
        self.ledger = ledger
        self._upstreams = upstreams
        self._reads = ReadLimit(now)
        self._delete_pauses_s = delete_pauses_s
        self._deletions = Tasks()
        self._is_closing = asyncio.Event()

    async def with_previous(self, call: Call) -> Call:
        """The call with the previous response that it continues, and only the targets at the upstream that stores it.

        Raises PreviousNotFound unless the previous response is the user's own, and LedgerUnavailable.
        """
        response_id = call.request.previous_response_id
        if response_id is None:
            return call
        entry = await self._own_entry(response_id, call.caller)
        targets = [target for target in call.model.targets if entry and target.upstream.name == entry.labels.upstream]
        if not targets:
            raise _previous_not_found(response_id, call.model)
        first, *others = targets
        return replace(call, previous=entry, model=replace(first, others=tuple(others)))

    async def forward(self, query: StoredResponseQuery, client: Responder) -> None:
        """Send the request to the upstream that stores the response, and its answer to the client.

        The answer is passed on in pieces. Raises TooManyReads, ResponseNotFound, LedgerUnavailable, UpstreamError. It
        may be cancelled at any time, because nothing is reserved.
        """
        with self._reads.read(query.caller.user, zone=query.zone):
            entry = await self._own_entry(query.response_id, query.caller)
            upstream = query.catalog.upstreams.get(entry.labels.upstream) if entry else None
            if upstream is None:
                raise _not_found(query.response_id)
            headers = to_upstream(client.headers, kind=upstream.kind)
            address = query.address(upstream, api_version=client.api_version)
            client.line.upstream = upstream.name
            client.line.mark_sent()
            method = query.route.method
            async with await self._upstreams.send(upstream, address, b"", headers, method=method) as answer:
                if answer.status == 404:
                    client.line.mark_answered()
                    raise _not_found(query.response_id)  # deleted there; the same words as for an unknown id
                if answer.status // 100 != 2:
                    await _forward_error(answer, upstream, client)
                else:
                    await _forward_body(answer, client)

    def delete_unless_complete(self, call: Call, reservation: Reservation) -> None:
        """Delete the response of an ended call at its upstream, in the background, if it did not pass to its end.

        This is best effort: `_own_entry` keeps such a response from being read whether or not it was deleted.
        """
        model = reservation.target
        if reservation.outcome == "complete" or model is None:
            return
        response_id = reservation.meter.response_id
        if response_id is None or not call.with_target(model).may_be_stored:
            return
        if len(self._deletions) >= _DELETIONS_MAX:
            log.warning("a response was not deleted", request=call.client.id, reason="too many are waiting")
            return
        path = StoredResponsePath("DELETE").path(response_id)
        address = kind_of(model.upstream.kind).address(model.upstream, path, api_version=call.client.api_version)
        self._deletions.start("delete response", self._delete(model.upstream, address, call_id=call.client.id))

    async def close(self) -> None:
        """Finish the deletions, in a few seconds at most."""
        self._is_closing.set()
        if given_up := await self._deletions.finish(_CLOSE_S):
            log.warning("responses were not deleted", responses=given_up, reason="the proxy was stopped")

    async def _own_entry(self, response_id: str, caller: Caller) -> Entry | None:
        """The ledger entry of the call that produced the response.

        None unless that call was this user's, of a model that the key may call, and its answer passed to its end. If
        several calls had this id, the newest decides, because its response is the one that the upstream stores.
        """
        if not RESPONSE_ID.fullmatch(response_id):
            return None
        entry = await self.ledger.response_entry(response_id)
        if entry is None or entry.labels.user != caller.user or entry.outcome != "complete":
            return None
        models = caller.key.models
        return entry if models is None or models.match(entry.labels.model) else None

    async def _delete(self, upstream: Upstream, address: str, *, call_id: str) -> None:
        """Delete the response at this address, in several attempts if need be. A failure is only logged."""
        reason = None
        for pause_s in self._delete_pauses_s:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_closing.wait(), pause_s)
            status, reason = await self._delete_once(upstream, address)
            if status is not None and status not in (404, 408, 409, 429) and status < 500:
                break
        if reason is not None:
            log.warning("a response was not deleted", upstream=upstream.name, request=call_id, reason=reason)

    async def _delete_once(self, upstream: Upstream, address: str) -> tuple[int | None, str | None]:
        """Send one DELETE.

        Returns the status of the answer (None: there was none), and why the response may still exist (None: it is
        gone).
        """
        headers = to_upstream(NO_HEADERS, kind=upstream.kind)
        try:
            async with (
                asyncio.timeout(_DELETE_S),
                await self._upstreams.send(upstream, address, b"", headers, method="DELETE") as answer,
            ):
                await answer.error_body()  # to the end, so that the connection can be used again
                is_gone = answer.status // 100 == 2 or answer.status == 404
                return answer.status, None if is_gone else f"status {answer.status}"
        except UpstreamError as error:
            return None, error.message
        except TimeoutError:
            return None, "the upstream did not answer in time"


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{response_id[:_ID_CHARACTERS_MAX]}' not found.")


def _previous_not_found(response_id: str, model: Model) -> PreviousNotFound:
    text = f"Previous response with id '{response_id[:_ID_CHARACTERS_MAX]}' not found."
    if not model.allows.store:  # this depends on the model alone, so it does not tell whose the response is
        text += " This model's responses are not stored: send the earlier messages again in `input`."
    return PreviousNotFound(text, param="previous_response_id")


async def _forward_body(answer: Answer, client: Responder) -> None:
    """Pass on a stream or a whole response in pieces. A stored response may be megabytes of images."""
    headers = to_client(answer.headers, is_stream=await answer.carries_events(), mask=answer.mask)
    await client.start(answer.status, headers)
    pieces = PieceMask(answer.mask)
    try:
        async for chunk in answer.chunks():
            await client.write(pieces.feed(chunk))
            if client.is_disconnected:
                return
    except UpstreamError as error:
        # The connection is cut instead of sending an error event: the event could end up inside the one that broke
        # off.
        client.line.error = error
        client.abort()
    else:
        client.line.mark_answered()
        await client.write(pieces.end())
        await client.end()


async def _forward_error(answer: Answer, upstream: Upstream, client: Responder) -> None:
    failure = failure_of(answer.status, await answer.error_body(), answer.retry_after, upstream, answer.mask)
    client.line.mark_answered()
    if isinstance(failure, ProxyError):
        raise failure
    client.send(failure.status, JSON_HEADERS, failure.body)
