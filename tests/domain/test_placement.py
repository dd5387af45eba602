"""The rules of placement: who may run where, who starts now, who waits for whom, and what a simulated cluster does."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain.demand import Demand, Resources
from app.domain.enums import JobKind
from app.domain.placement import (
    NEVER,
    Candidate,
    Decision,
    Host,
    Mismatch,
    QueueLimit,
    QueueLimits,
    accelerators_needed,
    best_host,
    cards_of,
    decide,
    mismatches,
    placed,
    soonest,
)
from tests.domain.cluster import START, Cluster, Work, accelerators

HOUR = timedelta(hours=1)


def demand(kind: JobKind = JobKind.TRAINING, *, processes: int | None = None, **resources: Any) -> Demand:
    return Demand(kind=kind, environment="e", resources=Resources(**resources), processes=processes)


def candidate(name: str, cards: int | None = 1, *, age: int = 0, **changes: Any) -> Candidate:
    """Return a waiting job; `age` in seconds puts it before the others."""
    made = Candidate(
        job_id=name,
        demand=demand(accelerators=cards),
        priority=0,
        created_at=START - timedelta(seconds=age),
    )
    return dataclasses.replace(made, **changes)


def host(
    cards: int = 0,
    *,
    name: str = "n",
    busy: dict[int, timedelta | None] | None = None,
    memory_mib: int = 80_000,
    slots: int = 1,
    keeps_for: Candidate | None = None,
    labels: dict[str, str] | None = None,
    lacking: dict[str, frozenset[str]] | None = None,
) -> Host:
    """Return a node; `busy`: card → when it comes free, seen from START."""
    held = {f"c{index}": None if after is None else START + after for index, after in (busy or {}).items()}
    return Host(
        node_id=name,
        name=name,
        environments=frozenset({"e"}),
        labels=labels or {},
        cards=cards_of(accelerators(cards, memory_mib), held=held),
        slots=slots,
        keeps_for=keeps_for,
        lacking=lacking or {},
    )


def decided(
    candidates: Sequence[Candidate],
    node: Host,
    *others: Host,
    limits: QueueLimits = QueueLimits(),
) -> Decision:
    return decide(candidates, node, others=others, limits=limits, now=START)


def taken(decision: Decision) -> str | None:
    return decision.take.candidate.job_id if decision.take else None


class TestNeeds:
    @pytest.mark.parametrize(
        ("asked", "on_cards", "on_cpu"),
        [
            (demand(), 1, 0),
            (demand(accelerators=0), 0, 0),
            (demand(accelerators=3), 3, 3),
            (demand(processes=2), 2, 0),
            (demand(processes=2, accelerators=4), 4, 4),
            (demand(accelerator_memory_mib=10), 1, 1),
            (demand(JobKind.SAVING), 1, 0),
            (demand(JobKind.DEPLOYMENT), 0, 0),
            (demand(JobKind.DEPLOYMENT, accelerators=2), 0, 0),
            (demand(JobKind.INFERENCE_COMPLETE), 0, 0),
            (demand(JobKind.ENVIRONMENT), 0, 0),
        ],
    )
    def test_accelerators_of_a_job(self, asked: Demand, on_cards: int, on_cpu: int) -> None:
        assert accelerators_needed(asked, host(8).cards) == on_cards
        assert accelerators_needed(asked, host().cards) == on_cpu

    @pytest.mark.parametrize(
        ("asked", "node", "found"),
        [
            (demand(), host(), []),
            (demand(accelerators=1), host(), [Mismatch.ACCELERATORS]),
            (demand(accelerators=3), host(2), [Mismatch.ACCELERATORS]),
            (demand(accelerators=2, accelerator_memory_mib=90_000), host(2), [Mismatch.MEMORY]),
            (demand(accelerator_memory_mib=80_000), host(2), []),
            (demand(labels={"gpu": "a100"}), host(labels={"gpu": "h100"}), [Mismatch.LABELS]),
            (demand(labels={"gpu": "a100"}), host(labels={"gpu": "a100", "zone": "b"}), []),
            (demand().model_copy(update={"environment": "other"}), host(), [Mismatch.ENVIRONMENT]),
            (demand(JobKind.ENVIRONMENT).model_copy(update={"environment": "other", "node_id": "n"}), host(), []),
            (demand(JobKind.ENVIRONMENT).model_copy(update={"node_id": "m"}), host(), [Mismatch.OTHER_NODE]),
        ],
    )
    def test_node_that_can_never_run_it(self, asked: Demand, node: Host, found: list[Mismatch]) -> None:
        assert mismatches(asked, node) == found

    def test_card_of_unknown_memory_is_none_with_enough(self) -> None:
        node = host(1)
        unknown = dataclasses.replace(node.cards[0].accelerator, memory_mib=None)
        node = dataclasses.replace(node, cards=cards_of([unknown], held={}))

        assert mismatches(demand(accelerator_memory_mib=1), node) == [Mismatch.MEMORY]
        assert mismatches(demand(), node) == []

    def test_takes_the_smallest_card_that_will_do(self) -> None:
        small, large = accelerators(1, 10_000)[0], dataclasses.replace(accelerators(2, 80_000)[1], id="large")
        node = dataclasses.replace(host(), cards=cards_of([large, small], held={}))

        assert placed(candidate("a"), node) is not None
        assert placed(candidate("a"), node).accelerators == ("c0",)  # type: ignore[union-attr]
        wants = candidate("b", demand=demand(accelerator_memory_mib=20_000))
        assert placed(wants, node).accelerators == ("large",)  # type: ignore[union-attr]


class TestOrder:
    def test_priority_then_age_then_id(self) -> None:
        jobs = [
            candidate("young"),
            candidate("old", age=10),
            candidate("urgent", priority=-1),
            candidate("old2", age=10),
        ]

        order = []
        while jobs:
            order.append(taken(decided(jobs, host(1))))
            jobs = [job for job in jobs if job.job_id != order[-1]]

        assert order == ["urgent", "old", "old2", "young"]

    def test_what_cannot_run_here_holds_up_nobody(self) -> None:
        jobs = [candidate("too large", 2, age=9), candidate("elsewhere", demand=demand(labels={"a": "b"}), age=8)]

        assert taken(decided([*jobs, candidate("fits")], host(1))) == "fits"

    def test_jobs_without_accelerators_take_slots_and_others_do_not(self) -> None:
        cpu = candidate("cpu", 0, age=5)

        assert taken(decided([cpu, candidate("gpu")], host(1, slots=0))) == "gpu"
        assert taken(decided([cpu, candidate("gpu")], host(1, slots=1))) == "cpu"
        assert taken(decided([cpu], host(0, slots=0))) is None


class TestLimits:
    @pytest.mark.parametrize(
        ("limit", "live", "reached"),
        [
            (QueueLimit(), {("q", "x"): 9}, False),
            (QueueLimit(max_live=2), {("q", "x"): 1, ("q", "y"): 1}, True),
            (QueueLimit(max_live=3), {("q", "x"): 1, ("q", "y"): 1, ("r", "x"): 5}, False),
            (QueueLimit(max_live_per_user=2), {("q", "x"): 2}, True),
            (QueueLimit(max_live_per_user=2), {("q", "y"): 2, ("q", "x"): 1}, False),
            (QueueLimit(max_live=0), {}, True),
        ],
    )
    def test_counts_the_queue_and_the_user(
        self, limit: QueueLimit, live: dict[tuple[str, str], int], *, reached: bool
    ) -> None:
        asked = demand().model_copy(update={"queue": "q", "submitted_by": "x"})

        assert QueueLimits(by_queue={"q": limit}, live=live).reached(asked) is reached

    def test_questions_and_builds_do_not_count(self) -> None:
        limits = QueueLimits(by_queue={"default": QueueLimit(max_live=0)})

        assert not limits.reached(demand(JobKind.INFERENCE_COMPLETE))
        assert not limits.reached(demand(JobKind.ENVIRONMENT))
        assert limits.reached(demand(JobKind.DEPLOYMENT))

    def test_job_at_its_limit_holds_up_nobody_and_keeps_nothing(self) -> None:
        at_limit = candidate("x", 4, age=9, demand=demand(accelerators=4).model_copy(update={"queue": "q"}))
        limits = QueueLimits(by_queue={"q": QueueLimit(max_live=0)})

        decision = decided([at_limit, candidate("small")], host(4, busy={0: None}, keeps_for=at_limit), limits=limits)

        assert taken(decision) == "small"
        assert (decision.release, decision.reserve) == (at_limit, None)


class TestReservation:
    LARGE = candidate("large", 4, age=100)

    def test_large_job_that_does_not_fit_makes_the_node_keep_what_is_free(self) -> None:
        decision = decided([self.LARGE, candidate("small")], host(4, busy={0: None}))

        assert decision == Decision(reserve=self.LARGE)

    def test_one_card_is_never_starved_and_needs_no_reservation(self) -> None:
        assert decided([candidate("one", 1)], host(1, busy={0: None})) == Decision()

    def test_node_that_is_free_sooner_keeps(self) -> None:
        soon = host(4, name="soon", busy={0: HOUR})
        late = host(4, name="late", busy={0: 2 * HOUR})
        unknown = host(4, name="a", busy={0: None})

        for node, others in ((soon, (late, unknown)), (late, (soon, unknown)), (unknown, (soon, late))):
            decision = decided([self.LARGE], node, *others)
            assert decision.reserve == (self.LARGE if node is soon else None)

    def test_of_those_unknown_where_least_is_missing_then_by_name(self) -> None:
        a, b, c = (
            host(4, name="a", busy={0: None, 1: None}),
            host(4, name="b", busy={0: None}),
            host(4, name="c", busy={1: None}),
        )

        assert best_host(self.LARGE.demand, [a, c, b], now=START) is b

    def test_node_that_cannot_host_is_not_asked(self) -> None:
        small, draining_is_not_listed = host(2, name="a"), host(4, name="z", busy={0: HOUR})

        assert decided([self.LARGE], draining_is_not_listed, small).reserve == self.LARGE

    def test_holder_stays_the_holder(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="holder")
        holder = host(4, name="holder", busy={0: None}, keeps_for=kept)

        decision = decided([kept, candidate("small")], host(4, busy={0: HOUR}), holder)

        assert decision.reserve is None
        assert taken(decision) == "small"

    def test_reservation_of_a_node_that_is_gone_or_cannot_any_more_is_taken_over(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="holder")

        assert decided([kept], host(4, busy={0: HOUR})).reserve == kept
        assert decided([kept], host(4, busy={0: HOUR}), host(2, name="holder")).reserve == kept

    def test_who_fits_elsewhere_now_starts_there(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="holder")

        assert taken(decided([kept], host(4), host(4, name="holder", busy={0: HOUR}, keeps_for=kept))) == "large"

    def test_earlier_job_takes_the_reservation_of_a_later_one(self) -> None:
        later = candidate("later", 4, reserved_node_id="n")

        decision = decided([self.LARGE, later], host(4, busy={0: HOUR}, keeps_for=later))

        assert decision == Decision(reserve=self.LARGE, release=later)

    def test_later_job_waits_until_the_node_keeps_for_nobody(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="n")

        assert decided([kept, candidate("second", 3)], host(4, busy={0: HOUR, 1: HOUR}, keeps_for=kept)) == Decision()

    def test_reserved_job_that_is_not_among_the_first_is_known_all_the_same(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="n")

        assert decided([candidate("small")], host(4, busy={0: HOUR}, keeps_for=kept)) == Decision()
        assert taken(decided([candidate("small")], host(4, keeps_for=kept))) == "large"

    def test_reservation_that_the_node_cannot_meet_any_more_is_given_up(self) -> None:
        kept = dataclasses.replace(self.LARGE, reserved_node_id="n")

        assert decided([], host(2, keeps_for=kept)).release == kept


class TestBackfill:
    KEPT = candidate("large", 4, age=100, reserved_node_id="n")

    def test_more_urgent_jobs_are_not_held_up(self) -> None:
        urgent = candidate("urgent", priority=-5)

        assert taken(decided([self.KEPT, urgent], host(4, busy={0: HOUR}, keeps_for=self.KEPT))) == "urgent"

    @pytest.mark.parametrize(("seconds", "starts"), [(3600, True), (3601, False), (None, False)])
    def test_job_with_a_limit_that_ends_before_fills_the_gap(self, seconds: float | None, *, starts: bool) -> None:
        small = candidate("small", 1, seconds=seconds)
        decision = decided([self.KEPT, small], host(4, busy={0: HOUR}, keeps_for=self.KEPT))

        assert (taken(decision) == "small") is starts
        if decision.take:
            assert not decision.take.interchangeable

    def test_what_is_left_over_at_the_start_of_the_large_one_may_be_used(self) -> None:
        """Six of eight are free after an hour; four are kept, two are left over."""
        node = host(8, busy={0: HOUR, 1: HOUR, 2: HOUR, 3: None, 4: None}, keeps_for=self.KEPT)

        assert taken(decided([self.KEPT, candidate("two", 2)], node)) == "two"
        assert taken(decided([self.KEPT, candidate("three", 3)], node)) is None

    def test_nothing_is_left_over_when_nobody_knows_the_start(self) -> None:
        node = host(8, busy=dict.fromkeys(range(5)), keeps_for=self.KEPT)

        assert taken(decided([self.KEPT, candidate("one", 1)], node)) is None

    def test_cards_that_the_large_one_cannot_use_are_free_for_others(self) -> None:
        big = candidate("large", age=9, demand=demand(accelerators=2, accelerator_memory_mib=80_000))
        mixed = [*accelerators(2, 80_000), dataclasses.replace(accelerators(3, 10_000)[2], id="small")]
        node = dataclasses.replace(host(), cards=cards_of(mixed, held={"c0": None}), keeps_for=big)

        decision = decided([big, candidate("one")], node)

        assert decision.take is not None
        assert decision.take.accelerators == ("small",)

    def test_end_that_is_overdue_may_come_at_any_moment(self) -> None:
        node = host(4, busy={0: -HOUR}, keeps_for=self.KEPT)

        assert soonest(self.KEPT.demand, node, now=START) == START
        assert taken(decided([self.KEPT, candidate("one", seconds=1)], node)) is None

    def test_unknown_is_never(self) -> None:
        assert soonest(demand(accelerators=4), host(4, busy={0: None}), now=START) == NEVER
        assert soonest(demand(accelerators=5), host(4), now=START) == NEVER


# ---- the cluster ----------------------------------------------------------------------------------------------------


def stream(count: int, *, every: float, seconds: float, cards: int = 1, **more: Any) -> list[Work]:
    return [Work(f"s{number:04}", cards, seconds, arrives=number * every, **more) for number in range(count)]


class TestCluster:
    @pytest.mark.parametrize("known", [True, False])
    def test_endless_stream_of_small_jobs_does_not_starve_a_large_one(self, *, known: bool) -> None:
        """Fifteen of sixteen cards are always busy: eight of a node are never free together by chance."""
        works = [*stream(500, every=40, seconds=600, known=known), Work("large", 8, 600, arrives=1001)]

        cluster = Cluster({"a": 8, "b": 8}).run(works, until=20_000)

        assert cluster.started["large"] <= 1001 + 600

    def test_without_a_reservation_it_would_starve(self) -> None:
        """The stream really is one that starves: while it lasts, a job that nobody keeps cards for never starts."""

        class Greedy(Cluster):
            def _decide(self, name: str) -> bool:
                free = self.sizes[name] - sum(one.node == name for one in self.running.values())
                kept = self.waiting.pop("large", None) if free < 8 else None
                changed = super()._decide(name)
                if kept is not None:
                    self.waiting["large"] = kept
                return changed

        works = [*stream(500, every=40, seconds=600), Work("large", 8, 600, arrives=1001)]

        assert "large" not in Greedy({"a": 8, "b": 8}).run(works, until=19_000).started

    def test_small_ones_fill_the_gap_when_that_delays_nobody(self) -> None:
        long, large = Work("long", 4, 3600), Work("large", 8, 100, arrives=1)
        short = [Work(f"short{n}", 1, 600, arrives=2, limited=True) for n in range(20)]

        cluster = Cluster({"a": 8}).run([long, large, *short])

        assert cluster.started["large"] == 3600
        assert all(cluster.started[work.name] < 3600 for work in short)

    def test_those_without_a_limit_wait(self) -> None:
        long, large = Work("long", 4, 3600), Work("large", 8, 100, arrives=1)

        cluster = Cluster({"a": 8}).run([long, large, Work("endless", 1, 600, arrives=2)])

        assert (cluster.started["large"], cluster.started["endless"]) == (3600, 3700)

    def test_only_one_node_keeps_for_a_job(self) -> None:
        """The others go on with small jobs."""
        works = [Work(f"w{n}", 1, 1000 + n) for n in range(16)]

        cluster = Cluster({"a": 8, "b": 8}).run(
            [*works, Work("large", 8, 10, arrives=1), *stream(400, every=10, seconds=50)], until=1005
        )

        assert [one.reserved_node_id for one in cluster.waiting.values()].count(None) == len(cluster.waiting) - 1

    def test_cancelled_job_leaves_no_reservation(self) -> None:
        cluster = Cluster({"a": 8}).run([Work("long", 4, 3600), Work("large", 8, 100, arrives=1)], until=10)
        cluster.cancel("large")

        cluster.run([Work("next", 4, 10, arrives=11)], until=20)

        assert cluster.started["next"] == 11

    def test_nobody_exceeds_limits(self) -> None:
        limits = {"q": QueueLimit(max_live=5, max_live_per_user=2)}
        works = [Work(f"w{n:03}", 1, 60, arrives=n, queue="q", user=f"u{n % 4}") for n in range(100)]

        cluster = Cluster({"a": 8, "b": 8}, limits=limits).run(works)

        assert len(cluster.started) == 100
        assert cluster.most_live[("q", "*")] == 5
        assert max(most for (_, user), most in cluster.most_live.items() if user != "*") == 2

    @settings(max_examples=150, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 8), min_size=1, max_size=3),
        jobs=st.lists(
            st.tuples(
                st.integers(1, 8),
                st.integers(1, 500),
                st.integers(0, 300),
                st.integers(-1, 1),
                st.booleans(),
                st.booleans(),
            ),
            max_size=25,
        ),
    )
    def test_everything_that_can_run_runs_and_no_card_is_given_twice(
        self, sizes: list[int], jobs: list[tuple[int, int, int, int, bool, bool]]
    ) -> None:
        works = [
            Work(f"w{n:02}", cards, seconds, arrives=at, priority=priority, known=known, limited=limited)
            for n, (cards, seconds, at, priority, known, limited) in enumerate(jobs)
        ]

        cluster = Cluster({f"n{n}": size for n, size in enumerate(sizes)}).run(works)

        assert set(cluster.started) == {work.name for work in works if work.cards <= max(sizes)}

    @settings(max_examples=150, deadline=None)
    @given(
        sizes=st.lists(st.integers(2, 8), min_size=1, max_size=2),
        jobs=st.lists(
            st.tuples(st.integers(1, 8), st.integers(1, 500), st.integers(0, 300), st.booleans()), max_size=25
        ),
    )
    def test_who_has_a_reservation_starts_when_it_was_promised_or_before(
        self, sizes: list[int], jobs: list[tuple[int, int, int, bool]]
    ) -> None:
        """All ends are known and all have the same priority: nothing may come between."""
        works = [
            Work(f"w{n:02}", cards, seconds, arrives=at, limited=limited)
            for n, (cards, seconds, at, limited) in enumerate(sorted(jobs, key=lambda job: job[2]))
        ]

        cluster = Cluster({f"n{n}": size for n, size in enumerate(sizes)}).run(works)

        late = {
            name: (cluster.started[name], at) for name, at in cluster.promised.items() if cluster.started[name] > at
        }
        assert late == {}
