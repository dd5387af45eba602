"""Why a job waits and when it will start, as people are told."""

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from app.domain.enums import JobKind
from app.domain.placement import NEVER, Candidate, QueueLimit, QueueLimits
from app.domain.texts import Language, text
from app.domain.waiting import KnownNode, NodeCondition, WaitingReason, estimated_starts, waiting_reason
from tests.domain.cluster import START
from tests.domain.test_placement import HOUR, candidate, demand, host

NO_LIMITS = QueueLimits()
DRAINING, SILENT = NodeCondition.DRAINING, NodeCondition.SILENT


def known(*args: Any, condition: NodeCondition = NodeCondition.WORKS, **options: Any) -> KnownNode:
    """Return a node with one free slot."""
    return KnownNode(host(*args, **options), condition=condition, slots=(START,))


def reason(job: Candidate, *nodes: KnownNode, limits: QueueLimits = NO_LIMITS) -> tuple[str, dict[str, Any]]:
    found = waiting_reason(job, nodes, limits=limits, now=START)
    for language in Language:
        sentence = text(found.code, language, **found.params)
        assert sentence != found.code
        assert "{" not in sentence
    return found.code, dict(found.params)


class TestReason:
    @pytest.mark.parametrize(
        ("job", "nodes", "code", "params"),
        [
            (candidate("j"), [], "waiting_no_node", {}),
            (candidate("j", 8), [known(4), known(2)], "waiting_accelerators", {"needed": 8, "most": 4}),
            (
                candidate("j", demand=demand(labels={"gpu": "a100", "a": "b"})),
                [known(4)],
                "waiting_labels",
                {"labels": "a=b, gpu=a100"},
            ),
            (
                candidate("j", demand=demand(accelerators=2, accelerator_memory_mib=90_000)),
                [known(4)],
                "waiting_memory",
                {"needed": 2, "memory": 90_000},
            ),
            (
                candidate("j", demand=demand().model_copy(update={"cuda": True})),
                [known(4), known()],
                "waiting_cuda",
                {"needed": 1},
            ),
            (
                candidate("j", demand=demand(labels={"a": "b"}).model_copy(update={"modules": ("vllm",)})),
                [known(4), known(labels={"a": "b"}, lacking={"e": frozenset({"vllm"})})],
                "waiting_modules",
                {"environment": "e", "modules": "vllm"},
            ),
            (
                candidate("j", 8, demand=demand(accelerators=8, labels={"gpu": "a100"})),
                [known(8), known(4, labels={"gpu": "a100"})],
                "waiting_accelerators",
                {"needed": 8, "most": 4},
            ),
            (
                candidate("j", demand=demand(labels={"gpu": "a100"})),
                [known(4, labels={"gpu": "a100"}, condition=DRAINING), known(4)],
                "waiting_draining",
                {"nodes": "n"},
            ),
            (
                candidate("j", 1),
                [known(1, name=name, condition=SILENT) for name in "dcba"],
                "waiting_silent",
                {"nodes": "a, b, c, ..."},
            ),
            (
                candidate("j", 1),
                [known(1, condition=SILENT, name="s"), known(1, condition=DRAINING, name="d")],
                "waiting_draining",
                {"nodes": "d"},
            ),
            (
                candidate("j", demand=demand().model_copy(update={"environment": "x"})),
                [known()],
                "waiting_environment",
                {"environment": "x"},
            ),
            (candidate("j", 2), [known(2, busy={0: HOUR})], "waiting_busy", {}),
            (
                candidate("j", 2, reserved_node_id="n"),
                [known(2, busy={0: HOUR})],
                "waiting_reserved",
                {"node": "n", "needed": 2},
            ),
            (candidate("j", 2), [known(2)], "waiting_turn", {}),
            (candidate("j", 0), [known(2)], "waiting_turn", {}),
            (candidate("j", 0), [KnownNode(host(2), slots=(START + HOUR,))], "waiting_busy", {}),
            (
                candidate("j", demand=demand(JobKind.ENVIRONMENT).model_copy(update={"node_id": "gone"})),
                [known()],
                "waiting_node_gone",
                {},
            ),
        ],
    )
    def test_first_thing_that_keeps_it(
        self, job: Candidate, nodes: Sequence[KnownNode], code: str, params: dict[str, Any]
    ) -> None:
        assert reason(job, *nodes) == (code, params)

    def test_limits(self) -> None:
        job = candidate("j", demand=demand(accelerators=1).model_copy(update={"queue": "q", "submitted_by": "x"}))
        per_user = QueueLimits({"q": QueueLimit(max_live_per_user=3)}, {("q", "x"): 3, ("q", "y"): 1})
        together = QueueLimits({"q": QueueLimit(max_live=4)}, {("q", "x"): 3, ("q", "y"): 1})

        assert reason(job, known(1), limits=per_user) == (
            "waiting_user_limit",
            {"queue": "q", "user": "x", "live": 3, "limit": 3},
        )
        assert reason(job, known(1), limits=together) == ("waiting_queue_limit", {"queue": "q", "live": 4, "limit": 4})

    def test_is_a_value(self) -> None:
        assert WaitingReason("waiting_turn") == WaitingReason("waiting_turn", {})


class TestEstimate:
    def starts(self, jobs: Sequence[Candidate], *nodes: KnownNode, limits: QueueLimits = NO_LIMITS) -> dict[str, float]:
        found = estimated_starts(jobs, nodes, limits=limits, now=START)
        return {name: (start - START).total_seconds() for name, start in found.items()}

    def test_one_after_the_other(self) -> None:
        jobs = [candidate("a", 1, age=9, seconds=60), candidate("b", 1, age=8, seconds=30), candidate("c", 1, age=7)]

        assert self.starts(jobs, known(1, busy={0: HOUR})) == {"a": 3600, "b": 3660, "c": 3690}

    def test_nobody_knows_what_comes_after_a_job_without_an_end(self) -> None:
        jobs = [candidate("a", 1, age=9), candidate("b", 1)]

        assert self.starts(jobs, known(1)) == {"a": 0}
        assert self.starts(jobs, known(1, busy={0: None})) == {}

    def test_large_job_keeps_what_is_free(self) -> None:
        jobs = [candidate("large", 2, age=9, seconds=60), candidate("small", 1)]

        assert self.starts(jobs, known(2, busy={0: HOUR})) == {"large": 3600, "small": 3660}

    def test_slots(self) -> None:
        node = KnownNode(host(), slots=(START + HOUR, START))
        jobs = [candidate("a", 0, age=9), candidate("b", 0, age=8), candidate("c", 0)]

        assert self.starts(jobs, node) == {"a": 0, "b": 3600}
        assert self.starts(jobs, KnownNode(host(), slots=(NEVER,))) == {}

    def test_only_nodes_that_work_count(self) -> None:
        assert self.starts([candidate("a", 1)], known(1, condition=DRAINING)) == {}

    def test_at_a_limit_nobody_knows(self) -> None:
        limits = QueueLimits({"default": QueueLimit(max_live=2)}, {("default", ""): 1})
        jobs = [candidate("a", 1, age=9), candidate("b", 1)]

        assert self.starts(jobs, known(4), limits=limits) == {"a": 0}

    def test_most_urgent_first(self) -> None:
        urgent = candidate("urgent", 1, priority=-1, seconds=60)

        assert self.starts([candidate("a", 1, age=9), urgent], known(1)) == {"urgent": 0, "a": 60}

    def test_second_node_is_used(self) -> None:
        nodes = [known(1, name="a", busy={0: HOUR}), known(1, name="b", busy={0: timedelta(seconds=5)})]
        hosts = [
            dataclasses.replace(node, host=dataclasses.replace(node.host, node_id=node.host.name)) for node in nodes
        ]

        assert self.starts([candidate("x", 1, age=1), candidate("y", 1)], *hosts) == {"x": 5, "y": 3600}
