"""Data sets: what the check counted, and how a file of another format was read

Revision: 0003
Follows: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = ("report", "source")


def upgrade() -> None:
    """Rows that are there have neither."""
    for column in COLUMNS:
        op.add_column("dataset", sa.Column(column, sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    for column in reversed(COLUMNS):
        op.drop_column("dataset", column)
