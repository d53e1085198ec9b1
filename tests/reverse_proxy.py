"""A server in front of a listener that has it below a path, as an nginx with `location /llm/` has.

async with below(on.admin_url, "/llm/") as origin:
    ...                                   # /admin/ of the listener is at f"{origin}/llm/admin/"
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

# They are about one connection, or are written anew by the server.
_OWN = ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")


@asynccontextmanager
async def below(listener: str, prefix: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """Forward what is below the prefix to the listener, with these headers added. Yields the origin."""
    added = headers or {}

    async def forward(request: web.Request) -> web.StreamResponse:
        sent = {name: value for name, value in request.headers.items() if name.lower() not in _OWN} | dict(added)
        url = f"{listener}/{request.raw_path.removeprefix(prefix)}"
        body = await request.read()
        async with http.request(request.method, url, headers=sent, data=body, allow_redirects=False) as reply:
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in _OWN}
            response = web.StreamResponse(status=reply.status, headers=kept)
            await response.prepare(request)
            async for chunk in reply.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    application = web.Application()
    application.router.add_route("*", f"{prefix}{{path:.*}}", forward)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    async with aiohttp.ClientSession(auto_decompress=False) as http:
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
