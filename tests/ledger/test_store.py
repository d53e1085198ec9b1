"""How the URL of a database is shown: in errors, in the log, and by `check`."""

import pytest

from proxy.ledger.store import shown_url
from proxy.server import public_address


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:sesame@h/db", "h/db"),
        ("postgresql://u:sesame@h:5433/db?sslmode=require", "h:5433/db"),
        ("postgresql://u:sesame@h1:1,h2:2/db", "h1:1,h2:2/db"),
        ("postgresql://u:sesame@[fd00::1]:5432/db", "[fd00::1]:5432/db"),
        ("postgresql://u:sesame@[::1]/db", "[::1]/db"),
        ("postgresql://u:1/sesame@h/db", "h/db"),
        ("postgresql://u:sesame@/db?host=/run/pg", "/run/pg/db"),
        ("postgresql:///db?host=fd00::1&port=5433&password=sesame", "[fd00::1]:5433/db"),
        ("postgresql:///db?host=[::1]", "[::1]/db"),
        ("postgresql:///db?host=a,fd00::2&port=1,2", "a:1,[fd00::2]:2/db"),
        ("postgresql:///db?host=a,b&port=1", "a:1,b:1/db"),
        ("postgresql://h/db?port=5433", "h:5433/db"),
        ("postgresql://[::1]/db?port=5433", "[::1]:5433/db"),
        ("postgresql://h/db?user=u@x&password=sesame", "h/db"),
        ("postgresql://h", "h"),
    ],
)
def test_a_database_is_shown_with_its_host_and_without_its_password(url: str, shown: str) -> None:
    """A host in the query counts. An address of IPv6 has brackets, as where people have to write it."""
    assert shown_url(url) == shown
    assert public_address(url) == f"postgresql://{shown}"


def test_a_file_is_shown_as_it_is() -> None:
    """It has no secrets."""
    assert public_address("sqlite:////var/lib/quotas.db") == "sqlite:////var/lib/quotas.db"
