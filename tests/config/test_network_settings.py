"""Network settings of upstreams in the file: what is valid, what is a mistake, and what has no effect."""

import ssl
from pathlib import Path

import pytest

from proxy.config.lint import warnings
from proxy.config.loader import BadConfig, ConfigFile, load_text
from proxy.config.unresolved import load_unresolved
from proxy.policy.catalog import Secret, Transport
from tests.builders import NOON
from tests.certificates import Authority

AUTHORITY = Authority("Test CA")
SECRET = "a-secret-0123456789"
HTTPS = "https://llm.example/v1"


def transport(more: str, *, base_url: str = HTTPS, environ: dict[str, str] | None = None) -> Transport:
    """The network settings of an upstream with these in addition to its address."""
    text = f"upstreams:\n  up:\n    base_url: {base_url}\n    {more}\n"
    return load_text(text, environ=environ or {}).catalog.upstreams["up"].transport


def mistakes(more: str, *, base_url: str = HTTPS, environ: dict[str, str] | None = None) -> str:
    """The report of the mistakes in such settings."""
    with pytest.raises(BadConfig) as bad:
        transport(more, base_url=base_url, environ=environ)
    return str(bad.value)


def test_the_defaults() -> None:
    """They are those of the time before there were settings."""
    assert transport("kind: openai") == Transport(
        connect_timeout_ms=5_000, idle_timeout_ms=600_000, first_byte_timeout_ms=None, headers=(), proxy=None, ca=None
    )


def test_the_settings_of_an_upstream(tmp_path: Path) -> None:
    """Names of headers are compared in lower case. Of a PEM file only the certificates count."""
    (tmp_path / "ca.pem").write_text(f"# Főtanúsítvány\n{AUTHORITY.pem}", encoding="utf-8")
    more = (
        "{connect_timeout: 10s, idle_timeout: 1h, first_byte_timeout: 20s, "
        f'headers: {{X-Tenant: 1001, Authorization: "Bearer ${{TOKEN}}"}}, '
        f'proxy: "http://me:${{TOKEN}}@proxy:3128/", '
        f"ca: {tmp_path}/ca.pem, base_url: {HTTPS}}}"
    )
    found = load_text(f"upstreams: {{up: {more}}}\n", environ={"TOKEN": SECRET}).catalog.upstreams["up"].transport
    assert (found.connect_timeout_ms, found.idle_timeout_ms, found.first_byte_timeout_ms) == (
        10_000,
        3_600_000,
        20_000,
    )
    assert dict(found.headers) == {"x-tenant": Secret("1001"), "authorization": Secret(f"Bearer {SECRET}")}
    assert found.proxy == Secret(f"http://me:{SECRET}@proxy:3128/")
    assert found.ca == AUTHORITY.pem.strip()
    assert SECRET not in repr(found)
    assert found in {found}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("connect_timeout: 0s", "this is not a valid time limit; write one from 1s to 24h"),
        ("idle_timeout: 2d", "idle_timeout: this is not a valid time limit; write one from 1s to 24h, such as 30s"),
        ("first_byte_timeout: day", "this is not a valid time limit"),
        ("first_byte_timeout: 5", "this is not a valid time limit"),
        ("headers: {Host: a}", "headers.Host: Host belongs to the connection or to the body, and is written by the"),
        ("headers: {transfer-encoding: a}", "transfer-encoding belongs to the connection"),
        ("headers: {Accept-Encoding: gzip}", "Accept-Encoding belongs to the connection"),
        ("headers: {Idempotency-Key: a}", "Idempotency-Key belongs to the connection"),
        ("headers: {Proxy-Authorization: a}", "this header is for the proxy; write its user and password into the"),
        ('headers: {"X Y": a}', "this is not the name of a header; write one such as X-Tenant"),
        ("headers: {X-A: a, x-a: b}", "headers: a name is there twice, in different cases"),
        ('headers: {X-A: ""}', "this is not the value of a header"),
        ('headers: {X-A: "a\\nb"}', "this is not the value of a header"),
        ("headers: {X-A: é}", "this is not the value of a header"),
        ("headers: {X-A: true}", "this is not the value of a header"),
        ("headers: {X-A: }", "this has no value"),
        ("proxy: proxy:3128", "this is not the address of a proxy; write http://host:port"),
        ("proxy: ftp://proxy:3128", "this is not the address of a proxy"),
        ("proxy: https://proxy:3128", "proxies are spoken to in HTTP, not in https; write the http:// address"),
        ("proxy: socks5://proxy:1080", "proxies are spoken to in HTTP, not in socks5"),
        ("proxy: http://proxy:3128/path", "this address has a path; write http://host:port alone"),
        ("proxy: http://me:1/2@proxy:3128", "has a character that ends it"),
        (f"proxy: http://me:{SECRET}/x@proxy:3128", "this is not the address of a proxy"),
        ("proxy: true", "this is not the address of a proxy"),
        ("ca: ca.pem", "this is not an absolute path; write one that begins with /"),
        ("ca: /no/such/file", 'the file "/no/such/file" can\'t be read (No such file or directory)'),
        ("ca: /dev/null", "this file has no certificate"),
    ],
)
def test_mistakes_say_what_to_write(more: str, text: str) -> None:
    """On the line of the setting, and without secrets."""
    report = mistakes(more)
    assert report.startswith("quotas.yaml:4: upstreams.up.")
    assert text in report
    assert SECRET not in report


def test_a_certificate_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    """It would be one of every connection."""
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem.replace("MII", "AAA", 1))
    assert "a certificate in this file can't be read" in mistakes(f"ca: {tmp_path}/ca.pem")


@pytest.mark.parametrize(
    ("kind", "header"), [("openai", "Authorization"), ("azure", "API-key"), ("anthropic", "x-api-key")]
)
def test_the_header_of_the_key_is_not_there_twice(kind: str, header: str) -> None:
    """Without api_key it may be written."""
    more = f'kind: {kind}\n    headers: {{{header}: "{SECRET}"}}'
    assert dict(transport(more).headers) == {header.lower(): Secret(SECRET)}
    assert f"api_key is sent in the header {header.lower()}, which headers has too" in mistakes(
        f"{more}\n    api_key: another-key"
    )


def test_the_header_of_access_tokens_is_not_there_twice() -> None:
    """A key that is fetched may be one, whatever the kind is."""
    fetched = "kind: azure\n    api_key: {command: [print-key]}"
    assert "api_key is sent in the header authorization, which headers has too" in mistakes(
        f'{fetched}\n    headers: {{Authorization: "{SECRET}"}}'
    )


@pytest.mark.parametrize(
    ("more", "base_url", "proxy"),
    [
        ("kind: openai", HTTPS, "http://me:pass@env:3128"),
        ("kind: openai", "http://localhost:8000/v1", None),
        ("kind: openai", "http://other.example/v1", None),
        ("proxy: none", HTTPS, None),
        ("proxy: http://own:8080", HTTPS, "http://own:8080"),
        ("proxy: http://own:8080", "http://localhost:8000/v1", "http://own:8080"),
    ],
)
def test_the_proxy_of_the_environment_is_the_default(more: str, base_url: str, proxy: str | None) -> None:
    """Only an own `proxy` is asked for this machine too."""
    found = transport(more, base_url=base_url, environ={"HTTPS_PROXY": "http://me:pass@env:3128"})
    assert found.proxy == (None if proxy is None else Secret(proxy))


def test_a_proxy_of_the_environment_that_cannot_be_used_is_a_mistake() -> None:
    """Calls must not go past it. Its value is not shown."""
    report = mistakes("kind: openai", environ={"https_proxy": f"socks5://me:{SECRET}@env:1080"})
    assert report.startswith(
        "quotas.yaml:2: upstreams.up: https_proxy in the environment: proxies are spoken to in HTTP"
    )
    assert report.endswith("; or write proxy: none here")
    assert SECRET not in report
    assert transport("proxy: none", environ={"https_proxy": "socks5://env:1080"}).proxy is None


def test_a_changed_ca_is_noticed(tmp_path: Path) -> None:
    """Like a file of a `${file:…}`, and also while it has a mistake."""
    text = f"upstreams: {{up: {{base_url: {HTTPS}, ca: {tmp_path}/ca.pem}}}}\n"
    (tmp_path / "quotas.yaml").write_text(text)
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem)
    file = ConfigFile(str(tmp_path / "quotas.yaml"), {})
    first = file.load().catalog.upstreams["up"]
    assert file.changes() == {}
    (tmp_path / "ca.pem").write_text("nothing")
    assert list(file.changes()) == [f"{tmp_path}/ca.pem"]
    with pytest.raises(BadConfig):
        file.load()
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem + Authority("Other CA").pem)
    assert list(file.changes()) == [f"{tmp_path}/ca.pem"]
    second = file.load().catalog.upstreams["up"]
    assert first != second
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=second.transport.ca)
    assert len(context.get_ca_certs()) == 2


def test_a_proposed_file_reads_nothing() -> None:
    """Neither the file that `ca` names nor the environment, and references are not mistakes."""
    text = (
        f"upstreams: {{a: {{base_url: {HTTPS}, ca: /no/such/file, proxy: '${{PROXY}}', headers: {{X-A: '${{A}}'}}}}, "
        f"b: {{base_url: {HTTPS}, ca: '${{CA}}', connect_timeout: '${{T}}'}}}}\ndefault_upstream: a\n"
    )
    _, places = load_unresolved(text)
    assert "upstreams.a.proxy" in places


SEVERAL = "models: {m: {upstreams: [{upstream: up}, {upstream: other}]}}\n"
ALONE = "models: {m: {upstream: up}, n: {upstreams: [{upstream: other}, {upstream: other, model: x}]}}\n"


@pytest.mark.parametrize(
    ("more", "below", "text"),
    [
        ("first_byte_timeout: 20s", SEVERAL, None),
        ("first_byte_timeout: 10m", SEVERAL, "idle_timeout ends the call before this time"),
        ("first_byte_timeout: 5s, idle_timeout: 5s", SEVERAL, "idle_timeout ends the call before this time"),
        ("first_byte_timeout: 30s", SEVERAL, "retry_for is over by then"),
        ("first_byte_timeout: 30s", f"{SEVERAL}retry_for: 40s\n", None),
        ("first_byte_timeout: 2s", f"{SEVERAL}retry_for: 0s\n", "retry_for is over by then"),
        ("first_byte_timeout: 2s", ALONE, "no model has another upstream beside this one"),
        ("first_byte_timeout: 2s", "default_upstream: up\n", "no model has another upstream beside this one"),
        ("headers: {X-Api-Token: abc}", SEVERAL, "headers.X-Api-Token: this secret is in plain text"),
        ("headers: {X-Tenant: abc}", SEVERAL, None),
        ('headers: {X-Api-Token: "${T}"}', SEVERAL, None),
        ("proxy: http://me:pass@proxy:3128", SEVERAL, "proxy: this secret is in plain text"),
        ("proxy: http://proxy:3128", SEVERAL, None),
    ],
)
def test_settings_without_effect_are_warned_of(more: str, below: str, text: str | None) -> None:
    """Those of which the file alone shows it."""
    whole = f"upstreams: {{up: {{base_url: {HTTPS}, {more}}}, other: {{base_url: {HTTPS}}}}}\n" + below
    found = [
        str(each) for each in warnings(load_text(whole, environ={"T": SECRET}), NOON) if "upstreams.up" in str(each)
    ]
    assert len(found) == (text is not None)
    assert all(text in each for each in found if text)


def test_ca_of_an_upstream_without_tls_has_no_effect(tmp_path: Path) -> None:
    """There is no certificate to check."""
    (tmp_path / "ca.pem").write_text(AUTHORITY.pem)
    text = f"upstreams: {{up: {{base_url: http://llm.example/v1, ca: {tmp_path}/ca.pem}}}}\n"
    found = [each.text for each in warnings(load_text(text), NOON)]
    assert "upstreams.up.ca: base_url has http://, so there is no certificate to check; remove this" in found
