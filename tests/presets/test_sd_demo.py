"""SD-Demo for real, with the small trainer: a base model is built, learns neon signs, is merged and asked."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from app.presets import sample_data
from tests import training_environment
from tests.presets import picture_families
from tests.presets.conftest import NewHome
from tests.presets.curves import SHORT, assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset, demo_parameters, make_home

SCRIPT = "sd-demo.py"
FAMILIES = str(Path(picture_families.__file__))
PROMPT = "a neon sign of a red circle at the middle"
FOR_REAL = [pytest.mark.training, pytest.mark.xdist_group("diffusion")]


@pytest.fixture(scope="session")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sample data set as the demo lays it into the home."""
    folder = tmp_path_factory.mktemp("data") / "sd-demo"
    sample_data.write_with_pictures(dataset("sd-demo"), folder)
    return folder


@pytest.fixture(scope="session")
def base() -> Path:
    return training_environment.base_model("tiny-diffusion")


@pytest.fixture
def families(torch_home: Home, base: Path) -> Path:
    """Return a folder with small bases of several families of models that draw."""
    made = torch_home.run(FAMILIES, "make", str(torch_home.path / "families"), str(base))
    assert made.code == 0, made.stderr
    return torch_home.path / "families"


@pytest.fixture(scope="module")
def trained(new_home: NewHome, base: Path, signs: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("sd")
    shown = ('--validation_prompts=["a neon sign of a red circle at the middle", "a paper"]', "--validation_steps=100")
    return home, home.run(SCRIPT, *arguments(home, base, signs, *shown, "--validation_inference_steps=4"))


def arguments(home: Home, base: Path, data: Path, *more: str) -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={data}", f"--output_dir={home.path}/out"]
    return [*paths, *demo_parameters("SD-Demo"), *more]


class TestTraining:
    pytestmark = FOR_REAL

    def test_draws_signs_which_it_did_not_before(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        for name in ("denoising_loss", "image_distance"):
            assert run.score("after", name) < run.score("before", name) / 2
        assert run.curve()[150] < run.curve()[1]
        assert {"samples_per_second", "eta_seconds", "memory_peak_mib", "learning_rate"} <= (
            run.of_type("metrics")[2]["values"].keys()
        )
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 150
        assert (home.path / "out" / "pytorch_lora_weights.safetensors").is_file()
        samples = home.path / "out" / "samples"
        assert len(list(samples.glob("after-*.png"))) == 12
        assert {path.name for path in samples.glob("validation-*")} == {
            f"validation-{when}-{number}.png" for when in ("before", "100", "after") for number in (1, 2)
        }
        answers = [(one["phase"], one["number"], one["answer"]) for one in run.of_type("sample")]
        assert ("after", 2, "samples/validation-after-2.png") in answers
        assert pixels(home.python, samples / "validation-before-1.png") != pixels(
            home.python, samples / "validation-after-1.png"
        )

    def test_merged_model_draws_what_base_and_weights_draw(self, trained: tuple[Home, Finished], base: Path) -> None:
        home, _ = trained
        lora, complete = home.path / "out", home.path / "complete"
        paths = ("--base_path", str(base), "--adapter_path", str(lora), "--save_path", str(complete))

        saved = home.run("save_image_model.py", *paths, "--dtype_str", "float32")

        assert saved.json_lines[-1]["status"] == "success", saved.stderr
        assert saved.json_lines[-1]["model_type"] == "StableDiffusionPipeline"
        pictures: list[bytes] = []
        for model, weights in ((base, str(lora)), (complete, "")):
            output = home.path / "images" / f"{len(pictures)}.png"
            run = home.run(
                "ask_image.py", "--model_path", str(model), "--lora_path", weights, "--prompt", PROMPT,
                "--output", str(output), "--negative_prompt", "", "--batch_size", "1", "--seed", "5",
            )  # fmt: skip
            assert run.answer == f"{output}  64 x 64 pixels, seed 5\n", run.stdout + run.stderr
            pictures.append(pixels(home.python, output))
        assert distance(*pictures) < 0.01

    def test_several_pictures_in_another_form_get_numbers(self, trained: tuple[Home, Finished], base: Path) -> None:
        home, _ = trained

        run = home.run(
            "ask_image.py", "--model_path", str(base), "--lora_path", "None", "--prompt", PROMPT,
            "--output", "../images/j.png", "--batch_size", "2", "--aspect_ratio", "2:1",
        )  # fmt: skip

        assert [line.split("  ")[0] for line in run.answer.splitlines()] == [
            "../images/j_001.png",
            "../images/j_002.png",
        ]
        assert "64 x 32 pixels" in run.answer
        assert sorted(path.name for path in (home.path / "images").glob("j*")) == ["j_001.png", "j_002.png"]

    def test_stopped_run_goes_on_like_an_undisturbed_one(self, torch_home: Home, base: Path, signs: Path) -> None:
        short = arguments(torch_home, base, signs, *SHORT, "--eval_pictures=1")
        runs = run_whole_and_stopped(torch_home, SCRIPT, short, at=6)

        assert_went_on(*runs, "loss")
        files = [torch_home.path / name / "pytorch_lora_weights.safetensors" for name in ("out", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_step_of_two_passes_learns_like_one_of_one(self, torch_home: Home, base: Path, signs: Path) -> None:
        few = ("--max_steps=3", "--max_samples=24", "--eval_fraction=0", "--logging_steps=1", "--learning_rate=0.003")
        ways = {"out": ("--batch_size=4",), "two": ("--batch_size=2", "--grad_accum_steps=2")}

        runs = {}
        for name, way in ways.items():
            words = arguments(torch_home, base, signs, *few, *way)
            runs[name] = torch_home.run(SCRIPT, *words, f"--output_dir={torch_home.path}/{name}")

        assert [run.code for run in runs.values()] == [0, 0], runs["out"].stderr + runs["two"].stderr
        for curve in ("loss", "grad_norm"):
            assert runs["two"].curve(curve) == pytest.approx(runs["out"].curve(curve), rel=1e-4)

    def test_families_are_saved_and_asked(self, torch_home: Home, families: Path) -> None:
        presets = torch_home.scripts
        run = torch_home.run(FAMILIES, "merge", str(families), str(presets))

        assert run.code == 0, run.stderr
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("answers ")]
        found = json.loads(line.removeprefix("answers "))
        kinds = {"sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
        for family, one in found.items():
            assert one["saved"]["status"] == "success", one
            assert one["saved"]["model_type"] == kinds[family]
            assert one["learned"] > 0.01, one
            assert one["merged"] < one["learned"] / 50, one
        assert "negative_prompt has no effect on a FluxPipeline" in found["flux"]["lora"]["text"]
        assert "no effect" not in found["sd3"]["lora"]["text"]
        assert "64 x 48 pixels" in found["sd3"]["lora"]["text"]


def pixels(python: Path, picture: Path) -> bytes:
    """Return a picture's colour values; the tests' own environment cannot read pictures."""
    code = "import sys; from PIL import Image; sys.stdout.buffer.write(Image.open(sys.argv[1]).tobytes())"
    return subprocess.run([python, "-c", code, picture], capture_output=True, check=True).stdout


def distance(first: bytes, second: bytes) -> float:
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / len(first) / 255


class TestRefusals:
    """What the user can put right gets one sentence, before anything is loaded."""

    @pytest.fixture
    def pipeline(self, tmp_path: Path) -> Path:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        return tmp_path / "base"

    @pytest.fixture
    def data(self, home: Home) -> Path:
        (home.path / "data" / "images").mkdir(parents=True)
        (home.path / "data" / "images" / "a.png").write_bytes(b"...")
        return home.path / "data"

    def refusal(self, home: Home, pipeline: Path, data: Path, *more: str) -> str:
        run = home.run(SCRIPT, *arguments(home, pipeline, data, *more))

        assert run.code == 1
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006
        return run.stderr

    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            ({"caption": "a cat"}, "line 1: no column names a picture; use one of these: images, image, file_name"),
            ({"images": [{"imageId": "b.png"}], "caption": "a cat"}, "line 1: there is no picture b.png in"),
            (
                {"images": [{"imageId": "a.png"}], "caption": " "},
                "rows.jsonl has no rows to learn from: there is no text to learn",
            ),
            ({"images": [{"imageId": "a.png"}]}, "line 1: the picture has no caption; give one in a column"),
            (
                {"images": [{"imageId": "a.png"}] * 2, "caption": "two"},
                "line 1: a caption belongs to one picture; the row names 2",
            ),
            (
                {"images": [{"imageId": "a.png"}], "caption": {"en": "a"}},
                "line 1: /caption: a text is expected, this is",
            ),
            (
                {"image": "a.png", "caption": "a", "text": "b"},
                "line 1: the row can be read in several ways: text, caption",
            ),
        ],
    )
    def test_of_rows(self, home: Home, pipeline: Path, data: Path, row: dict[str, object], sentence: str) -> None:
        (data / "rows.jsonl").write_text(json.dumps(row) + "\n")

        assert sentence in self.refusal(home, pipeline, data)

    def test_of_a_folder_without_captions(self, home: Home, pipeline: Path, data: Path) -> None:
        assert "no caption" in self.refusal(home, pipeline, data / "images")
        (data / "images" / "a.txt").write_text("\n")
        assert "a.txt is empty" in self.refusal(home, pipeline, data / "images")

    def test_of_a_folder_without_pictures(self, home: Home, pipeline: Path, data: Path) -> None:
        (data / "images" / "a.png").unlink()

        assert "holds no pictures" in self.refusal(home, pipeline, data / "images")

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (("--resolution=100",), "resolution must be a multiple of 8"),
            (("--batch_size=0",), "batch_size must be at least 1"),
            (("--max_steps=0",), "max_steps must be at least 1"),
            (("--trainer=simpletuner",), "SimpleTuner is not installed in this environment"),
            (("--aspect_ratio_buckets=true",), "aspect_ratio_buckets: trainer=diffusers learns squares only"),
            (("--validation_prompts=[1]",), 'must be a list of texts, such as ["a red circle", "a blue star"]'),
            (("--validation_seed=1",), "validation_seed has no effect without validation_prompts"),
            (("--validation_prompts=a", "--validation_steps=0"), "validation_steps must be at least 1, it is 0"),
            (("--validation_prompts=a", "--validation_resolution=100"), "must be a multiple of 8, at least 32, or two"),
        ],
    )
    def test_of_parameters(self, home: Home, pipeline: Path, data: Path, more: tuple[str, ...], sentence: str) -> None:
        assert sentence in self.refusal(home, pipeline, data, *more)

    def test_of_a_base_model_that_the_small_trainer_does_not_know(self, home: Home, pipeline: Path, data: Path) -> None:
        (pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        assert "the base model is a FluxPipeline; use trainer=simpletuner" in self.refusal(home, pipeline, data)
        (pipeline / "model_index.json").unlink()
        assert "model_index.json is missing" in self.refusal(home, pipeline, data)

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (("--prompt", " "), "the prompt is empty"),
            (("--prompt", "a", "--batch_size", "many"), "batch_size must be a number from 1 to 64, it is 'many'"),
        ],
    )
    def test_of_questions(self, home: Home, pipeline: Path, more: tuple[str, ...], sentence: str) -> None:
        run = home.run("ask_image.py", "--model_path", str(pipeline), *more)

        assert run.code == 1
        assert sentence in run.json_lines[-1]["error"]


class TestSimpleTuner:
    """The real one, in its own environment of 9 GB: `make simpletuner`."""

    pytestmark = [*FOR_REAL, pytest.mark.simpletuner]

    def test_learns_stops_and_goes_on(self, simpletuner_python: Path, base: Path, signs: Path, tmp_path: Path) -> None:
        home = make_home(tmp_path / "deepe", simpletuner_python)
        wishes = arguments(
            home, base, signs, "--trainer=simpletuner", "--max_steps=60", "--save_steps=20", "--logging_steps=1",
            "--eval_pictures=2", "--batch_size=8",
        )  # fmt: skip
        process = home.start(SCRIPT, *wishes)
        assert process.stdout is not None
        lines: list[str] = []
        while not (lines and lines[-1].startswith("step 25/")):
            lines.append(process.stdout.readline())
            assert lines[-1] or process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert process.returncode == 143, stderr
        assert (home.path / "out" / "checkpoint-20" / "deepe-checkpoint.json").is_file()

        run = home.run(SCRIPT, *wishes)

        assert run.code == 0, run.stdout + run.stderr
        assert any("resumed from checkpoint-" in note["message"] for note in run.of_type("note"))
        assert min(run.curve()) > 20
        assert run.of_type("progress")[-1]["step"] == 60
        assert run.score("after", "denoising_loss") < run.score("before", "denoising_loss")
        left = sorted(path.name for path in (home.path / "out").iterdir())
        assert left == ["pytorch_lora_weights.safetensors", "samples", "simpletuner_config.json"]

    @pytest.mark.parametrize("family", picture_families.FAMILIES)
    def test_learns_every_family_in_buckets_and_shows_pictures(
        self, simpletuner_python: Path, families: Path, signs: Path, tmp_path: Path, family: str
    ) -> None:
        home = make_home(tmp_path / "deepe", simpletuner_python)
        few = ("--resolution=64", "--max_steps=2", "--save_steps=1", "--logging_steps=1", "--batch_size=2")
        paths = (f"--model_path={families / family}", f"--dataset_path={signs}", f"--output_dir={home.path}/out")
        shown = ("--validation_prompts=a paper", "--validation_steps=1", "--validation_inference_steps=2")

        run = home.run(
            SCRIPT, *paths, *few, *shown, "--trainer=simpletuner", "--aspect_ratio_buckets=true", "--eval_fraction=0"
        )

        assert run.code == 0, run.stdout + run.stderr
        assert run.curve().keys() == {1, 2}
        assert (home.path / "out" / "pytorch_lora_weights.safetensors").is_file()
        pictures = {path.name for path in (home.path / "out" / "samples").iterdir()}
        assert {f"validation-{when}-1.png" for when in ("before", "2", "after")} <= pictures
