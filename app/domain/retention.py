"""Decide how long files and rows of ended jobs are kept. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from app.domain.enums import JobKind, JobStatus
from app.domain.kinds import KINDS


class RetentionTarget(StrEnum):
    """What retention removes."""

    FAILED_RUNS = "failed_runs"
    QUESTION_RUNS = "question_runs"
    CHECKPOINTS = "checkpoints"
    SCRIPT_LOGS = "script_logs"
    DELIVERIES = "deliveries"
    IDEMPOTENCY_KEYS = "idempotency_keys"
    AUDIT_RECORDS = "audit_records"


@dataclass(frozen=True)
class Retention:
    """The age at which each target is removed. `None`: never."""

    ages: Mapping[RetentionTarget, timedelta | None]

    def limit(self, target: RetentionTarget, now: datetime) -> datetime | None:
        """Return the time before which the target is too old. `None`: it is kept for ever."""
        age = self.ages.get(target)
        return None if age is None else now - age


@dataclass(frozen=True)
class EndedRun:
    """A job whose run folder exists. `needed`: an unfinished job repeats it."""

    kind: JobKind
    status: JobStatus
    finished_at: datetime | None
    needed: bool = False


def too_old(run: EndedRun, retention: Retention, now: datetime) -> RetentionTarget | None:
    """Return which target the run's files belong to. `None`: they are kept, like those of unfinished jobs."""
    target = _target(run)
    if target is None or run.finished_at is None or run.needed:
        return None
    limit = retention.limit(target, now)
    return target if limit is not None and run.finished_at < limit else None


def _target(run: EndedRun) -> RetentionTarget | None:
    if KINDS[run.kind].answers_request and run.status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        return RetentionTarget.QUESTION_RUNS
    if run.status in (JobStatus.FAILED, JobStatus.CANCELLED):
        return RetentionTarget.FAILED_RUNS
    if run.status is JobStatus.SUCCEEDED and KINDS[run.kind].checkpoints_expire:
        return RetentionTarget.CHECKPOINTS
    return None
