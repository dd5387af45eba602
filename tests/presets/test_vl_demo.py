"""VL-Demo for real: a small model that sees is trained, saved and asked; a stopped run goes on; bad rows are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.launchers import Launcher, LauncherKind
from app.presets import catalogue, sample_data
from app.presets.sample_pictures import draw, draw_all
from tests import training_environment
from tests.presets.conftest import NewHome
from tests.presets.curves import SHORT, assert_went_on, run_whole_and_stopped
from tests.presets.stage import Finished, Home, dataset, demo_parameters

SCRIPT = "vl-demo.py"
RING, SQUARE = "yellow-ring-15-17-11-27.png", "green-square-16-16-11-13.png"
SMALL = ("--max_steps=2", "--batch_size=4", "--eval_samples=4", "--logging_steps=1")
# What follows a training, in one process: importing torch takes longer than all of it.
AFTERWARDS = """
import json, runpy, sys
steps = json.loads(sys.argv[1])
for name, arguments in steps:
    sys.argv = [name, *arguments]
    print("=== " + name, flush=True)
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as exit:
        if exit.code:
            print(f"exit {exit.code}")
"""


@pytest.fixture(scope="session")
def tiny_vl() -> Path:
    return training_environment.base_model("tiny-vl")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets") / "vl-demo"
    sample_data.write_with_pictures(dataset("vl-demo"), folder)
    return folder


def arguments(home: Home, base: Path, data: Path, *more: str, output: str = "out") -> list[str]:
    paths = [f"--model_path={base}", f"--dataset_path={data}", f"--output_dir={home.path / output}"]
    return [*paths, *demo_parameters("VL-Demo"), *more]


def write_data(home: Home, *rows: object, pictures: tuple[str, ...] = (RING, SQUARE)) -> Path:
    """Write a data set with pictures as the contract has it."""
    folder = home.path / "datasets" / "mine"
    (folder / "images").mkdir(parents=True)
    draw_all(pictures, folder / "images")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(new_home: NewHome, tiny_vl: Path, drawn: Path) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = new_home("vl")
    return home, home.run(SCRIPT, *arguments(home, tiny_vl, drawn))


@pytest.mark.training
@pytest.mark.xdist_group("vl_demo")
class TestTraining:
    def test_learns_to_say_what_pictures_show(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("before") < 0.2
        assert run.exact_match("after") >= 0.85
        run.lowered("eval_loss", "perplexity")
        steps = max(run.curve())
        assert run.curve()[steps] < run.curve()[1] / 4
        assert run.curve("eta_seconds")[steps] == 0
        assert min(run.curve("tokens_per_second").values()) > 0
        assert min(run.curve("memory_peak_mib").values()) > 0
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == steps
        assert [record["msg"] for record in run.records][-1] == 200005

    def test_adapts_the_language_model_alone(self, trained: tuple[Home, Finished]) -> None:
        home, _ = trained
        out = home.path / "out"

        with (out / "adapter_model.safetensors").open("rb") as file:
            names = json.loads(file.read(int.from_bytes(file.read(8), "little")))

        assert names.keys() - {"__metadata__"}
        assert all("language_model.layers" in name for name in names if name != "__metadata__")
        assert (out / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
        assert (out / "processor_config.json").is_file()
        assert json.loads((out / "deepe-pictures.json").read_text()) == {"max_image_side": 1024}

    def test_customized_and_complete_model_answer_alike(self, trained: tuple[Home, Finished], tiny_vl: Path) -> None:
        home, _ = trained
        out, complete = str(home.path / "out"), str(home.path / "complete")
        draw_all([RING, SQUARE], home.path / "multimodal")
        images = [{"data": f"../multimodal/{name}"} for name in (RING, SQUARE)]
        turn = {"role": "user", "content": "What is in the pictures?", "images": images}
        save = ["--base_path", str(tiny_vl), "--adapter_path", out, "--save_path", complete]
        two = [f"--history={json.dumps([turn])}", "--temperature=0", "--system_prompt=None"]
        one = ["--prompt=What is in the picture?", f"--image=../multimodal/{RING}", "--temperature=0", "--top_p=None"]
        broken = [f"--history={json.dumps([turn | {'images': [{'data': '../multimodal/none.png'}]}])}"]
        (home.scripts / "probe.py").write_text(AFTERWARDS)
        steps = [
            ("save_model.py", [*save, "--dtype_str=float32", "--model_usage_type", "vision-language"]),
            *(
                ("ask_vision.py", [f"--base_model_path={base}", f"--model_path={model}", *question])
                for base, model in ((str(tiny_vl), out), (complete, complete))
                for question in (one, two, broken)
            ),
        ]

        run = home.run("probe.py", json.dumps(steps))

        assert run.code == 0, run.stderr
        saved, *asked = run.stdout.split("=== ")[1:]
        assert '"status": "success"' in saved
        answers = [Finished(0, text, "", []).answer for text in asked]
        assert answers == 2 * ["a yellow ring", "a yellow ring and a green square", ""]
        errors = [line["error"] for line in run.json_lines if line["status"] == "error"]
        assert errors == 2 * ["there is no picture ../multimodal/none.png"]
        assert (Path(complete) / "deepe-pictures.json").is_file()

    def test_stopped_run_goes_on_like_an_undisturbed_one(self, torch_home: Home, tiny_vl: Path, drawn: Path) -> None:
        runs = run_whole_and_stopped(torch_home, SCRIPT, arguments(torch_home, tiny_vl, drawn, *SHORT), at=6)

        assert_went_on(*runs, "loss", "learning_rate", "grad_norm")

    def test_two_processes_train_vision_with_rows_of_every_form(self, torch_home: Home, tiny_vl: Path) -> None:
        chat = [
            {"role": "user", "content": [{"type": "text", "text": "This?"}, {"type": "image"}]},
            {"role": "assistant", "content": "a yellow ring"},
            {"role": "user", "content": "<image>\nAnd this?"},
            {"role": "assistant", "content": "a green square"},
        ]
        data = write_data(
            torch_home,
            *[{"image": [RING, SQUARE], "messages": chat}] * 4,
            *[{"image": "", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}]
            * 4,
            {"image": RING, "messages": chat[:2]},
        )
        plain = torch_home.path / "models" / "plain"
        shutil.copytree(tiny_vl, plain, ignore=shutil.ignore_patterns("chat_template.jinja"))
        more = ("--train_vision=true", "--gradient_checkpointing=true", "--eval_fraction=0", "--max_image_side=16")
        pair = Launcher(kind=LauncherKind.TORCHRUN, processes=2)

        run = torch_home.run(SCRIPT, *arguments(torch_home, plain, data, *more, *SMALL), launcher=pair)

        assert run.code == 0, run.stderr
        assert sorted(run.curve()) == [1, 2]
        weights = (torch_home.path / "out" / "adapter_model.safetensors").read_bytes()
        assert b"vision_tower" in weights
        assert b"multi_modal_projector" in weights
        assert "### assistant" in (torch_home.path / "out" / "chat_template.jinja").read_text()  # it had no format

    @pytest.mark.parametrize(
        ("name", "content", "sentence"),
        [
            ("text.png", b"no picture at all", "rows.jsonl, line 2: {folder}/text.png is no picture of a known kind"),
            ("empty.png", b"", "rows.jsonl, line 2: {folder}/empty.png is no picture of a known kind"),
            ("cut.png", draw(RING)[:-40], "rows.jsonl, line 2: the picture {folder}/cut.png cannot be read: "),
        ],
        ids=["text", "empty", "cut"],
    )
    def test_broken_picture_is_named(self, torch_home: Home, name: str, content: bytes, sentence: str) -> None:
        rows = [
            {"image": RING, "question": "What?", "answer": "a"},
            {"image": name, "question": "What?", "answer": "a"},
        ]
        data = write_data(torch_home, *rows)
        (data / "images" / name).write_bytes(content)
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = torch_home.run(SCRIPT, *arguments(torch_home, base, data))

        assert run.code == 1
        assert sentence.format(folder=data / "images") in run.stderr
        assert "Traceback" not in run.stderr

    def test_what_only_the_processor_can_tell_gets_one_sentence(
        self, torch_home: Home, tiny_base: Path, tiny_vl: Path, drawn: Path
    ) -> None:
        video = torch_home.path / "models" / "video"
        shutil.copytree(tiny_vl, video)
        (video / "processor_config.json").unlink()
        (video / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
        names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        (video / "preprocessor_config.json").write_text(json.dumps(names))
        unknown = catalogue.ROOM / "custom01" / "custom01-base"
        (torch_home.scripts / "probe.py").write_text(AFTERWARDS)
        runs = [
            (SCRIPT, arguments(torch_home, base, drawn, "--max_input_length=24", "--eval_fraction=0"))
            for base in (tiny_vl, tiny_base, unknown, video)
        ]

        run = torch_home.run("probe.py", json.dumps(runs))

        assert run.code == 0, run.stderr
        reasons = [text.rpartition("exit vl-demo.py: ")[2].strip() for text in run.stdout.split("=== ")[1:]]
        assert reasons[0].startswith("all 400 rows are longer than allowed; raise max_input_length (24) or max_content")
        assert "or lower max_image_side (1024)" in reasons[0]
        assert reasons[1] == f"the model in {tiny_base} cannot be shown pictures: it has no image processor"
        assert reasons[2].startswith(f"the model in {unknown} has no processor that can be loaded: ")
        assert reasons[3].startswith(f"the processor of {video} needs the package torchvision, which the environment")

    def test_short_memory_is_told_what_to_change(self, torch_home: Home, tiny_vl: Path, drawn: Path) -> None:
        """The first look at a picture fails as a GPU that is full does."""
        (torch_home.scripts / "probe.py").write_text(
            "import runpy, sys, deepe_pictures\n"
            "class OutOfMemoryError(RuntimeError): ...\n"
            "def load_processor(path, args): raise OutOfMemoryError('CUDA out of memory')\n"
            "deepe_pictures.load_processor = load_processor\n"
            f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        )

        run = torch_home.run("probe.py", *arguments(torch_home, tiny_vl, drawn))

        assert run.code == 1
        (note,) = run.of_type("note")
        assert "halve batch_size (16)" in note["message"]
        assert (
            "lower max_image_side (1024), show fewer pictures in a row, set gradient_checkpointing" in note["message"]
        )


ASKED = {"question": "What?", "answer": "a"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            (ASKED, (), "no row has a picture; give their files in one of these columns: images, image, file_name"),
            ({"image": RING, "a": 1}, (), "line 1: the columns to learn from are missing; there are: image, a. Name"),
            (ASKED | {"images": [{"imageId": "none.png"}]}, (), "line 1: there is no picture none.png in {images}"),
            (ASKED | {"images": [{"id": RING}]}, (), "line 1: /images: pictures are named by a file or a list"),
            (ASKED | {"file_name": 7}, (), "line 1: /file_name: pictures are named by a file"),
            (ASKED | {"image": "../rows.jsonl"}, (), "line 1: the picture ../rows.jsonl must lie in the folder of the"),
            (ASKED | {"image": ""}, (), "no row has a picture; give their files in one of these columns: images"),
            (ASKED | {"image": RING, "question": "<image><image>"}, (), "line 1: 2 times <image>, but 1 pictures"),
            (ASKED | {"image": RING, "answer": "<image>"}, (), "line 1: /1: a picture stands in an answer"),
            (ASKED | {"image": RING}, ("--pic_relative_path=x",), "pic_relative_path: there is no folder x"),
            (ASKED | {"image": RING}, ("--max_image_side=-1",), "max_image_side must be at least 0, it is -1"),
            (ASKED | {"image": RING}, ("--model_path=nowhere",), "there is no base model in nowhere"),
        ],
        ids=[
            "no column", "no words", "missing", "no name", "number", "outside", "none", "marks", "mark in answer",
            "folder", "side", "base",
        ],
    )  # fmt: skip
    def test_gets_one_sentence(self, home: Home, row: object, more: tuple[str, ...], sentence: str) -> None:
        data = write_data(home, row)
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(SCRIPT, *arguments(home, base, data, *more))

        assert run.code == 1
        assert sentence.format(images=data / "images") in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006

    def test_empty_folder_of_pictures_is_called_empty(self, home: Home) -> None:
        data = write_data(home, ASKED | {"images": [{"imageId": RING}]}, pictures=())

        run = home.run(SCRIPT, *arguments(home, catalogue.ROOM / "custom01" / "custom01-base", data))

        assert f"line 1: there is no picture {RING} in {data / 'images'}, which is empty" in run.stderr


def test_sample_program_draws_what_the_docstring_promises(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "app.presets.sample_data", str(tmp_path)], check=True)

    assert len(list((tmp_path / "vl-demo" / "images").iterdir())) == 560
