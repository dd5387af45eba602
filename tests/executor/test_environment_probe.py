"""Looking into environments with their own Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.environment_reports import Probe
from app.executor.environments import environment_probe
from app.executor.environments.environment_probe import EnvironmentProbes, probe

ENVIRON = {"PATH": os.defpath}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Return an environment with modules of its own, in which torch sees two cards."""
    prefix = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    (packages,) = prefix.glob("lib/python3*/site-packages")
    (packages / "mine.py").write_text("raise SystemExit('imported')")
    (packages / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: True)\n    device_count = staticmethod(lambda: 2)\n"
        "class backends:\n    pass\n"
    )
    return prefix


def test_says_what_is_missing_and_what_torch_sees_without_importing_the_rest(prefix: Path) -> None:
    found = probe(prefix, ["mine", "other", "torch"], ENVIRON)

    assert (found.modules, found.missing) == (("mine", "other", "torch"), ("other",))
    assert (found.cuda, found.mps, found.mlx, found.trouble) == (2, False, None, None)


def test_broken_library_is_trouble_and_hides_nothing_else(prefix: Path) -> None:
    (torch,) = prefix.glob("lib/python3*/site-packages/torch.py")
    torch.write_text("raise OSError('libcudart.so.12: cannot open')")

    found = probe(prefix, ["other"], ENVIRON)

    assert (found.missing, found.cuda) == (("other",), None)
    assert found.trouble == "OSError: libcudart.so.12: cannot open"


def test_environment_without_a_python_is_trouble(tmp_path: Path) -> None:
    found = probe(tmp_path / "gone", ["x"], ENVIRON)

    assert found.trouble is not None


def test_one_that_hangs_is_given_up(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (torch,) = prefix.glob("lib/python3*/site-packages/torch.py")
    torch.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(environment_probe, "PROBE_SECONDS", 0.5)

    assert "no answer" in (probe(prefix, [], ENVIRON).trouble or "")


def test_looks_again_only_when_something_changed(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def counted(prefix: Path, modules: list[str], environ: dict[str, str], *, key: str) -> Probe:
        asked.append(modules)
        return Probe(key=key, modules=tuple(modules))

    monkeypatch.setattr(environment_probe, "probe", counted)
    probes = EnvironmentProbes(tmp_path / "envs", ENVIRON)
    probes.probe_all({prefix: {"a"}})
    probes.probe_all({prefix: {"a"}})
    after_restart = EnvironmentProbes(tmp_path / "envs", ENVIRON)
    after_restart.probe_all({prefix: {"a"}})
    probes.probe_all({prefix: {"a", "b"}})
    (packages,) = prefix.glob("lib/python3*/site-packages")
    (packages / "new.py").touch()
    probes.probe_all({prefix: {"a", "b"}})

    assert asked == [["a"], ["a", "b"], ["a", "b"]]
    found = after_restart.of(prefix)
    assert found is not None
    assert found.modules == ("a",)
