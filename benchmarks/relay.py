"""The command `python -m benchmarks.relay PORT UPSTREAM_PORT`: what the proxy is compared with.

It passes each request on and each answer back, with aiohttp on both sides, and does nothing else: no key, no quota,
no record. So what the proxy costs beyond it is what the proxy does, and not what HTTP in Python costs.
"""

import asyncio
import sys

import uvloop
from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web

_HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-upstream"}


async def _serve(port: int, upstream: int) -> None:
    session = ClientSession(
        f"http://127.0.0.1:{upstream}",
        connector=TCPConnector(limit=0),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
    )

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with session.post(request.rel_url, data=body, headers=_HEADERS, allow_redirects=False) as answer:
            headers = {"content-type": answer.headers.get("content-type", "")}
            if "text/event-stream" not in headers["content-type"]:
                return web.Response(body=await answer.read(), status=answer.status, headers=headers)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    application = web.Application(client_max_size=64 * 1024 * 1024)
    application.router.add_route("*", "/{path:.*}", relay)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2])))
