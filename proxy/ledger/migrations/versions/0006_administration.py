"""Groups, quotas, grants and admin keys that are made at run time, and what administrators look at."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def _texts(*names: str, nullable: bool = False) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=nullable) for name in names]


def _numbers(*names: str, nullable: bool = False) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=nullable) for name in names]


def _create(name: str, *columns: sa.Column[str] | sa.Column[int] | sa.Column[bool]) -> None:
    op.create_table(name, *columns, sqlite_with_rowid=False)


def _key(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, primary_key=True) for name in names]


def upgrade() -> None:
    """Create the tables. Earlier audit rows have no address, and earlier calls neither."""
    _create(
        "groups",
        *_key("name"),
        *_numbers("position"),
        *_texts("models", nullable=True),
        sa.Column("unlimited", sa.Boolean, nullable=False),
        *_numbers("created_at"),
        *_texts("created_by"),
    )
    _create(
        "quotas",
        *_key("group_name", "name"),
        *_numbers("position"),
        *_texts("document"),
        *_numbers("created_at"),
        *_texts("created_by"),
    )
    _create(
        "grants",
        *_key("id"),
        *_texts("quota_id"),
        *_texts("user_name", nullable=True),
        *_texts("measure"),
        *_numbers("amount", "until"),
        *_texts("reason"),
        *_numbers("created_at"),
        *_texts("created_by"),
        *_numbers("ended_at", nullable=True),
    )
    _create(
        "admin_keys",
        *_key("id"),
        sa.Column("digest", sa.Text, nullable=False, unique=True),
        *_texts("name", "role"),
        *_texts("groups", nullable=True),
        *_numbers("grant_up_to", nullable=True),
        *_numbers("created_at"),
        *_texts("created_by"),
        *_numbers("expires_at", "revoked_at", nullable=True),
    )
    _create("admin_sessions", *_key("digest"), *_texts("key_digest"), *_numbers("created_at", "expires_at"))
    _create_what_is_shown()
    _create("call_cuts", *_key("call_id"), *_numbers("version", "at"))
    op.add_column("counters", sa.Column("reset_at", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("counters_by_quota", "counters", ["quota_id", "subject"])
    op.add_column("directory", sa.Column("policy_version", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("calls", sa.Column("address", sa.Text))
    for name in ("address", "request_id", "idempotency_key", "fingerprint"):
        op.add_column("audit", sa.Column(name, sa.Text))
    given = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        *("audit_by_idempotency_key", "audit", ["actor", "idempotency_key"]),
        unique=True,
        sqlite_where=given,
        postgresql_where=given,
    )
    op.create_index("audit_at", "audit", ["at", "id", "target", "action"])
    for name in ("target", "actor", "action"):
        op.create_index(f"audit_of_{name}", "audit", [name, "at"])


def _create_what_is_shown() -> None:
    _create(
        "refusals",
        *_key("request_id"),
        *_numbers("at"),
        *_texts("user_name", "quota_id", "model", "endpoint", "verdict", "measure"),
        *_numbers("maximum", "used", "held", "needed"),
        *_numbers("resets_at", "admissible_at", nullable=True),
        *_texts("key_id", nullable=True),
        *_numbers("count"),
        *_texts("details", nullable=True),
    )
    op.create_index("refusals_at", "refusals", ["at", "quota_id"])
    op.create_index("refusals_of_quota", "refusals", ["quota_id", "at"])
    op.create_index("refusals_of_user", "refusals", ["user_name", "at"])
    _create("crossings", *_key("subject", "quota_id"), *_numbers("opened_at", "resets_at", "level", "crossed_at"))
    op.create_index("crossings_open", "crossings", ["resets_at"])
    op.create_index("crossings_latest", "crossings", ["level", "crossed_at"])
    _create("replicas", *_key("owner"), *_numbers("at"), *_texts("status"), *_numbers("watching_until"))
    _create(
        "feed",
        *_key("owner"),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        *_numbers("at"),
        *_texts("body"),
    )
