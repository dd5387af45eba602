"""The verdict of a run under faults: a pure function of what scripts wrote down and what the database says.

Nothing here asks the service. The journal is a file to which every script, and every process it started, appends lines
of its own accord; the faults are what the harness did, written down before it did it. A run is clean when every list of
the verdict is empty.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
CLOCK_SECONDS = 0.05  # between a script's clock and the transaction's


@dataclass(frozen=True)
class Line:
    """What a process of an attempt wrote: `start`, `tick`, `end` (all outputs are there) or `child`."""

    word: str
    job: str
    attempt: str
    at: float
    accelerators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A row."""

    id: str
    status: str
    reason: str | None = None


@dataclass(frozen=True)
class Attempt:
    """A row."""

    id: str
    job: str
    number: int
    node: str
    live: bool = False


@dataclass(frozen=True)
class Event:
    """A transition of a job, in the order of the database."""

    job: str
    status: str
    at: float


@dataclass(frozen=True)
class Lease:
    """A row: an accelerator that was promised to an attempt."""

    node: str
    accelerator: str
    attempt: str
    begun: float
    ended: float | None


@dataclass(frozen=True)
class Evidence:
    """All that a verdict is made of.

    `hurt` are attempts whose processes the harness killed so that their end may be bad, `cancelled` the jobs that it
    asked to cancel, `leftovers` processes that were found alive when all was over.
    """

    acknowledged: Sequence[str]
    journal: Sequence[Line]
    jobs: Sequence[Job]
    attempts: Sequence[Attempt]
    events: Sequence[Event]
    leases: Sequence[Lease] = ()
    models: Sequence[str] = ()
    slots: Mapping[str, int] = field(default_factory=dict)
    hurt: frozenset[str] = frozenset()
    cancelled: frozenset[str] = frozenset()
    leftovers: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """Every violation that was found, in words; all empty is a clean run."""

    lost: tuple[str, ...]
    overlaps: tuple[str, ...]
    ran_twice: tuple[str, ...]
    completed_twice: tuple[str, ...]
    double_leases: tuple[str, ...]
    over_slots: tuple[str, ...]
    ran_after_end: tuple[str, ...]
    false_ends: tuple[str, ...]
    unexplained: tuple[str, ...]
    leftovers: tuple[str, ...]

    def violations(self) -> dict[str, tuple[str, ...]]:
        """Return the lists that are not empty."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: values for name, values in found.items() if values}


@dataclass(frozen=True)
class Run:
    """One execution of an attempt's command as its own lines show it: from the first to the last."""

    job: str
    attempt: str
    begun: float
    last: float
    ended: bool
    starts: int
    accelerators: tuple[str, ...]


def judge(evidence: Evidence) -> Verdict:
    """Return everything that went wrong."""
    runs = list(runs_of(evidence.journal))
    return Verdict(
        lost=tuple(_lost(evidence)),
        overlaps=tuple(_overlaps(runs)),
        ran_twice=tuple(f"attempt {run.attempt} began {run.starts} times" for run in runs if run.starts > 1),
        completed_twice=tuple(_completed_twice(evidence, runs)),
        double_leases=tuple(_double_leases(evidence, runs)),
        over_slots=tuple(_over_slots(evidence, runs)),
        ran_after_end=tuple(_ran_after_end(evidence, runs)),
        false_ends=tuple(_false_ends(evidence, runs)),
        unexplained=tuple(_unexplained(evidence, runs)),
        leftovers=tuple(evidence.leftovers),
    )


def runs_of(journal: Iterable[Line]) -> Iterator[Run]:
    """Return what each attempt did, children included."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for line in journal:
        lines[line.attempt].append(line)
    for attempt, own in lines.items():
        times = [line.at for line in own]
        yield Run(
            job=own[0].job,
            attempt=attempt,
            begun=min(times),
            last=max(times),
            ended=any(line.word == "end" for line in own),
            starts=sum(line.word == "start" for line in own),
            accelerators=own[0].accelerators,
        )


def _lost(evidence: Evidence) -> Iterator[str]:
    status = {job.id: job.status for job in evidence.jobs}
    for job in evidence.acknowledged:
        if status.get(job) not in TERMINAL:
            yield f"job {job} was accepted and is {status.get(job, 'unknown')}"
    for attempt in evidence.attempts:
        if attempt.live:
            yield f"attempt {attempt.id} is still live"


def _overlaps(runs: Sequence[Run]) -> Iterator[str]:
    for job, own in _grouped(runs).items():
        for one, other in _collisions([(run.begun, run.last, run.attempt) for run in own]):
            yield f"job {job}: attempts {one} and {other} ran at once"


def _completed_twice(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    ends = Counter(event.job for event in evidence.events if event.status in TERMINAL)
    yield from (f"job {job} has {count} ends" for job, count in ends.items() if count > 1)
    models = Counter(evidence.models)
    yield from (f"job {job} made {count} models" for job, count in models.items() if count > 1)
    for job, own in _grouped(runs).items():
        finished = [run for run in own if run.ended and run.attempt not in evidence.hurt]
        if len(finished) > 1:
            yield f"job {job} was finished by {len(finished)} attempts"


def _double_leases(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    node = {attempt.id: attempt.node for attempt in evidence.attempts}
    used: dict[tuple[str, str], list[_Span]] = defaultdict(list)
    for run in runs:
        for accelerator in run.accelerators:
            used[node.get(run.attempt, ""), accelerator].append((run.begun, run.last, run.attempt))
    promised: dict[tuple[str, str], list[_Span]] = defaultdict(list)
    for lease in evidence.leases:
        until = float("inf") if lease.ended is None else lease.ended
        promised[lease.node, lease.accelerator].append((lease.begun, until, lease.attempt))
    yield from _outside_of_leases(evidence, runs)
    for verb, spans in (("used by", used), ("leased to", promised)):
        for (holder, accelerator), own in spans.items():
            for one, other in _collisions(own):
                yield f"accelerator {accelerator} of {holder} was {verb} {one} and {other} at once"


def _outside_of_leases(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    """An accelerator is leased before the script starts and until nothing of it is left."""
    leases = {(lease.attempt, lease.accelerator): lease for lease in evidence.leases}
    for run in runs:
        for accelerator in run.accelerators:
            lease = leases.get((run.attempt, accelerator))
            if lease is None:
                yield f"attempt {run.attempt} used accelerator {accelerator} without a lease"
            elif lease.ended is not None and run.last > lease.ended + CLOCK_SECONDS:
                yield f"attempt {run.attempt} used accelerator {accelerator} after its lease"


_Span = tuple[float, float, str]


def _collisions(spans: Sequence[_Span]) -> Iterator[tuple[str, str]]:
    """Return who was there while somebody else still was."""
    longest: _Span | None = None
    for span in sorted(spans):
        if longest is not None and span[0] < longest[1] and span[2] != longest[2]:
            yield longest[2], span[2]
        if longest is None or span[1] > longest[1]:
            longest = span


def _over_slots(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    node = {attempt.id: attempt.node for attempt in evidence.attempts}
    moments: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for run in runs:
        moments[node.get(run.attempt, "")] += [(run.begun, 1), (run.last, -1)]
    for name, own in moments.items():
        busy = most = 0
        for _, change in sorted(own):
            busy += change
            most = max(most, busy)
        if name in evidence.slots and most > evidence.slots[name]:
            yield f"node {name} ran {most} attempts at once in {evidence.slots[name]} slots"


def _ran_after_end(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    """Whatever the reason of an end, it is written after nothing of the job is left."""
    over = {event.job: event.at for event in evidence.events if event.status in TERMINAL}
    for run in runs:
        if run.job in over and run.last > over[run.job] + CLOCK_SECONDS:
            yield f"attempt {run.attempt} wrote {run.last - over[run.job]:.3f} s after the end of job {run.job}"


def _false_ends(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    finished = {run.job for run in runs if run.ended}
    for job in evidence.jobs:
        if job.status == "succeeded" and job.id not in finished:
            yield f"job {job.id} succeeded and never finished"


def _unexplained(evidence: Evidence, runs: Sequence[Run]) -> Iterator[str]:
    """Bad ends and new attempts of jobs whose processes nobody of the harness touched."""
    hurt = {attempt.job for attempt in evidence.attempts if attempt.id in evidence.hurt}
    for job in evidence.jobs:
        if job.status == "failed" and job.id not in hurt:
            yield f"job {job.id} failed ({job.reason}) although nobody hurt it"
        if job.status == "cancelled" and job.id not in evidence.cancelled:
            yield f"job {job.id} was cancelled by nobody"
    for job_id, own in _grouped(runs).items():
        for run in sorted(own, key=lambda run: run.begun)[:-1]:
            if run.attempt not in evidence.hurt:
                yield f"job {job_id} ran again although attempt {run.attempt} was not hurt"


def _grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    jobs: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        jobs[run.job].append(run)
    return jobs
