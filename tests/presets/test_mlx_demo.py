"""MLX-Demo for real: trained, saved and asked in the `mlx` environment, on the CPU where there is no Apple silicon."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.executor.attempts.checkpoints import whole_step
from app.presets import catalogue
from tests.fork_server import ForkServer
from tests.presets.curves import SHORT, assert_stops_early_over_a_kill, assert_went_on, run_whole_and_stopped
from tests.presets.stage import TORCH, Finished, Home, dataset, demo_parameters, make_home

SCRIPT = "mlx-demo.py"
QUESTION = "Which is larger, 3 or 8?"
SHORTER = ("--max_steps=80", "--eval_steps=40", "--eval_samples=60")
EVERY_KIND = """
import json, runpy, shutil, sys
from mlx_lm import convert

tiny, rows, out = sys.argv[1:4]
quantized, ended = f"{out}/quantized", f"{out}/ended"
shutil.copytree(tiny, ended)  # its turns end otherwise than its documents
for name, change in {
    "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
    "config.json": {"eos_token_id": 0},
    "generation_config.json": {"eos_token_id": 0},
}.items():
    with open(f"{ended}/{name}") as file:
        document = json.load(file)
    with open(f"{ended}/{name}", "w") as file:
        json.dump(document | change, file)
convert(tiny, quantized, quantize=True, q_bits=4, q_group_size=32)

def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        return exit.code or 0
    return 0

kinds = {
    "dora": (tiny, "--fine_tune_type=dora", "--num_layers=1"),
    "full": (tiny, "--fine_tune_type=full", "--num_layers=1", "--mask_prompt=false", "--weight_decay=0.1"),
    "4 bits": (tiny, "--load_in_4bit=true", "--lora_dropout=0.1"),
    "quantized base": (quantized,),
    "bfloat16": (tiny, "--dtype=bfloat16", "--lr_scheduler=linear", "--gradient_checkpointing=true"),
    "another end": (ended,),
}
small = ("--max_steps=3", "--batch_size=4", "--eval_samples=3", "--eval_max_new_tokens=4", "--learning_rate=0.01")
codes = {}
for number, (kind, (base, *more)) in enumerate(kinds.items()):
    folder = f"{out}/{number}"
    paths = (f"--model_path={base}", f"--dataset_path={rows}", f"--output_dir={folder}")
    trained = run("mlx-demo.py", *paths, *small, *more)
    merge = ("--base_path", base, "--adapter_path", folder, "--save_path", f"{folder}-complete", "--dtype_str=float32")
    saved = run("save_mlx.py", *merge)
    question = ("--prompt=What is 3 + 4?", "--temperature=0", "--max_length=4")
    asked = [run("ask_mlx.py", f"--base_model_path={base}", f"--model_path={model}", *question)
             for model in (folder, f"{folder}-complete")]
    codes[kind] = [trained, saved, *asked]
print("codes " + json.dumps(codes))
"""
KILLED_IN_STEP_7 = """
import os, runpy, signal, sys
import deepe_llm

def print_step(step, *more):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

deepe_llm.print_step = print_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Runs the script for each case in one process, and tells what was trained with what, or why nothing was.
OPTIONS = """
import contextlib, hashlib, importlib.util, io, json, sys
from pathlib import Path

script, cases, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
spec = importlib.util.spec_from_file_location("stage", script)
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
train, learners = stage.train, []

def watched(learner, *more, **named):
    learners.append(learner)
    train(learner, *more, **named)

stage.train = watched
answers = {}
for case, words in cases.items():
    folder = out / case.replace(" ", "-")
    sys.argv = [script, *words, f"--output_dir={folder}"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(said):
            stage.main()
    except SystemExit as refusal:
        answers[case] = {"refused": str(refusal)}
        continue
    optimizer, weights = learners[-1].optimizer, (folder / "adapters.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    answers[case] = {
        "optimizer": {"kind": type(optimizer).__name__} | {
            name: value for name, value in vars(optimizer).items() if isinstance(value, (bool, float, list))
        },
        "rate": round(float(optimizer.learning_rate), 6),
        "steps": int(optimizer.step),
        "kept": sorted({name.split(".", 3)[3].rpartition(".")[0] for name in header if name != "__metadata__"}),
        "digest": hashlib.sha256(weights).hexdigest(),
        "notes": [line for line in said.getvalue().splitlines() if "no effect" in line],
    }
print("answers " + json.dumps(answers))
"""


def arguments(home: Home, base: Path, *more: str, rows: Path | None = None, output: str = "out") -> list[str]:
    data, folder = rows or dataset("sft-demo"), home.path / output
    paths = [f"--model_path={base}", f"--dataset_path={data}", f"--output_dir={folder}"]
    return [*paths, *demo_parameters("MLX-Demo"), *more]


def ask(home: Home, base: Path, model: Path, *more: str) -> Finished:
    paths = (f"--base_model_path={base}", f"--model_path={model}")
    return home.run("ask_mlx.py", *paths, f"--prompt={QUESTION}", "--temperature=0", "--top_p=None", *more)


@pytest.fixture(scope="module")
def mlx_forks(mlx_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Start what scripts of the `mlx` environment are forked from; MLX, which starts threads, is left to them."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path_factory.mktemp("mlx-forks")), **TORCH}
    with ForkServer(mlx_python, ("transformers:AutoTokenizer",), environment) as server:
        yield server


@pytest.fixture
def mlx_home(mlx_python: Path, mlx_forks: ForkServer, tmp_path: Path) -> Home:
    return make_home(tmp_path / "deepe", mlx_python, mlx_forks)


@pytest.fixture(scope="module")
def trained(
    mlx_python: Path, mlx_forks: ForkServer, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Home, Finished]:
    """Return the home of a finished demo training and what it reported."""
    home = make_home(tmp_path_factory.mktemp("mlx") / "deepe", mlx_python, mlx_forks)
    return home, home.unforked.run(SCRIPT, *arguments(home, tiny_base, *SHORTER))


@pytest.fixture(scope="module")
def options(mlx_python: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what came of trainings with options of mlx-lm."""
    home = make_home(tmp_path_factory.mktemp("options") / "deepe", mlx_python)
    (home.scripts / "driver.py").write_text(OPTIONS)
    small = [
        "--max_samples=16",
        "--eval_samples=4",
        "--eval_max_new_tokens=2",
        "--batch_size=4",
        "--learning_rate=0.01",
    ]
    same = [f"--model_path={tiny_base}", f"--dataset_path={dataset('sft-demo')}", *small]
    steps = "--max_steps=2"
    schedule = '--lr_schedule={"name": "step_decay", "arguments": [0.01, 0.5, 1]}'
    cases = {
        "none": [steps],
        "sgd": [steps, "--optimizer=sgd", '--optimizer_config={"sgd": {"momentum": 0.9}, "adam": {}}'],
        "muon": [steps, "--optim=muon"],
        "adafactor": [steps, "--optimizer=adafactor", "--learning_rate=0.02", "--lr_scheduler=constant"],
        "betas": [steps, '--optimizer_config={"adamw": {"betas": [0.5, 0.6]}}'],
        "schedule": [steps, schedule, "--learning_rate=0.3"],
        "keys": [steps, '--lora_parameters={"rank": 2, "scale": 1.5, "keys": ["self_attn.q_proj"]}'],
        "passes": ["--iters=4", "--grad_accumulation_steps=2", "--save_every=2", "--grad_checkpoint=true"],
        "lengths": [steps, "--max_seq_length=200", "--mask_prompt=false", "--val_batches=1", "--steps_per_eval=1"],
        "too long": ["--max_seq_length=5"],
        "unknown": ["--optimizer_confg={}"],
        "no optimizer": ["--optimizer=lion"],
        "no setting": ['--optimizer_config={"adamw": {"beta": [0.5, 0.6]}}'],
        "of another": ['--optimizer_config={"sgd": {"momentum": 0.9}}'],
        "no decay": ["--optimizer=adam", "--weight_decay=0.1"],
        "no schedule": ['--lr_schedule={"name": "cosin", "arguments": [0.01]}'],
        "no warmup": ['--lr_schedule={"name": "cosine_decay", "arguments": [0.01, 3], "warm_up": 1}'],
        "alpha": ['--lora_parameters={"rank": 4, "alpha": 8}'],
        "no layer": [steps, '--lora_parameters={"keys": ["q_proj"]}'],
        "whole": ["--fine_tune_type=full", '--lora_parameters={"rank": 4}'],
        "half a step": ["--iters=3", "--grad_accum_steps=2"],
        "both": ["--iters=3", steps],
        "of the platform": ["--train=true"],
        "of the model": ["--resume_adapter_file=a.safetensors"],
    }
    run = home.run("driver.py", SCRIPT, json.dumps({case: [*same, *words] for case, words in cases.items()}), "out")
    assert run.code == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("answers ")]
    return dict(json.loads(line.removeprefix("answers ")))


@pytest.mark.training
@pytest.mark.xdist_group("mlx_demo")
class TestTraining:
    def test_learns_and_leaves_an_adapter(self, trained: tuple[Home, Finished]) -> None:
        home, run = trained

        assert run.code == 0, run.stderr
        assert run.exact_match("before") < 0.4
        assert run.exact_match("after") >= 0.9
        run.lowered("eval_loss", "perplexity")
        names = {path.name: path.stat().st_mode & 0o777 for path in (home.path / "out").iterdir()}
        assert {"adapter_config.json", "adapters.safetensors", "tokenizer.json"} <= names.keys()
        assert names["adapters.safetensors"] == 0o644
        assert not any(name.startswith(("checkpoint-", ".")) for name in names)

    def test_reports_curves_speed_memory_and_the_time_left(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        assert run.curve("loss")[80] < run.curve("loss")[1] / 4
        assert run.curve("eval_loss").keys() == {40, 80}
        assert run.curve("learning_rate")[1] < run.curve("learning_rate")[5] > run.curve("learning_rate")[80]
        assert run.curve("eta_seconds")[80] == 0
        assert min(run.curve("tokens_per_second").values()) > 0
        assert min(run.curve("memory_peak_mib").values()) > 0
        assert run.of_type("progress")[-1]["step"] == run.of_type("progress")[-1]["total"] == 80
        assert [record["msg"] for record in run.records][-1] == 200005

    def test_prints_nothing_but_its_own_lines(self, trained: tuple[Home, Finished]) -> None:
        _, run = trained

        ours = ("[log_data]: ", "step ", "exact match on ", "eval loss on ", "perplexity on ", "lora trains ")
        assert [line for line in run.stdout.splitlines() if not line.startswith(ours)] == []
        assert run.stderr == ""

    def test_saved_model_answers_like_the_adapter_also_in_transformers(
        self, trained: tuple[Home, Finished], tiny_base: Path, training_python: Path
    ) -> None:
        home, _ = trained
        complete = home.path / "complete"
        paths = ("--base_path", str(tiny_base), "--adapter_path", str(home.path / "out"), "--save_path", str(complete))

        saved = home.run("save_mlx.py", *paths, "--dtype_str", "float32")

        assert saved.code == 0, saved.stderr
        result = saved.json_lines[-1]
        assert (result["status"], result["dtype_used"], result["model_type"]) == ("success", "float32", "qwen3")
        assert (complete / "model.safetensors").stat().st_mode & 0o777 == 0o644
        assert ask(home, tiny_base, tiny_base).answer == "11"
        assert ask(home, tiny_base, home.path / "out").answer == "8"
        assert ask(home, complete, complete).answer == "8"
        elsewhere = Home(home.path, training_python)
        both = (f"--base_model_path={complete}", f"--model_path={complete}", f"--prompt={QUESTION}", "--temperature=0")
        assert elsewhere.run("ask_model.py", *both).answer == "8"

    def test_newest_turn_of_the_history_wins_and_the_base_is_found_by_the_adapter(
        self, trained: tuple[Home, Finished]
    ) -> None:
        home, _ = trained
        turns = [{"role": "user", "content": question} for question in ("Hello?", "Which is larger, 9 or 4?")]
        more = (f"--history={json.dumps(turns)}", "--max_context_tokens=20", "--temperature=None", "--seed=3")

        run = home.run("ask_mlx.py", f"--model_path={home.path / 'out'}", *more)

        assert run.answer == "9", run.stdout

    def test_every_kind_trains_is_saved_and_answers(self, mlx_home: Home, tiny_base: Path) -> None:
        (mlx_home.scripts / "probe.py").write_text(EVERY_KIND)

        run = mlx_home.run("probe.py", str(tiny_base), str(dataset("sft-demo")), str(mlx_home.path / "out"))

        assert run.code == 0, run.stderr
        (codes,) = [json.loads(line[6:]) for line in run.stdout.splitlines() if line.startswith("codes ")]
        kinds = ("dora", "full", "4 bits", "quantized base", "bfloat16", "another end")
        assert codes == {kind: [0, 0, 0, 0] for kind in kinds}
        for folder in ("5", "5-complete"):
            config = json.loads((mlx_home.path / "out" / folder / "generation_config.json").read_text())
            assert config["eos_token_id"] == [2, 0]

    def test_options_of_the_library_reach_what_is_trained(self, options: dict[str, Any]) -> None:
        kinds = {case: one["optimizer"]["kind"] for case, one in options.items() if "optimizer" in one}
        trained = [one["digest"] for one in options.values() if "digest" in one]

        assert [kinds[case] for case in ("none", "sgd", "muon", "adafactor")] == ["AdamW", "SGD", "Muon", "Adafactor"]
        assert options["sgd"]["optimizer"]["momentum"] == 0.9
        assert options["adafactor"]["optimizer"]["relative_step"] is False
        assert options["adafactor"]["rate"] == 0.02
        assert options["betas"]["optimizer"]["betas"] == [0.5, 0.6]
        assert options["schedule"]["rate"] == 0.005
        assert "learning_rate have no effect" in options["schedule"]["notes"][0]
        assert options["keys"]["kept"] == ["self_attn.q_proj"]
        assert len(options["none"]["kept"]) > 1
        assert {one["steps"] for one in options.values() if "steps" in one} == {2}
        assert len(trained) == len(set(trained)) == 9

    @pytest.mark.parametrize(
        ("case", "sentence"),
        [
            ("unknown", "there is no parameter optimizer_confg, neither of the script nor of mlx_lm.lora.CONFIG_DEF"),
            ("unknown", "did you mean optimizer_config"),
            ("too long", "longer than allowed; raise max_input_length (1024) or max_content_length (1024) or max_seq_"),
            ("no optimizer", "optimizer must be one of adam, adamw, muon, sgd, adafactor; it is 'lion'"),
            ("no setting", "optimizer_config: adamw: there is no beta; did you mean betas?"),
            ("of another", "optimizer_config says something of sgd, but the optimizer is adamw"),
            ("no decay", "weight_decay has no effect with optimizer=adam"),
            ("no schedule", "mlx-lm does not accept lr_schedule="),
            ("no warmup", "lr_schedule: there is no warm_up; did you mean warmup?"),
            ("alpha", "lora_parameters: there is no alpha; there are rank, scale, dropout, keys"),
            ("no layer", "the model has no layer q_proj for an adapter; there are "),
            ("whole", "lora_parameters has no effect with fine_tune_type=full"),
            ("half a step", "iters counts forward passes: it must be a multiple of grad_accum_steps (2), it is 3"),
            ("both", "iters and max_steps say the same; give one of them"),
            ("of the platform", "train cannot be set: the platform sets it; leave it out"),
            ("of the model", "resume_adapter_file cannot be set: the method loads and saves the model itself"),
        ],
    )
    def test_options_that_cannot_be_are_refused(self, options: dict[str, Any], case: str, sentence: str) -> None:
        assert sentence in options[case]["refused"]

    def test_passes_of_a_step_learn_like_one_large_batch(self, mlx_home: Home, tiny_base: Path) -> None:
        more = ("--max_steps=3", "--logging_steps=1", "--max_samples=64", "--eval_samples=0", "--resume=false")

        whole = mlx_home.run(SCRIPT, *arguments(mlx_home, tiny_base, *more, "--batch_size=64"))
        parts = ("--batch_size=16", "--grad_accum_steps=4", "--gradient_checkpointing=true")
        passes = mlx_home.run(SCRIPT, *arguments(mlx_home, tiny_base, *more, *parts))

        assert (whole.code, passes.code) == (0, 0), whole.stderr + passes.stderr
        assert passes.curve("loss") == pytest.approx(whole.curve("loss"), rel=1e-3)
        assert passes.curve("grad_norm") == pytest.approx(whole.curve("grad_norm"), rel=1e-2)

    @pytest.mark.macos
    @pytest.mark.skipif(
        (sys.platform, platform.machine()) != ("darwin", "arm64"), reason="Metal is on Apple silicon only"
    )
    def test_runs_on_the_gpu_of_a_mac(self, mlx_home: Home) -> None:
        (mlx_home.scripts / "probe.py").write_text("import mlx.core as mx; print(mx.default_device())")

        assert "gpu" in mlx_home.run("probe.py").stdout


@pytest.mark.training
@pytest.mark.xdist_group("mlx_demo")
class TestStopAndResume:
    def test_stopped_run_ends_with_the_weights_of_an_undisturbed_one(self, mlx_home: Home, tiny_base: Path) -> None:
        short = arguments(mlx_home, tiny_base, *SHORT, "--eval_steps=4")
        whole, stopped, resumed = run_whole_and_stopped(mlx_home, SCRIPT, short, at=6)

        assert_went_on(whole, stopped, resumed, "loss", "learning_rate", "grad_norm")
        assert whole.curve("eval_loss").keys() == {4, 8, 12, 16}
        assert stopped.curve("eval_loss") | resumed.curve("eval_loss") == whole.curve("eval_loss")
        weights = [mlx_home.path / name / "adapters.safetensors" for name in ("out", "whole")]
        assert weights[0].read_bytes() == weights[1].read_bytes()

    def test_early_stopping_keeps_the_best_step_over_a_kill(self, mlx_home: Home, tiny_base: Path) -> None:
        answers = [(7 * number * number + 3) % 10 for number in range(32)]  # nothing that other rows would teach
        rows = mlx_home.write_rows(
            *(json.dumps({"instruction": f"What is {n}?", "output": str(a)}) for n, a in enumerate(answers))
        )
        more = ("--batch_size=8", "--eval_steps=2", "--save_steps=100", "--early_stopping_patience=3")
        measured = ("--logging_steps=1", "--eval_fraction=0.25", "--load_best_model_at_end=true")
        names = ("whole", "cut")
        whole, cut = (arguments(mlx_home, tiny_base, *more, *measured, rows=rows, output=name) for name in names)
        first, second = (mlx_home.path / name / "adapters.safetensors" for name in names)

        assert_stops_early_over_a_kill(mlx_home, SCRIPT, whole, cut, weights=(first, second))

    def test_killed_run_goes_on_from_the_newest_whole_checkpoint(self, mlx_home: Home, tiny_base: Path) -> None:
        steps = ("--max_steps=8", "--save_steps=2", "--logging_steps=1", "--batch_size=4", "--eval_samples=2")
        adapter = ("--lora_dropout=0.2", "--num_layers=1", "--save_total_limit=3")
        dropping = arguments(mlx_home, tiny_base, *steps, *adapter)
        whole = mlx_home.run(SCRIPT, *dropping[:2], f"--output_dir={mlx_home.path}/whole", *dropping[3:])
        (mlx_home.scripts / "probe.py").write_text(KILLED_IN_STEP_7)
        killed = mlx_home.run("probe.py", SCRIPT, *dropping)
        out = mlx_home.path / "out"
        assert [whole_step(out / f"checkpoint-{step}") for step in (2, 4, 6)] == [2, 4, 6]
        weights = out / "checkpoint-6" / "adapters.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

        other = mlx_home.run(SCRIPT, *dropping, "--lora_rank=4")
        resumed = mlx_home.run(SCRIPT, *dropping)

        assert (killed.code, other.code) == (-9, 1), killed.stderr
        assert "checkpoint-4 was made with other settings of model or adapter; empty output_dir" in other.stderr
        assert (whole.code, resumed.code) == (0, 0), resumed.stderr
        assert [note["message"] for note in resumed.of_type("note")][:2] == [
            "checkpoint-6 is incomplete and is passed over",
            "resumed from checkpoint-4",
        ]
        assert resumed.curve() == {step: loss for step, loss in whole.curve().items() if step > 4}
        after = [mlx_home.path / name / "adapters.safetensors" for name in ("out", "whole")]
        assert after[0].read_bytes() == after[1].read_bytes()


@pytest.mark.training
@pytest.mark.xdist_group("mlx_demo")
class TestData:
    def test_plain_text_and_conversations_train(self, mlx_home: Home, tiny_base: Path) -> None:
        said = [
            {"role": role, "content": "Add 1 and 2."} for role in ("system", "user", "assistant", "user", "assistant")
        ]
        rows = {"text": {"text": "some words to read"}, "messages": {"messages": said}}
        for name, row in rows.items():
            file = mlx_home.write_rows(*[json.dumps(row)] * 4, name=f"{name}.jsonl")

            more = ("--max_steps=1", "--eval_fraction=0")
            run = mlx_home.run(SCRIPT, *arguments(mlx_home, tiny_base, *more, rows=file, output=name))

            assert run.code == 0, run.stderr
            assert run.of_type("evaluation") == []

    def test_layers_that_are_not_there_get_one_sentence(self, mlx_home: Home, tiny_base: Path) -> None:
        run = mlx_home.run(SCRIPT, *arguments(mlx_home, tiny_base, "--num_layers=3"))

        assert run.code == 1
        assert "num_layers is 3, but the model has 2 layers; -1 takes all" in run.stderr
        assert "Traceback" not in run.stderr

    def test_model_that_mlx_does_not_know_gets_one_sentence(self, mlx_home: Home, tiny_base: Path) -> None:
        base = mlx_home.path / "base"
        base.mkdir()
        for file in tiny_base.iterdir():
            (base / file.name).write_bytes(file.read_bytes())
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))

        run = mlx_home.run(SCRIPT, *arguments(mlx_home, base))

        assert run.code == 1
        assert f"mlx-lm cannot load the model in {base}: Model type bert not supported." in run.stderr
        assert "Traceback" not in run.stderr

    def test_missing_model_is_an_error_in_the_protocol(self, mlx_home: Home, tmp_path: Path) -> None:
        run = ask(mlx_home, tmp_path, tmp_path)

        assert run.code == 1
        assert [line["status"] for line in run.json_lines] == ["error"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "more", "sentence"),
        [
            ('{"a": 1}', [], "rows.jsonl, line 1: the columns to learn from are missing; there are: a. Name the"),
            ('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}', [], "line 2: the row is written as prompt, which"),
            ('{"text": "x"}\n{', [], "rows.jsonl, line 2: not valid JSON"),
            ('{"text": "x"}', ["--load_in_4bit=true", "--fine_tune_type=full"], "weights in 4 bits cannot be trained"),
            ('{"text": "x"}', ["--num_layers=0"], "num_layers must be at least 1, or -1 for all, it is 0"),
            ('{"text": "x"}', ["--eval_steps=0"], "eval_steps must be at least 1, it is 0"),
            ('{"text": "x"}', ["--lora_dropout=1"], "lora_dropout must be at least 0 and below 1, it is 1.0"),
            ('{"text": "x"}', ["--max_steps=0"], "max_steps must be at least 1"),
            ('{"text": "x"}', ["--model_path=nowhere"], "there is no base model in nowhere"),
        ],
    )
    def test_gets_one_sentence(self, home: Home, row: str, more: list[str], sentence: str) -> None:
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(SCRIPT, *arguments(home, base, *more, rows=home.write_rows(row)))

        assert run.code == 1
        assert sentence in run.stderr
        assert "Traceback" not in run.stderr
        assert run.records[-1]["msg"] == 200006

    def test_saving_needs_an_adapter_of_mlx(self, home: Home, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text("{}")
        base = catalogue.ROOM / "custom01" / "custom01-base"

        run = home.run(
            "save_mlx.py",
            "--base_path",
            str(base),
            "--adapter_path",
            str(tmp_path),
            "--save_path",
            str(home.path / "x"),
        )

        assert run.code == 1
        assert run.json_lines[-1]["status"] == "failed"
        assert "holds no adapter of mlx-lm" in run.json_lines[-1]["message"]


class TestMemoryAdvice:
    @pytest.mark.parametrize(
        ("error", "advice"),
        [
            ("[malloc_or_wait] Unable to allocate 34359738368 bytes.", "out of memory: halve batch_size (7)"),
            ("[metal::malloc] Attempting to allocate 9 bytes which is greater than", "out of memory"),
            ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU", "out of memory"),
            ("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002", "kept the GPU too long"),
            ("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e", "kept the GPU too long"),
        ],
    )
    def test_says_what_to_change(self, home: Home, error: str, advice: str) -> None:
        probe = f"import deepe_mlx\nprint(deepe_mlx.memory_advice(RuntimeError({error!r}), 7))\n"
        (home.scripts / "probe.py").write_text(probe)

        assert advice in home.run("probe.py").stdout
