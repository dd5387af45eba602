import asyncio
import json
import os
import shutil
import venv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlmodel import select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.domain.definition import MethodDefinition
from app.domain.demand import Demand
from app.domain.enums import JobKind, JobStatus, ModelState, Platform, TrainingType, VersionSource
from app.domain.environment_reports import EnvironmentState
from app.domain.errors import InvalidRequest
from app.domain.launchers import AnswerServer, Launcher, LauncherKind, Strategy
from app.domain.placement import Mismatch, mismatches
from app.executor.attempts.stage_arguments import Folders, Inputs, call_stage
from app.executor.environments import environment_probe
from app.executor.environments.environment_probe import EnvironmentProbes
from app.executor.environments.environments import EnvironmentSource, FoundEnvironment
from app.executor.environments.local_environments import Look
from app.executor.environments.method_probing import MethodProbing
from app.executor.jobs.code_approval import JobCodeApproval
from app.executor.jobs.requests import JobSubmit
from app.executor.jobs.stage_parameters import StageParameters
from app.executor.jobs.submission import InsufficientDiskSpace, Plan, Submissions, Submitted
from app.executor.jobs.token_lengths import TokenLengths
from app.executor.runs.job_spec import JobSpec
from app.presets.catalogue import sample_base_models, sample_datasets
from app.presets.shared.helpers.deepe_needs import MODULES
from app.registry.base_models.service import BaseModels
from app.registry.datasets.mixes import DatasetMixes
from app.registry.datasets.service import Datasets
from app.registry.methods.wiring import MethodServices, method_services
from app.registry.scripts.versions import VersionStore
from app.store import models, named
from app.store.claims import hosts_of
from app.store.home import Home
from app.store.nodes import get_node, heartbeat
from app.store.session import Database
from app.store.tables import BaseModelRow, DatasetRow, JobRow
from tests import job_rows
from tests.base_model_folders import model
from tests.waiting import until

NOW = datetime(2026, 11, 23, tzinfo=UTC)


class EverythingLicensed:
    def require(self) -> None:
        return None


PARSER = "import argparse\np = argparse.ArgumentParser()\np.add_argument('--model_path')\n"
STRICT = PARSER + "p.add_argument('--rank', type=int)\np.parse_args()\n"
STRICT_BEHIND_A_LIBRARY = PARSER + "import deepspeed\np = deepspeed.add_config_arguments(p)\np.parse_args()\n"
DATACLASS = (
    "from transformers import HfArgumentParser as P, TrainingArguments as A\nP(A).parse_args_into_dataclasses()\n"
)
TOLERANT = PARSER + "p.parse_known_args()\n"
ABBREVIATING = PARSER + "p.add_argument('--seq_length')\np.parse_known_args()\n"
UNREAD = "import sys\nprint(sys.argv)\n"
CONTRACT = [
    f"--{name}"
    for name in (
        *("train_id", "seq", "model_name", "model_path", "dataset_path", "output_dir"),
        *("train_file_name", "train_env"),
    )
]


@dataclass
class Bench:
    """Services on a fresh home with Custom01, its base model and its data set."""

    database: Database
    home: Home
    methods: MethodServices
    submissions: Submissions
    min_free_bytes: int = 0

    async def submit(self, **changes: Any) -> Submitted:
        fields: dict[str, Any] = {
            "method": "Custom01", "base_model": "custom01-base", "dataset": "custom01", "through": "online", **changes,
        }  # fmt: skip
        plan = await self.submissions.plan(JobSubmit.model_validate(fields))
        async with self.database.writing() as session:
            return await self.submissions.write(session, plan)

    async def refusal(self, **changes: Any) -> list[tuple[str, str]]:
        with pytest.raises(InvalidRequest) as refused:
            await self.submit(**changes)
        return [(violation.pointer, violation.code) for violation in refused.value.violations()]

    async def customized_model(self) -> str:
        training = (await self.submit(through="customized")).jobs[0]
        spec = JobSpec.of(training)
        assert spec.base_model is not None
        folder = self.home.run_folder(training.id, 1) / "output"
        folder.mkdir(parents=True)
        new = models.NewModel(
            name="mine",
            state=ModelState.CUSTOMIZED,
            training_type=TrainingType.CHAT,
            path=self.home.relative(folder),
            size_bytes=0,
            base_model_id=spec.base_model.id,
            base_model_name=spec.base_model.name,
            base_model_path=spec.base_model.path,
            job_id=training.id,
            method_id=training.method_id or "",
            method_version=1,
        )
        async with self.database.writing() as session:
            return (await models.create_model(session, new, now=NOW)).id

    async def install(self, preset: str) -> None:
        async with self.database.writing() as session:
            await self.methods.presets.install(session, preset)

    async def register_data(self, name: str, *, path: str | None = None) -> None:
        datasets = Datasets(home=self.home, max_characters=4000, max_bytes=2**30, clock=lambda: NOW)
        prepared = await datasets.prepare(name=name, path=path or f"{name}.jsonl")
        async with self.database.writing() as session:
            await datasets.create(session, prepared)


@pytest.fixture
async def bench(database: Database, tmp_path: Path) -> Bench:
    home = Home(tmp_path / "deepe")
    home.create()
    bench = _bench(database, home, min_free_bytes=0)
    base_model = next(sample for sample in sample_base_models() if sample.folder is not None)
    assert base_model.folder is not None
    shutil.copytree(base_model.folder, home.models / base_model.name)
    sample = next(sample for sample in sample_datasets() if sample.name == "custom01")
    shutil.copy(sample.path, home.datasets / "custom01.jsonl")
    base_models = BaseModels(home=home, clock=lambda: NOW)
    prepared = await base_models.prepare(name=base_model.name, path=base_model.name)
    async with database.writing() as session:
        await base_models.create(session, prepared)
    await bench.install("Custom01")  # to install all presets is most of a test's time
    await bench.register_data("custom01")
    return bench


def _bench(database: Database, home: Home, *, min_free_bytes: int) -> Bench:
    methods = method_services(
        home=home, licence=EverythingLicensed(), clock=lambda: NOW, machine=Platform.CPU, samples=False
    )
    datasets = Datasets(home=home, max_characters=4000, max_bytes=2**30, clock=lambda: NOW)
    submissions = Submissions(
        database=database,
        home=home,
        runs=methods.runs,
        datasets=datasets,
        mixes=DatasetMixes(database=database, home=home, datasets=datasets, max_bytes=2**30),
        base_models=BaseModels(home=home, clock=lambda: NOW),
        parameters=StageParameters(methods.reader),
        lengths=TokenLengths(),
        options=methods.options,
        approval=JobCodeApproval(database, methods.code_reviews),
        min_free_bytes=min_free_bytes,
        clock=lambda: NOW,
    )
    return Bench(database=database, home=home, methods=methods, submissions=submissions)


class TestSubmit:
    async def test_makes_the_whole_chain(self, bench: Bench) -> None:
        submitted = await bench.submit(parameters={"epochs": 3}, name="first try")

        training, saving, deployment = submitted.jobs
        assert [job.kind for job in submitted.jobs] == [JobKind.TRAINING, JobKind.SAVING, JobKind.DEPLOYMENT]
        assert [job.blocked_by for job in submitted.jobs] == [None, training.id, saving.id]
        assert {job.status for job in submitted.jobs} == {JobStatus.QUEUED}
        assert {job.chain_id for job in submitted.jobs} == {training.id}
        assert (training.parameters, saving.parameters, deployment.parameters) == ({"epochs": 3}, {}, {})
        assert training.name == "first try"

    async def test_says_what_an_earlier_training_needed_of_memory(self, bench: Bench) -> None:
        nothing = await bench.submit(through="customized")
        await job_rows.add_node(bench.database, environments=["base"], heartbeat_at=NOW)
        memory = {"peak_mib": 700.0, "expected_mib": None, "device": "cpu"}
        async with bench.database.writing() as session:
            job = await session.get_one(JobRow, nothing.jobs[0].id)
            job.memory = memory
            session.add(job)

        submitted = await bench.submit(through="customized")

        assert nothing.memory is None
        assert submitted.memory is not None
        found = submitted.memory
        assert (found.basis, found.from_job, found.expected_mib) == ("measured", nothing.jobs[0].id, 700)

    async def test_chain_ends_at_the_wanted_state(self, bench: Bench) -> None:
        submitted = await bench.submit(through="complete")

        assert [job.kind for job in submitted.jobs] == [JobKind.TRAINING, JobKind.SAVING]

    async def test_pins_the_bytes_of_each_stage(self, bench: Bench) -> None:
        submitted = await bench.submit()

        files = [JobSpec.of(job).script for job in submitted.jobs]
        assert [pinned.file for pinned in files if pinned] == [
            "custom01.py", "save_custom01.py", "custom01_deploy_example.py",
        ]  # fmt: skip

    async def test_file_edited_on_disk_becomes_the_version_that_runs(self, bench: Bench) -> None:
        script = bench.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# mine\n")

        submitted = await bench.submit()

        assert submitted.jobs[0].method_version == 2
        async with bench.database.reading() as session:
            version = await bench.methods.registry.version(session, "Custom01", 2)
        assert version.source is VersionSource.DISK

    async def test_method_of_several_processes_asks_for_as_many_accelerators(self, bench: Bench) -> None:
        group = {"kind": "torchrun", "processes": 2}
        definition = MethodDefinition.model_validate(
            {
                "name": "group",
                "training_type": "chat",
                "lifecycle": ["customized", "complete"],
                "stages": {
                    "training": {"file": "custom01.py", "conda_env": "base", "launcher": group},
                    "saving": {"file": "save_custom01.py", "conda_env": "base", "launcher": {"kind": "accelerate"}},
                },
            }
        )
        async with bench.database.writing() as session:
            await bench.methods.registry.add(session, definition, source=VersionSource.CREATE)

        training, saving = (await bench.submit(method="group", through="complete")).jobs

        assert (training.resources, saving.resources) == ({}, {})
        assert Demand.parse(training.demand).processes == 2
        assert Demand.parse(saving.demand).processes is None
        assert JobSpec.of(training).launcher == Launcher(kind=LauncherKind.TORCHRUN, processes=2)
        assert JobSpec.of(saving).launcher == Launcher(kind=LauncherKind.ACCELERATE)

    @pytest.mark.parametrize(
        ("source", "parameters", "warned", "passed"),
        [
            (STRICT, {"rank": 4}, ["arguments_undeclared"], ["--model_path", "--rank"]),
            (STRICT_BEHIND_A_LIBRARY, {"stage": 2}, ["arguments_undeclared"], ["--model_path", "--stage"]),
            (DATACLASS, {"learning_rate": 0.1}, ["arguments_undeclared"], ["--learning_rate"]),
            (TOLERANT, {"mine": 3}, ["parameter_undeclared"], [*CONTRACT, "--mine"]),
            (ABBREVIATING, {}, ["argument_withheld"], [name for name in CONTRACT if name != "--seq"]),
            (UNREAD, {}, [], CONTRACT),
        ],
    )
    async def test_a_script_gets_what_its_parser_takes(
        self, bench: Bench, source: str, parameters: dict[str, Any], warned: list[str], passed: list[str]
    ) -> None:
        (bench.home.scripts / "own.py").write_text(source)
        stages = {"training": {"file": "own.py", "conda_env": "base"}}
        definition = MethodDefinition.model_validate(
            {"name": "own", "training_type": "chat", "lifecycle": ["customized"], "stages": stages}
        )
        async with bench.database.writing() as session:
            await bench.methods.registry.add(session, definition, source=VersionSource.CREATE)

        submitted = await bench.submit(method="own", through="customized", parameters=parameters)

        job = submitted.jobs[0]
        inputs = Inputs(bench.home.models, bench.home.datasets, None, "", bench.home.root)
        argv = call_stage(
            job, JobSpec.of(job), inputs, Folders(bench.home.scripts, bench.home.runs, bench.home.scripts)
        ).arguments
        assert sorted(word.partition("=")[0] for word in argv) == sorted(passed)
        assert [warning.code for warning in submitted.warnings] == warned

    async def test_takes_up_a_data_set_that_changed_on_disk(self, bench: Bench) -> None:
        before = (await bench.submit()).jobs[0]
        file = bench.home.datasets / "custom01.jsonl"
        file.write_text(file.read_text() + '{"question": "New?", "answer": "Yes."}\n')

        after = (await bench.submit()).jobs[0]

        digests = [data.digest for data in (JobSpec.of(before).dataset, JobSpec.of(after).dataset) if data]
        assert digests[0] != digests[1]
        async with bench.database.reading() as session:
            assert (await session.exec(select(DatasetRow.digest))).one() == digests[1]

    async def test_unusual_value_warns(self, bench: Bench) -> None:
        submitted = await bench.submit(parameters={"batch_size": 1000})

        assert ("/parameters/batch_size", "parameter_unusual") in [(w.pointer, w.code) for w in submitted.warnings]


class TestPictures:
    DECLARED = 'parser.add_argument("--pic_relative_path", default=None)'

    async def test_script_that_declares_their_folder_gets_it(self, bench: Bench) -> None:
        folder = bench.home.datasets / "drawn"
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "a.png").write_bytes(b"x")
        row = {"question": "q", "answer": "a", "images": [{"imageId": "a.png"}]}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        await bench.register_data("drawn", path="drawn")
        script = bench.home.scripts / "custom01.py"
        head, found, tail = script.read_text().partition('    parser.add_argument("--train_id')
        script.write_text(f"{head}    {self.DECLARED}\n{found}{tail}")

        filled = (await bench.submit(dataset="drawn", through="customized")).jobs[0]
        given = (
            await bench.submit(dataset="drawn", through="customized", parameters={"pic_relative_path": "mine"})
        ).jobs[0]

        assert JobSpec.of(filled).effective["pic_relative_path"] == "../datasets/drawn/images"
        assert "pic_relative_path" not in filled.parameters
        assert JobSpec.of(given).effective["pic_relative_path"] == "mine"


class TestSplits:
    async def test_validation_part_of_a_folder_is_scored_with(self, bench: Bench) -> None:
        folder = bench.home.datasets / "split"
        folder.mkdir()
        for name in ("train", "valid", "test"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "a"}) + "\n")
        await bench.register_data("split", path="split")
        script = bench.home.scripts / "custom01.py"
        declared = 'parser.add_argument("--validation_path", default=None)'
        head, found, tail = script.read_text().partition('    parser.add_argument("--train_id')
        script.write_text(f"{head}    {declared}\n{found}{tail}")

        scored = (await bench.submit(dataset="split", through="customized")).jobs[0]
        own = {"validation_path": "mine.jsonl"}
        given = (await bench.submit(dataset="split", through="customized", parameters=own)).jobs[0]

        spec = JobSpec.of(scored)
        assert spec.dataset is not None
        assert spec.dataset.path == "datasets/split/train.jsonl"
        assert spec.effective["validation_path"] == "../datasets/split/valid.jsonl"
        assert JobSpec.of(given).effective["validation_path"] == "mine.jsonl"


class TestSingleStage:
    async def test_works_on_a_model_of_the_state_that_comes_before(self, bench: Bench) -> None:
        model = await bench.customized_model()

        submitted = await bench.submit(through=None, stage="saving", model=model, base_model=None, dataset=None)

        (job,) = submitted.jobs
        assert (job.kind, job.model_id, job.blocked_by) == (JobKind.SAVING, model, None)
        assert JobSpec.of(job).base_model is not None

    async def test_refuses_a_model_in_another_state(self, bench: Bench) -> None:
        model = await bench.customized_model()

        found = await bench.refusal(through=None, stage="deployment", model=model)

        assert ("/model", "model_in_other_state") in found


class TestRefusals:
    async def test_names_everything_at_once_and_writes_nothing(self, bench: Bench) -> None:
        found = await bench.refusal(
            base_model="nobody", dataset="nothing", parameters={"epochs": "many"}, through="online"
        )

        assert set(found) >= {
            ("/base_model", "unknown_base_model"),
            ("/dataset", "unknown_dataset"),
            ("/parameters/epochs", "parameter_wrong_type"),
        }
        async with bench.database.reading() as session:
            assert (await session.exec(select(JobRow))).all() == []

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"method": "Nobody"}, ("/method", "unknown_method")),
            ({"base_model": None}, ("/base_model", "base_model_needed")),
            ({"method": "SFT-Demo", "through": "customized"}, ("/base_model", "base_model_is_description")),
            ({"dataset": None}, ("/dataset", "dataset_needed")),
            ({"through": None}, ("/through", "through_or_stage")),
            ({"stage": "training"}, ("/through", "through_or_stage")),
            ({"through": "offline"}, ("/through", "state_not_on_path")),
            ({"through": None, "stage": "cooking"}, ("/stage", "stage_not_runnable")),
            ({"through": None, "stage": "saving"}, ("/model", "model_needed")),
            ({"through": None, "stage": "saving", "model": "none"}, ("/model", "unknown_model")),
            ({"model": "some"}, ("/model", "model_without_stage")),
            ({"parameters": {"no_such": 1}}, ("/parameters/no_such", "unknown_parameter")),
            ({"parameters": {"train_id": "x"}}, ("/parameters/train_id", "parameter_reserved")),
            ({"parameters": {"input_train_name": "frage"}}, ("/dataset", "columns_missing")),
        ],
    )
    async def test_refuses(self, bench: Bench, changes: dict[str, Any], expected: tuple[str, str]) -> None:
        if expected[1] == "columns_missing":
            (bench.home.datasets / "other.jsonl").write_text('{"text": "a"}\n')
            await bench.register_data("other")
            changes = {"dataset": "other"}
        if changes.get("method") == "SFT-Demo":
            await bench.install("SFT-Demo")

        assert expected in await bench.refusal(**changes)

    async def test_refuses_a_column_that_the_data_set_lacks(self, bench: Bench) -> None:
        parameters = {"input_train_name": "frage", "output_train_name": "answer"}

        found = await bench.refusal(parameters=parameters)

        assert found == [("/parameters/input_train_name", "column_missing")]

    async def test_refuses_a_column_that_some_rows_lack_where_nothing_is_known_of_the_script(
        self, bench: Bench
    ) -> None:
        script = bench.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n")
        rows = [{"question": "a", "answer": "b", "note": 1}, {"question": "a", "answer": None}, {"question": "a"}]
        (bench.home.datasets / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        await bench.register_data("gaps")
        parameters = {"input_train_name": "question", "output_train_name": "note"}

        with pytest.raises(InvalidRequest) as refused:
            await bench.submit(dataset="gaps", parameters=parameters)

        (violation,) = refused.value.violations()
        assert (violation.pointer, violation.code) == ("/parameters/output_train_name", "column_incomplete")
        assert violation.params == {"column": "note", "line": 2, "rows": 1}

    async def test_rows_without_an_answer_are_left_out_and_counted(self, bench: Bench) -> None:
        rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}, {"question": "a"}]
        (bench.home.datasets / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        await bench.register_data("gaps")

        submitted = await bench.submit(dataset="gaps")

        (warning,) = submitted.warnings
        assert (warning.pointer, warning.code) == ("/dataset", "no_answer")
        assert (warning.params["rows"], warning.params["total"], warning.params["lines"]) == (2, 3, "2, 3")

    async def test_a_job_reads_what_was_made_of_a_table_also_after_an_edit(self, bench: Bench) -> None:
        table = bench.home.datasets / "table.csv"
        table.write_text("question;answer\na;b\n")
        await bench.register_data("table", path="table.csv")

        before = JobSpec.of((await bench.submit(dataset="table")).jobs[0]).dataset
        table.write_text("question;answer\nc;d\n")
        after = JobSpec.of((await bench.submit(dataset="table")).jobs[0]).dataset

        assert before is not None
        assert after is not None
        rows = [json.loads(bench.home.absolute(data.path).read_bytes()) for data in (before, after)]
        assert rows == [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
        assert [Path(data.path).suffix for data in (before, after)] == [".jsonl", ".jsonl"]
        assert before.digest != after.digest

    async def test_takes_rows_that_lack_what_no_stage_needs(self, bench: Bench) -> None:
        rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "note": 1}]
        (bench.home.datasets / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        await bench.register_data("notes")

        assert (await bench.submit(dataset="notes")).jobs

    @pytest.mark.parametrize(
        ("row", "code"),
        [
            ('{"question": "a", "answer": "b", "image": "c.png"}', None),
            ('{"question": "a", "answer": "b"}', "dataset_without_pictures"),
            ('{"images": [], "text": "a"}', "row_form_not_learned"),
        ],
        ids=["both", "no pictures", "no words"],
    )
    async def test_a_method_for_pictures_wants_both(self, bench: Bench, row: str, code: str | None) -> None:
        async with bench.database.writing() as session:
            await bench.methods.presets.install(session, "VL-Demo")
        (bench.home.datasets / "drawn.jsonl").write_text(row + "\n")
        await bench.register_data("drawn")
        submission = {"method": "VL-Demo", "dataset": "drawn", "through": "customized"}

        found = await bench.refusal(**submission)

        assert [one for one in found if one[0] != "/base_model"] == ([("/dataset", code)] if code else [])

    async def test_refuses_when_the_files_of_the_base_model_are_gone(self, bench: Bench) -> None:
        shutil.rmtree(bench.home.models / "custom01-base")

        assert ("/base_model", "files_missing") in await bench.refusal()

    async def test_refuses_when_the_disk_is_nearly_full(self, bench: Bench) -> None:
        full = _bench(bench.database, bench.home, min_free_bytes=2**60)

        with pytest.raises(InsufficientDiskSpace):
            await full.submit()

    async def test_broken_python_on_disk_is_refused_with_its_line(self, bench: Bench) -> None:
        (bench.home.scripts / "custom01.py").write_text("import os\ndef broken(:\n")

        with pytest.raises(InvalidRequest) as refused:
            await bench.submit()

        (violation,) = refused.value.violations()
        assert (violation.code, violation.params["line"]) == ("invalid_python", 2)


class TestNodes:
    """What no node can run is refused; whether any lives does not matter."""

    async def node(self, bench: Bench, name: str, *states: dict[str, object]) -> str:
        node = await job_rows.add_node(bench.database, name, environments=["base"])
        async with bench.database.writing() as session:
            await heartbeat(session, node, now=NOW, environment_states=states)
        return node

    async def refused(self, bench: Bench, **values: Any) -> list[tuple[str, str]]:
        with pytest.raises(InvalidRequest) as error:
            await bench.submit(**values)
        return [(violation.pointer, violation.code) for violation in error.value.violations()]

    async def test_nothing_is_judged_by_nodes_that_say_nothing(self, bench: Bench) -> None:
        await job_rows.add_node(bench.database, "older", environments=[])

        assert (await bench.submit()).jobs

    async def test_missing_modules_on_every_node_that_has_the_environment(self, bench: Bench) -> None:
        script = bench.home.scripts / "custom01.py"
        script.write_text("import nowhere_to_be_found\n" + script.read_text())
        probe = {"modules": ["nowhere_to_be_found"], "missing": ["nowhere_to_be_found"]}
        await self.node(bench, "one", {"name": "base", "state": "ready", "probe": probe})

        found = await self.refused(bench)
        waiting = await bench.submit(wait=True)
        await self.node(bench, "two", {"name": "base", "state": "known"})
        built = await bench.submit()

        assert found == [("/method", "stage_runs_nowhere"), ("/method", "cell_modules_missing")]
        assert JobSpec.of(waiting.jobs[0]).wait
        assert not JobSpec.of(built.jobs[0]).wait

    @pytest.mark.parametrize(
        ("added", "there", "refused"),
        [
            ("os.path.dirname(os.path.abspath(__file__))", "", True),
            ("'parts'", "", True),
            ("'parts'", "parts/nowhere_to_be_found.py", False),
            ("os.environ['PARTS']", "", False),
        ],
    )
    async def test_missing_modules_of_scripts_that_look_elsewhere(
        self, bench: Bench, added: str, there: str, refused: bool
    ) -> None:
        script = bench.home.scripts / "custom01.py"
        if there:
            (script.parent / there).parent.mkdir()
            (script.parent / there).touch()
        look = f"import os, sys\nsys.path.append({added})\nimport nowhere_to_be_found\n"
        script.write_text(look + script.read_text())
        probe = {"modules": ["nowhere_to_be_found"], "missing": ["nowhere_to_be_found"]}
        await self.node(bench, "one", {"name": "base", "state": "ready", "probe": probe})

        if refused:
            assert ("/method", "cell_modules_missing") in await self.refused(bench)
        else:
            assert (await bench.submit()).jobs

    async def test_an_environment_that_nobody_can_build(self, bench: Bench) -> None:
        trouble = {"code": "environment_needs_conda", "params": {"packages": "ffmpeg"}}
        await self.node(bench, "one", {"name": "base", "state": "missing", "trouble": trouble})
        found = await self.refused(bench, through="customized")

        async with bench.database.writing() as session:
            await declare_dead(session, "one")
        accepted = await bench.submit(through="customized")

        assert found == [("/method", "stage_runs_nowhere"), ("/method", "environment_needs_conda")]
        assert accepted.jobs

    async def test_a_build_counts_that_the_node_has_not_reported_yet(self, bench: Bench) -> None:
        node = await self.node(bench, "one", {"name": "base", "state": "missing"})
        refused = await self.refused(bench)
        build = {"kind": JobKind.ENVIRONMENT, "environment": "base", "status": JobStatus.RUNNING, "node_id": node}
        await job_rows.add_job(bench.database, **build)

        assert refused[0] == ("/method", "stage_runs_nowhere")
        assert (await bench.submit()).jobs

    @pytest.mark.parametrize("state", ["known", "building", "stale", "failed", "ready"])
    async def test_what_is_or_will_be_there_is_no_obstacle(self, bench: Bench, state: str) -> None:
        await self.node(bench, "one", {"name": "base", "state": state})

        assert (await bench.submit()).jobs


class TestNeedsOfValues:
    """What a value needs is judged by what nodes found in the environment."""

    @pytest.fixture
    async def sft(self, bench: Bench) -> Callable[..., Any]:
        await TestBaseModel().registered(bench)
        await bench.install("SFT-Demo")

        async def submit(parameters: dict[str, Any], **more: Any) -> Submitted:
            asked = {"method": "SFT-Demo", "base_model": "tiny", "through": "customized", "parameters": parameters}
            return await bench.submit(**asked, **more)

        return submit

    async def node(
        self, bench: Bench, name: str, missing: list[str] | None = None, *, gpus: int = 0, state: str = "ready"
    ) -> None:
        cards = [Accelerator(f"{name}-{at}", at, AcceleratorKind.CUDA, "H200", 141_000) for at in range(gpus)]
        node = await job_rows.add_node(bench.database, name, environments=["trl"], accelerators=cards)
        probe = {} if missing is None else {"probe": {"modules": sorted(MODULES), "missing": missing}}
        async with bench.database.writing() as session:
            states: list[dict[str, Any]] = [
                {"name": "trl", "state": state, **probe},
                {"name": "base", "state": "ready"},
            ]
            await heartbeat(session, node, now=NOW, environment_states=states)

    @pytest.mark.parametrize(
        ("parameters", "package"),
        [
            ({"load_in_4bit": True}, "bitsandbytes"),
            ({"optimizer": "paged_adamw_8bit"}, "bitsandbytes"),
            ({"optim": "lion_32bit"}, "bitsandbytes"),
            ({"optim": "adamw_torch_8bit"}, "torchao"),
            ({"use_liger_kernel": True}, "liger-kernel"),
        ],
    )
    async def test_package_that_every_node_lacks_is_refused_at_the_parameter(
        self, bench: Bench, sft: Callable[..., Any], parameters: dict[str, Any], package: str
    ) -> None:
        await self.node(bench, "one", ["bitsandbytes", "torchao", "liger_kernel"])
        ((name, _),) = parameters.items()

        with pytest.raises(InvalidRequest) as refused:
            await sft(parameters)
        waiting = (await sft(parameters, wait=True)).jobs[0]

        (found,) = refused.value.violations()
        assert (found.pointer, found.code) == (f"/parameters/{name}", "parameter_needs_package")
        assert (found.params["package"], found.params["environment"]) == (package, "trl")
        assert Demand.parse(waiting.demand).modules

    async def test_values_that_need_nothing_are_taken(self, bench: Bench, sft: Callable[..., Any]) -> None:
        await self.node(bench, "one", sorted(MODULES))

        job = (await sft({"load_in_4bit": False, "optimizer": "adafactor", "attention": "auto"})).jobs[0]

        assert (Demand.parse(job.demand).modules, Demand.parse(job.demand).cuda) == ((), False)

    async def test_one_node_that_has_it_is_enough_and_gets_the_job(self, bench: Bench, sft: Callable[..., Any]) -> None:
        await self.node(bench, "lacks", ["bitsandbytes"])
        await self.node(bench, "has", [])

        submitted = await sft({"load_in_4bit": True})

        assert [one.code for one in submitted.warnings if "package" in one.code] == []
        async with bench.database.reading() as session:
            nodes = [await get_node(session, name) for name in ("lacks", "has")]
            hosts = await hosts_of(session, nodes)
        demand = Demand.parse(submitted.jobs[0].demand)
        assert [list(mismatches(demand, host)) for host in hosts] == [[Mismatch.MODULES], []]

    @pytest.mark.parametrize("state", ["ready", "known", "stale"])
    async def test_what_no_node_has_looked_for_is_a_warning(
        self, bench: Bench, sft: Callable[..., Any], state: str
    ) -> None:
        await self.node(bench, "one", ["bitsandbytes"] if state == "stale" else None, state=state)

        warnings = (await sft({"load_in_4bit": True})).warnings

        assert ("/parameters/load_in_4bit", "parameter_package_unknown") in [(w.pointer, w.code) for w in warnings]

    async def test_a_node_looks_for_all_of_it(
        self, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await bench.install("SFT-Demo")
        monkeypatch.setattr(environment_probe, "TURN_SECONDS", 0.0)
        prefix = tmp_path / "trl"
        venv.create(prefix, symlinks=True)
        (packages,) = prefix.glob("lib/python3*/site-packages")
        text = "from options import Args\nfrom transformers import HfArgumentParser\nHfArgumentParser((Args,))"
        (packages / "tool.py").write_text(f"{text}.parse_args_into_dataclasses()\n")
        module = {"module": "tool", "conda_env": "trl", "arguments": ["{parameters}"]}
        definition = MethodDefinition.model_validate(
            {"name": "tool", "training_type": "chat", "lifecycle": ["customized"], "stages": {"training": module}}
        )
        async with bench.database.writing() as session:
            await bench.methods.registry.add(session, definition, source=VersionSource.CREATE)
        probes = EnvironmentProbes(tmp_path / "envs", {"PATH": os.defpath})
        probing = MethodProbing(
            database=bench.database, modules=bench.methods.runs.modules, reader=bench.methods.reader, probes=probes
        )
        found = FoundEnvironment("trl", prefix, EnvironmentState.READY, EnvironmentSource.VENV)

        await probing.turn(Look({"trl": found}, ()))
        await until(lambda: probes.of(prefix), "the look into the environment")

        probe = probes.of(prefix)
        assert probe is not None
        assert set(probe.missing) >= MODULES
        assert "options.Args" in probe.options_trouble  # nobody has installed it

    async def test_nvidia_gpu(self, bench: Bench, sft: Callable[..., Any]) -> None:
        asked = {"attention": "flash_attention_2"}
        await self.node(bench, "cpu", [])
        with pytest.raises(InvalidRequest) as without:
            await sft(asked)
        await self.node(bench, "gpu", [], gpus=2)
        with pytest.raises(InvalidRequest) as unasked:
            await sft(asked, resources={"accelerators": 0})
        job = (await sft(asked)).jobs[0]

        for refused in (without, unasked):
            found = [(one.pointer, one.code) for one in refused.value.violations()]
            assert found == [("/parameters/attention", "parameter_needs_gpu")]
        async with bench.database.reading() as session:
            hosts = await hosts_of(session, [await get_node(session, name) for name in ("cpu", "gpu")])
        demand = Demand.parse(job.demand)
        assert [list(mismatches(demand, host)) for host in hosts] == [[Mismatch.ACCELERATORS], []]


class TestFilesThatParametersName:
    """What a training runs beside its script, such as rewards: its bytes are those of the submission."""

    async def test_is_pinned_where_it_lies_in_the_script_root(self, bench: Bench) -> None:
        await TestBaseModel().registered(bench)
        await bench.install("GRPO-Demo")
        file = bench.home.scripts / "mine" / "tools.py"
        file.parent.mkdir()
        asked = {"method": "GRPO-Demo", "base_model": "tiny", "through": "customized"}

        found = []
        for content in ("a = 1", "a = 2"):
            file.write_text(content)
            parameters = {"tools_file": "mine/tools.py", "reward_file": "../elsewhere.py"}
            job = (await bench.submit(**asked, parameters=parameters)).jobs[0]
            assert job.parameters["tools_file"] == "mine/tools.py"
            found.append(JobSpec.of(job).files)

        assert [list(files) for files in found] == [["tools_file"]] * 2
        stored = [VersionStore(bench.home.versions).get(files["tools_file"].sha256) for files in found]
        assert stored == [b"a = 1", b"a = 2"]


class TestDistributedStrategy:
    """What the processes of a training share is a parameter, and decides how they are started."""

    @pytest.mark.parametrize(
        ("strategy", "accelerators", "started"),
        [
            (None, None, None),
            (None, 1, None),
            (None, 2, Strategy.DDP),
            ("auto", 4, Strategy.DDP),
            ("ddp", 1, None),
            ("ddp", 2, Strategy.DDP),
            ("fsdp2", 2, Strategy.FSDP2),
            ("zero3", 8, Strategy.ZERO3),
        ],
    )
    async def test_decides_how_the_training_is_started(
        self, bench: Bench, strategy: str | None, accelerators: int | None, started: Strategy | None
    ) -> None:
        await TestBaseModel().registered(bench)
        await bench.install("SFT-Demo")
        parameters = {} if strategy is None else {"distributed_strategy": strategy}

        jobs = (
            await bench.submit(
                method="SFT-Demo",
                base_model="tiny",
                through="complete",
                parameters=parameters,
                resources={} if accelerators is None else {"accelerators": accelerators},
            )
        ).jobs

        assert [JobSpec.of(job).strategy for job in jobs] == [started, None]

    async def test_dividing_takes_two(self, bench: Bench) -> None:
        await TestBaseModel().registered(bench)
        await bench.install("SFT-Demo")
        asked = {"method": "SFT-Demo", "base_model": "tiny", "through": "customized"}

        for resources in ({}, {"accelerators": 1}):
            refused = await bench.refusal(**asked, parameters={"distributed_strategy": "fsdp2"}, resources=resources)
            assert refused == [("/resources/accelerators", "strategy_needs_accelerators")]
        unknown = await bench.refusal(**asked, parameters={"distributed_strategy": "fsdp"})
        assert [pointer for pointer, _ in unknown] == ["/parameters/distributed_strategy"]

    async def test_accelerators_of_an_answer_server_are_not_the_trainings(self, bench: Bench) -> None:
        await TestBaseModel().registered(bench)
        await bench.install("GRPO-Demo")
        asked = {"method": "GRPO-Demo", "base_model": "tiny", "through": "customized"}
        own = {"environment": "vllm", "accelerators": 1}
        cases = [
            ({"vllm": "server"}, 2, own, None),
            ({"vllm": "server"}, 3, own, Strategy.DDP),
            ({"vllm": "server", "vllm_environment": "base"}, None, own | {"environment": "base"}, None),
            ({"vllm": "server", "vllm_server_base_url": "http://there"}, 2, None, Strategy.DDP),
            ({"vllm": "auto"}, 2, None, Strategy.DDP),
        ]

        for parameters, accelerators, server, strategy in cases:
            resources = {} if accelerators is None else {"accelerators": accelerators}
            spec = JobSpec.of((await bench.submit(**asked, parameters=parameters, resources=resources)).jobs[0])
            assert spec.server == (None if server is None else AnswerServer.model_validate(server)), parameters
            assert spec.strategy == strategy, parameters
        refused = await bench.refusal(**asked, parameters={"vllm": "server", "vllm_environment": "nowhere"})
        assert refused == [("/parameters/vllm_environment", "server_environment_not_known")]

    async def test_a_script_without_the_parameter_is_started_as_its_method_says(self, bench: Bench) -> None:
        job = (await bench.submit(through="customized", resources={"accelerators": 2})).jobs[0]

        assert JobSpec.of(job).strategy is None


async def declare_dead(session: AsyncSession, name: str) -> None:
    (await get_node(session, name)).dead_at = NOW


class TestBaseModel:
    """The folder of a base model is looked at again by a submit."""

    async def registered(self, bench: Bench, name: str = "tiny") -> Path:
        folder = model(bench.home.models / name)
        base_models = BaseModels(home=bench.home, clock=lambda: NOW)
        prepared = await base_models.prepare(name=name, path=name)
        async with bench.database.writing() as session:
            await base_models.create(session, prepared)
        return folder

    async def test_a_whole_model_is_taken_without_a_word(self, bench: Bench) -> None:
        await self.registered(bench)

        assert (await bench.submit(base_model="tiny")).warnings == []

    @pytest.mark.parametrize(
        ("damage", "code"),
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "weights_missing"),
            (lambda folder: (folder / "adapter_config.json").write_text("{}"), "base_model_with_adapter"),
            (lambda folder: (folder / "config.json").write_text("{"), "base_model_unreadable"),
            (lambda folder: (folder / "tokenizer.json").unlink(), "base_model_without_tokenizer"),
        ],
        ids=["weights", "adapter", "config", "tokenizer"],
    )
    async def test_what_became_of_it_since_refuses(
        self, bench: Bench, damage: Callable[[Path], object], code: str
    ) -> None:
        folder = await self.registered(bench)
        await bench.submit(base_model="tiny")

        damage(folder)

        assert await bench.refusal(base_model="tiny") == [("/base_model", code)]

    async def test_what_is_worth_knowing_is_a_warning_and_the_card_is_read_anew(self, bench: Bench) -> None:
        folder = await self.registered(bench)
        (folder / "generation_config.json").write_text('{"eos_token_id": 0}')

        warnings = (await bench.submit(base_model="tiny")).warnings

        assert [(one.pointer, one.code) for one in warnings] == [("/base_model", "base_model_turn_does_not_stop")]
        async with bench.database.reading() as session:
            row = await named.find(session, BaseModelRow, "tiny")
        assert row is not None
        assert row.card["stop_tokens"] == ["<|endoftext|>"]


class TestPlan:
    """A plan is made outside of the transaction; what changed before it is written is noticed."""

    REQUEST = JobSubmit(method="Custom01", base_model="custom01-base", dataset="custom01", through="complete")

    async def write(self, bench: Bench, plan: Plan) -> Submitted:
        async with bench.database.writing() as session:
            return await bench.submissions.write(session, plan)

    async def test_error_is_kept_until_it_is_written(self, bench: Bench) -> None:
        plan = await bench.submissions.plan(self.REQUEST.model_copy(update={"dataset": "nothing"}))

        with pytest.raises(InvalidRequest) as refused:
            await self.write(bench, plan)

        assert [violation.code for violation in refused.value.violations()] == ["unknown_dataset"]

    async def test_method_that_was_changed_meanwhile_runs_as_it_is_now(self, bench: Bench) -> None:
        plan = await bench.submissions.plan(self.REQUEST)
        script = bench.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# edited\n")
        between = (await bench.submit()).jobs[0]

        after = (await self.write(bench, plan)).jobs[0]

        assert between.method_version == after.method_version == 2
        assert JobSpec.of(after).script == JobSpec.of(between).script

    async def test_input_that_was_deleted_meanwhile_is_refused(self, bench: Bench) -> None:
        plan = await bench.submissions.plan(self.REQUEST)
        async with bench.database.writing() as session:
            await session.exec(sa.delete(BaseModelRow))

        with pytest.raises(InvalidRequest) as refused:
            await self.write(bench, plan)

        assert [violation.code for violation in refused.value.violations()] == ["unknown_base_model"]

    async def test_edit_of_a_file_is_a_version_only_if_the_plan_is_written(self, bench: Bench) -> None:
        script = bench.home.scripts / "custom01.py"
        script.write_text(script.read_text() + "\n# edited\n")

        await bench.submissions.plan(self.REQUEST)
        (first,) = {job.method_version for job in (await bench.submit(through="customized")).jobs}

        assert first == 2

    async def test_model_that_was_deleted_meanwhile_is_refused(self, bench: Bench) -> None:
        model = await bench.customized_model()
        plan = await bench.submissions.plan(JobSubmit(method="Custom01", stage="saving", model=model))
        assert plan.error is None
        async with bench.database.writing() as session:
            await models.mark_deleted(session, model, now=NOW)

        with pytest.raises(InvalidRequest) as refused:
            await self.write(bench, plan)

        assert [violation.code for violation in refused.value.violations()] == ["unknown_model"]

    @pytest.mark.parametrize("reporting", [False, True], ids=["no node", "a node reports"])
    async def test_takes_a_handful_of_statements_and_is_written_without_reading_files(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, *, reporting: bool
    ) -> None:
        if reporting:
            await TestNodes().node(bench, "one", {"name": "base", "state": "ready"})
        statements: list[str] = []
        listener = lambda _c, _k, statement, *_: statements.append(statement)  # noqa: E731
        engine = bench.database.engine.sync_engine
        sa.event.listen(engine, "before_cursor_execute", listener)

        plan = await bench.submissions.plan(self.REQUEST)
        planned = len(statements)
        monkeypatch.setattr(asyncio, "to_thread", None)  # what reads files does it in a thread
        await self.write(bench, plan)

        sa.event.remove(engine, "before_cursor_execute", listener)
        nodes = 2 if reporting else 0  # they, and what trainings needed on such ones
        read = 3 + nodes  # the rows that it rests on in one, allow-lists, whether code needs an approval
        assert (planned, len(statements) - planned) == (read, 4), statements
