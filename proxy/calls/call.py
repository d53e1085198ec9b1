"""What one call takes along on its way: fixed when it sets out, whatever is reloaded meanwhile."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from proxy.errors import InvalidRequest, ModelNotFound, ProxyError
from proxy.formats.limit_headers import anthropic_limit_headers, rate_limit_headers
from proxy.formats.refusal import refusal
from proxy.formats.request import Request, forwarded_body, forwarded_model
from proxy.formats.restrictions import check_allowance
from proxy.ledger.book import Refused, Reserve
from proxy.ledger.entry import CallLabels, Entry
from proxy.policy.policy import Model, OnDisconnect, Policy, User
from proxy.policy.quota import Binding, Counter, CounterKey, Demand
from proxy.policy.status import QuotaStatus, quota_statuses
from proxy.upstreams.addresses import address_of
from proxy.upstreams.headers import idempotency, to_upstream
from proxy.upstreams.spool import Spliced, Spool

_WAIT_S_MAX = 600
_WAIT = re.compile(r"([0-9]{1,4})(?:s)?")


class Responder(Protocol):
    """The client of one call, as the call sees it: what it sent, how to answer it, and whether it has disconnected.

    `id` is the request's id. Writing to a client that has disconnected does nothing. `proxy.web.response` has the one
    that speaks HTTP.
    """

    id: str
    headers: Sequence[tuple[str, str]]
    api_version: str | None  # Azure's `api-version`, as the client sent it
    is_disconnected: bool

    @property
    def has_begun(self) -> bool:
        """Whether the head of an answer has been sent, so that a status can no longer be."""

    def on_disconnected(self, notify: Callable[[], object] | None) -> None:
        """Call `notify` once the client has disconnected, at once if it has already; None removes it."""

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of a streamed answer."""

    async def write(self, data: bytes) -> None:
        """Send a piece of a streamed answer; waits while the client reads slowly."""

    def heartbeat(self, is_between_events: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within the block, send a comment whenever nothing was sent for a while and `is_between_events`."""

    async def end(self) -> None:
        """End a streamed answer."""

    def abort(self) -> None:
        """Cut the connection, so that the client sees that the answer is incomplete."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, who makes it, and the part of the policy that decides about it."""

    request: Request
    user: User
    policy: Policy
    model: Model
    binding: Binding
    client: Responder
    wait_s: float
    spool: Spool | None = None  # where its body is, if that is a form
    previous: Entry | None = None  # the user's own call that made what this one goes on from

    @property
    def model_label(self) -> str:
        """The model's name where it is one of the policy's; never a name that a client made up."""
        return self.request.model if self.request.model in (self.policy.models or {}) else "other"

    def at(self, model: Model) -> "Call":
        """The same call on its way to another upstream of its model."""
        return replace(self, model=model)

    @property
    def address(self) -> str:
        """Where it goes, behind the upstream's `base_url`."""
        return address_of(self.request.endpoint, self.model, api_version=self.client.api_version)

    @property
    def adds_usage(self) -> bool:
        """Whether we ask for the usage of its stream in the client's place."""
        return self.request.adds_usage or self.request.adds_running_usage(self.model.upstream.kind)

    @property
    def pause_s(self) -> float:
        """How long a stream may pause to hold more: no longer than the policy says, since it holds up others."""
        return min(self.wait_s, self.policy.wait_s)

    @property
    def on_disconnect(self) -> OnDisconnect:
        """What to do when the client leaves: a whole answer is always read on, since it is billed anyway."""
        return self.model.upstream.on_disconnect if self.request.stream else "drain"

    def reserve(self, demand: Demand, *, owner: str) -> Reserve:
        """The act that lets this call in."""
        return Reserve(
            id=self.client.id,
            owner=owner,
            labels=CallLabels(
                self.user.name, self.request.model, self.request.endpoint.name, self.model.upstream.name
            ),
            binding=self.binding,
            demand=demand,
        )

    def body(self) -> bytes | Spliced:
        """The body to send."""
        if self.spool is None:
            return forwarded_body(self.request, self.model)
        start, end, name = forwarded_model(self.request, self.model)
        return Spliced(self.spool, start=start, end=end, patch=name)

    def body_for(self, entry: Entry) -> bytes | Spliced:
        """The body to send for what is held; where that is less than the call wants, its maximum is lowered to it."""
        if not entry.capped_by:
            return self.body()
        assert entry.maximum is not None, "what is capped has a maximum"
        return forwarded_body(self.request, self.model, maximum=entry.maximum // self.request.choices)

    def without_option(self) -> "Call":
        """The same, but that we don't ask for the usage of its stream."""
        return replace(self, request=replace(self.request, is_option_withheld=True))

    def headers(self) -> dict[str, str]:
        """The headers to send."""
        kind, api_key = self.model.upstream.kind, self.model.upstream.api_key
        content_type = "application/json" if self.request.form is None else self.request.form.content_type
        own = idempotency(self.client.headers, user=self.user.name, api_key=api_key)
        return own | to_upstream(
            self.client.headers,
            kind=kind,
            api_key=api_key,
            content_type=content_type,
            betas=self.model.allows.betas,
            is_stream=self.request.form is None and self.request.stream,
        )

    def refusal(self, answer: Refused, now: int, *, busy_s: int) -> ProxyError:
        """Why this call is not let in, for its client; `busy_s` is how long calls in flight will take."""
        # As it was decided: a window that has ended since must not be shown as a fresh one, in which there is room.
        then = min([now, *(block.counter.window.resets_at - 1 for block in answer.decision.blocks)])
        statuses = quota_statuses(self.binding, answer.counters, then)
        error = refusal(
            answer.decision,
            statuses,
            policy=self.policy,
            endpoint=self.request.endpoint.name,
            now=now,
            busy_s=busy_s,
        )
        error.headers.update(self._limit_headers(statuses, now))
        return error

    def quota_headers(
        self, entry: Entry, counters: Mapping[CounterKey, Counter], now: int, *, is_held: bool
    ) -> dict[str, str]:
        """The headers of a metered answer that speak of quotas; what the call itself still holds is left out."""
        statuses = quota_statuses(self.binding, counters, now, without=entry.open_amounts if is_held else None)
        capped = {"x-quota-capped": f'{entry.maximum}; quota="{entry.capped_by}"'} if entry.capped_by else {}
        return {**self._limit_headers(statuses, now), **capped}

    def _limit_headers(self, statuses: Mapping[str, QuotaStatus], now: int) -> dict[str, str]:
        ours = rate_limit_headers(self.binding, statuses, now)
        if not self.request.endpoint.is_of_messages:
            return ours
        return {**ours, **anthropic_limit_headers(self.binding, statuses), "request-id": self.client.id}


def prepare_call(
    request: Request, user: User, policy: Policy, client: Responder, *, spool: Spool | None = None
) -> Call:
    """Find the model and the quotas of a call; raises ModelNotFound that says what would help."""
    model = policy.model(request.model)
    if model is None or not policy.may_use(user, request.model):
        raise no_such_model(request.model)
    _refuse_other_surface(request, model)
    for place in model.targets:
        check_allowance(request, place.allows)
    binding = policy.binding(user, request.model)
    if binding is None:
        raise ModelNotFound(
            f'No quota of yours covers the model "{request.model}". The operator can add it to the `models` of a quota '
            "of one of your groups, or set `unmatched: allow`.",
            param="model",
        )
    return Call(request, user, policy, model, binding, client, wait_s=_wait_s(client, policy), spool=spool)


def _refuse_other_surface(request: Request, model: Model) -> None:
    """Nothing is translated: each surface has its own upstreams (the simulator has both)."""
    kinds = {place.upstream.kind for place in model.targets} - {"simulator"}
    if all((kind == "anthropic") == request.endpoint.is_of_messages for kind in kinds):
        return
    is_theirs = not request.endpoint.is_of_messages
    whose, instead = ("Anthropic", "/v1/messages") if is_theirs else ("OpenAI", "/v1/chat/completions")
    raise InvalidRequest(
        f'The model "{request.model}" is served as {whose} does: send it to {instead}, with the SDK of that. '
        "This proxy does not translate between the two.",
        param="model",
        code="wrong_endpoint",
    )


def no_such_model(name: str) -> ModelNotFound:
    """One answer for a model that isn't there and one that is somebody else's: a prober learns nothing."""
    text = f'The model "{name}" does not exist here or you may not use it. GET /v1/models lists yours.'
    return ModelNotFound(text, param="model")


def _wait_s(client: Responder, policy: Policy) -> float:
    """How long this call may wait for others: as its `X-Quota-Max-Wait` says, else the policy."""
    said = next((value for name, value in client.headers if name.lower() == "x-quota-max-wait"), None)
    if said is None:
        return policy.wait_s
    match = _WAIT.fullmatch(said.strip())
    if match is None or int(match[1]) > _WAIT_S_MAX:
        raise InvalidRequest(f"X-Quota-Max-Wait must be whole seconds, 0 to {_WAIT_S_MAX}.", param="X-Quota-Max-Wait")
    return float(match[1])
