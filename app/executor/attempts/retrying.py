"""Whether a job of which an attempt ended is run once more, from its row (`app.domain.retries` has the rules)."""

from app.domain.enums import EndReason
from app.domain.retries import Again, Failure, RetryPolicy, decide
from app.executor.runs.job_spec import is_runner_call
from app.store.tables import JobRow


def decide_on(job: JobRow, reason: EndReason, *, ran: bool, progressed: bool = False) -> Again | None:
    """Return how the job is run again, None if its end is final.

    `ran`: the script had begun. `progressed`: it left a checkpoint behind the one that it began with.
    """
    if job.cancel_requested_at is not None:
        return None
    if ran and is_runner_call(job):
        return None  # it may have written into the folder that its caller named
    failure = Failure(kind=job.kind, reason=reason, ran=ran, progressed=progressed)
    return decide(failure, RetryPolicy.of(job.retry), retries=job.retries, recoveries=job.recoveries)
