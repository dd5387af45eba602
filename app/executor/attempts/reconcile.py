"""What to do next with a claimed attempt: one table, for boot and for every day.

An attempt is seen from two sides: its row (status, cancel request) and its engine (how far it came, and whether a
supervisor is alive). There is no separate path for recovery: a restarted worker looks at the same
two sides and does the same thing.
"""

from dataclasses import dataclass
from enum import StrEnum

from app.domain.enums import JobStatus
from app.executor.engines.base import AttemptPhase, AttemptState


class Step(StrEnum):
    """What a node does with one of its attempts."""

    WAIT = "wait"
    LAUNCH = "launch"  # also after a crash between claim and launch: the folder runs its command at most once
    ADOPT = "adopt"  # the supervisor died, the script may live on
    MARK_RUNNING = "mark_running"
    STOP = "stop"
    END_UNSTARTED = "end_unstarted"
    END_LOST = "end_lost"  # it ran, and its folder is gone: launching it again could run it twice
    FINALIZE = "finalize"


@dataclass(frozen=True)
class Seen:
    """Both sides of an attempt. `overdue`: it is beyond a limit of its job."""

    state: AttemptState
    status: JobStatus
    cancel_requested: bool
    overdue: bool = False


def next_step(seen: Seen) -> Step:
    """Return the one thing to do now."""
    phase = seen.state.phase
    if phase is AttemptPhase.EXITED:
        return Step.FINALIZE
    stops = seen.state.stopping and seen.status is JobStatus.STOPPING
    wants_stop = (seen.cancel_requested or seen.overdue) and not stops
    if seen.state.supervised:
        if wants_stop:
            return Step.STOP
        if phase is AttemptPhase.RUNNING and seen.status is JobStatus.LAUNCHING:
            return Step.MARK_RUNNING
        return Step.WAIT
    if seen.state.pending:
        return Step.WAIT
    if phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING):
        return Step.ADOPT
    # an overdue one is stopping without a request to cancel
    if seen.status is JobStatus.RUNNING or (seen.status is JobStatus.STOPPING and not seen.cancel_requested):
        return Step.END_LOST
    return Step.END_UNSTARTED if seen.cancel_requested else Step.LAUNCH
