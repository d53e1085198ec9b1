"""A key that is limited to groups, models or networks never lets its owner do more than without it (T138)."""

import asyncio
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.config.loader import Config, FileUser
from proxy.config.values import digest
from proxy.errors import InvalidKey
from proxy.identity.authentication import Authentication, Caller
from proxy.identity.directory import FileDirectory
from proxy.policy.admission import Admitted, decide
from proxy.policy.amounts import Uses
from proxy.policy.key import Key
from proxy.policy.policy import Group, Policy
from proxy.policy.quota import Globs
from tests.builders import DAY, NOON, directory_of, quota, snapshot_of
from tests.random_rules import counters_of, demands
from tests.stage import STAFF, config_of

KEY = "key-of-alice-0123456789abcdef"
MODELS = ["fast", "gpt-4o", "o3"]
lists = st.lists(st.sampled_from([*MODELS, "gpt-*", "*"]), min_size=1, max_size=2).map(Globs)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Up to five groups with lists of models, quotas on some models, or no limits."""
    found = {}
    for name in draw(st.lists(st.sampled_from(["everyone", "default", "a", "b", "c"]), unique=True)):
        unlimited = name != "everyone" and draw(st.sampled_from([False] * 4 + [True]))
        quotas = tuple(
            quota(
                f"{name}/q{number}",
                models=draw(lists).texts,
                shared=draw(st.booleans()),
                enforce=draw(st.sampled_from(["exact", "after", "shadow"])),
                **draw(st.dictionaries(st.sampled_from(["tokens", "requests"]), st.integers(0, 50), min_size=1)),
            )
            for number in range(0 if unlimited else draw(st.integers(0, 2)))
        )
        found[name] = Group(name, quotas, draw(st.none() | lists), unlimited)
    combine = draw(st.sampled_from(["any_group", "every_group"]))
    return Policy(found, combine=combine, unmatched=draw(st.sampled_from(["refuse", "allow"])))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Any valid config; the tests replace its policy."""
    return config_of(STAFF, folder=tmp_path_factory.mktemp("config"), upstream="http://127.0.0.1:1/v1")


@given(data=st.data(), policy=policies(), model=st.sampled_from(MODELS))
def test_a_limited_key_admits_only_what_its_owner_may(config, data, policy, model):
    """T138: with either `combine`, `unmatched: allow`, a default group, and lists of models of groups and keys."""
    own = tuple(name for name in policy.groups if name not in ("everyone", "default") and data.draw(st.booleans()))
    limits = data.draw(st.none() | st.lists(st.sampled_from(["a", "b", "c", "default", "everyone"]), min_size=1))
    key = Key("k", groups=None if limits is None else tuple(limits), models=data.draw(st.none() | lists))
    snapshot = replace(snapshot_of(config), policy=policy)
    free, limited = (Caller("alice", own, each, "file") for each in (Key("free"), key))
    uses = data.draw(st.sampled_from([Uses.INPUT_AND_OUTPUT, Uses.REQUEST, Uses.OUTPUT]))
    assert snapshot.may_use(free, model) or not snapshot.may_use(limited, model)
    bound, narrowed = (snapshot.binding(caller, model, uses) for caller in (free, limited))
    if narrowed is None:
        return
    assert bound is not None
    demand, used = data.draw(demands()), data.draw(counters_of(bound.for_user("alice")))
    if isinstance(decide(demand, narrowed.for_user("alice"), used, NOON), Admitted):
        assert isinstance(decide(demand, bound.for_user("alice"), used, NOON), Admitted)


def test_the_models_of_a_key_are_an_own_list(tmp_path: Path):
    """Beside those of the groups. Both must have the model."""
    snapshot = snapshot_of(config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1"))
    for models, served in ((["fast"], True), (["f*"], True), (["gpt-4o-mini"], False), (["o3"], False)):
        caller = Caller("alice", ("staff",), Key("k", models=Globs(models)), "file")
        assert snapshot.serves(caller, "fast") is served


def identify(key: Key, groups: tuple[str, ...] = ("staff", "lab"), address: str | None = "10.0.0.7") -> Caller:
    file = FileDirectory([FileUser("alice", groups, {digest(KEY): key})])
    authentication = Authentication(file, directory_of(), group_names=["staff", "lab"], now=lambda: NOON)
    return asyncio.run(authentication.identify(CIMultiDict({"api-key": KEY}), "192.0.2.1", address))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (Key("k", expires_at=NOON), "expired"),
        (Key("k", revoked_at=NOON), "revoked"),
        (Key("k", networks=(ip_network("10.0.1.0/24"),)), "wrong network"),
        (Key("k", networks=(ip_network("192.0.2.0/24"),)), "wrong network"),
        (Key("k", groups=("admins",)), "its user is in none of its groups"),
    ],
)
def test_a_key_that_is_not_valid_here_and_now_is_a_401(key, reason):
    """T6: the log says why, and the answer is that for an unknown key. The address of the client counts."""
    with pytest.raises(InvalidKey) as refused:
        identify(key)
    with pytest.raises(InvalidKey) as unknown:
        asyncio.run(
            Authentication(FileDirectory([]), directory_of(), group_names=[], now=lambda: NOON).identify(
                CIMultiDict({"api-key": KEY}), "192.0.2.1", "192.0.2.1"
            )
        )
    assert refused.value.reason == reason
    assert refused.value.body() == unknown.value.body()


def test_a_valid_key_has_the_groups_of_its_owner():
    """They are narrowed when quotas are looked up, because all of them decide which quotas there are."""
    key = Key("k", groups=("lab", "admins"), networks=(ip_network("10.0.0.0/8"),), expires_at=NOON + DAY)
    assert identify(key) == Caller("alice", ("staff", "lab"), key, "file")
    for address in ("::ffff:10.0.0.7", "10.255.0.1"):
        assert identify(key, address=address).user == "alice"
    for elsewhere in (None, "", "box", "10.0.0.7:80"):
        with pytest.raises(InvalidKey):
            identify(key, address=elsewhere)
