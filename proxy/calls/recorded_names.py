"""Which name of a model goes into the record of a call.

With an open list of models clients may make up any number of names, and each would have a row in the sums of each
day. So a user may add 100 names a day, and further ones are recorded as `other`. Quotas still go by the true name.
"""

from proxy.calls.call import Call

NAMES_OF_A_USER_MAX = 100
# All users together, so that the memory is bounded: about 8 MB of hashes.
NAMES_MAX = 100_000
OTHER = "other"
_DAY_MS = 86_400_000


class RecordedNames:
    """The unlisted names that each user has used today (UTC, as the sums of the records), as one process has seen it.

    It keeps hashes and not the names, which may be long. Python's hashes of texts are secret, so no client can find
    two names with the same one. `names_max` bounds the names of all users together.
    """

    def __init__(self, *, names_max: int = NAMES_MAX) -> None:
        self._names_max = names_max
        self._day = 0
        self._names: dict[str, set[int]] = {}
        self._count = 0

    def name_of(self, call: Call, now: int) -> str:
        """The model's name in the record of a call that begins at `now` (ms)."""
        name = call.model.name
        if call.catalog.lists(name):
            return name
        if now // _DAY_MS != self._day:
            self._day, self._names, self._count = now // _DAY_MS, {}, 0
        names = self._names.setdefault(call.caller.user, set())
        key = hash(name)
        if key not in names:
            if len(names) >= NAMES_OF_A_USER_MAX or self._count >= self._names_max:
                return OTHER
            names.add(key)
            self._count += 1
        return name
