"""What a method may say about how its files are started, and what a job asks for because of it."""

from itertools import product
from typing import Any

import pytest

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind
from app.domain.form import FormField, method_form
from app.domain.launchers import Launcher, LauncherKind
from app.domain.lifecycle import violations
from app.domain.texts import Language
from tests.domain.test_form import holds, required

BODY: dict[str, Any] = {"name": "m", "training_type": "chat", "lifecycle": ["customized", "complete"]}
STAGE = {"file": "x.py", "conda_env": "trl"}


def method(launcher: Any = None, *, stage: str = "training", **more: Any) -> MethodDefinition:
    stages: dict[str, Any] = {"training": STAGE, "saving": STAGE}
    stages[stage] = {**STAGE, "launcher": launcher}
    return MethodDefinition.model_validate({**BODY, "stages": stages, **more})


def found(definition: MethodDefinition) -> list[tuple[str, str]]:
    return [(v.pointer, v.code) for v in violations(definition, deploy_targets=("ollama",))]


class TestRules:
    @pytest.mark.parametrize("stage", ["training", "saving"])
    @pytest.mark.parametrize(
        "launcher",
        [
            None,
            {"kind": "python"},
            {"kind": "torchrun"},
            {"kind": "torchrun", "processes": 1},
            {"kind": "accelerate", "processes": 1024},
            {"kind": "accelerate", "processes": None},
        ],
    )
    def test_accepts(self, launcher: Any, stage: str) -> None:
        assert found(method(launcher, stage=stage)) == []

    @pytest.mark.parametrize(
        ("launcher", "wrong"),
        [
            ({}, [("kind", "missing_launcher")]),
            ({"kind": " "}, [("kind", "missing_launcher")]),
            ({"processes": 2}, [("kind", "missing_launcher")]),
            ({"kind": "mpirun", "processes": 2}, [("kind", "unknown_launcher")]),
            ({"kind": "python", "processes": 2}, [("processes", "processes_of_python")]),
            ({"kind": "torchrun", "processes": 0}, [("processes", "processes_out_of_range")]),
            ({"kind": "torchrun", "processes": 1025}, [("processes", "processes_out_of_range")]),
            (
                {"kind": "deepspeed", "processes": 0},
                [("kind", "unknown_launcher"), ("processes", "processes_out_of_range")],
            ),
            ({"kind": "torchrun", "nodes": 2}, [("nodes", "unknown_field")]),
        ],
    )
    def test_refuses_with_pointer(self, launcher: Any, wrong: list[tuple[str, str]]) -> None:
        assert found(method(launcher)) == [(f"/stages/training/launcher/{leaf}", code) for leaf, code in wrong]

    @pytest.mark.parametrize("stage", ["inference-customized", "inference-complete"])
    def test_refuses_it_for_a_stage_that_answers_by_printing(self, stage: str) -> None:
        definition = method({"kind": "torchrun"}, stage=stage, inference={"customized": True, "complete": True})

        assert (f"/stages/{stage}/launcher", "launcher_not_for_stage") in found(definition)

    def test_a_deployment_does_not_know_it(self) -> None:
        deployment = {"target": "custom", "file": "d.py", "conda_env": "base", "launcher": {"kind": "torchrun"}}

        wrong = found(method(lifecycle=["customized", "complete", "online"], deployment=deployment))

        assert wrong == [("/deployment/launcher", "unknown_field")]

    def test_a_launcher_alone_makes_an_optional_training_incomplete(self) -> None:
        stages = {"training": {"launcher": {"kind": "torchrun"}}, "saving": STAGE}
        definition = MethodDefinition.model_validate({**BODY, "lifecycle": ["complete"], "stages": stages})

        assert [code for _, code in found(definition)] == ["incomplete_training"] * 2

    def test_sentences_say_what_to_do_in_every_language(self) -> None:
        for launcher in ({}, {"kind": "x"}, {"kind": "python", "processes": 1}, {"kind": "torchrun", "processes": -1}):
            (violation,) = violations(method(launcher), deploy_targets=())
            texts = {violation.detail(language) for language in Language}
            assert len(texts) == len(Language)
            assert not any("{" in text for text in texts)


class TestForm:
    def test_agrees_with_the_rules(self) -> None:
        form = method_form(deploy_targets=(), environments=())
        (path,) = [path for path in form.lifecycles if path.lifecycle == BODY["lifecycle"]]
        fields = {field.pointer: field for field in path.fields}
        kinds = [None, *[choice.value for choice in form.launchers]]

        for kind, processes in product(kinds, (None, 1, 8)):
            given = {"kind": kind, "processes": processes}
            members = {name: value for name, value in given.items() if value is not None}
            definition = method(members or None)
            accepted = all(accepts(fields[f"/stages/training/launcher/{name}"], given) for name in given)
            assert accepted is (found(definition) == []), given

    def test_offers_it_for_training_and_saving_only(self) -> None:
        form = method_form(deploy_targets=(), environments=())

        offered = {field.pointer for path in form.lifecycles for field in path.fields if "launcher" in field.pointer}

        stages = ("training", "saving")
        assert offered == {f"/stages/{stage}/launcher/{leaf}" for stage in stages for leaf in ("kind", "processes")}


def accepts(field: FormField, launcher: dict[str, Any]) -> bool:
    """Judge one field of a launcher as a frontend would that knows only the form."""
    members = {name: value for name, value in launcher.items() if value is not None}
    body = {"stages": {"training": {"launcher": members}}}
    if field.pointer.rpartition("/")[2] not in members:
        return not required(field, body)
    return field.allowed_when is None or holds(field.allowed_when, body)


class TestDefinition:
    def test_keeps_it_in_the_canonical_form(self) -> None:
        definition = method({"kind": "torchrun", "processes": 4})

        stages = definition.canonical()["stages"]

        assert stages["training"] == {**STAGE, "launcher": {"kind": "torchrun", "processes": 4}}
        assert stages["saving"] == STAGE

    def test_tells_how_a_stage_is_started(self) -> None:
        definition = method({"kind": "torchrun", "processes": 4})

        assert definition.launcher(JobKind.TRAINING) == Launcher(kind=LauncherKind.TORCHRUN, processes=4)
        assert definition.launcher(JobKind.SAVING) == definition.launcher(JobKind.DEPLOYMENT) == Launcher()


class TestCounts:
    @pytest.mark.parametrize(
        ("kind", "processes", "accelerators", "count"),
        [
            ("python", None, 4, 1),
            ("torchrun", None, 0, 1),
            ("torchrun", None, 4, 4),
            ("torchrun", 2, 0, 2),
            ("torchrun", 2, 2, 2),
            ("accelerate", 2, 4, 4),
            ("accelerate", 4, 1, 1),
        ],
    )
    def test_one_process_for_each_accelerator(
        self, kind: str, processes: int | None, accelerators: int, count: int
    ) -> None:
        assert Launcher(kind=LauncherKind(kind), processes=processes).count(accelerators) == count
