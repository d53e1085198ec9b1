"""At most 100 unlisted names of a user and day go into the records (T33)."""

from dataclasses import replace
from pathlib import Path

from proxy.calls.recorded_names import NAMES_OF_A_USER_MAX, RecordedNames, logged_name
from proxy.upstreams import models
from proxy.upstreams.client import Upstreams
from proxy.upstreams.models import ModelLists
from tests.builders import NOON
from tests.calls.test_call import ALICE, OPEN, _call, _snapshot

DAY = 86_400_000


def test_a_user_adds_100_names_a_day(tmp_path: Path) -> None:
    """Further ones are recorded as `other`. Names of the day stay, listed ones do not count, and a new day is new."""
    snapshot, names = _snapshot(tmp_path, OPEN), RecordedNames()
    for number in range(NAMES_OF_A_USER_MAX):
        assert names.name_of(_call(snapshot, f"m{number}"), NOON) == f"m{number}"
    last = _call(snapshot, "one-more")
    assert names.name_of(last, NOON) == "other"
    assert names.name_of(_call(snapshot, "m7"), NOON) == "m7"
    assert names.name_of(_call(snapshot, "fast"), NOON) == "fast"
    bob = replace(last, caller=ALICE._replace(user="bob"))
    assert names.name_of(bob, NOON) == "one-more"
    assert names.name_of(last, NOON + DAY // 2 - 1) == "other"
    assert names.name_of(last, NOON + DAY // 2) == "one-more"  # midnight in UTC


def test_listed_names_do_not_count(tmp_path: Path) -> None:
    """However many there are."""
    many = "".join(f"  n{number}: {{upstream: simulated}}\n" for number in range(NAMES_OF_A_USER_MAX + 1))
    snapshot, names = _snapshot(tmp_path, OPEN.replace("models:\n", "models:\n" + many)), RecordedNames()
    for number in range(NAMES_OF_A_USER_MAX + 1):
        assert names.name_of(_call(snapshot, f"n{number}"), NOON) == f"n{number}"
    assert names.name_of(_call(snapshot, "new"), NOON) == "new"


def test_the_names_of_all_users_are_bounded(tmp_path: Path) -> None:
    """So the memory is, however many users there are."""
    call, names = _call(_snapshot(tmp_path, OPEN), "m"), RecordedNames(names_max=2)
    users = [replace(call, caller=ALICE._replace(user=f"u{number}")) for number in range(3)]
    assert [names.name_of(each, NOON) for each in users] == ["m", "m", "other"]
    assert [names.name_of(each, NOON) for each in users] == ["m", "m", "other"]
    assert names.name_of(users[2], NOON + DAY) == "m"


async def test_the_log_has_only_names_that_are_listed(tmp_path: Path) -> None:
    """In the models, in the quotas of the user's groups, or by the upstream. A pattern lists no name."""
    text = OPEN.replace(
        "groups:\n", "groups:\n  everyone: {quotas: {x: {requests: 9, per: day, models: [plain, 'sk-*']}}}\n"
    )
    snapshot = _snapshot(tmp_path, text)
    lists = ModelLists(Upstreams(), now=lambda: NOON)

    def logged(name: str) -> str:
        return logged_name(name, ALICE, snapshot, lists)

    assert [logged(name) for name in ("fast", "plain")] == ["fast", "plain"]
    assert [logged(name) for name in ("sk-secret", "*", "said-by-the-upstream")] == ["other"] * 3
    upstream = snapshot.catalog.upstreams["simulated"]
    lists._lists["simulated"] = models._List(upstream, {"said-by-the-upstream": None})
    assert logged("said-by-the-upstream") == "said-by-the-upstream"
