"""What a file would change, without changing anything and without reading a secret.

References such as `${NAME}` are not resolved, because a client could read the environment and the files of the
server through them. Where a value with a reference must be of some kind, such as a number, a value of that kind
stands for it, and `not_checked` names its place.
"""

import asyncio
from dataclasses import dataclass

from proxy.administration.effects import Effects, effects_of
from proxy.administration.policy_rows import read_made
from proxy.config.lint import warnings
from proxy.config.loader import BadConfig, Config
from proxy.config.overlay import overlaid
from proxy.config.unresolved import load_unresolved
from proxy.identity.database import DirectoryDatabase

_NAMES_MAX = 1000


@dataclass(frozen=True, slots=True)
class Mistake:
    """A mistake or a warning, with its line, counted from 1."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class PolicyCheck:
    """What a file would do if it were in force. With mistakes it can't be, and nothing else is said.

    - `not_checked`: the places of references whose values must be of some kind.
    - `groups_*`, `quotas_*`, `users_*`: names that would come, go, or change. A quota that goes has counters that
      stay until their windows end; one that comes starts at what its counters have.
    - `without_effect`: what was made at run time and would have no effect, with the reason.
    """

    mistakes: tuple[Mistake, ...] = ()
    warnings: tuple[Mistake, ...] = ()
    not_checked: tuple[str, ...] = ()
    groups_added: tuple[str, ...] = ()
    groups_removed: tuple[str, ...] = ()
    quotas_added: tuple[str, ...] = ()
    quotas_removed: tuple[str, ...] = ()
    quotas_changed: tuple[str, ...] = ()
    users_added: tuple[str, ...] = ()
    users_removed: tuple[str, ...] = ()
    without_effect: dict[str, str] | None = None
    effects: Effects | None = None


async def check_policy(text: str, file: Config, database: DirectoryDatabase, *, now: int) -> PolicyCheck:
    """What this text would change in place of `file`, the one in force. `now` is in ms. Raises StoreUnavailable."""
    try:
        new, not_checked = await asyncio.to_thread(load_unresolved, text)
    except BadConfig as error:
        return PolicyCheck(tuple(Mistake(each.line, each.text) for each in error.mistakes))
    found = await asyncio.to_thread(warnings, new, now)
    async with database.read() as connection:
        made = await read_made(connection, now)
        was, will = await asyncio.to_thread(lambda: (overlaid(file, made), overlaid(new, made)))
        effects, _ = await effects_of(connection, was.config, will.config, now=now)
    before, after = was.config.policy.groups, will.config.policy.groups
    quotas = (was.config.policy.quotas, will.config.policy.quotas)
    users = [{user.name for user in config.users} for config in (file, new)]
    return PolicyCheck(
        warnings=tuple(Mistake(each.line, each.text) for each in found),
        not_checked=not_checked,
        groups_added=_names(after.keys() - before.keys()),
        groups_removed=_names(before.keys() - after.keys()),
        quotas_added=_names(quotas[1].keys() - quotas[0].keys()),
        quotas_removed=_names(quotas[0].keys() - quotas[1].keys()),
        quotas_changed=_names({id for id, quota in quotas[1].items() if quotas[0].get(id, quota) != quota}),
        users_added=_names(users[1] - users[0]),
        users_removed=_names(users[0] - users[1]),
        without_effect={each.id: each.reason for each in will.without_effect},
        effects=effects,
    )


def _names(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names)[:_NAMES_MAX])
