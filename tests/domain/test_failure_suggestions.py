"""Which change a failed job is offered: only what its script declares, of the kind that it declares."""

from typing import Any

import pytest

from app.domain.enums import EndReason
from app.domain.failure_suggestions import ExpectedMemory, FailureSuggestion, TunableParameters, suggestion_for
from app.domain.script_parameters import ParameterKind, ScriptParameter
from app.domain.texts import Language

OOM = EndReason.CUDA_OUT_OF_MEMORY
INTEGER, BOOLEAN, STRING = ParameterKind.INTEGER, ParameterKind.BOOLEAN, ParameterKind.STRING
SWITCH = ("auto", "true", "false")


def tunable(given: Any = None, **declared: ScriptParameter) -> TunableParameters:
    return TunableParameters(declared=declared, given=given or {})


def option(kind: ParameterKind, default: Any = None, choices: tuple[str, ...] | None = None) -> ScriptParameter:
    return ScriptParameter(name="any", kind=kind, default=default, choices=choices)


BATCH = {"batch_size": option(INTEGER, 8), "grad_accum_steps": option(INTEGER, 1)}


def changes(fix: FailureSuggestion | None) -> dict[str, Any]:
    return dict(fix.changes) if fix is not None else {}


class TestMemory:
    @pytest.mark.parametrize(
        ("batch", "accumulation", "new"),
        [(8, 1, (4, 2)), (32, 4, (16, 8)), (2, 1, (1, 2)), (3, 1, (1, 3)), (6, 3, (3, 6)), (5, 2, (2, 5))],
    )
    def test_smaller_batch_keeps_the_rows_of_a_step(self, batch: int, accumulation: int, new: tuple[int, int]) -> None:
        fix = suggestion_for(OOM, {}, tunable({"batch_size": batch, "grad_accum_steps": accumulation}, **BATCH))

        assert changes(fix) == {"batch_size": new[0], "grad_accum_steps": new[1]}
        assert new[0] * new[1] == batch * accumulation

    def test_default_of_the_script_stands_in_for_what_was_not_given(self) -> None:
        assert changes(suggestion_for(OOM, {}, tunable(**BATCH))) == {"batch_size": 4, "grad_accum_steps": 2}

    def test_script_that_cannot_accumulate_gets_the_smaller_batch_alone(self) -> None:
        assert changes(suggestion_for(OOM, {}, tunable(batch_size=option(INTEGER, 8)))) == {"batch_size": 4}

    def test_forecast_says_which_batch_fits(self) -> None:
        fitting = {"batch_size": 1, "grad_accum_steps": 8}
        memory = ExpectedMemory(30_000, 24_000, "NVIDIA L4", fitting)

        fix = suggestion_for(OOM, {}, tunable(**BATCH), memory=memory)

        assert changes(fix) == fitting
        assert fix is not None
        assert fix.detail() == (
            "Train with batch_size 1, grad_accum_steps 8: the training is expected to need 30000 MiB as it is, and "
            "NVIDIA L4 has 24000 MiB. With the changes it is expected to fit."
        )

    @pytest.mark.parametrize("fitting", [{}, {"chunk_size": 4}])
    def test_forecast_that_says_nothing_leaves_the_usual_steps(self, fitting: dict[str, Any]) -> None:
        memory = ExpectedMemory(10_000, 24_000, "NVIDIA L4", fitting)

        assert changes(suggestion_for(OOM, {}, tunable(**BATCH), memory=memory)) == {
            "batch_size": 4,
            "grad_accum_steps": 2,
        }

    def test_batch_of_one_then_recomputes_then_shortens_then_four_bits(self) -> None:
        declared = {
            "batch_size": option(INTEGER, 1),
            "gradient_checkpointing": option(STRING, "auto", SWITCH),
            "max_seq_length": option(INTEGER, 512),
            "load_in_4bit": option(BOOLEAN, default=False),
        }
        given: dict[str, Any] = {}
        offered = []
        while fix := suggestion_for(OOM, {}, tunable(given, **declared)):
            offered.append(changes(fix))
            given |= fix.changes

        assert offered == [
            {"gradient_checkpointing": "true"},
            {"max_seq_length": 256},
            {"max_seq_length": 128},
            {"load_in_4bit": True},
        ]

    def test_batch_whose_rows_are_compared_keeps_two(self) -> None:
        declared = {"objective": option(STRING, "dpo"), **BATCH}

        assert suggestion_for(OOM, {}, tunable({"objective": "kto", "batch_size": 2}, **declared)) is None
        assert suggestion_for(OOM, {}, tunable({"objective": "dpo", "batch_size": 2}, **declared)) is not None

    def test_weights_that_learn_are_not_put_into_four_bits(self) -> None:
        declared = {"finetuning_type": option(STRING, "lora"), "load_in_4bit": option(BOOLEAN, default=False)}

        assert suggestion_for(OOM, {}, tunable({"finetuning_type": "full"}, **declared)) is None
        assert changes(suggestion_for(OOM, {}, tunable(**declared))) == {"load_in_4bit": True}

    def test_main_memory_is_not_helped_by_four_bits(self) -> None:
        assert suggestion_for(EndReason.OUT_OF_MEMORY, {}, tunable(load_in_4bit=option(BOOLEAN, default=False))) is None

    @pytest.mark.parametrize("value", [None, "many", 0, -4, True, 1.5])
    def test_batch_that_is_no_count_is_left_alone(self, value: Any) -> None:
        assert suggestion_for(OOM, {}, tunable({"batch_size": value}, **BATCH)) is None

    def test_script_that_declares_nothing_gets_no_fix(self) -> None:
        assert suggestion_for(OOM, {}, tunable({"batch_size": 8})) is None


class TestColumn:
    DECLARED = {"input_train_name": option(STRING, "question"), "output_train_name": option(STRING, "answer")}

    def fix(self, missing: str, columns: list[str], **given: str) -> dict[str, Any]:
        found = suggestion_for(
            EndReason.COLUMN_MISSING, {"column": missing}, tunable(given, **self.DECLARED), columns=columns
        )
        return changes(found)

    def test_closest_column_is_named(self) -> None:
        assert self.fix("question", ["Questions", "answer", "id"]) == {"input_train_name": "Questions"}

    def test_column_that_the_other_parameter_has_is_not_taken(self) -> None:
        assert self.fix("answers", ["answer", "x"], input_train_name="answer", output_train_name="answers") == {}

    def test_nothing_close_or_nothing_named_is_no_fix(self) -> None:
        assert self.fix("question", ["a", "b"]) == {}
        assert self.fix("text", ["texts"]) == {}


class TestOthers:
    @pytest.mark.parametrize("reason", [EndReason.EXIT_CODE, EndReason.DISK_FULL, EndReason.STALLED])
    def test_other_reasons_have_no_change(self, reason: EndReason) -> None:
        assert suggestion_for(reason, {}, tunable(**BATCH)) is None

    @pytest.mark.parametrize("language", Language)
    def test_sentence_is_complete(self, language: Language) -> None:
        fix = suggestion_for(OOM, {}, tunable(**BATCH))

        assert fix is not None
        assert "{" not in fix.detail(language)
        assert "batch_size" in fix.detail(language)
