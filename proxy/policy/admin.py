"""Who administers the proxy: a name, a role, and for a manager the groups that it is for. Pure."""

from dataclasses import dataclass
from typing import Literal

# administrator: sees and changes everything. viewer: sees everything. manager: sees the quotas, counters and calls of
# some groups, resets counters, and gives grants up to a share of a limit.
Role = Literal["administrator", "viewer", "manager"]

# How much the grants that run at a time may add to a limit if a manager's key does not say it, in percent.
GRANT_UP_TO = 100


@dataclass(frozen=True, slots=True)
class Admin:
    """The owner of an admin key.

    `groups` are the names of a manager's groups; other roles have none. `grant_up_to` is how much the grants that run
    at a time may add to a limit, in percent of it; it binds managers alone.
    """

    name: str
    role: Role = "administrator"
    groups: tuple[str, ...] = ()
    grant_up_to: int = GRANT_UP_TO

    @property
    def restricted_to(self) -> tuple[str, ...] | None:
        """The groups of which this admin sees something; None: all."""
        return self.groups if self.role == "manager" else None
