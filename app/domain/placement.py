"""Where a job may run and when: the rules of placement, pure. Values in, a decision out.

Every node decides for itself, by what the database says. Order is priority (smaller first), then age. What fits is
started. A job of several accelerators that fits on no node yet gets a *reservation* by the node that will be free for
it soonest: that node keeps accelerators for it, so that an endless stream of small jobs cannot starve it. Beside a
reservation a later job may start only if that does not delay the reserved one (EASY backfill): on accelerators that
will be left over at the reserved job's start, or with a time limit that ends before it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.allow_lists import EVERYTHING, AllowList
from app.domain.demand import Demand
from app.domain.kinds import KINDS

NEVER = datetime.max.replace(tzinfo=UTC)
"""When an accelerator becomes free if that is unknown."""


class Mismatch(StrEnum):
    """Why a node can never run a job, as it is now."""

    OTHER_NODE = "other_node"
    NOT_ALLOWED = "not_allowed"
    LABELS = "labels"
    ACCELERATORS = "accelerators"
    MEMORY = "memory"
    MODULES = "modules"
    ENVIRONMENT = "environment"


@dataclass(frozen=True)
class Card:
    """An accelerator of a node. `free` now, or expected to be at `until` (None: unknown)."""

    accelerator: Accelerator
    free: bool = True
    until: datetime | None = None


@dataclass(frozen=True)
class Candidate:
    """A queued job. `seconds` is its hard time limit, `reserved_node_id` the node that keeps accelerators for it."""

    job_id: str
    demand: Demand
    priority: int
    created_at: datetime
    seconds: float | None = None
    reserved_node_id: str | None = None

    @property
    def order(self) -> tuple[int, datetime, str]:
        """Return its place in the queue."""
        return self.priority, self.created_at, self.job_id


@dataclass(frozen=True)
class Host:
    """A node as placement sees it.

    `slots`: how many more jobs that hold no accelerator it may start; `keeps_for`: the job that has its reservation.
    `lacking`: environment → modules that were looked for there and not found.
    """

    node_id: str
    name: str
    environments: frozenset[str]
    labels: Mapping[str, str] = field(default_factory=dict)
    cards: tuple[Card, ...] = ()
    slots: int = 0
    keeps_for: Candidate | None = None
    lacking: Mapping[str, frozenset[str]] = field(default_factory=dict)
    allowed: AllowList = EVERYTHING


@dataclass(frozen=True)
class QueueLimit:
    """How many jobs of a queue may be live at once; None: any number."""

    max_live: int | None = None
    max_live_per_user: int | None = None


@dataclass(frozen=True)
class QueueLimits:
    """Limits by queue, and the live jobs by queue and user."""

    by_queue: Mapping[str, QueueLimit] = field(default_factory=dict)
    live: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def reached(self, demand: Demand) -> bool:
        """Say whether one more job of this demand is too many."""
        return self.queue_reached(demand) or self.user_reached(demand)

    def queue_reached(self, demand: Demand) -> bool:
        """Say whether the queue has as many live jobs as it may."""
        limit = self._limit(demand)
        return limit.max_live is not None and self.live_of_queue(demand.queue) >= limit.max_live

    def user_reached(self, demand: Demand) -> bool:
        """Say whether the user has as many live jobs in the queue as one may."""
        limit = self._limit(demand)
        mine = self.live.get((demand.queue, demand.submitted_by), 0)
        return limit.max_live_per_user is not None and mine >= limit.max_live_per_user

    def live_of_queue(self, queue: str) -> int:
        """Return how many jobs of the queue are live."""
        return sum(count for (name, _), count in self.live.items() if name == queue)

    def with_one_more(self, demand: Demand) -> "QueueLimits":
        """Return the limits with one more live job of this demand."""
        if not KINDS[demand.kind].counts_in_limits or demand.queue not in self.by_queue:
            return self
        key = (demand.queue, demand.submitted_by)
        return replace(self, live={**self.live, key: self.live.get(key, 0) + 1})

    def _limit(self, demand: Demand) -> QueueLimit:
        return self.by_queue.get(demand.queue, QueueLimit()) if KINDS[demand.kind].counts_in_limits else QueueLimit()


@dataclass(frozen=True)
class Take:
    """Start this job on these accelerators. `interchangeable`: any other job of the same demand may, too."""

    candidate: Candidate
    accelerators: tuple[str, ...]
    interchangeable: bool


@dataclass(frozen=True)
class Decision:
    """What a node does now. It drops the reservation `release`, then makes `reserve`, then starts `take`."""

    take: Take | None = None
    reserve: Candidate | None = None
    release: Candidate | None = None


# ---- what a node could run ------------------------------------------------------------------------------------------


def accelerators_needed(demand: Demand, cards: Sequence[Card]) -> int:
    """Return how many accelerators the job holds on a node with these.

    Who names a memory or needs an NVIDIA GPU wants an accelerator, also where there is none.
    """
    if not KINDS[demand.kind].holds_accelerators:
        return 0
    wanted = demand.resources.accelerators
    if wanted is not None:
        return wanted
    if cards:
        return demand.processes or 1
    return 0 if demand.resources.accelerator_memory_mib is None and not demand.cuda else 1


def mismatches(demand: Demand, host: Host) -> Sequence[Mismatch]:
    """Return what keeps the job from this node for good; none: it may run there, sooner or later."""
    found = []
    if demand.node_id is not None and demand.node_id != host.node_id:
        found.append(Mismatch.OTHER_NODE)
    if not host.allowed.permits(
        demand.kind, method_id=demand.method_id, project_id=demand.project_id, environment=demand.environment
    ):
        found.append(Mismatch.NOT_ALLOWED)
    if any(host.labels.get(name) != value for name, value in demand.resources.labels.items()):
        found.append(Mismatch.LABELS)
    needed = accelerators_needed(demand, host.cards)
    if needed > len(_of_kind(demand, host.cards)) or (demand.cuda and needed == 0):
        found.append(Mismatch.ACCELERATORS)
    elif needed > len(suitable(demand, host.cards)):
        found.append(Mismatch.MEMORY)
    if host.lacking.get(demand.environment, frozenset()).intersection(demand.modules):
        found.append(Mismatch.MODULES)
    if KINDS[demand.kind].needs_environment and demand.environment not in host.environments:
        found.append(Mismatch.ENVIRONMENT)
    return found


def suitable(demand: Demand, cards: Sequence[Card]) -> Sequence[Card]:
    """Return the cards of the kind and memory that the job asks for, those first that others will miss least."""
    least = demand.resources.accelerator_memory_mib or 0
    found = [card for card in _of_kind(demand, cards) if least == 0 or (card.accelerator.memory_mib or 0) >= least]
    return sorted(found, key=lambda card: (card.accelerator.memory_mib or 0, card.accelerator.index))


def _of_kind(demand: Demand, cards: Sequence[Card]) -> Sequence[Card]:
    return [card for card in cards if not demand.cuda or card.accelerator.kind is AcceleratorKind.CUDA]


# ---- who starts now -------------------------------------------------------------------------------------------------


def decide(
    candidates: Sequence[Candidate], host: Host, *, others: Sequence[Host], limits: QueueLimits, now: datetime
) -> Decision:
    """Return what the node does now. `others` are the live nodes that accept jobs; only reservations need them."""
    reservation = kept = host.keeps_for
    known = {one.job_id: one for one in (*candidates, *([kept] if kept else []))}
    for candidate in sorted(known.values(), key=lambda one: one.order):
        if mismatches(candidate.demand, host) or limits.reached(candidate.demand):
            reservation = None if candidate is reservation else reservation
            continue
        binding = reservation if reservation and reservation.order < candidate.order else None
        if (take := placed(candidate, host, binding=binding, now=now)) is not None:
            return _decision(take, kept, None if take.candidate is reservation else reservation)
        if reservation is not None and reservation.order <= candidate.order:
            continue  # one at a time, and it comes first
        if is_blocked(candidate, host) and _is_soonest(candidate, host, others=others, now=now):
            reservation = candidate
    return _decision(None, kept, reservation)


def is_blocked(candidate: Candidate, host: Host) -> bool:
    """Say whether small jobs could starve the job here: it waits for several accelerators at once."""
    return accelerators_needed(candidate.demand, host.cards) > 1 and placed(candidate, host) is None


def placed(candidate: Candidate, host: Host, *, binding: Candidate | None = None, now: datetime = NEVER) -> Take | None:
    """Return the accelerators that the job may start on at once; `binding` is the reservation that must not suffer."""
    needed = accelerators_needed(candidate.demand, host.cards)
    if needed == 0:
        return Take(candidate, (), interchangeable=True) if host.slots > 0 else None
    free = [card for card in host.cards if card.free]
    spared = free if binding is None else _spared(binding, host, now=now)
    if (chosen := _chosen(candidate.demand, spared, needed)) is not None:
        return Take(candidate, chosen, interchangeable=True)
    if binding is None or candidate.seconds is None:
        return None
    if now + timedelta(seconds=candidate.seconds) > soonest(binding.demand, host, now=now):
        return None
    chosen = _chosen(candidate.demand, free, needed)
    return None if chosen is None else Take(candidate, chosen, interchangeable=False)


def soonest(demand: Demand, host: Host, *, now: datetime) -> datetime:
    """Return when the node is expected to have enough free accelerators for the job; `NEVER` if that is unknown."""
    needed = accelerators_needed(demand, host.cards)
    if needed == 0:
        return now
    times = sorted(free_at(card, now=now) for card in suitable(demand, host.cards))
    return times[needed - 1] if len(times) >= needed else NEVER


def free_at(card: Card, *, now: datetime) -> datetime:
    """Return when the card is expected to be free; an end that is overdue may come at any moment."""
    if card.free:
        return now
    return NEVER if card.until is None else max(card.until, now)


def best_host(demand: Demand, hosts: Sequence[Host], *, now: datetime) -> Host | None:
    """Return the node that is free for the job first; if unknown, the one where least is missing."""

    def rank(host: Host) -> tuple[datetime, int, str]:
        missing = accelerators_needed(demand, host.cards) - sum(card.free for card in suitable(demand, host.cards))
        return soonest(demand, host, now=now), missing, host.name

    able = [host for host in hosts if not mismatches(demand, host)]
    return min(able, key=rank, default=None)


def _is_soonest(candidate: Candidate, host: Host, *, others: Sequence[Host], now: datetime) -> bool:
    """Say whether this node is the one that keeps accelerators for the job; a holder that lives and can, stays it."""
    holder = next((other for other in others if other.node_id == candidate.reserved_node_id), None)
    if holder is not None and not mismatches(candidate.demand, holder):
        return False
    open_hosts = [other for other in others if not (other.keeps_for and other.keeps_for.order < candidate.order)]
    return best_host(candidate.demand, [host, *open_hosts], now=now) is host


def _spared(binding: Candidate, host: Host, *, now: datetime) -> Sequence[Card]:
    """Return the free cards that the reserved job will not miss at its start."""
    start = soonest(binding.demand, host, now=now)
    fitting = suitable(binding.demand, host.cards)
    by_then = 0 if start == NEVER else sum(free_at(card, now=now) <= start for card in fitting)
    left_over = max(by_then - accelerators_needed(binding.demand, host.cards), 0)
    useless = [card for card in host.cards if card.free and card not in fitting]
    return [*useless, *[card for card in fitting if card.free][:left_over]]


def _chosen(demand: Demand, cards: Sequence[Card], needed: int) -> tuple[str, ...] | None:
    fitting = suitable(demand, cards)
    if len(fitting) < needed:
        return None
    return tuple(card.accelerator.id for card in fitting[:needed])


def _decision(take: Take | None, kept: Candidate | None, reservation: Candidate | None) -> Decision:
    """Say what changes: nothing for a reservation that stays, or whose job is started."""
    if reservation is kept:
        return Decision(take=take)
    started = take is not None and take.candidate is kept
    return Decision(take=take, reserve=reservation, release=None if started else kept)


# ---- the nodes' cards -----------------------------------------------------------------------------------------------


def cards_of(
    accelerators: Sequence[Accelerator],
    *,
    held: Mapping[str, datetime | None],
    blocked: Collection[str] = (),
) -> tuple[Card, ...]:
    """Return the cards of a node. `held`: accelerator → expected end of its holder; `blocked`: by foreign processes."""
    return tuple(
        Card(
            accelerator=one,
            free=one.id not in held and one.id not in blocked,
            until=None if one.id in blocked else held.get(one.id),
        )
        for one in accelerators
    )
