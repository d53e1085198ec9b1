"""Why a user is admitted to a model or not: which quotas bind, what is left, and when a call would be admitted.

It decides about the smallest call with the functions that decide about calls. Nothing is reserved.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.administration.counters import CounterRecord, record_of
from proxy.administration.records import UserRecord
from proxy.administration.refusals import RefusalRecord
from proxy.identity.authentication import Caller, Snapshot
from proxy.ledger.queries import ledger_now, read_counters
from proxy.policy.admission import NotAdmitted, decide
from proxy.policy.key import Key
from proxy.policy.quota import Demand
from proxy.policy.status import quota_statuses

# One token of input and one of output.
_SMALLEST = Demand(input=1, output_maximum=1, smallest=1)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What would be decided about the smallest call of a user to a model at the instant `at` (ms).

    - `admitted`, and else `reason`: `exhausted`, `busy` or `never` of the quotas `refused_by`, or a text if no quota
      was asked.
    - `admissible_at` is when it would be admitted; None: no reset helps, or it is admitted now.
    - `quotas` are those that bind. Enough must be left of all quotas of one of the `alternatives`.
    """

    user: str
    source: str
    groups: tuple[str, ...]
    model: str
    at: int
    admitted: bool
    reason: str | None = None
    refused_by: tuple[str, ...] = ()
    admissible_at: int | None = None
    alternatives: tuple[tuple[str, ...], ...] = ()
    quotas: tuple[CounterRecord, ...] = ()

    def shown_to(self, groups: Collection[str]) -> "Explanation":
        """What a manager of these groups sees of it: the verdict, and nothing of other groups and their quotas."""

        def shown(ids: Iterable[str]) -> tuple[str, ...]:
            return tuple(id for id in ids if id.partition("/")[0] in groups)

        return replace(
            self,
            groups=tuple(name for name in self.groups if name in groups),
            refused_by=shown(self.refused_by),
            alternatives=tuple(ids for each in self.alternatives if (ids := shown(each))),
            quotas=tuple(quota for quota in self.quotas if quota.group in groups),
        )


@dataclass(frozen=True, slots=True)
class ExplainedRefusal:
    """A refusal that was stored, and what would be decided about the smallest call of that user now.

    `now` is null if there is no such user or model any more.
    """

    refusal: RefusalRecord
    now: Explanation | None


async def explain(
    connection: AsyncConnection, snapshot: Snapshot, user: UserRecord, model: str, *, now: Callable[[], int]
) -> Explanation:
    """Why this user is admitted to this model or not. `now` gives ms since 1970; windows go by the ledger's clock.

    Of a user of a header source, the groups that the source sends come with each request and are not known here.
    """
    at = await ledger_now(connection, now)
    groups = tuple(group for group in snapshot.policy.groups if group in user.groups)
    caller = Caller(user.identity.subject, groups, Key(""), user.identity.source)
    refused = Explanation(caller.user, caller.source, user.groups, model, at, admitted=False)
    if user.disabled_at is not None:
        return replace(refused, reason="the user is disabled")
    found = snapshot.catalog.model(model)
    if found is None:
        return replace(refused, reason="there is no such model in `models`")
    if not snapshot.may_use(caller, found.matched_name):
        return replace(refused, reason="none of the lists of models of the user's groups has this model")
    bound = snapshot.binding(caller, found.matched_name)
    if bound is None:
        text = "no quota of the user's groups covers this model, and `unmatched` is refuse"
        return replace(refused, reason=text)
    binding = bound.for_user(caller.user)
    counters = await read_counters(connection, binding.keys())
    explained = replace(
        refused,
        alternatives=tuple(tuple(quota.id for quota in each.quotas) for each in binding.alternatives()),
        quotas=tuple(record_of(each, caller.user) for each in quota_statuses(binding, counters, at).values()),
    )
    decision = decide(_SMALLEST, binding, counters, at)
    if not isinstance(decision, NotAdmitted):
        return replace(explained, admitted=True)
    return replace(
        explained,
        reason=decision.verdict.word,
        refused_by=decision.refused_by,
        admissible_at=decision.admissible_at,
    )
