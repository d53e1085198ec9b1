"""Responses belong to the user who made them: which may be gone on from, and the way to those that are kept.

All users share one account at the upstream, which would hand a response to whoever knows its id. So an id is looked
up in the books first. One answer for what isn't there, for what is somebody else's and for what its upstream has
forgotten: a prober learns nothing.

Nothing here is metered. What a response used was charged when it was made, also where its stream is played again and
says its usage once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from proxy.calls.call import Call, Responder
from proxy.errors import PreviousNotFound, ProxyError, ResponseNotFound, UpstreamError
from proxy.formats.endpoints import RESPONSE_ID, StoredResponsePath
from proxy.ledger.entry import Entry
from proxy.ledger.ledger import Ledger
from proxy.policy.policy import Model, Policy, Upstream, User
from proxy.upstreams.addresses import address_at
from proxy.upstreams.client import Answer, Upstreams
from proxy.upstreams.failures import failure_of
from proxy.upstreams.headers import JSON_HEADERS, to_client, to_upstream

_SHOWN = 80


@dataclass(frozen=True, slots=True)
class StoredResponseQuery:
    """What a user wants of a response: `query` as it came, of which only what is known passes on."""

    kept: StoredResponsePath
    response_id: str
    query: Sequence[tuple[str, str]]
    user: User
    policy: Policy

    def address(self, upstream: Upstream, *, api_version: str | None) -> str:
        """Where it is at this upstream, behind its `base_url`."""
        address = address_at(upstream, self.kept.path(self.response_id), api_version=api_version)
        query = urlencode([(name, value) for name, value in self.query if name in self.kept.query])
        return address + ("&" if "?" in address else "?") + query if query else address


class StoredResponses:
    """Knows by the books whose a response is."""

    def __init__(self, ledger: Ledger, upstreams: Upstreams) -> None:
        self.ledger = ledger
        self._upstreams = upstreams

    async def with_previous(self, call: Call) -> Call:
        """The passage with what it goes on from, to where that is kept. Raises PreviousNotFound, LedgerUnavailable.

        It has to be its own user's.
        """
        name = call.request.previous_response_id
        if name is None:
            return call
        made = await self._made(name, call.user)
        places = [at for at in call.model.targets if made and at.upstream.name == made.labels.upstream]
        if not places:
            raise _no_previous(name, call.model)
        first, *others = places
        return replace(call, previous=made, model=replace(first, others=tuple(others)))

    async def pass_on(self, asked: StoredResponseQuery, client: Responder) -> None:
        """Ask the upstream that keeps it, and pass its answer on.

        Raises ResponseNotFound, LedgerUnavailable, UpstreamError. It may be cancelled at any moment: nothing is held.
        """
        made = await self._made(asked.response_id, asked.user)
        upstream = asked.policy.upstreams.get(made.labels.upstream) if made else None
        if upstream is None:
            raise _no_response(asked.response_id)
        headers = to_upstream(client.headers, kind=upstream.kind, api_key=upstream.api_key)
        address = asked.address(upstream, api_version=client.api_version)
        async with self._upstreams.send(upstream, address, b"", headers, method=asked.kept.method) as answer:
            if answer.status == 404:
                raise _no_response(asked.response_id)
            if answer.status // 100 != 2:
                await _pass_on_failure(answer, upstream, client)
            elif answer.is_stream:
                await _pass_on_stream(answer, client)
            else:
                client.send(answer.status, to_client(answer.headers, is_stream=False), await answer.whole())

    async def _made(self, response_id: str, user: User) -> Entry | None:
        """The call that made it, if that was this user's."""
        if not RESPONSE_ID.fullmatch(response_id):
            return None
        made = await self.ledger.response_entry(response_id)
        return made if made is not None and made.labels.user == user.name else None


def _no_response(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{response_id[:_SHOWN]}' not found.")


def _no_previous(response_id: str, model: Model) -> PreviousNotFound:
    text = f"Previous response with id '{response_id[:_SHOWN]}' not found."
    if not model.allows.store:  # which says nothing of whose it is
        text += " This model's responses are not kept: send what was said before in `input`."
    return PreviousNotFound(text, param="previous_response_id")


async def _pass_on_stream(answer: Answer, client: Responder) -> None:
    await client.start(answer.status, to_client(answer.headers, is_stream=True))
    try:
        async for chunk in answer.chunks():
            await client.write(chunk)
            if client.is_disconnected:
                return
    except UpstreamError:
        client.abort()  # an event of ours could become a part of the one that broke off
    else:
        await client.end()


async def _pass_on_failure(answer: Answer, upstream: Upstream, client: Responder) -> None:
    failure = failure_of(answer.status, await answer.beginning(), answer.retry_after, upstream)
    if isinstance(failure, ProxyError):
        raise failure
    client.send(failure.status, JSON_HEADERS, failure.body)
