"""An attempt is overdue by its own time or by its silence, and stopped once."""

from pathlib import Path

import pytest

from app.domain.enums import EndReason, JobStatus
from app.domain.retries import Limits
from app.executor.attempts.limits import limit_seconds, signature
from app.executor.attempts.reconcile import Seen, Step, next_step
from app.executor.engines.base import AttemptPhase, AttemptState
from app.executor.runs.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.output.mkdir(parents=True)
    return run


class TestSignature:
    def test_changes_with_output_events_and_files(self, run: RunFolder) -> None:
        seen = [signature(run)]
        for path in (run.output_log, run.events, run.output / "deep" / "weights"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
            seen.append(signature(run))
        (run.output / "deep" / "weights").write_text("xy")
        seen.append(signature(run))

        assert len(set(seen)) == 5

    def test_ours_do_not_count(self, run: RunFolder) -> None:
        before = signature(run)
        run.projected_events.write_text("x")

        assert signature(run) == before


class TestText:
    def test_names_the_limit(self) -> None:
        limits = Limits(seconds=60, silent_seconds=1.5)

        assert limit_seconds(limits, EndReason.TIMED_OUT) == 60
        assert limit_seconds(limits, EndReason.STALLED) == 1.5
        assert limit_seconds(limits, EndReason.SIGNAL) is None


class TestStep:
    def seen(self, status: JobStatus, *, stopping: bool = False, supervised: bool = True) -> Seen:
        phase = AttemptPhase.RUNNING if supervised else AttemptPhase.ABSENT
        return Seen(
            state=AttemptState(phase=phase, supervised=supervised, stopping=stopping),
            status=status,
            cancel_requested=False,
            overdue=supervised,
        )

    def test_overdue_attempt_is_stopped_until_it_is_stopping(self) -> None:
        assert next_step(self.seen(JobStatus.RUNNING)) is Step.STOP
        assert next_step(self.seen(JobStatus.RUNNING, stopping=True)) is Step.STOP
        assert next_step(self.seen(JobStatus.STOPPING, stopping=True)) is Step.WAIT

    def test_stopping_attempt_whose_folder_is_gone_is_never_launched_again(self) -> None:
        assert next_step(self.seen(JobStatus.STOPPING, supervised=False)) is Step.END_LOST
