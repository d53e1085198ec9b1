"""The admin listener: metrics and health. The API listener does not serve these metrics."""

from aiohttp import web

from proxy.metrics import Metrics
from proxy.web.health import Health
from proxy.web.middleware import answer_errors


class Admin:
    """The handlers of the admin listener."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._metrics = metrics
        self._health = health

    def application(self) -> web.Application:
        """The application of the listener."""
        application = web.Application(middlewares=[answer_errors])
        application.router.add_routes([*self._health.routes(), web.get("/metrics", self._metrics_page)])
        return application

    async def _metrics_page(self, request: web.Request) -> web.Response:
        # Prometheus' text format has the version 0.0.4, and wants it in the content type.
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8", "cache-control": "no-store"}
        return web.Response(headers=headers, body=self._metrics.exposition())
