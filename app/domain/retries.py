"""After an attempt: does the job run once more? Pure; what is decided here is written by `app.store.jobs`.

Three kinds of reasons. What the machine or the supervisor did to the script is repeated unasked and not charged to the
caller (`INFRASTRUCTURE`, at most `MAX_RECOVERIES` times). What may go better the next time is repeated when the caller
asked for it at submit (`REPEATABLE`, `RetryPolicy`). Everything else would only fail again, an attempt that ran out of
memory above all: that ends the job, and a person changes something first (`app.domain.failure_suggestions`).

A script that had begun is repeated unasked only where that does no harm: training, saving and building write into a
fresh folder of the attempt. A deployment may have changed something that the service cannot see, and the caller of an
inference has read a part of the answer already; those two are repeated unasked only if nothing of the script ran.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from pydantic import ConfigDict, Field, field_validator

from app.domain.enums import EndReason, JobKind
from app.domain.errors import Violation
from app.domain.kinds import KINDS
from app.domain.pointers import pointer
from app.domain.values import Value

MAX_RETRIES = 20
MAX_RECOVERIES = 5
LONGEST_WAIT = 86_400.0
SHORTEST_LIMIT = 1.0
LONGEST_LIMIT = 366 * 86_400.0

INFRASTRUCTURE = frozenset({EndReason.NODE_LOST, EndReason.SUPERVISOR_LOST})
REPEATABLE = frozenset(
    {
        EndReason.EXIT_CODE,
        EndReason.SIGNAL,
        EndReason.NCCL_ERROR,
        EndReason.METAL_WATCHDOG,
        EndReason.TIMED_OUT,
        EndReason.STALLED,
        EndReason.DISK_FULL,
        EndReason.SPAWN_FAILED,
        EndReason.INPUT_MISSING,
        EndReason.RESULT_FAILED,
        EndReason.OUTPUT_MISSING,
        EndReason.OUTPUT_INVALID,
        EndReason.SCRIPT_REPORTED_FAILURE,
    }
)


class _Chosen(Value):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, document: object) -> Self:
        """Read what a job keeps; an empty document is the default."""
        return cls.model_validate(document or {})

    def document(self) -> dict[str, object]:
        """Return the JSON that a job keeps."""
        return self.model_dump(mode="json", exclude_defaults=True)


class RetryPolicy(_Chosen):
    """How often, how soon and for which reasons a failed job is retried automatically.

    Loss of a node or of our own processes needs no policy and is not counted here.
    """

    max_retries: int = Field(
        default=0, ge=0, le=MAX_RETRIES, description="How many more attempts a failure may cost.", examples=[3]
    )
    backoff_seconds: float = Field(
        default=30.0,
        ge=0,
        le=LONGEST_WAIT,
        description="Pause before the first retry; it doubles with each further one.",
    )
    max_backoff_seconds: float = Field(
        default=3600.0, ge=0, le=LONGEST_WAIT, description="Longest pause between two attempts."
    )
    on: tuple[EndReason, ...] | None = Field(
        default=None,
        max_length=len(EndReason),
        description="Only after these reasons. Default: after all that may go better the next time. Memory that ran "
        "out, a missing module or a missing column are no such reasons: change the job and retry it by hand.",
        examples=[["signal", "nccl_error", "stalled"]],
    )

    @field_validator("on")
    @classmethod
    def _each_once(cls, value: tuple[EndReason, ...] | None) -> tuple[EndReason, ...] | None:
        return None if value is None else tuple(dict.fromkeys(value))

    def covers(self, reason: EndReason) -> bool:
        """Say whether the caller wants another attempt after this reason."""
        return reason in REPEATABLE and (self.on is None or reason in self.on)

    def delay(self, retries: int) -> timedelta:
        """Return how long to wait before the next attempt, after `retries` earlier retries."""
        return timedelta(seconds=min(self.backoff_seconds * 2.0**retries, self.max_backoff_seconds))


class Limits(_Chosen):
    """Limits after which an attempt is stopped without a request. Counted in the attempt's own running time."""

    seconds: float | None = Field(
        default=None,
        ge=SHORTEST_LIMIT,
        le=LONGEST_LIMIT,
        description="An attempt that runs longer is stopped with `timed_out`.",
        examples=[86_400],
    )
    silent_seconds: float | None = Field(
        default=None,
        ge=SHORTEST_LIMIT,
        le=LONGEST_LIMIT,
        description="An attempt whose output, events and output folder have not changed for so long is stopped with "
        "`stalled`.",
        examples=[1800],
    )


@dataclass(frozen=True)
class Failure:
    """How an attempt ended. `ran`: the script had begun.

    `progressed`: it left a checkpoint behind the one that it began with.
    """

    kind: JobKind
    reason: EndReason
    ran: bool = True
    progressed: bool = False


@dataclass(frozen=True)
class Again:
    """The job goes back into the queue. `charged`: to the caller's budget."""

    charged: bool
    delay: timedelta


def decide(failure: Failure, policy: RetryPolicy, *, retries: int, recoveries: int) -> Again | None:
    """Return how the job is run again, None if its end is final. `retries` and `recoveries` were made before."""
    if failure.reason in INFRASTRUCTURE:
        harmless = not failure.ran or KINDS[failure.kind].safe_to_repeat
        return Again(charged=False, delay=_pause(recoveries)) if harmless and recoveries < MAX_RECOVERIES else None
    if retries >= policy.max_retries or not policy.covers(failure.reason):
        return None
    if failure.reason is EndReason.TIMED_OUT and not failure.progressed:
        return None  # it would come exactly as far once more
    return Again(charged=True, delay=policy.delay(retries))


def policy_violations(policy: RetryPolicy) -> Sequence[Violation]:
    """Return the reasons in `on` after which no job is repeated by this policy."""
    allowed = ", ".join(sorted(REPEATABLE))
    return [
        Violation(pointer("retry", "on", index), "retry_reason_refused", {"reason": reason, "reasons": allowed})
        for index, reason in enumerate(policy.on or ())
        if reason not in REPEATABLE
    ]


def _pause(recoveries: int) -> timedelta:
    """Return no delay the first time, and a growing one for a node that keeps losing its processes."""
    return timedelta(seconds=2.0 ** (recoveries - 1) if recoveries else 0.0)
