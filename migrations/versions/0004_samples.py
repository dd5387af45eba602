"""Samples of the presets: which are registered, and as which data set or base model

Revision: 0004
Follows: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No sample is registered yet; the next start does it."""
    op.create_table(
        "sample",
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("resource_id", sa.String(length=36), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name=op.f("pk_sample")),
    )


def downgrade() -> None:
    op.drop_table("sample")
