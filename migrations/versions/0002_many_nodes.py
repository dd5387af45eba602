"""Many nodes: accelerator leases, placement, retries, queues, webhooks

Revision: 0002
Follows: 0001
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Rows that are there get the defaults; the queue gets its demands."""
    op.create_table(
        "installation",
        sa.Column("key", sa.String(length=100), nullable=False),
        sa.Column("value", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_installation")),
    )
    op.create_table(
        "job_queue",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("max_live", sa.Integer(), nullable=True),
        sa.Column("max_live_per_user", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_job_queue")),
    )
    op.create_table(
        "webhook",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("url", sa.String(length=2000), nullable=False),
        sa.Column("secret", sa.String(length=200), nullable=False),
        sa.Column("events", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook")),
    )
    op.create_table(
        "delivery",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("webhook_id", sa.String(length=36), nullable=False),
        sa.Column("job_id", sa.String(length=36), nullable=False),
        sa.Column("event", sa.String(length=50), nullable=False),
        sa.Column("body", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_try_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_status", sa.Integer(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["webhook_id"], ["webhook.id"], name=op.f("fk_delivery_webhook_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery")),
    )
    with op.batch_alter_table("delivery", schema=None) as batch_op:
        batch_op.create_index(
            "ix_delivery_pending",
            ["webhook_id", "next_try_at"],
            unique=False,
            sqlite_where=sa.text("state = 'pending'"),
            postgresql_where=sa.text("state = 'pending'"),
        )
        batch_op.create_index("ix_delivery_webhook_id_created_at_id", ["webhook_id", "created_at", "id"], unique=False)

    op.create_table(
        "lease",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("accelerator", sa.String(length=100), nullable=False),
        sa.Column("attempt_id", sa.String(length=36), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("quarantined_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name=op.f("fk_lease_attempt_id")),
        sa.ForeignKeyConstraint(["node_id"], ["node.id"], name=op.f("fk_lease_node_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lease")),
    )
    with op.batch_alter_table("lease", schema=None) as batch_op:
        batch_op.create_index("ix_lease_attempt_id", ["attempt_id"], unique=False)
        batch_op.create_index(
            "uq_lease_node_id_accelerator_live",
            ["node_id", "accelerator"],
            unique=True,
            sqlite_where=sa.text("live"),
            postgresql_where=sa.text("live"),
        )

    with op.batch_alter_table("attempt", schema=None) as batch_op:
        batch_op.add_column(sa.Column("accelerators", sa.JSON(none_as_null=True), nullable=False, server_default="[]"))
        batch_op.add_column(sa.Column("expected_end_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("resumed_from", sa.JSON(none_as_null=True), nullable=True))
        batch_op.add_column(sa.Column("reason_params", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))

    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.add_column(sa.Column("demand", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("queue", sa.String(length=100), nullable=False, server_default="default"))
        batch_op.add_column(sa.Column("submitted_by", sa.String(length=100), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("not_before", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("reserved_node_id", sa.String(length=36), nullable=True))
        batch_op.add_column(sa.Column("resources", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("retry", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("limits", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("retries", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("recoveries", sa.Integer(), nullable=False, server_default="0"))
        batch_op.drop_index(
            batch_op.f("ix_job_queue"), sqlite_where=sa.text("status = 'queued' AND blocked_by IS NULL")
        )
        batch_op.create_index(
            "ix_job_queue",
            ["kind", "demand", "priority", "created_at", "id"],
            unique=False,
            sqlite_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
            postgresql_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
        )

        batch_op.create_index(
            "ix_job_order",
            ["status", "priority", "created_at", "id"],
            unique=False,
            sqlite_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
            postgresql_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
        )
        batch_op.create_index(
            "uq_job_reserved_node_id",
            ["reserved_node_id"],
            unique=True,
            sqlite_where=sa.text("status = 'queued' AND reserved_node_id IS NOT NULL"),
            postgresql_where=sa.text("status = 'queued' AND reserved_node_id IS NOT NULL"),
        )

    _write_demands()

    with op.batch_alter_table("node", schema=None) as batch_op:
        batch_op.add_column(sa.Column("home_id", sa.String(length=36), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("inventory", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("labels", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("worker_labels", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("extra_labels", sa.JSON(none_as_null=True), nullable=False, server_default="{}"))
        batch_op.add_column(
            sa.Column("environment_states", sa.JSON(none_as_null=True), nullable=False, server_default="[]")
        )
        batch_op.add_column(sa.Column("draining_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("dead_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("refusal", sa.JSON(none_as_null=True), nullable=True))


def _write_demands() -> None:
    """Jobs that wait ask for what they asked before: their kind, their environment, builds for their node."""
    job = sa.table("job", *(sa.column(name) for name in ("id", "kind", "environment", "node_id", "status", "demand")))
    connection = op.get_bind()
    waiting = sa.select(job.c.kind, job.c.environment, job.c.node_id).where(job.c.status == "queued").distinct()
    for kind, environment, node_id in connection.execute(waiting).all():
        demand = {"environment": environment, "kind": kind}
        alike = [job.c.status == "queued", job.c.kind == kind, job.c.environment == environment]
        if kind == "environment":
            demand["node_id"] = node_id
            alike.append(job.c.node_id == node_id)
        text = json.dumps(demand, sort_keys=True, separators=(",", ":"))
        connection.execute(sa.update(job).where(*alike).values(demand=text))


# Columns are dropped in place (SQLite 3.35): a table that others refer to cannot be copied and dropped there.
ADDED = {
    "node": (
        *("refusal", "removed_at", "dead_at", "draining_at", "environment_states", "extra_labels", "worker_labels"),
        *("labels", "inventory", "home_id"),
    ),
    "job": (
        *("recoveries", "retries", "limits", "retry", "resources", "reserved_node_id", "not_before", "submitted_by"),
        *("queue", "demand"),
    ),
    "attempt": ("reason_params", "resumed_from", "expected_end_at", "accelerators"),
}


def downgrade() -> None:
    waiting = sa.text("status = 'queued' AND blocked_by IS NULL")
    op.drop_index("ix_job_queue", table_name="job")
    op.drop_index("uq_job_reserved_node_id", table_name="job")
    op.drop_index("ix_job_order", table_name="job")
    for table, columns in ADDED.items():
        for column in columns:
            op.drop_column(table, column)
    op.create_index(
        "ix_job_queue",
        "job",
        ["kind", "environment", "priority", "created_at", "id"],
        sqlite_where=waiting,
        postgresql_where=waiting,
    )
    for table in ("lease", "delivery", "webhook", "job_queue", "installation"):
        op.drop_table(table)
