"""Data sets made of others: every part's rows with their own fields, as often as wanted, in a seeded order.

The recipe is kept with the data set (`source.mix`): the parts as they were, by digest, and the rows taken of each. A
recipe with the same digest makes the same file, so a submit that names several data sets finds an earlier mix again.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from pydantic import ConfigDict, Field
from sqlmodel import col, select
from sqlmodel.ext.asyncio.session import AsyncSession

from app.domain.errors import AppError, InvalidRequest, Violation, together_with
from app.domain.names import MAX_NAME_LENGTH, name_violations, normal_name
from app.domain.plain_text import shown
from app.domain.values import Value
from app.registry.datasets import mixing as dataset_mixing
from app.registry.datasets.check import Column, columns_of
from app.registry.datasets.files import IMAGES_FOLDER, DatasetChanging, locate
from app.registry.datasets.process import DatasetUnprocessed
from app.registry.datasets.service import Datasets, Unplaced
from app.store import named
from app.store.home import Home
from app.store.methods import NameTaken
from app.store.session import Database
from app.store.tables import DatasetRow

MAX_PARTS: Final = 50
DEFAULT_SEED: Final = 42
_SMALL: Final = 256 * 1024
_PATIENCE_SECONDS: Final = 1800
_PROCESSES: Final = 2
_SHOWN_DIGITS: Final = 8
_ROWS: Final = "rows.jsonl"
_ROOT: Final = Path(__file__).parents[3]
_START: Final = """
import sys
sys.path.insert(0, sys.argv[1])
from app.registry.datasets.mixing import answer
answer()
"""
_KEPT: Final = ("dataset", "name", "digest", "weight", "max_rows")


class MixPart(Value):
    """A data set that goes into a mix, and how much of it."""

    model_config = ConfigDict(extra="forbid")

    dataset: str = Field(description="Id or name.", examples=["faq"])
    weight: float = Field(
        default=1,
        ge=0.001,
        le=1000,
        allow_inf_nan=False,
        description="How often each row is taken: 2 takes each twice, 0.5 a random half.",
    )
    max_rows: int | None = Field(
        default=None, ge=1, le=2**53, description="Take a random sample of so many rows at most, before the weight."
    )


@dataclass(frozen=True)
class Part:
    """A part as it is now."""

    dataset: str
    name: str
    digest: str
    weight: float
    max_rows: int | None
    jsonl: Path
    columns: Sequence[Column]
    files: str | None = None
    """Digest of what lies in its folder, if rows name pictures there or could name other files."""


@dataclass(frozen=True)
class Recipe:
    """What a mix is made of; `digest` is the same for what makes the same rows in the same order."""

    parts: tuple[Part, ...]
    seed: int

    @property
    def digest(self) -> str:
        """The sha256 of the parts' digests and files, how much is taken of each, and the seed."""
        parts = [
            [part.dataset, part.digest, part.weight, part.max_rows, *([part.files] if part.files else [])]
            for part in self.parts
        ]
        return hashlib.sha256(json.dumps([parts, self.seed]).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The name of a mix that was given none."""
        name = "mix of " + " and ".join(
            part.name
            + (f" {part.max_rows} rows" if part.max_rows is not None else "")
            + (f" x{part.weight:g}" if part.weight != 1 else "")
            for part in self.parts
        )
        return name if len(name) <= MAX_NAME_LENGTH - 1 - _SHOWN_DIGITS else f"mix of {len(self.parts)} data sets"

    @property
    def has_files(self) -> bool:
        """Whether files of the parts go into a folder of the mix."""
        return any(part.files for part in self.parts)

    def document(self, counts: Sequence[Mapping[str, int]], pictures: int | None) -> dict[str, Any]:
        """Return what is kept of the recipe, with the rows that each part has and that were taken of it."""
        parts = [
            {**{name: getattr(part, name) for name in _KEPT}, **counted}
            for part, counted in zip(self.parts, counts, strict=True)
        ]
        return {"digest": self.digest, "seed": self.seed, "parts": parts, "pictures": pictures}


@dataclass(frozen=True)
class Mix:
    """A data set that is registered already (`row`), one whose file is ready to be (`new`), or why there is none.

    The error is kept because a repeated Idempotency-Key returns the first response.
    """

    row: DatasetRow | None = None
    new: Unplaced | None = None
    parts: tuple[Part, ...] = ()
    edited: frozenset[str] = frozenset()
    """Data sets of the same recipe whose files were edited since: they are other rows now."""
    error: AppError | None = None


class DatasetMixes:
    """Makes data sets out of others."""

    def __init__(self, *, database: Database, home: Home, datasets: Datasets, max_bytes: int) -> None:
        self._database = database
        self._home = home
        self._datasets = datasets
        self._max_bytes = max_bytes
        self._slots = threading.BoundedSemaphore(_PROCESSES)

    @asynccontextmanager
    async def mixed(
        self, name: str, parts: Sequence[MixPart], *, seed: int, description: str = ""
    ) -> AsyncIterator[Mix]:
        """Yield a new data set; its file is gone afterwards unless it was placed."""
        async with AsyncExitStack() as stack:
            try:
                with together_with(name_violations(name)):
                    recipe = await self._recipe(parts, seed, "/parts")
                async with self._database.reading() as session:
                    if await named.name_is_taken(session, DatasetRow, name):
                        raise NameTaken(name=normal_name(name), pointer="/name")
                new = await stack.enter_async_context(self._made(name, recipe, "/parts", description))
                mix = Mix(new.row, new, recipe.parts)
            except AppError as error:
                mix = Mix(error=error)
            yield mix

    @asynccontextmanager
    async def found_or_mixed(self, parts: Sequence[MixPart], at: str) -> AsyncIterator[Mix]:
        """Yield the data set of this recipe: one that is there and unchanged, else a new one."""
        async with AsyncExitStack() as stack:
            try:
                recipe = await self._recipe(parts, DEFAULT_SEED, at)
                mix = await self._found(recipe)
                if mix.row is None:
                    new = await stack.enter_async_context(self._made(await self._free_name(recipe), recipe, at, ""))
                    mix = replace(mix, row=new.row, new=new)
            except AppError as error:
                mix = Mix(error=error)
            yield mix

    async def place(self, session: AsyncSession, mix: Mix) -> DatasetRow:
        """Register a new data set and give its file its place. Raise the error that is kept in its stead."""
        if mix.error is not None:
            raise mix.error
        assert mix.new is not None
        return await self._datasets.place(session, mix.new)

    async def made_meanwhile(self, session: AsyncSession, mix: Mix) -> DatasetRow | None:
        """Return the data set that another request has made of the same recipe since."""
        if mix.new is None:
            return None
        assert mix.new.row.source is not None
        rows = await _rows_of(session, mix.new.row.source["mix"]["digest"])
        return next((row for row in rows if row.id not in mix.edited), None)

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _found(self, recipe: Recipe) -> Mix:
        """Return the data set of a recipe: a part that is taken whole and alone, else an unchanged earlier mix."""
        async with self._database.reading() as session:
            if _is_whole_and_alone(recipe.parts):
                return Mix(await named.find(session, DatasetRow, recipe.parts[0].dataset), parts=recipe.parts)
            rows = await _rows_of(session, recipe.digest)
        for row in rows:
            if await asyncio.to_thread(self._is_whole, row):
                return Mix(row, parts=recipe.parts)
        return Mix(parts=recipe.parts, edited=frozenset(row.id for row in rows))

    async def _free_name(self, recipe: Recipe) -> str:
        names = [recipe.name, f"{recipe.name} {recipe.digest[:_SHOWN_DIGITS]}"]
        async with self._database.reading() as session:
            for name in names:
                if not await named.name_is_taken(session, DatasetRow, name):
                    return name
        return f"{recipe.name} {uuid4().hex[:_SHOWN_DIGITS]}"

    async def _recipe(self, parts: Sequence[MixPart], seed: int, at: str) -> Recipe:
        """Look at the parts as they are now. Raises `InvalidRequest` with everything that is wrong with them."""
        async with self._database.reading() as session:
            rows = [await named.find(session, DatasetRow, part.dataset) for part in parts]
        found: list[Violation] = []
        looked = []
        seen: set[str] = set()
        for number, (part, row) in enumerate(zip(parts, rows, strict=True)):
            pointer = f"{at}/{number}/dataset"
            if row is None:
                found.append(Violation(pointer, "unknown_dataset", {"dataset": part.dataset}))
            elif row.id in seen:
                found.append(Violation(pointer, "mix_part_twice", {"dataset": row.name}))
            elif not self._home.absolute(row.path).exists():
                found.append(Violation(pointer, "files_missing", {"name": row.name, "path": row.path}))
            else:
                looked.append(await asyncio.to_thread(self._look, row, part))
            seen.update([row.id] if row is not None else [])
        if found:
            raise InvalidRequest(found)
        return Recipe(tuple(looked), seed)

    def _look(self, row: DatasetRow, part: MixPart) -> Part:
        inspection = self._datasets.current(row)
        jsonl = self._datasets.jsonl_of(row) if inspection is None else inspection.jsonl
        digest = row.digest if inspection is None else inspection.digest
        columns = columns_of(row.columns, row.rows, row.report) if inspection is None else inspection.report.columns
        brought = locate(self._home.absolute(row.path)).rows
        files = _digest_of_files(brought) if brought.parent != self._home.datasets else None
        return Part(row.id, row.name, digest, part.weight, part.max_rows, jsonl, columns, files)

    def _is_whole(self, row: DatasetRow) -> bool:
        return self._home.absolute(row.path).exists() and self._datasets.current(row) is None

    @asynccontextmanager
    async def _made(self, name: str, recipe: Recipe, at: str, description: str) -> AsyncIterator[Unplaced]:
        async def fill(target: Path) -> dict[str, Any]:
            if recipe.has_files:
                target.mkdir()
                target /= _ROWS
            done = await asyncio.to_thread(self._mix, recipe, target, at)
            return recipe.document(done["parts"], done["pictures"])

        async with self._datasets.unplaced(name, fill, description=description) as new:
            yield new

    def _mix(self, recipe: Recipe, target: Path, at: str) -> Mapping[str, Any]:
        task = {
            "parts": [
                {
                    "path": str(part.jsonl),
                    "weight": part.weight,
                    "max_rows": part.max_rows,
                    "alone": part.files is not None,
                }
                for part in recipe.parts
            ],
            "seed": recipe.seed,
            "target": str(target),
            "images": str(target.parent / IMAGES_FOLDER) if recipe.has_files else None,
            "limit": self._max_bytes,
        }
        try:
            small = (
                not recipe.has_files
                and sum(part.jsonl.stat().st_size * max(1, part.weight) for part in recipe.parts) <= _SMALL
            )
            if small:
                done = dataset_mixing.mix(task)
            else:
                with self._slots:
                    done = _in_a_child(task)
        except OSError as error:
            raise DatasetUnprocessed(path=target.name, problem=error.strerror or str(error)) from error
        if "changing" in done:
            raise DatasetChanging(path=", ".join(part.name for part in recipe.parts))
        if "too_large" in done:
            raise InvalidRequest([Violation(at, "mix_too_large", {"limit": self._max_bytes // 2**20})])
        if "names_file" in done:
            named_ = done["names_file"]
            params = {**named_, "name": shown(named_["name"]), "dataset": recipe.parts[named_["part"]].name}
            raise InvalidRequest([Violation(f"{at}/{named_['part']}/dataset", "mix_row_names_file", params)])
        counts = done["parts"]
        if empty := [number for number, counted in enumerate(counts) if not counted["taken"]]:
            raise InvalidRequest(
                [
                    Violation(f"{at}/{number}/weight", "mix_part_empty", {"rows": counts[number]["rows"]})
                    for number in empty
                ]
            )
        return done


def _digest_of_files(rows: Path) -> str | None:
    """Return the digest of the names, sizes and times of the files in the folder of `rows`; None without any."""
    found = []
    for folder, folders, files in os.walk(rows.parent):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            if file != rows and not name.startswith("."):
                status = file.stat()
                found.append((str(file.relative_to(rows.parent)), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if found else None


def _is_whole_and_alone(parts: Sequence[MixPart | Part]) -> bool:
    return len(parts) == 1 and parts[0].weight == 1 and parts[0].max_rows is None


async def _rows_of(session: AsyncSession, recipe: str) -> Sequence[DatasetRow]:
    """Return the data sets that were made by a recipe, oldest first."""
    made = col(DatasetRow.source)["mix"]["digest"].as_string()
    statement = select(DatasetRow).where(made == recipe).order_by(col(DatasetRow.created_at), col(DatasetRow.id))
    return (await session.exec(statement)).all()


def _in_a_child(task: Mapping[str, Any]) -> dict[str, Any]:
    program = [sys.executable, "-I", "-c", _START, str(_ROOT)]
    try:
        done = subprocess.run(
            program, input=json.dumps(task).encode(), capture_output=True, timeout=_PATIENCE_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise OSError(last[0] if last else f"exit code {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(f"it took longer than {_PATIENCE_SECONDS} seconds") from error
    found: dict[str, Any] = json.loads(done.stdout)
    return found
