"""Create the tables

Revision: 0001
Follows:
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "base_model",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("name_key", sa.String(length=300), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("path", sa.String(length=1000), nullable=False),
        sa.Column("card", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_model")),
        sa.UniqueConstraint("name_key", name=op.f("uq_base_model_name_key")),
    )
    op.create_table(
        "dataset",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("name_key", sa.String(length=300), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("path", sa.String(length=1000), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("columns", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset")),
        sa.UniqueConstraint("name_key", name=op.f("uq_dataset_name_key")),
    )
    op.create_table(
        "deploy_target",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("name_key", sa.String(length=300), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("url", sa.String(length=2000), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deploy_target")),
        sa.UniqueConstraint("name_key", name=op.f("uq_deploy_target_name_key")),
    )
    op.create_table(
        "environment",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("name_key", sa.String(length=300), nullable=False),
        sa.Column("spec", sa.Text(), nullable=True),
        sa.Column("spec_hash", sa.String(length=64), nullable=True),
        sa.Column("shipped", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environment")),
        sa.UniqueConstraint("name_key", name=op.f("uq_environment_name_key")),
    )
    op.create_table(
        "idempotency",
        sa.Column("scope", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=False),
        sa.Column("body", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("scope", "key", name=op.f("pk_idempotency")),
    )
    op.create_table(
        "method",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("name_key", sa.String(length=300), nullable=False),
        sa.Column("description", sa.String(), nullable=False),
        sa.Column("training_type", sa.String(length=32), nullable=False),
        sa.Column("technique", sa.String(length=100), nullable=False),
        sa.Column("lifecycle", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("preset", sa.String(length=100), nullable=True),
        sa.Column("preset_version", sa.Integer(), nullable=True),
        sa.Column("read_only", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_method")),
    )
    with op.batch_alter_table("method", schema=None) as batch_op:
        batch_op.create_index("ix_method_created_at_id", ["created_at", "id"], unique=False)
        batch_op.create_index(
            "uq_method_name_key_live",
            ["name_key"],
            unique=True,
            sqlite_where=sa.text("deleted_at IS NULL"),
            postgresql_where=sa.text("deleted_at IS NULL"),
        )

    op.create_table(
        "node",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("platform", sa.String(length=32), nullable=False),
        sa.Column("accelerators", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("environments", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_node")),
        sa.UniqueConstraint("name", name=op.f("uq_node_name")),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("reason_params", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("chain_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("blocked_by", sa.String(length=36), nullable=True),
        sa.Column("retry_of", sa.String(length=36), nullable=True),
        sa.Column("copied_from", sa.String(length=36), nullable=True),
        sa.Column("method_id", sa.String(length=36), nullable=True),
        sa.Column("method_name", sa.String(length=100), nullable=True),
        sa.Column("method_version", sa.Integer(), nullable=True),
        sa.Column("environment", sa.String(length=100), nullable=False),
        sa.Column("base_model_id", sa.String(length=36), nullable=True),
        sa.Column("dataset_id", sa.String(length=36), nullable=True),
        sa.Column("model_id", sa.String(length=36), nullable=True),
        sa.Column("result_model_id", sa.String(length=36), nullable=True),
        sa.Column("parameters", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("launch", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=True),
        sa.Column("token", sa.String(length=36), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["method_id"], ["method.id"], name=op.f("fk_job_method_id")),
        sa.ForeignKeyConstraint(["node_id"], ["node.id"], name=op.f("fk_job_node_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index("ix_job_blocked_by", ["blocked_by"], unique=False)
        batch_op.create_index("ix_job_chain_id_position", ["chain_id", "position"], unique=False)
        batch_op.create_index("ix_job_created_at_id", ["created_at", "id"], unique=False)
        batch_op.create_index(
            "ix_job_live",
            ["node_id"],
            unique=False,
            sqlite_where=sa.text("status IN ('launching', 'running', 'stopping')"),
            postgresql_where=sa.text("status IN ('launching', 'running', 'stopping')"),
        )
        batch_op.create_index("ix_job_method_id_created_at_id", ["method_id", "created_at", "id"], unique=False)
        batch_op.create_index(
            "ix_job_queue",
            ["kind", "environment", "priority", "created_at", "id"],
            unique=False,
            sqlite_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
            postgresql_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
        )
        batch_op.create_index("ix_job_status_created_at_id", ["status", "created_at", "id"], unique=False)
        batch_op.create_index(
            "uq_job_environment_node_id_building",
            ["environment", "node_id"],
            unique=True,
            sqlite_where=sa.text("kind = 'environment' AND status IN ('queued', 'launching', 'running', 'stopping')"),
            postgresql_where=sa.text(
                "kind = 'environment' AND status IN ('queued', 'launching', 'running', 'stopping')"
            ),
        )

    op.create_table(
        "method_version",
        sa.Column("method_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("definition", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("files", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("source", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["method_id"], ["method.id"], name=op.f("fk_method_version_method_id")),
        sa.PrimaryKeyConstraint("method_id", "number", name=op.f("pk_method_version")),
    )
    op.create_table(
        "preset",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("method_id", sa.String(length=36), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["method_id"], ["method.id"], name=op.f("fk_preset_method_id")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_preset")),
    )
    op.create_table(
        "attempt",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("job_id", sa.String(length=36), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("node_id", sa.String(length=36), nullable=False),
        sa.Column("token", sa.String(length=36), nullable=False),
        sa.Column("live", sa.Boolean(), nullable=False),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("exit", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_attempt_job_id")),
        sa.ForeignKeyConstraint(["node_id"], ["node.id"], name=op.f("fk_attempt_node_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempt")),
        sa.UniqueConstraint("job_id", "number", name=op.f("uq_attempt_job_id_number")),
    )
    with op.batch_alter_table("attempt", schema=None) as batch_op:
        batch_op.create_index(
            "ix_attempt_node_id_live",
            ["node_id"],
            unique=False,
            sqlite_where=sa.text("live"),
            postgresql_where=sa.text("live"),
        )
        batch_op.create_index(
            "uq_attempt_job_id_live",
            ["job_id"],
            unique=True,
            sqlite_where=sa.text("live"),
            postgresql_where=sa.text("live"),
        )

    op.create_table(
        "job_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=36), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_event_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_event")),
    )
    with op.batch_alter_table("job_event", schema=None) as batch_op:
        batch_op.create_index("ix_job_event_job_id_id", ["job_id", "id"], unique=False)

    op.create_table(
        "model",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=300), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("training_type", sa.String(length=32), nullable=False),
        sa.Column("path", sa.String(length=1000), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_model_id", sa.String(length=36), nullable=False),
        sa.Column("base_model_name", sa.String(length=100), nullable=False),
        sa.Column("base_model_path", sa.String(length=1000), nullable=False),
        sa.Column("parent_id", sa.String(length=36), nullable=True),
        sa.Column("job_id", sa.String(length=36), nullable=False),
        sa.Column("method_id", sa.String(length=36), nullable=False),
        sa.Column("method_version", sa.Integer(), nullable=False),
        sa.Column("dataset_id", sa.String(length=36), nullable=True),
        sa.Column("dataset_name", sa.String(length=100), nullable=True),
        sa.Column("dataset_digest", sa.String(length=64), nullable=True),
        sa.Column("parameters", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_model_job_id")),
        sa.ForeignKeyConstraint(["method_id"], ["method.id"], name=op.f("fk_model_method_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["model.id"], name=op.f("fk_model_parent_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model")),
    )
    with op.batch_alter_table("model", schema=None) as batch_op:
        batch_op.create_index("ix_model_created_at_id", ["created_at", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_model_method_id"), ["method_id"], unique=False)
        batch_op.create_index("ix_model_parent_id", ["parent_id"], unique=False)
        batch_op.create_index("uq_model_job_id", ["job_id"], unique=True)


def downgrade() -> None:
    with op.batch_alter_table("model", schema=None) as batch_op:
        batch_op.drop_index("uq_model_job_id")
        batch_op.drop_index("ix_model_parent_id")
        batch_op.drop_index(batch_op.f("ix_model_method_id"))
        batch_op.drop_index("ix_model_created_at_id")

    op.drop_table("model")
    with op.batch_alter_table("job_event", schema=None) as batch_op:
        batch_op.drop_index("ix_job_event_job_id_id")

    op.drop_table("job_event")
    with op.batch_alter_table("attempt", schema=None) as batch_op:
        batch_op.drop_index("uq_attempt_job_id_live", sqlite_where=sa.text("live"), postgresql_where=sa.text("live"))
        batch_op.drop_index("ix_attempt_node_id_live", sqlite_where=sa.text("live"), postgresql_where=sa.text("live"))

    op.drop_table("attempt")
    op.drop_table("preset")
    op.drop_table("method_version")
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_job_environment_node_id_building",
            sqlite_where=sa.text("kind = 'environment' AND status IN ('queued', 'launching', 'running', 'stopping')"),
            postgresql_where=sa.text(
                "kind = 'environment' AND status IN ('queued', 'launching', 'running', 'stopping')"
            ),
        )
        batch_op.drop_index("ix_job_status_created_at_id")
        batch_op.drop_index(
            "ix_job_queue",
            sqlite_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
            postgresql_where=sa.text("status = 'queued' AND blocked_by IS NULL"),
        )
        batch_op.drop_index("ix_job_method_id_created_at_id")
        batch_op.drop_index(
            "ix_job_live",
            sqlite_where=sa.text("status IN ('launching', 'running', 'stopping')"),
            postgresql_where=sa.text("status IN ('launching', 'running', 'stopping')"),
        )
        batch_op.drop_index("ix_job_created_at_id")
        batch_op.drop_index("ix_job_chain_id_position")
        batch_op.drop_index("ix_job_blocked_by")

    op.drop_table("job")
    op.drop_table("node")
    with op.batch_alter_table("method", schema=None) as batch_op:
        batch_op.drop_index(
            "uq_method_name_key_live",
            sqlite_where=sa.text("deleted_at IS NULL"),
            postgresql_where=sa.text("deleted_at IS NULL"),
        )
        batch_op.drop_index("ix_method_created_at_id")

    op.drop_table("method")
    op.drop_table("idempotency")
    op.drop_table("environment")
    op.drop_table("deploy_target")
    op.drop_table("dataset")
    op.drop_table("base_model")
