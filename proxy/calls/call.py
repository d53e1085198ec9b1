"""One call: its request, its user, and the part of the policy that decides about it.

Its user, policy and quotas are those in force when it is admitted. If the policy, or a user or key, changes while it
waits for admission, it is prepared anew (`relay.Renew`), and refused if a new call would be. A call in flight keeps
what admitted it. Its grants end by the clock.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from proxy.calls.log_line import LogLine
from proxy.errors import InvalidRequest, ModelNotFound, ProxyError
from proxy.formats.allowance import check_allowance, has_effects
from proxy.formats.endpoints import Endpoint
from proxy.formats.kinds import kind_of
from proxy.formats.limit_headers import anthropic_limit_headers, rate_limit_headers, warning_headers
from proxy.formats.maximum import allowed_maximum, is_about_maximum, written_maximum
from proxy.formats.model_names import check_model_name
from proxy.formats.pieces import certain_uses_of
from proxy.formats.refusal import never_fits, refusal
from proxy.formats.request import Request, forwarded_body, forwarded_model
from proxy.formats.restrictions import check_negative_maxima, check_refused_fields, negative_maxima
from proxy.identity.authentication import Caller, Snapshot, Terms
from proxy.identity.keys import Headers
from proxy.ledger.book import Refused, Reserve
from proxy.ledger.entry import CallLabels, Entry
from proxy.policy.admission import Block, NotAdmitted, Verdict
from proxy.policy.amounts import Measure
from proxy.policy.binding import Binding
from proxy.policy.catalog import Catalog, Model
from proxy.policy.policy import Policy
from proxy.policy.quota import Counter, CounterKey, Demand
from proxy.policy.status import QuotaStatus, quota_statuses
from proxy.upstreams.headers import idempotency_header, to_upstream
from proxy.upstreams.spool import Spliced, Spool

_WAIT_S_MAX = 600
# Names of models may come from clients, so the number of terms that are kept is bounded.
_TERMS_MAX = 4096
# The value of `X-Quota-Max-Wait`: "30" or "30s".
_WAIT_HEADER = re.compile(r"([0-9]{1,4})(?:s)?")


class Responder(Protocol):
    """The client of one call: what it sent, how to answer it, and whether it has disconnected.

    `id` is the request's id, `task` carries the call, and `line` is what the log will say of it. Writing to a client
    that has disconnected does nothing. The implementation for HTTP is
    `proxy.web.response.WebResponder`.
    """

    id: str
    task: "asyncio.Task[Any]"
    line: LogLine
    headers: Headers
    api_version: str | None  # Azure's `api-version` in the client's query
    is_disconnected: bool

    @property
    def has_begun(self) -> bool:
        """Whether the head of an answer has been sent. After that an error can no longer have its own HTTP status."""

    def on_disconnected(self, notify: Callable[[], object] | None) -> None:
        """Call `notify` when the client disconnects, or at once if it already has. None removes the callback."""

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer (one that is not streamed)."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Send the head of a streamed answer."""

    async def write(self, data: bytes) -> None:
        """Send a part of a streamed answer. Waits while the client reads slowly."""

    def write_now(self, data: bytes) -> bool:
        """The same without a wait. Returns whether the client keeps up."""

    async def drain(self) -> None:
        """Wait while the client reads slowly."""

    def heartbeat(self, is_between_events: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within the block, send an SSE comment when nothing was sent for a while and `is_between_events()`."""

    def heartbeat_before_answer(
        self, every_s: float, start: Callable[[], Awaitable[None]]
    ) -> AbstractAsyncContextManager[None]:
        """Within the block, which waits for an upstream, send an SSE comment when nothing was sent for `every_s`.

        `start` sends the head of the stream before the first comment, unless it is sent already.
        """

    async def end(self) -> None:
        """End a streamed answer."""

    def abort(self) -> None:
        """Close the connection abruptly, so that the client sees that the answer is incomplete."""


@dataclass(slots=True, eq=False)
class Call:
    """One call. `model` is the model at the first upstream, or at the one that this attempt goes to.

    It is a value, and never changed; it is not declared frozen, because that takes longer.

    `is_listed`: the catalog lists the model by this very name, so that the name is none that a client made up.
    """

    request: Request
    caller: Caller
    policy: Policy
    catalog: Catalog
    model: Model
    is_listed: bool
    binding: Binding
    client: Responder
    wait_s: float
    spool: Spool | None = None  # the body, if it is a form
    previous: Entry | None = None  # the call that produced the request's `previous_response_id`
    maximum: int | None = None  # the output tokens of each choice that we write, because a quota caps the answer
    is_maximum_lowered: bool = False  # the upstream rejected a larger one that we had written
    has_new_key: bool = False  # it is sent once more, because the upstream rejected the key that was fetched before

    @property
    def model_label(self) -> str:
        """The model's name if the catalog lists it, else "other".

        It is a label of metrics, and a client that made names up could otherwise create any number of time series.
        """
        return self.model.name if self.is_listed else "other"

    def with_target(self, target: Model) -> "Call":
        """The same call, sent to this target."""
        return self if target is self.model else replace(self, model=target)

    @property
    def address(self) -> str:
        """The path and query at the upstream, without its `base_url`."""
        endpoint, model, api_version = self.request.endpoint, self.model, self.client.api_version
        deployment = model.upstream_model if endpoint.has_deployments else None
        return kind_of(model.upstream.kind).address(
            model.upstream, endpoint.path, deployment=deployment, api_version=api_version
        )

    @property
    def adds_usage(self) -> bool:
        """Whether we add an option to the request to get the usage of its stream."""
        return self.request.adds_usage or self.model.upstream.kind in self.request.adds_running_usage

    @property
    def extend_wait_s(self) -> float:
        """How long a stream may wait to hold more, in seconds.

        `X-Quota-Max-Wait` may shorten it but not extend it beyond the policy's `wait`: a stream that waits keeps what
        it holds already, which other calls are waiting for.
        """
        return min(self.wait_s, self.policy.wait_s)

    @property
    def may_be_stored(self) -> bool:
        """Whether its upstream may store the response under its id."""
        stores = self.model.allows.store and kind_of(self.model.upstream.kind).stores_responses
        return self.request.is_stored and stores

    @property
    def may_run_twice(self) -> bool:
        """Whether it does no harm if two upstreams run it: it stores nothing and uses no tools there.

        A response that was stored by the first one could neither be found nor deleted by its user.
        """
        return not self.may_be_stored and not has_effects(self.request.endpoint, self.request.body)

    def reserve(self, demand: Demand, *, owner: str, recorded_model: str) -> Reserve:
        """The ledger operation that reserves `demand` for this call and so admits it.

        `recorded_model` is the model's name in the record of the call.
        """
        return Reserve(
            id=self.client.id,
            owner=owner,
            labels=CallLabels(
                self.caller.user,
                recorded_model,
                self.request.endpoint.name,
                self.model.upstream.name,
                key_id=self.caller.key.id,
                tag=self.caller.tag,
                address=self.client.line.address,
            ),
            binding=self.binding,
            demand=demand,
        )

    def body(self) -> bytes | Spliced:
        """The body to send."""
        if self.spool is None:
            return forwarded_body(self.request, self.model, maximum=self.maximum)
        start, end, name = forwarded_model(self.request, self.model)
        return Spliced(self.spool, start=start, end=end, patch=name)

    def capped(self, entry: Entry, *, context: int | None) -> "Call":
        """The same call, with the maximum that has to be written if a quota caps its answer.

        Example: 1,500 tokens are free for the answer, and the request asks for `n: 3` and `max_tokens: 2000`. Each of
        the three choices may have 500 tokens, so `max_tokens: 500` is written. `context` is as in `written_maximum`.
        """
        assert entry.maximum is not None, "a capped call has a maximum"
        maximum = written_maximum(
            self.request,
            self.model,
            longest=entry.maximum,
            held_input=entry.hold.input,
            context=context,
            is_output_limited=any(
                quota.enforce == "exact" and limit.measure is Measure.OUTPUT_TOKENS
                for quota in self.binding.quotas
                for limit in quota.limits
            ),
        )
        return self if maximum is None else replace(self, maximum=maximum)

    def with_smaller_maximum(self, status: int, body: bytes, *, held_input: int) -> "Call | None":
        """The same call with the maximum that the upstream accepts, by its answer to the one that we wrote.

        None if the answer is not about that, states no smaller maximum, or is about one that was lowered already.
        """
        if not self.is_about_maximum(status, body) or self.is_maximum_lowered:
            return None
        assert self.maximum is not None, "the answer is about it"
        maximum = allowed_maximum(body, maximum=self.maximum, held_input=held_input)
        return None if maximum is None else replace(self, maximum=maximum, is_maximum_lowered=True)

    def is_about_maximum(self, status: int, body: bytes) -> bool:
        """Whether an error answer is about the maximum that we wrote."""
        return self.maximum is not None and is_about_maximum(status, body, maximum=self.maximum)

    def without_usage_option(self) -> "Call":
        """The same call without the option that asks for the usage of its stream."""
        return replace(self, request=self.request.without_usage_option())

    def headers(self) -> dict[str, str]:
        """The headers to send, without our key."""
        upstream = self.model.upstream
        content_type = "application/json" if self.request.form is None else self.request.form.content_type
        idempotency = idempotency_header(self.client.headers, user=self.caller.user, api_key=upstream.api_key)
        return idempotency | to_upstream(
            self.client.headers,
            kind=upstream.kind,
            content_type=content_type,
            betas=self.model.allows.betas,
            is_stream=self.request.form is None and self.request.stream,
        )

    def refusal(self, refused: Refused, *, busy_s: int) -> ProxyError:
        """The error that tells the client why its call was refused.

        `busy_s` is the `Retry-After` for a call that is refused because of calls in flight.
        """
        # All times are those of the decision, by the clock that decided. Example: the ledger refused the call at
        # 11:59:59.999 and this runs at 12:00:00.001. By then the window has ended, and the refusal would show an
        # empty one.
        now = refused.decided_at
        statuses = quota_statuses(self.binding, refused.counters, now)
        if refused.decision.verdict is Verdict.NEVER:
            error: ProxyError = never_fits(refused.decision, self.request, self.model, help=self.policy.help)
        else:
            error = refusal(
                refused.decision,
                statuses,
                policy=self.policy,
                endpoint=self.request.endpoint.name,
                now=now,
                busy_s=busy_s,
            )
        headers = _limit_headers(self.request.endpoint, self.policy, self.binding, statuses, now, id=self.client.id)
        error.headers.update(headers)
        return error

    def quota_headers(
        self, entry: Entry, counters: Mapping[CounterKey, Counter], now: int, *, is_held: bool
    ) -> dict[str, str]:
        """The quota headers of a metered answer.

        `is_held` says that the reservation is still open. Then its own hold is left out of the numbers: a client with
        a limit of 4,000 that has used nothing reads 4,000 remaining, not 4,000 minus the hold of the call itself.
        """
        statuses = quota_statuses(self.binding, counters, now, without=entry.open_amounts if is_held else None)
        headers = _limit_headers(self.request.endpoint, self.policy, self.binding, statuses, now, id=self.client.id)
        if self.maximum is not None:
            headers["x-quota-capped"] = f'{self.maximum * self.request.choices}; quota="{entry.capped_by}"'
        return headers


def closed_refusal(
    binding: Binding, counters: Mapping[CounterKey, Counter], now: int, *, policy: Policy, endpoint: Endpoint, id: str
) -> tuple[Refused, ProxyError]:
    """The decision about a request that was not read, because quotas of 0 refuse all calls of its user; its error.

    `binding` has these quotas alone, and no other quota is shown. `id` is the request's.
    """
    statuses = quota_statuses(binding, counters, now)
    blocks = tuple(
        Block(each.quota, each.counter, limit, Verdict.EXHAUSTED, needed=0)
        for each in statuses.values()
        for limit in each.quota.limits
        if limit.maximum == 0
    )
    decision = NotAdmitted(Verdict.EXHAUSTED, blocks)
    error = refusal(decision, statuses, policy=policy, endpoint=endpoint.name, now=now, busy_s=0)
    error.headers.update(_limit_headers(endpoint, policy, binding, statuses, now, id=id))
    return Refused(decision, counters, now), error


def _limit_headers(
    endpoint: Endpoint, policy: Policy, binding: Binding, statuses: Mapping[str, QuotaStatus], now: int, *, id: str
) -> dict[str, str]:
    headers = rate_limit_headers(binding, statuses, now)
    if endpoint.is_of_messages:
        # Anthropic's SDK reads the limits and the request's id under other names.
        headers |= {**anthropic_limit_headers(binding, statuses), "request-id": id}
    return headers | warning_headers(statuses, now) if policy.self_service else headers


def prepare_call(
    request: Request, caller: Caller, snapshot: Snapshot, client: Responder, *, spool: Spool | None = None
) -> Call:
    """Find the model and the quotas of a call, and check what the model's targets allow.

    Raises ModelNotFound if there is no such model for this user, and InvalidRequest if a target does not allow what
    the request asks for. Both say what would help.
    """
    terms = _terms_of(request.endpoint, request.model, caller, snapshot)
    model = terms.model
    negative = negative_maxima(request.endpoint, request.body.document)
    for target in model.targets:
        if negative:
            check_negative_maxima(negative, kind_of(target.upstream.kind), model=request.model)
        check_allowance(request.endpoint, request.body, target.allows)
        if target.upstream.refuse:
            check_refused_fields(request.used_fields, target.upstream.refuse, model=request.model)
    uses = certain_uses_of(request, model)
    binding = terms.bindings.get(uses)
    if binding is None:
        bound = snapshot.binding(caller, model.matched_name, uses)
        if bound is None:
            raise _no_quota(request.model, is_covered=snapshot.binding(caller, model.matched_name) is not None)
        binding = terms.bindings[uses] = bound.for_user(caller.user)
    return Call(
        request=request,
        caller=caller,
        policy=snapshot.policy,
        catalog=snapshot.catalog,
        model=model,
        is_listed=terms.is_listed,
        binding=binding,
        client=client,
        wait_s=_wait_s(client, snapshot.policy),
        spool=spool,
    )


def _terms_of(endpoint: Endpoint, name: str, caller: Caller, snapshot: Snapshot) -> Terms:
    """The terms of a call to the model `name`. They are found once for each version of the policy."""
    key = (name, endpoint.name, caller.user, caller.groups, caller.key.models, caller.key.groups)
    terms = snapshot.terms.get(key)
    if terms is None:
        model = snapshot.catalog.model(name)
        if model is None or not snapshot.may_use(caller, model.matched_name):
            raise no_such_model(name)
        is_listed = snapshot.catalog.lists(model.name)
        if not is_listed:
            check_model_name(name)
        _check_surface(endpoint, name, model)
        if len(snapshot.terms) >= _TERMS_MAX:
            snapshot.terms.clear()
        terms = snapshot.terms[key] = Terms(model, is_listed, {})
    return terms


def _check_surface(endpoint: Endpoint, name: str, model: Model) -> None:
    """Refuse a request of one API for a model of the other; nothing is translated."""
    if all(endpoint.surface in kind_of(target.upstream.kind).surfaces for target in model.targets):
        return
    is_openai_request = not endpoint.is_of_messages
    vendor, path = ("Anthropic", "/v1/messages") if is_openai_request else ("OpenAI", "/v1/chat/completions")
    raise InvalidRequest(
        f'The model "{name}" has the API of {vendor}: send it to {path}, with an SDK of {vendor}. '
        "This proxy does not translate between the two APIs.",
        param="model",
        code="wrong_endpoint",
    )


def _no_quota(name: str, *, is_covered: bool) -> ModelNotFound:
    """The error for a model without a quota. If it `is_covered`, its quotas cannot count this call."""
    if is_covered:
        text = (
            f'The answers of the model "{name}" report no tokens here, and your quotas count only tokens, so none of '
            "them can count this call. The operator can add `requests` to a quota of one of your groups, write "
            "`tokens_per_request` or `tokens_per_image` for the model, or set `unmatched: allow`."
        )
    else:
        text = (
            f'No quota of yours covers the model "{name}". The operator can add it to the `models` of a quota of one '
            "of your groups, or set `unmatched: allow`."
        )
    return ModelNotFound(text, param="model")


def no_such_model(name: str) -> ModelNotFound:
    """The error for a model that does not exist and for one that this user may not use.

    They must not differ: otherwise a user could find out which models others have by trying names.
    """
    text = f'The model "{name}" does not exist here or you may not use it. GET /v1/models lists yours.'
    return ModelNotFound(text, param="model")


def _wait_s(client: Responder, policy: Policy) -> float:
    """How many seconds this call may wait for calls in flight: its `X-Quota-Max-Wait`, else the policy's `wait`."""
    header = client.headers.get("x-quota-max-wait")
    if header is None:
        return policy.wait_s
    match = _WAIT_HEADER.fullmatch(header.strip())
    if match is None or int(match[1]) > _WAIT_S_MAX:
        raise InvalidRequest(f"X-Quota-Max-Wait must be whole seconds, 0 to {_WAIT_S_MAX}.", param="X-Quota-Max-Wait")
    return float(match[1])
