"""Allow-lists of environments and nodes

Revision: 0018
Follows: 0017
"""

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

_STAGES = ("training", "saving", "inference-customized", "inference-complete", "deployment")


def upgrade() -> None:
    """Everything is allowed so far."""
    op.create_table(
        "environment_rule",
        sa.Column("environment", sa.String(300), nullable=False),
        sa.Column("allowed", sa.JSON(), nullable=False),
        sa.Column("changed_by", sa.String(200), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("environment", name=op.f("pk_environment_rule")),
    )
    with op.batch_alter_table("node", schema=None) as batch_op:
        batch_op.add_column(sa.Column("allowed", sa.JSON(), nullable=True))
    # what waits in the queue asks for the same, and says whose it is
    _change_demands(lambda demand, method, project: demand | method | {"project_id": project})


def downgrade() -> None:
    """Everything is allowed again."""
    with op.batch_alter_table("node", schema=None) as batch_op:
        batch_op.drop_column("allowed")
    op.drop_table("environment_rule")
    _change_demands(
        lambda demand, _method, _project: {
            name: value for name, value in demand.items() if name not in ("method_id", "project_id")
        }
    )


def _change_demands(changed: Callable[[dict[str, Any], dict[str, str], str], dict[str, Any]]) -> None:
    names = ("id", "kind", "status", "demand", "method_id", "project_id")
    job = sa.table("job", *(sa.column(name) for name in names))
    connection = op.get_bind()
    queued = sa.select(job).where(job.c.status == "queued", job.c.demand != "")
    for row in connection.execute(queued).all():
        method = {"method_id": row.method_id} if row.kind in _STAGES and row.method_id is not None else {}
        document = changed(json.loads(row.demand), method, row.project_id)
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        connection.execute(sa.update(job).where(job.c.id == row.id).values(demand=text))
