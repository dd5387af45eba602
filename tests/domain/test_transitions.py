"""The table of transitions: what it has is allowed, all else is refused."""

from itertools import product

import pytest

from app.domain.enums import JobStatus
from app.domain.transitions import ALLOWED, LIVE, TERMINAL, IllegalTransition, check_transition


class TestCheckTransition:
    @pytest.mark.parametrize(("old", "new"), list(product(JobStatus, JobStatus)))
    def test_allows_exactly_what_the_table_has(self, old: JobStatus, new: JobStatus) -> None:
        if new in ALLOWED[old]:
            check_transition(old, new)
            return

        with pytest.raises(IllegalTransition) as caught:
            check_transition(old, new)

        assert caught.value.params == {"old": old, "new": new}

    def test_every_status_is_queued_live_or_terminal(self) -> None:
        assert {JobStatus.QUEUED} | LIVE | TERMINAL == set(JobStatus)
        assert not LIVE & TERMINAL

    @pytest.mark.parametrize("status", sorted(TERMINAL))
    def test_nothing_follows_an_end(self, status: JobStatus) -> None:
        assert ALLOWED[status] == frozenset()

    @pytest.mark.parametrize("status", sorted(LIVE))
    def test_whatever_lives_can_end_in_every_way(self, status: JobStatus) -> None:
        assert ALLOWED[status] >= TERMINAL

    def test_a_stage_that_was_told_to_stop_does_not_run_again_in_this_job(self) -> None:
        assert ALLOWED[JobStatus.STOPPING] == TERMINAL
