"""What a file in the users' script root can do to others: nothing, on a real worker with real processes."""

import json
from dataclasses import asdict

from app.domain.definition import MethodDefinition
from app.domain.enums import EndReason, JobKind, JobStatus
from app.executor.runs.job_spec import PinnedScript
from app.registry.scripts.versions import VersionStore
from tests.worker.harness import ENDED_WELL, PLAY, Site
from tests.worker.test_chain import submit_custom01
from tests.worker.test_contract import ABOVE

MODULES = ("json", "argparse", "torch", "deepe", "enums", "pickle", "socket")
# What a process sees that a shipped script starts: with -c and -m Python looks into the working directory first.
CHILDREN = """
code = "import json, pickle, socket; print(json.__file__)"
run = lambda *arguments: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout
seen = {"path": sys.path, "cwd": os.getcwd(), "child": run("-c", code), "module": run("-m", "json.tool", "--help")}
(NOTES / "seen.json").write_text(json.dumps(seen))
adapter()
"""
SIBLINGS = """
import helper_of_mine, play, train_callback
said = [helper_of_mine.SAID, getattr(train_callback, "MINE", "ours")]
(play.NOTES / ("said-" + play.os.environ["DEEPE_JOB_ID"])).write_text(play.json.dumps(said))
play.adapter()
"""


def hide_modules(site: Site) -> None:
    """Put files into the script root by hand that hide what they are called after."""
    for name in MODULES:
        (site.home.scripts / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the script root ran')\n")
    (site.home.scripts / "sitecustomize.py").write_text("open('../traces', 'a').write('sitecustomize')\n")


def shipped(site: Site, content: str) -> PinnedScript:
    """Keep bytes as those of a script that an older version of the product shipped."""
    sha256 = VersionStore(site.home.versions).put(content.encode())
    return PinnedScript(file="custom01.py", sha256=sha256, size=len(content.encode()), shipped=True)


class TestShippedScripts:
    async def test_run_whatever_lies_in_the_script_root(self, site: Site) -> None:
        ids = await submit_custom01(site, shipped=True)
        hide_modules(site)

        site.start_worker()
        rows = await site.wait_for_end(*ids)

        assert [(row.status, row.reason) for row in rows] == [ENDED_WELL] * 3, site.story(rows[-1])
        assert not (site.root / "traces").exists()

    async def test_start_processes_that_do_not_look_there_either(self, site: Site) -> None:
        job = await site.job("")
        pinned = shipped(site, f"import subprocess\n{PLAY}{CHILDREN}")
        job.launch = site.spec(pinned, JobKind.TRAINING).document()
        (job_id,) = await site.insert(job)
        hide_modules(site)

        site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        seen = json.loads((site.root / "journal" / "seen.json").read_text())
        assert seen["cwd"] == str(site.home.scripts)
        assert str(site.home.scripts) not in seen["path"]
        assert str(site.home.scripts) not in seen["child"]
        assert not (site.root / "traces").exists()


# What is known only when it runs is not pinned.
LATE = "import importlib, play\nimportlib.import_module('late_' + 'module')\n"
DATA = "import os, play\nopen(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'some' + '.txt'))\n"
WHOLE = """
import helper_of_mine, os, play
here = os.path.dirname(os.path.abspath(__file__))
said = [helper_of_mine.SAID, open(os.path.join(here, "cfg.txt")).read(), "old", os.getcwd()]
(play.NOTES / "said").write_text(play.json.dumps(said))
play.adapter()
"""


OWN = """
import play
from . import words
from .deep.more import MORE
said = [words.SAID, MORE, __name__, play.os.getcwd()]
(play.NOTES / "said-module").write_text(play.json.dumps(said))
play.adapter()
"""


async def submit_module(site: Site, module: str) -> str:
    """Submit a training that runs a module of the script root."""
    stages = {"training": {"module": module, "conda_env": "base"}}
    check = site.files.check(MethodDefinition.model_validate({"stages": stages}))
    assert not check.violations
    site.files.keep(check)
    job = await site.job("")
    pinned = PinnedScript(**asdict(check.pins[JobKind.TRAINING]))
    job.launch = site.spec(pinned, JobKind.TRAINING).document()
    (job_id,) = await site.insert(job)
    return job_id


class TestWhatIsPinned:
    async def test_runs_as_it_was_when_the_job_was_queued(self, site: Site) -> None:
        scripts = site.home.scripts
        (scripts / "sub").mkdir()
        files = {"helper_of_mine.py": "SAID = 'old'\n", "cfg.txt": "old", "play.py": PLAY}
        for name, content in files.items():
            (scripts / "sub" / name).write_text(content)
        (scripts / "own" / "deep").mkdir(parents=True)
        package = {
            "__init__": "",
            "train": OWN,
            "words": "SAID = 'old'\n",
            "deep/more": "MORE = 'old'\n",
        }
        for name, content in package.items():
            (scripts / "own" / f"{name}.py").write_text(content)
        queued = await site.submit(WHOLE, file="sub/entry.py")
        of_module = await submit_module(site, "own.train")
        for path in (*scripts.glob("sub/*"), *scripts.glob("own/**/*.py")):
            path.write_text("raise SystemExit('the new one ran')\n")
        for name in ("late_module.py", "some.txt"):
            (scripts / name).write_text("")
        unseen = [await site.submit(text) for text in (LATE, DATA)]

        site.start_worker()
        row, module, *failed = await site.wait_for_end(queued, of_module, *unseen)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        assert module.status is JobStatus.SUCCEEDED, site.story(module)
        assert json.loads((site.root / "journal" / "said-module").read_text()) == [
            "old",
            "old",
            "__main__",
            str(scripts),
        ]
        assert json.loads((site.root / "journal" / "said").read_text()) == ["old", "old", "old", str(scripts)]
        assert [(one.reason, one.reason_params["file"]) for one in failed] == [
            (EndReason.FILE_NOT_PINNED, "late_module"),
            (EndReason.FILE_NOT_PINNED, "some.txt"),
        ]


class TestScriptsOfUsers:
    async def test_see_their_siblings_and_their_own_copies_of_helpers(self, site: Site) -> None:
        (site.home.scripts / "helper_of_mine.py").write_text("SAID = 'hello'\n")
        (site.home.scripts / "train_callback.py").write_text("MINE = 'mine'\n")
        ids = [await site.submit(SIBLINGS), await site.submit(f"{ABOVE}{SIBLINGS}", file="sub/train.py")]

        site.start_worker()
        rows = await site.wait_for_end(*ids)

        assert [row.status for row in rows] == [JobStatus.SUCCEEDED] * 2, [site.story(row) for row in rows]
        said = [json.loads((site.root / "journal" / f"said-{job_id}").read_text()) for job_id in ids]
        assert said == [["hello", "mine"]] * 2

    async def test_of_a_folder_see_that_folder_only(self, site: Site) -> None:
        (site.home.scripts / "sub").mkdir()
        (site.home.scripts / "sub" / "helper_of_mine.py").write_text("SAID = 'from the folder'\n")
        (site.home.scripts / "sub" / "play.py").write_text(PLAY)
        job_id = await site.submit(SIBLINGS, file="sub/train.py")
        hide_modules(site)

        site.start_worker()
        row = await site.wait(job_id)

        assert row.status is JobStatus.SUCCEEDED, site.story(row)
        assert json.loads((site.root / "journal" / f"said-{job_id}").read_text()) == ["from the folder", "ours"]
        assert not (site.root / "traces").exists()
