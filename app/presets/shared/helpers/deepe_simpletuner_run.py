"""A process of SimpleTuner, from its start to its end: its webhook's events in, what they say out. Standard library.

SimpleTuner's exit code is 0 after most failures, so a run has succeeded when it said that the training is complete,
ended with 0, and wrote new weights. It posts every step to the webhook and waits for the answer: a stop is carried out
there, between two steps, when no file is half written. It takes no request for a checkpoint from outside; one that is
due within seconds is awaited, else the last one of `save_steps` is what a stop leaves.
"""

import contextlib
import json
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from deepe_simpletuner import Plan, command, environment, write_configuration

STOP_SECONDS = 6.0  # the platform's grace is 10 s unless the operator has set it
ANSWER_SECONDS = 4.0  # SimpleTuner waits 5 s for the answer to a post
TAIL = 40
SHOWN = 10


class Failed(Exception):
    """SimpleTuner did not come to its end; the text says why."""


@dataclass(frozen=True)
class Step:
    """What SimpleTuner posts after a step."""

    number: int
    total: int
    values: dict[str, float]


class Post:
    """One event of SimpleTuner, which waits until it is answered."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.answered = threading.Event()


def read_step(body: Mapping[str, Any]) -> Step | None:
    """Return the step that an event tells of, if it tells of one."""
    progress = body.get("progress")
    if body.get("type") != "training.status" or not isinstance(progress, dict):
        return None
    number, total = progress.get("current"), progress.get("total")
    if not isinstance(number, int) or not isinstance(total, int):
        return None
    metrics = progress.get("metrics")
    values = {
        name: value
        for name, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Step(number, total, values)


class Run:
    """One process of SimpleTuner, from its start to its end."""

    def __init__(
        self,
        plan: Plan,
        *,
        on_step: Callable[[Step], None],
        on_checkpoint: Callable[[Path], None],
        on_stage: Callable[[str], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.plan = plan
        self.pid: int | None = None
        self.stopped_at: int | None = None
        self._on_step, self._on_checkpoint, self._on_stage = on_step, on_checkpoint, on_stage
        self._stop_requested = stop_requested
        self._inbox: queue.Queue[Post] = queue.Queue()
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._error = ""
        self._complete = False
        self._last: Step | None = None
        self._last_time = self._seconds = 0.0
        self._stage = ""

    def to_the_end(self, train_py: Path) -> bool:
        """Run until it has ended; return False if it was stopped on request, raise `Failed` if it failed."""
        weights = self.plan.output / "pytorch_lora_weights.safetensors"
        weights.unlink(missing_ok=True)  # of an earlier run; new ones are the proof
        server = Receiver(self._inbox)
        write_configuration(self.plan, server.url)
        process = subprocess.Popen(
            command(self.plan, train_py),
            cwd=self.plan.work,
            env=environment(self.plan, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = process.pid
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            self._attend(process)
        finally:
            end(process)
            server.close()
        reader.join(timeout=5)
        if self.stopped_at is None and process.returncode == 0 and self._complete and weights.is_file():
            return True
        if self.stopped_at is None and not self._stop_requested():
            raise Failed(self._why(process.returncode))
        self.stopped_at = self.stopped_at if self.stopped_at is not None else self._number()
        return False

    def _attend(self, process: "subprocess.Popen[bytes]") -> None:
        """Answer the posts until the process has ended or was stopped."""
        asked: float | None = None
        while process.poll() is None or not self._inbox.empty():
            if asked is None and self._stop_requested():
                asked = time.monotonic()
            if asked is not None and (self._last is None or time.monotonic() - asked > STOP_SECONDS):
                self.stopped_at = self._number()
                return
            try:
                post = self._inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            self._take(post.body)
            if asked is not None and self._may_stop(post.body, asked):
                self.stopped_at = self._number()
                return
            post.answered.set()

    def _number(self) -> int:
        return self._last.number if self._last else 0

    def _take(self, body: dict[str, Any]) -> None:
        step = read_step(body)
        if step is not None and (self._last is None or step.number > self._last.number):
            now = time.monotonic()
            self._seconds = now - self._last_time if self._last else 0.0
            self._last, self._last_time = step, now
            self._on_step(step)
        match body.get("type"):
            case "training.checkpoint":
                self._on_checkpoint(Path(str((body.get("checkpoint") or {}).get("path"))))
            case "training.status":
                data = body.get("data") or {}
                if "failed" in str(data.get("status")):
                    self._error = str(data.get("error") or "")
            case "lifecycle.stage":
                stage = body.get("stage") or {}
                key = str(stage.get("key"))
                self._complete = self._complete or key == "training_complete"
                if key != self._stage:
                    self._stage = key
                    self._on_stage(str(stage.get("label") or key))

    def _may_stop(self, body: Mapping[str, Any], asked: float) -> bool:
        """Whether the process waits for us between two steps, and no checkpoint is due within seconds."""
        if body.get("type") == "training.checkpoint":
            return True
        step = read_step(body)
        if step is None:
            return False
        left = -step.number % self.plan.save_steps  # 0: this step's checkpoint is written next
        return time.monotonic() + left * self._seconds > asked + STOP_SECONDS

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in clean_lines(process.stdout):
            self._tail.append(line)
            print(line, flush=True)

    def _why(self, code: int | None) -> str:
        last = "\n".join(list(self._tail)[-SHOWN:])
        if not self._error and code == 0 and self._complete:
            return "SimpleTuner said that it is done, but wrote no weights"
        reason = self._error or next((line for line in reversed(self._tail) if "rror" in line), "")
        how = f"ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how = "killed, as the operating system does when it is out of memory"
        return f"SimpleTuner failed ({how}): {reason or last or 'it said nothing'}"


class Receiver:
    """Takes SimpleTuner's posts on a free port of the loopback; the address holds a secret, so no one else posts."""

    def __init__(self, inbox: "queue.Queue[Post]") -> None:
        path = f"/{secrets.token_urlsafe(16)}"

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.path != path:
                    self.send_error(404)
                    return
                try:
                    document = json.loads(body)
                except ValueError:
                    document = None
                if isinstance(document, dict):
                    post = Post(document)
                    inbox.put(post)
                    post.answered.wait(ANSWER_SECONDS)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{path}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the process with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"\d+%\|")


def clean_lines(stream: Any) -> Iterator[str]:
    """Yield the lines of an output without colours and without progress bars."""
    for raw in stream:
        for part in _CODES.sub("", raw.decode("utf-8", "replace")).split("\r"):
            line = part.rstrip()
            if line and not _BAR.search(line):
                yield line


# --- gauges ---------------------------------------------------------------------------------------------------------


def memory_mib(pid: int | None = None) -> float | None:
    """Return how much memory is used: of the first GPU that may be used, else the most that a process ever had."""
    if (used := _gpu_memory()) is not None:
        return used
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except OSError:  # no Linux, or the process has ended
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(match[1]) / 1024, 1) if match else None


def _gpu_memory() -> float | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = [program, f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout
        return float(answer.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
