"""What the resources of the admin API have in common."""

from collections.abc import Callable
from typing import Any

from proxy.administration.change import Changes, NotFound
from proxy.administration.directory import DirectoryAdministration
from proxy.administration.records import UserRecord
from proxy.config.reload import Policies
from proxy.identity.authentication import Snapshot
from proxy.identity.database import DirectoryDatabase
from proxy.identity.directory import UserId
from proxy.policy.policy import DEFAULT, EVERYONE
from proxy.web.admin.operations import AdminRequest


class Resource:
    """A resource. `now` gives ms since 1970, by the ledger's clock."""

    def __init__(self, policies: Policies[Snapshot], database: DirectoryDatabase, *, now: Callable[[], int]) -> None:
        self._policies = policies
        self._database = database
        self._now = now

    def _changes(self, request: AdminRequest[Any, Any]) -> Changes:
        """What makes the changes of this request."""
        return Changes(self._database, request.author, self._now, request.conditions)

    def _directory(self, request: AdminRequest[Any, Any]) -> DirectoryAdministration:
        """What makes its changes of users and keys."""
        snapshot = self._policies.current
        return DirectoryAdministration(
            self._changes(request),
            snapshot.file,
            group_names=tuple(snapshot.policy.groups),
            source_names=snapshot.source_names,
            file_group_names=tuple(self._policies.file.policy.groups),
        )

    def _user_of(self, request: AdminRequest[Any, Any]) -> tuple[DirectoryAdministration, UserId]:
        """The same, and the user in the path."""
        directory = self._directory(request)
        return directory, directory.resolve(request.path["user"])

    async def _visible(self, request: AdminRequest[Any, Any], identity: UserId) -> UserRecord:
        """This user. Raises NotFound, also if a manager asks for a user of none of its groups, with the same text."""
        directory = self._directory(request)
        if request.groups is None:
            return await directory.user(identity)
        try:
            user = await directory.user(identity)
        except NotFound:
            user = None
        # Whoever manages everyone or default may see all, because they apply without being listed.
        if user is None or {*user.groups, EVERYONE, DEFAULT}.isdisjoint(request.groups):
            raise NotFound("user", f"there is no user {identity.subject} in your groups")
        return user
