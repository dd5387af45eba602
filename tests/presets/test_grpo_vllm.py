"""GRPO-Demo with answers of a vLLM server: one that the operator runs, and one that the stage starts and ends.

The server is a stand-in with vLLM's addresses and command line that generates on the CPU (`vllm_stand_in.py`).
"""

import argparse
import importlib
import json
import os
import shlex
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.presets import catalogue
from tests.fork_server import ForkServer
from tests.presets.conftest import NewHome
from tests.presets.curves import assert_went_on, stop_and_resume
from tests.presets.stage import TORCH, Finished, Home, dataset
from tests.servers import free_port
from tests.waiting import wait_until

SCRIPT = "grpo-demo.py"
STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
UNREAD_BASE = catalogue.ROOM / "custom01" / "custom01-base"
AS_TRL_WANTS = ("--enable-lora", "--max-lora-rank=16", "--logprobs-mode=processed_logprobs")
UPDATING = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
RATIO = "sampling/importance_sampling_ratio/mean"
# The supervisor's stop reaches every process of the job, the server too.
SERVED = """
import os, runpy, signal, sys

os.environ["DEEPE_SERVER_PYTHON"], step, *sys.argv = sys.argv[1:]
write = sys.stdout.write

def write_and_stop(text):
    count = write(text)
    if text.startswith(f"step {step}/"):
        import psutil
        for process in (*psutil.Process().children(recursive=True), psutil.Process()):
            process.send_signal(signal.SIGTERM)
    return count

sys.stdout.write = write_and_stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""

Serve = Callable[..., str]


def arguments(home: Home, base: Path, *more: str) -> list[str]:
    return [
        *(f"--model_path={base}", f"--dataset_path={dataset('grpo-demo')}", f"--output_dir={home.path}/out"),
        *("--vllm=server", "--system_prompt=", "--batch_size=8", "--grad_accum_steps=1", "--num_generations=4"),
        *("--learning_rate=0.01", "--max_content_length=24", "--eval_samples=4", "--save_steps=1", *more),
    ]


@contextmanager
def serving(forks: ForkServer, home: Home, base: Path, *more: str, variables: dict[str, str]) -> Iterator[str]:
    """Run the stand-in; yield its address."""
    port = free_port()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home.path), **TORCH, **variables}
    command = [str(STAND_IN), "serve", str(base), f"--port={port}", *more]
    process = forks.start_with_pipes(command, cwd=home.path, environments=[environment])
    try:
        wait_until(lambda: is_there(f"http://127.0.0.1:{port}/health"), "the stand-in")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def is_there(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


def models(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as answer:
        return [one["id"] for one in json.load(answer)["data"]]


def python_with_vllm(home: Home, *more: str) -> Path:
    """Return the Python of an environment that has vLLM: `-m vllm.entrypoints.cli.main` starts the stand-in."""
    python = home.path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    command = shlex.join([str(home.python), "-u", str(STAND_IN)])
    python.write_text(
        "#!/bin/sh\n"
        '[ "$1 $2" = "-m vllm.entrypoints.cli.main" ] || exit 2\n'
        '[ -z "$PYTHONPATH$DEEPE_EVENTS$RANK" ] || exit 4\n'
        f'shift 2; exec {command} "$@" {shlex.join(more)}\n'
    )
    python.chmod(0o755)
    return python


def run_served(home: Home, python: Path, *args: str, stop_at: int = 0) -> Finished:
    (home.scripts / "served.py").write_text(SERVED)
    return home.run("served.py", str(python), str(stop_at), SCRIPT, *args)


def log_of(home: Home) -> str:
    return (home.path / "out" / "vllm-server.log").read_text()


@pytest.mark.training
@pytest.mark.xdist_group("grpo_vllm")
class TestServer:
    def test_of_the_operator_answers_with_the_adapter_of_each_step(
        self, new_home: NewHome, forks: ForkServer, styles_base: Path
    ) -> None:
        home = new_home("grpo-vllm")
        with serving(forks, home, styles_base, *AS_TRL_WANTS, variables=UPDATING) as address:
            args = arguments(home, styles_base, f"--vllm_server_base_url={address}/", "--max_steps=7")
            whole = home.run(SCRIPT, *args, f"--output_dir={home.path}/whole")
            stopped, resumed = stop_and_resume(home, SCRIPT, args, at=2)
            left = models(address)

        assert_went_on(whole, stopped, resumed, "loss", "reward", RATIO)
        # of old weights, or of probabilities before the temperature, the ratio would be another
        assert list(whole.curve(RATIO)) == list(range(1, 8))
        assert all(abs(ratio - 1) < 0.01 for ratio in whole.curve(RATIO).values()), whole.curve(RATIO)
        assert whole.curve("entropy")[1] != whole.curve("entropy")[7]
        assert left == [str(styles_base)]
        assert not (home.path / "whole" / ".vllm").exists()

    def test_of_the_job_outlives_the_step_of_a_stop_and_no_more(self, torch_home: Home, styles_base: Path) -> None:
        python = python_with_vllm(torch_home)

        run = run_served(torch_home, python, *arguments(torch_home, styles_base, "--max_steps=9"), stop_at=2)

        assert run.code == 143, run.stderr
        assert "its checkpoint is complete" in run.stderr
        log = log_of(torch_home)
        assert log.endswith("Application shutdown complete.\n")
        assert not is_there(log.split()[3] + "/health")
        assert log.count("POST /v1/load_lora_adapter 200") >= 2
        assert not (torch_home.path / "out" / ".vllm").exists()
        assert {"log", "checkpoint"} <= {event["kind"] for event in run.of_type("artifact")}

    def test_that_dies_ends_the_training_with_its_last_lines(self, torch_home: Home, styles_base: Path) -> None:
        python = python_with_vllm(torch_home, "--dies")

        run = run_served(torch_home, python, *arguments(torch_home, styles_base))

        assert run.code == 1
        assert "the vLLM server ended with code 7" in run.stderr
        assert "CUDA error: device lost" in run.stderr
        assert "Traceback" not in run.stderr

    def test_that_does_not_start_is_told_before_the_model_is_read(self, torch_home: Home, styles_base: Path) -> None:
        python = python_with_vllm(torch_home)
        python.write_text("#!/bin/sh\necho no kernel image; exit 3\n")

        run = run_served(torch_home, python, *arguments(torch_home, styles_base))

        assert run.code == 1
        assert "the vLLM server ended with code 3" in run.stderr
        assert "no kernel image" in run.stderr
        assert not any("expected memory" in note["message"] for note in run.of_type("note"))

    @pytest.mark.parametrize(
        ("more", "variables", "sentence"),
        [
            (AS_TRL_WANTS, {}, "takes no adapters while it runs; start it so: vllm serve BASE --enable-lora"),
            (("--enable-lora",), UPDATING, "runs with --logprobs-mode raw_logprobs; start it so"),
            (None, {}, "no vLLM server answers at http://127.0.0.1:1"),
        ],
    )
    def test_that_cannot_be_used_is_refused_with_how_to_start_it(
        self,
        torch_home: Home,
        forks: ForkServer,
        styles_base: Path,
        more: tuple[str, ...] | None,
        variables: dict[str, str],
        sentence: str,
    ) -> None:
        with ExitStack() as stack:
            address = "http://127.0.0.1:1"
            if more is not None:
                address = stack.enter_context(serving(forks, torch_home, styles_base, *more, variables=variables))
            where = (f"--vllm_server_base_url={address}", "--vllm_server_timeout=0")
            run = torch_home.run(SCRIPT, *arguments(torch_home, styles_base, *where))

        assert run.code == 1
        assert sentence in run.stderr, run.stderr
        assert not any("expected memory" in note["message"] for note in run.of_type("note"))

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            (["--use_dora=true"], "vLLM serves no adapter with use_dora"),
            (["--vllm_mode=colocate"], "vllm_mode=colocate contradicts vllm=server"),
            (["--vllm=auto", "--vllm_server_base_url=http://a"], "vllm_server_base_url has no effect without"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, torch_home: Home, more: list[str], sentence: str) -> None:
        run = torch_home.run(SCRIPT, *arguments(torch_home, UNREAD_BASE, *more))

        assert run.code == 1
        assert sentence in run.stderr, run.stderr


class TestAccelerators:
    @pytest.fixture
    def vllm(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(str(catalogue.helpers_dir()))
        cuda = SimpleNamespace(device_count=lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        return importlib.import_module("deepe_vllm")

    def test_last_one_is_left_to_the_server(self, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")

        assert vllm.part_accelerators(argparse.Namespace(vllm="server")) == ["GPU-c"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
        assert vllm.part_accelerators(argparse.Namespace(vllm="true")) == []

    def test_one_alone_is_refused(self, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

        with pytest.raises(vllm.Refused, match="and 1 is there: ask for more accelerators, or take vllm=true"):
            vllm.part_accelerators(argparse.Namespace(vllm="server"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "vllm=server starts a server with the Python of an environment that has vLLM"),
        (["--adapter=pissa"], "and adapter=pissa needs more; choose lora or rslora"),
        (["--finetuning_type=full"], "is handed the adapter that learns, and finetuning_type=full has none"),
    ],
)
def test_server_that_cannot_be_is_refused_at_once(home: Home, more: list[str], sentence: str) -> None:
    run = home.run(SCRIPT, *arguments(home, UNREAD_BASE, *more))

    assert run.code == 1
    assert sentence in run.stderr, run.stderr
