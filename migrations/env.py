"""Alembic's entry: the caller (`app.store.migrate`) hands over an open connection."""

import sqlalchemy as sa
from alembic import context

from app.store.tables import SQLModel


def render_item(kind: str, item: object, _context: object) -> str | bool:
    """Write portable types: a migration must not import the application, whose enums and types move on."""
    if kind != "type":
        return False
    plain = item.impl_instance if isinstance(item, sa.TypeDecorator) else item
    if isinstance(plain, sa.DateTime):
        return "sa.DateTime(timezone=True)"
    if isinstance(plain, sa.String) and not isinstance(plain, sa.Text):  # enums included
        return f"sa.String(length={plain.length})" if plain.length else "sa.String()"
    return False


connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError("run migrations with `deepe migrate`")
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    # SQLite cannot alter most things in place
    render_as_batch=connection.dialect.name == "sqlite",
    render_item=render_item,
    compare_type=True,
)
if connection.dialect.name == "postgresql":
    connection.exec_driver_sql("SET lock_timeout = '10s'")
with context.begin_transaction():
    context.run_migrations()
