"""Bad input over HTTP: each has its clear answer in three languages, and nothing is lost or made by it."""

import base64
import contextlib
import json
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import licence as licences
from app.cli.private_redis import RedisChoice, RedisKind
from tests.e2e.adapted import adapted_custom01
from tests.e2e.installation import Installation
from tests.fork_server import ForkServer
from tests.servers import RedisServer, private_redis

pytestmark = [pytest.mark.redis, pytest.mark.xdist_group("e2e-bad-input")]

BASE = {"conda_env": "base"}
TRAINING = {"file": "custom01.py", **BASE}
SAVING = {"file": "save_custom01.py", **BASE}
ASKING = {"file": "ask_custom01.py", **BASE}
CUSTOM = {"target": "custom", "file": "deploy_example.py", **BASE}
LANGUAGES = ("en", "zh", "de")
LISTS = ("methods", "jobs", "models", "datasets", "base-models", "deploy-targets", "environments")
UPLOAD_LIMIT = 2**20
TOKEN = "e2e-7f3K9s-2mQ4x-token"


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def site(
    base: Path, worker_forks: ForkServer, own_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """Run a service with a licence, samples, a finished chain and some broken files."""
    redis = RedisChoice(RedisKind.CONFIGURED, url=f"redis://127.0.0.1:{own_redis.port}")
    site = Installation(
        tmp_path_factory.mktemp("bad-input"),
        {"base": base, "trl": base},  # not what the name promises
        forks=worker_forks,
        redis=redis,
        DEEPE_MAX_UPLOAD_BYTES=str(UPLOAD_LIMIT),
    )
    site.install_licence()
    try:
        site.start()
        site.add_samples()
        scripts = site.home / "scripts"
        (scripts / "broken.py").write_text("import sys\n\ndef train(:\n    pass\n")
        (scripts / "outside.py").symlink_to(site.root / "elsewhere.py")
        (site.root / "elsewhere.py").write_text("print('not here')\n")
        rows = b'{"frage": "q", "antwort": "a"}\n'
        site.call("PUT", "/datasets/german/file", status=201, content=rows)
        site.put_script("slow.py", adapted_custom01())
        site.post("/methods", definition(name="Slow", stages={"training": {"file": "slow.py", **BASE}}))
        site.succeed(site.submit(parameters={"max_steps": 10})["id"])
        yield site
    finally:
        site.close()


@pytest.fixture
def live(site: Installation) -> Iterator[str]:
    """Return a training that runs until it is cancelled, and free its slot afterwards."""
    job = str(site.submit("Slow", parameters={"pause": 0.5, "max_steps": 10_000})["id"])
    site.wait_for_step(job, 1)
    yield job
    if site.request("POST", f"/jobs/{job}:cancel").status_code == 200:
        site.wait(job)


@pytest.fixture(scope="module")
def guarded(base: Path, worker_forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Run a service with a token, on a disk that has less free space than is demanded."""
    site = Installation(
        tmp_path_factory.mktemp("guarded"),
        {"base": base},
        forks=worker_forks,
        DEEPE_API_TOKEN=TOKEN,
        DEEPE_MIN_FREE_BYTES=str(2**40),
    )
    try:
        site.start()
        site.add_samples()
        yield site
    finally:
        site.close()


@pytest.fixture
def census(site: Installation) -> Iterator[None]:
    """Demand that a test leaves the number of everything as it was."""
    before = count(site)
    yield
    assert count(site) == before


def count(site: Installation) -> dict[str, int]:
    found = {name: len(site.get(f"/{name}", params={"limit": 100})["items"]) for name in LISTS}
    return found | {"scripts": len(site.get("/scripts")["items"])}


def definition(**members: Any) -> dict[str, Any]:
    """Return a method that would be accepted, but for `members`."""
    good = {
        "name": "Wrong",
        "training_type": "chat",
        "technique": "sft",
        "lifecycle": ["customized"],
        "stages": {"training": TRAINING},
    }
    return good | members


def job(**members: Any) -> dict[str, Any]:
    """Return a submission that would be accepted, but for `members`; None takes a member away."""
    good = {"method": "Custom01", "base_model": "bike-base", "dataset": "bike-hire", "through": "customized"}
    return {name: value for name, value in (good | members).items() if value is not None}


def lines(*texts: str) -> bytes:
    return "".join(text + "\n" for text in texts).encode()


# ---- the table ------------------------------------------------------------------------------------------------------

Entries = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bad:
    """A request, and what is answered: status, code, and the entries (pointer, code) in their order."""

    what: str
    method: str
    path: str
    status: int
    code: str
    entries: Entries = ()
    says: str = ""
    """A pattern that the English sentences must contain."""
    options: dict[str, Any] = field(default_factory=dict)


def wrong_method(what: str, entries: Entries, says: str = "", **members: Any) -> Bad:
    options = {"json": definition(**members)}
    return Bad(what, "POST", "/methods", 422, "invalid_request", entries, says, options)


def wrong_job(what: str, entries: Entries, says: str = "", **members: Any) -> Bad:
    return Bad(what, "POST", "/jobs", 422, "invalid_request", entries, says, {"json": job(**members)})


def wrong_data(what: str, content: bytes, entries: Entries, says: str = "") -> Bad:
    return Bad(what, "PUT", "/datasets/wrong/file", 422, "invalid_dataset", entries, says, {"content": content})


def wrong_body(what: str, status: int, code: str, says: str = "", **options: Any) -> Bad:
    return Bad(what, "POST", "/methods", status, code, (), says, options)


def missing(*stages: str) -> Entries:
    """Return the entries for stages that have neither file nor environment."""
    leaves = (("file", "missing_file"), ("conda_env", "missing_environment"))
    return tuple((f"/stages/{stage}/{leaf}", code) for stage in stages for leaf, code in leaves)


NO_TARGET = (("/deployment/target", "missing_deploy_target"),)
NO_DEPLOYMENT_FILES = tuple((f"/deployment/{leaf}", "incomplete_custom_deployment") for leaf in ("file", "conda_env"))
BOTH = ("inference-customized", "inference-complete")

# the table of the lifecycles, row by row: path, switches, what is wrong when nothing else is configured
LIFECYCLES: list[tuple[str, Entries, Entries]] = [
    ("customized", missing("training"), missing("training", BOTH[0])),
    ("customized,complete", missing("training", "saving"), missing("training", "saving", *BOTH)),
    ("customized,online", (*missing("training"), *NO_TARGET), (*missing("training", BOTH[0]), *NO_TARGET)),
    (
        "customized,complete,online",
        (*missing("training", "saving"), *NO_TARGET),
        (*missing("training", "saving", *BOTH), *NO_TARGET),
    ),
    ("complete", missing("saving"), missing("saving", BOTH[1])),
    ("complete,online", (*missing("saving"), *NO_TARGET), (*missing("saving", BOTH[1]), *NO_TARGET)),
]


def lifecycle_rows() -> Iterator[Bad]:
    for path, plain, asked in LIFECYCLES:
        states = path.split(",")
        yield wrong_method(f"nothing configured on {path}", plain, lifecycle=states, stages={})
        switches = {state: state in states for state in ("customized", "complete")}
        yield wrong_method(f"nothing to ask with on {path}", asked, lifecycle=states, stages={}, inference=switches)
        if "online" in states:
            entries = (*plain[: -len(NO_TARGET)], *NO_DEPLOYMENT_FILES)
            target = {"target": "custom"}
            yield wrong_method(
                f"custom target alone on {path}", entries, lifecycle=states, stages={}, deployment=target
            )


METHODS = [
    wrong_method("unknown path", (("/lifecycle", "unknown_lifecycle"),), lifecycle=["complete", "customized"]),
    wrong_method("unknown state", (("/lifecycle", "unknown_lifecycle"),), lifecycle=["customized", "served"]),
    wrong_method(
        "unknown stage", (("/stages/testing", "unknown_stage"),), stages={"training": TRAINING, "testing": TRAINING}
    ),
    wrong_method(
        "stage off the path", (("/stages/saving", "stage_off_path"),), stages={"training": TRAINING, "saving": SAVING}
    ),
    wrong_method(
        "inference not switched on",
        (("/stages/inference-customized", "inference_not_switched_on"),),
        stages={"training": TRAINING, "inference-customized": ASKING},
    ),
    wrong_method(
        "half a training before saving",
        (("/stages/training/conda_env", "incomplete_training"),),
        lifecycle=["complete"],
        stages={"training": {"file": "custom01.py"}, "saving": SAVING},
    ),
    wrong_method("deployment off the path", (("/deployment", "deployment_off_path"),), deployment=CUSTOM),
    wrong_method(
        "unknown deploy target",
        (("/deployment/target", "unknown_deploy_target"),),
        lifecycle=["customized", "online"],
        deployment={"target": "nowhere"},
    ),
    wrong_method("unknown training type", (("/training_type", "unknown_training_type"),), training_type="poem"),
    wrong_method("unknown member", (("/colour", "unknown_field"),), colour="red"),
    wrong_method("no name", (("/name", "missing_name"),), name=" "),
    wrong_method("name too long", (("/name", "name_too_long"),), name="x" * 101),
    *(
        wrong_method(
            f"script {what}", (("/stages/training/file", code),), says, stages={"training": {"file": file, **BASE}}
        )
        for what, file, code, says in (
            ("above the root", "../elsewhere.py", "file_outside_root", "leads out"),
            ("with an absolute path", "/etc/passwd.py", "file_outside_root", "leads out"),
            ("behind a link that leaves the root", "outside.py", "file_outside_root", "leads out"),
            ("with a mark that hides text", "a\u202eb.py", "invalid_file_path", "U\\+202E"),
            ("that is not there", "nothing.py", "file_not_found", "nothing.py"),
            ("that is not Python", "broken.py", "invalid_python", "line 3, column 11"),
        )
    ),
    wrong_method(
        "unknown environment",
        (("/stages/training/conda_env", "unknown_environment"),),
        "use one of: .*base",
        stages={"training": {"file": "custom01.py", "conda_env": "nowhere"}},
    ),
    wrong_method(
        "everything at once",
        (
            ("/name", "missing_name"),
            ("/training_type", "unknown_training_type"),
            ("/stages/saving/file", "missing_file"),
            ("/stages/training/file", "file_outside_root"),
            ("/stages/training/conda_env", "unknown_environment"),
            ("/stages/saving/conda_env", "unknown_environment"),
        ),
        name="",
        training_type="poem",
        lifecycle=["customized", "complete"],
        stages={"training": {"file": "../x.py", "conda_env": "no"}, "saving": {"conda_env": "nor this"}},
    ),
    Bad(
        "duplicate name", "POST", "/methods", 409, "name_taken", (("/name", "name_taken"),), "Custom01",
        {"json": definition(name="Custom01")},
    ),
    Bad(
        "duplicate name in other letters", "POST", "/methods", 409, "name_taken", (("/name", "name_taken"),), "",
        {"json": definition(name="cUSTOM01")},
    ),
    Bad("missing If-Match", "PATCH", "/methods/Custom01", 428, "precondition_required", options={"json": {}}),
    Bad("missing If-Match", "DELETE", "/methods/Custom01", 428, "precondition_required"),
    Bad(
        "stale If-Match", "PATCH", "/methods/Custom01", 412, "stale_version",
        options={"json": {"description": "lost"}, "headers": {"If-Match": '"older"'}},
    ),
    Bad(
        "stale If-Match", "DELETE", "/methods/Custom01", 412, "stale_version",
        options={"headers": {"If-Match": '"older"'}},
    ),
    Bad(
        "read-only example", "PATCH", "/methods/SFT-Demo", 403, "preset_read_only",
        options={"json": {"description": "mine"}, "headers": {"If-Match": "*"}},
    ),
    Bad("unknown method", "GET", "/methods/Nobody", 404, "method_not_found", says="Nobody"),
    Bad("unknown lifecycle in a filter", "GET", "/methods?lifecycle=online", 422, "invalid_request",
        (("?lifecycle", "unknown_lifecycle"),)),
]  # fmt: skip

SCRIPTS = [
    Bad(
        "script that is not Python", "PUT", "/scripts/new.py", 422, "invalid_request", (("", "invalid_python"),),
        "line 2, column 3", {"content": b"x = 1\ny ~ 2\n"},
    ),
    Bad(
        "script above the root", "PUT", "/scripts/..%2Fnew.py", 422, "file_outside_root",
        options={"content": b"x = 1\n"},
    ),
    Bad("device name", "PUT", "/scripts/nul.py", 422, "invalid_file_path", options={"content": b"x = 1\n"}),
    Bad("name too long", "PUT", f"/scripts/{'x' * 300}.py", 422, "file_path_too_long", options={"content": b"x = 1\n"}),
    Bad("overwritten unread", "PUT", "/scripts/slow.py", 428, "precondition_required", options={"content": b"x = 1\n"}),
    Bad(
        "name of a standard module", "PUT", "/scripts/json.py", 422, "invalid_request",
        (("", "script_hides_standard_module"),), "json", {"content": b"x = 1\n"},
    ),
    Bad("too large", "PUT", "/scripts/new.py", 413, "body_too_large", options={"content": b"#" * (2**20 + 1)}),
    Bad(
        "wrong content type", "PUT", "/scripts/new.py", 415, "unsupported_media_type",
        options={"content": b"x = 1\n", "headers": {"Content-Type": "text/html"}},
    ),
    Bad("unknown script", "GET", "/scripts/nothing.py", 404, "script_not_found"),
]  # fmt: skip

GOOD_ROWS = ['{"q": "a", "a": "b"}'] * 6
HALF_ROW = lines(*GOOD_ROWS, '{"q": "a", "a": }')
NO_UTF8 = lines(*GOOD_ROWS) + b'{"q": "\xff"}\n'
DATA = [
    wrong_data("empty data set", b"", (("/lines", "dataset_empty"),)),
    wrong_data("bad JSON on line 7", HALF_ROW, (("/lines/7", "line_not_json"),), "Line 7"),
    wrong_data("no object on line 7", lines(*GOOD_ROWS, "[1]"), (("/lines/7", "line_not_object"),), "Line 7"),
    wrong_data("no fields on line 7", lines(*GOOD_ROWS, "{}"), (("/lines/7", "line_without_fields"),), "Line 7"),
    wrong_data("no UTF-8 on line 7", NO_UTF8, (("/lines/7", "line_not_utf8"),), "Line 7"),
    Bad("duplicate name", "PUT", "/datasets/bike-hire/file", 409, "name_taken", options={"content": lines(*GOOD_ROWS)}),
    Bad(
        "too large", "PUT", "/datasets/wrong/file", 413, "body_too_large",
        options={"content": lines(*GOOD_ROWS * (UPLOAD_LIMIT // 100))},
    ),
    Bad(
        "form instead of a file", "PUT", "/datasets/wrong/file", 415, "unsupported_media_type",
        options={"content": b"{}", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    ),
    Bad("path above the folder", "POST", "/datasets", 422, "path_outside_folder", (("/path", "path_outside_folder"),),
        options={"json": {"name": "wrong", "path": "../license.json"}}),
    Bad("nothing there", "POST", "/base-models", 422, "path_not_found", (("/path", "path_not_found"),),
        options={"json": {"name": "wrong", "path": "nowhere"}}),
]  # fmt: skip

JOBS = [
    wrong_job("unknown method", (("/method", "unknown_method"),), "Nobody", method="Nobody"),
    wrong_job("unknown base model", (("/base_model", "unknown_base_model"),), base_model="nobody"),
    wrong_job("unknown data set", (("/dataset", "unknown_dataset"),), dataset="nobody"),
    wrong_job("no base model", (("/base_model", "base_model_needed"),), base_model=None),
    wrong_job("missing columns", (("/dataset", "columns_missing"),), "frage, antwort", dataset="german"),
    wrong_job(
        "missing column that a parameter names",
        (("/parameters/input_train_name", "column_missing"),),
        parameters={"input_train_name": "frage", "output_train_name": "answer"},
    ),
    wrong_job("wrong type", (("/parameters/epochs", "parameter_wrong_type"),), parameters={"epochs": "many"}),
    wrong_job("truth as a number", (("/parameters/epochs", "parameter_wrong_type"),), parameters={"epochs": True}),
    wrong_job("half a step", (("/parameters/max_steps", "parameter_wrong_type"),), parameters={"max_steps": 1.5}),
    wrong_job(
        "parameter of the platform", (("/parameters/output_dir", "parameter_reserved"),), parameters={"output_dir": "/"}
    ),
    wrong_job("state off the path", (("/through", "state_not_on_path"),), method="Slow", through="complete"),
    wrong_job("neither through nor stage", (("/through", "through_or_stage"),), through=None),
    wrong_job("unknown stage", (("/stage", "stage_not_runnable"),), through=None, stage="testing"),
    wrong_job("no model for the stage", (("/model", "model_needed"),), through=None, stage="saving"),
    wrong_job(
        "unknown model", (("/model", "unknown_model"),), "nobody",
        through=None, stage="saving", model="nobody", base_model=None, dataset=None,
    ),
    wrong_job(
        "everything at once",
        (
            ("/base_model", "unknown_base_model"),
            ("/dataset", "unknown_dataset"),
            ("/parameters/epochs", "parameter_wrong_type"),
            ("/parameters/learning_rate", "parameter_wrong_type"),
        ),
        base_model="nobody", dataset="nobody", parameters={"epochs": [], "learning_rate": "fast"},
    ),
    Bad("unknown model asked", "POST", "/models/nobody/chat", 404, "model_not_found",
        options={"json": {"messages": [{"role": "user", "content": "?"}]}}),
    Bad("unknown job", "GET", "/jobs/nobody", 404, "job_not_found"),
    Bad("unknown job cancelled", "POST", "/jobs/nobody:cancel", 404, "job_not_found"),
    Bad("compare one", "GET", "/jobs:compare?ids=a", 422, "invalid_request", (("?ids", "compare_needs_ids"),)),
    Bad("no position of a stream", "GET", "/jobs?cursor=abc", 422, "invalid_cursor"),
]  # fmt: skip

BODIES = [
    wrong_body("malformed JSON", 400, "malformed_json", "line 2, column", content=b'{"name": "x",\n oops}', headers={
        "Content-Type": "application/json"
    }),
    wrong_body("no UTF-8", 400, "json_not_utf8", content=b'{"name": "\xff"}', headers={
        "Content-Type": "application/json"
    }),
    wrong_body("oversized body", 413, "body_too_large", "4194304", content=b" " * (4 * 2**20 + 1), headers={
        "Content-Type": "application/json"
    }),
    wrong_body("wrong content type", 415, "unsupported_media_type", "application/json", content=b"name=x", headers={
        "Content-Type": "application/x-www-form-urlencoded"
    }),
    wrong_body("compressed body", 415, "unsupported_encoding", content=b"{}", headers={
        "Content-Type": "application/json", "Content-Encoding": "gzip"
    }),
    Bad("no method at all", "POST", "/methods", 422, "invalid_request", (("/stages", "field_type"),),
        options={"json": definition(stages=[])}),
    Bad("foreign host", "GET", "/methods", 403, "foreign_host", says="evil.example",
        options={"headers": {"Host": "evil.example"}}),
    Bad("foreign origin", "POST", "/methods", 403, "foreign_origin", says="evil.example",
        options={"json": definition(), "headers": {"Origin": "https://evil.example"}}),
    Bad("unknown address", "GET", "/nothing", 404, "route_not_found"),
    Bad("unknown verb", "DELETE", "/methods", 405, "method_not_allowed", says="GET"),
]  # fmt: skip

TABLE = [*METHODS, *lifecycle_rows(), *SCRIPTS, *DATA, *JOBS, *BODIES]


@pytest.mark.usefixtures("census")
class TestTable:
    @pytest.mark.parametrize("bad", TABLE, ids=lambda bad: f"{bad.method} {bad.what}")
    def test_is_refused_with_a_clear_answer(self, site: Installation, bad: Bad) -> None:
        problem = refused(site, bad.method, bad.path, status=bad.status, code=bad.code, **bad.options)

        found = tuple((entry["pointer"], entry["code"]) for entry in problem["errors"])
        sentences = " ".join([problem["detail"], *(entry["detail"] for entry in problem["errors"])])
        if bad.entries:
            assert sorted(found) == sorted(bad.entries)
        assert re.search(bad.says, sentences), sentences

    def test_every_row_of_the_lifecycles_is_there(self) -> None:
        assert len(list(lifecycle_rows())) == 6 + 6 + 3


def refused(site: Installation, method: str, path: str, *, status: int, code: str, **options: Any) -> Any:
    """Send the request in each language; demand status, code and sentences that are there; return the English one."""
    headers = options.pop("headers", {})
    answers = {
        language: site.request(method, path, headers={**headers, "Accept-Language": language}, **options)
        for language in LANGUAGES
    }
    problems = {language: answer.json() for language, answer in answers.items()}
    for language, answer in answers.items():
        problem = problems[language]
        assert (answer.status_code, problem.get("code")) == (status, code), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["content-language"].startswith(language)
        assert problem["status"] == status
        assert problem["request_id"] == answer.headers["x-request-id"]
    spoken = {language: sentences_of(problem) for language, problem in problems.items()}
    for english, chinese, german in zip(*(spoken[language] for language in LANGUAGES), strict=True):
        assert english
        assert re.search("[\u4e00-\u9fff]", chinese), chinese
        assert german not in ("", english)
    return problems["en"]


def sentences_of(problem: Any) -> list[str]:
    return [problem["detail"], *(entry["detail"] for entry in problem["errors"])]


# ---- what depends on the state --------------------------------------------------------------------------------------


class TestParameters:
    def test_value_outside_the_typical_range_is_accepted_with_a_warning(self, site: Installation) -> None:
        submitted = site.submit(parameters={"learning_rate": 50.0, "max_steps": 10})

        (warning,) = submitted["warnings"]
        assert (warning["pointer"], warning["code"]) == ("/parameters/learning_rate", "parameter_unusual")
        assert "0.05 – 2" in warning["detail"]
        site.succeed(submitted["id"])


class TestLicence:
    @pytest.fixture(autouse=True)
    def _valid_again(self, site: Installation, census: None) -> Iterator[None]:
        yield
        site.install_licence()

    def test_without_one_methods_are_neither_added_nor_deleted(self, site: Installation) -> None:
        licences.licence_path(site.home).unlink()

        self.refuses(site, None)
        refused(
            site, "DELETE", "/methods/Slow", status=403, code="commercial_license_required", headers={"If-Match": "*"}
        )
        refused(
            site, "POST", "/methods/Custom01:copy", status=403, code="commercial_license_required", json={"name": "C"}
        )
        assert site.get("/license")["state"] == "none"
        assert site.post("/methods:validate", definition(name="Fine"), status=200)["valid"]

    def test_expired_one_counts_no_more(self, site: Installation) -> None:
        site.install_licence(expires_in=-timedelta(days=1))

        self.refuses(site, "license_expired")

    def test_one_of_another_key_is_forged(self, site: Installation, tmp_path: Path) -> None:
        stranger, _ = licences.keygen(tmp_path)
        mine = site.private_key
        site.private_key = stranger
        try:
            site.install_licence()
        finally:
            site.private_key = mine

        self.refuses(site, "license_forged")

    def test_one_whose_date_was_changed_is_forged(self, site: Installation) -> None:
        site.install_licence(expires_in=-timedelta(days=1))
        document = json.loads(licences.licence_path(site.home).read_text("utf-8"))
        payload = json.loads(base64.urlsafe_b64decode(document["payload"] + "=="))
        payload["expires_at"] = None
        document["payload"] = base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")

        site.install_licence(text=json.dumps(document))

        self.refuses(site, "license_forged")

    def test_something_else_is_no_licence(self, site: Installation) -> None:
        site.install_licence(text="MIT License")

        self.refuses(site, "license_malformed")

    def refuses(self, site: Installation, cause: str | None) -> None:
        problem = refused(
            site, "POST", "/methods", status=403, code="commercial_license_required", json=definition(name="Fine")
        )
        assert [entry["code"] for entry in problem["errors"]] == ([cause] if cause else [])
        assert "Custom01" in problem["detail"]
        assert "deepe license install" in problem["detail"]


class TestLiveJob:
    def test_what_it_uses_cannot_be_deleted(self, site: Installation, live: str, census: None) -> None:
        for path, code in (
            ("/methods/Slow", "method_has_live_jobs"),
            ("/base-models/bike-base", "base_model_in_use"),
            ("/datasets/bike-hire", "dataset_in_use"),
        ):
            refused(site, "DELETE", path, status=409, code=code, headers={"If-Match": "*"})

        assert site.get(f"/jobs/{live}")["status"] == "running"

    def test_it_cannot_be_retried(self, site: Installation, live: str, census: None) -> None:
        refused(site, "POST", f"/jobs/{live}:retry", status=409, code="job_not_retryable")

    def test_cancelled_twice_is_fine_until_it_has_ended(self, site: Installation, live: str, census: None) -> None:
        answers = [site.post(f"/jobs/{live}:cancel", status=200) for _ in range(2)]
        ended = site.wait(live)

        problem = refused(site, "POST", f"/jobs/{live}:cancel", status=409, code="job_already_finished")

        assert all(answer["cancel_requested"] for answer in answers)
        assert ended["status"] == "cancelled"
        assert live in problem["detail"]


class TestTroubleAround:
    def test_without_redis_jobs_are_accepted_and_run(self, site: Installation, own_redis: RedisServer) -> None:
        own_redis.stop()
        try:
            ready = httpx.get(f"{site.url}/readyz")
            submitted = site.submit(parameters={"max_steps": 10})
            site.succeed(submitted["id"])
        finally:
            own_redis.start()

        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "degraded": ["redis"]})

    def test_locked_database_is_said_and_nothing_is_changed(self, site: Installation, census: None) -> None:
        body = {"name": "target", "kind": "ollama", "url": "http://127.0.0.1:1"}
        with contextlib.closing(sqlite3.connect(site.home / "deepe.db", isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            readable = site.request("GET", "/methods").status_code
            locked = site.request("POST", "/deploy-targets", json=body, headers={"Accept-Language": "de"})
            connection.execute("ROLLBACK")

        again = site.post("/deploy-targets", body)
        site.call("DELETE", f"/deploy-targets/{again['id']}", status=204)

        assert readable == 200
        assert (locked.status_code, locked.json()["code"]) == (503, "database_busy")
        assert int(locked.headers["Retry-After"]) >= 1
        assert locked.json()["detail"]

    def test_full_disk_of_the_outputs_refuses_the_submit(self, site: Installation, census: None) -> None:
        with small_disk(site.home / "runs", kib=512):
            problem = refused(site, "POST", "/jobs", status=503, code="insufficient_disk_space", json=job())

        assert "MiB" in problem["detail"]

    def test_full_disk_of_the_data_refuses_the_upload_and_leaves_nothing(
        self, site: Installation, census: None
    ) -> None:
        rows = lines(*GOOD_ROWS * 5_000)
        with small_disk(site.home / "datasets", kib=256):
            refused(site, "PUT", "/datasets/large/file", status=507, code="storage_full", content=rows)
            left = list((site.home / "datasets").rglob("*"))

        assert [path for path in left if path.is_file()] == []
        assert site.call("PUT", "/datasets/large/file", status=201, content=rows)["rows"] == 30_000
        site.call("DELETE", "/datasets/large", status=204, params={"with_file": "true"})


@contextlib.contextmanager
def small_disk(folder: Path, *, kib: int) -> Iterator[None]:
    """Put a real file system of `kib` KiB over the folder for a while."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class TestGuardedService:
    def test_full_disk_refuses_the_submit(self, guarded: Installation) -> None:
        refused(guarded, "POST", "/jobs", status=503, code="insufficient_disk_space", json=job())

        assert guarded.get("/jobs")["items"] == []

    @pytest.mark.parametrize(
        ("authorization", "code"),
        [("", "token_missing"), ("Basic YTpi", "token_missing"), ("Bearer something-else", "token_wrong")],
    )
    def test_without_the_token_it_answers_probes_only(
        self, guarded: Installation, authorization: str, code: str
    ) -> None:
        headers = {"Authorization": authorization}

        refused(guarded, "GET", "/methods", status=401, code=code, headers=headers)
        answer = guarded.request("GET", "/methods", headers=headers)

        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert httpx.get(f"{guarded.url}/readyz").status_code == 200
        assert guarded.request("GET", "/methods").status_code == 200


def test_a_base_model_that_cannot_be_made_ends_its_chain_with_the_reason(site: Installation) -> None:
    inputs = {"base_model": "tiny-base", "dataset": "sft-demo", "through": "complete", "wait": True}
    submitted = site.submit("SFT-Demo", **inputs)
    training, saving = (site.wait(link["id"]) for link in submitted["chain"])
    (build,) = site.get("/jobs", params={"stage": "base-model"})["items"]

    assert [entry["code"] for entry in submitted["warnings"]] == ["base_model_made_first"]
    assert (build["status"], build["reason"]) == ("failed", "module_missing")
    assert (training["status"], training["reason"]) == ("failed", "base_model_build_failed")
    assert "ModuleNotFoundError" in "".join(training["log_tail"])
    assert build["id"] in training["reason_detail"]
    assert (saving["status"], saving["reason"]) == ("cancelled", "predecessor_failed")
    assert site.get("/base-models/tiny-base")["made_on_first_use"]
