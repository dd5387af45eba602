"""The mutants themselves: each change still fits the sources. `make mutants` runs them all; a few run here."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.chaos.mutants import MUTANTS, ROOT, Mutant, apply, fate_of, table

REPRESENTATIVES = ("lock removed", "token not checked")  # of a process, and of a row


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_change_fits_and_leaves_a_program(mutant: Mutant, tmp_path: Path) -> None:
    for change in mutant.changes:
        (tmp_path / change.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / change.file, tmp_path / change.file)
        apply(change, tmp_path)
        ast.parse((tmp_path / change.file).read_text("utf-8"))


def test_names_are_unique_and_tests_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert all((ROOT / test.partition("::")[0]).is_file() for test in mutant.tests), mutant.name


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_is_noticed(name: str) -> None:
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]

    fate = fate_of(mutant)

    assert fate.killer, table([fate])
