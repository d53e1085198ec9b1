"""Liveness and readiness, the same on both listeners, without a key.

Liveness says only that the process answers: a database that is away is no reason to kill it. Readiness says
whether a call would be served now, and under which policy.
"""

from aiohttp import web

from proxy.config.reload import Policies
from proxy.ledger.ledger import Ledger


class Health:
    """`/healthz` and `/readyz`."""

    def __init__(self, ledger: Ledger, policies: Policies) -> None:
        self._ledger = ledger
        self._policies = policies
        self.is_stopping = False

    def routes(self) -> list[web.RouteDef]:
        """To be added to an application's router."""
        return [web.get("/healthz", self._live), web.get("/readyz", self._ready)]

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        is_ready = self._ledger.is_healthy and not self.is_stopping
        state = {
            "status": "ready" if is_ready else "not ready",
            "ledger": "ok" if self._ledger.is_healthy else "unavailable",
            "policy": self._policies.current.hash,
        }
        return web.json_response(state, status=200 if is_ready else 503)
