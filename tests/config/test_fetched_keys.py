"""Keys of upstreams that are not fixed, as the file names their sources."""

import sys

import pytest

from proxy.config.lint import missing_programs, warnings
from proxy.config.loader import BadConfig, load_text
from proxy.config.unresolved import load_unresolved
from proxy.policy.catalog import KeyCommand, OAuthClient, Secret, Upstream
from tests.builders import NOON

SECRET = "s3cret-of-the-client"
OAUTH = "token_url: https://issuer.example/token, client_id: me"


def text_of(api_key: str) -> str:
    """A file with one upstream; its `api_key` is in the fourth line."""
    return f"upstreams:\n  box:\n    base_url: http://box/v1\n    api_key: {api_key}\n"


def upstream_of(api_key: str, **environ: str) -> Upstream:
    return load_text(text_of(api_key), environ=environ).catalog.upstreams["box"]


def mistakes_of(api_key: str, **environ: str) -> list[str]:
    """Each mistake with its line."""
    with pytest.raises(BadConfig) as bad:
        load_text(text_of(api_key), environ=environ)
    return [f"{mistake.line}: {mistake.text}" for mistake in bad.value.mistakes]


@pytest.mark.parametrize(
    ("written", "source"),
    [
        ("sk-1", Secret("sk-1")),
        ("{command: [gcloud, auth, print-access-token]}", KeyCommand(("gcloud", "auth", "print-access-token"), 2700)),
        ("{command: [/bin/key, 5, ''], every: 10s}", KeyCommand(("/bin/key", "5", ""), 10)),
        ("{command: [key], every: 24h}", KeyCommand(("key",), 86_400)),
        (
            f"{{oauth: {{{OAUTH}, client_secret: '${{PW}}'}}}}",
            OAuthClient("https://issuer.example/token", "me", Secret(SECRET)),
        ),
        (
            "{oauth: {token_url: 'http://[::1]:8/t?x=1', client_id: me, client_secret: 'ä b', scope: a/.default b}}",
            OAuthClient("http://[::1]:8/t?x=1", "me", Secret("ä b"), "a/.default b"),
        ),
    ],
)
def test_a_key_is_fixed_or_has_a_source(written: str, source: object) -> None:
    """A text is the key itself. What a mapping says is compared by a reload, so it has an equal value each time."""
    found = upstream_of(written, PW=SECRET)
    assert found.api_key == source
    assert hash(found) == hash(upstream_of(written, PW=SECRET))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{}", "4: upstreams.box.api_key: this does not say where the key is; write command: [program, argument]"),
        (
            f"{{command: [key], oauth: {{{OAUTH}, client_secret: x}}}}",
            "4: upstreams.box.api_key: command and oauth are two sources of one key; remove one of them",
        ),
        ("{command: []}", "4: upstreams.box.api_key.command: this has no entries; add at least one"),
        ("{command: ['', x]}", "4: upstreams.box.api_key: command has no program; write it first"),
        ("{command: gcloud auth}", "4: upstreams.box.api_key.command: this must be a list; write [ … ]"),
        ("{command: [key, [x]]}", "4: upstreams.box.api_key.command[1]: this must be text; put it in quotes"),
        ('{command: [key, "a\\0b"]}', "4: upstreams.box.api_key.command[1]: this has a character that no argument"),
        ("{comand: [key]}", '4: upstreams.box.api_key: "comand" is not a key of api_key; did you mean "command"?'),
        *(
            (
                f"{{command: [key], every: {every}}}",
                "4: upstreams.box.api_key.every: this is not how often a key can be fetched; write a time from 10s",
            )
            for every in ("9s", "25h", "day", "0s", "2d")
        ),
        (
            "{command: [key], every: 45}",
            '4: upstreams.box.api_key.every: this is not how often a key can be fetched; did you mean "45s"?',
        ),
        (
            f"{{every: 45m, oauth: {{{OAUTH}, client_secret: x}}}}",
            "4: upstreams.box.api_key: every is only for command, since tokens say when they end; remove it",
        ),
        (
            f"{{oauth: {{{OAUTH}}}}}",
            '4: upstreams.box.api_key.oauth: "client_secret" is missing; write client_secret: ${AZURE_CLIENT_SECRET}',
        ),
        (
            f"{{oauth: {{{OAUTH}, client_secret: ' '}}}}",
            "4: upstreams.box.api_key.oauth.client_secret: this secret is",
        ),
        (
            "{oauth: {token_url: 'http://issuer.example/t', client_id: me, client_secret: x}}",
            "4: upstreams.box.api_key.oauth.token_url: the client's secret would be sent without TLS; write https://",
        ),
        (
            "{oauth: {token_url: issuer.example, client_id: me, client_secret: x}}",
            "4: upstreams.box.api_key.oauth.token_url: this is not an https:// address; write one such as https://",
        ),
        (
            "{oauth: {token_url: 'https://u:s3cret-of-mine@issuer.example', client_id: me, client_secret: x}}",
            "4: upstreams.box.api_key.oauth.token_url: this contains a user or a password; write those as client_id",
        ),
        ("[key]", "4: upstreams.box.api_key: this key can't be sent in a header"),
    ],
)
def test_a_mistake_has_its_line_and_says_what_to_write(written: str, expected: str) -> None:
    """One mistake each, and no text quotes a value."""
    [found] = mistakes_of(written)
    assert found.startswith(expected)
    assert "s3cret" not in found


def test_no_header_can_take_the_place_of_the_token() -> None:
    """It is a bearer token at Azure too."""
    text = text_of("{command: [key]}") + "    kind: azure\n    headers: {Authorization: something-else}\n"
    with pytest.raises(BadConfig, match="api_key is sent in the header authorization, which headers has too"):
        load_text(text)


def test_no_dump_of_a_config_shows_what_a_key_is_fetched_with() -> None:
    """Arguments of a command may be secrets too."""
    for written in (f"{{command: [key, {SECRET}]}}", f"{{oauth: {{{OAUTH}, client_secret: {SECRET}}}}}"):
        config = load_text(text_of(written))
        assert SECRET not in f"{config!r} {config.catalog} {config.catalog.upstreams['box'].api_key}"
    assert SECRET not in str(mistakes_of(f"{{command: [key, {SECRET}], every: 1s}}"))


def test_a_secret_in_plain_text_is_warned_of() -> None:
    """As a fixed key is. What a command is given may be anything."""
    plain = "this secret is in plain text; write ${NAME} or ${file:/path} for it"
    found = warnings(load_text(text_of(f"{{oauth: {{{OAUTH}, client_secret: {SECRET}}}}}")), NOON)
    assert [warning.text for warning in found] == [f"upstreams.box.api_key.oauth.client_secret: {plain}"]
    referred = load_text(text_of(f"{{oauth: {{{OAUTH}, client_secret: '${{PW}}'}}}}"), environ={"PW": SECRET})
    assert warnings(referred, NOON) == ()
    assert warnings(load_text(text_of(f"{{command: [key, {SECRET}]}}")), NOON) == ()


def test_a_program_that_is_not_there_is_warned_of() -> None:
    """By `check` alone: an administrator who sends a text must not learn which files the server has."""
    config = load_text(text_of(f"{{command: [/no/such/program, {SECRET}]}}"))
    [found] = missing_programs(config)
    assert (found.line, found.text) == (
        4,
        "upstreams.box.api_key.command[0]: this machine has no such program; install it, or write its whole path",
    )
    assert warnings(config, NOON) == ()
    for program in (sys.executable, "sh"):
        assert missing_programs(load_text(text_of(f"{{command: [{program}]}}"))) == ()


def test_references_may_stay_unresolved() -> None:
    """A text that an administrator sends for a check has no values for them."""
    references = "{token_url: '${URL}', client_id: '${ID}', client_secret: '${PW}', scope: '${SCOPE}'}"
    for written in (f"{{oauth: {references}}}", "{command: ['${PROGRAM}', '${ARG}'], every: '${EVERY}'}"):
        config, places = load_unresolved(text_of(written))
        assert not isinstance(config.catalog.upstreams["box"].api_key, Secret)
        assert all(place.startswith("upstreams.box.api_key") for place in places)
