"""Counters, calls and owners."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the first tables."""
    op.create_table(
        "counters",
        sa.Column("subject", sa.Text, primary_key=True),
        sa.Column("quota_id", sa.Text, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in ("opened_at", "resets_at")),
        *(
            sa.Column(f"{side}_{what}", sa.BigInteger, nullable=False)
            for side in ("used", "held")
            for what in ("input", "output", "requests")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "calls",
        sa.Column("id", sa.Text, primary_key=True),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("owner", "state", "user_name", "model", "endpoint", "upstream", "through")
        ),
        sa.Column("reserved_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("hold_input", "hold_output", "lost_input", "lost_output")
        ),
        sa.Column("lines", sa.Text, nullable=False),
        sa.Column("capped_by", sa.Text),
        sa.Column("would_refuse", sa.Text, nullable=False),
        *(
            sa.Column(name, sa.BigInteger)
            for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens", "requests")
        ),
        sa.Column("provenance", sa.Text),
        sa.Column("outcome", sa.Text),
        sqlite_with_rowid=False,
    )
    is_open = sa.text("state = 'open'")
    op.create_index("calls_open", "calls", ["owner"], sqlite_where=is_open, postgresql_where=is_open)
    op.create_index("calls_by_user", "calls", ["user_name", "reserved_at"])
    op.create_table(
        "owners",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("alive_until", sa.BigInteger, nullable=False),
    )
