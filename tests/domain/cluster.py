"""A simulated cluster: nodes that decide for themselves by `decide`, a clock that jumps from event to event."""

import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.demand import Demand, Resources
from app.domain.enums import JobKind
from app.domain.placement import Candidate, Host, QueueLimit, QueueLimits, cards_of, decide, soonest

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def accelerators(count: int, memory_mib: int = 80_000) -> tuple[Accelerator, ...]:
    """Return the cards of a node."""
    return tuple(
        Accelerator(id=f"c{index}", index=index, kind=AcceleratorKind.SIMULATED, name="c", memory_mib=memory_mib)
        for index in range(count)
    )


@dataclass(frozen=True)
class Work:
    """A job of the simulation: what it asks for and how long it really takes. `known`: its end is foreseen exactly."""

    name: str
    cards: int
    seconds: float
    arrives: float = 0.0
    priority: int = 0
    known: bool = True
    limited: bool = False
    queue: str = "default"
    user: str = ""

    @property
    def candidate(self) -> Candidate:
        return Candidate(
            job_id=self.name,
            demand=Demand(
                kind=JobKind.TRAINING,
                environment="e",
                resources=Resources(accelerators=self.cards),
                queue=self.queue,
                submitted_by=self.user,
            ),
            priority=self.priority,
            created_at=START + timedelta(seconds=self.arrives),
            seconds=self.seconds if self.limited else None,
        )


@dataclass
class Running:
    """A started job."""

    work: Work
    node: str
    cards: tuple[str, ...]
    since: float
    until: float


@dataclass
class Cluster:
    """The state of the simulation; times are seconds since its start."""

    sizes: Mapping[str, int]
    limits: Mapping[str, QueueLimit] = field(default_factory=dict)
    now: float = 0.0
    waiting: dict[str, Candidate] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    promised: dict[str, float] = field(default_factory=dict)
    most_live: dict[tuple[str, str], int] = field(default_factory=dict)

    def run(self, works: Sequence[Work], *, until: float = 1e9) -> "Cluster":
        """Let the works arrive, start and end."""
        events = [(work.arrives, number, work) for number, work in enumerate(works)]
        heapq.heapify(events)
        while events or self.running:
            ends = min((one.until for one in self.running.values()), default=float("inf"))
            self.now = min(ends, events[0][0] if events else float("inf"))
            if self.now > until:
                break
            for name in [name for name, one in self.running.items() if one.until <= self.now]:
                del self.running[name]
            while events and events[0][0] <= self.now:
                work = heapq.heappop(events)[2]
                self.works[work.name], self.waiting[work.name] = work, work.candidate
            self._let_nodes_decide()
        return self

    def cancel(self, name: str) -> None:
        """Take a job out of the queue; its reservation goes with it."""
        del self.waiting[name]

    def _let_nodes_decide(self) -> None:
        changed = True
        while changed:
            changed = False
            for name in self.sizes:
                changed |= self._decide(name)

    def _decide(self, name: str) -> bool:
        hosts = {node: self._host(node) for node in self.sizes}
        others = [host for node, host in hosts.items() if node != name]
        now = START + timedelta(seconds=self.now)
        decision = decide(list(self.waiting.values()), hosts[name], others=others, limits=self._limits(), now=now)
        if decision.release is not None:
            self._reserve(decision.release, None)
        if decision.reserve is not None:
            self._reserve(decision.reserve, name)
            self._promise(decision.reserve, soonest(decision.reserve.demand, hosts[name], now=now))
        if decision.take is None:
            return decision.reserve is not None or decision.release is not None
        job_id, cards = decision.take.candidate.job_id, decision.take.accelerators
        held = {card for one in self.running.values() if one.node == name for card in one.cards}
        assert not held & set(cards), "an accelerator was given away twice"
        work = self.works[job_id]
        assert len(cards) == work.cards
        del self.waiting[job_id]
        self.running[job_id] = Running(work, name, cards, self.now, self.now + work.seconds)
        self.started[job_id] = self.now
        self._count(work)
        return True

    def _promise(self, candidate: Candidate, start: datetime) -> None:
        """Note when the first of the queue shall start; another may still have to wait for those before it."""
        if candidate.order == min(one.order for one in self.waiting.values()):
            self.promised.setdefault(candidate.job_id, (start - START).total_seconds())

    def _count(self, work: Work) -> None:
        for key in ((work.queue, work.user), (work.queue, "*")):
            live = sum(one.work.queue == key[0] and key[1] in ("*", one.work.user) for one in self.running.values())
            self.most_live[key] = max(self.most_live.get(key, 0), live)

    def _reserve(self, candidate: Candidate, node: str | None) -> None:
        if candidate.job_id in self.waiting:
            self.waiting[candidate.job_id] = dataclasses.replace(candidate, reserved_node_id=node)
        holders = [one.reserved_node_id for one in self.waiting.values() if one.reserved_node_id]
        assert len(holders) == len(set(holders)), "a node keeps accelerators for two jobs"

    def _host(self, name: str) -> Host:
        held = {
            card: START + timedelta(seconds=one.until) if one.work.known else None
            for one in self.running.values()
            if one.node == name
            for card in one.cards
        }
        return Host(
            node_id=name,
            name=name,
            environments=frozenset({"e"}),
            cards=cards_of(accelerators(self.sizes[name]), held=held),
            keeps_for=next((one for one in self.waiting.values() if one.reserved_node_id == name), None),
        )

    def _limits(self) -> QueueLimits:
        live: dict[tuple[str, str], int] = {}
        for one in self.running.values():
            key = (one.work.queue, one.work.user)
            live[key] = live.get(key, 0) + 1
        return QueueLimits(by_queue=self.limits, live=live)
