"""What to do next with a claimed attempt: one table, for boot and for every day.

An attempt is seen from two sides: its row (status, the wish to cancel) and its folder (what the supervisor wrote, and
whether the supervisor's lock is held). There is no separate path for recovery: a restarted worker looks at the same
two sides and does the same thing.
"""

from dataclasses import dataclass
from enum import StrEnum

from app.domain.enums import JobStatus
from app.executor.supervisor.client import AttemptPhase, Observation


class Step(StrEnum):
    """What a node does with one of its attempts."""

    WAIT = "wait"
    LAUNCH = "launch"  # also after a crash between claim and launch: the folder runs its command at most once
    ADOPT = "adopt"  # the supervisor died, the script may live on
    MARK_RUNNING = "mark_running"
    STOP = "stop"
    END_UNSTARTED = "end_unstarted"
    END_LOST = "end_lost"  # it ran, and its folder is gone: launching it again could run it twice
    SETTLE = "settle"


@dataclass(frozen=True)
class Seen:
    """Both sides of an attempt. `starting`: we started its supervisor a moment ago, its lock may not be held yet.

    `overdue`: it is beyond a limit of its job.
    """

    observation: Observation
    status: JobStatus
    cancel_requested: bool
    overdue: bool = False
    starting: bool = False


def next_step(seen: Seen) -> Step:
    """Return the one thing to do now."""
    phase = seen.observation.phase
    if phase is AttemptPhase.EXITED:
        return Step.SETTLE
    stops = seen.observation.stopping and seen.status is JobStatus.STOPPING
    wants_stop = (seen.cancel_requested or seen.overdue) and not stops
    if seen.observation.supervised:
        if wants_stop:
            return Step.STOP
        if phase is AttemptPhase.RUNNING and seen.status is JobStatus.LAUNCHING:
            return Step.MARK_RUNNING
        return Step.WAIT
    if seen.starting:
        return Step.WAIT
    if phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING):
        return Step.ADOPT
    # an overdue one is stopping without anybody's wish
    if seen.status is JobStatus.RUNNING or (seen.status is JobStatus.STOPPING and not seen.cancel_requested):
        return Step.END_LOST
    return Step.END_UNSTARTED if seen.cancel_requested else Step.LAUNCH
