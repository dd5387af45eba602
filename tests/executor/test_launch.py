"""Arguments that only some methods need, and what the disk says. Every stage's usual ones: `tests/worker`."""

import errno
from pathlib import Path
from typing import Any

import pytest

from app.domain.enums import EndReason, JobKind, TrainingType
from app.domain.kinds import KINDS, STAGES, ArgumentStyle, Stage
from app.domain.rendering import filled_arguments
from app.domain.stage_calls import ConfigFile, StageCall, platform_placeholders
from app.domain.training_types import TYPES
from app.executor.attempts.launch import LaunchError, ending_on_disk_errors
from app.executor.attempts.stage_arguments import (
    Called,
    Folders,
    Inputs,
    ParametersLost,
    call_stage,
    dataset_folder,
    dataset_links,
)
from app.executor.runs.job_spec import Deployment, InferenceRequest, JobSpec, Named, PinnedScript
from tests import job_rows

JOB = "0192f0c1-d2e3-4f5a-8b6c-7d8e9f0a1b2c"
ROOT = Path("/home/scripts")
BASE = Named(id="b", name="base", path="models/base")
SCRIPT = PinnedScript(file="run.py", sha256="0" * 64, size=1)


def arguments(kind: JobKind, *, model: Path | None = None, parameters: Any = None, **spec: Any) -> list[str]:
    """Return the arguments of one stage."""
    return list(called(kind, model=model, parameters=parameters, **spec).arguments)


def called(
    kind: JobKind, *, model: Path | None = None, parameters: Any = None, working: Path = ROOT, **spec: Any
) -> Called:
    """Return what one stage is called with."""
    inputs = Inputs(
        base_model=Path("/home/models/base"),
        dataset=Path("/home/datasets/rows.jsonl"),
        model=model,
        model_name="m" if model else "",
        output=Path("/home/runs/j/1/output"),
    )
    job = job_rows.new_job(id=JOB, kind=kind, environment="trl")
    spec = {"base_model": BASE, "script": SCRIPT, "effective": parameters or {}, **spec}
    return call_stage(job, JobSpec(**spec), inputs, Folders(ROOT, Path("/home/runs/j/1"), working))


class TestEveryStage:
    @pytest.mark.parametrize("training_type", TrainingType)
    @pytest.mark.parametrize("stage", STAGES)
    def test_gets_what_the_contract_names_in_the_style_of_its_row(
        self, stage: Stage, training_type: TrainingType
    ) -> None:
        form = TYPES[training_type].inference_form
        asked = InferenceRequest(prompt="a", history=(), session_id="s", system_prompt="b")
        options: dict[str, Any] = {"deployment": Deployment(target="custom", system="b", parameters={"c": 1})}

        told = arguments(
            stage, model=Path("/home/runs/t/1/output"), training_type=training_type, question=asked, **options
        )

        pairs = KINDS[stage].argument_style is ArgumentStyle.PAIRS or (
            KINDS[stage].is_inference and TYPES[training_type].generates_images
        )
        names = told[::2] if pairs else [word.split("=")[0] for word in told]
        assert set(names) <= {f"--{name}" for name in filled_arguments(stage, form)}
        assert all(("=" in word) != pairs for word in told if word.startswith("--"))

    @pytest.mark.parametrize("training_type", TrainingType)
    @pytest.mark.parametrize("stage", STAGES)
    @pytest.mark.parametrize("model", [None, Path("/home/runs/t/1/output")])
    def test_has_a_value_for_each_placeholder_that_methods_may_use(
        self, stage: Stage, training_type: TrainingType, model: Path | None
    ) -> None:
        producing = stage in (JobKind.TRAINING, JobKind.SAVING)
        names = [*platform_placeholders(stage, training_type, producing=producing), "config"]
        asked = InferenceRequest(prompt="a", history=(), session_id="s")
        call = StageCall(
            arguments=tuple(f"{name}={{{name}}}" for name in names), config=ConfigFile(name="c.yaml", content={})
        )

        told = called(
            stage,
            model=model,
            training_type=training_type,
            call=call,
            question=asked,
            deployment=Deployment(target="custom", url="http://a"),
        )

        given = dict(word.split("=", 1) for word in told.arguments)
        empty = {note.params["part"].split("=")[0] for note in told.notes}
        assert given.keys() | empty == set(names)
        paths = {name: value for name, value in given.items() if "/home" in value}
        assert {"script_root", "run_dir", "config"} <= paths.keys()
        assert all(value.startswith("/") for value in paths.values())


class TestExplicitCall:
    def test_gets_what_the_method_says_and_no_more(self) -> None:
        call = StageCall(arguments=("train", "--model={model_path}", ("--rate", "{param:rate}"), "{parameters}"))

        told = called(JobKind.TRAINING, call=call, parameters={"steps": 3, "rate": 1}, declared=(), declared_only=True)

        assert told.arguments == ["train", "--model=/home/models/base", "--rate", "1", "--steps=3"]
        assert not told.notes

    def test_never_loses_a_parameter(self) -> None:
        with pytest.raises(ParametersLost, match="steps"):
            called(JobKind.TRAINING, call=StageCall(arguments=("{param:rate}",)), parameters={"steps": 3, "rate": 1})

    def test_paths_that_the_platform_made_are_absolute_there_and_relative_in_the_platforms_call(self) -> None:
        made: dict[str, Any] = {
            "named_paths": ("validation_path",),
            "parameters": {"validation_path": "../datasets/v.jsonl"},
        }

        explicit = called(JobKind.TRAINING, call=StageCall(arguments=("{param:validation_path}",)), **made)
        elsewhere = called(JobKind.TRAINING, working=ROOT / "a", **made)

        assert explicit.arguments == ["/home/datasets/v.jsonl"]
        assert "--validation_path=../../datasets/v.jsonl" in elsewhere.arguments
        assert "--model_path=../../models/base" in elsewhere.arguments


class TestFolderOfADataSet:
    """Data sets lie side by side: a script that takes a folder must see the rows of its job alone."""

    CALL = StageCall(arguments=("--data={dataset_dir}",))

    def links(self, dataset: Path, *, call: StageCall = CALL, validation: Path | None = None) -> dict[Path, Path]:
        inputs = Inputs(None, dataset, None, "", Path("/home/runs/j/1/output"), validation)
        return dataset_links(JobSpec(call=call), inputs, Folders(ROOT, Path("/home/runs/j/1"), ROOT))

    def test_is_made_of_its_rows_and_those_for_the_score(self) -> None:
        rows, scored, made = (
            Path("/home/datasets/a.jsonl"),
            Path("/home/datasets/b.jsonl"),
            Path("/home/runs/j/dataset"),
        )

        assert called(JobKind.TRAINING, call=self.CALL).arguments == [f"--data={made}"]
        assert self.links(rows) == {made / "train.jsonl": rows}
        assert self.links(rows, validation=scored) == {made / "train.jsonl": rows, made / "valid.jsonl": scored}
        assert not self.links(rows, call=StageCall(arguments=("{dataset_path}",)))

    def test_has_the_parts_of_a_folder_that_is_split(self, tmp_path: Path) -> None:
        for name in ("train", "dev", "test"):
            (tmp_path / f"{name}.jsonl").touch()

        names = {path.name: target.name for path, target in self.links(tmp_path / "train.jsonl").items()}

        assert names == {"train.jsonl": "train.jsonl", "valid.jsonl": "dev.jsonl", "test.jsonl": "test.jsonl"}

    def test_is_its_own_where_it_has_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        folders = Folders(ROOT, Path("/home/runs/j/1"), ROOT)

        assert dataset_folder(tmp_path / "rows.jsonl", folders) == tmp_path
        assert not self.links(tmp_path / "rows.jsonl")


class TestTraining:
    def test_parameters_come_in_their_order_behind_the_places(self) -> None:
        told = arguments(JobKind.TRAINING, parameters={"b": 1, "a": 2})

        assert told[6:8] == ["--b=1", "--a=2"]

    def test_declared_only_leaves_out_what_the_script_does_not_know(self) -> None:
        told = arguments(JobKind.TRAINING, parameters={"rate": 1}, declared=("rate", "output_dir"), declared_only=True)

        assert told == ["--output_dir=../runs/j/1/output", "--rate=1"]

    @pytest.mark.parametrize(
        ("false_as", "text"), [("False", "--quick=False"), ("false", "--quick=false"), ("", "--quick=")]
    )
    def test_false_is_written_as_the_method_wants_it(self, false_as: str, text: str) -> None:
        assert text in arguments(JobKind.TRAINING, parameters={"quick": False}, false_as=false_as)

    def test_paths_are_relative_to_the_script_root(self) -> None:
        told = arguments(JobKind.TRAINING)

        assert "--model_path=../models/base" in told
        assert "--dataset_path=../datasets/rows.jsonl" in told


class TestSaving:
    def test_producing_script_gets_the_training_arguments_as_well(self) -> None:
        told = arguments(JobKind.SAVING, parameters={"epochs": 3})

        named = dict(zip(told[::2], told[1::2], strict=True))
        assert (named["--save_path"], named["--adapter_path"]) == ("../runs/j/1/output", "")
        assert (named["--epochs"], named["--dataset_path"]) == ("3", "../datasets/rows.jsonl")

    def test_saving_of_a_customized_model_does_not(self) -> None:
        told = arguments(JobKind.SAVING, model=Path("/home/runs/t/1/output"))

        assert "--dataset_path" not in told
        assert told[told.index("--adapter_path") + 1] == "../runs/t/1/output"


class TestPictures:
    @pytest.mark.parametrize(
        ("kind", "paths"),
        [
            (JobKind.INFERENCE_CUSTOMIZED, ["../models/base", "--lora_path", "../runs/t/1/output"]),
            (JobKind.INFERENCE_COMPLETE, ["../runs/t/1/output", "--lora_path", ""]),
        ],
    )
    def test_are_asked_for_with_base_and_adapter_or_the_whole_model(self, kind: JobKind, paths: list[str]) -> None:
        question = InferenceRequest(prompt="a cat", history=(), session_id="s", batch_size=2)

        told = arguments(
            kind,
            model=Path("/home/runs/t/1/output"),
            question=question,
            training_type=TrainingType.IMAGE_GENERATION,
        )

        assert told[:4] == ["--model_path", *paths]
        assert told[4:] == [
            *("--prompt", "a cat", "--negative_prompt", "", "--output", f"../images/{JOB}.png"),
            *("--batch_size", "2", "--aspect_ratio", "1:1"),
        ]


class TestDiskErrors:
    @pytest.mark.parametrize(
        ("number", "reason"),
        [
            (errno.ENOSPC, EndReason.DISK_FULL),
            (errno.EDQUOT, EndReason.DISK_FULL),
            (errno.EACCES, EndReason.SPAWN_FAILED),
            (errno.EROFS, EndReason.SPAWN_FAILED),
        ],
    )
    def test_ends_the_job_with_a_reason(self, number: int, reason: EndReason) -> None:
        with pytest.raises(LaunchError) as caught, ending_on_disk_errors():
            raise OSError(number, "trouble", "/home/runs/j")

        assert caught.value.reason is reason
        assert "/home/runs/j" in caught.value.params["detail"]
