"""The shipped methods are whole: every file, environment, data set and text that they name is there."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

from app.domain.parameters import check_parameters
from app.domain.texts import Language
from app.presets import catalogue, sample_data, sample_signs
from app.presets.catalogue import PresetManifest
from app.presets.sample_pictures import draw
from app.registry.datasets import files as dataset_files
from app.registry.datasets.row_surveys import RowSurveys, RowsWanted
from tests.argspec.reading import read_shipped

MANIFESTS = {manifest.name: manifest for manifest in catalogue.load_manifests()}
SCRIPTS = sorted(catalogue.stage_scripts())
each_manifest = pytest.mark.parametrize("manifest", list(MANIFESTS.values()), ids=list(MANIFESTS))


class TestManifests:
    def test_ships_the_methods_that_work(self) -> None:
        templates, demos = (
            {"Custom01", "Custom02"},
            {"SFT", "PEFT", "GRPO", "DPO", "PPO", "Embedding", "MLX", "VL", "SD", "Reward", "Reranker"},
        )
        assert set(MANIFESTS) == templates | {f"{demo}-Demo" for demo in demos}

    @each_manifest
    def test_every_file_is_shipped(self, manifest: PresetManifest) -> None:
        assert all(catalogue.script_path(name).is_file() for name in manifest.files)

    @each_manifest
    def test_every_environment_is_base_or_has_a_spec(self, manifest: PresetManifest) -> None:
        stages = [*manifest.definition["stages"].values(), manifest.definition.get("deployment", {"conda_env": "base"})]

        assert {stage["conda_env"] for stage in stages} <= {"base", *catalogue.environment_specs()}

    @each_manifest
    def test_texts_are_in_every_language(self, manifest: PresetManifest) -> None:
        texts = [manifest.description, *chain.from_iterable((p.label, p.help) for p in manifest.parameters if p.label)]

        assert all(set(text) == set(Language) and all(text.values()) for text in texts)

    @each_manifest
    def test_demo_uses_what_is_shipped_and_learns_from_every_row(self, manifest: PresetManifest) -> None:
        data_sets = {sample.name: sample.path for sample in catalogue.sample_datasets()}
        bases = {model.name for model in catalogue.sample_base_models()}
        rules = manifest.data
        wanted = RowsWanted(
            kinds=tuple(rules.learns_from), tools=rules.tools, pictures=rules.pictures, columns=rules.columns
        )

        found = RowSurveys().of(data_sets[manifest.demo.dataset], "digest", wanted)

        assert manifest.demo.base_model in bases
        assert (found.violations([], "/dataset"), found.warnings("/dataset")) == ([], [])
        assert found.examples == found.rows

    def test_only_the_templates_may_be_changed(self) -> None:
        assert {name for name, manifest in MANIFESTS.items() if not manifest.read_only} == {"Custom01", "Custom02"}


class TestScripts:
    def test_every_stage_script_lies_in_one_folder_only(self) -> None:
        copies = {name: [path.parent.name for path in catalogue.ROOM.glob(f"*/{name}")] for name in SCRIPTS}

        assert {name: folders for name, folders in copies.items() if len(folders) != 1} == {}

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_help_comes_at_once(self, script: str) -> None:
        path = catalogue.script_path(script)

        before = os.times()
        run = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=False)

        assert run.returncode == 0, run.stderr
        assert "--help" in run.stdout
        after = os.times()  # seconds of computing: on a busy machine the clock tells of the neighbours
        spent = (after.children_user - before.children_user) + (after.children_system - before.children_system)
        assert spent < 1

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_never_imports_the_service(self, script: str) -> None:
        text = catalogue.script_path(script).read_text()

        assert "import app" not in text
        assert "from app" not in text

    @pytest.mark.parametrize("name", ["nowhere.py", "../catalogue.py", ""])
    def test_unknown_script_is_a_key_error(self, name: str) -> None:
        with pytest.raises(KeyError):
            catalogue.script_path(name)


class TestSamples:
    def test_data_files_are_those_that_the_generator_makes(self, tmp_path: Path) -> None:
        sample_data.write(lambda name: tmp_path / f"{name}.jsonl")

        for sample in catalogue.sample_datasets():
            assert sample.path.read_bytes() == (tmp_path / sample.path.name).read_bytes()

    @pytest.mark.parametrize(("name", "rows", "pictures"), [("vl-demo", 400, 560), ("sd-demo", 120, 120)])
    def test_pictures_are_drawn_from_their_names(self, tmp_path: Path, name: str, rows: int, pictures: int) -> None:
        (sample,) = [sample for sample in catalogue.sample_datasets() if sample.name == name]
        assert sample.with_pictures

        sample_data.write_with_pictures(sample.path, tmp_path / name)

        report = dataset_files.inspect(tmp_path / name, max_characters=4000).report
        assert (report.rows, report.problem_count) == (rows, 0)
        drawn = [path.read_bytes() for path in (tmp_path / name / "images").iterdir()]
        assert len(set(drawn)) == len(drawn) == pictures
        assert all(picture.startswith(b"\x89PNG") for picture in drawn)

    def test_folder_that_is_there_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "vl-demo").mkdir()

        sample_data.write_with_pictures(catalogue.ROOM / "vl-demo" / "vl-demo.jsonl", tmp_path / "vl-demo")

        assert list((tmp_path / "vl-demo").iterdir()) == []

    @pytest.mark.parametrize("name", ["", "red-ring.png", "pink-ring-16-16-10-100.png", "../red-ring-1-1-1-1.png"])
    def test_name_that_describes_no_picture(self, name: str) -> None:
        with pytest.raises(ValueError, match="describes no picture"):
            draw(name)

    def test_sign_that_is_none(self) -> None:
        with pytest.raises(ValueError, match="describes no picture"):
            sample_signs.draw("sign-pink-circle-middle.png")

    def test_data_sets_keep_the_rules_of_the_platform(self) -> None:
        for sample in catalogue.sample_datasets():
            lines = sample.path.read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            assert len(rows) >= 100
            assert all(row.keys() == rows[0].keys() for row in rows)
            assert max(map(len, lines)) < 4000

    def test_base_models_are_there(self) -> None:
        for model in catalogue.sample_base_models():
            place = model.folder or model.program
            assert place is not None
            assert place.exists()
            assert model.environment is None or model.environment in catalogue.environment_specs()


class TestEnvironments:
    def test_conda_gives_python_and_pip_only(self) -> None:
        for name, path in catalogue.environment_specs().items():
            spec = yaml.safe_load(path.read_text())
            conda = [entry for entry in spec["dependencies"] if isinstance(entry, str)]
            (pip,) = [entry["pip"] for entry in spec["dependencies"] if isinstance(entry, dict)]

            assert spec["name"] == name
            assert [entry.split(">")[0].split("=")[0] for entry in conda] == ["python", "pip"]
            assert all("==" in requirement for requirement in pip)


class TestParameters:
    """Every parameter of a form has a label: the platform's own, or one of ours."""

    JOB = frozenset(("train_id", "seq", "model_name", "model_path", "dataset_path", "output_dir"))
    SAVING = frozenset(("base_path", "save_path", "adapter_path", "dtype_str"))
    LENGTHS = frozenset(("max_seq_length", "max_input_length", "max_content_length", "max_samples"))
    STEPS = frozenset(("max_steps", "batch_size", "grad_accum_steps", "warmup_steps", "learning_rate", "max_grad_norm"))
    OTHERS = frozenset(("lora_rank", "load_in_4bit", "input_train_name", "output_train_name", "num_generations"))
    PLATFORM = JOB | SAVING | LENGTHS | STEPS | OTHERS

    @each_manifest
    def test_is_labelled(self, manifest: PresetManifest) -> None:
        script = manifest.definition["stages"].get("training", manifest.definition["stages"]["saving"])["file"]
        labelled = {parameter.name for parameter in manifest.parameters if parameter.label and parameter.help}

        assert declared(script) - self.PLATFORM <= labelled

    @pytest.mark.parametrize("script", ["sft-demo.py", "vl-demo.py", "custom02.py"])
    def test_arguments_of_the_chat_template_are_an_object(self, script: str) -> None:
        read = read_shipped(script)
        given = {"enable_thinking": False}

        check = check_parameters({"chat_template_kwargs": given}, read)

        assert check.effective["chat_template_kwargs"] == given
        assert not [one for one in check.violations if one.pointer == "/parameters/chat_template_kwargs"]

    @each_manifest
    def test_demo_gives_only_declared_parameters(self, manifest: PresetManifest) -> None:
        script = manifest.definition["stages"].get("training", manifest.definition["stages"]["saving"])["file"]

        assert set(manifest.demo.parameters) <= declared(script)


PARSERS = """
import json, runpy, sys
sys.path.append(sys.argv[1])
found = {}
for script in sys.argv[2:]:
    parser = runpy.run_path(script, run_name="probe").get("make_parser", lambda: None)()
    found[script.rpartition("/")[2]] = parser and {
        action.option_strings[0].removeprefix("--"): {
            "names": [name.removeprefix("--") for name in action.option_strings],
            "default": action.default,
            "choices": action.choices and list(action.choices),
            "required": action.required,
            "help": (action.help or "").replace("%%", "%"),
        }
        for action in parser._actions
        if action.dest != "help"
    }
print(json.dumps(found))
"""


def test_what_is_read_of_shipped_scripts_is_what_they_declare() -> None:
    paths = [str(catalogue.script_path(name)) for name in SCRIPTS]
    command = [sys.executable, "-c", PARSERS, str(catalogue.helpers_dir()), *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    declared_in = {name: parser for name, parser in json.loads(run.stdout).items() if parser}

    assert len(declared_in) > 15
    for name, expected in declared_in.items():
        script = read_shipped(name)
        assert not script.partly_read, (name, script.unread)
        found = {one.name: one for one in script.parameters}
        assert list(found) == list(expected), name
        for parameter, declaration in expected.items():
            one = found[parameter]
            read = {
                "names": [one.name, *one.aliases],
                "default": one.default,
                "choices": one.choices and list(one.choices),
                "required": one.required,
                "help": one.help,
            }
            assert read == declaration, (name, parameter)


def declared(script: str) -> set[str]:
    """Names of a script's arguments, asked from its own parser."""
    code = (
        "import json, runpy, sys\n"
        "parser = runpy.run_path(sys.argv[1], run_name='probe')['make_parser']()\n"
        "print(json.dumps([action.dest for action in parser._actions if action.dest != 'help']))"
    )
    path = catalogue.script_path(script)
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))
