"""A migrated SQLite file for tests. It is made once in each process, by the real migrations, and then copied.

write_migrated(path)     # an empty database with the current schema; migrating takes a hundred times as long
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import sqlalchemy as sa

from proxy.ledger.schema import migrate


def write_migrated(path: Path) -> None:
    """Write an empty database with the current schema to `path`."""
    path.write_bytes(_migrated())
    path.chmod(0o600)  # as a store makes it


@cache
def _migrated() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        engine = sa.create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # as a store sets it, so the header is the same
        with engine.begin() as connection:
            migrate(connection)
        engine.dispose()
        return path.read_bytes()
