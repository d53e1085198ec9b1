"""Which name of a model goes into the record of a call, and which into the log.

With an open list of models clients may make up any number of names, and each would have a row in the sums of each
day. So a user may add 100 names a day, and further ones are recorded as `other`. Quotas still go by the true name.

The log is kept in more places than the database, and a client may have written a key or a prompt as the name. So the
log has only names that the configuration or an upstream lists, and `other` for all others. A name that a pattern such
as `gpt-*` matches is not listed by it: anything may follow `gpt-`.
"""

from proxy.calls.call import Call
from proxy.identity.authentication import Caller, Snapshot
from proxy.upstreams.models import ModelLists

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
        if call.is_listed:
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


def logged_name(name: str, caller: Caller, snapshot: Snapshot, lists: ModelLists) -> str:
    """The model's name in the log if a client wrote `name`: that of a listed model, else `other`."""
    catalog = snapshot.catalog
    model = catalog.model(name)
    if model is None or catalog.lists(model.name):
        return OTHER if model is None else model.name
    spellings = model.spellings or (model.name,)
    listed = [lists.known(target.upstream) for target in model.targets]
    configured = snapshot.policy.model_names(caller.groups)
    is_listed = any(each in names for each in spellings for names in (*listed, configured))
    return model.name if is_listed else OTHER
