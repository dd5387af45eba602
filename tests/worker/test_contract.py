"""What a script sees: its arguments, its working directory, its environment, and a log that keeps every byte."""

import hashlib
import json
from pathlib import Path
from typing import Any

from app.domain.enums import JobKind, JobStatus
from app.executor.runs.job_spec import Deployment, InferenceRequest
from app.presets.catalogue import helpers_dir
from tests.worker.harness import ASKING, CONTAINMENT, Site

LOOK = """
import json, os, play, sys
seen = {"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ), "stdin": sys.stdin.read()}
(play.NOTES / ("seen-" + os.environ["DEEPE_JOB_ID"])).write_text(json.dumps(seen))
play.adapter()
play.complete()
print('{"status": "success"}')
"""

# How DeepExtension's scripts in folders reach the script root.
ABOVE = "import os, sys\nsys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))\n"

SECRETS = {
    "DEEPE_API_TOKEN": "token-0123456789-abcdefgh",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "PGPASSWORD": "secret",
    "PIP_INDEX_URL": "https://user:secret@packages.example.com",
    "PYTHONPATH": "/somewhere",
}


def seen_by(site: Site, job_id: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((site.root / "journal" / f"seen-{job_id}").read_text())
    return document


class TestEnvironment:
    async def test_is_an_allow_list(self, site: Site) -> None:
        job_id = await site.submit(LOOK, parameters={"epochs": 3})

        site.start_worker(**SECRETS, LANG="C.UTF-8", CUDA_VISIBLE_DEVICES="1", HF_HOME="/hub", TZ="UTC")
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        env = seen_by(site, job_id)["env"]
        run = site.run_folder(job_id)
        (attempt,) = await site.attempts(job_id)
        assert "secret" not in json.dumps(env)
        assert SECRETS["DEEPE_API_TOKEN"] not in json.dumps(env)
        assert site.database_url not in json.dumps(env)
        assert {name: value for name, value in env.items() if name.startswith("DEEPE_")} == {
            "DEEPE_JOB_ID": job_id,
            "DEEPE_ATTEMPT": attempt.id,
            "DEEPE_OUTPUT_DIR": str(run.output),
            "DEEPE_CACHE_DIR": str(run.cache),
            "DEEPE_PARAMS": str(run.path / "params.json"),
            "DEEPE_EVENTS": str(run.events),
            "DEEPE_ACCELERATORS": "",
            "DEEPE_TARGET_ADDRESSES": "any",
        }
        assert json.loads((run.path / "params.json").read_text()) == {"epochs": 3}
        own, helpers = env["PYTHONPATH"].split(":")
        argv = seen_by(site, job_id)["argv"]
        assert (own, helpers) == (str(Path(argv[0]).parent), str(helpers_dir()))
        assert Path(own).is_relative_to(site.home.versions)
        base = site.node_home().environments / "base"
        assert (env["VIRTUAL_ENV"], env["PATH"].split(":")[0]) == (str(base), str(base / "bin"))
        assert (env["CUDA_VISIBLE_DEVICES"], env["HF_HOME"], env["PYTHONUNBUFFERED"]) == ("1", "/hub", "1")
        known = {"PATH", "HOME", "LANG", "LC_CTYPE", "TZ", "CUDA_VISIBLE_DEVICES", "HF_HOME", "VIRTUAL_ENV"}
        python = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONNOUSERSITE"}
        bubblewrap = {"PWD"} if CONTAINMENT != "off" else set()
        assert {name for name in env if not name.startswith("DEEPE_")} - known - python == bubblewrap

    async def test_names_redis_but_not_its_password(self, site: Site) -> None:
        site.redis_url = "redis://someone:secret@127.0.0.1:1/3"
        job_id = await site.submit(LOOK)

        site.start_worker()
        await site.wait(job_id, JobStatus.SUCCEEDED)

        env = seen_by(site, job_id)["env"]
        redis = {name: value for name, value in env.items() if name.startswith("AI_PY_REDIS_")}
        assert redis == {
            "AI_PY_REDIS_HOST": "127.0.0.1",
            "AI_PY_REDIS_START_PORT": "1",
            "AI_PY_REDIS_EXPOSED_PORT": "1",
        }
        assert "secret" not in json.dumps(env)


TRAINING = {"train_name": "a b", "learning_rate": 2e-05, "load_in_4bit": False, "tags": ["x", "ü"], "nothing": None}


class TestArguments:
    async def test_are_those_of_the_contract_for_every_stage(self, site: Site) -> None:
        below = f"{ABOVE}{LOOK}"
        chain = [await site.job(below, JobKind.TRAINING, file="sub/train.py", parameters=TRAINING, name="first")]
        for position, kind in enumerate((JobKind.SAVING, JobKind.DEPLOYMENT), start=1):
            deployment = Deployment(target="custom", url="http://127.0.0.1:9", quantize="q8_0", system="Be kind.")
            spec = {"deployment": deployment} if kind is JobKind.DEPLOYMENT else {}
            row = await site.job(LOOK, kind, position=position, spec=spec)
            row.chain_id, row.blocked_by = chain[0].id, chain[-1].id
            chain.append(row)
        ids = await site.insert(*chain)
        site.start_worker()
        rows = await site.wait_for_end(*ids)
        assert [row.status for row in rows] == [JobStatus.SUCCEEDED] * 3, site.story(rows[-1])
        models = await site.models()
        request = InferenceRequest(prompt="Hello?\n-- two", history=({"role": "user", "content": "é"},), session_id="s")
        for kind, source in zip(sorted(ASKING), (ids[1], ids[0]), strict=True):
            model_id = models[source].id
            ids.append(await site.submit(LOOK, kind, spec={"question": request}, model_id=model_id))
        await site.wait_for_end(*ids)

        told = [seen_by(site, job_id) for job_id in ids]

        assert {view["cwd"] for view in told} == {str(site.home.scripts)}
        assert {view["stdin"] for view in told} == {""}
        assert [view["argv"][1:] for view in told[:3]] == expected_chain(site, ids[:3], models)
        assert Path(told[0]["argv"][0]).parts[-3:] == ("scripts", "sub", "train.py")
        complete, customized = told[3]["argv"][1:], told[4]["argv"][1:]
        assert complete == asked(models[ids[1]].id, models[ids[1]].name, f"../runs/{ids[1]}/1/output", ids[1])
        assert customized == asked(models[ids[0]].id, models[ids[0]].name, "../models/base", ids[0])


def expected_chain(site: Site, ids: list[str], models: Any) -> list[list[str]]:
    """Return the arguments of training, saving and deployment."""
    train, save, deploy = ids
    return [
        [
            f"--train_id={train}", "--seq=1", "--model_name=base", "--model_path=../models/base",
            "--dataset_path=../datasets/rows.jsonl", f"--output_dir=../runs/{train}/1/output", "--train_name=a b",
            "--learning_rate=2e-05", "--load_in_4bit=False", '--tags=["x", "\\u00fc"]',
            "--train_file_name=sub/train.py", "--train_env=base",
        ],
        [
            "--train_id", save, "--seq", "2", "--save_path", f"../runs/{save}/1/output", "--base_path",
            "../models/base", "--adapter_path", f"../runs/{train}/1/output", "--dtype_str", "bfloat16",
            "--model_usage_type", "chat",
        ],
        [
            "--trainId", deploy, "--seq", "3", "--folderPath", str(site.home.runs / save / "1" / "output"),
            "--serverUrl", "http://127.0.0.1:9", "--modelName", models[deploy].name, "--quantize", "q8_0",
            "--template", "", "--basePath", "../models/base", "--actualPath", f"../runs/{save}/1/output",
            "--system", "Be kind.",
        ],
    ]  # fmt: skip


def asked(model_id: str, name: str, base: str, made_by: str) -> list[str]:
    """Return the arguments of an inference script."""
    return [
        f"--model_id={model_id}", f"--model_name={name}", f"--base_model_path={base}", "--prompt=Hello?\n-- two",
        "--session_id=s", "--max_length=512", "--max_context_tokens=2048", "--temperature=0.7", "--top_p=0.9",
        "--top_k=50", "--model_type=chat", "--template=", '--history=[{"role": "user", "content": "\\u00e9"}]',
        f"--model_path=../runs/{made_by}/1/output",
    ]  # fmt: skip


NOISE = r"""
import hashlib, play, sys
digest = hashlib.sha256()
def say(data):
    digest.update(data)
    sys.stdout.buffer.write(data)
for number in range(200_000):
    say(b"line %d \xff\xc3\xbc of the log\n" % number)
    if number % 1000 == 0:
        for percent in range(0, 101, 5):
            say(b"\r%3d%%|####      | 1.2it/s" % percent)
say(b"no newline at the end")
sys.stdout.buffer.flush()
(play.NOTES / "digest").write_text(digest.hexdigest())
play.adapter()
"""


class TestLog:
    async def test_keeps_every_byte(self, site: Site) -> None:
        job_id = await site.submit(NOISE)

        site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, row.reason_params
        content = site.run_folder(job_id).output_log.read_bytes()
        assert hashlib.sha256(content).hexdigest() == (site.root / "journal" / "digest").read_text()
        tail = row.reason_params["log_tail"]
        assert len(tail) == 20
        assert tail[-1] == "no newline at the end"

    async def test_both_streams_arrive_in_their_order(self, site: Site) -> None:
        text = "import play, sys\nfor n in range(50):\n    print(n)\n    print(-n, file=sys.stderr)\nplay.adapter()\n"
        job_id = await site.submit(text)

        site.start_worker()
        await site.wait(job_id, JobStatus.SUCCEEDED)

        assert site.output(job_id).split() == [word for n in range(50) for word in (str(n), str(-n))]
