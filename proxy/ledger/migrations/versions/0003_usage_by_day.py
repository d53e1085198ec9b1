"""Usage by day, and which calls were counted into it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table of sums. The roll-up counts the calls that ended before in steps, as it does all others."""
    op.add_column("calls", sa.Column("counted_as", sa.Text))
    uncounted = sa.text("state <> 'open' AND (counted_as IS NULL OR counted_as <> state)")
    op.create_index("calls_uncounted", "calls", ["id"], sqlite_where=uncounted, postgresql_where=uncounted)
    op.create_table(
        "usage_by_day",
        sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.Text, primary_key=True) for name in ("user_name", "through", "model")),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in (
                *("calls", "requests", "input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens"),
                "estimated",
            )
        ),
        sqlite_with_rowid=False,
    )
    op.create_index("usage_by_day_of_user", "usage_by_day", ["user_name", "day"])
    op.create_index("usage_by_day_of_group", "usage_by_day", ["through", "day"])
    if op.get_bind().dialect.name == "postgresql":
        # Each call leaves two dead rows. By default a table is vacuumed when a fifth of its rows are dead, and until
        # then index scans would read far too many of them.
        op.execute("ALTER TABLE calls SET (autovacuum_vacuum_scale_factor = 0.01)")
