"""Looking into environments with their own Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.environment_reports import Probe
from app.executor.environments import environment_probe
from app.executor.environments.environment_probe import EnvironmentProbes, Needs, describe, probe

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


def test_names_that_a_library_has_no_longer(prefix: Path) -> None:
    (library := next(prefix.glob("lib/python3*/site-packages")) / "lib").mkdir()
    (library / "__init__.py").write_text("here = 1")
    (library / "part.py").touch()
    (library / "broken.py").write_text("raise RuntimeError('no GPU')")
    needed = ["absent", "absent:x", "lib", "lib:broken", "lib:gone", "lib:here", "lib:part", "lib.part:gone"]

    found = probe(prefix, needed, ENVIRON)

    assert found.modules == tuple(needed)
    assert found.missing == ("absent", "lib:gone", "lib.part:gone")


def test_looks_again_only_when_something_changed(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def counted(prefix: Path, modules: list[str], environ: dict[str, str], *, key: str) -> Probe:
        asked.append(modules)
        return Probe(key=key, modules=tuple(modules))

    monkeypatch.setattr(environment_probe, "probe", counted)
    probes = EnvironmentProbes(tmp_path / "envs", ENVIRON)
    probes.probe_all({prefix: Needs(frozenset({"a"}))})
    probes.probe_all({prefix: Needs(frozenset({"a"}))})
    after_restart = EnvironmentProbes(tmp_path / "envs", ENVIRON)
    after_restart.probe_all({prefix: Needs(frozenset({"a"}))})
    probes.probe_all({prefix: Needs(frozenset({"a", "b"}))})
    (packages,) = prefix.glob("lib/python3*/site-packages")
    (packages / "new.py").touch()
    probes.probe_all({prefix: Needs(frozenset({"a", "b"}))})

    assert asked == [["a"], ["a", "b"], ["a", "b"]]
    found = after_restart.of(prefix)
    assert found is not None
    assert found.modules == ("a",)


LIBRARY = """
import enum, os, typing
from dataclasses import dataclass, field

class Strategy(str, enum.Enum):
    NO, STEPS = "no", "steps"

class Odd:
    def __repr__(self):
        return "Odd()"

@dataclass
class Config:
    where: "str | None" = field(default=None, metadata={"help": "Where. " + "And more words. " * 100})
    rate: float = 0.1
    steps: int = 3
    quick: bool = True
    names: "list[str] | None" = None
    strategy: "Strategy | str" = "no"
    kind: typing.Literal["a", "b"] = "a"
    mixed: typing.Union[bool, typing.Literal["x"]] = True
    weights: dict = field(default_factory=dict)
    odd: Odd = field(default_factory=Odd)
    foreign: "Nowhere | None" = None
    hidden: int = field(default=1, init=False)
    needed: "int" = field(kw_only=True)

print("noise of an import", os.environ["CUDA_VISIBLE_DEVICES"] == "")
"""


class TestDescribing:
    @pytest.fixture
    def library(self, prefix: Path) -> Path:
        (packages,) = prefix.glob("lib/python3*/site-packages")
        (packages / "library.py").write_text(LIBRARY)
        return prefix

    def test_says_what_each_field_takes(self, library: Path) -> None:
        described, trouble, ended = describe(library, ["library.Config"], ENVIRON)

        assert (trouble, ended) == ({}, True)
        (config,) = described
        found = {one.name: one for one in config.fields}
        assert {name: (one.kind.value, one.is_list, one.choices) for name, one in found.items()} == {
            "where": ("string", False, None),
            "rate": ("number", False, None),
            "steps": ("integer", False, None),
            "quick": ("boolean", False, None),
            "names": ("string", True, None),
            "strategy": ("string", False, ("no", "steps")),
            "kind": ("string", False, ("a", "b")),
            "mixed": ("any", False, None),
            "weights": ("any", False, None),
            "odd": ("any", False, None),
            "foreign": ("any", False, None),
            "needed": ("integer", False, None),
        }
        assert (found["odd"].default, found["odd"].default_text) == (None, "Odd()")
        assert (found["rate"].default, found["names"].nullable, found["needed"].required) == (0.1, True, True)
        assert found["where"].help.startswith("Where. And more")
        assert 400 < len(found["where"].help) <= 500

    def test_what_cannot_be_described_hides_nothing_else(self, library: Path) -> None:
        described, trouble, ended = describe(library, ["library.Config", "library.Odd", "gone.Config"], ENVIRON)

        assert [one.path for one in described] == ["library.Config"]
        assert trouble == {
            "library.Odd": "ImportError: library.Odd is not a dataclass",
            "gone.Config": "ModuleNotFoundError: No module named 'gone'",
        }
        assert ended

    def test_library_that_ends_the_program_hides_no_other(self, library: Path) -> None:
        (packages,) = library.glob("lib/python3*/site-packages")
        (packages / "fatal.py").write_text("import os\nos._exit(3)")

        described, trouble, ended = describe(library, ["fatal.Config", "library.Config"], ENVIRON)

        assert [one.path for one in described] == ["library.Config"]
        assert list(trouble) == ["fatal.Config"]
        assert not ended

    def test_library_that_prints_without_end_fills_no_disk(self, library: Path) -> None:
        (module,) = library.glob("lib/python3*/site-packages/library.py")
        module.write_text("while True: print('x' * 2**16)")

        described, trouble, _ = describe(library, ["library.Config"], ENVIRON)

        assert described == ()
        assert list(trouble) == ["library.Config"]

    def test_library_that_hangs_is_given_up_and_asked_again_after_a_restart(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (module,) = library.glob("lib/python3*/site-packages/library.py")
        monkeypatch.setattr(environment_probe, "DESCRIBE_SECONDS", 0.5)
        module.write_text("import time; time.sleep(600)")
        needs = {library: Needs(classes=frozenset({"library.Config"}))}
        probes = EnvironmentProbes(tmp_path / "envs", ENVIRON)
        probes.probe_all(needs)
        asked = probes.of(library)

        module.write_text(LIBRARY)
        monkeypatch.setattr(environment_probe, "DESCRIBE_SECONDS", 60)
        after_restart = EnvironmentProbes(tmp_path / "envs", ENVIRON)
        after_restart.probe_all(needs)
        found = after_restart.of(library)

        assert asked is not None
        assert found is not None
        assert (asked.options, "no answer" in asked.options_trouble["library.Config"]) == ({}, True)
        assert list(found.options) == ["library.Config"]
        kept = after_restart.descriptions(found.options.values())
        assert [document["path"] for document in kept.values()] == ["library.Config"]

    def test_unchanged_environment_is_described_once(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Path] = []

        def counted(prefix: Path, classes: list[str], environ: dict[str, str]) -> object:
            asked.append(prefix)
            return describe(prefix, classes, environ)

        monkeypatch.setattr(environment_probe, "describe", counted)
        needs = {library: Needs(classes=frozenset({"library.Config"}))}
        for _ in range(2):
            probes = EnvironmentProbes(tmp_path / "envs", ENVIRON)
            probes.probe_all(needs)
            probes.probe_all(needs)

        assert asked == [library]
