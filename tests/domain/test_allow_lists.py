import pytest

from app.domain.allow_lists import EVERYTHING, AllowedMethod, AllowList
from app.domain.demand import Demand
from app.domain.enums import JobKind
from app.domain.placement import Candidate, Host, Mismatch, QueueLimits, mismatches
from app.domain.waiting import KnownNode, waiting_reason
from tests.job_rows import START

FINANCE = AllowedMethod(id="m1", name="finance", project="lab")
JOB = {"method_id": "m1", "project_id": "lab", "environment": "trl"}


class TestPermits:
    @pytest.mark.parametrize(
        ("allowed", "permitted"),
        [
            (EVERYTHING, True),
            (AllowList(methods=(FINANCE,)), True),
            (AllowList(projects=("lab",), environments=("trl", "base")), True),
            (AllowList(methods=(FINANCE,), projects=("other",)), False),
            (AllowList(environments=("base",)), False),
            (AllowList(methods=(AllowedMethod(id="m2", name="finance", project="lab"),)), False),
        ],
    )
    def test_needs_each_list(self, allowed: AllowList, permitted: bool) -> None:
        assert allowed.permits(JobKind.TRAINING, **JOB) is permitted

    def test_of_methods_is_for_stages_only(self) -> None:
        allowed = AllowList(methods=(FINANCE,))

        assert allowed.permits(JobKind.ENVIRONMENT, method_id=None, project_id="lab", environment="trl")
        assert not allowed.permits(JobKind.TRAINING, method_id=None, project_id="lab", environment="trl")

    def test_version_changes_with_it(self) -> None:
        assert EVERYTHING.version != AllowList(methods=(FINANCE,)).version


class TestPlacement:
    def test_a_node_that_may_not_is_a_mismatch_and_the_reason_to_wait(self) -> None:
        demand = Demand(kind=JobKind.TRAINING, **JOB)
        host = Host("n", "n", frozenset({"trl"}), slots=1, allowed=AllowList(projects=("other",)))
        labelled = Host("l", "l", frozenset({"trl"}), slots=1)
        candidate = Candidate("j", demand, 0, START)
        asks = demand.model_copy(update={"resources": demand.resources.model_copy(update={"labels": {"gpu": "a"}})})

        reason = waiting_reason(candidate, [KnownNode(host)], limits=QueueLimits(), now=START)
        other = waiting_reason(
            Candidate("j", asks, 0, START), [KnownNode(host), KnownNode(labelled)], limits=QueueLimits(), now=START
        )

        assert mismatches(demand, host) == [Mismatch.NOT_ALLOWED]
        assert (reason.code, reason.params) == ("waiting_not_allowed", {"environment": "trl"})
        assert other.code == "waiting_labels"
