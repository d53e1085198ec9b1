"""What is made at run time comes behind the file, which wins."""

import pytest

from proxy.config.loader import load_text
from proxy.config.overlay import MadeGroup, MadePolicy, MadeQuota, overlaid
from proxy.policy.amounts import Measure
from proxy.policy.quota import Globs, Grant
from proxy.policy.windows import Calendar

FILE = """
timezone: Europe/Berlin
week_starts: sunday
upstreams: {simulated: {base_url: "http://127.0.0.1:9"}}
groups:
  staff: {quotas: {daily: {tokens: 200k, per: day}}}
  admins: {unlimited: true}
users:
  alice: {groups: [staff]}
  bob: {}
"""
WEEKLY = {"requests": 10, "per": "week"}


@pytest.fixture
def file():
    return load_text(FILE)


def test_a_file_without_additions_is_in_force_as_it_is(file):
    assert overlaid(file, MadePolicy()).config is file


def test_made_groups_come_behind_those_of_the_file_in_their_own_order(file):
    made = MadePolicy((MadeGroup("lab", ("o3",)), MadeGroup("art", unlimited=True)))
    found = overlaid(file, made)
    groups = found.config.policy.groups
    assert list(groups) == ["staff", "admins", "lab", "art"]
    assert (groups["lab"].models, groups["lab"].unlimited) == (Globs(["o3"]), False)
    assert groups["art"].unlimited
    assert found.without_effect == ()


def test_a_made_quota_of_a_group_of_the_file_comes_behind_its_own_with_the_files_calendar(file):
    found = overlaid(file, MadePolicy(quotas=(MadeQuota("staff", "weekly", WEEKLY),)))
    daily, weekly = found.config.policy.groups["staff"].quotas
    assert (daily.id, weekly.id) == ("staff/daily", "staff/weekly")
    assert weekly.per == Calendar("week", file.policy.zone, 6)
    assert weekly.limits[0].measure is Measure.REQUESTS


@pytest.mark.parametrize(
    ("made", "id", "why"),
    [
        (MadePolicy((MadeGroup("staff"),)), "staff", "the file has a group"),
        (MadePolicy(quotas=(MadeQuota("staff", "daily", WEEKLY),)), "staff/daily", "the file has a quota"),
        (MadePolicy(quotas=(MadeQuota("gone", "daily", WEEKLY),)), "gone/daily", "there is no group"),
        (MadePolicy(quotas=(MadeQuota("admins", "daily", WEEKLY),)), "admins/daily", "is unlimited"),
        (MadePolicy(quotas=(MadeQuota("staff", "new", {"calls_at_once": 3, "per": "day"}),)), "staff/new", "accept"),
    ],
)
def test_what_does_not_fit_the_file_has_no_effect_and_says_why(file, made, id, why):
    found = overlaid(file, made)
    [problem] = found.without_effect
    assert problem.id == id
    assert why in problem.reason
    assert found.config.policy.groups == file.policy.groups


def test_users_of_the_file_can_be_in_made_groups(file):
    made = MadePolicy((MadeGroup("lab"),), groups_of={"alice": ("lab",), "bob": ("lab", "gone", "everyone")})
    users = {user.name: user.groups for user in overlaid(file, made).config.users}
    assert users == {"alice": ("staff", "lab"), "bob": ("lab",)}


def test_grants_are_found_by_quota_and_user(file):
    grants = [
        Grant("g1", "staff/daily", "alice", Measure.TOKENS, 10, 99),
        Grant("g2", "staff/daily", None, Measure.TOKENS, 20, 99),
        Grant("g3", "staff/daily", "alice", Measure.REQUESTS, 30, 99),
    ]
    found = overlaid(file, MadePolicy(grants=tuple(grants)))
    assert found.config.policy.grants == {"staff/daily": {"alice": (grants[0], grants[2]), None: (grants[1],)}}


def test_the_hash_names_what_is_in_force_and_not_grants(file):
    """Grants end by the clock: a process that starts later has not loaded those that have ended."""
    lab, staff = MadePolicy((MadeGroup("lab"),)), MadePolicy((MadeGroup("lab", created_at=5, created_by="x"),))
    other = MadePolicy((MadeGroup("lab", unlimited=True),))
    hashes = [overlaid(file, made).config.policy.hash for made in (MadePolicy(), lab, staff, other)]
    assert hashes[0] == file.policy.hash
    assert hashes[1] == hashes[2]
    assert len({hashes[0], hashes[1], hashes[3]}) == 3
    granted = MadePolicy((MadeGroup("lab"),), grants=(Grant("g", "staff/daily", None, Measure.TOKENS, 1, 9),))
    assert overlaid(file, granted).config.policy.hash == hashes[1]
