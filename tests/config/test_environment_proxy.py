"""Which proxy the environment names, as curl, Go and Python's clients read it."""

import pytest

from proxy.config.environment_proxy import environment_proxy

PROXY = "http://proxy:3128"
HTTPS, HTTP = "https://llm.example/v1", "http://10.0.0.7:8000/v1"


@pytest.mark.parametrize(
    ("base_url", "environ", "found"),
    [
        (HTTPS, {}, None),
        (HTTPS, {"HTTPS_PROXY": PROXY}, ("HTTPS_PROXY", PROXY)),
        (HTTPS, {"HTTP_PROXY": PROXY}, None),
        (HTTP, {"HTTPS_PROXY": PROXY}, None),
        (HTTP, {"HTTP_PROXY": PROXY}, ("HTTP_PROXY", PROXY)),
        (HTTP, {"HTTP_PROXY": "a:1", "http_proxy": "b:2"}, ("http_proxy", "http://b:2")),
        (HTTP, {"HTTP_PROXY": PROXY, "http_proxy": ""}, None),
        (HTTP, {"HTTP_PROXY": "  "}, None),
    ],
)
def test_the_scheme_of_the_upstream_decides(
    base_url: str, environ: dict[str, str], found: tuple[str, str] | None
) -> None:
    """The name in lower case wins, also if its value is empty. A proxy without a scheme is one in HTTP."""
    assert environment_proxy(base_url, environ) == found


@pytest.mark.parametrize(
    "host",
    ["localhost", "LocalHost.", "app.localhost", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"],
)
def test_this_machine_has_no_proxy(host: str) -> None:
    """A proxy elsewhere could not reach it."""
    environ = {"HTTP_PROXY": PROXY}
    assert environment_proxy(f"http://{host}:8000/v1", environ) is None
    assert environment_proxy("http://localhost.example/v1", environ) is not None


@pytest.mark.parametrize(
    ("no_proxy", "host", "is_covered"),
    [
        ("*", "llm.example", True),
        ("*", "10.0.0.7", True),
        ("example", "llm.example", True),
        ("llm.example", "llm.example", True),
        ("LLM.Example.", "llm.example", True),
        (".example", "llm.example", True),
        ("*.example", "llm.example", True),
        (".llm.example", "llm.example", True),
        ("m.example", "llm.example", False),
        ("other, llm.example", "llm.example", True),
        ("other llm.example", "llm.example", True),
        ("", "llm.example", False),
        (".", "llm.example", False),
        ("llm.example:443", "llm.example", True),
        ("llm.example:8443", "llm.example", False),
        ("llm.example:8443", "llm.example:8443", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.0/8", "10.0.0.7", True),
        ("10.1.0.0/16", "10.0.0.7", False),
        ("10.0.0.7:443", "10.0.0.7", True),
        ("0.0.7", "10.0.0.7", False),
        ("fd00::/8", "[fd00::1]", True),
        ("[fd00::1]", "[fd00::1]", True),
        ("[fd00::1]:443", "[fd00::1]", True),
        ("fd00::1", "[fd00::2]", False),
        ("10.0.0.0/8", "llm.example", False),
    ],
)
def test_no_proxy_names_hosts_and_networks(no_proxy: str, host: str, is_covered: bool) -> None:
    """As its module's docstring says."""
    for name in ("NO_PROXY", "no_proxy"):
        found = environment_proxy(f"https://{host}/v1", {"HTTPS_PROXY": PROXY, name: no_proxy})
        assert (found is None) is is_covered
    both = {"HTTPS_PROXY": PROXY, "NO_PROXY": "*", "no_proxy": no_proxy}
    assert (environment_proxy(f"https://{host}/v1", both) is None) is is_covered
