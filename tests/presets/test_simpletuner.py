"""SimpleTuner's configuration, and how a run of it is told from a failed one: its process is played by a stand-in."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from app.presets import catalogue
from tests.presets import simpletuner_stand_in

sys.path.insert(0, str(catalogue.helpers_dir()))
simpletuner: Any = importlib.import_module("deepe_simpletuner")
runs: Any = importlib.import_module("deepe_simpletuner_run")
validation: Any = importlib.import_module("deepe_validation")
sys.path.pop(0)
Captioned, Refused = simpletuner.Captioned, simpletuner.Refused
URL = "http://127.0.0.1:1/secret"
SHOWN = validation.Validation(("a cat", "a dog"), 20, (512, 768), steps=8, guidance=4.0, seed=3, negative="grey")


def plan(folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "model": folder / "base",
        "family": "sd1x",
        "output": folder / "out",
        "work": folder / "out" / "simpletuner",
        "pictures": 20,
        "resolution": 512,
        "steps": 40,
        "batch_size": 4,
        "grad_accum_steps": 2,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "warmup_steps": 5,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "lora_rank": 16,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "save_steps": 10,
        "save_total_limit": 2,
        "seed": 7,
        **changes,
    }
    return simpletuner.Plan(**values)


class TestConfiguration:
    def test_says_everything_of_the_plan(self, tmp_path: Path) -> None:
        settings = simpletuner.configuration(plan(tmp_path), URL)

        assert settings["pretrained_model_name_or_path"] == str(tmp_path / "base")
        assert (settings["model_family"], settings["model_type"], settings["lora_type"]) == ("sd1x", "lora", "standard")
        assert (settings["lora_rank"], settings["lora_alpha"]) == (16, 16)
        assert (settings["max_train_steps"], settings["num_train_epochs"], settings["seed"]) == (40, 0, 7)
        assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (4, 2)
        assert (settings["resolution"], settings["resolution_type"]) == (512, "pixel")
        assert (settings["checkpoint_step_interval"], settings["checkpoints_total_limit"]) == (10, 2)
        assert settings["checkpointing_use_tempdir"] is True
        assert settings["webhook_config"] == [{"webhook_type": "raw", "callback_url": URL, "log_level": "info"}]
        assert settings["validation_disable"] is True
        assert settings["report_to"] == "none"
        assert "resume_from_checkpoint" not in settings

    @pytest.mark.parametrize(
        ("dtype", "precision", "optimizer"),
        [("bfloat16", "bf16", "adamw_bf16"), ("float16", "fp16", "optimi-adamw"), ("float32", "no", "optimi-adamw")],
    )
    def test_optimizer_fits_the_number_format(self, tmp_path: Path, dtype: str, precision: str, optimizer: str) -> None:
        settings = simpletuner.configuration(plan(tmp_path, dtype=dtype), URL)

        assert (settings["mixed_precision"], settings["optimizer"]) == (precision, optimizer)

    @pytest.mark.parametrize(
        ("wanted", "name", "steps"), [("cosine", "cosine", 40), ("constant", "constant_with_warmup", 5)]
    )
    def test_learning_rate_falls_once_or_stays_after_its_warm_up(
        self, tmp_path: Path, wanted: str, name: str, steps: int
    ) -> None:
        settings = simpletuner.configuration(plan(tmp_path, lr_scheduler=wanted), URL)

        assert (settings["lr_scheduler"], settings["lr_warmup_steps"]) == (name, steps)
        assert settings["pretrained_vae_model_name_or_path"] == settings["pretrained_model_name_or_path"]

    def test_resume_and_options_of_the_user(self, tmp_path: Path) -> None:
        options = simpletuner.read_options('{"--base_model_precision": "int8-quanto", "seed": 1}')

        settings = simpletuner.configuration(plan(tmp_path, resume="checkpoint-20", options=options), URL)

        assert settings["resume_from_checkpoint"] == "checkpoint-20"
        assert (settings["base_model_precision"], settings["seed"]) == ("int8-quanto", 1)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{", "not valid JSON"),
            ("[]", "must be a JSON object"),
            ('{"--output_dir": "/etc", "webhook_config": 1}', "cannot set output_dir, webhook_config"),
            ('{"lora_alpha": 64}', "cannot set lora_alpha: the weights are kept without it"),
            ('{"--lora_rank": 64}', "cannot set lora_rank; set the parameter lora_rank"),
            ('{"model_family": "flux"}', "cannot set model_family; set the parameter model_family"),
            ('{"validation_prompt": "a cat"}', "cannot set validation_prompt; set the parameter validation_prompts"),
        ],
    )
    def test_options_that_are_none(self, text: str, sentence: str) -> None:
        with pytest.raises(Refused, match=sentence):
            simpletuner.read_options(text)

    @pytest.mark.parametrize(("pictures", "repeats"), [(1, 8), (3, 3), (20, 1), (1000, 1)])
    def test_pictures_are_repeated_until_a_step_is_full(self, tmp_path: Path, pictures: int, repeats: int) -> None:
        (backend, texts) = simpletuner.data_backends(plan(tmp_path, pictures=pictures))

        assert backend["repeats"] == repeats
        assert (backend["caption_strategy"], backend["instance_data_dir"]) == (
            "textfile", str(tmp_path / "out/simpletuner/pictures"),
        )  # fmt: skip
        assert (texts["dataset_type"], texts["default"]) == ("text_embeds", True)
        assert (backend["crop_aspect"], backend["resolution_type"]) == ("square", "pixel")

    def test_buckets_keep_the_shapes_and_fill_a_step_from_the_rarest(self, tmp_path: Path) -> None:
        (backend, _) = simpletuner.data_backends(plan(tmp_path, pictures=20, rarest=3))
        settings = simpletuner.configuration(plan(tmp_path, pictures=20, rarest=3), URL)

        assert (backend["crop_aspect"], backend["resolution_type"], backend["repeats"]) == ("preserve", "pixel_area", 3)
        assert (settings["resolution"], settings["resolution_type"]) == (512, "pixel_area")
        assert settings["disable_bucket_pruning"] is True

    def test_validation_pictures_are_asked_for_by_a_library_of_prompts(self, tmp_path: Path) -> None:
        wanted = plan(tmp_path, validation=SHOWN)

        settings = simpletuner.configuration(wanted, URL)
        simpletuner.write_configuration(wanted, URL)

        assert {name: value for name, value in settings.items() if "validation" in name} == {
            "validation_disable": False,
            "validation_disable_unconditional": True,
            "validation_step_interval": 20,
            "validation_resolution": "512x768",
            "validation_num_inference_steps": 8,
            "validation_guidance": 4.0,
            "validation_seed": 3,
            "validation_negative_prompt": "grey",
        }
        assert json.loads(Path(settings["user_prompt_library"]).read_text()) == {"p1": "a cat", "p2": "a dog"}

    def test_validation_pictures_are_kept_with_what_they_show(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEEPE_EVENTS", str(tmp_path / "events.jsonl"))
        drawn = tmp_path / "validation_images"
        drawn.mkdir()
        for name in ("step_20_p1_0_512x768.png", "step_20_p2_0_512x768.png", "step_40_p1_0_512x768.png", "other.png"):
            (drawn / name).write_bytes(name.encode())

        SHOWN.take(drawn, tmp_path)

        kept = {path.name: path.read_text() for path in (tmp_path / "samples").iterdir()}
        assert kept == {
            "validation-20-1.png": "step_20_p1_0_512x768.png",
            "validation-20-2.png": "step_20_p2_0_512x768.png",
            "validation-40-1.png": "step_40_p1_0_512x768.png",
        }
        assert [path.name for path in drawn.iterdir()] == ["other.png"]
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert {(event["type"], event["kind"], Path(event["path"]).name) for event in events} == {
            ("artifact", "picture", name) for name in kept
        }

    @pytest.mark.parametrize(
        ("kind", "wanted", "family"),
        [
            ("StableDiffusionPipeline", "auto", "sd1x"),
            ("FluxPipeline", "auto", "flux"),
            ("NewPipeline", "sana", "sana"),
        ],
    )
    def test_family_follows_from_the_pipeline(self, kind: str, wanted: str, family: str) -> None:
        assert simpletuner.family_of(kind, wanted) == family

    @pytest.mark.parametrize(
        ("kind", "family"),
        [
            ("StableDiffusionXLPipeline", "sdxl"),
            ("StableDiffusion3Pipeline", "sd3"),
            ("FluxPipeline", "flux"),
            ("SanaPipeline", "sana"),
        ],
    )
    def test_family_that_is_not_the_pipelines_is_refused(self, kind: str, family: str) -> None:
        assert simpletuner.family_of(kind) == family
        with pytest.raises(Refused, match=f"whose family is {family}: model_family=sd1x does not fit"):
            simpletuner.family_of(kind, "sd1x")

    def test_what_would_be_trained_otherwise_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "transformer").mkdir()
        config = tmp_path / "transformer" / "config.json"

        config.write_text('{"guidance_embeds": true}')
        simpletuner.check_base(tmp_path, "flux", 512, {})
        with pytest.raises(Refused, match="multiples of 64: resolution cannot be 520"):
            simpletuner.check_base(tmp_path, "flux", 520, {})
        config.write_text('{"guidance_embeds": false}')
        with pytest.raises(Refused, match=r"as FLUX\.1-schnell does: SimpleTuner trains it with an assistant adapter"):
            simpletuner.check_base(tmp_path, "flux", 512, {})
        simpletuner.check_base(tmp_path, "flux", 512, {"disable_assistant_lora": True})
        simpletuner.check_base(tmp_path, "sd3", 512, {})

    def test_unknown_pipeline_is_refused(self) -> None:
        with pytest.raises(Refused, match="name its family for SimpleTuner in model_family"):
            simpletuner.family_of("NewPipeline")

    def test_several_gpus_are_started_by_accelerate(self, tmp_path: Path) -> None:
        train_py = Path("/env/simpletuner/train.py")

        alone, group = (simpletuner.command(plan(tmp_path, processes=count), train_py) for count in (1, 2))

        assert (alone[:3], alone[-1]) == ([sys.executable, "-u", "-c"], str(train_py))
        assert group[2:6] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
        assert group[-1] == str(train_py)

    def test_nothing_around_redirects_the_process(self, tmp_path: Path) -> None:
        around = {"PATH": "/bin", "ENV": "mine", "CONFIG_PATH": "/x", "HF_HUB_OFFLINE": "1", "NO_PROXY": "a"}

        fresh = simpletuner.environment(plan(tmp_path), around)
        resumed = simpletuner.environment(plan(tmp_path, resume="checkpoint-1"), around)

        assert (fresh["PATH"], fresh["NO_PROXY"], fresh["HF_HUB_OFFLINE"]) == ("/bin", "127.0.0.1", "1")
        assert not {"ENV", "CONFIG_PATH"} & fresh.keys()
        assert "HF_HUB_OFFLINE" not in resumed

    def test_pictures_are_laid_out_with_their_captions(self, tmp_path: Path) -> None:
        (tmp_path / "a.PNG").write_bytes(b"a")
        shown = [Captioned(tmp_path / "a.PNG", "one"), Captioned(tmp_path / "a.PNG", "two")]

        simpletuner.lay_out(shown, tmp_path / "laid")

        assert sorted(path.name for path in (tmp_path / "laid").iterdir()) == [
            "000001.png", "000001.txt", "000002.png", "000002.txt",
        ]  # fmt: skip
        assert (tmp_path / "laid" / "000002.txt").read_text() == "two\n"
        assert (tmp_path / "laid" / "000002.png").read_bytes() == b"a"

    def test_half_written_checkpoints_are_cleared_away(self, tmp_path: Path) -> None:
        for name in ("checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40-tmp"):
            (tmp_path / name).mkdir()
        for name in ("checkpoint-10", "checkpoint-20"):
            (tmp_path / name / "deepe-checkpoint.json").write_text("{}")

        assert simpletuner.newest_declared(tmp_path) == "checkpoint-20"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]


class TestMemory:
    def test_is_that_of_the_gpu_where_there_is_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text('#!/bin/sh\ntest "$1" = --id=3 && echo 20480\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")

        assert runs.memory_mib() == 20480

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which only Linux has")
    def test_is_that_of_the_process_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")

        assert 1 < runs.memory_mib(os.getpid()) < 100_000
        assert runs.memory_mib(2**22 + 1) is None


DRIVER = """
import json, sys
from pathlib import Path
import deepe
import deepe_simpletuner as simpletuner
import deepe_simpletuner_run as runs
from deepe_captions import Captioned

values = json.loads(sys.argv[1])
values |= {name: Path(values[name]) for name in ("model", "output", "work")}
plan = simpletuner.Plan(**values)
simpletuner.lay_out([Captioned(Path(sys.argv[2]), "a cat")], plan.images)
steps = []
def on_step(step):
    steps.append(step)
    print(f"step {step.number}/{step.total} {step.values}", flush=True)
def on_checkpoint(folder):
    deepe.checkpoint(folder, int(folder.name[11:]))
    print("checkpoint", folder.name, flush=True)
run = runs.Run(plan, on_step=on_step, on_checkpoint=on_checkpoint,
    on_stage=lambda stage: print("stage", stage, flush=True), stop_requested=deepe.stop_requested)
deepe.catch_stop()
try:
    done = run.to_the_end(simpletuner.installed())
except runs.Failed as error:
    sys.exit(f"Failed: {error}")
print("done" if done else f"stopped at {run.stopped_at}", flush=True)
"""


class TestRun:
    """The process: what it says counts, not its exit code."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with an environment in which a stand-in is SimpleTuner, and torch has no accelerator."""
        package = tmp_path / "packages" / "simpletuner"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('SimpleTuner was imported')\n")
        shutil.copyfile(simpletuner_stand_in.__file__, package / "train.py")
        (tmp_path / "packages" / "torch.py").write_text(
            textwrap.dedent("""
            class accelerator:
                is_available = staticmethod(lambda: False)
            class Tensor:
                pass
            """)
        )
        (tmp_path / "driver.py").write_text(DRIVER)
        (tmp_path / "cat.png").write_bytes(b"cat")
        (tmp_path / "out").mkdir()
        return tmp_path

    def start(self, folder: Path, behaviour: str = "", **changes: Any) -> "subprocess.Popen[str]":
        options = {"stand_in": behaviour} if behaviour else {}
        values = asdict(plan(folder, pictures=1, options=options, **changes))
        return subprocess.Popen(
            [sys.executable, folder / "driver.py", json.dumps(values, default=str), folder / "cat.png"],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{catalogue.helpers_dir()}:{folder / 'packages'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, behaviour: str = "", **changes: Any) -> tuple[int, str, str]:
        process = self.start(folder, behaviour, **changes)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def test_good_run_tells_its_steps_and_checkpoints(self, folder: Path) -> None:
        code, stdout, stderr = self.run(folder)

        assert code == 0, stderr
        lines = stdout.splitlines()
        assert lines[-1] == "done"
        assert [line for line in lines if line.startswith("checkpoint")] == [
            f"checkpoint checkpoint-{step}" for step in (10, 20, 30, 40)
        ]
        assert "step 1/40 {'loss': 1.0, 'learning_rate': 0.1, 'epoch': 1}" in lines
        assert sum(line.startswith("step ") for line in lines) == 40
        assert "2 files" in lines, "colours and progress bars are left out"
        assert "stage Caching" in lines

    @pytest.mark.parametrize(
        ("behaviour", "sentence"),
        [
            ("fail", "CUDA out of memory. Tried to allocate 2.00 GiB"),
            ("crash", "RuntimeError: the disk is on fire"),
            ("silent", "said that it is done, but wrote no weights"),
        ],
    )
    def test_failed_run_says_why(self, folder: Path, behaviour: str, sentence: str) -> None:
        (folder / "out" / "pytorch_lora_weights.safetensors").write_bytes(b"of an earlier run")

        code, _, stderr = self.run(folder, behaviour)

        assert code == 1
        assert stderr.startswith("Failed: SimpleTuner ")
        assert sentence in stderr

    @pytest.mark.parametrize(("steps", "kept"), [(10, "checkpoint-"), (1000, "")])
    def test_stop_comes_between_two_steps_behind_a_checkpoint_that_is_near(
        self, folder: Path, steps: int, kept: str
    ) -> None:
        process = self.start(folder, steps=100_000, save_steps=steps)
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step 12/"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest, stderr = process.communicate()

        last = rest.splitlines()[-1]
        assert last.startswith("stopped at "), stderr
        found = simpletuner.newest_declared(folder / "out")
        assert (found or "").startswith(kept)
        if found:
            assert last == f"stopped at {found.removeprefix('checkpoint-')}"

    def test_stop_before_the_first_step_comes_at_once(self, folder: Path) -> None:
        process = self.start(folder, "hang")
        assert process.stdout is not None
        while process.stdout.readline() != "stage Caching\n":
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)

        assert process.communicate()[0].endswith("stopped at 0\n")

    def test_goes_on_from_a_checkpoint(self, folder: Path) -> None:
        self.run(folder, steps=20)

        _, stdout, _ = self.run(folder, steps=40, resume=simpletuner.newest_declared(folder / "out"))

        first = next(line for line in stdout.splitlines() if line.startswith("step "))
        assert first.startswith("step 21/40")
