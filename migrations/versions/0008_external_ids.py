"""The id that a caller of its own kind gave a job

Revision: 0008
Follows: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NAMED = "external_id IS NOT NULL"


def upgrade() -> None:
    """No job has one yet."""
    op.add_column("job", sa.Column("external_id", sa.String(200), nullable=True))
    op.create_index(
        "ix_job_external_id",
        "job",
        ["external_id", "created_at"],
        sqlite_where=sa.text(NAMED),
        postgresql_where=sa.text(NAMED),
    )


def downgrade() -> None:
    op.drop_index("ix_job_external_id", table_name="job")
    op.drop_column("job", "external_id")
