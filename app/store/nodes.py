"""Nodes: machines with a worker, and what they last said of themselves."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import CursorResult
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.enums import Platform
from app.domain.errors import NotFound
from app.store.tables import NodeRow


class NodeNotFound(NotFound):
    """No node has this id or name."""

    code = "node_not_found"


async def register_node(
    session: AsyncSession,
    *,
    name: str,
    platform: Platform,
    accelerators: Sequence[Mapping[str, Any]],
    environments: Sequence[str],
    slots: int,
    boot_id: str,
    now: datetime,
) -> NodeRow:
    """Insert the node or bring its row up to date; a node keeps its id as long as it keeps its name."""
    row = (await session.exec(select(NodeRow).where(NodeRow.name == name))).first()
    said: dict[str, Any] = {
        "platform": platform,
        "accelerators": [dict(accelerator) for accelerator in accelerators],
        "environments": sorted(environments),
        "slots": slots,
        "boot_id": boot_id,
        "heartbeat_at": now,
    }
    if row is None:
        row = NodeRow(id=str(uuid4()), name=name, created_at=now, **said)
    for column, value in said.items():
        setattr(row, column, value)
    session.add(row)
    await session.flush()
    return row


async def heartbeat(
    session: AsyncSession,
    node_id: str,
    *,
    now: datetime,
    environments: Sequence[str] | None = None,
    environment_states: Sequence[Mapping[str, Any]] | None = None,
) -> bool:
    """Say that the node is alive, and what changed on it; return `False` if nobody knows it any more."""
    values: dict[str, Any] = {"heartbeat_at": now}
    if environment_states is not None:
        values["environment_states"] = [dict(state) for state in environment_states]
    if environments is not None:
        values["environments"] = sorted(environments)
    result = await session.exec(sa.update(NodeRow).where(col(NodeRow.id) == node_id).values(**values))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


async def all_nodes(session: AsyncSession) -> Sequence[NodeRow]:
    """Return the nodes by name; there are dozens, not thousands."""
    return (await session.exec(select(NodeRow).order_by(col(NodeRow.name)))).all()


async def get_node(session: AsyncSession, node: str) -> NodeRow:
    """Return the node with this id or name or raise `NodeNotFound`."""
    row = await session.get(NodeRow, node)
    row = row or (await session.exec(select(NodeRow).where(NodeRow.name == node))).first()
    if row is None:
        raise NodeNotFound(node=node)
    return row
