"""`${…}` in values: what it is replaced with, its mistakes (T81), and the redaction of what was put in."""

import errno
import re
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.interpolation import Interpolated, Interpolator

FILES = {
    "/run/secrets/key": b"from-a-file\n",
    "/run/secrets/windows": b"from-windows\r\n",
    "/run/secrets/two-lines": b"one\ntwo\n\n",
    "/run/secrets/empty": b"",
    "/run/secrets/picture": b"\xff\xd8\xff",
    "/run/secrets/film": b"x" * 65_537,
}


def read_bytes(path: str) -> bytes:
    if "\0" in path:
        raise ValueError("embedded null byte")
    if path not in FILES:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    return FILES[path]


def interpolator() -> Interpolator:
    return Interpolator(
        {"NAME": "value", "EMPTY": "", "LONG": "value-and-more", "SHORT": "abc", "PORT": "8080"}, read_bytes
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${NAME}", "value"),
        ("http://${NAME}:${PORT}/v1", "http://value:8080/v1"),
        ("${NAME:-default}", "value"),
        ("${EMPTY}", ""),
        ("${EMPTY:-default}", "default"),
        ("${UNSET:-default}", "default"),
        ("${UNSET:-}", ""),
        ("${UNSET:-a:-b}", "a:-b"),
        ("${file:/run/secrets/key}", "from-a-file"),
        ("${file:/run/secrets/windows}", "from-windows"),
        ("${file:/run/secrets/two-lines}", "one\ntwo\n"),
        ("${file:/run/secrets/empty}", ""),
    ],
)
def test_an_interpolation_is_replaced_with_its_value(written, read):
    """From the environment, from the default, or from a file without the line end after it."""
    found = interpolator().interpolate(written)
    assert (found.text, found.is_interpolated, found.mistakes) == (read, True, ())


@pytest.mark.parametrize(
    ("written", "read"),
    [("$${NAME}", "${NAME}"), ("5 $", "5 $"), ("$NAME", "$NAME"), ("$$", "$$"), ("{NAME}", "{NAME}")],
)
def test_other_dollar_signs_stay_as_they_are(written, read):
    """Only `$${` changes: it is the escape for a literal `${`."""
    found = interpolator().interpolate(written)
    assert (found.text, found.is_interpolated, found.mistakes) == (read, False, ())


@pytest.mark.parametrize(
    ("written", "mistake"),
    [
        ("${UNSET}", "UNSET is not set in the environment; set it, or write ${UNSET:-default}"),
        ("${NAME", "a ${ is not closed by its own }; write ${NAME}, or $${ for a literal ${"),
        ("${UNSET:-${NAME}}", "a ${ is not closed by its own }; write ${NAME}, or $${ for a literal ${"),
        ("${}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${sk-pasted-here}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        ("${NAME-x}", "this ${…} is not a name; write ${NAME}, ${NAME:-default} or ${file:/path}"),
        (
            "${file:key}",
            '"key" is not an absolute path; write one that begins with /, as in ${file:/run/secrets/name}',
        ),
        (
            "${file:/nowhere}",
            'the file "/nowhere" can\'t be read (No such file or directory); check its path and its permissions',
        ),
        ("${file:/a\0b}", 'the file "/a\0b" can\'t be read (not a valid path); check its path and its permissions'),
        ("${file:/run/secrets/picture}", 'the file "/run/secrets/picture" is not UTF-8 text; save it as UTF-8'),
        (
            "${file:/run/secrets/film}",
            'the file "/run/secrets/film" is larger than 65536 bytes; use a file with a single value',
        ),
    ],
)
def test_a_failed_interpolation_is_a_mistake_and_stays_as_written(written, mistake):
    """T81: it never becomes an empty text. A key that was pasted between the braces is not quoted."""
    found = interpolator().interpolate(written)
    assert found.mistakes == (mistake,)
    assert found.text.startswith("${")


# -------------------------------------------------------------------------------------------------------------- URLs

IN_URLS = {
    "PW": "pa#ss",
    "HARD": "p@ss/w:ord%25",
    "SPACE": "a b+c&d=e?é\n",
    "HOST": "db.example",
    "AT": "db:5432",
    "IPV6": "[::1]",
    "BARE": "::1",
    "PORT": "5432",
    "PREFIX": "/api/v1",
    "NAME": "quotas",
    "FILE": "/var/lib/quotas.db",
    "UP": "..",
    "HIDDEN_UP": "a/%2e%2E/b",
    "BASE": "https://up.example:8443/api",
    "BASE_WITH_USER": "postgresql://u:p%40ss@db",
    "WHOLE": "postgresql://u:p%40ss@db/name?sslmode=require",
    "RAW": "postgresql://u:p/ss@db",
    "OTHER": "evil.example/",
    "USER_AT": "me@evil.example",
    "QUERY": "name?host=evil.example",
    "SETTINGS": "sslmode=require&connect_timeout=5",
    "FRAGMENT": "name#part",
    "LINE": "db.example\n",
    "EMPTY": "",
    "BYTES": "p\udcff",
}


def in_url(written: str) -> Interpolated:
    return Interpolator(IN_URLS, lambda path: IN_URLS["HARD"].encode()).interpolate(written)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("postgresql://user:${PW}@host", "postgresql://user:pa%23ss@host"),
        ("postgresql://user:${HARD}@host/db", "postgresql://user:p%40ss%2Fw%3Aord%2525@host/db"),
        ("postgresql://${HARD}:x${PW}@host/db", "postgresql://p%40ss%2Fw%3Aord%2525:xpa%23ss@host/db"),
        ("postgresql://u:${file:/run/pw}@host", "postgresql://u:p%40ss%2Fw%3Aord%2525@host"),
        ("postgresql://u:${UNSET:-pa#ss}@host", "postgresql://u:pa%23ss@host"),
        ("postgresql://u:${SPACE}@host", "postgresql://u:a%20b%2Bc%26d%3De%3F%C3%A9%0A@host"),
        ("postgresql://u:${EMPTY}@host", "postgresql://u:@host"),
        ("postgresql://u:p%40$${PW}@host", "postgresql://u:p%40${PW}@host"),
        ("postgresql://u:p%40${PW}@host", "postgresql://u:p%40pa%23ss@host"),
        ("postgresql://h/db?user=u&password=${HARD}", "postgresql://h/db?user=u&password=p%40ss%2Fw%3Aord%2525"),
    ],
)
def test_a_user_or_password_in_a_url_is_taken_literally(written, read):
    """It is percent-encoded, and the driver decodes it to what it was."""
    assert (in_url(written).text, in_url(written).mistakes) == (read, ())


def test_a_value_that_is_one_reference_is_taken_as_it_is():
    """It has all its parts, percent-encoded by whoever wrote it; or it is no URL at all."""
    for name, value in IN_URLS.items():
        assert in_url(f"${{{name}}}") == Interpolated(value, True)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("http://${HOST}/v1", "http://db.example/v1"),
        ("http://${AT}/v1", "http://db:5432/v1"),
        ("http://${IPV6}:${PORT}/v1", "http://[::1]:5432/v1"),
        ("http://[${BARE}]:${PORT}/v1", "http://[::1]:5432/v1"),
        ("http://eu.${HOST}:80${EMPTY:-80}", "http://eu.db.example:8080"),
        ("http://api${EMPTY}.example/v1", "http://api.example/v1"),
        ("http://${HOST}${PREFIX}", "http://db.example/api/v1"),
        ("http://${HOST}${PREFIX}/chat", "http://db.example/api/v1/chat"),
        ("http://${HOST}${EMPTY}/v1", "http://db.example/v1"),
        ("http://${HOST}/x${PREFIX}", "http://db.example/x/api/v1"),
        ("${NAME}://${HOST}", "quotas://db.example"),
        ("${BASE}/v1", "https://up.example:8443/api/v1"),
        ("${BASE}${PREFIX}/${NAME}", "https://up.example:8443/api/api/v1/quotas"),
        ("${BASE_WITH_USER}/${NAME}", "postgresql://u:p%40ss@db/quotas"),
        ("postgresql://u:p@${HOST}:${PORT},b:${PORT}/${NAME}", "postgresql://u:p@db.example:5432,b:5432/quotas"),
        ("postgresql://u@h/db?sslmode=${NAME}", "postgresql://u@h/db?sslmode=quotas"),
        ("postgresql://u@h/db?${SETTINGS}", "postgresql://u@h/db?sslmode=require&connect_timeout=5"),
        ("https://wiki.example/quotas#${NAME}", "https://wiki.example/quotas#quotas"),
        ("sqlite:///${FILE}", "sqlite:////var/lib/quotas.db"),
        ("sqlite:///${UP}/quotas.db", "sqlite:///../quotas.db"),
    ],
)
def test_elsewhere_a_value_may_be_what_its_part_of_the_url_may_be(written, read):
    """A host, host:port, a port, a path and so on, or a piece of one."""
    assert in_url(written) == Interpolated(read, True)


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ("http://${OTHER}/v1", "a host, or host:port"),
        ("http://${USER_AT}/v1", "a host, or host:port"),
        ("http://${LINE}/v1", "a host, or host:port"),
        ("http://${BARE}/v1", "a host, or host:port"),
        ("http://${AT}:80/v1", "a host"),
        ("http://up${USER_AT}", "the rest of a host, a port or a path"),
        ("http://[${HOST}]/v1", "an IPv6 address"),
        ("http://up:${HOST}/v1", "a port"),
        ("http://up:${OTHER}/v1", "a port"),
        ("http://up/${QUERY}", "a path without the segments . and .."),
        ("http://up/${FRAGMENT}", "a path without the segments . and .."),
        ("http://up/v1/${UP}/chat", "a path without the segments . and .."),
        ("http://up/v1/${HIDDEN_UP}", "a path without the segments . and .."),
        ("http://up/${SPACE}", "a path without the segments . and .."),
        ("sqlite:///${QUERY}", "a path"),
        ("postgresql://u@h/${QUERY}", "a path without the segments . and .."),
        ("postgresql://u@h/db?sslmode=${SETTINGS}", "a name or value of a query, percent-encoded"),
        ("postgresql://u@h/db?a=b&${SETTINGS}", "a name or value of a query, percent-encoded"),
        ("postgresql://u@h/db?${FRAGMENT}", "a query"),
        ("https://wiki.example/#${FRAGMENT}", "a fragment"),
        ("${PREFIX}://h", "a scheme such as https"),
        ("${RAW}/name", "the beginning of a URL, up to its path and percent-encoded"),
        ("${WHOLE}/name", "the beginning of a URL, up to its path and percent-encoded"),
        ("postgresql://u:${BYTES}@h", "text"),
    ],
)
def test_elsewhere_a_value_that_its_part_of_the_url_cannot_be_is_a_mistake(written, part):
    """It would become another part: another host, another path, or a setting. The mistake does not show the value."""
    found = in_url(written)
    [name] = re.findall(r"\$\{(.*?)\}", written)
    assert found.mistakes == (f"the value of ${{{name}}} is not {part}, which its place in the URL needs",)
    assert found.text == written


URL_TEXT = st.text(st.one_of(st.sampled_from(":/?#[]@!$&'()*+,;=%.\\ \n\0-_~09azé"), st.characters(codec="utf-8")))


@given(user=URL_TEXT, password=URL_TEXT)
def test_any_user_and_password_reach_the_driver_and_change_no_other_part(user, password):
    """The URL has the same host, path and query, and both decode to what they were."""
    found = Interpolator({"U": user, "P": password}, read_bytes).interpolate("postgresql://${U}:${P}@host:1/db?a=b")
    url = urlsplit(found.text)
    assert (url.hostname, url.port, url.path, url.query, url.fragment) == ("host", 1, "/db", "a=b", "")
    assert (unquote(url.username), unquote(url.password)) == (user, password)


PLACES = {
    "https://${X}/v1?a=b#c": ("scheme", "path", "query", "fragment", "username", "password"),
    "https://up.${X}:80/v1": ("scheme", "port", "path", "query", "fragment", "username", "password"),
    "https://up:8${X}/v1": ("scheme", "hostname", "path", "query", "fragment", "username", "password"),
    "https://up/v1/${X}/chat": ("scheme", "netloc", "query", "fragment"),
    "https://up/v1?a=${X}&b=c": ("scheme", "netloc", "path", "fragment"),
    "https://up/v1#${X}": ("scheme", "netloc", "path", "query"),
}


@given(place=st.sampled_from(sorted(PLACES)), value=st.one_of(URL_TEXT, st.from_regex(r"\A[a-z0-9.:/@?#&=%]*\Z")))
def test_any_other_value_is_a_mistake_or_changes_no_other_part(place, value):
    """No value moves a call to another host, or adds a setting."""
    found = Interpolator({"X": value}, read_bytes).interpolate(place)
    if not found.mistakes:
        url, expected = urlsplit(found.text), urlsplit(place.replace("${X}", "1"))
        for part in PLACES[place]:
            assert getattr(url, part) == getattr(expected, part)
        assert len(parse_qsl(url.query, keep_blank_values=True)) == len(parse_qsl(expected.query))
        assert [step for step in url.path.split("/") if step in (".", "..")] == []


@pytest.mark.parametrize(
    "written", ["Ask at https://wiki.example/${PW} or ${SPACE}", "${PW} ${BASE}", "${BASE} ${PW}"]
)
def test_a_sentence_with_a_url_is_not_a_url(written):
    """Nor is a text that only contains one."""
    assert in_url(written).text == re.sub(r"\$\{(.*?)\}", lambda match: IN_URLS[match[1]], written)


def test_a_null_character_in_the_file_hides_no_reference():
    """YAML writes it as "\\0" in quotes. Such a text is not a URL, and is refused as one."""
    assert in_url("http://a\0${PW}") == Interpolated("http://a\0pa#ss", True)


def test_percent_encoding_in_a_user_or_password_is_a_warning():
    """It was decoded by earlier releases. It is not in other places, nor in a value that is one reference."""
    warning = (
        "the value of ${HARD} has a %XX, which is taken literally and not decoded; "
        "if it was encoded for the URL, write the password itself"
    )
    assert in_url("postgresql://u:${HARD}@h").warnings == (warning,)
    for written in ("postgresql://u:${PW}@h", "${WHOLE}", "${BASE_WITH_USER}/x", "http://h/${PREFIX}"):
        assert in_url(written).warnings == ()


def test_an_encoded_value_is_redacted_too():
    """It is as secret as the value itself."""
    used = Interpolator(IN_URLS, read_bytes)
    text = used.interpolate("postgresql://u:${HARD}@host").text
    assert used.redact(f"{text} {IN_URLS['HARD']}") == "postgresql://u:…@host …"


def test_every_failed_interpolation_of_a_value_is_reported():
    """One report names both, so the operator need not run the check twice."""
    assert len(interpolator().interpolate("${A}${NAME}${B}").mistakes) == 2


def test_interpolated_values_are_redacted():
    """Longer values first, so no rest of one remains. Defaults from the file and short values are not redacted."""
    used = interpolator()
    for written in ("${NAME}", "${LONG}", "${SHORT}", "${UNSET:-default}"):
        used.interpolate(written)
    assert used.redact("value, value-and-more, abc, default") == "…, …, abc, default"


def test_redaction_is_fast_with_many_values():
    """T95: a file may have a key for each of 50,000 users and many mistakes."""
    many = Interpolator({f"K{number}": f"key-{number:08}" for number in range(50_000)}, read_bytes)
    for number in range(50_000):
        many.interpolate(f"${{K{number}}}")
    texts = [many.redact(f"user {number} has key-{number:08}key-00000001, twice") for number in range(1000)]
    assert texts[999] == "user 999 has ……, twice"
