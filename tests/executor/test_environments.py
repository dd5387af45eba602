"""What a name means on a node."""

import json
import shutil
from pathlib import Path

import pytest

from app.domain.environment_reports import EnvironmentState
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environments import (
    EnvironmentFinder,
    EnvironmentSource,
    FoundEnvironment,
    find_environment,
    lock_path,
    planned_prefix,
    read_marker,
    write_marker,
)
from app.registry.environments.specs import BASE_SPEC, EnvironmentSpec, parse_spec

SPEC = parse_spec("dependencies: [python, pip, {pip: [torch]}]")
NEWER = parse_spec("dependencies: [python, pip, {pip: [torch>2]}]")


@pytest.fixture
def envs(tmp_path: Path) -> Path:
    (envs := tmp_path / "envs").mkdir()
    return envs


@pytest.fixture
def search(tmp_path: Path) -> CondaSearch:
    return CondaSearch(environ={"PATH": ""}, home=tmp_path / "home")


def make_python(prefix: Path, *, kind: str) -> Path:
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "python").touch(mode=0o755)
    if kind == "conda":
        (prefix / "conda-meta").mkdir()
    elif kind == "venv":
        (prefix / "pyvenv.cfg").touch()
    return prefix


def make_build(envs: Path, name: str, spec: EnvironmentSpec) -> Path:
    prefix = make_python(planned_prefix(name, spec, envs), kind="venv")
    lock_path(prefix).touch()
    write_marker(prefix, name=name, spec=spec, builder="venv", packages=["pip==1"])
    return prefix


class TestFindEnvironment:
    def test_missing_with_specification_names_the_place_to_build(self, envs: Path, search: CondaSearch) -> None:
        found = find_environment("trl", SPEC, envs_dir=envs, search=search)

        assert found == FoundEnvironment("trl", planned_prefix("trl", SPEC, envs), EnvironmentState.KNOWN, None)

    def test_missing_without_specification(self, envs: Path, search: CondaSearch) -> None:
        found = find_environment("trl", None, envs_dir=envs, search=search)

        assert found == FoundEnvironment("trl", None, EnvironmentState.MISSING, None)

    def test_own_build_is_ready_and_goes_before_conda(self, envs: Path, search: CondaSearch) -> None:
        make_python(search.home / ".conda" / "envs" / "trl", kind="conda")
        prefix = make_build(envs, "trl", SPEC)

        found = find_environment("trl", SPEC, envs_dir=envs, search=search)

        assert (found.prefix, found.state, found.source) == (prefix, EnvironmentState.READY, EnvironmentSource.BUILT)

    def test_build_without_marker_is_missing(self, envs: Path, search: CondaSearch) -> None:
        make_python(planned_prefix("trl", SPEC, envs), kind="venv")

        assert find_environment("trl", SPEC, envs_dir=envs, search=search).state is EnvironmentState.KNOWN

    def test_build_of_an_older_specification_is_stale(self, envs: Path, search: CondaSearch) -> None:
        prefix = make_build(envs, "trl", SPEC)

        found = find_environment("trl", NEWER, envs_dir=envs, search=search)

        assert (found.prefix, found.state, found.source) == (prefix, EnvironmentState.STALE, EnvironmentSource.BUILT)

    def test_newest_build_serves_a_name_without_specification(self, envs: Path, search: CondaSearch) -> None:
        make_build(envs, "trl", SPEC)
        newer = make_build(envs, "trl", NEWER)

        found = find_environment("trl", None, envs_dir=envs, search=search)

        assert (found.prefix, found.state) == (newer, EnvironmentState.READY)

    def test_conda_environment_is_ready_if_it_has_a_python(self, envs: Path, search: CondaSearch) -> None:
        prefix = make_python(search.home / ".conda" / "envs" / "trl", kind="conda")
        (search.home / ".conda" / "envs" / "empty" / "conda-meta").mkdir(parents=True)

        found = find_environment("trl", SPEC, envs_dir=envs, search=search)
        empty = find_environment("empty", None, envs_dir=envs, search=search)

        assert found == FoundEnvironment("trl", prefix, EnvironmentState.READY, EnvironmentSource.CONDA)
        assert empty.state is EnvironmentState.MISSING

    def test_folder_or_link_that_the_operator_placed_goes_first(self, envs: Path, search: CondaSearch) -> None:
        make_build(envs, "trl", SPEC)
        elsewhere = make_python(envs.parent / "elsewhere", kind="venv")
        (envs / "trl").symlink_to(elsewhere)

        found = find_environment("trl", SPEC, envs_dir=envs, search=search)

        assert found == FoundEnvironment("trl", envs / "trl", EnvironmentState.READY, EnvironmentSource.VENV)

    def test_copy_of_a_build_takes_over_no_name(self, envs: Path, search: CondaSearch) -> None:
        prefix = make_build(envs, "trl", SPEC)
        for copy in ("my_env", f"{prefix.name}-copy of it", f"x-{prefix.name}"):
            shutil.copytree(prefix, envs / copy)

        found = find_environment("trl", SPEC, envs_dir=envs, search=search)
        mine = find_environment("my_env", None, envs_dir=envs, search=search)

        assert (found.prefix, found.state) == (prefix, EnvironmentState.READY)
        assert (mine.prefix, mine.source) == (envs / "my_env", EnvironmentSource.VENV)

    def test_absolute_path_names_itself(self, envs: Path, search: CondaSearch) -> None:
        prefix = make_python(envs.parent / "own", kind="venv")

        assert find_environment(str(prefix), None, envs_dir=envs, search=search).prefix == prefix

    @pytest.mark.parametrize("name", ["", ".", "..", "../own", "a/../../own", "x\0"])
    def test_names_cannot_leave_the_folder(self, envs: Path, search: CondaSearch, name: str) -> None:
        make_python(envs.parent / "own", kind="venv")

        assert find_environment(name, None, envs_dir=envs, search=search).state is EnvironmentState.MISSING

    def test_base_is_condas_root_else_a_build_of_python_and_pip(self, envs: Path, search: CondaSearch) -> None:
        planned = find_environment("base", None, envs_dir=envs, search=search)
        built = make_build(envs, "base", parse_spec(BASE_SPEC))
        without_conda = find_environment("base", None, envs_dir=envs, search=search)
        root = make_python(search.home / "miniforge3", kind="conda")
        with_conda = find_environment("base", None, envs_dir=envs, search=search)

        assert (planned.prefix, planned.state) == (built, EnvironmentState.KNOWN)
        assert (without_conda.prefix, without_conda.state) == (built, EnvironmentState.READY)
        assert with_conda == FoundEnvironment("base", root, EnvironmentState.READY, EnvironmentSource.CONDA)


def test_list_shows_every_ready_name_once(envs: Path, search: CondaSearch) -> None:
    make_build(envs, "trl", SPEC)
    make_build(envs, "trl", NEWER)
    make_python(envs / "half-0123456789ab", kind="venv")
    lock_path(envs / "half-0123456789ab").touch()
    make_python(envs / "placed", kind="venv")
    make_python(search.home / ".conda" / "envs" / "users", kind="conda")

    found = EnvironmentFinder(envs_dir=envs, search=search).scan().ready()

    assert [(environment.name, environment.source) for environment in found] == [
        ("placed", EnvironmentSource.VENV),
        ("trl", EnvironmentSource.BUILT),
        ("users", EnvironmentSource.CONDA),
    ]


def test_marker_tells_what_was_built(envs: Path) -> None:
    prefix = make_build(envs, "trl", SPEC)

    build = read_marker(prefix)

    assert build is not None
    assert (build.name, build.builder, list(build.packages)) == ("trl", "venv", ["pip==1"])
    assert read_marker(envs) is None
    (prefix / "deepe-ready.json").write_text(json.dumps({"name": "trl"}))
    assert read_marker(prefix) is None
