"""Nodes as people see them: hardware, jobs and states; and what people change about them: drain, labels."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator
from app.domain.errors import Invalid
from app.domain.inventory import BlockedAccelerator, Inventory, Obstacle
from app.domain.labels import MAX_NODE_LABELS
from app.domain.texts import Language, text
from app.registry.environments.on_nodes import EnvironmentStates, NodeEnvironment, environment_states
from app.store import leases
from app.store.clock import database_now
from app.store.node_work import Holder, LiveJob, holders, live_jobs
from app.store.nodes import (
    NODE_SILENT_AFTER,
    NodeStatus,
    accelerators_of,
    all_nodes,
    get_node,
    node_status_of,
    set_extra_labels,
)
from app.store.tables import NodeRow


class TooManyLabels(Invalid):
    """A node has no more than a few dozen labels."""

    code = "too_many_labels"


class NodeState(StrEnum):
    """State of a node. Only `ready` nodes get jobs; jobs that run on the others continue."""

    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    REFUSING = "refusing"
    UNKNOWN = "unknown"
    DEAD = "dead"


class AcceleratorState(StrEnum):
    """Who has an accelerator now."""

    FREE = "free"
    LEASED = "leased"
    QUARANTINED = "quarantined"
    OCCUPIED = "occupied"
    MISSING = "missing"


@dataclass(frozen=True)
class Reason:
    """A sentence for people, by its code."""

    code: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def detail(self, language: Language) -> str:
        """Return the sentence."""
        return text(self.code, language, **self.params)


@dataclass(frozen=True)
class AcceleratorView:
    """An accelerator and who has it: a job's attempt, or foreign processes."""

    accelerator: Accelerator
    state: AcceleratorState
    holder: Holder | None = None
    foreign: BlockedAccelerator | None = None


@dataclass(frozen=True)
class NodeView:
    """A node and the age of its last heartbeat, by the database's clock."""

    row: NodeRow
    heartbeat_age: timedelta
    state: NodeState
    reason: Reason
    inventory: Inventory
    accelerators: Sequence[AcceleratorView]
    jobs: Sequence[LiveJob] = ()
    environments: Sequence[NodeEnvironment] = ()

    @property
    def version(self) -> str:
        """What changes when a person changes the node; the ETag."""
        return labels_version(self.row.extra_labels)


class Nodes:
    """Reads and changes nodes; they register themselves."""

    async def views(self, session: AsyncSession) -> Sequence[NodeView]:
        """Return all nodes by name."""
        return await _views(session, await all_nodes(session))

    async def get(self, session: AsyncSession, node: str) -> NodeView:
        """Return the node with this id or name."""
        return await _view(session, await get_node(session, node))

    async def release(self, session: AsyncSession, node: str, accelerator: str) -> NodeView:
        """Put a quarantined accelerator back to use; `AcceleratorInUse` while an attempt holds it."""
        return await _view(session, await leases.release(session, node, accelerator, now=await database_now(session)))

    async def drain(self, session: AsyncSession, node: str) -> NodeView:
        """Stop the node from claiming jobs. Idempotent."""
        row = await get_node(session, node, lock=True)
        row.draining_at = row.draining_at or await database_now(session)
        session.add(row)
        return await _view(session, row)

    async def undrain(self, session: AsyncSession, node: str) -> NodeView:
        """Let the node claim jobs again. Idempotent."""
        row = await get_node(session, node, lock=True)
        row.draining_at = None
        session.add(row)
        return await _view(session, row)

    async def change_labels(
        self,
        session: AsyncSession,
        node: str,
        changes: Mapping[str, str | None] | None,
        *,
        check: Callable[[str], None],
    ) -> NodeView:
        """Set labels beside those of the worker, or take them away (None; all of them if `changes` is None)."""
        row = await get_node(session, node, lock=True)
        check(labels_version(row.extra_labels))
        labels = merged_labels(row.extra_labels, changes)
        if len(labels) > MAX_NODE_LABELS:
            raise TooManyLabels(pointer="/extra_labels", limit=MAX_NODE_LABELS)
        await set_extra_labels(session, row, labels)
        return await _view(session, row)


def state_of(row: NodeRow, *, age: timedelta, jobs: int) -> tuple[NodeState, Reason]:
    """Return the state of a node with so many live jobs, and the reason as a sentence."""
    minutes = {"minutes": max(1, int(age.total_seconds() // 60)), "jobs": jobs, "node": row.name}
    status = node_status_of(row)
    if status in (NodeStatus.DEAD, NodeStatus.REMOVED):
        return NodeState.DEAD, Reason("node_dead", {"node": row.name})
    if age >= NODE_SILENT_AFTER:
        return NodeState.UNKNOWN, Reason("node_unknown_with_jobs" if jobs else "node_unknown", minutes)
    if status is NodeStatus.DRAINING:
        if jobs:
            return NodeState.DRAINING, Reason("node_draining", {"jobs": jobs})
        return NodeState.DRAINED, Reason("node_drained")
    if status is NodeStatus.REFUSING:
        refusal = row.refusal or {}
        return NodeState.REFUSING, Reason(str(refusal.get("code", "")), refusal.get("params") or {})
    return NodeState.READY, Reason("node_ready", {"jobs": jobs})


def accelerator_view(
    accelerator: Accelerator, *, holder: Holder | None, blocked: BlockedAccelerator | None
) -> AcceleratorView:
    """Return the holder of the accelerator; a job that holds it comes before other users of its memory."""
    if holder is not None:
        state = AcceleratorState.QUARANTINED if holder.quarantined else AcceleratorState.LEASED
    elif blocked is not None:
        state = AcceleratorState.MISSING if blocked.obstacle is Obstacle.MISSING else AcceleratorState.OCCUPIED
    else:
        state = AcceleratorState.FREE
    return AcceleratorView(accelerator, state, holder, blocked)


def merged_labels(labels: Mapping[str, str], changes: Mapping[str, str | None] | None) -> dict[str, str]:
    """Apply a merge patch (RFC 7396) to the labels."""
    merged = {**labels, **changes} if changes is not None else {}
    return {name: value for name, value in merged.items() if value is not None}


def labels_version(labels: Mapping[str, str]) -> str:
    """Return what names these labels in `ETag`."""
    return hashlib.sha256(json.dumps(dict(labels), sort_keys=True).encode()).hexdigest()[:16]


async def living_nodes(session: AsyncSession) -> Sequence[NodeRow]:
    """Return the nodes with a recent heartbeat that were not declared dead."""
    now = await database_now(session)
    return [
        node
        for node in await all_nodes(session)
        if node.dead_at is None and now - node.heartbeat_at < NODE_SILENT_AFTER
    ]


async def _view(session: AsyncSession, row: NodeRow) -> NodeView:
    (view,) = await _views(session, [row])
    return view


async def _views(session: AsyncSession, rows: Collection[NodeRow]) -> Sequence[NodeView]:
    """Return the views of these nodes; a handful of queries however many there are."""
    ids = [row.id for row in rows]
    now, known = await database_now(session), await environment_states(session)
    jobs, held = await live_jobs(session, ids), await holders(session, ids)
    return [_made(row, known, now=now, jobs=jobs.get(row.id, ()), held=held.get(row.id, {})) for row in rows]


def _made(
    row: NodeRow, known: EnvironmentStates, *, now: datetime, jobs: Sequence[LiveJob], held: Mapping[str, Holder]
) -> NodeView:
    age = max(now - row.heartbeat_at, timedelta())
    inventory = Inventory.model_validate(row.inventory)
    blocked = {entry.id: entry for entry in inventory.blocked}
    state, reason = state_of(row, age=age, jobs=len(jobs))
    return NodeView(
        row=row,
        heartbeat_age=age,
        state=state,
        reason=reason,
        inventory=inventory,
        accelerators=[
            accelerator_view(one, holder=held.get(one.id), blocked=blocked.get(one.id)) for one in accelerators_of(row)
        ],
        jobs=jobs,
        environments=known.on(row),
    )
