"""The record of one request, collected while it is served: the log, the metrics and the events are made from it.

The log has one line of it, written when the request has ended.
A line never has a key, a prompt or an answer, and no text that a client chose: a client may have written a key
anywhere. Names of users, models, paths and parameters are those that the configuration, the directory or the proxy
itself lists, and a key is named by its label or its id. Texts of errors are left out, because some of them repeat
what the client or the upstream sent: the status, the code and the parameter say what happened. Ids of a trace, and
those that the client or the upstream gave to the request, are there if they have the form of an id and of nothing
else (see `web.request_log` and `upstreams.headers`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.errors import InvalidKey, ProxyError
from proxy.formats.restrictions import PARAMETERS
from proxy.identity.authentication import Caller
from proxy.ledger.entry import Entry
from proxy.policy.amounts import Usage


@dataclass(slots=True, kw_only=True)
class LogLine:
    """The line of one request. `clock` gives seconds, and every `…_s` is a time of it; None if it did not happen.

    - `endpoint` is the name of the endpoint, else the method and the path as `formats.endpoints` lists it.
    - `is_served`: the endpoint is one of those that are served, not a part of some other path.
    - `model` is the name that `recorded_names.logged_name` gives.
    - `admin` is the name of the admin whose key or login the request had.
    - `is_call`: it became a call, whose line is written when it is settled.
    - `entry` is the call's entry in the ledger, as of the ledger's last answer: the log has what it held last, and
      the quotas with `enforce: shadow` that had no room for it.
    - `trace` is the id of the trace that the client takes part in, `client_request` the client's id of the request,
      and `upstream_request` that of the upstream.
    - `upstream_model` is the model's name at the upstream, if the configuration states it.
    - `attempts` is how often the call was sent. `failed_first` is the upstream whose attempt failed first.
    - `asked_s`: the ledger was asked for a reservation. `admitted_s`: the quotas admitted the call.
    - `sent_s`: it was sent to an upstream for the first time.
    - `answered_s`: the last byte of the upstream's answer came.
    - `first_byte_s`: the client's answer began, with `sent_status`.
    - `left_s`: the connection to the client was gone before the end of the answer.
    """

    request_id: str
    endpoint: str
    address: str
    clock: Callable[[], float]
    began_s: float
    is_call: bool = False
    is_served: bool = True
    caller: Caller | None = None
    admin: str | None = None
    trace: str | None = None
    client_request: str | None = None
    model: str | None = None
    stream: bool | None = None
    entry: Entry | None = None
    upstream: str | None = None
    upstream_model: str | None = None
    upstream_request: str | None = None
    attempts: int = 0
    failed_first: str | None = None
    outcome: str | None = None
    usage: Usage | None = None
    capped_by: str | None = None
    refused_by: Sequence[str] = ()
    verdict: str | None = None
    error: ProxyError | None = None
    asked_s: float | None = None
    admitted_s: float | None = None
    sent_s: float | None = None
    answered_s: float | None = None
    first_byte_s: float | None = None
    sent_status: int | None = None
    left_s: float | None = None

    @property
    def is_identified(self) -> bool:
        """Whether it is known whose request this is."""
        return self.caller is not None or self.admin is not None

    def mark_admitted(self, entry: Entry) -> None:
        """Note that the quotas admitted the call, which has this entry in the ledger."""
        self.entry, self.admitted_s = entry, self.clock()

    def mark_sent(self) -> None:
        """Note that the call is sent to an upstream, and when that is for the first time."""
        self.attempts += 1
        if self.sent_s is None:
            self.sent_s = self.clock()

    def mark_failed(self, upstream: str) -> None:
        """Note that an attempt at this upstream failed."""
        if self.failed_first is None:
            self.failed_first = upstream

    def mark_answered(self) -> None:
        """Note that the upstream's answer has ended."""
        self.answered_s = self.clock()

    def mark_first_byte(self, status: int) -> None:
        """Note that the answer to the client begins, with this status."""
        if self.first_byte_s is None:
            self.first_byte_s, self.sent_status = self.clock(), status

    def mark_left(self) -> None:
        """Note that the connection to the client is gone."""
        if self.left_s is None:
            self.left_s = self.clock()

    def own_s(self, ended_s: float) -> float:
        """How long no upstream had the request, if it ended at `ended_s`, in seconds."""
        upstream_s = 0.0 if self.sent_s is None else (self.answered_s or ended_s) - self.sent_s
        return ended_s - self.began_s - upstream_s

    def fields(self, status: int) -> dict[str, Any]:
        """The members of the line. `status` is the HTTP status that the client got, 499 if it left before one.

        Times are in ms since the request began, except `waited_ms`: how long the ledger took to decide, which
        includes waiting for calls in flight. `own_ms` is the part of the whole time in which no upstream had the
        call, so it includes `waited_ms`. What does not apply is left out. docs/running.md describes each member.
        """
        began_s, ended_s = self.began_s, self.clock()
        waited_s = None if self.asked_s is None else (self.admitted_s or ended_s) - self.asked_s
        caller, entry, usage, error = self.caller, self.entry, self.usage, self.error
        members = {
            "request": self.request_id,
            "client_request": self.client_request,
            "trace": self.trace,
            "endpoint": self.endpoint,
            "status": status,
            "admin": self.admin,
            "user": caller and caller.user,
            "key": caller and (caller.key.label or caller.key.id),
            "source": caller and caller.source,
            "tag": (caller and caller.tag) or None,
            "group": entry and entry.admitted_via,
            "model": self.model,
            "stream": self.stream,
            "upstream": self.upstream,
            "upstream_model": None if self.upstream_model == self.model else self.upstream_model,
            "upstream_request": self.upstream_request,
            "attempts": self.attempts or None,
            "failed_first": self.failed_first,
            "outcome": self.outcome,
            "input_tokens": usage and usage.tokens.input,
            "output_tokens": usage and usage.tokens.output,
            "cached_tokens": (usage and usage.tokens.cached) or None,
            "reasoning_tokens": (usage and usage.tokens.reasoning) or None,
            "provenance": usage and usage.provenance,
            "held_tokens": entry and entry.hold.tokens,
            "capped_by": self.capped_by,
            "would_refuse": (entry and list(entry.would_refuse)) or None,
            "refused_by": list(self.refused_by) or None,
            "verdict": self.verdict,
            "code": error and (error.code or error.type),
            "reason": error.reason if isinstance(error, InvalidKey) else None,
            "param": error.param if error and error.param in PARAMETERS else None,
            "retry_after": error and error.headers.get("retry-after"),
            "address": None if caller else self.address,
            "total_ms": round(1000 * (ended_s - began_s), 1),
            "admitted_ms": None if self.admitted_s is None else round(1000 * (self.admitted_s - began_s), 1),
            "waited_ms": None if waited_s is None else round(1000 * waited_s, 1),
            "first_byte_ms": None if self.first_byte_s is None else round(1000 * (self.first_byte_s - began_s), 1),
            "left_ms": None if self.left_s is None else round(1000 * (self.left_s - began_s), 1),
            "own_ms": round(1000 * self.own_s(ended_s), 1),
        }
        return {name: value for name, value in members.items() if value is not None}
