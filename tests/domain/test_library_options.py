"""Options of libraries: what a form lists of them, and what a submission may set."""

from typing import Any

import jsonschema
import pytest

from app.domain.library_options import DescribedOptions, OptionClass, OptionField, OptionTable, nearest
from app.domain.parameters import ParameterCheck, check_parameters, json_schema
from app.domain.script_parameters import OptionUse, ParameterKind, ScriptParameter, ScriptParameters

KIND = ParameterKind
TRAINING = OptionClass(
    path="lib.Training",
    library="lib",
    version="1.2",
    fields=(
        OptionField(name="learning_rate", kind=KIND.NUMBER, default=5e-5),
        OptionField(name="neftune_noise_alpha", kind=KIND.NUMBER, nullable=True, help="Noise of embeddings."),
        OptionField(name="scheduler", kind=KIND.STRING, choices=("linear", "cosine"), default="linear"),
        OptionField(name="scheduler_kwargs", kind=KIND.ANY),
        OptionField(name="report_to", kind=KIND.ANY),
        OptionField(name="save_strategy", kind=KIND.STRING, default="no"),
        OptionField(name="max_length", kind=KIND.INTEGER),
    ),
)
PAIRS = OptionClass(
    path="lib.Pairs",
    library="lib",
    version="1.2",
    fields=(OptionField(name="loss_type", kind=KIND.STRING, is_list=True, default=["sigmoid"]),),
)
SINGLES = OptionClass(
    path="lib.Singles",
    library="lib",
    version="1.2",
    fields=(
        OptionField(name="loss_type", kind=KIND.STRING, choices=("kto",), default="kto"),
        OptionField(name="undesirable_weight", kind=KIND.NUMBER, default=1.0),
    ),
)
SCRIPT = ScriptParameters(
    parameters=(
        ScriptParameter(name="learning_rate", kind=KIND.NUMBER, has_default=True, default=2e-4),
        ScriptParameter(name="epochs", aliases=("num_train_epochs",), kind=KIND.NUMBER, has_default=True, default=1.0),
        ScriptParameter(name="objective", has_default=True, default="dpo", choices=("dpo", "kto")),
    ),
    accepts_unknown=True,
    option_classes=(
        OptionUse(path="lib.Training"),
        OptionUse(path="lib.Pairs", when={"objective": ("dpo",)}),
        OptionUse(path="lib.Singles", when={"objective": ("kto",)}),
    ),
    options_instead={"max_length": "max_seq_length"},
)
TABLE = OptionTable(refused={"report_to": ("option_of_platform", "")}, chosen={"save_strategy"})
DESCRIBED = DescribedOptions({one.path: one for one in (TRAINING, PAIRS, SINGLES)}, "trl", TABLE)
UNKNOWN_YET = DescribedOptions({}, "trl", TABLE)


def check(described: DescribedOptions = DESCRIBED, **values: Any) -> ParameterCheck:
    return check_parameters(values, SCRIPT, options=described)


def codes(result: ParameterCheck) -> list[tuple[str, str]]:
    return [(one.pointer.removeprefix("/parameters/"), one.code) for one in (*result.violations, *result.warnings)]


class TestCheck:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"neftune_noise_alpha": 5}, []),
            ({"neftune_noise_alpha": "5"}, [("neftune_noise_alpha", "parameter_wrong_type")]),
            ({"neftune_noise_alpha": None}, []),
            ({"scheduler": "cosin"}, [("scheduler", "parameter_not_a_choice")]),
            ({"scheduler_kwargs": {"num_cycles": 2}}, []),
            ({"scheduler_kwargs": float("inf")}, [("scheduler_kwargs", "parameter_value_unusable")]),
            ({"report_to": "wandb"}, [("report_to", "option_of_platform")]),
            ({"max_length": 5}, [("max_length", "option_of_script_instead")]),
            ({"undesirable_weight": 2}, [("undesirable_weight", "option_of_other_choice")]),
            ({"objective": "kto", "undesirable_weight": 2}, []),
            ({"objective": "kto", "loss_type": "ipo"}, [("loss_type", "parameter_not_a_choice")]),
            ({"neftune": 5}, [("neftune", "unknown_option")]),
            ({"num_generations": 2}, []),  # of the platform's form, which all scripts are given
            ({"num_train_epochs": 2, "epochs": 3}, [("epochs", "parameters_exclude_each_other")]),
            ({"output_dir": "x"}, [("output_dir", "parameter_reserved")]),
            ({"not a name": 1}, [("not a name", "parameter_name_invalid")]),
        ],
    )
    def test_judges_an_option_like_a_parameter(self, values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
        assert codes(check(**values)) == expected

    def test_names_what_is_near_and_where_it_was_looked_for(self) -> None:
        (found,) = check(neftune=5).violations

        assert "lib.Training (lib 1.2), lib.Pairs (lib 1.2)" in found.detail()
        assert "Similar: neftune_noise_alpha" in found.detail()

    def test_passes_a_single_value_of_a_list_as_a_list(self) -> None:
        assert check(loss_type="ipo").effective == {"loss_type": ["ipo"]}
        assert check(loss_type=["ipo", "sft"]).effective == {"loss_type": ["ipo", "sft"]}

    def test_passes_a_parameter_by_its_first_name(self) -> None:
        assert check(num_train_epochs=2).effective == {"epochs": 2}

    def test_points_to_the_name_that_was_given(self) -> None:
        assert codes(check(num_train_epochs="x")) == [("num_train_epochs", "parameter_wrong_type")]

    @pytest.mark.parametrize("values", [{"neftune_noise_alpha": "5"}, {"nonsense": [1]}])
    def test_warns_where_no_node_has_looked_yet_and_drops_nothing(self, values: dict[str, Any]) -> None:
        result = check(UNKNOWN_YET, **values)

        assert codes(result) == [(name, "option_checked_at_start") for name in values]
        assert result.effective == values

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ({"report_to": "wandb"}, [("report_to", "option_of_platform")]),
            ({"num_generations": 2}, []),
            ({"max_grad_norm": "x"}, [("max_grad_norm", "parameter_wrong_type")]),
        ],
    )
    def test_knows_the_platforms_part_without_a_node(
        self, values: dict[str, Any], expected: list[tuple[str, str]]
    ) -> None:
        assert codes(check(UNKNOWN_YET, **values)) == expected

    def test_takes_the_choices_of_an_own_parameter_from_the_library(self) -> None:
        own = ScriptParameter(name="lr_scheduler", aliases=("scheduler",), has_default=True, default="cosine")
        script = SCRIPT.model_copy(update={"parameters": (own,), "option_classes": (OptionUse(path="lib.Training"),)})

        wrong = check_parameters({"lr_scheduler": "cosin"}, script, options=DESCRIBED)
        open_ = check_parameters({"lr_scheduler": "cosin"}, script, options=UNKNOWN_YET)

        assert codes(wrong) == [("lr_scheduler", "parameter_not_a_choice")]
        assert codes(open_) == []
        assert json_schema(script, options=DESCRIBED)["properties"]["lr_scheduler"]["enum"] == ["linear", "cosine"]

    def test_script_without_classes_has_no_options(self) -> None:
        script = SCRIPT.model_copy(update={"option_classes": ()})

        result = check_parameters({"neftune_noise_alpha": 5}, script, options=DESCRIBED, shipped=True)

        assert codes(result) == [("neftune_noise_alpha", "unknown_parameter")]


class TestSchema:
    def test_lists_options_behind_the_scripts_own(self) -> None:
        schema = json_schema(SCRIPT, options=DESCRIBED)

        own = ["learning_rate", "epochs", "objective"]
        options = ["neftune_noise_alpha", "scheduler", "scheduler_kwargs", "save_strategy", "loss_type"]
        assert list(schema["properties"]) == [*own, *options, "undesirable_weight"]
        assert schema["properties"]["neftune_noise_alpha"] == {
            "type": "number",
            "title": "neftune_noise_alpha",
            "description": "Noise of embeddings.",
            "x-advanced": True,
            "x-classes": ["lib.Training"],
        }
        assert schema["properties"]["scheduler"]["enum"] == ["linear", "cosine"]
        assert schema["properties"]["undesirable_weight"]["x-when"] == [{"objective": ["kto"]}]
        assert schema["additionalProperties"] is False

    def test_what_the_platforms_form_has_is_not_advanced(self) -> None:
        norm = OptionField(name="max_grad_norm", kind=KIND.NUMBER, default=1.0)
        described = DescribedOptions({TRAINING.path: TRAINING.model_copy(update={"fields": (norm,)})}, "trl", TABLE)

        entry = json_schema(SCRIPT, options=described)["properties"]["max_grad_norm"]

        assert "x-advanced" not in entry
        assert entry["title"] != "max_grad_norm"
        assert entry["default"] == 1.0

    def test_shows_no_default_of_a_library_that_does_not_hold(self) -> None:
        entry = json_schema(SCRIPT, options=DESCRIBED)["properties"]["save_strategy"]

        assert "default" not in entry
        assert entry["x-default-text"] == "chosen by the method"

    @pytest.mark.parametrize("value", ["kto", "ipo", ["ipo", "sft"]])
    def test_classes_that_choose_each_other_out_may_differ_in_type(self, value: Any) -> None:
        schema = json_schema(SCRIPT, options=DESCRIBED)

        jsonschema.validate({"loss_type": value}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"loss_type": 3}, schema)

    def test_is_open_until_a_node_has_looked(self) -> None:
        assert json_schema(SCRIPT, options=UNKNOWN_YET)["additionalProperties"] is True


def test_equal_classes_have_one_digest_whatever_node_says_so() -> None:
    again = OptionClass.model_validate(TRAINING.document())

    assert again.digest == TRAINING.digest
    assert TRAINING.model_copy(update={"version": "1.3"}).digest != TRAINING.digest


def test_near_names_are_few() -> None:
    assert nearest("modules_to_sav", ["modules_to_save", "x"]) == ["modules_to_save"]
    assert len(nearest("warmup", [f"warmup_{n}" for n in range(9)])) == 3
