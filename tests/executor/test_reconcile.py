"""The node's table: every combination of what the engine says and what the row says has its one step."""

from itertools import product

from app.domain.enums import JobStatus
from app.domain.transitions import LIVE
from app.executor.attempts.reconcile import Seen, Step, next_step
from app.executor.engines.base import AttemptPhase, AttemptState

UNTOUCHED = (AttemptPhase.ABSENT, AttemptPhase.PREPARED)


def _expected(seen: Seen) -> Step:
    """Say it again, from the rules rather than from the code: the first rule that fits."""
    folder = seen.state
    told = folder.stopping and seen.status is JobStatus.STOPPING
    rules = (
        # whatever else is true, an end is an end
        (folder.phase is AttemptPhase.EXITED, Step.FINALIZE),
        # a supervisor lives: it is told to stop until both the folder and the row say that it was
        (folder.supervised and seen.cancel_requested and not told, Step.STOP),
        (
            folder.supervised and folder.phase is AttemptPhase.RUNNING and seen.status is JobStatus.LAUNCHING,
            Step.MARK_RUNNING,
        ),
        (folder.supervised, Step.WAIT),
        # nobody holds the lock, but we started somebody a moment ago
        (folder.pending, Step.WAIT),
        # a supervisor took the folder and died: the script may live
        (folder.phase in (AttemptPhase.STARTED, AttemptPhase.RUNNING), Step.ADOPT),
        # the row knows of a run, the folder does not: it is lost, and must not run again
        (
            seen.status is JobStatus.RUNNING or (seen.status is JobStatus.STOPPING and not seen.cancel_requested),
            Step.END_LOST,
        ),
        # nothing ever ran here
        (seen.cancel_requested, Step.END_UNSTARTED),
        (True, Step.LAUNCH),
    )
    return next(step for fits, step in rules if fits)


COMBINATIONS = [
    Seen(
        state=AttemptState(phase=phase, supervised=supervised, pending=pending, stopping=stopping),
        status=status,
        cancel_requested=cancel,
    )
    for phase, supervised, stopping, status, cancel, pending in product(
        AttemptPhase, (False, True), (False, True), sorted(LIVE), (False, True), (False, True)
    )
]


def _that_lead_to(*steps: Step) -> list[Seen]:
    return [seen for seen in COMBINATIONS if next_step(seen) in steps]


def _seen(
    phase: AttemptPhase,
    *,
    supervised: bool = False,
    stopping: bool = False,
    status: JobStatus = JobStatus.LAUNCHING,
    cancel: bool = False,
    pending: bool = False,
) -> Seen:
    state = AttemptState(phase=phase, supervised=supervised, pending=pending, stopping=stopping)
    return Seen(state=state, status=status, cancel_requested=cancel)


class TestEveryCombination:
    def test_there_are_240(self) -> None:
        assert len(COMBINATIONS) == len(AttemptPhase) * 2 * 2 * len(LIVE) * 2 * 2 == 240

    def test_each_has_its_step(self) -> None:
        for seen in COMBINATIONS:
            assert next_step(seen) is _expected(seen), seen

    def test_launches_only_where_nothing_ever_ran(self) -> None:
        for seen in _that_lead_to(Step.LAUNCH):
            assert seen.state.phase in UNTOUCHED
            assert not seen.state.supervised
            assert not seen.cancel_requested
            assert seen.status is not JobStatus.RUNNING

    def test_finalizes_exactly_what_has_ended(self) -> None:
        ended = [seen for seen in COMBINATIONS if seen.state.phase is AttemptPhase.EXITED]

        assert _that_lead_to(Step.FINALIZE) == ended

    def test_stops_or_ends_only_what_somebody_wants_ended(self) -> None:
        assert all(seen.cancel_requested for seen in _that_lead_to(Step.STOP, Step.END_UNSTARTED))


class TestStories:
    def test_fresh_claim_is_launched(self) -> None:
        assert next_step(_seen(AttemptPhase.ABSENT)) is Step.LAUNCH

    def test_worker_that_died_between_spec_and_start_launches_again(self) -> None:
        assert next_step(_seen(AttemptPhase.PREPARED)) is Step.LAUNCH

    def test_supervisor_on_its_way_is_waited_for(self) -> None:
        assert next_step(_seen(AttemptPhase.PREPARED, pending=True)) is Step.WAIT

    def test_running_script_is_shown(self) -> None:
        assert next_step(_seen(AttemptPhase.RUNNING, supervised=True)) is Step.MARK_RUNNING

    def test_restarted_worker_leaves_a_supervised_script_alone(self) -> None:
        assert next_step(_seen(AttemptPhase.RUNNING, supervised=True, status=JobStatus.RUNNING)) is Step.WAIT

    def test_script_without_supervisor_is_adopted_even_when_it_shall_stop(self) -> None:
        assert next_step(_seen(AttemptPhase.RUNNING, status=JobStatus.RUNNING, cancel=True)) is Step.ADOPT

    def test_cancelled_script_is_told_once(self) -> None:
        running = _seen(AttemptPhase.RUNNING, supervised=True, status=JobStatus.RUNNING, cancel=True)
        told = _seen(AttemptPhase.RUNNING, supervised=True, stopping=True, status=JobStatus.STOPPING, cancel=True)

        assert next_step(running) is Step.STOP
        assert next_step(told) is Step.WAIT

    def test_crash_between_telling_and_writing_it_down_tells_again(self) -> None:
        written_nowhere = _seen(
            AttemptPhase.RUNNING, supervised=True, stopping=True, status=JobStatus.RUNNING, cancel=True
        )

        assert next_step(written_nowhere) is Step.STOP

    def test_running_job_whose_folder_is_gone_is_lost_and_not_launched_again(self) -> None:
        assert next_step(_seen(AttemptPhase.ABSENT, status=JobStatus.RUNNING)) is Step.END_LOST

    def test_cancelled_before_anything_started_ends_without_a_start(self) -> None:
        assert next_step(_seen(AttemptPhase.ABSENT, cancel=True)) is Step.END_UNSTARTED

    def test_end_comes_before_the_wish_to_cancel(self) -> None:
        assert next_step(_seen(AttemptPhase.EXITED, status=JobStatus.RUNNING, cancel=True)) is Step.FINALIZE
