"""By which id an upstream keeps the response that a call made, so that it stays its user's."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Nobody could refer to a response before, so of those made earlier nothing needs to be known."""
    op.add_column("calls", sa.Column("response_id", sa.Text))
    is_one = sa.text("response_id IS NOT NULL")
    op.create_index("calls_by_response", "calls", ["response_id", "id"], sqlite_where=is_one, postgresql_where=is_one)
