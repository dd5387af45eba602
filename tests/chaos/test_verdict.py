"""The verdict finds every kind of violation, each alone, and none in a clean run."""

from dataclasses import replace

import pytest

from tests.chaos.verdict import Attempt, Event, Evidence, Job, Lease, Line, judge

CLEAN = Evidence(
    acknowledged=("a", "b"),
    journal=(
        Line("start", "a", "a1", 1.0, ("0",)),
        Line("tick", "a", "a1", 2.0, ("0",)),
        Line("end", "a", "a1", 3.0, ("0",)),
        Line("start", "b", "b1", 4.0, ("0",)),
        Line("start", "b", "b2", 6.0, ("0",)),
        Line("end", "b", "b2", 7.0, ("0",)),
    ),
    jobs=(Job("a", "succeeded"), Job("b", "succeeded")),
    attempts=(Attempt("a1", "a", 1, "n"), Attempt("b1", "b", 1, "n"), Attempt("b2", "b", 2, "n")),
    events=(Event("a", "succeeded", 3.5), Event("b", "succeeded", 7.5)),
    leases=(Lease("n", "0", "a1", 0.5, 3.5), Lease("n", "0", "b1", 3.5, 5.0), Lease("n", "0", "b2", 5.5, 7.5)),
    models=("a", "b"),
    slots={"n": 1},
    hurt=frozenset({"b1"}),
)
HURT_BY_NOBODY = replace(CLEAN, hurt=frozenset())


def found(evidence: Evidence) -> set[str]:
    return set(judge(evidence).violations())


def test_clean_run_has_no_violation() -> None:
    assert found(CLEAN) == set()


@pytest.mark.parametrize("status", ["queued", "running", None])
def test_accepted_job_without_an_end_is_lost(status: str | None) -> None:
    jobs = [CLEAN.jobs[0], *([Job("b", status)] if status else [])]

    assert found(replace(CLEAN, jobs=jobs)) == {"lost"}


def test_live_attempt_of_an_ended_job_is_lost() -> None:
    attempts = (*CLEAN.attempts[:2], Attempt("b2", "b", 2, "n", live=True))

    assert found(replace(CLEAN, attempts=attempts)) == {"lost"}


def test_child_of_an_old_attempt_beside_the_new_one_is_an_overlap() -> None:
    late = Line("child", "b", "b1", 6.5)

    assert {"overlaps", "over_slots", "double_leases"} == found(replace(CLEAN, journal=(*CLEAN.journal, late)))


def test_second_start_of_an_attempt_is_found() -> None:
    again = Line("start", "a", "a1", 2.5)

    assert found(replace(CLEAN, journal=(*CLEAN.journal, again))) == {"ran_twice"}


def test_two_ends_two_models_and_two_finishing_attempts_are_completions_too_many() -> None:
    assert found(replace(CLEAN, events=(*CLEAN.events, Event("a", "failed", 3.6)))) == {"completed_twice"}
    assert found(replace(CLEAN, models=("a", "a", "b"))) == {"completed_twice"}
    twice = replace(HURT_BY_NOBODY, journal=(*CLEAN.journal, Line("end", "b", "b1", 5.0)))
    assert found(twice) == {"completed_twice", "unexplained"}


def test_accelerator_with_two_holders_is_found_in_rows_and_journal() -> None:
    rows = (*CLEAN.leases, Lease("n", "0", "x1", 3.0, None))
    assert found(replace(CLEAN, leases=rows)) == {"double_leases"}
    attempts = (*CLEAN.attempts, Attempt("c1", "c", 1, "n"))
    beside = replace(CLEAN, journal=(*CLEAN.journal, Line("start", "c", "c1", 1.5, ("0",))), attempts=attempts)
    assert found(replace(beside, journal=(*beside.journal, Line("tick", "c", "c1", 1.7, ("0",))))) == {
        "double_leases",
        "over_slots",
    }


def test_use_without_a_lease_or_after_it_is_found() -> None:
    assert found(replace(CLEAN, leases=CLEAN.leases[1:])) == {"double_leases"}
    early = (Lease("n", "0", "a1", 0.5, 2.5), *CLEAN.leases[1:])
    assert found(replace(CLEAN, leases=early)) == {"double_leases"}


def test_accelerators_of_the_same_name_on_other_nodes_are_others() -> None:
    rows = (*CLEAN.leases, Lease("m", "0", "x1", 3.0, None))

    assert found(replace(CLEAN, leases=rows)) == set()


def test_line_after_the_recorded_end_is_found() -> None:
    late = Line("child", "a", "a1", 3.7)

    assert found(replace(CLEAN, journal=(*CLEAN.journal, late))) == {"ran_after_end", "double_leases"}


def test_success_without_outputs_is_false() -> None:
    assert found(replace(CLEAN, journal=CLEAN.journal[:-1])) == {"false_ends"}


def test_failure_cancellation_and_repetition_need_an_explanation() -> None:
    assert found(HURT_BY_NOBODY) == {"unexplained"}
    assert found(replace(CLEAN, jobs=(Job("a", "failed", "signal"), CLEAN.jobs[1]))) == {"unexplained"}
    cancelled = replace(CLEAN, jobs=(Job("a", "cancelled"), CLEAN.jobs[1]))
    assert found(cancelled) == {"unexplained"}
    assert found(replace(cancelled, cancelled=frozenset({"a"}))) == set()


def test_processes_that_are_left_are_reported_as_they_are() -> None:
    assert found(replace(CLEAN, leftovers=("pid 7",))) == {"leftovers"}
