"""The rules against a second, independent writing of them: the table of the documentation, read row by row."""

from itertools import product
from typing import Any

import pytest

from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind, ModelState
from app.domain.errors import Violation
from app.domain.kinds import Stage
from app.domain.lifecycle import (
    PATHS,
    STATE_OF_STAGE,
    StateNotOnPath,
    chain,
    producing_stage,
    runnable_stages,
    source_state,
    states,
    violations,
)

TARGETS = ("ollama", "local")

ABSENT = None
EMPTY: dict[str, str] = {}
FILE_ONLY = {"file": "x.py"}
ENV_ONLY = {"conda_env": "trl", "file": ""}
FULL = {"file": "x.py", "conda_env": "trl"}
CONFIGS = (ABSENT, EMPTY, FILE_ONLY, ENV_ONLY, FULL)
DEPLOYMENTS: tuple[dict[str, str] | None, ...] = (
    None,
    {},
    {"target": "ollama"},
    {"target": "ollama", "file": "x.py"},
    {"target": "custom"},
    {"target": "custom", **FULL},
    {"target": "nowhere"},
)


def method(**overrides: Any) -> MethodDefinition:
    body: dict[str, Any] = {"name": "m", "training_type": "chat", "technique": "sft", "lifecycle": ["customized"]}
    body["stages"] = {"training": FULL}
    return MethodDefinition.model_validate({**body, **overrides})


def found(definition: MethodDefinition) -> set[tuple[str, str]]:
    return {(v.pointer, v.code) for v in violations(definition, deploy_targets=TARGETS)}


def expected_members(stage: str, config: dict[str, str] | None, *codes: str) -> set[tuple[str, str]]:
    members = zip(("file", "conda_env"), codes, strict=True)
    return {(f"/stages/{stage}/{member}", code) for member, code in members if not (config or {}).get(member)}


def expected(lifecycle: list[str], stages: dict[str, Any], switches: dict[str, bool], deployment: Any) -> set[Any]:
    """The documentation's table, written plainly and without the product's tables."""
    result: set[tuple[str, str]] = set()
    missing = ("missing_file", "missing_environment")
    training, saving = stages["training"], stages["saving"]
    if "customized" in lifecycle:
        result |= expected_members("training", training, *missing)
    elif training is not None:
        result |= expected_members("training", training, "incomplete_training", "incomplete_training")
    if "complete" in lifecycle:
        result |= expected_members("saving", saving, *missing)
    elif saving is not None:
        result.add(("/stages/saving", "stage_off_path"))
    for state in ("customized", "complete"):
        stage, switched_on = f"inference-{state}", switches[state]
        if state not in lifecycle:
            result |= {(f"/inference/{state}", "inference_off_path")} if switched_on else set()
            result |= {(f"/stages/{stage}", "stage_off_path")} if stages[stage] is not None else set()
        elif switched_on:
            result |= expected_members(stage, stages[stage], *missing)
        elif stages[stage] is not None:
            result.add((f"/stages/{stage}", "inference_not_switched_on"))
    return result | expected_deployment("online" in lifecycle, deployment)


def expected_deployment(online: bool, deployment: dict[str, str] | None) -> set[tuple[str, str]]:
    if not online:
        return set() if deployment is None else {("/deployment", "deployment_off_path")}
    match (deployment or {}).get("target"):
        case None:
            return {("/deployment/target", "missing_deploy_target")}
        case "custom":
            members = ("file", "conda_env")
            return {
                (f"/deployment/{m}", "incomplete_custom_deployment") for m in members if m not in (deployment or {})
            }
        case "ollama" | "local":
            return {
                (f"/deployment/{m}", "deployment_file_not_custom")
                for m in ("file", "conda_env")
                if m in (deployment or {})
            }
        case _:
            return {("/deployment/target", "unknown_deploy_target")}


class TestOutput:
    @pytest.mark.parametrize("output", ["final", "checkpoint-*", "run/[0-9]/best", "a b"])
    def test_names_a_place_in_the_output_folder(self, output: str) -> None:
        assert found(method(stages={"training": {**FULL, "output": output}})) == set()

    @pytest.mark.parametrize("output", ["", "/final", "../x", "a//b", "a/", "./a", "**/final", "a\nb", "x" * 201])
    def test_anything_else_is_refused(self, output: str) -> None:
        assert found(method(stages={"training": {**FULL, "output": output}})) == {
            ("/stages/training/output", "invalid_output")
        }

    def test_an_answer_lies_nowhere(self) -> None:
        stages = {"training": FULL, "inference-customized": {**FULL, "output": "final"}}
        assert found(method(stages=stages, inference={"customized": True})) == {
            ("/stages/inference-customized/output", "output_not_for_stage")
        }


class TestEveryCombination:
    @pytest.mark.parametrize("path", PATHS, ids="-".join)
    def test_agrees_with_the_documented_table(self, path: tuple[ModelState, ...]) -> None:
        lifecycle = [state.value for state in path]
        count = valid = 0

        for training, saving, ask_customized, ask_complete, *switches, deployment in product(
            CONFIGS, CONFIGS, CONFIGS, CONFIGS, (False, True), (False, True), DEPLOYMENTS
        ):
            stages = {
                "training": training,
                "saving": saving,
                "inference-customized": ask_customized,
                "inference-complete": ask_complete,
            }
            on = dict(zip(("customized", "complete"), switches, strict=True))
            definition = method(lifecycle=lifecycle, stages=stages, inference=on, deployment=deployment)
            result = found(definition)
            assert result == expected(lifecycle, stages, on, deployment), (lifecycle, stages, on, deployment)
            count += 1
            valid += not result

        assert count == 5**4 * 4 * len(DEPLOYMENTS)  # 17,500 a path, 105,000 in all
        assert valid == _valid_combinations(lifecycle)


def _valid_combinations(lifecycle: list[str]) -> int:
    """Count by hand: inference on or off per askable state, three ways to be online, training given or not."""
    askable = [state for state in lifecycle if state != "online"]
    ways_online = 2 if "online" in lifecycle else 1  # ollama, custom
    ways_trained = 1 if "customized" in lifecycle else 2
    return int(2 ** len(askable)) * ways_online * ways_trained


class TestLifecycle:
    @pytest.mark.parametrize("length", range(5))
    def test_only_the_six_lists_are_lifecycles(self, length: int) -> None:
        words = ["base", "customized", "complete", "online"]

        for values in product(words, repeat=length):
            codes = {v.code for v in violations(method(lifecycle=list(values)), deploy_targets=TARGETS)}
            assert ("unknown_lifecycle" in codes) == (values not in PATHS)

    def test_unknown_lifecycle_does_not_hide_what_can_be_judged_without_it(self) -> None:
        definition = method(
            name="a/b",
            training_type="video",
            lifecycle=["complete", "customized"],
            stages={"training": {}, "inference-complete": FULL, "testing": {}},
            inference={"customized": True},
            deployment={"target": "custom"},
            colour="red",
        )

        assert [(v.pointer, v.code) for v in violations(definition, deploy_targets=TARGETS)] == [
            ("/name", "invalid_name"),
            ("/training_type", "unknown_training_type"),
            ("/lifecycle", "unknown_lifecycle"),
            ("/stages/training/file", "missing_file"),
            ("/stages/training/conda_env", "missing_environment"),
            ("/stages/inference-customized/file", "missing_file"),
            ("/stages/inference-customized/conda_env", "missing_environment"),
            ("/stages/inference-complete", "inference_not_switched_on"),
            ("/stages/testing", "unknown_stage"),
            ("/deployment/file", "incomplete_custom_deployment"),
            ("/deployment/conda_env", "incomplete_custom_deployment"),
            ("/colour", "unknown_field"),
        ]


class TestSingleRules:
    def test_valid_method_has_no_violations(self) -> None:
        assert found(method()) == set()

    def test_environment_of_saving_is_not_inherited_from_training(self) -> None:
        definition = method(lifecycle=["customized", "complete"], stages={"training": FULL, "saving": FILE_ONLY})

        assert found(definition) == {("/stages/saving/conda_env", "missing_environment")}

    def test_blank_file_counts_as_missing(self) -> None:
        definition = method(stages={"training": {"file": "  ", "conda_env": "trl"}})

        assert found(definition) == {("/stages/training/file", "missing_file")}

    def test_deployment_is_no_member_of_stages(self) -> None:
        definition = method(stages={"training": FULL, "deployment": FULL})

        assert found(definition) == {("/stages/deployment", "unknown_stage")}

    def test_pointers_are_escaped(self) -> None:
        definition = method(stages={"training": FULL, "a/b~c": {}})

        assert found(definition) == {("/stages/a~1b~0c", "unknown_stage")}

    def test_unknown_members_are_found_at_every_level(self) -> None:
        definition = method(
            odd=1,
            stages={"training": {**FULL, "odd": 1}},
            inference={"odd": 1},
            arguments={"odd": {}},
            lifecycle=["customized", "online"],
            deployment={"target": "ollama", "odd": 1},
        )

        assert found(definition) == {
            (pointer, "unknown_field")
            for pointer in ("/odd", "/stages/training/odd", "/inference/odd", "/deployment/odd", "/arguments/odd")
        }

    def test_text_of_a_false_value_is_one_of_three(self) -> None:
        assert found(method(arguments={"false_as": "no"})) == {("/arguments/false_as", "unknown_false_as")}
        assert found(method(arguments={"false_as": ""})) == set()

    def test_technique_is_an_extensible_label(self) -> None:
        assert found(method(technique="my-own.technique_2")) == set()
        assert found(method(technique="a/b")) == {("/technique", "invalid_technique")}
        assert found(method(technique="x" * 41)) == {("/technique", "invalid_technique")}

    def test_missing_training_type_is_a_violation(self) -> None:
        assert found(method(training_type=None)) == {("/training_type", "missing_training_type")}

    def test_sentence_names_state_and_stage_in_every_language(self) -> None:
        (violation,) = violations(method(stages={"training": FILE_ONLY}), deploy_targets=())

        assert violation == Violation(
            "/stages/training/conda_env", "missing_environment", {"stage": "training", "state": "customized"}
        )
        assert "training" in violation.detail()
        assert "customized" in violation.detail()


class TestChain:
    @pytest.mark.parametrize(
        ("lifecycle", "through", "with_training", "kinds"),
        [
            (["customized"], "customized", True, ["training"]),
            (["customized", "complete"], "customized", True, ["training"]),
            (["customized", "complete"], "complete", True, ["training", "saving"]),
            (["customized", "online"], "online", True, ["training", "deployment"]),
            (["customized", "complete", "online"], "complete", True, ["training", "saving"]),
            (["customized", "complete", "online"], "online", True, ["training", "saving", "deployment"]),
            (["complete"], "complete", False, ["saving"]),
            (["complete"], "complete", True, ["training", "saving"]),
            (["complete", "online"], "online", False, ["saving", "deployment"]),
            (["complete", "online"], "online", True, ["training", "saving", "deployment"]),
        ],
    )
    def test_orders_the_jobs(self, lifecycle: list[str], through: str, with_training: bool, kinds: list[str]) -> None:
        assert list(chain(lifecycle, through, with_training=with_training)) == [JobKind(kind) for kind in kinds]

    @pytest.mark.parametrize("path", PATHS, ids="-".join)
    def test_refuses_every_state_that_is_not_on_the_path(self, path: tuple[ModelState, ...]) -> None:
        for through in [*(set(ModelState) - set(path)), "base", ""]:
            with pytest.raises(StateNotOnPath) as raised:
                chain(path, through)
            assert raised.value.pointer == "/through"

    def test_refuses_what_is_no_lifecycle(self) -> None:
        with pytest.raises(ValueError, match="is not a lifecycle"):
            states(["online"])


class TestModelsOfStages:
    @pytest.mark.parametrize("path", PATHS, ids="-".join)
    def test_each_job_of_a_chain_works_on_what_the_one_before_made(self, path: tuple[ModelState, ...]) -> None:
        made: ModelState | None = None

        for stage in chain(path, path[-1]):
            assert source_state(path, stage) == made
            made = STATE_OF_STAGE[stage]
            assert made in path

    @pytest.mark.parametrize(
        ("lifecycle", "stage"), [(p, JobKind.TRAINING if "customized" in p else JobKind.SAVING) for p in PATHS]
    )
    def test_first_model_is_made_by(self, lifecycle: tuple[ModelState, ...], stage: Stage) -> None:
        assert producing_stage(lifecycle) is stage

    def test_training_off_the_path_works_on_the_base_model(self) -> None:
        assert source_state(["complete"], JobKind.TRAINING) is None

    def test_asking_works_on_the_model_in_that_state(self) -> None:
        assert source_state(["customized"], JobKind.INFERENCE_CUSTOMIZED) is ModelState.CUSTOMIZED

    def test_configured_target_is_a_stage_that_runs(self) -> None:
        definition = method(lifecycle=["customized", "online"], deployment={"target": "ollama"})

        assert runnable_stages(definition) == (JobKind.TRAINING, JobKind.DEPLOYMENT)
