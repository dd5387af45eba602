"""An installation as an operator starts it and people call it: real processes, HTTP, nothing else.

`Installation.start` runs the embedded service (API and worker as processes of their own) on a home and a free port of
its own. What happened is read over HTTP, from the files that users see, and from the process table.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest

from app.access import licence as licences
from app.cli.client import StreamEvent, parse_events
from app.cli.embedded import EmbeddedOptions, EmbeddedService, is_ready
from app.cli.private_redis import NO_REDIS, RedisChoice
from app.cli.processes import Process, ProcessSpec, StartProcess, start_process
from app.presets.catalogue import ROOM, sample_datasets
from app.settings import load_settings
from tests.executor.attempts import supervises
from tests.fork_server import ForkServer
from tests.servers import free_port
from tests.waiting import wait_until

TERMINAL = {"succeeded", "failed", "cancelled"}
NODE = "one"
NO_BOUND = 3600.0  # a test never judges how quick a start is
ME = "tests"
PYTHON = (sys.executable, "-P")

CONTAINMENT = os.environ.get("DEEPE_TEST_CONTAINMENT", "off")
"""Scripts of these tests look at files beside the home; `tests/worker/test_containment.py` contains them."""


class Installation:
    """One home with its service. `forks`: what API and worker are forked from; None starts them as users do.

    `start` and `stop` may be called again and again.
    """

    def __init__(
        self,
        root: Path,
        environments: Mapping[str, Path],
        *,
        forks: ForkServer | None = None,
        redis: RedisChoice = NO_REDIS,
        database_url: str | None = None,
        **variables: str,
    ) -> None:
        self.root = root
        self.home = root / "home"
        self.node_home = self.home / "nodes" / NODE
        self.redis = redis
        self._forks = forks
        self._database_url = database_url
        self.private_key, self.public_key = licences.keygen(root / "vendor")
        self._variables = {
            "HOME": str(root),
            "DEEPE_LICENSE_PUBLIC_KEY": str(self.public_key),
            "DEEPE_POLL_SECONDS": "0.1",
            "DEEPE_STOP_GRACE_SECONDS": "1",
            "DEEPE_LOG_FORMAT": "json",
            "DEEPE_MIN_FREE_BYTES": str(2**20),
            "DEEPE_CONTAINMENT": CONTAINMENT,
            **variables,
        }
        self._service: EmbeddedService | None = None
        self._client: httpx.Client | None = None
        placed = self.node_home / "envs"
        placed.mkdir(parents=True)
        for name, prefix in environments.items():
            (placed / name).symlink_to(prefix)

    # ---- running ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the service up and wait until its node is known."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("DEEPE_")]:
                patch.delenv(name)
            settings = load_settings(home=self.home, port=free_port(), node_name=NODE, database_url=self._database_url)
            options = EmbeddedOptions(
                command=ME,
                redis=(self.redis,),
                log_folder=self.root / "logs",
                environment=self._variables,
                start_process=forking(self._forks, self.root) if self._forks else start_process,
            )
            self._service = EmbeddedService(settings, options, say=lambda _: None)
            url = self._service.start(timeout=NO_BOUND)
        token = self._variables.get("DEEPE_API_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=None, trust_env=False)
        wait_until(lambda: self.get("/nodes")["items"], "the node")

    def stop(self) -> None:
        """End the service in order; stages go on."""
        if self._client is not None:
            self._client.close()
        if self._service is not None:
            self._service.stop()

    def close(self) -> None:
        """End the service and whatever its jobs left behind."""
        self.stop()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def kill(self, *names: str) -> None:
        """Kill processes of the service as a crash would ; they are started again."""
        # one that met its database while that was away has ended by itself and is on its way
        wait_until(lambda: all(name in self.pids for name in names), "the processes to kill")
        pids = self.pids
        for name in names:
            os.kill(pids[name], signal.SIGKILL)
        wait_until(lambda: all(self.pids.get(name, pids[name]) != pids[name] for name in names), "the new processes")

    @property
    def pids(self) -> dict[str, int]:
        assert self._service is not None
        return self._service.pids

    @property
    def url(self) -> str:
        assert self._service is not None
        return self._service.url

    def wait_until_ready(self) -> None:
        """Wait until the API answers again."""
        wait_until(lambda: is_ready(self.url), "the API")

    def install_licence(self, *, expires_in: timedelta = timedelta(days=1), text: str | None = None) -> None:
        """Put a licence into the home, as `deepe license install` does, also one that does not count."""
        now = datetime.now(UTC)
        text = text or licences.issue(
            licences.load_private_key(self.private_key),
            licensee="tests",
            issued_at=now - timedelta(days=2),
            expires_at=now + expires_in,
        )
        file = licences.licence_path(self.home)
        draft = file.with_suffix(".draft")
        draft.write_text(text, "utf-8")
        draft.replace(file)

    # ---- calling ----------------------------------------------------------------------------------------------------

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request; `path` is below `/api/v1` unless it begins with two slashes."""
        assert self._client is not None
        target = path[1:] if path.startswith("//") else f"/api/v1{path}"
        return self._client.request(method, target, **options)

    def call(self, method: str, path: str, *, status: int = 200, **options: Any) -> Any:
        """Send one request, demand the status, and return the JSON document of the answer."""
        answer = self.request(method, path, **options)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def get(self, path: str, **options: Any) -> Any:
        return self.call("GET", path, **options)

    def post(self, path: str, body: Any = None, *, status: int = 201) -> Any:
        return self.call("POST", path, status=status, json=body)

    def put_script(self, path: str, text: str, *, status: int = 201, **headers: str) -> Any:
        """Upload a file into the script root."""
        return self.call("PUT", f"/scripts/{path}", status=status, content=text.encode(), headers=headers)

    def add_samples(self) -> None:
        """Add the base model `bike-base` and the data set `bike-hire` of Custom01."""
        shutil.copytree(ROOM / "custom01" / "custom01-base", self.home / "models" / "bike-base")
        self.post("/base-models", {"name": "bike-base", "path": "bike-base"})
        self.add_dataset("bike-hire", "custom01")

    def add_dataset(self, name: str, sample: str) -> Any:
        """Upload a shipped data set."""
        (path,) = [shipped.path for shipped in sample_datasets() if shipped.name == sample]
        return self.call("PUT", f"/datasets/{name}/file", status=201, content=path.read_bytes())

    def submit(self, method: str = "Custom01", **members: Any) -> Any:
        """Submit a chain on the samples of Custom01."""
        body = {"method": method, "base_model": "bike-base", "dataset": "bike-hire", "through": "customized"}
        return self.post("/jobs", body | members)

    def delete_method(self, method: str, *, status: int = 204, **query: str) -> Any:
        """Delete the method as it is now."""
        tag = self.request("GET", f"/methods/{method}").headers["ETag"]
        return self.call("DELETE", f"/methods/{method}", status=status, headers={"If-Match": tag}, params=query)

    # ---- following --------------------------------------------------------------------------------------------------

    def wait(self, job: str, *statuses: str) -> Any:
        """Wait until the job has one of these statuses; without any, until it has ended."""
        wanted = set(statuses) or TERMINAL

        def look() -> Any:
            with contextlib.suppress(httpx.TransportError):
                found = self.get(f"/jobs/{job}")
                assert found["status"] in wanted or found["status"] not in TERMINAL, self.story(job)
                return found if found["status"] in wanted else None
            return None

        return wait_until(look, f"{job}: {wanted}", self.report)

    def wait_for_step(self, job: str, step: int) -> int:
        """Wait until the job's training has come to this step; return where it is."""

        def look() -> int | None:
            with contextlib.suppress(httpx.TransportError):
                found = self.get(f"/jobs/{job}")
                assert found["status"] not in TERMINAL, self.story(job)
                at = (found["progress"] or {"step": 0})["step"]
                return at if at >= step else None
            return None

        return wait_until(look, f"step {step} of {job}", self.report)

    def succeed(self, job: str) -> Any:
        """Wait for the end of the job and demand that it is a good one."""
        ended = self.wait(job)
        assert (ended["status"], ended["reason"]) == ("succeeded", "completed"), self.story(job)
        return ended

    @contextlib.contextmanager
    def events(self, job: str, *, after: str | None = None) -> Iterator[Iterator[StreamEvent]]:
        """Follow the stream of a job, from behind the event `after`."""
        assert self._client is not None
        headers = {"Last-Event-ID": after} if after else {}
        with self._client.stream("GET", f"/api/v1/jobs/{job}/events", headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield parse_events(answer.iter_bytes())

    def ask(self, model: str, question: str, **options: Any) -> tuple[list[str], Any]:
        """Ask a model; return the pieces of the answer as they came, and how it ended."""
        assert self._client is not None
        body = {"messages": [{"role": "user", "content": question}], **options}
        pieces: list[str] = []
        with self._client.stream("POST", f"/api/v1/models/{model}/chat", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for event in parse_events(answer.iter_bytes()):
                if event.event == "piece":
                    pieces.append(event.data["text"])
                else:
                    assert event.event == "done", event
                    return pieces, event.data
        raise AssertionError(f"the answer broke off after {pieces}")

    def curve(self, job: str, name: str = "loss") -> list[list[Any]]:
        """Return every point of a curve."""
        found = self.get(f"/jobs/{job}/metrics", params={"points": 10_000, "names": name})
        return next((series["points"] for series in found["series"]), [])

    # ---- what there is ----------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Return what lives of the jobs: supervisors, scripts and all they started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE or process.pid in self.pids.values():
                    continue
                theirs = process.environ().get("DEEPE_OUTPUT_DIR", "").startswith(str(self.root))
                named = str(self.root) in " ".join(process.cmdline())
                if theirs or named or supervises(process, self.root):
                    found.append(process)
        return found

    def stage_pids(self, job: str) -> list[int]:
        """Return the processes that run the job's script."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("DEEPE_JOB_ID") == job and "-u" in process.cmdline():
                    found.append(process.pid)
        return found

    def logged(self, process: str, event: str) -> list[dict[str, Any]]:
        """Return the records of this name in the log of `api` or `worker`."""
        lines = (self.root / "logs" / f"{process}.log").read_text("utf-8", "replace").splitlines()
        marked = [line for line in lines if line.startswith("{") and f'"{event}"' in line]
        return [record for record in map(_record, marked) if record.get("event") == event]

    def story(self, job: str) -> str:
        """Return what is known of a job that did not go as expected."""
        log = self.request("GET", f"/jobs/{job}/logs").json().get("text", "")
        return f"{self.request('GET', f'/jobs/{job}').text}\n{log}\n{self.report()}"

    def report(self) -> str:
        """Return the end of the worker's log."""
        return (self.root / "logs" / "worker.log").read_text("utf-8", "replace")[-3000:]


def forking(forks: ForkServer, folder: Path) -> StartProcess:
    """Return what forks API and worker, in this folder, and starts all else as users do."""

    def start(spec: ProcessSpec, output: IO[Any]) -> Process:
        if spec.argv[: len(PYTHON)] != PYTHON:
            return start_process(spec, output)
        arguments = spec.argv[len(PYTHON) :]
        return forks.start(arguments, cwd=folder, environment=spec.env, output=output, new_session=True)

    return start


def _record(line: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:  # a process was killed while it wrote
        return {}
    return record
