"""Names to prefixes, the way conda resolves them."""

import os
from pathlib import Path

import pytest

from app.executor.environments.conda import (
    CondaSearch,
    environment_folders,
    find_executable,
    find_root,
    list_environments,
    resolve,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (home := tmp_path / "home").mkdir()
    return home


def make_prefix(path: Path) -> Path:
    (path / "conda-meta").mkdir(parents=True)
    return path


def search(home: Path, **environ: str) -> CondaSearch:
    return CondaSearch(environ={"PATH": "", **environ}, home=home)


class TestList:
    def test_leaves_out_names_that_cannot_be_asked_for(self, home: Path) -> None:
        make_prefix(home / "miniforge3")
        for name in ("trl", os.fsdecode(b"\xfc")):
            make_prefix(home / "miniforge3" / "envs" / name)

        assert sorted(list_environments(search(home))) == ["base", "trl"]


class TestResolve:
    def test_finds_environment_of_the_root_that_was_named(self, home: Path, tmp_path: Path) -> None:
        root = make_prefix(tmp_path / "conda")
        prefix = make_prefix(root / "envs" / "trl")

        found = resolve("trl", CondaSearch(environ={}, home=home, root=root))

        assert found == prefix

    def test_base_is_the_root(self, home: Path) -> None:
        root = make_prefix(home / "miniforge3")

        assert resolve("base", search(home)) == root
        assert resolve("root", search(home)) == root

    def test_finds_root_of_a_conda_on_path_through_links(self, home: Path, tmp_path: Path) -> None:
        root = make_prefix(tmp_path / "anywhere")
        executable = root / "bin" / "conda"
        executable.parent.mkdir()
        executable.write_text("#!/bin/sh\n")
        executable.chmod(0o755)
        (links := tmp_path / "links").mkdir()
        (links / "conda").symlink_to(executable)

        assert find_root(search(home, PATH=str(links))) == root
        assert find_executable(search(home, PATH=str(links))) == links / "conda"

    def test_first_folder_wins_in_the_order_of_conda(self, home: Path, tmp_path: Path) -> None:
        root = make_prefix(home / "miniforge3")
        by_variable, by_condarc = tmp_path / "variable", tmp_path / "condarc"
        (home / ".condarc").write_text(f"envs_dirs:\n  - {by_condarc}\n  - ~/more\n")
        looked = search(home, CONDA_ENVS_PATH=f"{by_variable}:relative")

        folders = environment_folders(looked)
        late = make_prefix(root / "envs" / "x")
        assert resolve("x", looked) == late
        early = make_prefix(by_variable / "x")

        assert folders[:5] == [by_variable, by_condarc, home / "more", root / "envs", home / ".conda" / "envs"]
        assert resolve("x", looked) == early

    def test_finds_environments_of_mamba(self, home: Path, tmp_path: Path) -> None:
        prefix = make_prefix(tmp_path / "mamba" / "envs" / "x")
        default = make_prefix(home / "micromamba" / "envs" / "y")

        assert resolve("x", search(home, MAMBA_ROOT_PREFIX=str(tmp_path / "mamba"))) == prefix
        assert resolve("y", search(home)) == default

    def test_takes_absolute_path_of_an_environment_only(self, home: Path, tmp_path: Path) -> None:
        prefix = make_prefix(tmp_path / "own")

        assert resolve(str(prefix), search(home)) == prefix
        assert resolve(str(tmp_path), search(home)) is None

    @pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "unknown"])
    def test_knows_no_other_names(self, home: Path, name: str) -> None:
        make_prefix(home / "micromamba" / "envs")

        assert resolve(name, search(home)) is None

    def test_survives_broken_condarc(self, home: Path) -> None:
        (home / ".condarc").write_text("envs_dirs: [")
        prefix = make_prefix(home / ".conda" / "envs" / "x")

        assert resolve("x", search(home)) == prefix


def test_list_shows_what_resolve_finds(home: Path) -> None:
    root = make_prefix(home / "miniforge3")
    make_prefix(root / "envs" / "b")
    make_prefix(home / ".conda" / "envs" / "b")
    make_prefix(home / ".conda" / "envs" / "a")

    found = list_environments(search(home))

    assert found == {"base": root, "a": home / ".conda" / "envs" / "a", "b": root / "envs" / "b"}
    assert found == {name: resolve(name, search(home)) for name in found}
