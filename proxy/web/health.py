"""Liveness and readiness, on both listeners, without a key.

`/healthz` (liveness) is 200 as long as the process answers, also while the database can't be used: a restart of the
process would not bring the database back. `/readyz` (readiness) is 200 if calls should be sent here, else 503, and
has the hash of the policy in force. A process that is stopping is not ready and still serves calls for a while.
"""

from aiohttp import web

from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.ledger.ledger import Ledger

HEALTH_PATHS = ("/healthz", "/readyz")


class Health:
    """The handlers of `/healthz` and `/readyz`. Set `is_stopping` to make the process not ready."""

    def __init__(self, ledger: Ledger, policies: Policies[Snapshot]) -> None:
        self._ledger = ledger
        self._policies = policies
        self.is_stopping = False

    def routes(self) -> list[web.RouteDef]:
        """The routes, for an application's router."""
        live, ready = HEALTH_PATHS
        return [web.get(live, self._live), web.get(ready, self._ready)]

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        is_ready = self._ledger.is_healthy and not self.is_stopping
        state = {
            "status": "ready" if is_ready else "not ready",
            "ledger": "ok" if self._ledger.is_healthy else "unavailable",
            "policy": self._policies.current.policy.hash,
        }
        return web.json_response(state, status=200 if is_ready else 503)
