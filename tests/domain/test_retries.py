"""Which end of an attempt is followed by another attempt: every reason, every kind of job, both counters."""

from datetime import timedelta

import pytest

from app.domain.enums import EndReason, JobKind
from app.domain.kinds import KINDS
from app.domain.retries import (
    INFRASTRUCTURE,
    MAX_RECOVERIES,
    REPEATABLE,
    Again,
    Failure,
    Limits,
    RetryPolicy,
    decide,
    policy_violations,
)

WILLING = RetryPolicy(max_retries=20, backoff_seconds=10, max_backoff_seconds=60)
NEVER = frozenset(EndReason) - INFRASTRUCTURE - REPEATABLE


def decided(
    reason: EndReason,
    *,
    kind: JobKind = JobKind.TRAINING,
    policy: RetryPolicy = WILLING,
    ran: bool = True,
    progressed: bool = False,
    retries: int = 0,
    recoveries: int = 0,
) -> Again | None:
    failure = Failure(kind=kind, reason=reason, ran=ran, progressed=progressed)
    return decide(failure, policy, retries=retries, recoveries=recoveries)


class TestInfrastructure:
    @pytest.mark.parametrize("reason", sorted(INFRASTRUCTURE))
    def test_is_repeated_without_a_policy_and_not_charged(self, reason: EndReason) -> None:
        assert decided(reason, policy=RetryPolicy()) == Again(charged=False, delay=timedelta())

    def test_is_given_up_after_some_recoveries_whatever_the_policy_says(self) -> None:
        made = [decided(EndReason.NODE_LOST, recoveries=count) for count in range(MAX_RECOVERIES + 1)]

        assert [again.delay.total_seconds() for again in made if again] == [0, 1, 2, 4, 8]
        assert made[-1] is None

    def test_retries_made_before_do_not_count(self) -> None:
        assert decided(EndReason.NODE_LOST, retries=20) is not None

    @pytest.mark.parametrize("kind", JobKind)
    def test_script_that_had_begun_is_repeated_only_where_that_harms_nobody(self, kind: JobKind) -> None:
        assert (decided(EndReason.NODE_LOST, kind=kind) is not None) == KINDS[kind].safe_to_repeat
        assert decided(EndReason.NODE_LOST, kind=kind, ran=False) is not None

    def test_deployments_and_questions_are_not_harmless(self) -> None:
        harmful = {JobKind.DEPLOYMENT, JobKind.INFERENCE_CUSTOMIZED, JobKind.INFERENCE_COMPLETE}

        assert {kind for kind, rule in KINDS.items() if not rule.safe_to_repeat} == harmful


class TestPolicy:
    @pytest.mark.parametrize("reason", sorted(NEVER))
    def test_what_would_fail_the_same_way_is_never_repeated(self, reason: EndReason) -> None:
        assert decided(reason, progressed=True) is None

    def test_memory_cancel_and_missing_things_are_among_those(self) -> None:
        assert {
            EndReason.OUT_OF_MEMORY,
            EndReason.CUDA_OUT_OF_MEMORY,
            EndReason.CANCELLED,
            EndReason.COMPLETED,
            EndReason.MODULE_MISSING,
            EndReason.COLUMN_MISSING,
            EndReason.PREDECESSOR_FAILED,
        } <= NEVER

    @pytest.mark.parametrize("reason", sorted(REPEATABLE))
    def test_other_reasons_are_repeated_only_when_asked(self, reason: EndReason) -> None:
        assert decided(reason, policy=RetryPolicy(), progressed=True) is None
        assert decided(reason, progressed=True) == Again(charged=True, delay=timedelta(seconds=10))

    def test_only_after_the_reasons_that_were_named(self) -> None:
        policy = RetryPolicy(max_retries=3, on=(EndReason.SIGNAL,))

        assert decided(EndReason.SIGNAL, policy=policy) is not None
        assert decided(EndReason.EXIT_CODE, policy=policy) is None

    def test_empty_list_names_none(self) -> None:
        assert decided(EndReason.SIGNAL, policy=RetryPolicy(max_retries=3, on=())) is None

    def test_budget_ends(self) -> None:
        policy = RetryPolicy(max_retries=2)

        assert [decided(EndReason.SIGNAL, policy=policy, retries=made) is not None for made in range(4)] == [
            True, True, False, False,
        ]  # fmt: skip

    def test_pause_doubles_up_to_the_longest(self) -> None:
        delays = [WILLING.delay(made).total_seconds() for made in (0, 1, 2, 3, 19)]

        assert delays == [10, 20, 40, 60, 60]

    def test_time_limit_without_a_new_checkpoint_is_the_end(self) -> None:
        assert decided(EndReason.TIMED_OUT) is None
        assert decided(EndReason.TIMED_OUT, progressed=True) is not None


class TestDocuments:
    def test_empty_document_is_the_default(self) -> None:
        assert RetryPolicy.of({}) == RetryPolicy()
        assert RetryPolicy().document() == {}
        assert Limits.of(None) == Limits()

    def test_survives_the_database(self) -> None:
        policy = RetryPolicy(max_retries=3, on=(EndReason.SIGNAL, EndReason.SIGNAL))

        assert policy.document() == {"max_retries": 3, "on": ["signal"]}
        assert RetryPolicy.of(policy.document()) == policy

    @pytest.mark.parametrize(
        "wrong", [{"max_retries": 21}, {"max_retries": -1}, {"backoff_seconds": -1}, {"often": 1}, {"on": ["bogus"]}]
    )
    def test_refuses_what_it_does_not_know(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RetryPolicy.of(wrong)

    def test_reasons_that_no_policy_repeats_are_pointed_at(self) -> None:
        policy = RetryPolicy(on=(EndReason.SIGNAL, EndReason.CUDA_OUT_OF_MEMORY, EndReason.NODE_LOST))

        assert [violation.pointer for violation in policy_violations(policy)] == ["/retry/on/1", "/retry/on/2"]
