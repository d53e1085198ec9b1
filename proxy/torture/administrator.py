"""The administrator of a torture run: changes things through the admin API all the time, and records each change.

It raises and lowers limits, gives grants and ends them, resets counters, makes and deletes a quota, disables and
enables users, cuts keys and ends calls, each at a replica that is up. `changes` says what follows from its records.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson

from proxy.torture.changes import (
    CHANGING,
    DIGITS,
    GROUP,
    PASSING,
    POT,
    ChangeRecord,
    CutKey,
    Effect,
    EndCall,
    EndGrant,
    GiveGrant,
    ResetCounters,
    SetLimit,
    SetUser,
)
from proxy.torture.clients import Address, bearer, was_down
from proxy.torture.process import ADMIN_KEY

_PAUSE_S, _AFTER_FAILURE_S = (0.02, 0.25), 0.5
_ANSWER_S = 60.0  # longer than a replica is paused
# In tokens. Each is more than one call needs, so none is refused for being too long.
_LIMITS = {CHANGING: (8_000, 40_000), POT: (20_000, 100_000), PASSING: (8_000, 10**9)}
_GRANT_TOKENS, _GRANT_MS = (1000, 20_000), (5000, 12_000)
# Longer than a change takes to be in force, so that it is seen that no call passes after that.
_DISABLED_S = (0.5, 4.0)


@dataclass(slots=True)
class _Answer:
    status: int | None
    etag: str | None
    body: Any


class Administrator:
    """One administrator. `addresses` are the base URLs of the admin API. `now` returns ms since 1970.

    `credentials` are those of the users, of which keys are replaced; `users` are their names in records.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        credentials: MutableSequence[Mapping[str, str]],
        users: Sequence[str],
        *,
        seed: int,
        now: Callable[[], int],
    ) -> None:
        self.changes: list[ChangeRecord] = []
        self._addresses = addresses
        self._credentials = credentials
        self._users = users
        self._now = now
        self._rng = random.Random(f"{seed}/administrator")
        self._grants: dict[str, GiveGrant] = {}
        self._keys: dict[str, str] = {}
        self._disabled: dict[str, float] = {}
        self._http: aiohttp.ClientSession | None = None

    async def run(self, seconds: float) -> None:
        """Make the quotas, and then change something all the time for so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        async with aiohttp.ClientSession(headers=bearer(ADMIN_KEY), timeout=timeout) as self._http:
            for quota in DIGITS:
                await self._set_limit(quota)
            while loop.time() < until:
                await self._change(loop.time())
                # Without an answer the proxy is down.
                was_lost = self.changes[-1].status is None
                await asyncio.sleep(_AFTER_FAILURE_S if was_lost else self._rng.uniform(*_PAUSE_S))
            for user in list(self._disabled):
                await self._enable(user)

    async def _change(self, time_s: float) -> None:
        due = next((user for user, until_s in self._disabled.items() if until_s <= time_s), None)
        if due is not None:
            return await self._enable(due)
        steps = {
            self._raise_or_lower: 4,
            self._give_grant: 4,
            self._end_grant: 1,
            self._reset: 3,
            self._make_or_delete: 1,
            self._disable: 1,
            self._cut_key: 1,
            self._end_call: 1,
        }
        [step] = self._rng.choices(list(steps), list(steps.values()))
        await step()

    # Quotas and grants

    async def _raise_or_lower(self) -> None:
        await self._set_limit(self._rng.choice([CHANGING, CHANGING, POT]))

    async def _make_or_delete(self) -> None:
        if (await self._ask("GET", _path_of(PASSING))).status == 200:
            await self._edit("quota.delete", "DELETE", _path_of(PASSING), SetLimit(PASSING, None))
        else:
            await self._set_limit(PASSING)

    async def _set_limit(self, quota: str) -> None:
        tokens = self._rng.randint(*_LIMITS[quota])
        fields = {
            "models": [f"*{digit}" for digit in DIGITS[quota]],
            "tokens": tokens,
            "per": "1h",
            "shared": quota == POT,
        }
        await self._edit("quota.set", "PUT", _path_of(quota), SetLimit(quota, tokens), fields)

    async def _give_grant(self) -> None:
        quota = self._rng.choice([CHANGING, CHANGING, POT])
        user = self._rng.choice([None, *self._users]) if quota == CHANGING else None
        until = self._now() + self._rng.randint(*_GRANT_MS)
        grant = GiveGrant(quota, user, self._rng.randint(*_GRANT_TOKENS), until)
        body = {
            "quota": quota,
            "user": user,
            "measure": "tokens",
            "amount": grant.tokens,
            "until": until,
            "reason": "torture",
        }
        answer = await self._make("grant.create", "POST", "/grants", grant, body)
        if answer.status == 201:
            self._grants[answer.body["id"]] = grant

    async def _end_grant(self) -> None:
        running = [id for id, grant in self._grants.items() if grant.until > self._now() + 100]
        if running:
            id = self._rng.choice(running)
            await self._make("grant.end", "DELETE", f"/grants/{id}", EndGrant(self._grants.pop(id)))

    async def _reset(self) -> None:
        quota = self._rng.choice([CHANGING, POT])
        user = self._rng.choice([None, *self._users]) if quota == CHANGING else None
        body = {"quota": quota} if user is None else {"quota": quota, "user": user}
        await self._make("counters.reset", "POST", "/counters/reset", ResetCounters(quota, user), body)

    # Users, keys and calls

    async def _disable(self) -> None:
        user = self._rng.choice([each for each in self._users if ":" in each] or [""])
        if user and user not in self._disabled:
            cut = self._rng.random() < 0.5
            effect = SetUser(user, is_enabled=False, cut=cut)
            self._disabled[user] = asyncio.get_running_loop().time() + self._rng.uniform(*_DISABLED_S)
            await self._edit(
                "user.disable", "POST", f"/users/{user}/disable", effect, {"cut": cut}, at=f"/users/{user}"
            )

    async def _enable(self, user: str) -> None:
        answer = await self._edit(
            "user.enable", "POST", f"/users/{user}/enable", SetUser(user, is_enabled=True), at=f"/users/{user}"
        )
        if answer.status == 200:
            del self._disabled[user]

    async def _cut_key(self) -> None:
        """Give a user of the database another key, and cut the one that it had."""
        users = [each for each in self._users if each.startswith("database:")]
        if not users:
            return
        user = self._rng.choice(users)
        old = self._keys.get(user)
        if old is None:
            listed = await self._ask("GET", f"/keys?user={user}")
            if listed.status != 200:
                return
            old = next(key["id"] for key in listed.body["data"] if key["revoked_at"] is None)
        new = await self._make("key.create", "POST", f"/users/{user}/keys", None, {"takes_tag_header": True})
        if new.status != 201:
            return
        self._credentials[self._users.index(user)] = bearer(new.body["key"])
        self._keys[user] = new.body["id"]
        await self._edit("key.revoke", "POST", f"/keys/{old}/revoke", CutKey(user), {"cut": True}, at=f"/keys/{old}")

    async def _end_call(self) -> None:
        calls = await self._ask("GET", "/calls")
        if calls.status == 200 and calls.body["data"]:
            id = self._rng.choice(calls.body["data"])["id"]
            await self._make("call.end", "POST", f"/calls/{id}/end", EndCall(id))

    # Requests

    async def _edit(
        self, action: str, method: str, path: str, effect: Effect, body: Any = None, *, at: str | None = None
    ) -> _Answer:
        """Change a resource that is there, or make it. `at` is where it is read, if that is another path."""
        found = await self._ask("GET", at or path)
        if found.status not in (200, 404):
            return found
        match = {"if-match": found.etag} if found.etag else {"if-none-match": "*"}
        return await self._make(action, method, path, effect, body, headers=match)

    async def _make(
        self, action: str, method: str, path: str, effect: Effect | None, body: Any = None, *, headers: Any = None
    ) -> _Answer:
        """Make a change and record it."""
        return await self._ask(method, path, body, headers=headers, change=(action, effect))

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        change: tuple[str, Effect | None] | None = None,
    ) -> _Answer:
        assert self._http is not None
        address = self._rng.choice([each for each in self._addresses if each.is_up] or self._addresses)
        epoch, sent_at = address.epoch(), self._now()
        answer, request_id = _Answer(None, None, None), None
        try:
            async with self._http.request(method, address.url + path, json=body, headers=headers) as response:
                text = await response.read()
                request_id = response.headers.get("x-request-id")
                answer = _Answer(response.status, response.headers.get("etag"), orjson.loads(text or b"null"))
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            pass
        action, effect = change or (f"{method} {path}", None)
        if isinstance(effect, ResetCounters) and answer.status == 200:
            used = sum(each["used"]["input"] + each["used"]["output"] for each in answer.body["quotas"])
            effect = replace(effect, used=used)
        self.changes.append(
            ChangeRecord(
                action,
                effect,
                sent_at,
                self._now(),
                status=answer.status,
                request_id=request_id,
                disturbed=was_down(epoch, address.epoch()),
            )
        )
        return answer


def _path_of(quota: str) -> str:
    return f"/groups/{GROUP}/quotas/{quota.removeprefix(f'{GROUP}/')}"
