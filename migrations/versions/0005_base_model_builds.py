"""Base models that a job makes: by which recipe, and when they were made

Revision: 0005
Follows: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

BUILDING = "kind = 'base-model' AND status IN ('queued', 'launching', 'running', 'stopping')"


def upgrade() -> None:
    """Base models that are there were placed as folders."""
    op.add_column("base_model", sa.Column("recipe", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("base_model", sa.Column("built_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "uq_job_base_model_id_building",
        "job",
        ["base_model_id"],
        unique=True,
        sqlite_where=sa.text(BUILDING),
        postgresql_where=sa.text(BUILDING),
    )


def downgrade() -> None:
    op.drop_index("uq_job_base_model_id_building", table_name="job")
    op.drop_column("base_model", "built_at")
    op.drop_column("base_model", "recipe")
