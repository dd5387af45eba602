"""How an environment stands on a node, from what the node said and what the database knows better."""

from datetime import UTC, datetime
from typing import Any

import pytest

from app.domain.enums import EndReason, JobStatus, Platform
from app.domain.environment_reports import EnvironmentReport, EnvironmentState, Trouble
from app.registry.environments.on_nodes import EnvironmentStates, environment_state_of
from app.store.environments import LastBuild, new_environment
from app.store.tables import EnvironmentRow, NodeRow

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NEEDS_CONDA = Trouble(code="environment_needs_conda", params={"packages": "ffmpeg"})


def row(spec_hash: str = "new") -> EnvironmentRow:
    return new_environment("trl", spec="text", spec_hash=spec_hash, now=NOW)


def build(status: JobStatus, *, spec: str | None = "text") -> LastBuild:
    return LastBuild("job", status, EndReason.ENV_BUILD_FAILED, {"detail": "no network"}, spec)


def report(state: EnvironmentState, **values: Any) -> EnvironmentReport:
    return EnvironmentReport(name="trl", state=state, **values)


@pytest.mark.parametrize(
    ("said", "last", "state"),
    [
        (report(EnvironmentState.READY, source="built", spec_hash="new"), None, EnvironmentState.READY),
        # the spec changed a moment ago
        (report(EnvironmentState.READY, source="built", spec_hash="old"), None, EnvironmentState.STALE),
        (report(EnvironmentState.READY, source="conda"), build(JobStatus.FAILED), EnvironmentState.READY),
        (report(EnvironmentState.KNOWN), build(JobStatus.QUEUED), EnvironmentState.BUILDING),
        (report(EnvironmentState.STALE), build(JobStatus.RUNNING), EnvironmentState.BUILDING),
        (report(EnvironmentState.KNOWN), build(JobStatus.FAILED), EnvironmentState.FAILED),
        (report(EnvironmentState.KNOWN), build(JobStatus.CANCELLED), EnvironmentState.FAILED),
        # of a specification that was mended since
        (report(EnvironmentState.KNOWN), build(JobStatus.FAILED, spec="older"), EnvironmentState.KNOWN),
        # it was deleted since
        (report(EnvironmentState.KNOWN), build(JobStatus.SUCCEEDED), EnvironmentState.KNOWN),
        (report(EnvironmentState.MISSING, trouble=NEEDS_CONDA), None, EnvironmentState.MISSING),
    ],
)
def test_state(said: EnvironmentReport, last: LastBuild | None, state: EnvironmentState) -> None:
    assert environment_state_of(said, row=row(), last=last)[0] is state


def test_failure_names_the_job_and_its_reason() -> None:
    _, job, trouble = environment_state_of(report(EnvironmentState.KNOWN), row=row(), last=build(JobStatus.FAILED))

    assert (job, trouble) == ("job", Trouble(code="reason_env_build_failed", params={"detail": "no network"}))


def test_node_of_an_older_version_says_names_only() -> None:
    node = NodeRow(
        id="n", name="n", platform=Platform.CPU, accelerators=[], environments=["found"], slots=1, boot_id="b"
    )
    known = EnvironmentStates(
        rows={"trl": row(), "bare": new_environment("bare", spec=None, spec_hash=None, now=NOW)}, builds={}
    )

    assert {one.name: one.state for one in known.on(node)} == {
        "bare": EnvironmentState.MISSING,
        "base": EnvironmentState.KNOWN,
        "found": EnvironmentState.READY,
        "trl": EnvironmentState.KNOWN,
    }
