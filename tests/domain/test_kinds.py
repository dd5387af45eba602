"""Every kind of job and every training type has one row, and everything that reads the rows knows every member."""

import ast
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.domain.definition import MethodDefinition
from app.domain.demand import Demand
from app.domain.enums import EndReason, JobKind, ModelState, TrainingType
from app.domain.form import method_form
from app.domain.kinds import KINDS, STAGES, SlotPool, Stage, as_stage, kinds_of
from app.domain.known_parameters import known_at, reserved_at
from app.domain.lifecycle import (
    OPTIONAL_OFF_PATH,
    PATHS,
    STATE_OF_STAGE,
    STATE_RULES,
    producing_stage,
    source_state,
    trains,
    violations,
)
from app.domain.placement import Host, Mismatch, QueueLimit, QueueLimits, accelerators_needed, mismatches
from app.domain.rendering import filled_arguments
from app.domain.retention import EndedRun, Retention, RetentionTarget, too_old
from app.domain.retries import Failure, RetryPolicy, decide
from app.domain.texts import Language, catalogue
from app.domain.training_types import TYPES, InferenceForm, inference_form
from app.domain.transitions import TERMINAL
from app.domain.webhooks import event_of

NOW = datetime(2026, 6, 1, tzinfo=UTC)
APP = Path(__file__).parents[2] / "app"
TABLES = {"kinds.py", "training_types.py", "enums.py"}


class TestKinds:
    def test_stages_are_the_kinds_that_a_definition_has_a_member_for(self) -> None:
        assert set(STAGES) == {kind for kind, rule in KINDS.items() if rule.is_stage}
        assert [kind for kind in JobKind if kind in STAGES] == list(STAGES)

    def test_each_stage_makes_or_asks_the_model_of_one_state(self) -> None:
        assert set(STATE_OF_STAGE) == set(STAGES)
        assert all((KINDS[stage].produces is None) != (KINDS[stage].asks is None) for stage in STAGES)
        found = [stage for rule in STATE_RULES.values() for stage in (rule.producer, rule.inference) if stage]
        assert sorted(found) == sorted(STAGES)
        assert set(STATE_RULES) == set(ModelState)

    def test_each_kind_has_slots_of_one_pool(self) -> None:
        assert sorted(kind for pool in SlotPool for kind in kinds_of(pool)) == sorted(JobKind)

    @pytest.mark.parametrize("kind", JobKind)
    def test_kind_becomes_a_stage_only_if_it_is_one(self, kind: JobKind) -> None:
        if KINDS[kind].is_stage:
            assert as_stage(kind) is kind
        else:
            with pytest.raises(ValueError, match="is not a stage"):
                as_stage(kind)


class TestReadersOfKinds:
    @pytest.mark.parametrize("kind", JobKind)
    def test_every_end_is_an_event_and_kept_for_some_time(self, kind: JobKind) -> None:
        forever = Retention(dict.fromkeys(RetentionTarget))

        for status in TERMINAL:
            event, subject = event_of(kind, status), KINDS[kind].event_subject
            assert (event is None) == (subject is None)
            assert event is None or event.startswith(str(subject))
            assert too_old(EndedRun(kind, status, NOW), forever, NOW) is None
        assert decide(Failure(kind, EndReason.NODE_LOST, ran=False), RetryPolicy(), retries=0, recoveries=0) is not None

    @pytest.mark.parametrize("kind", JobKind)
    def test_placement_knows_what_it_takes(self, kind: JobKind) -> None:
        demand = Demand(kind=kind, environment="trl")
        elsewhere = Host(node_id="n", name="n", environments=frozenset(), labels={}, cards=())
        full = QueueLimits(by_queue={"default": QueueLimit(max_live=0)})

        assert accelerators_needed(demand, ()) == 0
        assert (Mismatch.ENVIRONMENT in mismatches(demand, elsewhere)) == KINDS[kind].needs_environment
        assert full.reached(demand) == KINDS[kind].counts_in_limits

    @pytest.mark.parametrize("stage", STAGES)
    def test_rules_of_methods_know_it(self, stage: Stage) -> None:
        whole = {name: {"file": "a.py", "conda_env": "base"} for name in STAGES}
        for path in PATHS:
            definition = MethodDefinition.model_validate({"lifecycle": list(path), "stages": whole})
            assert {found.code for found in violations(definition, deploy_targets=())} <= set(catalogue())
            assert source_state(path, stage) in (None, STATE_OF_STAGE[stage], *path)
            assert trains(path, stage) == (stage is OPTIONAL_OFF_PATH or stage is producing_stage(path))
        assert all(filled_arguments(stage, form) for form in InferenceForm)
        assert reserved_at(stage) == set(filled_arguments(stage))
        assert all(known_at(stage, producing=True))

    @pytest.mark.parametrize("stage", STAGES)
    def test_form_has_its_fields_in_every_language(self, stage: Stage) -> None:
        form = method_form(deploy_targets=(), environments=())
        member = KINDS[stage].member
        start = f"/{member}/{stage}/" if member == "stages" else f"/{member}/"

        fields = [field for path in form.lifecycles for field in path.fields if field.pointer.startswith(start)]

        assert fields
        assert all(set(field.label) == set(Language) for field in fields)
        assert all(not words.startswith("label_") for field in fields for words in field.label.values())


class TestTypes:
    @pytest.mark.parametrize("training_type", TrainingType)
    def test_has_a_name_in_every_language_and_stands_in_the_form(self, training_type: TrainingType) -> None:
        names = catalogue()[TYPES[training_type].label]
        choices = {
            choice.value: choice.label for choice in method_form(deploy_targets=(), environments=()).training_types
        }

        assert choices[training_type] == names
        assert set(names) == set(Language)

    @pytest.mark.parametrize("training_type", TrainingType)
    def test_definition_of_it_is_valid_and_its_inference_has_a_form(self, training_type: TrainingType) -> None:
        definition = MethodDefinition.model_validate({"training_type": training_type})

        assert "/training_type" not in {found.pointer for found in violations(definition, deploy_targets=())}
        assert inference_form(training_type) is TYPES[training_type].inference_form
        assert TYPES[training_type].hub_task

    @pytest.mark.parametrize("unknown", [None, "video"])
    def test_form_of_an_unknown_type_is_text(self, unknown: str | None) -> None:
        assert inference_form(unknown) is InferenceForm.TEXT


class TestNewMember:
    """What happens to whoever adds a member and no row: shown on a copy of the domain."""

    @pytest.mark.parametrize(
        ("before", "module", "word"),
        [
            ('PREVIEW = "preview"\n\n\nclass JobStatus', "kinds", "evaluation"),
            ('CHAT = "chat"', "training_types", "audio"),
        ],
        ids=["kind", "training type"],
    )
    def test_without_a_row_nothing_can_be_imported(self, tmp_path: Path, before: str, module: str, word: str) -> None:
        shutil.copytree(APP / "domain", tmp_path / "app" / "domain")
        enums = tmp_path / "app" / "domain" / "enums.py"
        text = enums.read_text("utf-8")
        assert before in text
        enums.write_text(text.replace(before, f'{word.upper()} = "{word}"\n    {before}'), "utf-8")

        answer = subprocess.run(
            [sys.executable, "-c", f"import app.domain.{module}"], cwd=tmp_path, capture_output=True, text=True
        )

        assert answer.returncode == 1
        assert "AssertionError: Expected code to be unreachable" in answer.stderr
        assert word in answer.stderr

    def test_no_other_module_holds_a_set_of_kinds_or_asks_for_a_type(self) -> None:
        found = [
            f"{path.relative_to(APP)}: {ast.unparse(node)}"
            for path in APP.rglob("*.py")
            if path.name not in TABLES and ("JobKind." in (text := path.read_text("utf-8")) or "TrainingType." in text)
            for node in ast.walk(ast.parse(text))
            if _is_table(node) or _asks_for_type(node)
        ]

        assert found == []


def _is_table(node: ast.AST) -> bool:
    """Whether a set, list, tuple or dict names two kinds, or two types."""
    match node:
        case ast.Set(elts=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Dict(keys=parts):
            return sum(part is not None and _is_member(part) for part in parts) > 1
        case _:
            return False


def _asks_for_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and any(
        _is_member(side, "TrainingType") for side in (node.left, *node.comparators)
    )


def _is_member(node: ast.AST, *enums: str) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id=name)):
            return name in (enums or ("JobKind", "TrainingType"))
        case _:
            return False
