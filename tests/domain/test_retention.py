from datetime import UTC, datetime, timedelta

import pytest

from app.domain.enums import JobKind, JobStatus
from app.domain.retention import EndedRun, Leftover, Retention, too_old
from app.domain.transitions import UNFINISHED

NOW = datetime(2026, 6, 1, tzinfo=UTC)
MONTH = timedelta(days=30)
ALL = Retention(dict.fromkeys(Leftover, MONTH))
LONG_AGO = NOW - timedelta(days=31)


class TestTooOld:
    @pytest.mark.parametrize(
        ("kind", "status", "expected"),
        [
            (JobKind.TRAINING, JobStatus.FAILED, Leftover.FAILED_RUNS),
            (JobKind.SAVING, JobStatus.CANCELLED, Leftover.FAILED_RUNS),
            (JobKind.ENVIRONMENT, JobStatus.FAILED, Leftover.FAILED_RUNS),
            (JobKind.TRAINING, JobStatus.SUCCEEDED, Leftover.CHECKPOINTS),
            (JobKind.SAVING, JobStatus.SUCCEEDED, None),
            (JobKind.DEPLOYMENT, JobStatus.SUCCEEDED, None),
            (JobKind.INFERENCE_CUSTOMIZED, JobStatus.SUCCEEDED, Leftover.QUESTION_RUNS),
            (JobKind.INFERENCE_COMPLETE, JobStatus.FAILED, Leftover.QUESTION_RUNS),
        ],
    )
    def test_by_kind_and_end(self, kind: JobKind, status: JobStatus, expected: Leftover | None) -> None:
        assert too_old(EndedRun(kind, status, LONG_AGO), ALL, NOW) is expected

    @pytest.mark.parametrize("kind", JobKind)
    @pytest.mark.parametrize("status", sorted(UNFINISHED))
    def test_nothing_of_an_unfinished_job_is_ever_old(self, kind: JobKind, status: JobStatus) -> None:
        assert too_old(EndedRun(kind, status, LONG_AGO), ALL, NOW) is None

    def test_stays_within_the_time_for_ever_without_one_and_while_it_is_repeated(self) -> None:
        failed = EndedRun(JobKind.TRAINING, JobStatus.FAILED, LONG_AGO)

        assert too_old(EndedRun(failed.kind, failed.status, NOW - MONTH), ALL, NOW) is None
        assert too_old(failed, Retention({}), NOW) is None
        assert too_old(failed, Retention({Leftover.FAILED_RUNS: None}), NOW) is None
        assert too_old(EndedRun(failed.kind, failed.status, LONG_AGO, needed=True), ALL, NOW) is None
        assert too_old(EndedRun(failed.kind, failed.status, None), ALL, NOW) is None
