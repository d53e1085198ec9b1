"""The users and keys that are made at run time, their audit log, and the key and tag of each call."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text) for name in names]


def _instants(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger) for name in names]


def _index_cuts(table: str) -> None:
    where = sa.text("cut_version IS NOT NULL")
    op.create_index(f"{table}_cut", table, ["cut_version"], sqlite_where=where, postgresql_where=where)


def upgrade() -> None:
    """Create the tables. Calls of earlier releases have neither a key nor a tag."""
    op.create_table(
        "users",
        sa.Column("source", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("groups", sa.Text, nullable=False),
        *_texts("email"),
        sa.Column("is_service", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        *_instants("disabled_at", "cut_version", "forgotten_at"),
        *_texts("pseudonym"),
        sqlite_with_rowid=False,
    )
    _index_cuts("users")
    op.create_table(
        "identities",
        sa.Column("source", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, primary_key=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("user_source", "user_id")),
        sqlite_with_rowid=False,
    )
    op.create_index("identities_of_user", "identities", ["user_source", "user_id"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("user_source", "user_id", "label")),
        *_texts("groups", "networks", "models", "tag"),
        sa.Column("takes_tag_header", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        *_instants("expires_at", "revoked_at", "cut_version", "used_at"),
        *_texts("replaced_by"),
        sqlite_with_rowid=False,
    )
    op.create_index("api_keys_of_user", "api_keys", ["user_source", "user_id"])
    _index_cuts("api_keys")
    op.create_table(
        "audit",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("actor", "action", "target")),
        *_texts("before", "after"),
        sqlite_with_rowid=False,
    )
    directory = op.create_table(
        "directory",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(directory, [{"id": 1, "version": 1}])
    op.add_column("calls", sa.Column("key_id", sa.Text))
    op.add_column("calls", sa.Column("tag", sa.Text))
