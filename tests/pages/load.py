"""Calls of the official SDK while a page is open: single ones, streams, and a load in the background."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from openai import AsyncOpenAI, AsyncStream, RateLimitError
from openai.types.chat import ChatCompletionChunk

from tests.pages.policy import IN_FRONT, ROGUE_MODEL
from tests.stage import Stage

CALLERS = 2
_MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def call(on: Stage, user: str, model: str = "gpt-4o-mini", *, key: str | None = None, tokens: int = 5) -> None:
    """A call of the SDK with the key of this user, or with another one. It must be admitted."""
    sdk = on.sdk(user, **({"api_key": key} if key else {}))
    answer = await sdk.chat.completions.create(
        model=model, messages=_MESSAGES, metadata={"simulate": f"tokens={tokens}"}
    )
    assert answer.choices[0].message.content


async def refused(on: Stage, user: str, model: str = "gpt-4o-mini", *, key: str | None = None) -> str:
    """A call of the SDK that a quota must refuse. Returns the id of the request."""
    with pytest.raises(RateLimitError) as caught:
        await call(on, user, model, key=key)
    assert caught.value.request_id
    return caught.value.request_id


async def slow_stream(
    on: Stage, user: str, model: str = "gpt-4o-mini", *, key: str | None = None
) -> AsyncStream[ChatCompletionChunk]:
    """A stream of the SDK that would go on for minutes. It has begun."""
    return await _stream(
        on.sdk(user, **({"api_key": key} if key else {})), model=model, simulate="tokens=900 speed=10"
    )


async def _stream(sdk: AsyncOpenAI, *, model: str, simulate: str) -> AsyncStream[ChatCompletionChunk]:
    return await sdk.chat.completions.create(
        model=model, messages=_MESSAGES, metadata={"simulate": simulate}, stream=True
    )


async def text_of(stream: AsyncStream[ChatCompletionChunk]) -> str:
    """The text of a stream, when it is at its end."""
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


@asynccontextmanager
async def load(on: Stage) -> AsyncIterator[None]:
    """Calls all the time, by a user and to a model whose names are markup. Each takes as long as its stream."""

    async def work() -> None:
        sdk = on.sdk("sso", default_headers={"x-forwarded-user": IN_FRONT["x-forwarded-user"]})
        while True:
            await text_of(await _stream(sdk, model=ROGUE_MODEL, simulate="tokens=20 speed=100"))

    working = [asyncio.get_running_loop().create_task(work()) for _ in range(CALLERS)]
    try:
        yield
        assert not any(task.done() for task in working), "a call of the load has failed"
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
