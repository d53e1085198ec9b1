"""How long an answer may become, which its hold grows up to; what a lost call is charged is its hold."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Calls in flight that are found here were let in when holds did not grow: theirs is the maximum."""
    op.add_column("calls", sa.Column("maximum", sa.BigInteger))
    op.execute("UPDATE calls SET maximum = hold_output")
    op.drop_column("calls", "lost_input")
    op.drop_column("calls", "lost_output")
