"""What is proposed for scripts that were not written for the platform: every value with its reason, nothing silent."""

import dataclasses

import pytest

from app.argspec.inputs import read_inputs
from app.argspec.source import parse
from app.domain.definition import MethodDefinition
from app.domain.enums import JobKind
from app.domain.known_programs import command_of, known_program, known_table
from app.domain.launchers import LauncherKind
from app.domain.lifecycle import violations
from app.domain.script_parameters import OtherInputs, ScriptParameters
from app.domain.suggestions import Suggestion, Target, suggest
from app.domain.texts import catalogue
from tests.argspec.reading import read_parameters

PARSER = "import argparse\np = argparse.ArgumentParser()\n"


def proposed(source: str, *, stage: JobKind | None = None) -> Suggestion:
    script = read_parameters(source)
    inputs = OtherInputs.model_validate(dataclasses.asdict(read_inputs(parse(source.encode()))))
    classes = [one.path for one in script.parser_classes]
    target = Target(file="train.py", classes=classes)
    return suggest(script, target, stage=stage, environment="trl", inputs=inputs)  # type: ignore[arg-type]


def options(*names: str) -> str:
    return PARSER + "".join(f"p.add_argument({name})\n" for name in names) + "p.parse_args()\n"


def of_module(command: str) -> Suggestion:
    _, module = command_of(command)
    return suggest(ScriptParameters(), Target(module=module, program=known_program(module)), environment="e")


def codes(found: Suggestion) -> set[str]:
    return {note.code for note in found.notes}


def uncertain(found: Suggestion) -> set[str]:
    return {one.option for one in found.placed if not one.certain}


def refused(found: Suggestion) -> list[tuple[str, str]]:
    """Return what is wrong with the proposed method."""
    if found.method is None:
        return []
    definition = MethodDefinition.model_validate(found.method)
    return [(one.pointer, one.code) for one in violations(definition, deploy_targets=[])]


HF = """
from {0} import {1}
from transformers import HfArgumentParser
HfArgumentParser(({1})).parse_args_into_dataclasses()
"""


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        (
            HF.format("trl", "ScriptArguments, SFTConfig, ModelConfig"),
            ["--model_name_or_path={model_path}", "--dataset_name={dataset_dir}", "--output_dir={output_dir}"],
        ),
        (HF.format("transformers", "TrainingArguments, X"), ["--do_train=True", "--output_dir={output_dir}"]),
        (
            options("'--model'", "'--data', help='Directory with jsonl files'", "'--adapter-path'")
            + "p.add_argument('--train', action='store_true')",
            ["--train", "--model={model_path}", "--data={dataset_dir}", "--adapter-path={output_dir}"],
        ),
        (
            options("'--base_model'", "'--data_path', default='org/rows'", "'--out_dir'"),
            ["--base_model={model_path}", "--data_path={dataset_dir}", "--out_dir={output_dir}"],
        ),
        (
            options("'--train_file', nargs='+'", "'--model_name'", "'--output'"),
            ["--model_name={model_path}", ["--train_file", "{dataset_path}"], "--output={output_dir}"],
        ),
    ],
)
def test_values_go_where_names_say(source: str, arguments: list[object]) -> None:
    found = proposed(source)
    assert found.config["arguments"] == [*arguments, "{parameters}"]
    assert found.method is not None
    assert found.method["stages"] == {"training": dict(found.config)}
    assert all(one.why for one in found.placed)
    assert not refused(found)


def test_names_with_other_meanings_are_marked() -> None:
    found = proposed(options("'--model_name'", "'--dataset'", "'--output_dir'"))
    assert uncertain(found) == {"--model_name", "--dataset"}
    assert uncertain(proposed(options("'--data', help='Folder of rows'"))) == {"--data"}


def test_each_value_goes_into_one_option_and_the_rest_is_listed() -> None:
    found = proposed(options("'--dataset_name'", "'--train_file'", "'--lr', required=True", "'--model_path'"))
    left = {one.option: (one.required, one.why.code) for one in found.left_over}
    assert left == {
        "--lr": (True, "suggest_left_required"),
        "--train_file": (False, "suggest_left_for_other"),
    }
    assert "suggest_missing_output" in codes(found)


def test_arguments_without_a_name_keep_their_places() -> None:
    found = proposed(options("'model'", "'kind'", "'--output_dir'"))
    assert found.config["arguments"] == ["--output_dir={output_dir}", "{parameters}", "{model_path}", "{param:kind}"]
    assert ("kind", True) in [(one.option, one.required) for one in found.left_over]


def test_scripts_of_deepextension_need_no_form() -> None:
    training = options("'--model_path'", "'--dataset_path'", "'--output_dir'", "'--my_own'")
    saving = options("'--base_path'", "'--adapter_path'", "'--save_path'", "'--dtype_str'")
    for source, stage in ((training, JobKind.TRAINING), (saving, JobKind.SAVING)):
        found = proposed(source)
        assert (found.stage, dict(found.config)) == (stage, {"file": "train.py", "conda_env": "trl"})
        assert not uncertain(found)
    assert proposed(saving, stage=JobKind.SAVING).method is None


def test_merges_and_questions_have_values_of_their_own() -> None:
    source = options("'--base_model_name_or_path'", "'--peft_model_path'", "'--output_dir'")
    assert proposed(source, stage=JobKind.SAVING).config["arguments"] == [
        *("--base_model_name_or_path={base_path}", "--peft_model_path={adapter_path}", "--output_dir={save_path}"),
        "{parameters}",
    ]
    source = options("'--model'", "'--adapter-path'", "'--prompt'", "'--max-tokens', type=int")
    assert proposed(source, stage=JobKind.INFERENCE_CUSTOMIZED).config["arguments"] == [
        *("--model={base_model_path}", "--adapter-path={model_path}", "--prompt={prompt}", "--max-tokens={max_length}"),
        "{parameters}",
    ]


def test_scripts_without_arguments_are_told_the_truth() -> None:
    found = proposed(
        "import os\nfrom datasets import load_dataset\nmodel = AutoModel.from_pretrained('org/model')\n"
        "rows = load_dataset('org/rows')\nfolder = f'output/{os.environ[\"RUN\"]}'\nmodel.save_pretrained(folder)\n"
    )
    assert found.config == {"file": "train.py", "conda_env": "trl", "arguments": [], "working_directory": "run"}
    assert {"suggest_names_model_itself", "suggest_names_data_itself", "suggest_names_output_itself"} < codes(found)
    assert "suggest_no_arguments" in codes(found)
    assert [(one.option, one.required) for one in found.left_over] == [("RUN", True)]


def test_places_and_variables_that_a_script_reads_are_proposed_as_uncertain() -> None:
    found = proposed(
        "import os, sys\nmodel_name = sys.argv[1] if len(sys.argv) > 1 else 'bert'\n"
        "data = os.environ['DATASET_PATH']\nout = os.getenv('OUTPUT_DIR')\nos.getenv('HF_HOME')\n"
    )
    assert found.config["arguments"] == ["{model_path}"]
    assert found.config["env"] == {"DATASET_PATH": "{dataset_path}", "OUTPUT_DIR": "{output_dir}"}
    assert uncertain(found) == {"sys.argv[1]", "DATASET_PATH", "OUTPUT_DIR"}
    assert not refused(found)
    assert not found.left_over


@pytest.mark.parametrize(
    ("command", "launcher", "module"),
    [
        ("trl dpo --model_name_or_path x", LauncherKind.PYTHON, "trl.scripts.dpo"),
        ("accelerate launch --num_processes 2 -m trl.scripts.sft --lr 1", LauncherKind.ACCELERATE, "trl.scripts.sft"),
        ("torchrun --nproc_per_node 2 train.py --lr 1", LauncherKind.TORCHRUN, "train.py"),
        ("python -m mlx_lm.lora", LauncherKind.PYTHON, "mlx_lm.lora"),
        ("python  train.py", LauncherKind.PYTHON, "train.py"),
        ("swift rlhf --rlhf_type dpo", LauncherKind.PYTHON, "swift.cli.rlhf"),
        ("llamafactory-cli train job.yaml", LauncherKind.PYTHON, "llamafactory.cli"),
        ("train.py", LauncherKind.PYTHON, "train.py"),
    ],
)
def test_what_people_type_in_a_shell(command: str, launcher: LauncherKind, module: str) -> None:
    assert command_of(command) == (launcher, module)


@pytest.mark.parametrize("program", known_table().programs, ids=lambda one: one.modules[0])
def test_known_programs_get_model_data_and_folder(program: object) -> None:
    found = of_module(program.commands[0])  # type: ignore[attr-defined]
    needed = {
        "training": ("model_path", "dataset_", "output_dir"),
        "saving": ("base_path", "adapter_path", "save_path"),
    }
    placed = " ".join(one.value for one in found.placed)
    assert all(value in placed for value in needed[found.stage])
    assert not {code for code in codes(found) if code.startswith("suggest_missing")}
    assert not uncertain(found)
    assert not refused(found)


def test_every_code_of_the_table_has_its_sentence() -> None:
    table = known_table()
    roles = {f"suggest_role_{row.role}" for row in table.options}
    notes = {code for program in table.programs for code in program.notes}
    notes |= {code for row in table.classes for code in row.notes}
    assert roles | notes <= catalogue().keys()
    spoken = {f"suggest_names_{subject}_itself" for subject in ("model", "data", "output")}
    spoken |= {f"suggest_missing_{role}" for role in ("base_model", "data", "output", "adapter", "model", "prompt")}
    assert spoken | {"suggest_missing_server", "suggest_missing_name"} <= catalogue().keys()
