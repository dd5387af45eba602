"""Base models say what of their author may run when they are loaded

Revision: 0015
Follows: 0014
"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing is allowed so far."""
    with op.batch_alter_table("base_model", schema=None) as batch_op:
        batch_op.add_column(sa.Column("loading_permission", sa.JSON(), nullable=True))


def downgrade() -> None:
    """Forget what was allowed."""
    with op.batch_alter_table("base_model", schema=None) as batch_op:
        batch_op.drop_column("loading_permission")
