"""What a training learns from, made once: by several processes, into an Arrow file that is mapped into memory.

    preparation = Preparation(args, wanted)             # reads the rows, or finds what was made of them before
    learned, held_out = preparation.sequences(tokenizer, recipe)

A `Recipe` says what a method makes of a row: tokens for those that learn texts, the row itself for those that make
tokens at the step. What was made is kept until the training has succeeded, in a folder that the attempts of a job share
(`$DEEPE_CACHE_DIR`; by hand, in the output folder). Its name is a digest of everything that the sequences depend on,
so that a changed input is prepared anew. Of a group of processes the first prepares, the others wait and read. What is
told about the rows is kept with them, and told each time.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import deepe
from deepe_adapters import start_of
from deepe_chat import template_files
from deepe_examples import Tally, answers_of, load_examples, sequences_of, tell
from deepe_recipes import TEXTS, Column, Learned, Recipe, read_value, schema_of, written_value
from deepe_rows import (
    HELD_OUT,
    Answer,
    Conversation,
    Labelled,
    Preference,
    Rendered,
    Stored,
    Wanted,
    data_file,
    keys_of,
    render_answers,
)
from deepe_tokens import token_files

ROWS_OF_WORKER = 2000  # for fewer, another process costs more time than it saves
BLOCK_ROWS = 500
SECONDS_BETWEEN_LOOKS = 0.2
FOLDER = ".prepared"
DATA, HELD, ABOUT = "sequences.arrow", "held_out.json", "about.json"
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
WITHOUT_EFFECT = frozenset(  # on what is made; whatever else an argument is, it is taken to have one
    {"options", "train_id", "seq", "model_name", "output_dir", "save_path", "preprocessing_workers"}
)
PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken")


class Preparation:
    """Rows on their way to sequences. `rows` is the number of those to learn from.

    `check` raises `Refused` for a row that a method cannot learn from.
    """

    def __init__(
        self, args: argparse.Namespace, wanted: Wanted, check: Callable[[Any], None] = lambda _row: None
    ) -> None:
        self._args = args
        self._home = cache_folder(args)
        self._folder = self._home / _key(args, wanted)
        self._spool: _Spool | None = None
        self._about = self._finished()
        if self._about is not None:
            tell(self._about["read"], args)
        elif deepe.is_first():
            shutil.rmtree(self._home, ignore_errors=True)  # what another input or a killed process has left
            self._home.mkdir(parents=True)
            self._draft = Path(tempfile.mkdtemp(dir=self._home))
            self._spool = _Spool(self._draft / "rows", check)
            self._parts = load_examples(args, wanted, self._spool.keep)
            self._spool.file.close()

    @property
    def rows(self) -> int:
        return len(self._parts.train) if self._about is None else int(self._about["rows"])

    def examples(self) -> tuple[Iterator[Any], Iterator[Any]]:
        """Return the rows that were read just now, held-out ones apart; none if all was made before."""
        if self._spool is None:
            return iter(()), iter(())
        return map(self._spool.read, self._parts.train), map(self._spool.read, self._parts.held_out)

    def sequences(
        self, tokenizer: Any, recipe: Recipe = TEXTS, measured: Recipe | None = None
    ) -> tuple[Learned, list[Any]]:
        """Return what there is to learn from, and what is held out (by the recipe `measured`). Raises `Refused`."""
        if self._about is not None:
            tell(self._about["told"], self._args)
        elif self._spool is not None:
            self._prepare(self._spool, tokenizer, recipe, measured or recipe)
        while (about := self._about or self._finished()) is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._about = about
        counts = {name: about[name] for name in ("count", "tokens", "longest")}
        held_out = json.loads((self._folder / HELD).read_text("utf-8"))
        return Learned(self._folder / DATA, **counts), [read_value(one) for one in held_out]

    def _prepare(self, spool: "_Spool", tokenizer: Any, recipe: Recipe, measured: Recipe) -> None:
        args = self._args
        learned = _Writer(self._draft / DATA, recipe)
        for block in _blocks(spool.path, self._parts.train, tokenizer, recipe, args):
            learned.add(block)
        learned.close()
        told = learned.tally.notes(args, advice=recipe.advice)
        tell(told, args)
        tally = Tally()
        rows = (part for row in self._parts.held_out for part in measured.split(spool.read(row)))
        held_out = [
            one for row in rows if (found := _fitting(tally, row, tokenizer, measured, args))
            for one in measured.held_out(row, found)
        ]  # fmt: skip
        told += (more := tally.notes(args, held_out=True))
        tell(more, args)
        (self._draft / HELD).write_text(json.dumps([written_value(one) for one in held_out]), "utf-8")
        spool.path.unlink()
        about = {"rows": len(self._parts.train), "read": self._parts.notes, "told": told, **learned.counts()}
        (self._draft / ABOUT).write_text(json.dumps(about), "utf-8")
        with contextlib.suppress(OSError):  # an earlier attempt that still runs on a lost node has made the same
            self._draft.rename(self._folder)

    def _finished(self) -> dict[str, Any] | None:
        """Return what was written last, if everything is there."""
        try:
            return dict(json.loads((self._folder / ABOUT).read_text("utf-8")))
        except FileNotFoundError:
            return None


def cache_folder(args: argparse.Namespace) -> Path:
    """Return the folder for what the attempts of a job need not do again."""
    return Path(os.environ.get("DEEPE_CACHE_DIR") or args.output_dir or args.save_path) / FOLDER


def remove_prepared(args: argparse.Namespace) -> None:
    """Remove what was prepared: the training has succeeded."""
    if "output_dir" in args and deepe.is_first():
        shutil.rmtree(cache_folder(args), ignore_errors=True)


# ---- the name of what was made ---------------------------------------------------------------------------------------


def _key(args: argparse.Namespace, wanted: Wanted) -> str:
    """Return the digest of all that sequences and what is told about them depend on."""
    dataset, base = Path(args.dataset_path), Path(args.model_path if "model_path" in args else args.base_path)
    folders = [base, *([start] if (start := start_of(args)) is not None else [])]
    own = getattr(args, "validation_path", None)
    beside = Path(own) if own else dataset / HELD_OUT
    data = [data_file(path) for path in (dataset, beside) if path.exists()]
    files = {
        "data": [
            *data,
            *template_files(args),
            *token_files(args),
            *([Path(tools)] if (tools := getattr(args, "tools_file", None)) else []),
        ],
        "base": [path for one in folders for path in _small_files(one)],
        "code": [*Path(__file__).parent.rglob("*.py"), Path(sys.argv[0])],
    }
    about: dict[str, Any] = {
        kind: sorted({(path.name, _digest(path)) for path in paths}) for kind, paths in files.items()
    }
    if wanted.pictures:
        about["pictures"] = _listing(dataset if dataset.is_dir() else dataset.parent, args)
    about["args"] = {name: value for name, value in vars(args).items() if name not in WITHOUT_EFFECT}
    about["wanted"] = [sorted(wanted.kinds), wanted.tools, wanted.pictures, wanted.columns, wanted.form]
    about["packages"] = [_version(name) for name in PACKAGES]
    if not base.is_dir():  # a name on the hub may mean other files the next time: only this run's processes share it
        about["run"] = os.getppid() if "WORLD_SIZE" in os.environ else os.getpid()
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _small_files(folder: Path) -> list[Path]:
    """Return the files of a model without its weights: tokenizer, template, configuration."""
    return [path for path in folder.glob("*") if path.is_file() and path.suffix not in WEIGHTS]


def _listing(folder: Path, args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Return name, size and time of every file that may be a picture: a change may be one of what fits."""
    folders = [folder, *(Path(one) for one in (args.pic_relative_path, args.validation_path) if one)]
    files = sorted({path for one in folders if one.is_dir() for path in one.rglob("*") if path.is_file()})
    return [(str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in files]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # the next reader of the file says so
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- rows in a file --------------------------------------------------------------------------------------------------


class _Spool:
    """A file of examples that were read, so that memory holds only their places."""

    def __init__(self, path: Path, check: Callable[[Any], None]) -> None:
        self.path = path
        self._check = check
        self.file: IO[bytes] = path.open("wb")

    def keep(self, example: Any) -> Stored:
        self._check(example)
        content = pickle.dumps(example, pickle.HIGHEST_PROTOCOL)
        offset = self.file.tell()
        self.file.write(content)
        return Stored(offset, len(content), keys_of(example))

    def read(self, one: Stored) -> Any:
        with self.path.open("rb") as file:
            return _example(file, one.offset, one.length)


def _example(file: IO[bytes], offset: int, length: int) -> Any:
    file.seek(offset)
    return pickle.loads(file.read(length))  # noqa: S301 (this process or its parent has written it a moment ago)


# ---- rows to tokens --------------------------------------------------------------------------------------------------


@dataclass
class _Block:
    """What is made of some rows: a batch of the file, and what became of the rows."""

    batch: Any = None
    tokens: int = 0
    longest: int = 0
    tally: Tally = field(default_factory=Tally)


class _Encoder:
    """Makes blocks out of places in the file of rows."""

    def __init__(self, path: Path, tokenizer: Any, recipe: Recipe, args: argparse.Namespace) -> None:
        self._file = path.open("rb")
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._args = args

    def block(self, places: Sequence[tuple[int, int]]) -> _Block:
        import pyarrow

        recipe = self._recipe
        rows = [part for place in places for part in recipe.split(_example(self._file, *place))]
        made, columns = _Block(), {name: Column(kind) for name, kind in recipe.columns.items()}
        for row, whole in zip(rows, self._at_once(rows), strict=True):
            found = _fitting(made.tally, row, self._tokenizer, recipe, self._args, whole)
            if not recipe.unlearned:
                found = [one for one in found if one.start < len(one.tokens)]
            if not found:
                continue
            lengths = [len(one.tokens) for one in found]
            made.tokens += sum(lengths)
            made.longest = max(made.longest, *lengths)
            for one in recipe.table(row, found):
                for name, column in columns.items():
                    column.add(one[name])
        schema = schema_of(recipe.columns)
        made.batch = pyarrow.RecordBatch.from_arrays(
            [columns[one.name].array(one.type) for one in schema], schema=schema
        )
        return made

    def _at_once(self, rows: Sequence[Any]) -> Iterator[list[Rendered] | None]:
        """Yield the sequences of each row, `None` where they have to be made one by one."""
        if self._recipe.sequences is not sequences_of:
            yield from (None for _ in rows)
            return
        answers = [_answers(row) for row in rows]
        rendered = iter(render_answers([one for some in answers for one in some], self._tokenizer))
        for some in answers:
            found = [next(rendered) for _ in some]
            whole = [one for one in found if one is not None]
            yield whole if whole and len(whole) == len(found) else None


def _answers(row: Any) -> list[Answer]:
    match row:
        case Conversation():
            return row.answers()
        case Preference() | Labelled():
            return answers_of(row)
        case _:
            return []


def _fitting(
    tally: Tally,
    row: Any,
    tokenizer: Any,
    recipe: Recipe,
    args: argparse.Namespace,
    made: list[Rendered] | None = None,
) -> list[Rendered]:
    """Return the sequences of a row that fit, and count what became of it; `made` are those that are made already."""
    sequences = (lambda row: recipe.sequences(row, tokenizer, args)) if made is None else (lambda _row: made)
    return tally.fitting(row, sequences, args, whole=recipe.whole)


def _blocks(
    path: Path, rows: Sequence[Stored], tokenizer: Any, recipe: Recipe, args: argparse.Namespace
) -> Iterator[_Block]:
    """Yield what is made of all rows in their order."""
    blocks = (rows[at : at + BLOCK_ROWS] for at in range(0, len(rows), BLOCK_ROWS))
    places = ([(row.offset, row.length) for row in block] for block in blocks)
    count = workers(args, len(rows))
    if count == 1:
        yield from map(_Encoder(path, tokenizer, recipe, args).block, places)
        return
    bare = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "options"})
    # a fork has the tokenizer at once; on a Mac, threads of system libraries do not survive it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    gc.freeze()  # looking for garbage would copy in each fork what the libraries have in memory
    try:
        pool = context.Pool(count, _begin_worker, (path, tokenizer, recipe, bare))
    finally:
        gc.unfreeze()
    with pool:
        yield from pool.imap(_block_of_worker, places)


def workers(args: argparse.Namespace, rows: int) -> int:
    """Return how many processes make tokens of rows: what is asked for, else one for each core that is worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(getattr(args, "preprocessing_workers", None) or max(1, min(cores, rows // ROWS_OF_WORKER)))


_worker: list[_Encoder] = []


def _begin_worker(path: Path, tokenizer: Any, recipe: Recipe, args: argparse.Namespace) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(_Encoder(path, tokenizer, recipe, args))


def _end_with_parent() -> None:
    """End this process when its parent was killed, which it would wait for else."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _block_of_worker(places: Sequence[tuple[int, int]]) -> _Block:
    return _worker[0].block(places)


# ---- a table in a file -----------------------------------------------------------------------------------------------


class _Writer:
    """Writes blocks to an Arrow file, and counts."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        import pyarrow

        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, schema_of(recipe.columns))
        self.tally = Tally()
        self._count = self._tokens = self._longest = 0

    def add(self, block: _Block) -> None:
        self.tally.add(block.tally)
        if block.batch.num_rows:
            self._stream.write_batch(block.batch)
        self._count += block.batch.num_rows
        self._tokens += block.tokens
        self._longest = max(self._longest, block.longest)

    def counts(self) -> dict[str, int]:
        return {"count": self._count, "tokens": self._tokens, "longest": self._longest}

    def close(self) -> None:
        self._stream.close()
        self._file.close()
