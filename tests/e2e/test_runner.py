"""DeepExtension's backend talks to the service on the runner's port: every route, with a real worker and Redis."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from app.cli.private_redis import RedisChoice, RedisKind
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.servers import free_port, private_redis
from tests.waiting import wait_until

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("e2e-runner")]

FRAME_END = b"\n\n\n\n"
# what every script of these tests begins with: it writes its arguments down and can wait for the test
HEAD = """
import json, os, socket, sys, time
HERE = os.path.abspath("..")

def wait_for(gate):
    while not os.path.exists(f"{HERE}/gates/{gate}"):
        time.sleep(0.02)

def tell_redis(key, status):
    value = json.dumps({"status": status, "updateTime": "now", "pid": 0})
    words = ["SET", key, value]
    text = f"*{len(words)}\\r\\n" + "".join(f"${len(word)}\\r\\n{word}\\r\\n" for word in words)
    address = os.environ["AI_PY_REDIS_HOST"], int(os.environ["AI_PY_REDIS_START_PORT"])
    with socket.create_connection(address) as connection:
        connection.sendall(text.encode())
        connection.recv(100)

with open(f"{HERE}/seen/{os.path.basename(sys.argv[0])}-{os.environ['DEEPE_JOB_ID']}", "w") as file:
    json.dump({"argv": sys.argv[1:], "cwd": os.getcwd(), "output": os.environ["DEEPE_OUTPUT_DIR"]}, file)
"""
SCRIPTS = {
    "train.py": """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10_000)"])
print("training", child.pid, flush=True)
wait_for("train")
child.kill()
os.makedirs("../models/tuned", exist_ok=True)
open("../models/tuned/adapter.bin", "w").write("x")
""",
    "train_failing.py": "print('out of luck'); sys.exit(3)",
    "train_redis.py": "tell_redis(sys.argv[1].split('=', 1)[1], 3)",
    "train_quick.py": "",
    "linux_code/save_model.py": """
print("loading weights")
wait_for("save")
print(json.dumps({"status": "success", "message": "saved", "dtype_used": "bfloat16"}))
""",
    "save_object.py": "print(json.dumps({'message': 'no space', 'status': 'error'}))",
    "save_words.py": "print('nothing was said')",
    "save_list.py": "print(json.dumps([1, 2]))",
    "save_failing.py": "print('CUDA error', file=sys.stderr); sys.exit(1)",
    "save_text.py": "tell_redis(sys.argv[2], 3); print('Model saved successfully')",
    "qwen_inference.py": """
wait_for("chat")
print('{"status": "resp", "text": "Gr\\\\u00fc\\\\u00df "}', flush=True)
print("noise with status in it", flush=True)
wait_for("chat-more")
print(json.dumps({"status": "resp", "text": "Gott"}))
""",
    "ask_error.py": "print(json.dumps({'status': 'error', 'error': 'no weights', 'traceback': 'File x'}))",
    "ask_failing.py": "sys.exit(4)",
    "deploy_ollama.py": "print(json.dumps({'status': 'success', 'message': 'deployed'}))",
    "deploy_noise.py": "print('uploading'); print(json.dumps({'status': 'success'}))",
    "deploy_object.py": "print(json.dumps({'status': 'failed', 'message': 'refused'}))",
    "deploy_failing.py": "print('no route'); sys.exit(1)",
    "deploy_words.py": "print('hm')",
    "tool/__init__.py": "",
    "tool/train.py": "from . import __name__ as package; print('FORM', json.dumps([sys.argv[1:], package]))",
    "deploy_json.py": """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--parameters", type=json.loads)
parser.add_argument("--system", default="")
print(json.dumps({"status": "success", "got": parser.parse_known_args()[0].parameters}))
""",
    "deploy_text.py": """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--parameters", type=str, default="")
print(json.dumps({"status": "success", "got": parser.parse_known_args()[0].parameters}))
""",
    "draw.py": """
wait_for("draw")
stem = sys.argv[sys.argv.index("--output") + 1].removesuffix(".png")
for number in (2, 1):
    open(f"{stem}_00{number}.png", "wb").write(b"png")
""",
    "draw_failing.py": "sys.exit(1)",
}


@dataclass
class Backend:
    """DeepExtension's backend: a client of the port, and the Redis and files that it looks into."""

    site: Installation
    client: httpx.Client
    redis: "redis.Redis"
    threads: list[threading.Thread] = field(default_factory=list)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def later(self, path: str, body: Any) -> "Later":
        """Send a request that blocks."""
        later = Later()
        later.thread = threading.Thread(target=lambda: later.answers.append(self.post(path, body)))
        later.thread.start()
        return later

    def status(self, task: str) -> Any:
        answer = self.client.get(f"/trainingStatus/{task}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait_for_status(self, task: str, status: int) -> Any:
        def look() -> Any:
            found = self.status(task)
            return found if found and found["status"] == status else None

        return wait_until(look, f"status {status} of {task}", self.site.report)

    def key(self, task: str) -> Any:
        value = self.redis.get(task)
        return None if value is None else json.loads(str(value))

    def open(self, gate: str) -> None:
        (self.site.home / "gates" / gate).touch()

    def seen(self, job: str) -> Any:
        """Return what the script of a job wrote down."""
        (file,) = (self.site.home / "seen").glob(f"*-{job}")
        return json.loads(file.read_text())

    def job_of(self, task: str) -> Any:
        """Return the newest job of a task."""
        return self.site.get("/jobs", params={"external_id": task})["items"][0]

    def jobs(self, *stages: str) -> list[Any]:
        found: list[Any] = self.site.get("/jobs", params={"stage": stages, "limit": 200})["items"]
        return found

    def records(self, task: str) -> list[Any]:
        """Return the log records of a task, from the file that a log shipper reads."""
        files = sorted((self.site.home / "logs").glob("*-deep-e-python.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line["taskUuid"] == task]


@dataclass
class Later:
    """An answer that will come."""

    answers: list[httpx.Response] = field(default_factory=list)
    thread: threading.Thread = field(default_factory=threading.Thread)

    def answer(self) -> httpx.Response:
        self.thread.join()
        (answer,) = self.answers
        return answer


@pytest.fixture(scope="module")
def backend(base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """Run one service with the runner's port for all tests of this module."""
    root = tmp_path_factory.mktemp("runner")
    folder = root / "redis"
    folder.mkdir()
    port = free_port()
    with private_redis(folder) as server, redis.Redis(port=server.port, decode_responses=True) as client:
        choice = RedisChoice(RedisKind.CONFIGURED, url=f"redis://127.0.0.1:{server.port}")
        variables = {"DEEPE_RUNNER_PORT": str(port), "DEEPE_SLOTS": "4"}
        site = Installation(root, {"base": base}, forks=worker_forks, redis=choice, **variables)
        # as one finds DeepExtension's folders
        (site.home / "deep-e-python").mkdir()
        (site.home / "scripts").symlink_to("deep-e-python")
        for name, text in SCRIPTS.items():
            script = site.home / "scripts" / name
            script.parent.mkdir(parents=True, exist_ok=True)
            script.write_text(HEAD + text)
        for name in ("gates", "seen", "models/tuned", "models/base"):
            (site.home / name).mkdir(parents=True)
        site.install_licence()
        try:
            site.start()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=None, trust_env=False) as http:
                yield Backend(site, http, client)
        finally:
            site.close()


def training(task: Any, file: str = "train_quick.py", **members: Any) -> dict[str, Any]:
    return {"train_id": task, "seq": 1, "train_file_name": file, "train_env": "base", **members}


def saving(task: str, file: str | None = None, **members: Any) -> dict[str, Any]:
    body = {
        "baseModelPath": "../models/base",
        "loraAdapterPath": "../models/tuned",
        "savePath": "../models/whole",
        "modelUsageType": "chat",
        "trainId": task,
        "seq": 2,
    }
    return {**body, "savePythonFile": file, **members}


def deployment(task: str, file: str | None = None, **members: Any) -> dict[str, Any]:
    body = {"folderPath": "../models/tuned", "serverUrl": "http://ollama:11434", "modelName": "m", "trainId": task}
    return {**body, "seq": 3, "deployPythonFile": file, **members}


def question(**members: Any) -> dict[str, Any]:
    return {"modelName": "m", "prompt": "Hi", "baseModelPath": "../models/base", **members}


def codes(records: Sequence[Any]) -> list[tuple[int, str]]:
    return [(record["msg"], record["msgDetail"]) for record in records if record["msg"] != 140001]


class TestForms:
    """A call whose method says how its script is called is made that way."""

    def make(self, backend: Backend, name: str, **training: Any) -> None:
        stages = {"training": {"conda_env": "base", **training}}
        method = {"name": name, "training_type": "chat", "lifecycle": ["customized"], "stages": stages}
        backend.site.call("POST", "/methods", status=201, json=method)

    def said(self, backend: Backend, task: str) -> Any:
        job = backend.job_of(task)
        assert backend.site.wait(job["id"])["status"] == "succeeded", backend.site.story(job["id"])
        text = backend.site.request("GET", f"/jobs/{job['id']}/logs").json()["text"]
        (line,) = [line for line in text.splitlines() if line.startswith("FORM ")]
        return job, json.loads(line.removeprefix("FORM "))

    def test_arguments_file_variables_and_folder(self, backend: Backend) -> None:
        home = backend.site.home
        script = (
            "import json, os, sys\nseen = [sys.argv[1:], open(sys.argv[1]).read(), os.environ['MODEL'], os.getcwd()]\n"
        )
        (home / "scripts" / "form.py").write_text(f"{script}print('FORM', json.dumps(seen))\n")
        self.make(
            backend,
            "formed",
            file="form.py",
            arguments=[
                "{config}",
                "--out={output_dir}",
                ["--rate", "{param:learning_rate}"],
                ["--gone", "{param:gone}"],
            ],
            config={"name": "job.json", "content": {"model": "{model_path}", "data": "{dataset_dir}", "seq": "{seq}"}},
            env={"MODEL": "{model_path}"},
            working_directory="run",
        )
        (home / "datasets").mkdir(exist_ok=True)
        (home / "datasets" / "called.jsonl").write_text('{"a": 1}\n')
        paths = {
            "model_path": "../models/base",
            "dataset_path": "../datasets/called.jsonl",
            "output_dir": "../models/x",
        }

        backend.post("/transferTrain", training("formed", "form.py", learning_rate=1e-4, depth=3, **paths))
        job, (argv, written, model, folder) = self.said(backend, "formed")

        run = home / "runs" / job["id"]
        assert argv == [str(run / "1" / "job.json"), f"--out={home / 'models' / 'x'}", "--rate", "0.0001"]
        assert json.loads(written) == {"model": str(home / "models" / "base"), "data": str(run / "dataset"), "seq": 1}
        assert [file.read_text() for file in (run / "dataset").iterdir()] == ['{"a": 1}\n']
        assert (model, folder) == (str(home / "models" / "base"), str(run / "1"))
        assert job["method"]["name"] == "formed"
        assert (120002, "depth is not passed to the script") in codes(backend.records("formed"))

    def test_module(self, backend: Backend) -> None:
        self.make(backend, "moduled", module="tool.train", arguments=["{parameters}"])

        backend.post("/transferTrain", training("moduled", "tool/train.py", depth=3))
        job, (argv, package) = self.said(backend, "moduled")

        assert (argv, package, job["method"]["name"]) == (["--depth=3"], "tool", "moduled")


class TestConversation:
    def test_trains_merges_asks_deploys_and_draws(self, backend: Backend) -> None:
        """The whole life of a model, with a worker that dies in the middle of the training."""
        site = backend.site
        site.call(
            "POST", "/methods", status=201,
            json={
                "name": "bought", "training_type": "chat", "lifecycle": ["customized"],
                "stages": {"training": {"file": "train.py", "conda_env": "base"}},
            },
        )  # fmt: skip
        methods = site.get("/methods", params={"limit": 200})["items"]
        assert backend.client.get("/health").content == b'{"status":"OK"}\n'

        # train
        body = {
            **training("t-1", "train.py"), "output_dir": "../models/tuned", "max_steps": None, "load_in_4bit": True,
            "learning_rate": 2e-05, "max_grad_norm": 10.0, "modules": ["q", "ü"], "name": "two\nlines",
            "training_name": "Fine tuning", "train_name": "faq",
        }  # fmt: skip
        answer = backend.post("/transferTrain", body)
        assert (answer.status_code, answer.content) == (200, b'{"error":"","status":"OK","train_id":"t-1"}\n')
        assert answer.headers["content-type"] == "application/json"
        running = wait_until(lambda: pid_of(backend.status("t-1")), "the pid", site.report)
        job = backend.job_of("t-1")
        assert running in site.stage_pids(job["id"])
        assert sorted(backend.status("t-1")) == ["pid", "status", "updateTime"]
        assert backend.key("t-1") == backend.status("t-1")

        site.kill("worker")
        backend.open("train")
        ended = backend.wait_for_status("t-1", 1)

        assert ended["pid"] == 0
        assert datetime.fromisoformat(ended["updateTime"]).utcoffset() is not None
        assert backend.key("t-1") == ended
        seen = backend.seen(job["id"])
        assert seen["argv"] == [
            "--train_id=t-1", "--seq=1", "--train_file_name=train.py", "--train_env=base",
            "--output_dir=../models/tuned", "--load_in_4bit=True", "--learning_rate=2e-05", "--max_grad_norm=10.0",
            '--modules=["q", "\\u00fc"]', "--name=two\nlines", "--training_name=Fine tuning", "--train_name=faq",
        ]  # fmt: skip
        assert seen["cwd"] == os.path.realpath(site.home / "deep-e-python")
        assert seen["output"] == str(site.home / "models" / "tuned")
        job = site.wait(job["id"])
        assert (job["status"], job["attempts"], job["name"]) == ("succeeded", 1, "faq")
        assert job["method"]["name"] == "bought"
        assert job["parameters"] == body
        assert codes(backend.records("t-1")) == [(120003, "Fine tuning"), (120004, "faq")]
        (given,) = [record for record in backend.records("t-1") if record["msg"] == 140001]
        assert given["msgDetail"] == repr(body)
        assert sorted(given) == ["details", "level", "msg", "msgDetail", "seq", "taskUuid", "time"]
        assert (given["level"], given["seq"], given["details"]) == ("info", 1, None)

        # merge
        merging = backend.later("/mergeModel", saving("t-2", dtypeStr=None))
        status = wait_until(lambda: backend.key("t-2"), "the key")
        assert (status["status"], status["pid"]) == (2, 0)
        site.kill("worker")
        backend.open("save")
        answer = merging.answer()
        assert (answer.status_code, answer.content) == (200, b'{"error":"","status":"OK","train_id":"t-2"}\n')
        assert backend.key("t-2")["status"] == 1
        assert backend.seen(backend.job_of("t-2")["id"])["argv"] == [
            *("--train_id", "t-2", "--seq", "2", "--save_path", "../models/whole", "--base_path", "../models/base"),
            *("--adapter_path", "../models/tuned", "--dtype_str", "None", "--model_usage_type", "chat"),
        ]
        assert codes(backend.records("t-2")) == [(120003, "Save"), (120004, "Save")]
        assert [record["msgDetail"] for record in backend.records("t-2") if record["msg"] == 140001] == [
            "base_path:../models/base", "adapter_path:../models/tuned", "save_path:../models/whole", "dtype_str:None",
            "train_id:t-2", "seq:2", "modelUsageType:chat",
        ]  # fmt: skip
        assert backend.job_of("t-2")["method"] is None

        # chat
        asked = question(systemPrompt=None, resetContext=None, history=[{"role": "user", "content": "Hi ü"}])
        with backend.client.stream("POST", "/chat", json=asked) as stream:
            assert stream.headers["content-type"] == "application/x-ndjson"
            assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-cache", "no")
            assert stream.headers["connection"] == "keep-alive"
            assert stream.headers["transfer-encoding"] == "chunked"
            pieces = stream.iter_raw()
            assert next(pieces) == b"\n", "a newline after two seconds without a frame"
            backend.open("chat")
            received = b""
            while FRAME_END not in received:
                received += next(pieces)
            backend.open("chat-more")
            received += b"".join(pieces)
        frames = [part.strip(b"\n") for part in received.split(FRAME_END) if part.strip(b"\n")]
        assert frames == [b'data: {"text": "Gr\\u00fc\\u00df "}', b'data: {"text": "Gott"}']
        (asking,) = [one for one in backend.jobs("inference-customized") if one["parameters"] == asked]
        assert backend.seen(asking["id"])["argv"] == [
            "--model_id=0", "--model_name=m", "--base_model_path=../models/base", "--prompt=Hi",
            "--session_id=default", "--max_length=512", "--max_context_tokens=2048", "--temperature=0.7",
            "--top_p=0.9", "--top_k=50", "--model_type=chat", "--template=", "--system_prompt=None",
            "--reset_context=none", '--history=[{"role": "user", "content": "Hi \\u00fc"}]',
        ]  # fmt: skip

        # deploy
        answer = backend.post("/deployModel", deployment("t-3", quantize=None, template="{{ .Prompt }}"))
        assert (answer.status_code, answer.content) == (200, b'{"message":"deployed","status":"success"}\n')
        assert backend.seen(backend.job_of("t-3")["id"])["argv"] == [
            *("--trainId", "t-3", "--seq", "3", "--folderPath", str(site.home / "models" / "tuned")),
            *("--serverUrl", "http://ollama:11434", "--modelName", "m", "--quantize", "None"),
            *("--template", "{{ .Prompt }}", "--basePath", "", "--actualPath", ""),
        ]
        assert codes(backend.records("t-3")) == [(120003, "Deploy"), (120004, "Deploy")]

        # pictures
        drawing = {"promptFile": "draw", "condaEnv": "base", "model": "m", "prompt": "a cat", "batchSize": 2}
        answer = backend.post("/imageProcessingByModel", drawing)
        assert (answer.status_code, sorted(answer.json())) == (200, ["code", "data", "message"])
        (address,) = answer.json()["data"]["imageUrlList"]
        task = address.removeprefix("/getGeneratedImages/")
        assert backend.client.get(address).content == b'{"code":2,"data":{},"message":""}\n'
        assert (backend.key(task)["status"], backend.key(task)["pid"]) == (2, 0)
        backend.open("draw")
        backend.wait_for_status(task, 1)
        names = f'["/images/{task}_001.png","/images/{task}_002.png"]'
        expected = f'{{"code":0,"data":{{"imageUrlList":{names}}},"message":"Find 2 images"}}\n'
        assert backend.client.get(address).text == expected
        assert backend.seen(task)["argv"] == [
            *("--model_path", "m", "--prompt", "a cat", "--output", f"../images/{task}.png", "--batch_size", "2"),
        ]

        assert site.get("/methods", params={"limit": 200})["items"] == methods, "no method was made"


def pid_of(status: Any) -> int:
    pid: int = status["pid"] if status else 0
    return pid


class TestTraining:
    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
    def test_killed_pid_ends_the_tree_as_failed(self, backend: Backend, end: signal.Signals) -> None:
        task = f"killed-{end.name}"
        (backend.site.home / "scripts" / "train_killed.py").write_text(
            HEAD + SCRIPTS["train.py"].replace('wait_for("train")', 'wait_for("never")')
        )
        backend.post("/transferTrain", training(task, "train_killed.py"))
        pid = wait_until(lambda: pid_of(backend.status(task)), "the pid", backend.site.report)
        tree = wait_until(lambda: psutil.Process(pid).children(recursive=True), "the child")

        os.kill(pid, end)

        status = backend.wait_for_status(task, 3)
        assert status["pid"] == 0
        wait_until(lambda: not any(map(runs, tree)), "the end of the tree")
        assert backend.site.wait(backend.job_of(task)["id"])["status"] == "failed"
        assert codes(backend.records(task))[-1][0] == 120005

    @pytest.mark.parametrize(
        ("file", "status", "last"),
        [("train_failing.py", 3, 120005), ("train_redis.py", 3, 120005), ("train_quick", 1, 120004)],
    )
    def test_ends_as_the_script_says(self, backend: Backend, file: str, status: int, last: int) -> None:
        backend.post("/transferTrain", training(file, file))

        assert backend.wait_for_status(file, status)
        backend.site.wait(backend.job_of(file)["id"])
        record = wait_until(lambda: ended_record(backend, file), "the record of the end")
        assert record["msg"] == last
        assert record["msgDetail"].partition(",")[0] == "Training"

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ({"train_file_name": None}, "script_missing"),
            ({"train_file_name": "absent.py"}, "script_missing"),
            ({"train_file_name": "../outside.py"}, "script_missing"),
            ({"train_env": "nowhere"}, "env_missing"),
            ({"train_env": None}, "env_missing"),
            ({"big": "x" * 140_000}, "spawn_failed"),
        ],
    )
    def test_what_cannot_run_is_failed_at_once(self, backend: Backend, members: Any, reason: str) -> None:
        task = f"cannot-{'-'.join(members)}-{str(next(iter(members.values())))[-10:].strip('/')}"

        answer = backend.post("/transferTrain", {**training(task), **members})

        assert (answer.status_code, answer.json()["status"]) == (200, "OK")
        assert (backend.status(task)["status"], backend.key(task)["status"]) == (3, 3)
        job = backend.site.get(f"/jobs/{backend.job_of(task)['id']}")
        assert (job["status"], job["reason"]) == ("failed", reason)
        found = [code for code, _ in codes(backend.records(task))]
        assert found == [120003, *([130001] if reason == "script_missing" else []), 120005]

    def test_tells_the_end_without_redis_and_mends_the_key(self, backend: Backend) -> None:
        backend.post("/transferTrain", training("r-1"))
        backend.wait_for_status("r-1", 1)

        backend.redis.delete("r-1")
        assert backend.status("r-1")["status"] == 1

        backend.redis.set("r-1", json.dumps({"status": 2, "updateTime": "then", "pid": 1}))
        wait_until(lambda: backend.key("r-1")["status"] == 1, "the mended key")

    def test_is_cancelled_here_and_repeated_there(self, backend: Backend) -> None:
        (backend.site.home / "scripts" / "train_waiting.py").write_text(HEAD + "wait_for('never')")
        backend.post("/transferTrain", training("c-2", "train_waiting.py"))
        wait_until(lambda: pid_of(backend.status("c-2")), "the pid", backend.site.report)
        job = backend.job_of("c-2")["id"]

        backend.site.post(f"/jobs/{job}:cancel", status=200)

        assert backend.wait_for_status("c-2", 3)["pid"] == 0
        assert backend.site.wait(job)["status"] == "cancelled"
        for action in ("retry", "copy"):
            assert backend.site.post(f"/jobs/{job}:{action}", {}, status=409)["code"] == "job_is_runner_call"


class TestAnswers:
    @pytest.mark.parametrize(
        ("file", "status", "body", "key"),
        [
            ("save_object", 400, '{"message":"no space","status":"error"}', 3),
            ("save_words.py", 500, None, 3),
            ("save_list", 400, None, 3),
            ("save_failing", 400, '{"error":"CUDA error","status":"Bad Request","train_id":"save_failing"}', 3),
            ("save_text", 200, '{"error":"","status":"OK","train_id":"save_text"}', 1),
            ("absent", 400, None, 3),
        ],
    )
    def test_of_savings(self, backend: Backend, file: str, status: int, body: str | None, key: int) -> None:
        answer = backend.post("/mergeModel", saving(file, file))

        assert answer.status_code == status, answer.text
        if body is not None:
            assert answer.text == f"{body}\n"
        elif file == "save_words.py":
            error = '"error":"Invalid JSON output: nothing was said"'
            assert answer.text == f'{{{error},"status":"Internal Server Error","train_id":"save_words.py"}}\n'
        elif file == "save_list":
            assert (answer.json()["status"], answer.json()["train_id"]) == (400, file)
        else:
            assert "script root" in answer.json()["error"]
        assert backend.status(file)["status"] == key

    @pytest.mark.parametrize(
        ("file", "status", "body", "key"),
        [
            ("deploy_noise", 200, '{"error":"","status":"OK","train_id":"deploy_noise"}', 1),
            ("deploy_object", 400, '{"message":"refused","status":"failed"}', 3),
            ("deploy_failing", 500, None, 3),
            (
                "deploy_words", 500,
                '{"error":"Invalid JSON output: hm","status":"Internal Server Error","train_id":"deploy_words"}', 3,
            ),
        ],
    )  # fmt: skip
    def test_of_deployments(self, backend: Backend, file: str, status: int, body: str | None, key: int) -> None:
        answer = backend.post("/deployModel", deployment(file, file))

        assert answer.status_code == status, answer.text
        if body is None:
            assert sorted(answer.json()) == ["message", "status", "stderr", "stdout"]
            assert (answer.json()["status"], answer.json()["stdout"]) == ("error", "no route")
            assert answer.json()["message"] == "Deployment script failed with return code 1"
        else:
            assert answer.text == f"{body}\n"
        assert backend.status(file)["status"] == key

    @pytest.mark.parametrize(
        ("file", "given", "got", "told"),
        [
            ("deploy_json", {"top_k": 5}, {"top_k": 5}, False),
            ("deploy_json", '{"top_k": 5}', {"top_k": 5}, False),
            ("deploy_json", "{}", None, False),
            ("deploy_json", "top_k 5", None, True),
            ("deploy_text", {"top_k": 5}, "", True),
        ],
    )
    def test_of_parameters_of_a_deployment(self, backend: Backend, file: str, given: Any, got: Any, told: bool) -> None:
        task = f"{file} {json.dumps(given)}"

        answer = backend.post("/deployModel", deployment(task, file, parameters=given))

        assert (answer.status_code, answer.json()["got"]) == (200, got), answer.text
        ignored = (120002, "parameters is not passed to the script")
        assert (ignored in codes(backend.records(task))) is told

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            ({"promptFile": "ask_error"}, b'data: {"finish_reason": "no weights"}\n\n\n\n'),
            ({"promptFile": "ask_failing"}, b'data: {"finish_reason": "'),
            ({"promptFile": "absent"}, b'data: {"finish_reason": "'),
        ],
    )
    def test_of_questions_that_fail(self, backend: Backend, members: Any, said: bytes) -> None:
        answer = backend.post("/chatTest", question(**members))

        assert answer.status_code == 200
        assert answer.content.lstrip(b"\n").startswith(said)
        assert answer.content.count(b"data: ") == 1

    def test_of_a_question_without_base_model(self, backend: Backend) -> None:
        answer = backend.post("/chat", {"modelName": "m", "prompt": "p"})

        said = b'data: {"finish_reason": "Missing required parameters: baseModelPath", "text": ""}\n\n\n\n'
        assert (answer.status_code, answer.content) == (200, said)

    def test_of_pictures_that_fail(self, backend: Backend) -> None:
        for body in ({"promptFile": "draw_failing", "condaEnv": "base"}, {}):
            (address,) = backend.post("/imageProcessingByModel", body).json()["data"]["imageUrlList"]
            task = address.removeprefix("/getGeneratedImages/")
            assert backend.wait_for_status(task, 3)
            answer = backend.client.get(address)
            assert (answer.status_code, answer.content) == (400, b'{"code":-1,"data":{},"message":""}\n')

    def test_of_unknown_tasks(self, backend: Backend) -> None:
        assert backend.client.get("/trainingStatus/none").content == b"null\n"
        answer = backend.client.get("/getGeneratedImages/none")
        said = (
            '{"code":-1,"data":{"imageUrlList":[]},"message":"Error: \'NoneType\' object has no attribute \'get\'"}\n'
        )
        assert (answer.status_code, answer.text) == (500, said)
        backend.redis.set("odd", json.dumps({"status": 5, "updateTime": "", "pid": 0}))
        assert backend.client.get("/getGeneratedImages/odd").json()["code"] == 5


class TestBadRequests:
    def test_lacking_members(self, backend: Backend) -> None:
        lacking = '"status":"Bad Request","train_id"'
        error = '"error":"Missing required parameters"'
        for path, body, task in [
            ("/transferTrain", {"seq": 1}, "null"),
            ("/transferTrain", {"train_id": 7}, "7"),
            ("/mergeModel", {"trainId": "b-1"}, '"b-1"'),
            ("/deployModel", {"trainId": "b-2", "seq": 1}, '"b-2"'),
        ]:
            answer = backend.post(path, body)
            assert (answer.status_code, answer.text) == (400, f"{{{error},{lacking}:{task}}}\n"), path
        assert backend.key("b-1") is None
        assert backend.key("b-2")["status"] == 3
        said = b'{"error":"Missing required parameters: modelName and prompt","status":"error"}\n'
        for path in ("/chat", "/chatTest"):
            answer = backend.post(path, {"prompt": "p"})
            assert (answer.status_code, answer.content) == (400, said)
        answer = backend.post("/deployModel", deployment("b-3", folderPath="../models/absent"))
        assert (answer.status_code, answer.json()["train_id"]) == (400, "b-3")
        assert "../models/absent" in answer.json()["error"]
        assert backend.key("b-3")["status"] == 3

    def test_null_is_there(self, backend: Backend) -> None:
        answer = backend.post("/transferTrain", {"train_id": None, "seq": None})

        assert (answer.status_code, answer.content) == (200, b'{"error":"","status":"OK","train_id":null}\n')

    def test_bodies_that_are_no_objects(self, backend: Backend) -> None:
        json_type = {"content-type": "application/json"}
        bodies = [({"content-type": "text/plain"}, b"{}", 415), (json_type, b"{", 400), (json_type, b"[]", 500)]
        for headers, content, status in bodies:
            for path in ("/transferTrain", "/mergeModel", "/deployModel"):
                answer = backend.client.post(path, headers=headers, content=content)
                assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
                assert answer.text.startswith("<!doctype html>\n")
            answer = backend.client.post("/chat", headers=headers, content=content)
            assert (answer.status_code, sorted(answer.json())) == (400, ["error", "status"])
            said = (
                f"Request parsing failed: {status} " if content != b"[]" else "Missing required parameters: modelName"
            )
            assert answer.json()["error"].startswith(said)
            answer = backend.client.post("/imageProcessingByModel", headers=headers, content=content)
            assert (answer.status_code, answer.json()["code"]) == (200, -1)
            assert answer.json()["message"].startswith(f"{status} ")

    def test_other_addresses_and_methods(self, backend: Backend) -> None:
        for method, path, status in [
            ("POST", "/health", 405), ("GET", "/chat", 405), ("GET", "/", 404), ("GET", "/health/", 404),
            ("GET", "/images/x.png", 404), ("GET", "/api/v1/jobs", 404),
        ]:  # fmt: skip
            answer = backend.client.request(method, path)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
        assert backend.site.request("GET", "//transferTrain").status_code == 404

    def test_web_pages(self, backend: Backend) -> None:
        page = {"Origin": "https://pages.example.com"}
        assert backend.client.post("/transferTrain", json=training("w"), headers=page).status_code == 403
        assert backend.client.get("/health", headers={"Host": "pages.example.com"}).status_code == 403


class TestBlocking:
    def test_more_wait_at_once_than_there_are_threads(self, backend: Backend) -> None:
        (backend.site.home / "scripts" / "stuck.py").write_text(HEAD + "wait_for('never')")
        tasks = [f"many-{number}" for number in range(40)]

        waiting = [backend.later("/mergeModel", saving(task, "stuck")) for task in tasks]

        wait_until(lambda: all(map(backend.status, tasks)), "the jobs", backend.site.report)
        assert {backend.status(task)["status"] for task in tasks} == {2}
        assert backend.client.get("/health").status_code == 200
        for task in reversed(tasks):  # those in the queue first, so that none of them starts
            backend.site.post(f"/jobs/{backend.job_of(task)['id']}:cancel", status=200)
        assert {later.answer().status_code for later in waiting} == {400}
        assert {backend.wait_for_status(task, 3)["pid"] for task in tasks} == {0}


class TestLostClients:
    def test_end_nothing(self, backend: Backend) -> None:
        (backend.site.home / "scripts" / "slow.py").write_text(
            HEAD + "wait_for('slow'); print(json.dumps({'status': 'success'}))"
        )
        timeout = httpx.Timeout(None, read=0.2)
        with contextlib.suppress(httpx.ReadTimeout):
            backend.client.post("/mergeModel", json=saving("l-1", "slow"), timeout=timeout)
        with contextlib.suppress(httpx.ReadTimeout):
            backend.client.post("/chat", json=question(promptFile="slow", sessionId="left"), timeout=timeout)
        wait_until(lambda: len(seen_of(backend, "slow.py")) == 2, "the scripts", backend.site.report)

        backend.open("slow")

        assert backend.wait_for_status("l-1", 1)
        (asked,) = [job for job in backend.jobs("inference-customized") if job["parameters"].get("sessionId") == "left"]
        assert backend.site.wait(asked["id"])["status"] == "succeeded"


def seen_of(backend: Backend, script: str) -> list[Path]:
    return list((backend.site.home / "seen").glob(f"{script}-*"))


def ended_record(backend: Backend, task: str) -> Any:
    return next((record for record in backend.records(task) if record["msg"] in (120004, 120005)), None)


def runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
