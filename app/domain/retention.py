"""What is kept how long: pure decisions about leftovers of jobs."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app.domain.enums import JobKind, JobStatus
from app.domain.kinds import KINDS


class Leftover(StrEnum):
    """Kinds of things that are removed when they are old."""

    FAILED_RUNS = "failed_runs"
    QUESTION_RUNS = "question_runs"
    CHECKPOINTS = "checkpoints"
    SCRIPT_LOGS = "script_logs"
    DELIVERIES = "deliveries"
    IDEMPOTENCY_KEYS = "idempotency_keys"


@dataclass(frozen=True)
class Retention:
    """How long leftovers are kept; None is for ever."""

    ages: Mapping[Leftover, timedelta | None]

    def limit(self, leftover: Leftover, now: datetime) -> datetime | None:
        """Return the moment before which such leftovers are too old."""
        age = self.ages.get(leftover)
        return None if age is None else now - age


@dataclass(frozen=True)
class EndedRun:
    """A job whose run folder is there. `needed`: an unfinished job repeats it."""

    kind: JobKind
    status: JobStatus
    finished_at: datetime | None
    needed: bool = False


def too_old(run: EndedRun, retention: Retention, now: datetime) -> Leftover | None:
    """Return as what the run's leftovers are removed; None: they stay, as do those of everything unfinished."""
    leftover = _leftover(run)
    if leftover is None or run.finished_at is None or run.needed:
        return None
    limit = retention.limit(leftover, now)
    return leftover if limit is not None and run.finished_at < limit else None


def _leftover(run: EndedRun) -> Leftover | None:
    if KINDS[run.kind].is_inference and run.status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        return Leftover.QUESTION_RUNS
    if run.status in (JobStatus.FAILED, JobStatus.CANCELLED):
        return Leftover.FAILED_RUNS
    if run.status is JobStatus.SUCCEEDED and KINDS[run.kind].checkpoints_expire:
        return Leftover.CHECKPOINTS
    return None
