"""The maximum of an answer, up to which its hold grows. A lost call is charged its hold."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Open calls were admitted before holds could grow, so each holds its maximum."""
    op.add_column("calls", sa.Column("maximum", sa.BigInteger))
    op.execute("UPDATE calls SET maximum = hold_output")
    op.drop_column("calls", "lost_input")
    op.drop_column("calls", "lost_output")
