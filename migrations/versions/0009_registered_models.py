"""Models that were made elsewhere have no job

Revision: 0009
Follows: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Every model has a job so far."""
    with op.batch_alter_table("model", schema=None) as batch_op:
        batch_op.alter_column("job_id", existing_type=sa.String(36), nullable=True)


def downgrade() -> None:
    """Remove the entries of models without a job; their files stay."""
    op.execute("UPDATE model SET parent_id = NULL WHERE parent_id IN (SELECT id FROM model WHERE job_id IS NULL)")
    op.execute("DELETE FROM model WHERE job_id IS NULL")
    with op.batch_alter_table("model", schema=None) as batch_op:
        batch_op.alter_column("job_id", existing_type=sa.String(36), nullable=False)
