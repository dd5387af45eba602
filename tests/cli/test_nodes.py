"""`deepe nodes` against a scripted service."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import app
from app.cli.command import ExitCode
from tests.cli.standin import Answer, Request, document, stand_in

CARD = {
    "id": "GPU-0",
    "index": 0,
    "kind": "cuda",
    "name": "NVIDIA L4",
    "memory_mib": 23_552,
    "driver": "550",
    "state": "leased",
    "job": "job-1",
    "attempt": 2,
    "used_mib": None,
    "pids": [],
}
DISK = {"path": "/srv", "total_bytes": 2 * 1024**3, "free_bytes": 1024**3}
NODE: dict[str, Any] = {
    "id": "id-1",
    "name": "gpu-1",
    "state": "ready",
    "state_detail": "Accepts jobs; 1 running.",
    "platform": "cuda",
    "inventory": {
        "hostname": "rack-1",
        "system": "Linux 6.8",
        "processor": "EPYC",
        "cpus": 64,
        "memory_bytes": 1024**4,
        "home": DISK,
        "node_home": None,
    },
    "accelerators": [
        CARD,
        {**CARD, "id": "GPU-1", "state": "occupied", "job": None, "attempt": None, "used_mib": 10_240, "pids": [7, 8]},
        {**CARD, "id": "GPU-2", "state": "free", "job": None, "attempt": None},
    ],
    "labels": {"zone": "b", "node": "gpu-1"},
    "extra_labels": {"zone": "b"},
    "environments": ["base"],
    "restricted": True,
    "slots": 1,
    "jobs": [{"id": "job-1", "name": "mine", "stage": "training", "status": "running", "attempt": 2}],
    "heartbeat_age_seconds": 1.5,
}


@pytest.fixture
def service() -> Iterator[tuple[str, list[Request]]]:
    def script(request: Request) -> Answer:
        if request.method == "DELETE":
            return Answer(204)
        answer = document({"items": [NODE], "next_cursor": None} if request.path.endswith("limit=100") else NODE)
        return Answer(answer.status, answer.body, answer.kind, headers={"ETag": '"v1"'})

    with stand_in(script) as running:
        yield running


def allowed(request: Request) -> Answer:
    methods = [{"id": "1", "name": "finance", "project": "lab"}]
    return document(
        {"methods": methods, "projects": [], "environments": json.loads(request.body).get("environments", [])}
    )


def test_allow_sends_the_whole_list() -> None:
    runner = CliRunner()
    with stand_in(allowed) as (url, asked):
        node = runner.invoke(
            app, ["nodes", "allow", "gpu-1", "--method", "finance", "--environment", "trl", "--url", url]
        )
        environment = runner.invoke(app, ["environments", "allow", "trl", "--project", "lab", "--url", url])

    assert node.stdout == "gpu-1  methods: lab/finance; environments: trl\n"
    assert environment.stdout == "trl  methods: lab/finance\n"
    assert [(one.method, one.path, json.loads(one.body)) for one in asked] == [
        ("PUT", "/api/v1/nodes/gpu-1/allowed", {"methods": ["finance"], "projects": [], "environments": ["trl"]}),
        ("PUT", "/api/v1/environments/trl/allowed", {"methods": [], "projects": ["lab"]}),
    ]
    assert {one.headers["if-match"] for one in asked} == {"*"}


def run(service: tuple[str, list[Request]], *arguments: str, expected: int = 0) -> str:
    result = CliRunner().invoke(app, ["nodes", *arguments, "--url", service[0]], env={"COLUMNS": "200"})
    assert result.exit_code == expected, result.output
    return result.output


class TestLook:
    def test_list_shows_what_is_free(self, service: tuple[str, list[Request]]) -> None:
        output = run(service, "list")

        assert "1 of 3 free (NVIDIA L4)" in output
        assert json.loads(run(service, "list", "--json")) == {"items": [NODE]}

    def test_show_says_who_has_what(self, service: tuple[str, list[Request]]) -> None:
        output = run(service, "show", "gpu-1")

        assert "job job-1, attempt 2" in output
        assert "10.0 GiB used by others (pid 7, 8)" in output
        assert "1.0 GiB free of 2.0 GiB at /srv" in output
        assert json.loads(run(service, "show", "gpu-1", "--json")) == NODE


class TestAct:
    @pytest.mark.parametrize("action", ["drain", "undrain"])
    def test_drain_and_undrain(self, service: tuple[str, list[Request]], action: str) -> None:
        assert "gpu-1  ready  Accepts jobs" in run(service, action, "gpu-1")
        assert [(asked.method, asked.path) for asked in service[1]] == [("POST", f"/api/v1/nodes/gpu-1:{action}")]

    def test_declaring_dead_needs_a_person(self, service: tuple[str, list[Request]]) -> None:
        assert "--yes" in run(service, "declare-dead", "gpu-1", expected=ExitCode.USAGE)
        assert service[1] == []

        run(service, "declare-dead", "gpu-1", "--yes")
        assert json.loads(service[1][0].body) == {"confirm": "gpu-1"}

    def test_labels_are_set_and_taken_away(self, service: tuple[str, list[Request]]) -> None:
        assert "node=gpu-1, zone=b" in run(service, "label", "gpu-1", "zone=b", "old-", "empty=")

        patch = service[1][-1]
        assert (patch.method, patch.headers["if-match"]) == ("PATCH", '"v1"')
        assert json.loads(patch.body) == {"extra_labels": {"zone": "b", "old": None, "empty": ""}}
        for wrong in ("zone", "=b", "-"):
            run(service, "label", "gpu-1", wrong, expected=ExitCode.USAGE)

    def test_remove(self, service: tuple[str, list[Request]]) -> None:
        assert run(service, "remove", "gpu-1") == "gpu-1 is removed\n"
        assert json.loads(run(service, "remove", "gpu-1", "--json")) == {"removed": "gpu-1"}
        assert (service[1][1].method, service[1][1].headers["if-match"]) == ("DELETE", '"v1"')
