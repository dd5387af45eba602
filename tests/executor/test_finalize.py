"""What an end becomes: names of models, verdicts on builds, and what a crash right behind the transaction left."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.domain.enums import EndReason, JobKind, JobStatus, ModelState, TrainingType
from app.domain.projects import DEFAULT_SCOPE
from app.domain.retries import MAX_RECOVERIES
from app.executor.attempts.artifacts import read_result
from app.executor.attempts.finalize import MAX_TRIES, StageFinalizer
from app.executor.attempts.model_card import FILE_NAME
from app.executor.attempts.produced_models import model_name
from app.executor.attempts.results import judge_base_model, judge_build, judge_printed_result
from app.executor.runs.job_spec import Deployment, JobSpec, Named
from app.executor.runs.run_folder import RunFolder
from app.executor.supervisor.client import ExitRecord, ExitWhy
from app.registry.models.folders import list_files
from app.store import job_attempts, job_status
from app.store import jobs as store
from app.store.home import Home
from app.store.job_attempts import Claim
from app.store.models import find_model
from app.store.session import Database
from app.store.tables import ModelRow
from tests import job_rows

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
BASE = Named(id="b", name="tiny-base", path="models/tiny-base")


def exit_record(**changes: Any) -> ExitRecord:
    values: dict[str, Any] = {
        "attempt_id": "a",
        "why": ExitWhy.EXITED,
        "code": 0,
        "signal": None,
        "error": None,
        "stop_reason": None,
        "oom_kills": 0,
        "leftovers": 0,
        "unkillable": 0,
        "max_rss_bytes": 1,
        "user_seconds": 0.1,
        "system_seconds": 0.1,
        "started_at": 1.0,
        "finished_at": 2.0,
    }
    return ExitRecord(**{**values, **changes})


class Status:
    """Remembers what was written."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, bool]] = []

    async def launching(self, job_id: str) -> None: ...

    async def running(self, job_id: str, pid: int) -> None: ...

    async def read(self, job_id: str) -> int | None:
        return None

    async def record(self, job_id: str) -> Mapping[str, Any] | None:
        return None

    async def ended(self, job_id: str, *, succeeded: bool) -> None:
        self.ends.append((job_id, succeeded))

    async def close(self) -> None: ...


class Desk:
    """A finalizer with its surroundings."""

    def __init__(self, root: Path, database: Database) -> None:
        self.home = Home(root)
        self.home.create()
        self.database = database
        self.status = Status()
        self.finalizer = StageFinalizer(database=database, home=self.home, status=self.status)
        self.node_id = ""
        self.saved = Path()

    async def claim(self, kind: JobKind = JobKind.TRAINING, **overrides: Any) -> Claim:
        method = await job_rows.add_method(self.database)
        launch = JobSpec(technique="sft", base_model=BASE).document()
        await job_rows.add_job(self.database, kind=kind, method_id=method, method_version=1, launch=launch, **overrides)
        claim = await job_rows.claim(self.database, self.node_id)
        assert claim is not None
        return claim

    async def claim_again(self) -> Claim:
        """Claim what was queued again, after every pause."""
        claim = await job_rows.claim(self.database, self.node_id, now=datetime.now(UTC) + timedelta(days=1))
        assert claim is not None
        return claim

    def adapter(self, claim: Claim) -> Path:
        """Make what a training leaves."""
        run = RunFolder(self.home.run_folder(claim.job.id, claim.attempt.number))
        run.output.mkdir(parents=True)
        run.output_log.touch()
        (run.output / "adapter_config.json").write_text("{}")
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        weights = len(header).to_bytes(8, "little") + header + bytes(4)
        (run.output / "adapter_model.safetensors").write_bytes(weights)
        return run.output

    async def row(self, claim: Claim) -> Any:
        async with self.database.reading() as session:
            return await store.get(session, claim.job.id)


def write_odd(folder: Path) -> None:
    """Write a file whose name is Latin-1."""
    with open(os.fsencode(folder) + b"/\xfc.txt", "w"):
        pass


@pytest.fixture
async def desk(tmp_path: Path, database: Database) -> Desk:
    desk = Desk(tmp_path / "home", database)
    desk.node_id = await job_rows.add_node(database)
    return desk


class TestFinalize:
    async def test_keeps_what_a_training_needed_of_memory(self, desk: Desk) -> None:
        claim = await desk.claim()
        desk.adapter(claim)
        run = RunFolder(desk.home.run_folder(claim.job.id, claim.attempt.number))
        values = [{"loss": 2.0, "memory_peak_mib": 700.0}, {"memory_peak_mib": 812.5, "memory_expected_mib": 900.0}]
        lines = [json.dumps({"type": "metrics", "step": step, "values": one}) for step, one in enumerate(values, 1)]
        run.events.write_text("".join(f"{line}\n" for line in lines))

        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert row.status is JobStatus.SUCCEEDED
        assert row.memory == {"peak_mib": 812.5, "expected_mib": 900.0, "device": "cpu"}

    @pytest.mark.parametrize(("other", "succeeded"), [(False, False), (True, True)])
    async def test_failure_that_was_told_without_redis_counts(self, desk: Desk, other: bool, succeeded: bool) -> None:
        claim = await desk.claim()
        desk.adapter(claim)
        run = RunFolder(desk.home.run_folder(claim.job.id, claim.attempt.number))
        task = "another task" if other else claim.job.id
        lines = [{"type": "status", "task": task, "status": status} for status in (2, 3)]
        run.events.write_text("".join(json.dumps(line) + "\n" for line in lines))

        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        reason = EndReason.COMPLETED if succeeded else EndReason.SCRIPT_REPORTED_FAILURE
        assert row.reason is reason

    async def test_failed_training_measures_nothing(self, desk: Desk) -> None:
        claim = await desk.claim()
        desk.adapter(claim)

        await desk.finalizer.finalize(claim, exit_record(code=3))

        assert (await desk.row(claim)).memory is None

    async def test_twice_changes_nothing_the_second_time(self, desk: Desk) -> None:
        claim = await desk.claim()
        desk.adapter(claim)

        await desk.finalizer.finalize(claim, exit_record())
        first = await desk.row(claim)
        await desk.finalizer.finalize(claim, exit_record(code=3))

        again = await desk.row(claim)
        assert (first.status, first.reason) == (JobStatus.SUCCEEDED, EndReason.COMPLETED)
        assert (again.status, again.result_model_id, again.updated_at) == (
            first.status,
            first.result_model_id,
            first.updated_at,
        )
        assert desk.status.ends == [(claim.job.id, True)]

    async def test_attempt_that_is_no_longer_ours_makes_no_model(self, desk: Desk) -> None:
        claim = await desk.claim()
        desk.adapter(claim)
        async with desk.database.writing() as session:
            await job_attempts.requeue(session, claim, reason=EndReason.SUPERVISOR_LOST, now=NOW)

        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert (row.status, row.result_model_id) == (JobStatus.QUEUED, None)
        assert desk.status.ends == []

    async def test_script_that_never_ran_is_tried_again_but_not_for_ever(self, desk: Desk) -> None:
        never = exit_record(why=ExitWhy.NEVER_STARTED, code=None, started_at=None)
        claim = await desk.claim()
        for _ in range(MAX_RECOVERIES):
            await desk.finalizer.finalize(claim, never)
            assert (await desk.row(claim)).status is JobStatus.QUEUED
            claim = await desk.claim_again()

        await desk.finalizer.finalize(claim, never)

        row = await desk.row(claim)
        assert (row.status, row.reason, row.attempts) == (JobStatus.FAILED, EndReason.SPAWN_FAILED, MAX_RECOVERIES + 1)

    async def test_lost_exit_is_never_success(self, desk: Desk) -> None:
        claim = await desk.claim()
        desk.adapter(claim)

        await desk.finalizer.finalize(claim, exit_record(why=ExitWhy.LOST, code=None))

        row = await desk.row(claim)
        assert (row.status, row.recoveries, row.result_model_id) == (JobStatus.QUEUED, 1, None)


class TestTrainingThatSaves:
    """A training that writes the complete model beside its adapter leaves the saving stage nothing to do."""

    async def chain(self, desk: Desk) -> tuple[Claim, str, str]:
        method = await job_rows.add_method(desk.database)
        launch = JobSpec(technique="sft", base_model=BASE).document()
        rows = job_rows.new_chain(method_id=method, method_version=1, launch=launch)
        _, saving, deployment = await job_rows.insert(desk.database, *rows)
        claim = await job_rows.claim(desk.database, desk.node_id)
        assert claim is not None
        desk.saved = desk.adapter(claim) / "saved"
        desk.saved.mkdir()
        (desk.saved / "config.json").write_text("{}")
        weights = desk.saved.parent / "adapter_model.safetensors"
        shutil.copyfile(weights, desk.saved / "model.safetensors")
        return claim, saving, deployment

    async def of(self, desk: Desk, job_id: str) -> tuple[Any, ModelRow | None]:
        async with desk.database.reading() as session:
            row = await store.get(session, job_id)
            return row, await find_model(session, row.result_model_id) if row.result_model_id else None

    async def test_the_saving_ends_with_the_complete_model_and_the_deployment_follows(self, desk: Desk) -> None:
        claim, saving, deployment = await self.chain(desk)

        await desk.finalizer.finalize(claim, exit_record())

        training, adapter = await self.of(desk, claim.job.id)
        job, complete = await self.of(desk, saving)
        assert (job.status, job.reason, job.attempts) == (JobStatus.SUCCEEDED, EndReason.ALREADY_SAVED, 0)
        assert job.reason_params["path"] == desk.home.relative(desk.saved)
        assert adapter is not None
        assert complete is not None
        assert (complete.state, complete.parent_id) == (ModelState.COMPLETE, adapter.id)
        assert complete.path == desk.home.relative(desk.saved)
        assert [file["path"] for file in complete.details["files"]] == [
            file.path for file in list_files(desk.saved)
        ] == ["README.md", "config.json", "model.safetensors"]  # fmt: skip
        following, _ = await self.of(desk, deployment)
        assert (following.model_id, following.blocked_by) == (complete.id, None)
        assert desk.status.ends == [(training.id, True), (saving, True)]

    async def test_what_a_crash_left_is_made_up_for(self, desk: Desk) -> None:
        claim, saving, _ = await self.chain(desk)
        await desk.finalizer.finalize(claim, exit_record())
        (desk.saved / FILE_NAME).unlink()
        desk.status.ends.clear()

        await desk.finalizer.follow_up(claim.attempt.id)

        assert (desk.saved / FILE_NAME).is_file()
        assert (saving, True) in desk.status.ends

    async def test_half_a_model_is_left_to_the_saving_stage(self, desk: Desk) -> None:
        claim, saving, _ = await self.chain(desk)
        (desk.saved / "model.safetensors").write_bytes(b"half")

        await desk.finalizer.finalize(claim, exit_record())

        job, _ = await self.of(desk, saving)
        assert (job.status, job.blocked_by) == (JobStatus.QUEUED, None)


class TestFilesOfAModel:
    """What is checked, counted, hashed and listed is the same."""

    async def finalized(self, desk: Desk, claim: Claim) -> tuple[Any, ModelRow | None]:
        await desk.finalizer.finalize(claim, exit_record())
        row = await desk.row(claim)
        async with desk.database.reading() as session:
            return row, await find_model(session, row.result_model_id) if row.result_model_id else None

    async def test_weights_that_are_a_link_are_copied_in(self, desk: Desk, tmp_path: Path) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        away = tmp_path / "away"
        (output / "adapter_model.safetensors").rename(away)
        (output / "adapter_model.safetensors").symlink_to(away)

        _, model = await self.finalized(desk, claim)

        assert model is not None
        away.unlink()
        listed = list_files(output)
        recorded = {file["path"]: file for file in model.details["files"]}
        assert {file.path: file.size_bytes for file in listed} == {name: f["size"] for name, f in recorded.items()}
        assert model.size_bytes == sum(file.size_bytes for file in listed)
        for name, file in recorded.items():
            assert hashlib.sha256((output / name).read_bytes()).hexdigest() == file["sha256"], name

    async def test_size_is_that_of_the_files_with_a_card_of_the_script_and_checkpoints(self, desk: Desk) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        (output / "README.md").write_text("by the script")
        (output / "checkpoint-5").mkdir()
        (output / "checkpoint-5" / "optimizer.pt").write_bytes(bytes(1000))

        _, model = await self.finalized(desk, claim)

        assert model is not None
        listed = list_files(output)
        assert [file.path for file in listed] == [
            "README.md", "README.script.md", "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        assert [file.path for file in listed] == [file["path"] for file in model.details["files"]]
        assert model.size_bytes == sum(file.size_bytes for file in listed)

    async def test_a_link_to_a_folder_elsewhere_is_named(self, desk: Desk, tmp_path: Path) -> None:
        claim = await desk.claim()
        (desk.adapter(claim) / "processor").symlink_to(tmp_path)

        row, model = await self.finalized(desk, claim)

        assert (row.reason, model) == (EndReason.OUTPUT_INVALID, None)
        assert f"processor is a link to the folder {tmp_path}" in row.reason_params["detail"]

    async def test_weights_that_are_a_pickle_are_named_with_the_cure(self, desk: Desk) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        for path in output.iterdir():
            path.unlink()
        (output / "config.json").write_text("{}")
        (output / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")

        row, model = await self.finalized(desk, claim)

        assert (row.reason, model) == (EndReason.OUTPUT_MISSING, None)
        assert "safe_serialization=True" in row.reason_params["detail"]


class TestNamesThatAreNotText:
    """Files and results whose names are not UTF-8, or that JSON has no form for."""

    async def test_model_with_such_a_file_is_a_model(self, desk: Desk) -> None:
        claim = await desk.claim()
        write_odd(desk.adapter(claim))

        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.SUCCEEDED, EndReason.COMPLETED)
        async with desk.database.reading() as session:
            model = await find_model(session, row.result_model_id)
        assert model is not None
        names = [file["path"] for file in model.details["files"]]
        assert names == ["README.md", "\\xfc.txt", "adapter_config.json", "adapter_model.safetensors"]
        manifest = read_result(RunFolder(desk.home.run_folder(claim.job.id, 1)).result)
        assert manifest is not None
        assert sorted(file.path for file in manifest.files) == names[1:]

    async def test_end_names_what_lies_there_instead_of_a_model(self, desk: Desk) -> None:
        claim = await desk.claim()
        run = RunFolder(desk.home.run_folder(claim.job.id, 1))
        run.output.mkdir(parents=True)
        run.output_log.touch()
        write_odd(run.output)

        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.OUTPUT_MISSING)
        assert "\\xfc.txt" in row.reason_params["detail"]

    @pytest.mark.parametrize(
        ("printed", "kept"),
        [('"loss": NaN', {"loss": None}), ('"path": "\\ud800\\u0000"', {"path": "\\ud800\\x00"})],
    )
    async def test_result_that_was_printed_is_kept(self, desk: Desk, printed: str, kept: dict[str, Any]) -> None:
        claim = await desk.claim(JobKind.DEPLOYMENT)
        run = RunFolder(desk.home.run_folder(claim.job.id, 1))
        run.output.mkdir(parents=True)
        run.output_log.write_text(f'{{"status": "failed", {printed}}}\n')

        await desk.finalizer.finalize(claim, exit_record())

        assert (await desk.row(claim)).reason is EndReason.RESULT_FAILED
        verdict = judge_printed_result([f'{{"status": "success", {printed}}}'])
        assert verdict.result == {"status": "success", **kept}


class TestEndThatCannotBeWritten:
    def unrecordable(self, desk: Desk, claim: Claim) -> Path:
        """Let the result manifest's place be taken by a folder."""
        desk.adapter(claim)
        place = RunFolder(desk.home.run_folder(claim.job.id, 1)).result
        (place / "inside").mkdir(parents=True)
        return place

    async def test_is_written_without_the_result_after_some_tries(self, desk: Desk) -> None:
        claim = await desk.claim()
        self.unrecordable(desk, claim)

        for _ in range(MAX_TRIES - 1):
            with pytest.raises(IsADirectoryError):
                await desk.finalizer.finalize(claim, exit_record())
            assert (await desk.row(claim)).status is JobStatus.LAUNCHING
        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.FAILED, EndReason.RESULT_NOT_RECORDED)
        assert row.reason_params["detail"].startswith("IsADirectoryError")
        assert row.result_model_id is None
        assert desk.status.ends == [(claim.job.id, False)]

    async def test_is_an_ordinary_one_if_the_cause_goes_away(self, desk: Desk) -> None:
        claim = await desk.claim()
        place = self.unrecordable(desk, claim)

        with pytest.raises(IsADirectoryError):
            await desk.finalizer.finalize(claim, exit_record())
        shutil.rmtree(place)
        await desk.finalizer.finalize(claim, exit_record())

        assert (await desk.row(claim)).reason is EndReason.COMPLETED

    async def test_wish_of_a_person_is_kept(self, desk: Desk) -> None:
        claim = await desk.claim()
        self.unrecordable(desk, claim)
        async with desk.database.writing() as session:
            await job_status.request_cancel(session, claim.job.id, now=NOW)

        for _ in range(MAX_TRIES - 1):
            with pytest.raises(IsADirectoryError):
                await desk.finalizer.finalize(claim, exit_record())
        await desk.finalizer.finalize(claim, exit_record())

        row = await desk.row(claim)
        assert (row.status, row.reason) == (JobStatus.CANCELLED, EndReason.CANCELLED)

    async def test_database_that_is_down_is_waited_for(self, desk: Desk, tmp_path: Path) -> None:
        claim = await desk.claim()
        desk.adapter(claim)
        down = Database(f"sqlite+aiosqlite:///{tmp_path}/absent/deepe.db", scope=DEFAULT_SCOPE)
        finalizer = StageFinalizer(database=down, home=desk.home, status=desk.status)

        for _ in range(MAX_TRIES + 2):
            with pytest.raises(OperationalError):
                await finalizer.finalize(claim, exit_record())

        assert (await desk.row(claim)).status is JobStatus.LAUNCHING
        await down.close()


class TestModelCard:
    async def test_status_is_told_whatever_becomes_of_the_card(self, desk: Desk, caplog: Any) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        (output / f"{FILE_NAME}.tmp").mkdir()

        await desk.finalizer.finalize(claim, exit_record())
        await desk.finalizer.follow_up(claim.attempt.id)

        assert (await desk.row(claim)).status is JobStatus.SUCCEEDED
        assert desk.status.ends == [(claim.job.id, True)] * 2
        assert [record.msg for record in caplog.records].count("model_card_not_written") == 2


class TestFollowUp:
    async def test_writes_the_card_and_the_status_again(self, desk: Desk) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        await desk.finalizer.finalize(claim, exit_record())
        card = (output / FILE_NAME).read_text()
        (output / FILE_NAME).unlink()

        await desk.finalizer.follow_up(claim.attempt.id)

        assert (output / FILE_NAME).read_text() == card
        assert desk.status.ends == [(claim.job.id, True)] * 2

    async def test_leaves_live_and_unknown_attempts_alone(self, desk: Desk) -> None:
        claim = await desk.claim()

        await desk.finalizer.follow_up(claim.attempt.id)
        await desk.finalizer.follow_up("nobody")

        assert desk.status.ends == []

    async def test_card_of_files_that_are_gone_is_not_written(self, desk: Desk) -> None:
        claim = await desk.claim()
        output = desk.adapter(claim)
        await desk.finalizer.finalize(claim, exit_record())
        for file in output.iterdir():
            file.unlink()
        output.rmdir()

        await desk.finalizer.follow_up(claim.attempt.id)

        assert not output.exists()
        async with desk.database.reading() as session:
            assert await find_model(session, (await desk.row(claim)).result_model_id) is not None


class TestBuilds:
    def test_exit_with_zero_is_ready(self) -> None:
        assert judge_build(exit_record(), []).succeeded

    @pytest.mark.parametrize(
        ("changes", "tail", "reason"),
        [
            ({"code": 1}, ["ERROR: No matching distribution found for x"], EndReason.ENV_BUILD_FAILED),
            ({"code": 1}, ["OSError: [Errno 28] No space left on device"], EndReason.DISK_FULL),
            ({"why": ExitWhy.STOPPED, "stop_reason": "cancelled"}, [], EndReason.CANCELLED),
            ({"why": ExitWhy.LOST, "code": None}, [], EndReason.SUPERVISOR_LOST),
        ],
    )
    def test_everything_else_has_its_reason(self, changes: dict[str, Any], tail: list[str], reason: EndReason) -> None:
        verdict = judge_build(exit_record(**changes), tail)

        assert (verdict.succeeded, verdict.reason) == (False, reason)


class TestBaseModels:
    def test_a_folder_that_is_a_model_is_one(self, tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / "config.json").write_text('{"model_type": "qwen3", "dtype": "float32"}')

        verdict = judge_base_model(exit_record(), [], tmp_path / "made", root=tmp_path)

        assert verdict.succeeded
        assert verdict.card is not None
        assert (verdict.card["model_type"], verdict.card["dtype"]) == ("qwen3", "float32")

    def test_a_program_that_left_no_model_did_not_succeed(self, tmp_path: Path) -> None:
        verdict = judge_base_model(exit_record(), [], tmp_path / "made", root=tmp_path)

        assert (verdict.succeeded, verdict.reason) == (False, EndReason.OUTPUT_INVALID)
        assert "made" in verdict.detail

    def test_a_program_that_failed_has_its_reason(self, tmp_path: Path) -> None:
        tail = ["ModuleNotFoundError: No module named 'torch'"]

        verdicts = [judge_base_model(exit_record(code=1), lines, tmp_path, root=tmp_path) for lines in ([], tail)]

        assert [verdict.reason for verdict in verdicts] == [EndReason.EXIT_CODE, EndReason.MODULE_MISSING]


class TestNames:
    JOB = "12345678-0000-4000-8000-000000000000"

    def parent(self, name: str) -> ModelRow:
        values: dict[str, Any] = {"name": name, "state": ModelState.CUSTOMIZED, "training_type": TrainingType.CHAT}
        return ModelRow(**values)

    @pytest.mark.parametrize(
        ("kind", "parent", "name"),
        [
            (JobKind.TRAINING, None, "tiny-base_first_20260304_1234"),
            (JobKind.SAVING, "tiny-base_first_20260304_aaaa", "tiny-base_first_20260304_aaaa_s_1234"),
            (JobKind.SAVING, None, "tiny-base_first_20260304_1234"),
            (JobKind.DEPLOYMENT, "tiny-base_first_20260304_aaaa", "tiny-base_first_20260304_aaaa_d_1234_q8_0"),
        ],
    )
    def test_are_those_of_the_contract(self, kind: JobKind, parent: str | None, name: str) -> None:
        job = job_rows.new_job(id=self.JOB, kind=kind, name="first")
        spec = JobSpec(base_model=BASE, deployment=Deployment(target="custom", quantize="q8_0"))

        assert model_name(job, spec, self.parent(parent) if parent else None, now=NOW) == name
