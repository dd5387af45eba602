"""The sequences of a training, made once: by several processes, into an Arrow file that is mapped into memory.

    preparation = Preparation(args, wanted)             # reads the rows, or finds what was made of them before
    learned, held_out = preparation.sequences(tokenizer)

What was made is kept until the training has succeeded, in a folder that the attempts of a job share
(`$DEEPE_CACHE_DIR`; by hand, in the output folder). Its name is a digest of everything that the sequences depend on,
so that a changed input is prepared anew. Of a group of processes the first prepares, the others wait and read. What is
told about the rows is kept with them, and told each time.
"""

import argparse
import contextlib
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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import deepe
from deepe_adapters import start_of
from deepe_chat import template_files
from deepe_examples import Tally, load_examples, sequences_of, tell
from deepe_rows import (
    HELD_OUT,
    Answer,
    Conversation,
    Rendered,
    Stored,
    Text,
    Wanted,
    data_file,
    keys_of,
    render_answers,
)

ROWS_OF_WORKER = 2000  # for fewer, another process costs more time than it saves
BLOCK_ROWS = 500
SECONDS_BETWEEN_LOOKS = 0.2
FOLDER = ".prepared"
DATA, HELD, ABOUT = "sequences.arrow", "held_out.json", "about.json"
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
WITHOUT_EFFECT = frozenset(  # on sequences; whatever else an argument is, it is taken to have one
    {"options", "train_id", "seq", "model_name", "output_dir", "preprocessing_workers"}
)
PACKAGES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken")


@dataclass(frozen=True)
class Learned:
    """The sequences to learn from."""

    path: Path
    count: int
    tokens: int
    longest: int
    """Tokens of the longest sequence."""

    def __len__(self) -> int:
        return self.count

    def dataset(self) -> Any:
        """Return them as a trainer takes them: tokens, and which of them are learned (-100 for the others)."""
        from datasets import Dataset

        return Dataset.from_file(str(self.path))


class Preparation:
    """Rows on their way to sequences. `rows` is the number of those to learn from."""

    def __init__(self, args: argparse.Namespace, wanted: Wanted) -> None:
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
            self._spool = _Spool(self._draft / "rows")
            self._parts = load_examples(args, wanted, self._spool.keep)
            self._spool.file.close()

    @property
    def rows(self) -> int:
        return len(self._parts.train) if self._about is None else int(self._about["rows"])

    def sequences(self, tokenizer: Any) -> tuple[Learned, list[Rendered]]:
        """Return the sequences to learn from, and those that are held out. Raises `Refused`."""
        if self._about is not None:
            tell(self._about["told"], self._args)
        elif self._spool is not None:
            self._prepare(self._spool, tokenizer)
        while (about := self._about or self._finished()) is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self._about = about
        counts = {name: about[name] for name in ("count", "tokens", "longest")}
        held_out = json.loads((self._folder / HELD).read_text("utf-8"))
        return Learned(self._folder / DATA, **counts), [_restored(one) for one in held_out]

    def _prepare(self, spool: "_Spool", tokenizer: Any) -> None:
        args = self._args
        learned = _Writer(self._draft / DATA)
        for block in _blocks(spool.path, self._parts.train, tokenizer, args):
            learned.add(block)
        learned.close()
        told = learned.tally.notes(args)
        tell(told, args)
        tally = Tally()
        sequences = _of(tokenizer, args)
        rows = map(spool.read, self._parts.held_out)
        held_out = [one for row in rows for one in tally.fitting(row, sequences, args)]
        told += (more := tally.notes(args, held_out=True))
        tell(more, args)
        (self._draft / HELD).write_text(json.dumps([asdict(one) for one in held_out]), "utf-8")
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
    return Path(os.environ.get("DEEPE_CACHE_DIR") or args.output_dir) / FOLDER


def remove_prepared(args: argparse.Namespace) -> None:
    """Remove what was prepared: the training has succeeded."""
    if "output_dir" in args and deepe.is_first():
        shutil.rmtree(cache_folder(args), ignore_errors=True)


# ---- the name of what was made ---------------------------------------------------------------------------------------


def _key(args: argparse.Namespace, wanted: Wanted) -> str:
    """Return the digest of all that sequences and what is told about them depend on."""
    dataset, base = Path(args.dataset_path), Path(args.model_path)
    folders = [base, *([start] if (start := start_of(args)) is not None else [])]
    own = getattr(args, "validation_path", None)
    beside = Path(own) if own else dataset / HELD_OUT
    data = [data_file(path) for path in (dataset, beside) if path.exists()]
    code = Path(__file__).parent.rglob("*.py")
    files = {
        "data": [*data, *template_files(args)],
        "base": [path for one in folders for path in one.glob("*") if path.is_file() and path.suffix not in WEIGHTS],
        "code": code,
    }
    about: dict[str, Any] = {
        kind: sorted({(path.name, _digest(path)) for path in paths}) for kind, paths in files.items()
    }
    about["args"] = {name: value for name, value in vars(args).items() if name not in WITHOUT_EFFECT}
    about["wanted"] = [sorted(wanted.kinds), wanted.tools, wanted.pictures, wanted.columns, wanted.form]
    about["packages"] = [_version(name) for name in PACKAGES]
    if not base.is_dir():  # a name on the hub may mean other files the next time: only this run's processes share it
        about["run"] = os.getppid() if "WORLD_SIZE" in os.environ else os.getpid()
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _small_files(folder: Path) -> list[Path]:
    """Return the files of a model without its weights: tokenizer, template, configuration."""
    return [path for path in folder.glob("*") if path.is_file() and path.suffix not in WEIGHTS]


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

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = path.open("wb")

    def keep(self, example: Any) -> Stored:
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
    """The sequences of some rows: their tokens one after the other, their lengths, and how many tokens are given."""

    tokens: "array[int]" = field(default_factory=partial(array, "i"))
    lengths: "array[int]" = field(default_factory=partial(array, "q"))
    starts: "array[int]" = field(default_factory=partial(array, "q"))
    tally: Tally = field(default_factory=Tally)

    def add(self, one: Rendered) -> None:
        if one.start < len(one.tokens):  # else nothing of it is learned: TRL leaves it out as well
            self.tokens.extend(one.tokens)
            self.lengths.append(len(one.tokens))
            self.starts.append(one.start)


class _Encoder:
    """Makes blocks out of places in the file of rows."""

    def __init__(self, path: Path, tokenizer: Any, args: argparse.Namespace) -> None:
        self._file = path.open("rb")
        self._tokenizer = tokenizer
        self._args = args

    def block(self, places: Sequence[tuple[int, int]]) -> _Block:
        rows = [_example(self._file, *place) for place in places]
        answers = [row.answers() if isinstance(row, Conversation) else [] for row in rows]
        rendered = iter(render_answers([one for some in answers for one in some], self._tokenizer))
        made = _Block()
        for row, some in zip(rows, answers, strict=True):
            found = [next(rendered) for _ in some]
            whole = [one for one in found if one is not None]
            at_once = isinstance(row, Conversation) and len(whole) == len(found)
            sequences = (lambda _row, whole=whole: whole) if at_once else _of(self._tokenizer, self._args)
            for one in made.tally.fitting(row, sequences, self._args):
                made.add(one)
        return made


def _of(tokenizer: Any, args: argparse.Namespace) -> Any:
    return lambda row: sequences_of(row, tokenizer, args)


def _blocks(path: Path, rows: Sequence[Stored], tokenizer: Any, args: argparse.Namespace) -> Iterator[_Block]:
    """Yield the sequences of all rows in their order."""
    blocks = (rows[at : at + BLOCK_ROWS] for at in range(0, len(rows), BLOCK_ROWS))
    places = ([(row.offset, row.length) for row in block] for block in blocks)
    count = workers(args, len(rows))
    if count == 1:
        yield from map(_Encoder(path, tokenizer, args).block, places)
        return
    bare = argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "options"})
    # a fork has the tokenizer at once; on a Mac, threads of system libraries do not survive it
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(count, _begin_worker, (path, tokenizer, bare)) as pool:
        yield from pool.imap(_block_of_worker, places)


def workers(args: argparse.Namespace, rows: int) -> int:
    """Return how many processes make tokens of rows: what is asked for, else one for each core that is worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(getattr(args, "preprocessing_workers", None) or max(1, min(cores, rows // ROWS_OF_WORKER)))


_worker: list[_Encoder] = []


def _begin_worker(path: Path, tokenizer: Any, args: argparse.Namespace) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.append(_Encoder(path, tokenizer, args))


def _end_with_parent() -> None:
    """End this process when its parent was killed, which it would wait for else."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _block_of_worker(places: Sequence[tuple[int, int]]) -> _Block:
    return _worker[0].block(places)


# ---- tokens in a file ------------------------------------------------------------------------------------------------


class _Writer:
    """Writes blocks to an Arrow file, and counts."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        numbers = pyarrow.list_(pyarrow.int32())
        self._schema = pyarrow.schema([("input_ids", numbers), ("labels", numbers)])
        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)
        self.tally = Tally()
        self._count = self._tokens = self._longest = 0

    def add(self, block: _Block) -> None:
        import numpy
        import pyarrow

        self.tally.add(block.tally)
        if not block.lengths:
            return
        tokens = numpy.frombuffer(block.tokens, numpy.int32)
        ends = numpy.cumsum(numpy.frombuffer(block.lengths, numpy.int64))
        labels = tokens.copy()
        begin = 0
        for end, start in zip(ends.tolist(), block.starts, strict=True):
            labels[begin : begin + start] = -100
            begin = end
        offsets = pyarrow.array(numpy.concatenate(([0], ends)), pyarrow.int32())
        lists = [pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values)) for values in (tokens, labels)]
        self._stream.write_batch(pyarrow.RecordBatch.from_arrays(lists, schema=self._schema))
        self._count += len(ends)
        self._tokens += len(tokens)
        self._longest = max(self._longest, *block.lengths)

    def counts(self) -> dict[str, int]:
        return {"count": self._count, "tokens": self._tokens, "longest": self._longest}

    def close(self) -> None:
        self._stream.close()
        self._file.close()


def _restored(one: Mapping[str, Any]) -> Rendered:
    """Return a sequence that was written as JSON."""
    example = one["example"]
    written = Text(**example) if "text" in example else Answer(**example)
    return Rendered(one["tokens"], one["start"], one["place"], tuple(one["notes"]), written)
