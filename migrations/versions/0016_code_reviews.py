"""Code reviews

Revision: 0016
Follows: 0015
"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing was reviewed, and of nothing it is known who changed it."""
    op.create_table(
        "code_review",
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("code", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(100), nullable=False),
        sa.Column("method_id", sa.String(36), nullable=True),
        sa.Column("method_name", sa.String(100), nullable=True),
        sa.Column("method_version", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("decided_by", sa.Text(), nullable=True),
        sa.Column("decided_name", sa.String(100), nullable=True),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "digest", name=op.f("pk_code_review")),
    )
    op.create_index(
        "ix_code_review_project_id_created_at_digest", "code_review", ["project_id", "created_at", "digest"]
    )
    op.create_table(
        "code_decision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id", "digest"],
            ["code_review.project_id", "code_review.digest"],
            name=op.f("fk_code_decision_project_id_code_review"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_code_decision")),
    )
    op.create_index("ix_code_decision_project_id_digest_id", "code_decision", ["project_id", "digest", "id"])
    op.create_table(
        "code_change",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("place", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_code_change")),
    )
    op.create_index("ix_code_change_project_id_digest", "code_change", ["project_id", "digest"])
    op.create_index("ix_code_change_project_id_place_created_at", "code_change", ["project_id", "place", "created_at"])


def downgrade() -> None:
    """Approvals are gone."""
    for table in ("code_change", "code_decision", "code_review"):
        op.drop_table(table)
