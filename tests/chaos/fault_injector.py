"""A run under faults: a seeded sequence of them over an installation that works, then the verdict."""

import asyncio
import contextlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil

from app.store.tables import AttemptRow
from tests.chaos.cluster import PATIENCE_SECONDS, Cluster, Folder, Node, cluster, supervisors
from tests.chaos.faults import BACKENDS, NothingToHit
from tests.chaos.verdict import Evidence, Verdict, judge
from tests.fork_server import ForkServer
from tests.waiting import until

LOOK_SECONDS = 0.1
RECOVERY_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What a run does. The same seed chooses the same faults; what they meet depends on the machine."""

    seed: int
    faults: int
    backend: str
    pause: tuple[float, float] = (0.2, 0.4)
    nodes: int = 3
    ahead: int = 8
    jobs_per_fault: float = 0.3
    patience: float = PATIENCE_SECONDS


@dataclass(frozen=True)
class Outcome:
    """What a run showed."""

    plan: Plan
    evidence: Evidence
    verdict: Verdict
    counts: Counter[str]
    recoveries: dict[str, list[float]]
    seconds: float


@dataclass
class FaultInjector:
    """Hits a cluster with one fault after the other; several may be under way, never two on one target."""

    cluster: Cluster
    plan: Plan
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    signs: dict[str, Any] = field(default_factory=dict)
    _held: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def rage(self) -> None:
        """Inject as many faults as planned and wait until each is undone."""
        rng = Random(self.plan.seed)
        kinds = BACKENDS[self.plan.backend]
        weights = [weight for _, weight in kinds.values()]
        watching = asyncio.create_task(self._watch())
        try:
            number = 0
            while sum(self.counts.values()) < self.plan.faults:
                await asyncio.sleep(rng.uniform(*self.plan.pause))
                await until(self._keeps_pace, "jobs between the faults", self.cluster.report)
                (kind,) = rng.choices(list(kinds), weights)
                number += 1
                task = asyncio.create_task(self._inject(kind, Random(f"{self.plan.seed}-{number}")))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.gather(*self._tasks)
        finally:
            watching.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(watching, *self._tasks, return_exceptions=True)

    def _keeps_pace(self) -> bool:
        """Say whether enough jobs were accepted for the faults so far; on a busy machine faults wait for them."""
        self._restart_what_ended()
        return len(self.cluster.acknowledged()) >= self.plan.jobs_per_fault * sum(self.counts.values())

    def _restart_what_ended(self) -> None:
        """Start again what ended by itself, as a service manager does."""
        for node in self.cluster.nodes:
            if node.name not in self._held:
                node.worker.start()
        if "api" not in self._held:
            self.cluster.api.start()

    async def _inject(self, kind: str, rng: Random) -> None:
        inject, _ = BACKENDS[self.plan.backend][kind]
        try:
            seconds = await inject(self, rng)
        except (NothingToHit, psutil.NoSuchProcess):
            return
        self.counts[kind] += 1
        if (done := sum(self.counts.values())) % 100 == 0:
            print(f"{done} faults", file=sys.stderr, flush=True)
        if seconds is not None:
            self.recoveries[kind].append(seconds)

    # ---- for the faults ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def holding(self, target: str) -> Iterator[None]:
        """Have the target for oneself."""
        if target in self._held:
            raise NothingToHit
        self._held.add(target)
        try:
            yield
        finally:
            self._held.discard(target)

    @contextlib.contextmanager
    def holding_node(self, rng: Random) -> Iterator[Node]:
        node = rng.choice(self.cluster.nodes)
        with self.holding(node.name):
            if not node.worker.is_alive():
                raise NothingToHit
            yield node

    @contextlib.contextmanager
    def holding_attempt(self, rng: Random) -> Iterator[tuple[Node, Folder]]:
        under_way = list(supervisors(self.cluster.nodes))
        if not under_way:
            raise NothingToHit
        node, folder = rng.choice(under_way)
        with self.holding(folder.attempt):
            yield node, folder

    async def until_changed(self, sign: str, before: dict[str, Any]) -> float | None:
        """Return the seconds until the sign is another one than before, None if it took too long to wait."""
        begun = time.monotonic()
        while self.signs.get(sign) == before.get(sign):
            if time.monotonic() - begun > RECOVERY_SECONDS:
                return None
            await asyncio.sleep(0.02)
        return time.monotonic() - begun

    async def job_of(self, attempt: str) -> str | None:
        """Return the job of an attempt, None while the database does not answer."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(15), self.cluster.database.reading() as session:
                row = await session.get(AttemptRow, attempt)
                return row.job_id if row is not None else None
        return None

    async def _watch(self) -> None:
        while True:
            signs = await self.cluster.signs_of_life()
            if signs is not None:
                self.signs = signs
            await asyncio.sleep(LOOK_SECONDS)


async def run(plan: Plan, root: Path, forks: ForkServer | None = None) -> Outcome:
    """Run the plan under `root` and judge what happened. With a fork server, workers and API are forked."""
    begun = time.monotonic()
    async with cluster(
        root, backend=plan.backend, nodes=plan.nodes, jobs=100_000, ahead=plan.ahead, forks=forks
    ) as site:
        for child in site.children():
            child.start()
        injector = FaultInjector(site, plan)
        await injector.rage()
        (root / "enough").touch()
        await site.heal()
        await asyncio.to_thread(site.submitter.process.wait)  # type: ignore[union-attr]
        await site.settle(plan.patience)
        evidence = await site.evidence()
    seconds = time.monotonic() - begun
    return Outcome(plan, evidence, judge(evidence), injector.counts, injector.recoveries, seconds)


def report(outcome: Outcome) -> str:
    """Return the run as a table."""
    plan, evidence, verdict = outcome.plan, outcome.evidence, outcome.verdict
    runs = {line.attempt for line in evidence.journal}
    statuses = Counter(job.status for job in evidence.jobs)
    lines = [
        f"{plan.backend}, seed {plan.seed}: {sum(outcome.counts.values())} faults in {outcome.seconds:.0f} s",
        f"jobs accepted {len(evidence.acknowledged)}, "
        + ", ".join(f"{name} {count}" for name, count in sorted(statuses.items()))
        + f"; attempts that ran {len(runs)}, of them hurt {len(runs & evidence.hurt)}",
        "",
        f"{'fault':32}{'count':>6}{'median s':>10}{'p99 s':>8}",
    ]
    for kind, count in outcome.counts.most_common():
        times = sorted(outcome.recoveries.get(kind, ()))
        shown = f"{median(times):10.2f}{percentile(times, 0.99):8.2f}" if times else f"{'-':>10}{'-':>8}"
        lines.append(f"{kind:32}{count:6}{shown}")
    lines.append("")
    for name in verdict.__dataclass_fields__:
        found = getattr(verdict, name)
        lines.append(f"{name.replace('_', ' '):32}{len(found):6}")
        lines += [f"    {one}" for one in found[:10]]
    return "\n".join(lines)


def percentile(ordered: list[float], part: float) -> float:
    """Return the value that `part` of the sorted values do not exceed."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
