"""projects, and who made what

Revision: 0014
Follows: 0013
"""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

_DEFAULT = "default"
_OWNED = ("method", "deploy_target", "base_model", "dataset", "model", "job", "webhook")
_MADE = ("method_version", "environment", "job_queue")
_UNIQUE_NAMES = ("deploy_target", "base_model", "dataset")
_PRESETS = {"preset": ["name"], "sample": ["kind", "name"]}
_LISTS = {
    "ix_method_created_at_id": ("method", ["created_at", "id"]),
    "ix_model_created_at_id": ("model", ["created_at", "id"]),
    "ix_job_created_at_id": ("job", ["created_at", "id"]),
    "ix_job_status_created_at_id": ("job", ["status", "created_at", "id"]),
}
_LIVING = sa.text("deleted_at IS NULL")


def upgrade() -> None:
    """Move everything into the project `default`."""
    project = op.create_table(
        "project",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("limits", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_project")),
    )
    now = datetime.now(UTC)
    op.bulk_insert(
        project,
        [{"id": _DEFAULT, "title": "", "limits": {}, "created_by": "", "created_at": now, "updated_at": now}],
    )
    op.create_table(
        "project_member",
        sa.Column("project_id", sa.String(40), nullable=False),
        sa.Column("principal", sa.String(300), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_by", sa.String(200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_project_member_project_id")),
        sa.PrimaryKeyConstraint("project_id", "principal", name=op.f("pk_project_member")),
    )
    op.add_column("access_key", sa.Column("project_id", sa.String(40), nullable=True))
    for table in (*_OWNED, *_PRESETS):
        op.add_column(table, sa.Column("project_id", sa.String(40), nullable=False, server_default=_DEFAULT))
    for table in (*_OWNED, *_MADE):
        op.add_column(table, sa.Column("created_by", sa.String(200), nullable=False, server_default=""))
    for table in _UNIQUE_NAMES:
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(op.f(f"uq_{table}_name_key"), type_="unique")
            batch.create_unique_constraint(op.f(f"uq_{table}_project_id_name_key"), ["project_id", "name_key"])
    for table, columns in _PRESETS.items():
        _key(table, ["project_id", *columns])
    op.drop_index("uq_secret_name", "secret")
    op.add_column("secret", sa.Column("project_id", sa.String(40), nullable=False, server_default=_DEFAULT))
    op.create_index("uq_secret_project_id_name", "secret", ["project_id", "name"], unique=True)
    op.drop_index("uq_method_name_key_live", "method")
    _name_index(["project_id", "name_key"])
    for name, (table, columns) in _LISTS.items():
        op.drop_index(name, table)
        op.create_index(name.replace(f"ix_{table}_", f"ix_{table}_project_id_"), table, ["project_id", *columns])


def downgrade() -> None:
    """Leave the project `default` alone; names of other projects may be in its way."""
    for name, (table, columns) in _LISTS.items():
        op.drop_index(name.replace(f"ix_{table}_", f"ix_{table}_project_id_"), table)
        op.create_index(name, table, columns)
    op.drop_index("uq_method_name_key_live", "method")
    _name_index(["name_key"])
    op.drop_index("uq_secret_project_id_name", "secret")
    op.drop_column("secret", "project_id")
    op.create_index("uq_secret_name", "secret", ["name"], unique=True)
    for table, columns in _PRESETS.items():
        _key(table, columns)
    for table in _UNIQUE_NAMES:
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(op.f(f"uq_{table}_project_id_name_key"), type_="unique")
            batch.create_unique_constraint(op.f(f"uq_{table}_name_key"), ["name_key"])
    for table in (*_OWNED, *_MADE):
        op.drop_column(table, "created_by")
    for table in (*_OWNED, *_PRESETS):
        op.drop_column(table, "project_id")
    op.drop_column("access_key", "project_id")
    op.drop_table("project_member")
    op.drop_table("project")


def _key(table: str, columns: list[str]) -> None:
    with op.batch_alter_table(table) as batch:
        batch.drop_constraint(op.f(f"pk_{table}"), type_="primary")
        batch.create_primary_key(op.f(f"pk_{table}"), columns)


def _name_index(columns: list[str]) -> None:
    op.create_index(
        "uq_method_name_key_live", "method", columns, unique=True, sqlite_where=_LIVING, postgresql_where=_LIVING
    )
