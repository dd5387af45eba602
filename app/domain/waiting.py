"""Why a job is not running yet, and when it may: for people, by the same rules that place it. Pure."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from app.domain.demand import Demand
from app.domain.kinds import KINDS
from app.domain.placement import (
    NEVER,
    Candidate,
    Card,
    Host,
    Mismatch,
    QueueLimits,
    accelerators_needed,
    best_host,
    free_at,
    mismatches,
    placed,
    soonest,
    suitable,
)

SHOWN_NODES = 3


class NodeCondition(StrEnum):
    """Whether a node accepts jobs, and why not; what is fixed most easily comes first."""

    WORKS = "works"
    DRAINING = "draining"
    REFUSING = "refusing"
    SILENT = "silent"
    DEAD = "dead"


@dataclass(frozen=True)
class KnownNode:
    """A node as others see it. `slots`: when each of its slots is free for a job that holds no accelerator."""

    host: Host
    condition: NodeCondition = NodeCondition.WORKS
    slots: tuple[datetime, ...] = ()


@dataclass(frozen=True)
class WaitingReason:
    """Why a job waits: a stable code with a sentence in `texts/placement.toml`, and the sentence's values."""

    code: str
    params: Mapping[str, Any] = field(default_factory=dict)


def waiting_reason(
    candidate: Candidate, nodes: Sequence[KnownNode], *, limits: QueueLimits, now: datetime
) -> WaitingReason:
    """Return the first thing that keeps a due and unblocked job from running."""
    demand = candidate.demand
    able = [node for node in nodes if set(mismatches(demand, node.host)) <= {Mismatch.ENVIRONMENT}]
    if not able:
        return _nowhere(demand, [node.host for node in nodes])
    working = [node for node in able if node.condition is NodeCondition.WORKS]
    if not working:
        return _nobody_works(able)
    ready = [node for node in working if not mismatches(demand, node.host)]
    if not ready:
        return WaitingReason("waiting_environment", {"environment": demand.environment})
    if limits.user_reached(demand) or limits.queue_reached(demand):
        return _at_limit(demand, limits)
    if any(_starts_now(candidate, node, now=now) for node in ready):
        return WaitingReason("waiting_turn")
    reserving = next((node.host for node in ready if node.host.node_id == candidate.reserved_node_id), None)
    if reserving is not None:
        needed = accelerators_needed(demand, reserving.cards)
        return WaitingReason("waiting_reserved", {"node": reserving.name, "needed": needed})
    return WaitingReason("waiting_busy")


def estimated_starts(
    candidates: Sequence[Candidate], nodes: Sequence[KnownNode], *, limits: QueueLimits, now: datetime
) -> Mapping[str, datetime]:
    """Return job → when it will start if nothing more urgent comes and running jobs end as expected.

    Only for those of which that can be said: a job in the way whose end is unknown makes it unknown.
    """
    working = {node.host.node_id: node for node in nodes if node.condition is NodeCondition.WORKS}
    starts = {}
    for candidate in sorted(candidates, key=lambda one: one.order):
        if limits.reached(candidate.demand):
            continue
        limits = _with_one_more(limits, candidate.demand)
        node, start = _first_start(candidate.demand, list(working.values()), now=now)
        if node is None:
            continue
        if start != NEVER:
            starts[candidate.job_id] = start
        working[node.host.node_id] = _taken(candidate, node, start=start, now=now)
    return starts


# ---- reasons --------------------------------------------------------------------------------------------------------


def _nowhere(demand: Demand, hosts: Sequence[Host]) -> WaitingReason:
    if not hosts:
        return WaitingReason("waiting_no_node")
    missing = [set(mismatches(demand, host)) for host in hosts]
    if all(Mismatch.OTHER_NODE in found for found in missing):
        return WaitingReason("waiting_node_gone")
    hosts = [host for host in hosts if Mismatch.NOT_ALLOWED not in mismatches(demand, host)]
    if not hosts:
        return WaitingReason("waiting_not_allowed", {"environment": demand.environment})
    missing = [set(mismatches(demand, host)) for host in hosts]
    if all(Mismatch.LABELS in found for found in missing):
        labels = ", ".join(f"{name}={value}" for name, value in sorted(demand.resources.labels.items()))
        return WaitingReason("waiting_labels", {"labels": labels})
    carrying = [host for host, found in zip(hosts, missing, strict=True) if Mismatch.LABELS not in found]
    needed = min(accelerators_needed(demand, host.cards) for host in carrying)
    if all(Mismatch.ACCELERATORS in mismatches(demand, host) for host in carrying):
        if demand.cuda:
            return WaitingReason("waiting_cuda", {"needed": max(needed, 1)})
        return WaitingReason(
            "waiting_accelerators", {"needed": needed, "most": max(len(host.cards) for host in carrying)}
        )
    if all(Mismatch.MODULES in found for found in missing if Mismatch.LABELS not in found):
        named = {"environment": demand.environment, "modules": ", ".join(demand.modules)}
        return WaitingReason("waiting_modules", named)
    params = {"needed": needed, "memory": demand.resources.accelerator_memory_mib}
    return WaitingReason("waiting_memory", params)


def _nobody_works(nodes: Sequence[KnownNode]) -> WaitingReason:
    first = min((node.condition for node in nodes), key=list(NodeCondition).index)
    names = sorted(node.host.name for node in nodes if node.condition is first)
    shown = ", ".join(names[:SHOWN_NODES]) + (", ..." if len(names) > SHOWN_NODES else "")
    return _NOBODY_WORKS[first](shown)


_NOBODY_WORKS = {
    NodeCondition.DRAINING: lambda nodes: WaitingReason("waiting_draining", {"nodes": nodes}),
    NodeCondition.REFUSING: lambda nodes: WaitingReason("waiting_refusing", {"nodes": nodes}),
    NodeCondition.SILENT: lambda nodes: WaitingReason("waiting_silent", {"nodes": nodes}),
    NodeCondition.DEAD: lambda nodes: WaitingReason("waiting_dead", {"nodes": nodes}),
}


def _at_limit(demand: Demand, limits: QueueLimits) -> WaitingReason:
    limit, queue = limits.by_queue[demand.queue], demand.queue
    if limits.user_reached(demand):
        live = limits.live.get((queue, demand.submitted_by), 0)
        params = {"queue": queue, "user": demand.submitted_by, "live": live, "limit": limit.max_live_per_user}
        return WaitingReason("waiting_user_limit", params)
    params = {"queue": queue, "live": limits.live_of_queue(queue), "limit": limit.max_live}
    return WaitingReason("waiting_queue_limit", params)


def _starts_now(candidate: Candidate, node: KnownNode, *, now: datetime) -> bool:
    if accelerators_needed(candidate.demand, node.host.cards) == 0:
        return any(free <= now for free in node.slots)
    return placed(candidate, node.host) is not None


# ---- estimates ------------------------------------------------------------------------------------------------------


def _first_start(demand: Demand, nodes: Collection[KnownNode], *, now: datetime) -> tuple[KnownNode | None, datetime]:
    able = [node for node in nodes if not mismatches(demand, node.host)]
    slots = [node for node in able if accelerators_needed(demand, node.host.cards) == 0 and node.slots]
    if slots:
        first = min(slots, key=lambda node: (min(node.slots), node.host.name))
        return first, max(min(first.slots), now)
    by_id = {node.host.node_id: node for node in able if accelerators_needed(demand, node.host.cards) > 0}
    host = best_host(demand, [node.host for node in by_id.values()], now=now)
    return (None, NEVER) if host is None else (by_id[host.node_id], soonest(demand, host, now=now))


def _taken(candidate: Candidate, node: KnownNode, *, start: datetime, now: datetime) -> KnownNode:
    """Return the node once the job has what it needs there."""
    end = None if candidate.seconds is None or start == NEVER else start + timedelta(seconds=candidate.seconds)
    needed = accelerators_needed(candidate.demand, node.host.cards)
    if needed == 0:
        return dataclasses.replace(node, slots=(*sorted(node.slots)[1:], end or NEVER))
    by_time = sorted(suitable(candidate.demand, node.host.cards), key=lambda card: free_at(card, now=now))
    taken = {card.accelerator.id for card in by_time[:needed]}
    cards = tuple(
        Card(card.accelerator, free=False, until=end) if card.accelerator.id in taken else card
        for card in node.host.cards
    )
    return dataclasses.replace(node, host=dataclasses.replace(node.host, cards=cards))


def _with_one_more(limits: QueueLimits, demand: Demand) -> QueueLimits:
    if not KINDS[demand.kind].counts_in_limits or demand.queue not in limits.by_queue:
        return limits
    key = (demand.queue, demand.submitted_by)
    return dataclasses.replace(limits, live={**limits.live, key: limits.live.get(key, 0) + 1})
