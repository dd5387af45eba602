"""Who builds what, decided from values."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from app.domain.environment_locks import CondaPackage, EnvironmentLock, PipPackage
from app.executor.environments.builders import (
    Builder,
    EnvironmentBuilderMissing,
    EnvironmentLockUnfit,
    EnvironmentNeedsConda,
    EnvironmentNeedsOtherPython,
    Pip,
    Tools,
    choose_builders,
    conda_packages,
    create_step,
    locked_builder,
    locked_create_step,
    locked_parts,
    locked_pip_step,
    pip_step,
)
from app.executor.environments.shipped import NO_SOURCE
from app.registry.environments.specs import BASE_SPEC, parse_spec

PIP = Pip(("pip",), (26, 3))
BARE = Tools(conda=None, rattler=False, python_version="3.11.7")
WITH_RATTLER = Tools(conda=None, rattler=True, python_version="3.11.7")
WITH_CONDA = Tools(conda=Path("/opt/conda/bin/conda"), rattler=True, python_version="3.11.7")
OURS = parse_spec("channels: [main]\ndependencies: ['python>=3.11,<3.14', pip, {pip: [torch]}]")
FOREIGN = parse_spec("channels: [main]\ndependencies: [python, ffmpeg=7, libsndfile]")


class TestChooseBuilders:
    def test_conda_goes_first_and_alone(self) -> None:
        assert choose_builders(FOREIGN, WITH_CONDA) == [Builder.CONDA]

    def test_venv_stands_in_if_channels_do_not_answer(self) -> None:
        assert choose_builders(OURS, WITH_RATTLER) == [Builder.RATTLER, Builder.VENV]

    def test_venv_needs_nothing(self) -> None:
        assert choose_builders(OURS, BARE) == [Builder.VENV]

    def test_rattler_needs_channels(self) -> None:
        assert choose_builders(parse_spec(BASE_SPEC), WITH_RATTLER) == [Builder.VENV]

    def test_rattler_alone_if_venv_cannot(self) -> None:
        assert choose_builders(FOREIGN, WITH_RATTLER) == [Builder.RATTLER]

    def test_names_packages_that_need_conda(self) -> None:
        with pytest.raises(EnvironmentNeedsConda, match=r"ffmpeg=7, libsndfile\. Move them under \"pip:\""):
            choose_builders(FOREIGN, BARE)

    def test_names_python_that_is_asked_for_and_the_one_that_is_there(self) -> None:
        with pytest.raises(EnvironmentNeedsOtherPython, match=r"python>=3\.13.*3\.11\.7"):
            choose_builders(parse_spec("dependencies: ['python>=3.13']"), BARE)

    @pytest.mark.parametrize("builder", [Builder.CONDA, Builder.RATTLER])
    def test_refuses_builder_that_is_not_there(self, builder: Builder) -> None:
        with pytest.raises(EnvironmentBuilderMissing, match=builder):
            choose_builders(OURS, BARE, wanted=builder)

    def test_takes_builder_that_is_wanted(self) -> None:
        assert choose_builders(OURS, WITH_CONDA, wanted=Builder.VENV) == [Builder.VENV]
        with pytest.raises(EnvironmentNeedsConda):
            choose_builders(FOREIGN, WITH_CONDA, wanted=Builder.VENV)


def locked(**values: Any) -> EnvironmentLock:
    defaults: dict[str, Any] = {
        "environment": "x",
        "spec_hash": "",
        "node": "one",
        "platform": "linux-x86_64",
        "python": "3.11.2",
        "builder": "venv",
        "conda": (),
        "pip": (),
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
    }
    return EnvironmentLock(**{**defaults, **values})


CONDA_LOCK = locked(
    conda=(
        CondaPackage(name="python", version="3.11.7", build="h1_0", url="https://c/py.conda", md5="ab", sha256="cd"),
    )
)


class TestLocks:
    def test_who_installs_what_is_locked(self) -> None:
        assert locked_builder(locked(), WITH_CONDA, platform="linux-x86_64") is Builder.VENV
        assert locked_builder(CONDA_LOCK, WITH_CONDA, platform="linux-x86_64") is Builder.CONDA
        assert locked_builder(CONDA_LOCK, WITH_RATTLER, platform="linux-x86_64") is Builder.RATTLER
        with pytest.raises(EnvironmentNeedsConda):
            locked_builder(CONDA_LOCK, BARE, platform="linux-x86_64")

    @pytest.mark.parametrize(
        ("lock", "says"),
        [(locked(platform="darwin-arm64"), "darwin-arm64"), (locked(python="3.12.1"), r"Python 3\.12\.1")],
    )
    def test_refuses_what_another_machine_locked(self, lock: EnvironmentLock, says: str) -> None:
        with pytest.raises(EnvironmentLockUnfit, match=says):
            locked_builder(lock, BARE, platform="linux-x86_64")

    @pytest.mark.parametrize("family", ["conda", "mamba", "micromamba"])
    def test_conda_family_gets_the_explicit_list(self, family: str) -> None:
        tools = Tools(conda=Path("/bin") / family, rattler=False, python_version="3.11.7")

        step = locked_create_step(Builder.CONDA, CONDA_LOCK, OURS, Path("/envs/x"), tools, channels=())

        create = (f"/bin/{family}", "create", "--yes", "--prefix", "/envs/x")
        assert step.argv == (*create, "--file", "/envs/.x.explicit.txt")
        assert CONDA_LOCK.explicit == "@EXPLICIT\nhttps://c/py.conda#ab\n"

    def test_rattler_gets_every_package_with_its_digest(self) -> None:
        step = locked_create_step(Builder.RATTLER, CONDA_LOCK, OURS, Path("/envs/x"), WITH_RATTLER, channels=())

        assert step.argv[-3:] == ("--channel", "main", "python ==3.11.7 h1_0[sha256=cd]")

    def test_pip_gets_digests_for_those_that_have_one(self) -> None:
        packages = (
            PipPackage(name="a", version="1", sha256="ab"),
            PipPackage(name="b", version="2", url="git+https://b"),
        )

        hashed, other = (locked_pip_step(part, Path("/envs/x"), PIP) for part in locked_parts(packages, NO_SOURCE))

        assert ("--require-hashes" in hashed.argv, "--require-hashes" in other.argv) == (True, False)
        assert all("--no-deps" in step.argv for step in (hashed, other))
        assert [package.requirement for package in packages] == ["a==1 --hash=sha256:ab", "b @ git+https://b"]

    def test_digest_is_that_of_the_packages(self) -> None:
        packages = tuple(PipPackage(name=name, version="1", sha256="ab") for name in "ab")

        same = locked(pip=packages[::-1], node="two", python="3.11.9", bundled=("pip==1",))

        assert locked(pip=packages).digest == same.digest
        assert locked(pip=packages[:1]).digest != same.digest


class TestDefaultChannels:
    def test_serve_a_specification_that_names_none(self) -> None:
        bare = parse_spec("dependencies: [python, ffmpeg]")

        with pytest.raises(EnvironmentNeedsConda):
            choose_builders(bare, WITH_RATTLER)
        assert choose_builders(bare, WITH_RATTLER, channels=["inner"]) == [Builder.RATTLER]
        step = create_step(Builder.RATTLER, bare, Path("/envs/x"), WITH_RATTLER, channels=["inner"])
        assert step.argv[-4:] == ("--channel", "inner", "python", "ffmpeg")
        named = create_step(Builder.RATTLER, OURS, Path("/envs/x"), WITH_RATTLER, channels=["inner"])
        assert "inner" not in named.argv


class TestSteps:
    def test_conda_gets_channels_and_packages(self) -> None:
        spec = parse_spec("channels: [main, nodefaults]\ndependencies: ['python>=3.11', {pip: [torch]}]")

        step = create_step(Builder.CONDA, spec, Path("/envs/x"), WITH_CONDA)

        assert step.argv == (
            *("/opt/conda/bin/conda", "create", "--yes", "--prefix", "/envs/x", "--override-channels"),
            *("--channel", "main", "python>=3.11", "pip"),
        )

    def test_python_and_pip_are_added_where_a_stage_needs_them(self) -> None:
        assert conda_packages(parse_spec("dependencies: [numpy]")) == ["numpy", "python"]
        assert conda_packages(parse_spec("dependencies: [{pip: [x]}]")) == ["python", "pip"]

    def test_no_pip_step_without_pip_packages(self) -> None:
        assert pip_step(parse_spec(BASE_SPEC), Path("/envs/x"), PIP) is None
