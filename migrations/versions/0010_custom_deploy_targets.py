"""Deploy targets of the kind `custom`: settings, and a script for methods that bring none

Revision: 0010
Follows: 0009
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No target has settings yet."""
    op.add_column(
        "deploy_target", sa.Column("settings", sa.JSON(none_as_null=True), nullable=False, server_default="{}")
    )
    op.add_column("deploy_target", sa.Column("file", sa.String(1000), nullable=True))
    op.add_column("deploy_target", sa.Column("conda_env", sa.String(300), nullable=True))


def downgrade() -> None:
    """Targets stay with their addresses."""
    for name in ("conda_env", "file", "settings"):
        op.drop_column("deploy_target", name)
