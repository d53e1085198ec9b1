"""Single values of the file: what is taken, as what, and what is said of the rest."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import values as scalars
from proxy.policy.policy import Secret
from proxy.policy.quota import Globs

A_KEY = "a-key-of-24-characters-x"
DIGEST = hashlib.sha256(A_KEY.encode()).hexdigest()

NUMBER = "is no whole number from 0 up; write 200000, 200_000, 200k or 5M"
ADDRESS = "is no address; write host:port: 127.0.0.1:8080, [::1]:8080, or 0.0.0.0:8080 for all interfaces"
ORIGIN = 'is no origin; write scheme://host[:port], as in https://app.example, or "*" for all'
URL = "this is no http:// or https:// address; write one such as https://api.openai.com/v1"
VERSION = "this is no version of Azure's API; write one such as 2024-10-21, or 2025-04-01-preview"
NO_KEEP = "this is no time to keep records; write a duration of 1d or more such as 90d, or null for ever"
NO_WAIT = "this is no time to wait; write a duration such as 30s, at most 10m, or 0s for none"
DATABASE = "this is no database; write sqlite:///quotas.db, or postgresql://user:password@host/name"
NO_FILE = "this names no file for SQLite; write sqlite:///quotas.db, or sqlite:////var/lib/quotas.db"
NO_NAME = "this is no name; write letters, digits, dots, dashes and underscores, at most 100"
NO_HEADER = "this key can't be sent in a header; write visible ASCII characters without blanks"
NO_MODEL = "this is no model's name; write 1 to 200 visible characters without blanks"


@pytest.mark.parametrize(
    ("take", "written", "kept"),
    [
        (scalars.name, "staff", "staff"),
        (scalars.name, "Team.X_1-b", "Team.X_1-b"),
        (scalars.name, "...", "..."),
        (scalars.group_name, "everyone", "everyone"),
        (scalars.group_name, "default", "default"),
        (scalars.group_name, "staff", "staff"),
        (scalars.model_name, "*", "*"),
        (scalars.model_name, "meta-llama/Llama-3.3:70b", "meta-llama/Llama-3.3:70b"),
        (scalars.served_name, "gpt-4o", "gpt-4o"),
        (scalars.glob, "o[13]-*?", "o[13]-*?"),
        (scalars.sentence, " Ask #llm-help · ß \n", "Ask #llm-help · ß"),
        (scalars.sentence, "", ""),
        (scalars.count, 0, 0),
        (scalars.count, 10**12, 10**12),
        (scalars.count, "0", 0),
        (scalars.count, "200000", 200_000),
        (scalars.count, "200_000", 200_000),
        (scalars.count, "200k", 200_000),
        (scalars.count, "5M", 5_000_000),
        (scalars.count, "1_000k", 1_000_000),
        (scalars.positive, "1", 1),
        (scalars.per, "6h", "6h"),
        (scalars.per, "month", "month"),
        (scalars.zone, "Europe/Berlin", "Europe/Berlin"),
        (scalars.address, "127.0.0.1:8080", "127.0.0.1:8080"),
        (scalars.split_address, "0.0.0.0:0", ("0.0.0.0", 0)),
        (scalars.split_address, "[::1]:8080", ("::1", 8080)),
        (scalars.split_address, "my-host.example:65535", ("my-host.example", 65535)),
        (scalars.origin, "https://App.example/", "https://app.example"),
        (scalars.origin, "http://localhost:5173", "http://localhost:5173"),
        (scalars.origin, "http://[::1]:80", "http://[::1]:80"),
        (scalars.origin, "app://obsidian.md", "app://obsidian.md"),
        (scalars.origin, "*", "*"),
        (scalars.base_url, "https://api.openai.com/v1", "https://api.openai.com/v1"),
        (scalars.base_url, "http://[::1]:8000/v1/", "http://[::1]:8000/v1"),
        (scalars.api_version, "2024-10-21", "2024-10-21"),
        (scalars.api_version, "2025-04-01-preview", "2025-04-01-preview"),
        (scalars.api_version, "preview", "preview"),
        (scalars.database, "sqlite:///quotas.db", "sqlite:///quotas.db"),
        (scalars.database, "sqlite:////var/lib/quotas.db", "sqlite:////var/lib/quotas.db"),
        (scalars.database, "postgresql://u:p@h/db?sslmode=require", "postgresql://u:p@h/db?sslmode=require"),
        (scalars.database, "postgresql://u:p@/db?host=/run/pg", "postgresql://u:p@/db?host=/run/pg"),
        (scalars.wait, "30s", 30_000),
        (scalars.wait, "10m", 600_000),
        (scalars.wait, "0s", 0),
        (scalars.ledger_wait, "1s", 1000),
        (scalars.wait, 0, 0),
        (scalars.keep, "1d", 86_400_000),
        (scalars.keep, "52w", 364 * 86_400_000),
        (scalars.key_digest, A_KEY, DIGEST),
        (scalars.key_digest, f"sha256:{DIGEST.upper()}", DIGEST),
        (scalars.secret, "sk-1", Secret("sk-1")),
    ],
)
def test_what_is_right_is_kept(take: Callable[[object], object], written, kept):
    """In the one form in which the rest of the house uses it."""
    assert take(written) == kept


@pytest.mark.parametrize(
    ("take", "written", "sentence"),
    [
        (scalars.name, "", NO_NAME),
        (scalars.name, "a b", NO_NAME),
        (scalars.name, "a/b", NO_NAME),
        (scalars.name, "a\n", NO_NAME),
        (scalars.name, "ä", NO_NAME),
        (scalars.name, "..", NO_NAME),
        (scalars.name, "a" * 101, NO_NAME),
        (scalars.group_name, "Everyone", '"Everyone" is not the reserved group; write "everyone", or another name'),
        (scalars.group_name, "DEFAULT", '"DEFAULT" is not the reserved group; write "default", or another name'),
        (scalars.group_name, "a b", NO_NAME),
        (
            scalars.model_name,
            "gpt-*",
            'models are listed by their whole names; "*" alone opens the list to all others',
        ),
        (scalars.model_name, "", NO_MODEL),
        (scalars.served_name, "*", '"*" is no model of an upstream; write its name, or leave "model" out'),
        (scalars.glob, "", NO_MODEL),
        (scalars.glob, "a b", NO_MODEL),
        (scalars.glob, "a\tb", NO_MODEL),
        (scalars.glob, "a" * 201, NO_MODEL),
        (scalars.sentence, "a\nb", "this has more than one line, or signs that can't be shown; write one line"),
        (scalars.count, -1, f'"-1" {NUMBER}'),
        (scalars.count, "-1", f'"-1" {NUMBER}'),
        (scalars.count, "200K", f'"200K" {NUMBER}'),
        (scalars.count, "5m", f'"5m" {NUMBER}'),
        (scalars.count, "1.5M", f'"1.5M" {NUMBER}'),
        (scalars.count, "1e3", f'"1e3" {NUMBER}'),
        (scalars.count, "010", f'"010" {NUMBER}'),
        (scalars.count, "20_0000", f'"20_0000" {NUMBER}'),
        (scalars.count, "\u0661", f'"\u0661" {NUMBER}'),
        (scalars.count, True, f'"True" {NUMBER}'),
        (scalars.count, ["5"], f"this {NUMBER}"),
        (scalars.count, 10**12 + 1, "this is more than 1,000,000,000,000; write a smaller number"),
        (scalars.count, "999999999M", "this is more than 1,000,000,000,000; write a smaller number"),
        (scalars.positive, 0, "0 makes no sense here; write at least 1, or leave it out"),
        (
            scalars.per,
            "1M",
            '"1M" could be minutes or months: write "1m" for a minute or "month" for a calendar month',
        ),
        (
            scalars.zone,
            "Europe/Berln",
            '"Europe/Berln" is no time zone; write a name of the IANA list such as Europe/Berlin',
        ),
        (scalars.zone, "Europe", '"Europe" is no time zone; write a name of the IANA list such as Europe/Rome'),
        (scalars.zone, "../x", '"../x" is no time zone; write a name of the IANA list such as Europe/Berlin'),
        (scalars.zone, "", '"" is no time zone; write a name of the IANA list such as Europe/Berlin'),
        (scalars.address, "8080", f'"8080" {ADDRESS}'),
        (scalars.address, ":8080", f'":8080" {ADDRESS}'),
        (scalars.address, "*:8080", f'"*:8080" {ADDRESS}'),
        (scalars.address, "::1:8080", f'"::1:8080" {ADDRESS}'),
        (scalars.address, "h:65536", f'"h:65536" {ADDRESS}'),
        (scalars.address, "h:8080\n", f'"h:8080\n" {ADDRESS}'),
        (scalars.address, "[1::2::3]:80", '"[1::2::3]:80" has no IPv6 address in its brackets; write [::1]:8080'),
        (scalars.api_version, "2024", VERSION),
        (scalars.api_version, "2024-10-21&x=1", VERSION),
        (scalars.api_version, "2024-10-21\n", VERSION),
        (scalars.base_url, "api.openai.com/v1", URL),
        (scalars.base_url, "file:///etc/passwd", URL),
        (scalars.base_url, "https:///v1", URL),
        (scalars.base_url, "https://a b/v1", URL),
        (scalars.base_url, "https://a\n/v1", URL),
        (scalars.base_url, "https://a:0/v1", URL),
        (scalars.base_url, "https://a:99999/v1", URL),
        (scalars.base_url, "https://[::1/v1", URL),
        (
            scalars.base_url,
            "https://u:secret@a/v1",
            "this holds a user or a password; write the key as api_key: ${NAME}",
        ),
        (scalars.origin, "app.example", f'"app.example" {ORIGIN}'),
        (scalars.origin, "https://app.example/v1", f'"https://app.example/v1" {ORIGIN}'),
        (scalars.origin, "https://*.example", f'"https://*.example" {ORIGIN}'),
        (scalars.origin, "https://a:0", f'"https://a:0" {ORIGIN}'),
        (scalars.origin, "null", f'"null" {ORIGIN}'),
        (scalars.base_url, "https://a/v1?x=1", "this has a query or a fragment; write the address up to its path"),
        (scalars.base_url, "https://a/v1#x", "this has a query or a fragment; write the address up to its path"),
        (scalars.database, "quotas.db", DATABASE),
        (scalars.database, "mysql://u:p@h/db", DATABASE),
        (scalars.database, "postgresql://[h/db", DATABASE),
        (scalars.database, "sqlite:///", NO_FILE),
        (scalars.database, "sqlite:///:memory:", NO_FILE),
        (scalars.database, "sqlite://quotas.db", NO_FILE),
        (
            scalars.database,
            "postgresql:h/db",
            "this names no server; write postgresql://user:password@host/name",
        ),
        *(
            (
                scalars.database,
                f"{scheme}://u:p@h/db",
                f'"{scheme}://" names no database here; write {plain}:// (the driver is chosen by itself)',
            )
            for scheme, plain in (
                ("sqlite+aiosqlite", "sqlite"),
                ("postgresql+asyncpg", "postgresql"),
                ("postgresql+psycopg2", "postgresql"),
                ("postgres", "postgresql"),
            )
        ),
        (scalars.wait, "11m", NO_WAIT),
        (scalars.ledger_wait, "11m", NO_WAIT),
        (scalars.ledger_wait, "0s", "this is shorter than a commit may take; write 1s or more"),
        (scalars.wait, "day", NO_WAIT),
        (scalars.keep, "23h", NO_KEEP),
        (scalars.keep, "day", NO_KEEP),
        (scalars.keep, 90, NO_KEEP),
        (scalars.wait, 30, NO_WAIT),
        (scalars.key_digest, "", "this key is empty; write one, or leave it out"),
        (scalars.key_digest, "x" * 23, "this key is too short; write one of 24 random characters or more"),
        (scalars.key_digest, "x" * 24 + "\n", NO_HEADER),
        (scalars.key_digest, "two words of a long key …", NO_HEADER),
        (scalars.key_digest, "sha256:9f86d0", "this is no digest; write sha256: and 64 hex digits"),
        (scalars.key_digest, f"sha256:{DIGEST}0", "this is no digest; write sha256: and 64 hex digits"),
        (scalars.secret, "", "this key is empty; write one, or leave it out"),
        (scalars.secret, 5, NO_HEADER),
        (scalars.secret, "a\r\nb: c", NO_HEADER),
    ],
)
def test_what_is_wrong_says_what_to_write(take: Callable[[object], object], written, sentence):
    """One sentence, without the value where that may be a secret."""
    with pytest.raises(ValueError) as wrong:
        take(written)
    assert str(wrong.value) == sentence


ANYTHING = st.text() | st.text(alphabet="htps:/@[]?#.0129\n*-!az \0")


@pytest.mark.parametrize(
    "take",
    [
        scalars.name,
        scalars.model_name,
        scalars.sentence,
        scalars.count,
        scalars.per,
        scalars.zone,
        scalars.address,
        scalars.origin,
        scalars.base_url,
        scalars.database,
        scalars.key_digest,
    ],
)
@given(written=ANYTHING)
def test_any_text_is_taken_or_refused_with_a_sentence(take: Callable[[object], object], written):
    """Nothing but ValueError comes out."""
    try:
        take(written)
    except ValueError as wrong:
        assert str(wrong)


@given(st.text(alphabet="a*?[]!-^&|~\\", min_size=1))
def test_whatever_is_taken_as_a_pattern_is_one(written):
    """A policy is never built from a pattern that can't be compiled, nor with a warning."""
    assert Globs([scalars.glob(written)]).match("a") in (True, False)
