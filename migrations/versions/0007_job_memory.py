"""What a job's training needed of the memory of its device

Revision: 0007
Follows: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

MEASURED = "memory IS NOT NULL"


def upgrade() -> None:
    """Nothing is known of jobs that have ended."""
    op.add_column("job", sa.Column("memory", sa.JSON(none_as_null=True), nullable=True))
    op.create_index(
        "ix_job_measured",
        "job",
        ["method_id", "base_model_id", "created_at"],
        sqlite_where=sa.text(MEASURED),
        postgresql_where=sa.text(MEASURED),
    )


def downgrade() -> None:
    op.drop_index("ix_job_measured", table_name="job")
    op.drop_column("job", "memory")
