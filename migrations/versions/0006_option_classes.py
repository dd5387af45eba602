"""Configuration classes of libraries, as the environments of nodes have them

Revision: 0006
Follows: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nodes describe the classes anew."""
    op.create_table(
        "option_class",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("path", sa.String(length=300), nullable=False),
        sa.Column("document", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_option_class"),
    )


def downgrade() -> None:
    op.drop_table("option_class")
