"""A user is identified by one exact key in one of three headers. Anything else is a 401 (T1 to T4, T8)."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.config.loader import FileUser
from proxy.config.values import digest
from proxy.errors import InvalidKey
from proxy.identity.authentication import Authentication, Caller, Snapshot
from proxy.identity.directory import Directory, FileDirectory, OwnedKey, User, UserId
from proxy.identity.keys import NewKey, presented_key
from proxy.policy.key import Key
from tests.builders import NOON, directory_of
from tests.stage import STAFF, config_of, key_of

KEY = "sk-alice-0123456789abcdefghijklmnop"
ADMIN_KEY = "sk-admin-0123456789abcdefghijklmnop"
OTHER_KEY = "sk-other-0123456789abcdefghijklmnop"

PEER = "192.0.2.7"
ALICE_KEY = Key(digest(KEY)[:8])
ALICE = Caller("alice", ("staff",), ALICE_KEY, source="file")
ALICE_OF_FILE = FileUser("alice", ("staff",), {digest(KEY): ALICE_KEY})


def authentication(*users: FileUser, directory: Directory) -> Authentication:
    return Authentication(FileDirectory(users), directory, group_names=["staff"], now=lambda: NOON)


DELETED = NewKey("testtest22", "lqp_testtest22_abcdefghabcdefghabcdefghabcdefghb7Fzdc")
DELETED_KEY = DELETED.text
AUTHENTICATION = authentication(
    ALICE_OF_FILE,
    directory=directory_of(keys={DELETED.digest: OwnedKey(Key(DELETED.id), UserId("database", "bob"))}),
)

Headers = list[tuple[str, str]]


def identify(headers: Headers, authentication: Authentication = AUTHENTICATION) -> Caller:
    return asyncio.run(authentication.identify(CIMultiDict(headers), PEER, PEER))


def refused(headers: Headers) -> InvalidKey:
    """The 401 that these headers get."""
    with pytest.raises(InvalidKey) as caught:
        identify(headers)
    return caught.value


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {KEY}")],
        [("authorization", f"bearer {KEY}")],
        [("AUTHORIZATION", f"BEARER {KEY}")],
        [("Authorization", f" Bearer {KEY}\t ")],
        [("api-key", KEY)],
        [("Api-Key", f" {KEY} ")],
        [("x-api-key", KEY)],
        [("X-Api-Key", KEY)],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", KEY)],
        [("Authorization", f"Bearer {KEY}"), ("api-key", KEY), ("x-api-key", KEY)],
        [("Host", "localhost"), ("Cookie", f"key={OTHER_KEY}"), ("Authorization", f"Bearer {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", "")],
        [("Authorization", "Bearer "), ("api-key", KEY)],
    ],
)
def test_a_key_is_read_from_each_of_its_headers(headers):
    """`Authorization: Bearer`, `api-key` and `x-api-key`, in any case; also in several of them, with the same key."""
    assert identify(headers) == ALICE


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Host", "localhost")],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer    ")],
        [("api-key", "")],
        [("x-api-key", "  ")],
        [("Authorization", KEY)],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Token {KEY}")],
        [("Authorization", f"Bearer\t{KEY}")],
        [("Authorization", f"Bearer{KEY}")],
        [("Authorization", f"Bearer,{KEY}")],
        [("Proxy-Authorization", f"Bearer {KEY}")],
        [("X-Authorization", f"Bearer {KEY}")],
        [("api_key", KEY)],
        [("openai-api-key", KEY)],
        [("Cookie", f"api-key={KEY}")],
        [("x-original-url", f"/v1/models?api_key={KEY}")],
    ],
)
def test_without_a_key_the_answer_says_how_to_send_one(headers):
    """No key, an empty one, another scheme or another header: a 401 that names the three headers."""
    error = refused(headers)
    assert "You didn't send an API key" in error.message
    for name in ("Authorization: Bearer", "api-key", "x-api-key"):
        assert name in error.message


@pytest.mark.parametrize(
    "key",
    [
        "x",
        KEY[:-1],
        KEY + "1",
        KEY[1:],
        "x" + KEY,
        KEY[:20] + "x" * (len(KEY) - 20),  # the same first twenty characters
        KEY.upper(),
        KEY.title(),
        KEY.replace("0", "O"),
        KEY + ",",
        f'"{KEY}"',
        f"Bearer {KEY}",
        f"{KEY} {KEY}",
        f"{KEY},{KEY}",
        digest(KEY),
        f"sha256:{digest(KEY)}",
        DELETED_KEY,  # a digest whose user does not exist any more
        ADMIN_KEY,
        "alice",
        "' OR 1=1 --",
        "%",
        "_" * len(KEY),
        "%s%n{0}{key}",
        '{"$gt": ""}',
        "null",
        "undefined",
        "\x00",
        KEY + "\x00",
        KEY[:5] + "\x00" + KEY[5:],
        KEY + "é",
        KEY.replace("a", "а"),  # noqa: RUF001 — the second is the Cyrillic letter
        "\udcff\udc80",
        KEY + "\udcff",
        "x" * 16_000,
    ],
)
@pytest.mark.parametrize("header", ["authorization", "api-key", "x-api-key"])
def test_a_wrong_key_matches_no_user(header, key):
    """T4: a character more or less, another case, a digest, SQL, wildcards, bytes that are not text: always a 401."""
    error = refused([(header, f"Bearer {key}" if header == "authorization" else key)])
    assert error.status == 401
    assert error.code == "invalid_api_key"
    assert "not known here" in error.message


def test_the_answer_does_not_repeat_the_key():
    """A wrong key is often a right one with a typing error, so it must not be in a message or a log (T8 to T10)."""
    for headers in ([("api-key", KEY + "1")], [("api-key", KEY), ("x-api-key", OTHER_KEY)]):
        error = refused(headers)
        for key in (KEY, OTHER_KEY):
            assert key[:12] not in f"{error!r} {error} {error.body()} {error.headers} {error.param}"


def test_unknown_keys_and_keys_of_deleted_users_get_the_same_answer():
    """T6: a client that tries keys cannot tell a key that once worked from one that never did."""
    assert refused([("api-key", DELETED_KEY)]).body() == refused([("api-key", OTHER_KEY)]).body()


@pytest.mark.parametrize(
    "blank", ["\u00a0", "\u0085", "\u2003", "\u3000", "\x0b", "\x0c", "\x1c", "\x1f", "\n", "\r\n"]
)
@pytest.mark.parametrize("header", ["authorization", "api-key", "x-api-key"])
def test_only_spaces_and_tabs_are_stripped(header, blank):
    """Control and non-ASCII characters around a key make it another key, which matches no user (T2)."""
    prefix = "Bearer " if header == "authorization" else ""
    refused([(header, f"{prefix}{KEY}{blank}")])
    refused([(header, f"{prefix}{blank}{KEY}")])


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", OTHER_KEY)],
        [("Authorization", f"Bearer {OTHER_KEY}"), ("x-api-key", KEY)],
        [("api-key", KEY), ("x-api-key", OTHER_KEY)],
        [("api-key", KEY), ("api-key", OTHER_KEY)],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER_KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("api-key", KEY.upper())],
        [("Authorization", f"Bearer {KEY}"), ("api-key", KEY), ("x-api-key", ADMIN_KEY)],
    ],
)
def test_two_different_keys_are_refused(headers):
    """The proxy cannot know which one is meant, so it takes neither, in whatever order they come."""
    for order in (headers, headers[::-1]):
        assert "two different API keys" in refused(order).message
        with pytest.raises(InvalidKey):
            presented_key(CIMultiDict(order))


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer " + "x" * 100_000)],
        [("x-api-key", KEY + "x" * 100_000)],
        [("Authorization", f"Bearer {KEY}"), ("x-api-key", "x" * 100_000)],
        [("Authorization", "Bearer " + "x" * 100_000), ("api-key", KEY)],
    ],
)
def test_a_key_that_is_too_long_is_refused_also_beside_a_right_one(headers):
    """100 KB are no user's key. Beside a right key they are a second, different key (T2)."""
    refused(headers)


@pytest.mark.parametrize(
    "other", [f"Basic {KEY}", "Basic dXNlcjpwYXNz", "Negotiate abc", f"Bearer\t{OTHER_KEY}", OTHER_KEY]
)
def test_two_authorization_headers_that_differ_are_a_401(other):
    """Only one is allowed: a server in front of the proxy may have read the other one (T2)."""
    headers = [("Authorization", other), ("Authorization", f"Bearer {KEY}")]
    refused(headers)
    refused(headers[::-1])


@given(key=st.text(st.characters(exclude_categories=()), max_size=60))
def test_no_text_but_the_key_itself_matches(key):
    """T3: any other text, lone surrogates included, is a 401 and never another exception (T2)."""
    if key.strip() == KEY:
        return
    for header in ("authorization", "api-key"):
        refused([(header, f"Bearer {key}" if header == "authorization" else key)])


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(["authorization", "api-key", "X-Api-Key", "cookie"]),
            st.sampled_from([KEY, OTHER_KEY, f"Bearer {KEY}", f"Bearer {OTHER_KEY}", "Basic x", "", "Bearer"]),
        ),
        max_size=4,
    )
)
def test_any_combination_of_headers_is_alice_or_a_401(headers):
    """A request that is identified contains Alice's key and no other one."""
    try:
        caller = identify(headers)
    except InvalidKey:
        return
    sent = {value.removeprefix("Bearer ") for name, value in headers if name != "cookie"}
    assert caller == ALICE
    assert KEY in sent
    assert not any(value.endswith(OTHER_KEY) and name in ("api-key", "X-Api-Key") for name, value in headers)


def test_the_text_of_what_identifies_has_no_digests():
    """A snapshot or a caller in a traceback or a log reveals neither keys nor their hashes."""
    shown = f"{AUTHENTICATION!r} {identify([('api-key', KEY)])!r} {ALICE_OF_FILE!r}"
    assert digest(KEY) not in shown
    assert digest(ADMIN_KEY) not in shown


# ------------------------------------------------------------------------------------------------------ the directory


def test_a_directory_knows_users_by_name_and_by_each_of_their_keys():
    """A user may have several keys, or none."""
    ann, bob = UserId("file", "ann"), UserId("file", "bob")
    keys = {"1": Key("1"), "2": Key("2")}
    directory = FileDirectory([FileUser("ann", ("a", "b"), keys), FileUser("bob")])
    assert directory.user("ann") == User(ann, ("a", "b"))
    assert directory.user("bob") == User(bob)
    assert directory.user("zoe") is None
    found = [directory.key(digest) for digest in ("1", "2", "3", "ann")]
    assert found == [OwnedKey(keys["1"], ann), OwnedKey(keys["2"], ann), None, None]


async def test_a_snapshot_has_the_users_the_policy_and_the_models_of_one_file(tmp_path: Path):
    """The caller's groups are groups of the snapshot's policy."""
    config = config_of(STAFF, folder=tmp_path, upstream="http://127.0.0.1:1/v1")
    snapshot = Snapshot.of(config, directory_of(), lambda: NOON)
    caller = await snapshot.authentication.identify(CIMultiDict({"api-key": key_of("bob")}), PEER, PEER)
    assert (caller.user, caller.groups) == ("bob", ("staff",))
    assert snapshot.policy is config.policy
    assert snapshot.catalog is config.catalog
    assert snapshot.serves(caller, "fast")
