"""The one transition table of jobs."""

from app.domain.enums import JobStatus
from app.domain.errors import Conflict

ALLOWED: dict[JobStatus, frozenset[JobStatus]] = {
    # succeeded from here: the job before it made what it was to make
    JobStatus.QUEUED: frozenset({JobStatus.LAUNCHING, JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED}),
    # back to queued: the attempt ended, and its reason allows another one (`app.domain.retries`)
    JobStatus.LAUNCHING: frozenset(
        {
            JobStatus.RUNNING,
            JobStatus.STOPPING,
            JobStatus.QUEUED,
            JobStatus.SUCCEEDED,
            JobStatus.FAILED,
            JobStatus.CANCELLED,
        }
    ),
    JobStatus.RUNNING: frozenset(
        {JobStatus.STOPPING, JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    # back to queued from here: it was stopped by its limits, not by a person
    JobStatus.STOPPING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

TERMINAL = frozenset(status for status, following in ALLOWED.items() if not following)
UNFINISHED = frozenset(JobStatus) - TERMINAL
LIVE = frozenset({JobStatus.LAUNCHING, JobStatus.RUNNING, JobStatus.STOPPING})


class IllegalTransition(Conflict):
    """A status change that the table does not have."""

    code = "illegal_transition"


def check_transition(old: JobStatus, new: JobStatus) -> None:
    """Raise `IllegalTransition` unless a job may go from `old` to `new`."""
    if new not in ALLOWED[old]:
        raise IllegalTransition(old=old, new=new)
