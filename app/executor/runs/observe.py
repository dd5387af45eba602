"""Read the current progress, latest metrics, scores and curves from a job's run folders.

Files are read incrementally, and what was read is cached while it is requested.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

from app.executor.runs.evaluations import Evaluation, Sample, paired_evaluations, paired_samples
from app.executor.runs.events import EvaluationEvent, NoteEvent, ProgressEvent, RunEvents, SampleEvent
from app.executor.runs.metrics import MetricSeries, Point
from app.executor.runs.progress import Progress, ProgressEstimator
from app.executor.runs.run_folder import RunFolder
from app.store.home import Home

KEPT_JOBS = 64
KEPT_SAMPLES = 40
KEPT_NOTES = 100  # a script may write one for each step


@dataclass(frozen=True)
class RunDigest:
    """The state of a run for people."""

    progress: Progress | None
    latest: dict[str, float]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]
    samples: tuple[Sample, ...] = ()


NOTHING_SAID: Final = RunDigest(progress=None, latest={}, evaluations=(), notes=())
"""Of a job that was not launched yet."""


@dataclass
class _Reader:
    """Everything read so far of one job's folders."""

    series: MetricSeries = field(default_factory=MetricSeries)
    attempts: list[RunEvents] = field(default_factory=list)
    estimator: ProgressEstimator = field(default_factory=ProgressEstimator)
    evaluations: list[EvaluationEvent] = field(default_factory=list)
    samples: deque[SampleEvent] = field(default_factory=lambda: deque(maxlen=KEPT_SAMPLES))
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_NOTES))
    lock: Lock = field(default_factory=Lock)


class RunObserver:
    """Reads run folders on behalf of the API; all methods block, call them in a thread."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._readers: OrderedDict[str, _Reader] = OrderedDict()
        self._lock = Lock()

    def digest(self, job_id: str, attempts: int) -> RunDigest:
        """Return the present state of the job's run; `attempts` is how many there have been."""
        reader = self._reader(job_id)
        with reader.lock:
            self._refresh(reader, job_id, attempts)
            return RunDigest(
                progress=reader.estimator.progress,
                latest={name: point.value for name, point in reader.series.latest.items() if point.value is not None},
                evaluations=paired_evaluations(reader.evaluations),
                notes=tuple(reader.notes),
                samples=paired_samples(reader.samples),
            )

    def curves(self, job_id: str, attempts: int, *, names: Sequence[str], points: int) -> dict[str, tuple[Point, ...]]:
        """Return the curves `names` (all of them when empty), each reduced to at most `points` points."""
        reader = self._reader(job_id)
        with reader.lock:
            self._refresh(reader, job_id, attempts)
            wanted = names or reader.series.names
            return {name: reader.series.series(name, points) for name in wanted}

    def _reader(self, job_id: str) -> _Reader:
        with self._lock:
            reader = self._readers.pop(job_id, None) or _Reader()
            self._readers[job_id] = reader
            while len(self._readers) > KEPT_JOBS:
                self._readers.popitem(last=False)
            return reader

    def _refresh(self, reader: _Reader, job_id: str, attempts: int) -> None:
        while len(reader.attempts) < attempts:
            folder = RunFolder(self._home.run_folder(job_id, len(reader.attempts) + 1))
            reader.attempts.append(RunEvents(folder))
            reader.series.add_attempt(folder)
        reader.series.refresh()
        for attempt in reader.attempts:
            for event in attempt.read():
                match event:
                    case ProgressEvent():
                        reader.estimator.add(event)
                    case EvaluationEvent():
                        reader.evaluations.append(event)
                    case SampleEvent():
                        reader.samples.append(event)
                    case NoteEvent():
                        reader.notes.append(event.message)
                    case _:
                        pass
