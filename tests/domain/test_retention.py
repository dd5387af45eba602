from datetime import UTC, datetime, timedelta

import pytest

from app.domain.enums import JobKind, JobStatus
from app.domain.retention import EndedRun, Retention, RetentionTarget, too_old
from app.domain.transitions import UNFINISHED

NOW = datetime(2026, 6, 1, tzinfo=UTC)
MONTH = timedelta(days=30)
ALL = Retention(dict.fromkeys(RetentionTarget, MONTH))
LONG_AGO = NOW - timedelta(days=31)


class TestTooOld:
    @pytest.mark.parametrize(
        ("kind", "status", "expected"),
        [
            (JobKind.TRAINING, JobStatus.FAILED, RetentionTarget.FAILED_RUNS),
            (JobKind.SAVING, JobStatus.CANCELLED, RetentionTarget.FAILED_RUNS),
            (JobKind.ENVIRONMENT, JobStatus.FAILED, RetentionTarget.FAILED_RUNS),
            (JobKind.TRAINING, JobStatus.SUCCEEDED, RetentionTarget.CHECKPOINTS),
            (JobKind.SAVING, JobStatus.SUCCEEDED, None),
            (JobKind.DEPLOYMENT, JobStatus.SUCCEEDED, None),
            (JobKind.INFERENCE_CUSTOMIZED, JobStatus.SUCCEEDED, RetentionTarget.QUESTION_RUNS),
            (JobKind.INFERENCE_COMPLETE, JobStatus.FAILED, RetentionTarget.QUESTION_RUNS),
        ],
    )
    def test_by_kind_and_end(self, kind: JobKind, status: JobStatus, expected: RetentionTarget | None) -> None:
        assert too_old(EndedRun(kind, status, LONG_AGO), ALL, NOW) is expected

    @pytest.mark.parametrize("kind", JobKind)
    @pytest.mark.parametrize("status", sorted(UNFINISHED))
    def test_nothing_of_an_unfinished_job_is_ever_old(self, kind: JobKind, status: JobStatus) -> None:
        assert too_old(EndedRun(kind, status, LONG_AGO), ALL, NOW) is None

    def test_stays_within_the_time_for_ever_without_one_and_while_it_is_repeated(self) -> None:
        failed = EndedRun(JobKind.TRAINING, JobStatus.FAILED, LONG_AGO)

        assert too_old(EndedRun(failed.kind, failed.status, NOW - MONTH), ALL, NOW) is None
        assert too_old(failed, Retention({}), NOW) is None
        assert too_old(failed, Retention({RetentionTarget.FAILED_RUNS: None}), NOW) is None
        assert too_old(EndedRun(failed.kind, failed.status, LONG_AGO, needed=True), ALL, NOW) is None
        assert too_old(EndedRun(failed.kind, failed.status, None), ALL, NOW) is None
