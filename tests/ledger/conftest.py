"""SQLite files for the tests of the ledger."""

from pathlib import Path

import pytest

from tests.sqlite import write_migrated


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty SQLite database with the current schema."""
    write_migrated(tmp_path / "quotas.db")
    return tmp_path / "quotas.db"


@pytest.fixture
def new_path(tmp_path: Path) -> Path:
    """Where a SQLite database may be created; there is none yet."""
    return tmp_path / "quotas.db"
