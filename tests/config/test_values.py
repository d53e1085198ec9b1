"""Single values of the file: which are valid, in which form they are returned, and the mistakes of all others."""

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import values
from proxy.policy.catalog import Secret
from proxy.policy.quota import Globs

A_KEY = "a-key-of-24-characters-x"
DIGEST = hashlib.sha256(A_KEY.encode()).hexdigest()

NUMBER = "is not a whole number from 0 up; write one such as 200000, 200_000, 200k or 5M"
NO_LIMIT = "is not a whole number from 0 up; for no limit, remove the key"
ADDRESS = "is not an address; write host:port, as in 127.0.0.1:8080, [::1]:8080, or 0.0.0.0:8080 for all interfaces"
ORIGIN = 'is not an origin; write scheme://host[:port], as in https://app.example, or "*" for all'
URL = "this is not an http:// or https:// address; write one such as https://api.openai.com/v1"
MEMBER = "this is not a member of a usage; use 1 to 200 visible characters, no spaces, such as citation_tokens"
STANDARD = "this member is read anyway; write only members that total_tokens does not include"
VERSION = "this is not a version of Azure's API; write one such as 2024-10-21 or 2025-04-01-preview"
NO_KEEP = "this is not a valid time to keep records; write 1d or more, as in 90d, or null to keep them forever"
NO_WAIT = "this is not a valid duration here; write one such as 30s, at most 10m, or 0s for none"
NO_HEARTBEAT = "this is too short for a heartbeat; write 1s or more, as in 15s, or remove it for none"
EMPTY_HOST = "one of the hosts in this URL is empty; write host1,host2 without a comma before or after"
DATABASE = "this is not a database; write sqlite:///quotas.db, or postgresql://user:password@host/name"
CUT = (
    "the user or the password in this URL has a character that ends it; write ${PASSWORD} for it alone, or "
    "percent-encode / ? # and @ in it"
)
NO_FILE = "this names no file for SQLite; write sqlite:///quotas.db, or sqlite:////var/lib/quotas.db"
NO_NAME = "this is not a valid name; use 1 to 100 letters, digits, dots, hyphens and underscores"
NO_HEADER = "this key can't be sent in a header; use visible ASCII characters without spaces"
NO_MODEL = "this is not a valid model name; use 1 to 200 visible characters, no spaces"


@pytest.mark.parametrize(
    ("take", "written", "kept"),
    [
        (values.name, "staff", "staff"),
        (values.name, "Team.X_1-b", "Team.X_1-b"),
        (values.name, "...", "..."),
        (values.user_name, "alice+llm@mail.example", "alice+llm@mail.example"),
        (values.group_name, "everyone", "everyone"),
        (values.group_name, "default", "default"),
        (values.group_name, "staff", "staff"),
        (values.model_name, "*", "*"),
        (values.model_name, "meta-llama/Llama-3.3:70b", "meta-llama/Llama-3.3:70b"),
        (values.served_name, "gpt-4o", "gpt-4o"),
        (values.glob, "o[13]-*?", "o[13]-*?"),
        (values.field_name, "provider", "provider"),
        (values.field_name, "X-Provider_1", "X-Provider_1"),
        (values.one_line, " Ask #llm-help · ß \n", "Ask #llm-help · ß"),
        (values.one_line, "", ""),
        (values.count, 0, 0),
        (values.count, 10**12, 10**12),
        (values.count, "0", 0),
        (values.count, "200000", 200_000),
        (values.count, "200_000", 200_000),
        (values.count, "200k", 200_000),
        (values.count, "5M", 5_000_000),
        (values.count, "1_000k", 1_000_000),
        (values.count, "1.5k", 1500),
        (values.count, "1.5M", 1_500_000),
        (values.count, "1.234567M", 1_234_567),
        (values.count, "0.001k", 1),
        (values.count, "1.50k", 1500),
        (values.count, "999999.999999M", 999_999_999_999),
        (values.positive, "1", 1),
        (values.per, "6h", "6h"),
        (values.per, "month", "month"),
        (values.zone, "Europe/Berlin", "Europe/Berlin"),
        (values.address, "127.0.0.1:8080", "127.0.0.1:8080"),
        (values.split_address, "0.0.0.0:0", ("0.0.0.0", 0)),
        (values.split_address, "[::1]:8080", ("::1", 8080)),
        (values.split_address, "my-host.example:65535", ("my-host.example", 65535)),
        (values.origin, "https://App.example/", "https://app.example"),
        (values.origin, "http://localhost:5173", "http://localhost:5173"),
        (values.origin, "http://[::1]:80", "http://[::1]:80"),
        (values.origin, "app://obsidian.md", "app://obsidian.md"),
        (values.origin, "*", "*"),
        (values.base_url, "https://api.openai.com/v1", "https://api.openai.com/v1"),
        (values.base_url, "http://[::1]:8000/v1/", "http://[::1]:8000/v1"),
        (values.api_version, "2024-10-21", "2024-10-21"),
        (values.api_version, "2025-04-01-preview", "2025-04-01-preview"),
        (values.api_version, "preview", "preview"),
        (values.usage_field, "citation_tokens", "citation_tokens"),
        (values.database, "sqlite:///quotas.db", "sqlite:///quotas.db"),
        *(
            (values.database, url, url)
            for url in ("postgresql://u%40x:p%2Fw@h:1/d?sslmode=require", "postgresql://h/d?user=u@x&password=p")
        ),
        (values.database, "sqlite:////var/lib/quotas.db", "sqlite:////var/lib/quotas.db"),
        (values.database, "postgresql://u:p@h/db?sslmode=require", "postgresql://u:p@h/db?sslmode=require"),
        (values.database, "postgresql://u:p@/db?host=/run/pg", "postgresql://u:p@/db?host=/run/pg"),
        *(
            (values.database, url, url)
            for url in (
                "postgresql://u:p,q@a:5432,[fd00::1]:5433,c/db?target_session_attrs=primary",
                "postgresql://a,b/db?target_session_attrs=read-write",
                "postgresql:///db?host=a,b&port=5432,5433&target_session_attrs=any",
            )
        ),
        (values.wait_ms, "30s", 30_000),
        (values.wait_ms, "10m", 600_000),
        (values.wait_ms, "0s", 0),
        (values.ledger_wait_ms, "1s", 1000),
        (values.heartbeat_ms, "15s", 15_000),
        (values.wait_ms, 0, 0),
        (values.keep_ms, "1d", 86_400_000),
        (values.keep_ms, "52w", 364 * 86_400_000),
        (values.key_digest, A_KEY, DIGEST),
        (values.key_digest, f"sha256:{DIGEST.upper()}", DIGEST),
        (values.secret, "sk-1", Secret("sk-1")),
    ],
)
def test_a_valid_value_is_returned_in_its_normal_form(take: Callable[[object], object], written, kept):
    """Numbers as integers, durations in milliseconds, keys as digests, addresses without a slash at the end."""
    assert take(written) == kept


@pytest.mark.parametrize(
    ("take", "written", "text"),
    [
        (values.name, "", NO_NAME),
        (values.name, "a b", NO_NAME),
        (values.name, "a/b", NO_NAME),
        (values.name, "a\n", NO_NAME),
        (values.name, "ä", NO_NAME),
        (values.name, "..", NO_NAME),
        (values.name, "a" * 101, NO_NAME),
        (values.user_name, "a b", "this is not a valid user name; use 1 to 254 letters, digits and . _ - @ +"),
        (
            values.group_name,
            "Everyone",
            '"Everyone" differs from the reserved group "everyone" only in case; write "everyone", or another name',
        ),
        (
            values.group_name,
            "DEFAULT",
            '"DEFAULT" differs from the reserved group "default" only in case; write "default", or another name',
        ),
        (values.group_name, "a b", NO_NAME),
        (
            values.model_name,
            "gpt-*",
            'models are listed by their whole names; write the whole name, or "*" alone to allow all other names',
        ),
        (values.model_name, "", NO_MODEL),
        (values.served_name, "*", '"*" is not the name of a model at an upstream; write its name, or remove "model"'),
        (values.glob, "", NO_MODEL),
        (values.glob, "a b", NO_MODEL),
        (values.glob, "a\tb", NO_MODEL),
        (values.glob, "a" * 201, NO_MODEL),
        (
            values.one_line,
            "a\nb",
            "this has more than one line, or characters that can't be printed; write one line of text",
        ),
        (values.count, -1, f'"-1" {NO_LIMIT}'),
        (values.count, "-1", f'"-1" {NO_LIMIT}'),
        (values.count, "unlimited", f'"unlimited" {NO_LIMIT}'),
        (values.count, -2, f'"-2" {NUMBER}'),
        (values.count, "200K", '"200K" is not a whole number from 0 up; did you mean 200k?'),
        (values.count, "5m", '"5m" is not a whole number from 0 up; did you mean 5M?'),
        (values.count, "1e3", '"1e3" is not a whole number from 0 up; did you mean 1k?'),
        (values.count, "010", '"010" is not a whole number from 0 up; did you mean 10?'),
        (values.count, "1.5", f'"1.5" {NUMBER}'),
        (values.count, "1.2345k", '"1.2345k" is not a whole number; write 1234 or 1235'),
        (values.count, "20_0000", f'"20_0000" {NUMBER}'),
        (values.count, "\u0661", f'"\u0661" {NUMBER}'),
        (values.count, True, f'"True" {NUMBER}'),
        (values.count, ["5"], f"this {NUMBER}"),
        (values.count, 10**12 + 1, "this is more than 1,000,000,000,000; write a smaller number"),
        (values.count, "999999999M", "this is more than 1,000,000,000,000; write a smaller number"),
        (values.positive, 0, "0 is not allowed here; write 1 or more, or remove the key"),
        (
            values.per,
            "1M",
            '"1M" could be minutes or months: write "1m" for a minute or "month" for a calendar month',
        ),
        (
            values.zone,
            "Europe/Berln",
            '"Europe/Berln" is not a time zone; write an IANA name such as Europe/Berlin',
        ),
        (values.zone, "Europe", '"Europe" is not a time zone; write an IANA name such as Europe/Rome'),
        (values.zone, "tokyo", '"tokyo" is not a time zone; write an IANA name such as Asia/Tokyo'),
        (values.zone, "New York", '"New York" is not a time zone; write an IANA name such as America/New_York'),
        (values.zone, "../x", '"../x" is not a time zone; write an IANA name such as Europe/Berlin'),
        (values.zone, "", '"" is not a time zone; write an IANA name such as Europe/Berlin'),
        (values.address, "8080", f'"8080" {ADDRESS}'),
        (values.address, ":8080", f'":8080" {ADDRESS}'),
        (values.address, "*:8080", f'"*:8080" {ADDRESS}'),
        (values.address, "::1:8080", f'"::1:8080" {ADDRESS}'),
        (values.address, "h:65536", f'"h:65536" {ADDRESS}'),
        (values.address, "h:8080\n", f'"h:8080\n" {ADDRESS}'),
        (
            values.address,
            "[1::2::3]:80",
            '"[1::2::3]:80" has no IPv6 address in its brackets; write one, as in [::1]:8080',
        ),
        (values.api_version, "2024", VERSION),
        (values.api_version, "2024-10-21&x=1", VERSION),
        (values.api_version, "2024-10-21\n", VERSION),
        (values.usage_field, "", MEMBER),
        (values.usage_field, "citation tokens", MEMBER),
        (values.usage_field, "citation_tokens\n", MEMBER),
        (values.usage_field, "x" * 201, MEMBER),
        (values.usage_field, "completion_tokens", STANDARD),
        (values.usage_field, "output_tokens", STANDARD),
        (values.usage_field, "total_tokens", STANDARD),
        (values.usage_field, "cache_read_input_tokens", STANDARD),
        (values.base_url, "api.openai.com/v1", URL),
        (values.base_url, "file:///etc/passwd", URL),
        (values.base_url, "https:///v1", URL),
        (values.base_url, "https://a b/v1", URL),
        (values.base_url, "https://a\n/v1", URL),
        (values.base_url, "https://a:0/v1", URL),
        (values.base_url, "https://a:99999/v1", URL),
        (values.base_url, "https://[::1/v1", URL),
        (
            values.base_url,
            "https://u:secret@a/v1",
            "this contains a user or a password; remove it, and write the key as api_key: ${NAME}",
        ),
        (values.origin, "app.example", f'"app.example" {ORIGIN}'),
        (values.origin, "https://app.example/v1", f'"https://app.example/v1" {ORIGIN}'),
        (values.origin, "https://*.example", f'"https://*.example" {ORIGIN}'),
        (values.origin, "https://a:0", f'"https://a:0" {ORIGIN}'),
        (values.origin, "null", f'"null" {ORIGIN}'),
        (values.base_url, "https://a/v1?x=1", "this has a query or a fragment; write the address up to its path"),
        (values.base_url, "https://a/v1#x", "this has a query or a fragment; write the address up to its path"),
        (values.database, "quotas.db", DATABASE),
        (values.database, "mysql://u:p@h/db", DATABASE),
        (values.database, "postgresql://[h/db", DATABASE),
        (values.database, "postgresql://a:5432,b:x/db", DATABASE),
        *((values.database, f"postgresql://u:p@{hosts}/db", EMPTY_HOST) for hosts in ("a:1,", ",a", "a,,b", "a,:1")),
        (
            values.database,
            "postgresql://a,b/db?target_session_attrs=prefer-standby",
            "target_session_attrs=prefer-standby asks for a server that can't write; remove it, or write primary",
        ),
        *(
            (values.database, f"postgresql://{text}", CUT)
            for text in ("u:1/2@h/d", "u:1?2@h/d", "u:1#2@h/d", "u:1@2@h/d", "h/d#x")
        ),
        (values.database, "sqlite:///", NO_FILE),
        (values.database, "sqlite:///:memory:", NO_FILE),
        (values.database, "sqlite://quotas.db", NO_FILE),
        (
            values.database,
            "postgresql:h/db",
            "this names no PostgreSQL server; write postgresql://user:password@host/name",
        ),
        *(
            (
                values.database,
                f"{scheme}://u:p@h/db",
                f'"{scheme}://" is not supported; write {plain}:// (the proxy chooses the driver)',
            )
            for scheme, plain in (
                ("sqlite+aiosqlite", "sqlite"),
                ("postgresql+asyncpg", "postgresql"),
                ("postgresql+psycopg2", "postgresql"),
                ("postgres", "postgresql"),
            )
        ),
        (values.wait_ms, "11m", NO_WAIT),
        (values.ledger_wait_ms, "11m", NO_WAIT),
        (values.ledger_wait_ms, "0s", "this is shorter than a commit may take; write 1s or more"),
        (values.heartbeat_ms, "0s", NO_HEARTBEAT),
        (values.heartbeat_ms, 15, 'this is not a valid duration here; did you mean "15s"?'),
        (values.wait_ms, "day", NO_WAIT),
        (values.keep_ms, "23h", NO_KEEP),
        (values.keep_ms, "day", NO_KEEP),
        (values.keep_ms, 90, 'this is not a valid time to keep records; did you mean "90d"?'),
        (values.keep_ms, "3 months", 'this is not a valid time to keep records; did you mean "90d"?'),
        (values.wait_ms, 30, 'this is not a valid duration here; did you mean "30s"?'),
        (values.wait_ms, "30 sec", 'this is not a valid duration here; did you mean "30s"?'),
        (values.per, "6 hours", '"6 hours" is no window: did you mean "6h"?'),
        (
            values.per,
            "6M",
            '"6M" could be minutes or months: write "6m" for minutes, or "180d" for as many months of 30 days',
        ),
        (values.secret, "$KEY", "this is the name of a variable and not its value; write ${NAME}, with braces"),
        (values.key_digest, "", "this key is empty; write one, or remove it"),
        (values.key_digest, "x" * 23, "this key is too short; use one of 24 random characters or more"),
        (values.key_digest, "x" * 24 + "\n", NO_HEADER),
        (values.key_digest, "two words of a long key …", NO_HEADER),
        (values.key_digest, "sha256:9f86d0", "this is not a digest; write sha256: and 64 hex digits"),
        (values.key_digest, f"sha256:{DIGEST}0", "this is not a digest; write sha256: and 64 hex digits"),
        (values.secret, "", "this key is empty; write one, or remove it"),
        (values.secret, 5, NO_HEADER),
        (values.secret, "a\r\nb: c", NO_HEADER),
    ],
)
def test_the_text_of_a_mistake_says_what_to_write(take: Callable[[object], object], written, text):
    """It quotes the value only if that can't be a secret."""
    with pytest.raises(ValueError) as wrong:
        take(written)
    assert str(wrong.value) == text


ANYTHING = st.text() | st.text(alphabet="htps:/@[]?#.0129\n*-!az \0")


@pytest.mark.parametrize(
    "take",
    [
        values.name,
        values.model_name,
        values.one_line,
        values.count,
        values.per,
        values.zone,
        values.address,
        values.origin,
        values.base_url,
        values.database,
        values.key_digest,
    ],
)
@given(written=ANYTHING)
def test_any_text_is_valid_or_raises_a_value_error_with_a_text(take: Callable[[object], object], written):
    """No other exception is raised."""
    try:
        take(written)
    except ValueError as wrong:
        assert str(wrong)


@given(st.text(alphabet="a*?[]!-^&|~\\", min_size=1))
def test_every_valid_pattern_compiles(written):
    """A valid pattern never fails, or warns, when the policy is built."""
    assert Globs([values.glob(written)]).match("a") in (True, False)


@pytest.mark.parametrize("key", ["sk-abc", "", "schlüssel", "\udcff"])
def test_a_digest_is_sha_256_in_hex(key):
    """T4: the same as `printf %s KEY | sha256sum`. Bytes that are not text have a digest too, which no key has."""
    assert values.digest(key) == hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    assert len(values.digest(key)) == 64
