"""Answers in GRPO by a vLLM server, in an environment of its own.

TRL hands whole weights over by NCCL, for which its client imports vLLM in the environment of the training; but each of
the two takes versions of transformers that the other does not. Here the adapter is handed over instead, as files, which
vLLM loads while it runs (`/v1/load_lora_adapter`). The rest is TRL's own: the requests, the order of answers in a group
of processes, and the correction for what trainer and server calculate differently.

    gpus = part_accelerators(args)  # before CUDA starts
    with serving(args, machine, gpus, tokens=longest) as server, answered_by(server, args):
        trainer = GRPOTrainer(args=GRPOConfig(use_vllm=True, vllm_mode="server", ...), callbacks=callbacks(server))

The server is one that the operator runs (`vllm_server_base_url`), or this process starts it with the Python of another
environment (`$DEEPE_SERVER_PYTHON`), on accelerators of its own. It is part of the job then: its end is the job's end,
and what it writes stands in `vllm-server.log` beside the adapter. Where the training's own environment has vLLM, TRL's
way is there too, whole weights included: `vllm=true` and `vllm_mode=server`.
torch and its relatives are imported inside functions.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepe
from deepe_adapters import start_of
from deepe_addresses import AddressPolicy, AddressRefused, opener
from deepe_distributed import is_divided
from deepe_log import remark
from deepe_options import options_of
from deepe_rows import Refused
from deepe_whole import trains_whole

PYTHON = "DEEPE_SERVER_PYTHON"
LOG = "vllm-server.log"
ADAPTERS = ".vllm"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
SERVED = ("lora", "rslora")  # kinds that leave the base as it is, and that vLLM loads
UNSERVED = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")
WANTED = (
    "vllm serve BASE --enable-lora --max-lora-rank RANK --logprobs-mode processed_logprobs --max-logprobs -1, with "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and VLLM_SERVER_DEV_MODE=1 in its environment"
)
OF_TRAINING = ("PYTHON", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
OF_ENVIRONMENT = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "CONDA_PROMPT_MODIFIER", "CONDA_SHLVL")
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_END = 20
LAST_LINES = 15


def is_asked(args: argparse.Namespace) -> bool:
    return bool(args.vllm == "server")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be answered by a server."""
    given = options_of(args).given
    if not is_asked(args):
        if "vllm_server_base_url" in given and given.get("vllm_mode") != "server":
            raise Refused("vllm_server_base_url has no effect without vllm=server; set both, or leave it out")
        return
    if given.get("vllm_mode", "server") != "server":
        raise Refused(f"vllm_mode={given['vllm_mode']} contradicts vllm=server; leave one of them out")
    if trains_whole(args):
        raise Refused(
            f"vllm=server is handed the adapter that learns, and finetuning_type={args.finetuning_type} has none; "
            "choose lora, or leave vllm at auto"
        )
    if args.adapter not in SERVED or args.new_tokens:
        asked = f"adapter={args.adapter}" if args.adapter not in SERVED else "new_tokens"
        raise Refused(
            f"vllm=server answers from the base model's own files and an adapter of LoRA, and {asked} needs more; "
            f"choose {' or '.join(SERVED)} without new_tokens, or leave vllm at auto"
        )
    if is_divided():
        raise Refused("vllm=server needs the whole adapter in one process; choose distributed_strategy=ddp")
    _check_adapter({**_adapter_before(args), **{name: given[name] for name in (*UNSERVED, "bias") if name in given}})
    if not given.get("vllm_server_base_url") and not os.environ.get(PYTHON):
        raise Refused(
            f"vllm=server starts a server with the Python of an environment that has vLLM, which {PYTHON} names in a "
            "job (vllm_environment); by hand, set it, or give vllm_server_base_url"
        )


def _adapter_before(args: argparse.Namespace) -> dict[str, Any]:
    start = start_of(args)
    return {} if start is None else dict(json.loads((start / "adapter_config.json").read_text("utf-8")))


def _check_adapter(settings: dict[str, Any]) -> None:
    wrong = [name for name in UNSERVED if settings.get(name)]
    if settings.get("bias") not in (None, "none"):
        wrong.append("bias")
    if wrong:
        raise Refused(f"vLLM serves no adapter with {wrong[0]}; leave it out, or leave vllm at auto")
    if int(settings.get("r") or 0) > RANKS[-1]:
        raise Refused(f"vLLM serves adapters of a rank up to {RANKS[-1]}, this one has {settings['r']}")


# --- accelerators ---------------------------------------------------------------------------------------------------


def part_accelerators(args: argparse.Namespace) -> list[str]:
    """Leave the last GPUs to the server, before CUDA starts; return them. None at all: both compute on the CPU."""
    if not is_asked(args) or options_of(args).given.get("vllm_server_base_url"):
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    wanted = int(options_of(args).given.get("vllm_tensor_parallel_size", 1))
    if not torch.cuda.device_count():
        return []
    if len(there) <= wanted:
        raise Refused(
            f"vllm=server needs {wanted} GPU{'s' if wanted > 1 else ''} for the server beside those that train, and "
            f"{len(there)} {'are' if len(there) > 1 else 'is'} there: ask for more accelerators, or take vllm=true "
            "in an environment that has vLLM, which shares the GPU"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(there[:-wanted])
    return there[-wanted:]


# --- the server -----------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server that answers. `process` None: it is not ours to end."""

    url: str
    process: "subprocess.Popen[bytes] | None" = None
    log: Path | None = None
    step: int = 0
    leave: Callable[[], None] = lambda: None
    """Has it forget the adapter that it was handed."""

    def ended(self) -> str:
        """Return what its end looks like, an empty text while it runs or is not ours."""
        if self.process is None or self.process.poll() is None:
            return ""
        assert self.log is not None
        lines = self.log.read_text("utf-8", "replace").rstrip().splitlines()[-LAST_LINES:]
        said = "\n".join(lines)
        return f"the vLLM server ended with code {self.process.returncode}; its last lines ({self.log}):\n{said}"

    def trouble(self, error: Exception) -> str:
        """Return why a request failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # its end closes the connection a moment before
            if self.process is not None:
                self.process.wait(SECONDS_BETWEEN_LOOKS)
        return self.ended() or f"the vLLM server at {self.url} did not answer: {error}"

    def end(self) -> None:
        """End the server and what it has started. One that is not ours forgets the adapter."""
        if self.process is None:
            with contextlib.suppress(Refused):
                self.leave()
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_END)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def serving(args: argparse.Namespace, machine: Any, gpus: list[str], *, tokens: int) -> Iterator[Server | None]:
    """Yield the server that answers, None where the model answers by itself; `tokens` is the longest sequence.

    In a group of processes the first one speaks to it, the others are given its answers.
    """
    if not is_asked(args):
        yield None
        return
    url = options_of(args).given.get("vllm_server_base_url")
    server = Server(str(url).rstrip("/") if url else "")
    if not deepe.is_first():
        yield server
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(deepe.STOPPED))  # until the training catches it
    if not url:
        server = _started(args, machine, gpus, tokens=tokens)
    try:
        _wait(server, args)
        _check_served(server)
        yield server
    finally:
        server.end()
        shutil.rmtree(Path(args.output_dir) / ADAPTERS, ignore_errors=True)


def _started(args: argparse.Namespace, machine: Any, gpus: list[str], *, tokens: int) -> Server:
    python = Path(os.environ[PYTHON])
    given = options_of(args).given
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = int(_adapter_before(args).get("r") or given.get("r") or args.lora_rank)
    command = [
        *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(args.model_path)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", machine.dtype, "--max-model-len", str(tokens)),
        *("--enable-lora", "--max-lora-rank", str(next(size for size in RANKS if size >= rank))),
        *("--gpu-memory-utilization", str(given.get("vllm_gpu_memory_utilization", 0.9))),
        *("--tensor-parallel-size", str(given.get("vllm_tensor_parallel_size", 1))),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
    ]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(OF_TRAINING)
        and name not in OF_ENVIRONMENT
        # what finds the processes of the job must find the server, too; it reports nothing by itself
        and (not name.startswith("DEEPE_") or name == "DEEPE_ATTEMPT")
    }
    environment |= {
        "PATH": os.pathsep.join((str(python.parent), os.environ.get("PATH") or os.defpath)),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
    }
    log = Path(args.output_dir) / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    # A stop reaches every process of the job. The step that is under way still needs answers: the training ends the
    # server after it. The mask of blocked signals is inherited; so would be that SIGINT is ignored, as in what a shell
    # has started in the background.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
            )
    except OSError as error:
        raise Refused(f"the vLLM server cannot be started with {python}: {error}") from error
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if interrupt is None else interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    deepe.artifact(log, "log")
    where = f" on GPU {', '.join(gpus)}" if gpus else ""
    remark(f"a vLLM server starts{where} ({python}); what it says stands in {LOG}", args, warning=False)
    return Server(f"http://127.0.0.1:{port}", process, log)


def _wait(server: Server, args: argparse.Namespace) -> None:
    """Wait until the server answers: one of ours as long as it runs, another one for `vllm_server_timeout`."""
    patience = float(options_of(args).given.get("vllm_server_timeout", 240))
    began = time.monotonic()
    while True:
        try:
            with _opened(server, f"{server.url}/health", timeout=10):
                return
        except (OSError, ValueError) as error:
            if ended := server.ended():
                raise Refused(ended) from error
            if isinstance(getattr(error, "reason", None), AddressRefused):
                raise Refused(f"the vLLM server at {server.url} may not be called: {error}") from error
            if server.process is None and time.monotonic() - began >= patience:
                raise Refused(
                    f"no vLLM server answers at {server.url} ({error}); start one ({WANTED}), or leave "
                    "vllm_server_base_url out"
                ) from error
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _opened(server: Server, request: Any, *, timeout: float) -> Any:
    """Open an address of the server: of one that the job names if it may be called, of our own in any case."""
    own = AddressPolicy.ANY if server.process is not None else None
    return opener(own).open(request, timeout=timeout)


def _check_served(server: Server) -> None:
    """Refuse a server that takes no adapters, or gives other probabilities than those that it draws from."""
    mode = _asked(server, "/server_info?config_format=json")
    takes = _asked(server, "/v1/load_lora_adapter", {}) is not None
    if mode is None or not takes:
        raise Refused(f"the vLLM server at {server.url} takes no adapters while it runs; start it so: {WANTED}")
    found = mode["vllm_config"]["model_config"].get("logprobs_mode")
    if found != "processed_logprobs":
        raise Refused(f"the vLLM server at {server.url} runs with --logprobs-mode {found}; start it so: {WANTED}")


def _asked(server: Server, path: str, content: Any = None) -> Any:
    """Return the answer of an address of the server, None if there is no such address."""
    body = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"})
    try:
        with _opened(server, request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return None if error.code == 404 else {}
    except (OSError, ValueError) as error:
        raise Refused(server.trouble(error)) from error


# --- TRL ------------------------------------------------------------------------------------------------------------


def configuration() -> dict[str, Any]:
    """Return the settings of TRL's configuration for a trainer that is made within `answered_by`."""
    return {"use_vllm": True, "vllm_mode": "server"}


@contextlib.contextmanager
def answered_by(server: Server | None, args: argparse.Namespace) -> Iterator[None]:
    """Let the trainers that are made here have their answers of the server."""
    if server is None:
        yield
        return
    from trl.trainer import grpo_trainer

    own = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = _generation(server, args)
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = own


def _generation(server: Server, args: argparse.Namespace) -> Any:
    """Return TRL's class of what makes answers, which hands adapters over instead of weights."""
    import requests
    from requests.adapters import HTTPAdapter
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration
    from urllib3.util.retry import Retry

    class Client(VLLMClient):
        """TRL's client without its way of handing weights over, which needs vLLM in this environment."""

        def __init__(self) -> None:
            self.session = requests.Session()
            if server.process is None:  # a proxy in between may be busy; one of ours answers or has ended
                again = Retry(total=5, backoff_factor=2, status_forcelist=[502, 503], allowed_methods=None)
                self.session.mount(server.url, HTTPAdapter(max_retries=again, pool_maxsize=64))
            self.base_url = server.url
            self.communicator = None
            self.model = self._get(f"{server.url}/v1/models")["data"][0]["id"]

        def _post(self, url: str, **named: Any) -> Any:
            try:
                return super()._post(url, **named)
            except Exception as error:
                raise Refused(server.trouble(error)) from error

        def change_adapter(self, verb: str, **content: str) -> None:
            try:
                answer = self.session.post(f"{server.url}/v1/{verb}_lora_adapter", json=content)
            except requests.RequestException as error:
                raise Refused(server.trouble(error)) from error
            if not answer.ok:
                raise Refused(
                    f"the vLLM server at {server.url} does not {verb} the adapter {content}: {answer.text}. It must "
                    "see this folder: it runs on this machine, or on the same storage"
                )

    class ByAdapter(VLLMGeneration):
        """Hands the adapter over before the first answers of a step."""

        def _init_vllm(self) -> None:
            self._folder = Path(args.output_dir).resolve() / ADAPTERS
            self._run, self._handed, self._turn = uuid.uuid4().hex[:8], 0, 0
            self._named: tuple[str, Path] | None = None
            if self.accelerator.is_main_process:
                self.vllm_client = Client()
                server.leave = self.leave_adapter
            self.accelerator.wait_for_everyone()

        def sync_weights(self) -> None:
            self._turn = 0
            if not self.accelerator.is_main_process:
                return
            self._handed += 1
            name = f"deepe-{self._run}-{self._handed}"
            folder = self._folder / name
            self.model.save_pretrained(folder, selected_adapters=["default"])
            self.vllm_client.change_adapter("load", lora_name=name, lora_path=str(folder))
            self.vllm_client.model = name
            self.leave_adapter()
            self._named = name, folder

        def leave_adapter(self) -> None:
            """Have the server forget the adapter that it was handed last."""
            if self._named is not None:
                self.vllm_client.change_adapter("unload", lora_name=self._named[0])
                shutil.rmtree(self._named[1], ignore_errors=True)
                self._named = None

        def generate(self, *given: Any, **named: Any) -> Any:
            own = self.generation_kwargs
            seed = (args.seed * 1_000_003 + server.step * 1009 + self._turn) % 2**31
            self.generation_kwargs = {"seed": seed, **own}
            self._turn += 1
            try:
                return super().generate(*given, **named)
            finally:
                self.generation_kwargs = own

    return ByAdapter


def callbacks(server: Server | None) -> list[Any]:
    """Return what tells at which step answers are drawn: equal steps draw equal answers."""
    if server is None:
        return []
    from transformers import TrainerCallback

    class Step(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            server.step = state.global_step

    return [Step()]
