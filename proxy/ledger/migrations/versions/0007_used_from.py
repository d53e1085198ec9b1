"""The client's address of the last use of a key."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the column. From where keys were used before is not known."""
    op.add_column("api_keys", sa.Column("used_from", sa.Text))
