"""Deletes what administration no longer needs. Any number of processes may do so at once."""

from proxy.administration.audit import delete_old_audit
from proxy.administration.in_flight import delete_ended_cuts
from proxy.ledger.store import Store
from proxy.policy.policy import Keep


async def delete_old(store: Store, keep: Keep, *, now: int) -> None:
    """Delete rows of the audit log that are older than `keep.audit_ms`, and what ended calls in flight.

    `now` is in ms since 1970. To be called every minute. Raises StoreUnavailable.
    """
    await delete_ended_cuts(store)
    if keep.audit_ms is not None:
        await delete_old_audit(store, before=now - keep.audit_ms)
