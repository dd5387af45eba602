"""What the rows of a data set become for a method: read as its script reads them, before anything is queued.

The reader is the scripts' own (`deepe_rows`). A large file is read by another process, so that the service goes on
answering; what was found is remembered by the digest of the file.
"""

import json
import logging
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any, Final

from app.domain.errors import Violation
from app.domain.plain_text import shown
from app.presets.catalogue import helpers_dir
from app.presets.shared.helpers.deepe_rows import Refused
from app.presets.shared.helpers.deepe_rows.sharing import shared_rows
from app.presets.shared.helpers.deepe_rows.survey import survey, wanted_of
from app.registry.datasets.process import DatasetUnprocessed

logger = logging.getLogger(__name__)

INLINE_BYTES: Final = 256 * 1024
PATIENCE_SECONDS: Final = 600
_SLOTS: Final = BoundedSemaphore(2)
"""How many files are read at once; others wait."""
_REMEMBERED: Final = 512
_LISTED_ALIKE: Final = 3


@dataclass(frozen=True)
class RowsWanted:
    """What a method learns from, and how the caller wants the rows to be read."""

    kinds: tuple[str, ...]
    """Without any, nothing is known of what rows become."""
    tools: bool = True
    pictures: bool = False
    columns: tuple[str, str] | None = None
    form: str | None = None
    limit: int = -1
    """Rows from the beginning that are used; all if it is not positive."""


@dataclass(frozen=True)
class RowSurvey:
    """What was found; see `deepe_rows.survey`."""

    found: Mapping[str, Any]
    needs_pictures: bool = False

    @property
    def rows(self) -> int:
        """The rows that were read."""
        return int(self.found["rows"])

    @property
    def examples(self) -> int:
        """The rows that something is learned from."""
        return sum(self.found["kinds"].values())

    @property
    def sequences(self) -> int:
        """What is learned, one for each answer."""
        return int(self.found["sequences"])

    @property
    def tokens_per_sequence(self) -> float | None:
        """An estimate, without a tokenizer."""
        found: float | None = self.found["tokens_per_sequence"]
        return found

    def violations(self, columns: Sequence[str], at: str) -> list[Violation]:
        """Return why the data cannot be learned from; rows with the same fault are listed a few times only."""
        if "refused" in self.found:
            return [Violation(at, "dataset_rows_unreadable", {"reason": self.found["refused"]})]
        listed: dict[str, int] = {}
        found = []
        for problem in self.found["problems"]:
            code = problem["code"]
            listed[code] = listed.get(code, 0) + 1
            if code == "row_columns_missing":
                if listed[code] == 1:
                    params = {"wanted": problem["params"]["wanted"], "columns": ", ".join(columns)}
                    found.append(Violation(at, "columns_missing", params))
            elif listed[code] <= _LISTED_ALIKE:
                place = f", {problem['pointer']}" if problem["pointer"] else ""
                params = {**problem["params"], "line": problem["line"], "place": place}
                found.append(Violation(at, code, params))
        if (count := self.found["problem_count"]) > 1:
            found.append(Violation(at, "dataset_rows_refused", {"count": count, "rows": self.rows}))
        if not found and self.needs_pictures and not self.found["features"].get("pictures"):
            found.append(Violation(at, "dataset_without_pictures", {"rows": self.rows}))
        if not found and not self.examples:
            found.append(Violation(at, "dataset_nothing_to_learn", {"rows": self.rows}))
        return found

    def row_problems(self) -> list[Violation]:
        """Return the first rows that cannot be read, each with its line."""
        return [self._wrong(**problem) for problem in self.found["problems"]]

    def _wrong(self, line: int, code: str, pointer: str, params: Mapping[str, Any]) -> Violation:
        return Violation(f"/lines/{line}{pointer}", code, {**params, "line": line, "place": ""})

    def warnings(self, at: str) -> list[Violation]:
        """Return what is left out of the rows, and what is unusual about those that are used."""
        return [self._counted(at, **one) for one in (*self.found["left_out"], *self.found["said"])]

    def _counted(self, at: str, code: str, about: str, rows: int, lines: Sequence[int]) -> Violation:
        first = ", ".join(map(str, lines)) + (", ..." if rows > len(lines) else "")
        params = {"rows": rows, "total": self.rows, "lines": first, "column": about, "key": about}
        return Violation(at, code, params)


class RowSurveys:
    """Reads data sets for methods. Blocks: call it in a thread. Raises `DatasetUnprocessed` when reading fails."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._remembered: OrderedDict[tuple[str, ...], Mapping[str, Any]] = OrderedDict()

    def of(self, jsonl: Path, digest: str, wanted: RowsWanted) -> RowSurvey:
        """Return what the rows of the file with this digest become."""
        found = self._remember((digest, _written(wanted)), lambda: _survey(jsonl, wanted))
        return RowSurvey(found, needs_pictures=wanted.pictures)

    def shared(
        self, jsonl: Path, digest: str, validation: Path, validation_digest: str, wanted: RowsWanted
    ) -> tuple[int, int]:
        """Return how many rows of the validation data stand in the training data as well, and of how many."""
        key = (digest, validation_digest, _written(wanted))
        shared, total = self._remember(key, lambda: _shared(jsonl, validation, wanted))["shared"]
        return shared, total

    def _remember(self, key: tuple[str, ...], find: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        with self._lock:
            if key in self._remembered:
                self._remembered.move_to_end(key)
                return self._remembered[key]
        found = find()
        with self._lock:
            self._remembered[key] = found
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def _written(wanted: RowsWanted) -> str:
    return json.dumps(asdict(wanted))


def _survey(jsonl: Path, wanted: RowsWanted) -> Mapping[str, Any]:
    if jsonl.stat().st_size > INLINE_BYTES:
        return _in_a_process("deepe_rows.survey", str(jsonl), _written(wanted))
    try:
        return survey(jsonl, wanted_of(asdict(wanted)), wanted.limit)
    except Refused as error:
        return {"refused": str(error)}


def _shared(jsonl: Path, validation: Path, wanted: RowsWanted) -> Mapping[str, Any]:
    if jsonl.stat().st_size + validation.stat().st_size > INLINE_BYTES:
        return _in_a_process("deepe_rows.sharing", str(jsonl), str(validation), _written(wanted))
    return {"shared": shared_rows(jsonl, validation, asdict(wanted))}


def profile_of(jsonl: Path) -> Mapping[str, Any]:
    """Return how the rows of a file are written; see `deepe_rows.profile`. Blocks. Raises `DatasetUnprocessed`."""
    return _in_a_process("deepe_rows.profile", str(jsonl))


def _in_a_process(module: str, *arguments: str) -> Mapping[str, Any]:
    program = [sys.executable, "-E", "-s", "-m", module, *arguments]
    file = Path(arguments[0]).name
    with _SLOTS:
        try:
            done = subprocess.run(program, cwd=helpers_dir(), capture_output=True, timeout=PATIENCE_SECONDS, check=True)
        except subprocess.TimeoutExpired as error:
            problem = f"reading its rows took more than {PATIENCE_SECONDS} s"
            raise DatasetUnprocessed(path=shown(file), problem=problem) from error
        except subprocess.CalledProcessError as error:  # killed for its memory, or it met what it did not foresee
            logger.error("rows_not_read", extra={"file": file, "stderr": error.stderr.decode(errors="replace")[-2000:]})
            problem = f"the process that read its rows ended with {error.returncode}"
            raise DatasetUnprocessed(path=shown(file), problem=problem) from error
    found: dict[str, Any] = json.loads(done.stdout)
    return found
