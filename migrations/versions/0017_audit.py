"""The audit trail

Revision: 0017
Follows: 0016
"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The trail begins with the next change."""
    op.create_table(
        "audit_record",
        sa.Column("number", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("caller_kind", sa.String(32), nullable=False),
        sa.Column("caller", sa.String(200), nullable=False),
        sa.Column("principal", sa.String(500), nullable=False),
        sa.Column("address", sa.String(100), nullable=True),
        sa.Column("request_id", sa.String(200), nullable=True),
        sa.Column("operation", sa.String(100), nullable=False),
        sa.Column("project_id", sa.String(40), nullable=True),
        sa.Column("things", sa.Text(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit_record")),
    )
    op.create_index("ix_audit_record_caller_number", "audit_record", ["caller", "number"])
    op.create_index("ix_audit_record_operation_number", "audit_record", ["operation", "number"])
    op.create_index("ix_audit_record_at", "audit_record", ["at"])


def downgrade() -> None:
    """The trail is gone: export it before."""
    op.execute("DELETE FROM installation WHERE key = 'audit-head'")
    op.drop_table("audit_record")
