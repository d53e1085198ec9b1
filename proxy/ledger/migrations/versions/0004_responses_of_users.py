"""The id under which an upstream stores the response of a call, so that only its owner can use it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column. Earlier responses need no id, because no request could refer to one before."""
    op.add_column("calls", sa.Column("response_id", sa.Text))
    is_one = sa.text("response_id IS NOT NULL")
    op.create_index("calls_by_response", "calls", ["response_id", "id"], sqlite_where=is_one, postgresql_where=is_one)
