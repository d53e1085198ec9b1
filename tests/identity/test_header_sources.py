"""A trusted UI or proxy names the user in headers: never somebody else, never a user of the file (T133 to T139)."""

import asyncio
import base64
import hashlib
import hmac
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.config.loader import FileUser, HeaderSource, SignedHeader
from proxy.config.values import digest
from proxy.errors import DirectoryUnavailable, InvalidKey, InvalidRequest
from proxy.identity.authentication import Authentication, Caller, HeaderSources
from proxy.identity.directory import Directory, FileDirectory, OwnedKey, User, UserId
from proxy.policy.catalog import Secret
from proxy.policy.key import Key
from tests.builders import NOON, DirectoryStoreOf

KEY = "key-of-the-source-0123456789abcdef"
ALICE_KEY = "key-of-alice-0123456789abcdef"
SECRET = "a-secret-of-32-characters-to-sign"
PEER, ELSEWHERE = "10.0.3.7", "10.0.4.7"
ALICE = FileUser("alice", ("admins", "staff"), {digest(ALICE_KEY): Key("alicekey")}, (("webui", "uuid-of-alice"),))

SOURCE = HeaderSource(
    Key("webui", "webui"),
    digest(KEY),
    networks=(ip_network("10.0.3.0/24"),),
    user="x-user",
    email="x-email",
    groups="x-groups",
    map={"7f3c": "staff", "9a01": "lab"},
    unmapped="guests",
)
SIGNED = replace(SOURCE, signed=SignedHeader("x-jwt", Secret(SECRET), "open-webui"))
NOW_S = NOON // 1000
CLAIMS = {"sub": "u1", "email": "u1@x.example", "name": "U", "role": "admin", "iss": "open-webui"}
TIMES = {"iat": NOW_S, "exp": NOW_S + 300}

Headers = list[tuple[str, str]]


class Door:
    """An Authentication with one source, alice in the file, and these users in the database."""

    def __init__(self, source: HeaderSource = SOURCE, *users: User, linked: dict[UserId, User] | None = None) -> None:
        self.store = DirectoryStoreOf(users)
        self.store.users.update(linked or {})
        self.ignored: list[str] = []
        self.authentication = Authentication(
            FileDirectory([ALICE]),
            Directory(self.store, clock=lambda: 0.0, now=lambda: NOON),
            group_names=["everyone", "admins", "staff", "default", "lab", "guests"],
            now=lambda: NOON,
            sources=HeaderSources([source], on_ignored=self.ignored.append),
        )

    def caller(self, *headers: tuple[str, str], key: str = KEY, peer: str | None = PEER) -> Caller:
        sent = [("authorization", f"Bearer {key}"), *headers]
        return asyncio.run(self.authentication.identify(CIMultiDict(sent), peer, peer))

    def refused(self, *headers: tuple[str, str], key: str = KEY, peer: str | None = PEER) -> InvalidKey:
        with pytest.raises(InvalidKey) as caught:
            self.caller(*headers, key=key, peer=peer)
        assert caught.value.status == 401
        return caught.value


def token(claims: dict[str, Any] | None = None, *, secret: str = SECRET, head: dict[str, Any] | None = None) -> str:
    """A token as Open WebUI makes it, signed by hand, so that any nonsense can be signed."""
    parts = [head or {"alg": "HS256", "typ": "JWT"}, {**CLAIMS, **TIMES, **(claims or {})}]
    return signed_text(*(json.dumps(part).encode() for part in parts), secret=secret)


def signed_text(head: bytes, body: bytes, *, secret: str = SECRET) -> str:
    start = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (head, body))
    signature = hmac.digest(secret.encode(), start, hashlib.sha256)
    return b".".join([start, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


# ----------------------------------------------------------------------------------------------------- plain headers


def test_the_headers_name_the_user():
    """The user's subject has the source in front, the key is the source's own, and the email goes to the database."""
    door = Door()
    caller = door.caller(("X-User", "u1"), ("X-Email", "u1@x.example"), ("x-groups", "9a01, 7f3c"))
    assert caller == Caller("webui:u1", ("staff", "lab"), SOURCE.key, source="webui")
    assert door.store.users == {UserId("webui", "u1"): User(UserId("webui", "u1"), email="u1@x.example")}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("", ("guests",)),
        ("7f3c", ("staff",)),
        ("7f3c,7f3c,,  ,", ("staff",)),
        ("7F3C", ("guests",)),
        ("staff", ("guests",)),
        ("admins,lab,everyone,default", ("guests",)),
        ("7f3c;9a01", ("guests",)),
        ("x" * 5000, ("guests",)),
        ("9a01,admins", ("lab",)),
    ],
)
def test_only_mapped_groups_count(groups, expected):
    """T137: a name of a group of the policy is no group of the source, so nobody gets into one by its name."""
    assert Door().caller(("x-user", "u1"), ("x-groups", groups)).groups == expected


def test_without_an_unmapped_group_others_are_refused():
    """T137: unless an administrator gave the user a group. Who is refused gets no row in the database."""
    source = replace(SOURCE, unmapped=None)
    door = Door(source)
    assert door.refused(("x-user", "u1"), ("x-groups", "other")).reason == "no group of the user is in map"
    assert door.refused(("x-user", "u1")).reason == "no group of the user is in map"
    assert door.store.users == {}
    assert door.caller(("x-user", "u1"), ("x-groups", "9a01")).groups == ("lab",)
    given = Door(source, User(UserId("webui", "u1"), ("staff",)))
    assert given.caller(("x-user", "u1")).groups == ("staff",)
    assert given.caller(("x-user", "u1"), ("x-groups", "9a01")).groups == ("staff", "lab")
    ungiven = Door(source, User(UserId("webui", "u1")))
    assert ungiven.refused(("x-user", "u1")).reason == "no group of the user is in map"


def test_groups_of_an_administrator_are_added():
    """To the mapped ones, and beside the group of unmapped users. Others than the policy's are left out."""
    door = Door(SOURCE, User(UserId("webui", "u1"), ("everyone", "admins", "default", "gone")))
    assert door.caller(("x-user", "u1"), ("x-groups", "9a01")).groups == ("admins", "lab")
    assert door.caller(("x-user", "u1")).groups == ("admins", "guests")


def test_an_address_counts_only_if_it_is_verified():
    """T137: whoever can enter another's address at the source would otherwise have that one's groups."""
    source = replace(SOURCE, map={"head@x.example": "staff", "7f3c": "lab"})
    sent = (("x-user", "u1"), ("x-email", "head@x.example"))
    assert Door(source).caller(*sent).groups == ("guests",)
    verified = Door(replace(source, emails_verified=True))
    assert verified.caller(*sent).groups == ("staff",)
    assert verified.caller(("x-user", "u2"), ("x-email", "7f3c")).groups == ("guests",)  # no address
    assert verified.caller(("x-user", "u2"), ("x-email", "HEAD@x.example")).groups == ("guests",)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "user header missing"),
        ([("x-email", "u1@x.example"), ("x-groups", "7f3c")], "user header missing"),
        ([("x-user", "")], "user header empty"),
        ([("x-user", " \t")], "user header empty"),
        ([("x-user", "u1"), ("x-user", "u1")], "user header sent twice"),
        ([("X-User", "u1"), ("x-uSer", "u2")], "user header sent twice"),
        ([("x-user", "u1"), ("x-user", "")], "user header sent twice"),
        ([("x-user", "u" * 257)], "user header too long"),
        ([("x-user", "u1\nx-groups: 7f3c")], "user header not printable"),
        ([("x-user", "u1\r")], "user header not printable"),
        ([("x-user", "u\x001")], "user header not printable"),
        ([("x-user", "u\t1")], "user header not printable"),
        ([("x-user", "u\udcff")], "user header not printable"),
        ([("x-user", "u\u202e1")], "user header not printable"),
        ([("x-user", "u\u2028")], "user header not printable"),
        ([("x-user", "u1\u00a0")], "user header not printable"),
        ([("x-user", "u1"), ("x-email", "a@b"), ("x-email", "c@d")], "email header sent twice"),
        ([("x-user", "u1"), ("x-email", "a\nb")], "email header not printable"),
        ([("x-user", "u1"), ("x-email", "a" * 257)], "email header too long"),
        ([("x-user", "u1"), ("x-groups", "9a01"), ("x-groups", "7f3c")], "groups header sent twice"),
        ([("x-user", "u1"), ("x-groups", "9a01\n7f3c")], "groups header not printable"),
    ],
)
def test_a_damaged_header_is_a_401(headers, reason):
    """T134: the source's key alone is nobody, and a doubled or damaged header names nobody. The log says why."""
    door = Door()
    error = door.refused(*headers)
    assert error.reason == reason
    assert error.body() == door.refused().body()
    assert door.store.users == {}


def test_headers_that_are_optional_may_be_missing_or_empty():
    """A user without a known address, in no group."""
    assert Door().caller(("x-user", "u1"), ("x-email", ""), ("x-groups", "")).groups == ("guests",)
    door = Door(replace(SOURCE, email=None, groups=None))
    assert door.caller(("x-user", "u1"), ("x-groups", "7f3c"), ("x-email", "a@b")).groups == ("guests",)
    assert door.store.users[UserId("webui", "u1")].email is None


IDS = [
    *("alice", "Alice", "file:alice", "database:alice", "webui:u1", ":", "a:b", "/", "a/b", "../a", "a b", "a,b"),
    *(
        "Ærøskøbing",
        "你好",
        "مستخدم",
        "ユーザー",
        "😀",
        "ﬁ",
        "fi",
        "İ",
        "i̇",
        "K",
        "K",
        "ß",
        "ss",
        "%61lice",
        "' OR 1=1",
        "x" * 256,
    ),
    *(unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é"), "root", "null", "0", "00"),
]


def test_ids_are_compared_exactly():
    """T136: equal but for case, Unicode normal form or a prefix: each is a user of its own, and none of the file."""
    door = Door()
    callers = [door.caller(("x-user", id)) for id in dict.fromkeys(IDS)]
    assert len({caller.user for caller in callers}) == len(dict.fromkeys(IDS)) == len(door.store.users)
    for id, caller in zip(dict.fromkeys(IDS), callers, strict=True):
        assert caller.user == f"webui:{id}"
        assert (caller.source, caller.groups) == ("webui", ("guests",))
        assert UserId.of_subject(caller.user) == UserId("webui", id)


@given(id=st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_text_names_its_own_user_or_nobody(id):
    """T136: never alice, and never another exception."""
    door = Door()
    try:
        caller = door.caller(("x-user", id))
    except InvalidKey:
        return
    assert caller.user == "webui:" + id.strip(" \t")


# ------------------------------------------------------------------------------------------------ keys and addresses


def test_with_another_key_the_headers_are_ignored():
    """T133: the caller is the owner of the key, and the request is counted."""
    door = Door()
    caller = door.caller(("x-user", "u1"), ("x-groups", "7f3c"), key=ALICE_KEY)
    assert (caller.user, caller.groups) == ("alice", ("admins", "staff"))
    assert door.ignored == ["other_key"]
    assert door.refused(("x-user", "u1"), key="unknown-key-0123456789abcdef").reason == "unknown"
    assert door.ignored == ["other_key"] * 2
    door.caller(("x-other", "u1"), key=ALICE_KEY)
    assert len(door.ignored) == 2
    assert door.store.users == {}


@pytest.mark.parametrize("peer", [ELSEWHERE, "::1", "", None, "10.0.3.7.1"])
def test_from_elsewhere_the_key_of_a_source_is_refused(peer):
    """T133: with the answer for an unknown key, so that nobody learns that it is right. The peer counts."""
    door = Door()
    error = door.refused(("x-user", "u1"), ("x-forwarded-for", PEER), peer=peer)
    assert error.reason == "wrong network"
    assert error.body() == door.refused(key="unknown-key-0123456789abcdef").body()
    assert door.ignored == ["other_address"]
    assert door.caller(("x-user", "u1"), peer="::ffff:10.0.3.7").user == "webui:u1"
    anywhere = Door(replace(SOURCE, networks=()))
    assert anywhere.caller(("x-user", "u1"), peer=peer).user == "webui:u1"


def test_two_keys_in_a_request_are_refused():
    """T133: also if one is the source's and the other alice's."""
    assert Door().refused(("x-user", "u1"), ("api-key", ALICE_KEY)).reason == "two keys"


NAMES = ["authorization", "api-key", "X-User", "x-user", "x-email", "x-groups", "x-jwt", "x-forwarded-for"]
VALUES = [
    *(f"Bearer {KEY}", KEY, ALICE_KEY, f"Bearer {ALICE_KEY}", PEER, "7f3c", ""),
    *("u1", "alice", "file:alice", "uuid-of-alice"),
    *(token(), token({"sub": "uuid-of-alice"}), token(secret="x" * 32)),
]
HEADER = st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES))


@pytest.mark.parametrize("source", [SOURCE, SIGNED], ids=["plain", "signed"])
@given(headers=st.lists(HEADER, max_size=6), peer=st.sampled_from([PEER, ELSEWHERE]))
def test_no_combination_of_headers_makes_one_user_another(source, headers, peer):
    """T133 to T136: alice is who has her key, or whom the source itself names by her linked id; nobody else is."""
    try:
        caller = asyncio.run(Door(source).authentication.identify(CIMultiDict(headers), peer, PEER))
    except InvalidKey:
        return
    keys = {
        value.removeprefix("Bearer ") for name, value in headers if name in ("authorization", "api-key") and value
    }
    named = [value for name, value in headers if name.lower() == ("x-jwt" if source.signed else "x-user")]
    if caller.key.id == "alicekey":
        assert caller.user == "alice"
        assert ALICE_KEY in keys and KEY not in keys
        return
    assert (caller.key, peer) == (source.key, PEER)
    assert KEY in keys and ALICE_KEY not in keys
    [sent] = named
    id = {token(): "u1", token({"sub": "uuid-of-alice"}): "uuid-of-alice"}[sent] if source.signed else sent
    assert caller.user == ("alice" if id == "uuid-of-alice" else f"webui:{id}")


# ------------------------------------------------------------------------------------------- users and the directory


def test_a_linked_user_is_the_user_of_the_file():
    """With that user's groups and counters, whatever groups the source sends. It needs no row in the database."""
    door = Door()
    caller = door.caller(("x-user", "uuid-of-alice"), ("x-groups", "9a01"))
    assert caller == Caller("alice", ("admins", "staff"), SOURCE.key, source="file")
    assert door.store.users == {}


def test_a_link_by_address_needs_verified_addresses():
    """T136: whoever enters alice's address at the source is not alice, unless the source verifies it."""
    alice = replace(ALICE, identities=(("webui", "alice@x.example"), ("webui", "plain")))
    sent = (("x-user", "u1"), ("x-email", "alice@x.example"))
    for verified, user in ((False, "webui:u1"), (True, "alice")):
        door = Door(replace(SOURCE, emails_verified=verified))
        door.authentication._file = FileDirectory([alice])
        assert door.caller(*sent).user == user
        assert door.caller(("x-user", "u2"), ("x-email", "plain")).user == "webui:u2"
        assert door.caller(("x-user", "u3")).user == "webui:u3"


def test_an_id_in_the_form_of_an_address_is_no_link_by_address():
    """T136: users of many sources choose their own ids, and one of them could choose alice's address."""
    alice = replace(ALICE, identities=(("webui", "alice@x.example"),))
    sent = (("x-user", "alice@x.example"), ("x-email", "eve@x.example"))
    for email, user in (("x-email", "webui:alice@x.example"), (None, "alice")):  # None: its ids are the addresses
        door = Door(replace(SOURCE, emails_verified=True, email=email))
        door.authentication._file = FileDirectory([alice])
        assert door.caller(*sent).user == user


def test_an_administrator_can_link_users_in_the_database():
    """To a user of the database, of the file, or another of the source. The groups are those of the linked user."""
    ann, bob = User(UserId("database", "ann"), ("lab",)), User(UserId("webui", "bob"), ("admins",))
    linked = {
        UserId("webui", "1"): ann,
        UserId("webui", "2"): User(UserId("file", "alice")),
        UserId("webui", "3"): bob,
        UserId("webui", "4"): User(UserId("file", "gone")),
    }
    for source in (SOURCE, replace(SOURCE, unmapped=None)):
        door = Door(source, linked=linked)
        groups = ("x-groups", "7f3c")
        assert door.caller(("x-user", "1"), groups).user == "database:ann"
        assert door.caller(("x-user", "1"), groups).groups == ("lab",)
        assert door.caller(("x-user", "1")).groups == ("lab",)
        assert door.caller(("x-user", "2"), groups).groups == ("admins", "staff")
        assert door.caller(("x-user", "3"), groups).groups == ("admins",)
        assert door.refused(("x-user", "4"), groups).reason == "no such user"


def test_a_disabled_user_is_refused():
    """T6: of the source itself, or the one to whom it is linked."""
    off = User(UserId("webui", "u1"), ("staff",), is_disabled=True)
    linked = {UserId("webui", "u2"): User(UserId("database", "ann"), ("lab",), is_disabled=True)}
    for source in (SOURCE, replace(SOURCE, unmapped=None)):
        door = Door(source, off, linked=linked)
        for user in ("u1", "u2"):
            assert door.refused(("x-user", user), ("x-groups", "7f3c")).reason == "user disabled"
            assert door.refused(("x-user", user)).reason == "user disabled"


def test_the_users_that_a_source_may_add_are_bounded():
    """T139: the next one is refused, and those who are there still call."""
    door = Door(replace(SOURCE, users_max=2))
    for user in ("u1", "u2"):
        door.caller(("x-user", user))
    assert door.refused(("x-user", "u3")).reason == "the source has users_max users"
    assert door.caller(("x-user", "u1")).user == "webui:u1"
    assert len(door.store.users) == 2


def test_without_the_database_only_who_is_in_memory_is_known():
    """A 503, never a 401, because the user may be there."""
    door = Door()
    assert door.caller(("x-user", "u1")).user == "webui:u1"
    assert door.caller(("x-user", "u1")).user == "webui:u1"  # now in memory
    door.store.fails = True
    assert door.caller(("x-user", "u1")).user == "webui:u1"
    with pytest.raises(DirectoryUnavailable):
        door.caller(("x-user", "u2"))
    assert door.caller(("x-user", "uuid-of-alice")).user == "alice"
    assert door.refused().reason == "user header missing"


# --------------------------------------------------------------------------------------------------------------- tag


def tags(key: Key) -> Callable[..., str]:
    file = FileDirectory([FileUser("bob", ("staff",), {digest(ALICE_KEY): key})])
    store = Directory(DirectoryStoreOf(), clock=lambda: 0.0, now=lambda: NOON)
    authentication = Authentication(file, store, group_names=["staff"], now=lambda: NOON)

    def sent(*values: str) -> str:
        headers = [("api-key", ALICE_KEY), *(("X-Quota-Tag", value) for value in values)]
        return asyncio.run(authentication.identify(CIMultiDict(headers), PEER, PEER)).tag

    return sent


def test_a_request_sends_a_tag_if_its_key_allows_it():
    """Else the header is ignored, also a bad one: it says nothing."""
    fixed = tags(Key("k", tag="nightly"))
    for values in ((), ("mine",), ("a", "b"), ("x" * 100,), ("\n",)):
        assert fixed(*values) == "nightly"
    free = tags(Key("k", tag="nightly", takes_tag_header=True))
    assert [free(), free(""), free(" "), free("mine"), free(" é 7 "), free("x" * 64)] == [
        *("nightly", "nightly", "nightly", "mine", "é 7", "x" * 64)
    ]


@pytest.mark.parametrize("values", [("x" * 65,), ("a", "b"), ("a", ""), ("a\nb",), ("\udcff",)])
def test_a_bad_tag_is_a_400(values):
    """T94: a report would be wrong without anybody noticing, and a line end would be a second line of a log."""
    with pytest.raises(InvalidRequest) as caught:
        tags(Key("k", takes_tag_header=True))(*values)
    assert (caught.value.status, caught.value.param) == (400, "X-Quota-Tag")


def test_the_key_of_a_source_has_a_tag_too():
    """So that reports tell a UI's calls from others."""
    door = Door(replace(SOURCE, key=Key("webui", "webui", tag="chat", takes_tag_header=True)))
    assert door.caller(("x-user", "u1")).tag == "chat"
    assert door.caller(("x-user", "u1"), ("x-quota-tag", "title")).tag == "title"


# ----------------------------------------------------------------------------------------------------- signed header


def test_the_signed_header_names_the_user():
    """By the claim `sub`. The role in it counts for nothing."""
    door = Door(SIGNED)
    assert door.caller(("X-Jwt", token())) == Caller("webui:u1", ("guests",), SOURCE.key, source="webui")
    assert door.store.users[UserId("webui", "u1")].email == "u1@x.example"
    assert door.caller(("x-jwt", token({"sub": "uuid-of-alice"}))).user == "alice"


def test_beside_a_signed_header_plain_ones_count_for_nothing():
    """T135: neither alone, nor beside it."""
    door = Door(SIGNED)
    plain = [("x-user", "u2"), ("x-email", "a@b"), ("x-groups", "7f3c")]
    assert door.refused(*plain).reason == "signed header missing"
    assert door.caller(*plain, ("x-jwt", token())) == door.caller(("x-jwt", token()))
    assert door.caller(*plain, *plain, ("x-jwt", token())).user == "webui:u1"


def test_the_claims_can_have_other_names():
    """Also a list of groups, which are mapped as those of a header are."""
    signed = SignedHeader("x-jwt", Secret(SECRET), "open-webui", user="id", email="mail", groups="g")
    door = Door(replace(SIGNED, signed=signed, emails_verified=True, map={"a,b": "lab", "c@d": "staff"}))
    assert door.caller(("x-jwt", token({"id": "u7", "g": ["a,b", "admins"]}))).groups == ("lab",)
    assert door.caller(("x-jwt", token({"id": "u8", "mail": "c@d"}))).groups == ("staff",)
    assert door.caller(("x-jwt", token({"id": "u9", "mail": "", "g": None}))).groups == ("guests",)
    for claims, reason in (
        ({}, "claim of the user missing"),
        ({"id": 7}, "claim of the user not text"),
        ({"id": ["u7"]}, "claim of the user not text"),
        ({"id": ""}, "claim of the user empty"),
        ({"id": "a\nb"}, "claim of the user not printable"),
        ({"id": "a" * 257}, "claim of the user too long"),
        ({"id": "a", "mail": 7}, "claim of the e-mail not text"),
        ({"id": "a", "g": "lab"}, "claim of the groups not a list"),
        ({"id": "a", "g": [7]}, "claim of the groups not a list"),
    ):
        assert door.refused(("x-jwt", token(claims))).reason == reason


def test_a_token_is_valid_for_its_time_with_a_leeway():
    """30 s, because two machines' clocks differ."""
    door = Door(SIGNED)
    for claims in (
        {"iat": NOW_S - 330, "exp": NOW_S - 29},
        {"iat": NOW_S + 30, "exp": NOW_S + 330},
        {"iat": NOW_S, "exp": NOW_S + 3600},
        {"iat": NOW_S - 0.5, "exp": NOW_S + 300.5, "nbf": NOW_S + 30},
    ):
        assert door.caller(("x-jwt", token(claims))).user == "webui:u1"


def without(claim: str) -> str:
    claims = {name: value for name, value in {**CLAIMS, **TIMES}.items() if name != claim}
    return signed_text(b'{"alg":"HS256"}', json.dumps(claims).encode())


def bad_tokens() -> Iterator[tuple[str, str]]:
    head, body, signature = token().split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    yield "", "empty"
    yield "x" * 8193, "too long"
    yield "nonsense", "malformed"
    yield f"{head}.{body}", "malformed"
    yield f"{head}.{body}.", "malformed"
    yield f"{head}.{body}.{signature}.", "malformed"
    yield f"{head}.{body}.{signature}=", "malformed"
    yield f"Bearer {token()}", "malformed"
    yield f"{token()} {token()}", "malformed"
    yield f"{head}.{body}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}", "wrong signature"
    yield f"{none}.{body}.{signature}", "wrong algorithm"
    yield token(secret="another-secret-of-32-characters-.."), "wrong signature"
    for alg in ("none", "None", "HS384", "HS512", "RS256", "ES256", "hs256", ""):
        yield token(head={"alg": alg}), "wrong algorithm"
    yield token(head={"typ": "JWT"}), "wrong algorithm"
    for head_of in ({"kid": "../../dev/null"}, {"jku": "http://x/"}, {"jwk": {"kty": "oct", "k": ""}}):
        yield token({"sub": "u1"}, head={"alg": "HS256", **head_of}, secret="k" * 32), "wrong signature"
    yield token(head={"alg": "HS256", "crit": ["exp"]}), "malformed"
    yield token(head={"alg": "HS256", "b64": False}), "malformed"
    yield token({"exp": NOW_S - 30}), "expired"
    yield token({"exp": 0}), "expired"
    yield token({"exp": -(10**30)}), "no time"
    yield token({"iat": NOW_S + 31, "exp": NOW_S + 300}), "not valid yet"
    yield token({"nbf": NOW_S + 31}), "not valid yet"
    yield token({"exp": NOW_S + 3601}), "valid for too long"
    yield token({"iat": 0}), "valid for too long"
    yield token({"iat": NOW_S + 20, "exp": NOW_S + 10}), "valid for too long"
    yield token({"exp": 10**400}), "no time"
    yield token({"exp": float("inf")}), "no time"
    yield token({"iat": float("nan")}), "no time"
    yield token({"exp": str(NOW_S + 300)}), "no time"
    yield token({"iat": True}), "no time"
    yield token({"nbf": "x"}), "no time"
    yield token({"iss": "another"}), "wrong issuer"
    yield token({"iss": ["open-webui"]}), "wrong issuer"
    yield token({"aud": "another"}), "for another audience"
    for claim in ("exp", "iat", "iss", "sub"):
        yield without(claim), "claim missing"
        yield token({claim: None}), "claim missing"
    for part in (b"[]", b"7", b'"x"', b"\xff", b"", b"{", b"[" * 5000, b'{"a":' * 900, b"1" * 5000):
        yield signed_text(part, json.dumps(CLAIMS).encode()), ""
        yield signed_text(b'{"alg":"HS256"}', part), ""


BAD_TOKENS = list(bad_tokens())


@pytest.mark.parametrize(("sent", "reason"), BAD_TOKENS, ids=[f"{n} {why}" for n, (_, why) in enumerate(BAD_TOKENS)])
def test_a_bad_token_is_a_401(sent, reason):
    """T135: other algorithms, keys that the token names, other times, other issuers, and what is no token at all."""
    error = Door(SIGNED).refused(("x-jwt", sent))
    assert reason in error.reason
    assert error.body() == Door(SIGNED).refused().body()
    assert sent[:20] not in error.reason or not sent


def test_a_doubled_token_is_a_401():
    """T135: also if both are the same."""
    door = Door(SIGNED)
    assert door.refused(("x-jwt", token()), ("X-Jwt", token())).reason == "signed header sent twice"
    assert door.refused(("x-jwt", token({"sub": 7}))).reason == "signed header: malformed"


@given(text=st.text(max_size=80) | st.binary(max_size=60).map(lambda data: signed_text(b'{"alg":"HS256"}', data)))
def test_no_other_text_is_a_token(text):
    """T135: anything else is a 401 and never another exception, also with a valid signature."""
    Door(SIGNED).refused(("x-jwt", text))


def test_another_source_is_another_user():
    """T136: two sources with the same headers and the same id. The key says which of them sends."""
    other = replace(SOURCE, key=Key("sso", "sso"), digest=digest("key-of-the-other-0123456789abcdef"))
    store = Directory(DirectoryStoreOf(), clock=lambda: 0.0, now=lambda: NOON)
    authentication = Authentication(
        FileDirectory([]),
        store,
        group_names=["guests"],
        now=lambda: NOON,
        sources=HeaderSources([SOURCE, other]),
    )
    users = [
        asyncio.run(authentication.identify(CIMultiDict({"api-key": key, "x-user": "u1"}), PEER, PEER)).user
        for key in (KEY, "key-of-the-other-0123456789abcdef")
    ]
    assert users == ["webui:u1", "sso:u1"]


def test_a_key_of_the_database_is_not_a_sources():
    """T133: users of the database keep their keys, whatever headers they send."""
    door = Door()
    made = "lqp_testtest22_abcdefghabcdefghabcdefghabcdefghb7Fzdc"
    door.store.keys[digest(made)] = OwnedKey(Key("testtest22"), UserId("database", "bob"))
    door.store.users[UserId("database", "bob")] = User(UserId("database", "bob"), ("lab",))
    assert door.caller(("x-user", "u1"), key=made).user == "database:bob"
    assert door.ignored == ["other_key"]
