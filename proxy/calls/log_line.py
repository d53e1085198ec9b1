"""What the log says of one request, collected while the request is served and written once, when it has ended.

A line never has a key, a prompt or an answer, and no text that a client chose: a client may have written a key
anywhere. Names of users, models, paths and parameters are those that the configuration, the directory or the proxy
itself lists, and a key is named by its label or its id. Texts of errors are left out, because some of them repeat
what the client or the upstream sent: the status, the code and the parameter say what happened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proxy.errors import InvalidKey, ProxyError
from proxy.formats.restrictions import PARAMETERS
from proxy.identity.authentication import Caller
from proxy.policy.amounts import Usage


@dataclass(slots=True, kw_only=True)
class LogLine:
    """The line of one request. `clock` gives seconds, and every `…_s` is a time of it; None if it did not happen.

    - `endpoint` is the name of the endpoint, else the method and the path as `formats.endpoints` lists it.
    - `model` is the name that `recorded_names.logged_name` gives.
    - `admin` is the name of the admin whose key or login the request had.
    - `is_call`: the request has a task of its own, which writes the line when the call is settled.
    - `admitted_s`: the quotas admitted the call. `sent_s`: it was sent to an upstream for the first time.
    - `answered_s`: the last byte of the upstream's answer came.
    - `first_byte_s`: the client's answer began, with `sent_status`.
    """

    request_id: str
    endpoint: str
    address: str
    clock: Callable[[], float]
    began_s: float
    is_call: bool = False
    caller: Caller | None = None
    admin: str | None = None
    model: str | None = None
    group: str | None = None
    upstream: str | None = None
    outcome: str | None = None
    usage: Usage | None = None
    capped_by: str | None = None
    refused_by: Sequence[str] = ()
    verdict: str | None = None
    error: ProxyError | None = None
    admitted_s: float | None = None
    sent_s: float | None = None
    answered_s: float | None = None
    first_byte_s: float | None = None
    sent_status: int | None = None

    @property
    def is_identified(self) -> bool:
        """Whether it is known whose request this is."""
        return self.caller is not None or self.admin is not None

    def mark_admitted(self, group: str) -> None:
        """Note that the quotas of this group admitted the call."""
        self.group, self.admitted_s = group, self.clock()

    def mark_sent(self) -> None:
        """Note the first time at which the call is sent to an upstream."""
        if self.sent_s is None:
            self.sent_s = self.clock()

    def mark_answered(self) -> None:
        """Note that the upstream's answer has ended."""
        self.answered_s = self.clock()

    def mark_first_byte(self, status: int) -> None:
        """Note that the answer to the client begins, with this status."""
        if self.first_byte_s is None:
            self.first_byte_s, self.sent_status = self.clock(), status

    def fields(self, status: int) -> dict[str, Any]:
        """The members of the line. `status` is the HTTP status that the client got, 499 if it left before one.

        Times are in ms since the request began. `own_ms` is the part of the whole time in which no upstream had the
        call, so it includes waiting for calls in flight. What does not apply is left out.
        """
        ended_s = self.clock()
        upstream_s = 0.0 if self.sent_s is None else (self.answered_s or ended_s) - self.sent_s
        error = self.error
        usage = self.usage
        members = {
            "request": self.request_id,
            "endpoint": self.endpoint,
            "status": status,
            "admin": self.admin,
            "user": self.caller and self.caller.user,
            "key": self.caller and (self.caller.key.label or self.caller.key.id),
            "source": self.caller and self.caller.source,
            "tag": (self.caller and self.caller.tag) or None,
            "group": self.group,
            "model": self.model,
            "upstream": self.upstream,
            "outcome": self.outcome,
            "input_tokens": usage and usage.tokens.input,
            "output_tokens": usage and usage.tokens.output,
            "provenance": usage and usage.provenance,
            "capped_by": self.capped_by,
            "refused_by": list(self.refused_by) or None,
            "verdict": self.verdict,
            "code": error and (error.code or error.type),
            "reason": error.reason if isinstance(error, InvalidKey) else None,
            "param": error.param if error and error.param in PARAMETERS else None,
            "retry_after": error and error.headers.get("retry-after"),
            "address": None if self.caller else self.address,
            "total_ms": self._ms(ended_s),
            "admitted_ms": self._ms(self.admitted_s),
            "first_byte_ms": self._ms(self.first_byte_s),
            "own_ms": round(1000 * (ended_s - self.began_s - upstream_s), 1),
        }
        return {name: value for name, value in members.items() if value is not None}

    def _ms(self, at_s: float | None) -> float | None:
        return None if at_s is None else round(1000 * (at_s - self.began_s), 1)
