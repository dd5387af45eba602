from itertools import product

import pytest

from app.domain.enums import EndReason, JobStatus
from app.domain.transitions import ALLOWED, LIVE, TERMINAL, IllegalTransition, check_transition

QUEUED, LAUNCHING, RUNNING, STOPPING = JobStatus.QUEUED, JobStatus.LAUNCHING, JobStatus.RUNNING, JobStatus.STOPPING
SUCCEEDED, FAILED, CANCELLED = JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED

LEGAL = {
    (QUEUED, LAUNCHING),
    (QUEUED, SUCCEEDED),
    (QUEUED, CANCELLED),
    (QUEUED, FAILED),
    (LAUNCHING, RUNNING),
    (LAUNCHING, STOPPING),
    (LAUNCHING, QUEUED),
    (LAUNCHING, SUCCEEDED),
    (LAUNCHING, FAILED),
    (LAUNCHING, CANCELLED),
    (RUNNING, STOPPING),
    (RUNNING, QUEUED),
    (RUNNING, SUCCEEDED),
    (RUNNING, FAILED),
    (RUNNING, CANCELLED),
    (STOPPING, QUEUED),
    (STOPPING, SUCCEEDED),
    (STOPPING, FAILED),
    (STOPPING, CANCELLED),
}


class TestTransitions:
    @pytest.mark.parametrize(("old", "new"), list(product(JobStatus, JobStatus)))
    def test_every_pair(self, old: JobStatus, new: JobStatus) -> None:
        if (old, new) in LEGAL:
            check_transition(old, new)
        else:
            with pytest.raises(IllegalTransition):
                check_transition(old, new)

    def test_every_status_has_a_row(self) -> None:
        assert set(ALLOWED) == set(JobStatus)

    def test_terminal_is_terminal(self) -> None:
        assert {SUCCEEDED, FAILED, CANCELLED} == TERMINAL
        assert {QUEUED} | LIVE | TERMINAL == set(JobStatus)

    def test_every_status_can_end_except_the_ends(self) -> None:
        for status in set(JobStatus) - TERMINAL:
            assert ALLOWED[status] & TERMINAL

    def test_reasons_are_wire_words(self) -> None:
        assert all(reason.value == reason.name.lower() for reason in EndReason)
