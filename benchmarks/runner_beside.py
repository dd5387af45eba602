"""One conversation with DeepExtension's public runner and with ours, side by side: every difference, and three delays.

Theirs is a copy of its folder (`--theirs`, a checkout's `deep-e-python`) under Flask, with a Redis of its own and a
stand-in for `conda run` that is a parent of the script, as conda is. Ours has the same scripts. Differences that
docs/runner.md does not name end the program with 1.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
import psutil
import redis

from benchmarks.reporting import Samples, ms, print_table, ratio
from benchmarks.service import running_service
from tests.servers import free_port, private_redis

DOCUMENTATION: Final = Path(__file__).parents[1] / "docs" / "runner.md"
HEADERS: Final = ("content-type", "cache-control", "x-accel-buffering", "transfer-encoding")
CONDA: Final = """#!/bin/sh
# conda run -n ENVIRONMENT python FILE ARGUMENT...: like conda, a parent that waits and passes no signal on
shift 4
{python} "$@"
"""
HEAD: Final = """
import json, os, subprocess, sys, time
NAME = os.path.basename(sys.argv[0])
with open(f"../seen/{NAME}.json", "w") as file:
    json.dump(sys.argv[1:], file)

def wait_for(gate):
    while not os.path.exists(f"../gates/{gate}"):
        time.sleep(0.01)
"""
SCRIPTS: Final = {
    "b_train": "print('training', flush=True); wait_for('train')",
    "b_train_failing": "sys.exit(3)",
    "b_save": "print(json.dumps({'status': 'success', 'message': 'saved'}))",
    "b_save_text": "print('loading'); print('Model saved successfully')",
    "b_save_object": "print(json.dumps({'message': 'no space', 'status': 'error'}))",
    "b_save_words": "print('hm')",
    "b_save_list": "print('[1, 2]')",
    "b_save_failing": "print('CUDA error', file=sys.stderr); sys.exit(1)",
    "b_deploy": "print(json.dumps({'status': 'success', 'message': 'deployed'}))",
    "b_deploy_noise": "print('uploading'); print(json.dumps({'status': 'success'}))",
    "b_deploy_failing": "print('no route'); sys.exit(1)",
    "b_ask": "print(json.dumps({'status': 'resp', 'text': 'Grüß '}), flush=True);"
    "print('noise'); print(json.dumps({'status': 'resp', 'text': 'Gott'}))",
    "b_ask_noise": "print('the status is fine', flush=True); print(json.dumps({'status': 'resp', 'text': 'x'}))",
    "b_ask_error": "print(json.dumps({'status': 'error', 'error': 'no weights', 'traceback': 'File x'}))",
    "b_ask_failing": "sys.exit(4)",
    "b_draw": "out = sys.argv[sys.argv.index('--output') + 1]; wait_for('draw')\n"
    "for n in (2, 1): open(out.replace('.png', f'_00{n}.png'), 'wb').write(b'png')",
    "b_draw_failing": "sys.exit(1)",
    "b_line": "print('first-line', flush=True)",
    "b_tree": "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "open('../seen/tree', 'w').write(f'{os.getpid()} {child.pid}'); time.sleep(600)",
}


@dataclass
class Side:
    """A runner with the Redis and the folders of its backend."""

    name: str
    client: httpx.Client
    redis: "redis.Redis"
    folder: Path
    output: Callable[[str], bytes]
    """What the script of a task has printed by now."""

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def key(self, task: str) -> Any:
        value = self.redis.get(task)
        return None if value is None else json.loads(str(value))

    def ended(self, task: str) -> Any:
        """Return the key of a task that has ended, None if it has none after a while."""
        with contextlib.suppress(_Silent):
            return _soon(lambda: (key := self.key(task)) and key["status"] != 2 and key)
        return self.key(task)

    def records(self, task: Any) -> list[Any]:
        files = sorted((self.folder / "logs").glob("*-deep-e-python.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line["taskUuid"] == task]

    def seen(self, script: str) -> Any:
        file = self.folder / "seen" / f"{script}.py.json"
        return json.loads(file.read_text()) if file.exists() else None

    def open(self, gate: str) -> None:
        (self.folder / "gates" / gate).touch()


class _Silent(Exception):
    """Something did not come about."""


def _soon(look: Callable[[], Any], seconds: float = 5.0, pause: float = 0.005) -> Any:
    until = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > until:
            raise _Silent
        time.sleep(pause)
    return found


# ---- the two sides ------------------------------


def _place_scripts(root: Path) -> None:
    for name, text in SCRIPTS.items():
        (root / f"{name}.py").write_text(HEAD + text)
    for folder in ("seen", "gates", "logs", "images", "models/base", "models/tuned"):
        (root.parent / folder).mkdir(parents=True, exist_ok=True)


@contextmanager
def theirs(checkout: Path, python: Path) -> Iterator[Side]:
    """Run a copy of their runner; `python` has flask, redis and requests."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        root = folder / "deep-e-python"
        shutil.copytree(checkout, root)
        _place_scripts(root)
        (folder / "bin").mkdir()
        conda = folder / "bin" / "conda"
        conda.write_text(CONDA.format(python=python))
        conda.chmod(0o755)
        stand_ins = folder / "stand-ins"
        stand_ins.mkdir()
        # their runner imports it for the name of one base class
        (stand_ins / "transformers.py").write_text("class TrainerCallback: ...\n")
        (folder / "redis").mkdir()
        server = stack.enter_context(private_redis(folder / "redis"))
        port = free_port()
        environment = {
            **os.environ, "PATH": f"{conda.parent}:{os.environ['PATH']}", "AI_PY_REDIS_HOST": "127.0.0.1",
            "AI_PY_REDIS_START_PORT": str(server.port), "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(stand_ins),
        }  # fmt: skip
        program = f"from app import app; app.run(host='127.0.0.1', port={port}, threaded=True)"
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [str(python), "-c", program], cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(_end, process)
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False))
        while not _answers(client):
            if process.poll() is not None:
                raise SystemExit(f"their runner ended:\n{(folder / 'log').read_text()}")
            time.sleep(0.05)
        keys = redis.Redis(port=server.port, decode_responses=True)
        yield Side("theirs", client, keys, folder, lambda _: (folder / "log").read_bytes())


@contextmanager
def ours() -> Iterator[Side]:
    """Run our service with the runner's port."""
    port = free_port()
    with running_service(redis=True, DEEPE_RUNNER_PORT=str(port), DEEPE_SLOTS="8") as site:
        _place_scripts(site.home / "scripts")
        keys = redis.Redis.from_url(str(site.redis.url), decode_responses=True)

        def output(task: str) -> bytes:
            found = site.get("/jobs", params={"external_id": task})["items"]
            log = site.home / "runs" / found[0]["id"] / "1" / "output.log" if found else None
            return log.read_bytes() if log is not None and log.exists() else b""

        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False) as client:
            yield Side("ours", client, keys, site.home, output)


def _answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return client.get("/health").status_code == 200
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait()


# ---- the conversation ------------------------------


def _training(task: Any, file: Any, **members: Any) -> dict[str, Any]:
    return {
        "train_id": task, "seq": 1, "train_file_name": file, "train_env": "base", "learning_rate": 2e-05,
        "load_in_4bit": True, "max_steps": None, "modules": ["q", "ü"], "max_grad_norm": 10.0, **members,
    }  # fmt: skip


def _saving(task: str, file: str) -> dict[str, Any]:
    return {
        "baseModelPath": "../models/base", "loraAdapterPath": "../models/tuned", "savePath": "../models/whole",
        "modelUsageType": "chat", "trainId": task, "seq": 2, "savePythonFile": file,
    }  # fmt: skip


def _deployment(task: str, file: str, **members: Any) -> dict[str, Any]:
    return {
        "folderPath": "../models/tuned", "serverUrl": "http://ollama:11434", "modelName": "m", "trainId": task,
        "seq": 3, "deployPythonFile": file, "quantize": None, **members,
    }  # fmt: skip


def _question(file: str) -> dict[str, Any]:
    return {
        "modelName": "m", "prompt": "Hi", "baseModelPath": "../models/base", "promptFile": file,
        "history": [{"role": "user", "content": "ü"}], "resetContext": True,
    }  # fmt: skip


def _drawing(file: str) -> dict[str, Any]:
    return {
        "promptFile": file, "condaEnv": "base", "model": "m", "loraPath": "l", "prompt": "cat", "negativePrompt": "",
        "batchSize": "2", "aspectRatio": "1:1",
    }  # fmt: skip


def _answer(answer: httpx.Response) -> dict[str, Any]:
    headers = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
    # a bare newline between or behind frames says only how long nothing came
    body = re.sub(r"(?<=\n{4})\n+", "", answer.content.decode())
    return {"status": answer.status_code, "headers": headers, "body": body}


def _task(side: Side, task: str, answer: httpx.Response, script: str) -> dict[str, Any]:
    """Return everything that a task left behind."""
    return {**_answer(answer), "key": side.ended(task), "records": side.records(task), "seen": side.seen(script)}


def _train(side: Side) -> dict[str, Any]:
    answer = side.post("/transferTrain", _training("t-1", "b_train.py", training_name="T", train_name="faq"))
    running = _soon(lambda: (key := side.key("t-1")) and key["pid"] and key, 60)
    polled = json.loads(side.client.get("/trainingStatus/t-1").content)
    side.open("train")
    found = _task(side, "t-1", answer, "b_train")
    return {**found, "running": running, "polled": polled, "after": side.client.get("/trainingStatus/t-1").text}


def _trained(task: Any, file: Any, **members: Any) -> Callable[[Side], dict[str, Any]]:
    def step(side: Side) -> dict[str, Any]:
        answer = side.post("/transferTrain", _training(task, file, **members))
        return _task(side, task, answer, str(file).removesuffix(".py"))

    return step


def _blocking(path: str, body: Mapping[str, Any]) -> Callable[[Side], dict[str, Any]]:
    file = str(body.get("savePythonFile") or body.get("deployPythonFile"))
    return lambda side: _task(side, str(body["trainId"]), side.post(path, body), file)


def _asked(path: str, body: Any) -> Callable[[Side], dict[str, Any]]:
    file = str(body.get("promptFile"))
    return lambda side: {**_answer(side.post(path, body)), "seen": side.seen(file)}


def _drawn(body: Mapping[str, Any], *, gate: str | None = None) -> Callable[[Side], dict[str, Any]]:
    def step(side: Side) -> dict[str, Any]:
        answer = side.post("/imageProcessingByModel", body)
        (address,) = answer.json()["data"]["imageUrlList"]
        task = address.rpartition("/")[2]
        early = None if gate is None else _soon(lambda: side.key(task)) and _answer(side.client.get(address))
        if gate is not None:
            side.open(gate)
        key = side.ended(task)
        late = _answer(side.client.get(address))
        seen = side.seen(str(body.get("promptFile")))
        return {**_answer(answer), "key": key, "early": early, "late": late, "seen": seen}

    return step


def _sent(path: str, kind: str, content: bytes) -> Callable[[Side], dict[str, Any]]:
    return lambda side: _answer(side.client.post(path, headers={"content-type": kind}, content=content))


def _got(path: str, method: str = "GET") -> Callable[[Side], dict[str, Any]]:
    return lambda side: _answer(side.client.request(method, path))


_BAD: Final = (("text/plain", b"{}"), ("application/json", b"{"), ("application/json", b"[]"))
STEPS: Final[Mapping[str, Callable[[Side], dict[str, Any]]]] = {
    "health": _got("/health"),
    "health by POST": _got("/health", "POST"),
    "unknown route": _got("/nothing"),
    "train": _train,
    "train, exit 3": _trained("t-2", "b_train_failing.py"),
    "train, no such file": _trained("t-3", "absent.py"),
    "train, no file named": _trained("t-4", None),
    "train, a value over 128 KiB": _trained("t-5", "b_line.py", big="x" * 140_000),
    "train, members missing": lambda side: _answer(side.post("/transferTrain", {"train_id": "t-6"})),
    "status of nothing": _got("/trainingStatus/none"),
    **{f"merge, {file}": _blocking("/mergeModel", _saving(f"m-{file}", file)) for file in SCRIPTS if "save" in file},
    "merge, members missing": _blocking("/mergeModel", {"trainId": "m-0"}),
    **{
        f"deploy, {file}": _blocking("/deployModel", _deployment(f"d-{file}", file))
        for file in SCRIPTS
        if "deploy" in file
    },
    "deploy, no such folder": _blocking("/deployModel", _deployment("d-1", "b_deploy", folderPath="../models/gone")),
    "deploy, members missing": _blocking("/deployModel", {"trainId": "d-0", "seq": 1}),
    **{f"chat, {file}": _asked("/chat", _question(file)) for file in SCRIPTS if "ask" in file},
    "chat, no base model": _asked("/chat", {"modelName": "m", "prompt": "p"}),
    "chat, members missing": _asked("/chat", {"prompt": "p"}),
    "chatTest": _asked("/chatTest", _question("b_ask")),
    "pictures": _drawn(_drawing("b_draw"), gate="draw"),
    "pictures, exit 1": _drawn(_drawing("b_draw_failing")),
    "pictures, nothing given": _drawn({}),
    "pictures of nothing": _got("/getGeneratedImages/none"),
    **{
        f"{path}, {kind} {content.decode()}": _sent(path, kind, content)
        for path in ("/transferTrain", "/mergeModel", "/deployModel", "/chat", "/imageProcessingByModel")
        for kind, content in _BAD
    },
}
_MISSING: Final = "file or environment missing, argument over 128 KiB"
_STREAMS: Final = "`error` of a failed saving; `stdout`, `stderr` of a failed deployment"
_REASON: Final = "reason in record 120005"
_TRACEBACK: Final = "`finish_reason` of an internal error, `error` of a bad body"
DOCUMENTED: Final = (
    ("health by POST|unknown route", "body", "pages of HTTP errors"),
    ("/(transferTrain|mergeModel|deployModel), application/json \\[\\]", "body", "pages of HTTP errors"),
    ("train, (no such file|no file named|a value over 128 KiB)", "key|records", _MISSING),
    ("train, exit 3", "records", _REASON),
    ("merge, b_save_(object|words|list|failing)", "records", _REASON),
    ("merge, b_save_(words|failing)", "body", _STREAMS),
    ("merge, b_save_list", "status|body", "a list as result"),
    ("deploy, b_deploy_failing", "body", _STREAMS),
    ("deploy, b_deploy_failing", "records", _REASON),
    ("deploy, no such folder", "status|body|key|records|seen", "`folderPath` that is no folder"),
    ("deploy, members missing", "body|records", "members missing in `/deployModel`"),
    ("chat, b_ask_noise", "body", "noise that holds the word `status`"),
    ("chat, b_ask_failing", "body", "question whose script fails without an error line"),
    ("chat, no base model|/chat, .*", "body", _TRACEBACK),
    ("chatTest", "body", "`/chatTest`"),
    ("pictures", "late", "list of pictures"),
    ("pictures, nothing given", "key|late", "numbers and absent members in `/imageProcessingByModel`"),
    ("/imageProcessingByModel, application/json \\[\\]", "body", "array as body of `/imageProcessingByModel`"),
)
"""Steps and members that may differ (patterns), with the subject of the row in docs/runner.md that says so."""


def _plain(value: Any, side: Side) -> Any:
    """Return what was observed without what differs at every run: ids, processes, times, places."""
    match value:
        case dict():
            return {
                name: "PID"
                if name == "pid" and one
                else "TIME"
                if name in ("time", "updateTime")
                else _plain(one, side)
                for name, one in value.items()
            }
        case list():
            return [_plain(one, side) for one in value]
        case str():
            text = re.sub(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", "ID", value)
            text = text.replace(str(side.folder), "HOME").replace(os.path.realpath(side.folder), "HOME")
            return re.sub(r'"(updateTime)":"[^"]*"', r'"\1":"TIME"', text)
        case _:
            return value


def compare(first: Side, second: Side) -> list[tuple[str, str, str, str]]:
    """Return step, what differs, and both values as text."""
    found = []
    for step, act in STEPS.items():
        seen = []
        for side in (first, second):
            try:
                seen.append(_plain(act(side), side))
            except (httpx.HTTPError, _Silent, json.JSONDecodeError) as error:
                seen.append({"failed": f"{type(error).__name__}: {error}"})
        for name in dict.fromkeys([*seen[0], *seen[1]]):
            left, right = (json.dumps(one.get(name), ensure_ascii=False) for one in seen)
            if left != right:
                found.append((step, name, left, right))
    return found


# ---- delays ------------------------------


def first_line(side: Side, samples: Samples) -> None:
    """Measure from a call until the first line of its script can be read."""
    task, before = str(uuid4()), side.output("").count(b"first-line")
    with samples.measure():
        side.post("/transferTrain", {"train_id": task, "seq": 1, "train_file_name": "b_line.py", "train_env": "base"})
        _soon(lambda: side.output(task).count(b"first-line") > before, 60, 0.002)


def first_frame(side: Side, samples: Samples) -> None:
    """Measure from a question until the first frame of its answer."""
    with samples.measure(), side.client.stream("POST", "/chat", json=_question("b_ask")) as stream:
        received = b""
        for piece in stream.iter_raw():
            received += piece
            if b"data: " in received:
                break


def tree_gone(side: Side, samples: Samples) -> None:
    """Measure from TERM on the published pid until script and child are gone; nothing if they stay."""
    task, tree = str(uuid4()), side.folder / "seen" / "tree"
    tree.unlink(missing_ok=True)
    side.post("/transferTrain", {"train_id": task, "seq": 1, "train_file_name": "b_tree.py", "train_env": "base"})
    _soon(lambda: tree.exists() and len(tree.read_text().split()) == 2, 60)
    pids = [int(pid) for pid in tree.read_text().split()]
    pid = _soon(lambda: (key := side.key(task)) and key["pid"], 60)
    begun = time.perf_counter()
    os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(_Silent):
        _soon(lambda: not any(map(_runs, pids)), 5, 0.002)
        samples.seconds.append(time.perf_counter() - begun)
    for one in pids:
        with contextlib.suppress(OSError):
            os.kill(one, signal.SIGKILL)


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def main() -> int:
    """Print the differences and the delays; 1: there are differences that the documentation does not name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theirs", type=Path, help="the folder deep-e-python of a checkout of DeepExtension")
    parser.add_argument("--their-python", type=Path, default=Path(sys.executable), help="has flask, redis, requests")
    parser.add_argument("--rounds", type=int, default=10, help="of each delay; 0: none")
    options = parser.parse_args()
    if options.theirs is None or not (options.theirs / "app.py").is_file():
        print("skipped: name the folder deep-e-python of a checkout of DeepExtension with --theirs")
        return 0
    with theirs(options.theirs, options.their_python) as first, ours() as second:
        unknown = report(compare(first, second))
        rows = []
        for title, measure in (("first line", first_line), ("first frame", first_frame), ("tree gone", tree_gone)):
            samples = [Samples(), Samples()]
            for _ in range(options.rounds):
                for side, taken in zip((first, second), samples, strict=True):
                    measure(side, taken)
            cells = [ms(one.median) if one.seconds else "stays" for one in samples]
            rows.append((title, *cells, ratio(samples[1].median, samples[0].median) if samples[0].seconds else "-"))
        print_table("milliseconds, medians", ("", "theirs", "ours", "ours / theirs"), rows)
    return 1 if unknown else 0


def report(differences: list[tuple[str, str, str, str]]) -> int:
    """Print the differences; return how many the documentation does not name."""
    subjects = {line.split("|")[1].strip() for line in DOCUMENTATION.read_text().splitlines() if line.count("|") > 3}
    unknown = 0
    for step, name, left, right in differences:
        rows = (row for row in DOCUMENTED if re.fullmatch(row[0], step) and re.fullmatch(row[1], name))
        subject = next((row[2] for row in rows), None)
        if subject in subjects:
            print(f"as documented ({subject}): {step}: {name}")
        else:
            unknown += 1
            print(f"NOT DOCUMENTED: {step}: {name}\n  theirs {left:.600}\n  ours   {right:.600}")
    print(f"{len(STEPS)} steps, {len(differences)} differences, {unknown} of them not documented")
    return unknown


if __name__ == "__main__":
    sys.exit(main())
