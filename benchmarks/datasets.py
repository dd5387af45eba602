"""Time and memory of a data set's way in, beside reading and parsing its lines with `json.loads`.

    python -m benchmarks.datasets [--rows 1000,20000] [--formats]

Rows are conversations of about 1,000 characters. `--formats` also reads the same rows as CSV, JSON array, Excel and
Parquet. `datasets.load_dataset("json")`, alone and with a `map` that parts each conversation into prompt and answer, is
measured where DEEPE_DATASETS_PYTHON names an interpreter that has the library. Each reading is a process of its own,
whose peak of memory is that of the process and its children.
"""

import argparse
import csv
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openpyxl
import psutil
import pyarrow
import pyarrow.parquet

from benchmarks.reporting import print_machine, print_table
from benchmarks.service import running_service

ROOT = Path(__file__).parents[1]
PEER = """
import json, sys
with open(sys.argv[1], "rb") as stream:
    for line in stream:
        json.loads(line)
"""
CHECK = """
import sys
from pathlib import Path
from app.registry.datasets.process import BoundedDatasetReader
reader = BoundedDatasetReader(row_characters=2**22, output_bytes=2**33)
found = reader.read(Path(sys.argv[1]), keep=False)
assert not found.report.problems, found.report.problems
assert found.report.rows == int(sys.argv[2]), found.report.rows
"""
SURVEY = """
import json, sys
sys.path.insert(0, "app/presets/shared/helpers")
from pathlib import Path
from deepe_rows import Wanted
from deepe_rows.survey import survey
found = survey(Path(sys.argv[1]), Wanted(kinds=frozenset({"conversation"})))
assert found["rows"] == int(sys.argv[2]), found
"""
LIBRARY = """
import sys, tempfile
from datasets import load_dataset
with tempfile.TemporaryDirectory() as cache:
    found = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    assert len(found) == int(sys.argv[2])
"""
MAP = """
import sys, tempfile
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
def parted(row):
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
with tempfile.TemporaryDirectory() as cache:
    found = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=cache)
    found = found.map(parted, remove_columns=["messages"])
    assert len(found) == int(sys.argv[2])
"""
WORDS = [
    "the",
    "model",
    "learns",
    "what",
    "its",
    "data",
    "says",
    "and",
    "nothing",
    "that",
    "it",
    "does",
    "not",
    "say",
    "你好",
    "Größe",
]


@dataclass(frozen=True)
class Run:
    """What a process took."""

    seconds: float
    processor: float
    peak_bytes: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000,20000", help="numbers of rows, separated by commas")
    parser.add_argument("--formats", action="store_true", help="also the same rows in other formats")
    args = parser.parse_args()
    print_machine()
    table: list[tuple[str, ...]] = []
    for rows in map(int, args.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            file = write_rows(Path(folder), rows)
            table += measured(file, rows)
            if args.formats:
                for write in (write_csv, write_array, write_workbook, write_parquet):
                    made = write(file)
                    table.append(line(rows, f"check and convert {made.suffix}", python(CHECK, made, rows)))
    print_table("a data set's way in", ("what", "rows", "time", "/ json.loads", "processor", "peak memory"), table)


def measured(file: Path, rows: int) -> list[tuple[str, ...]]:
    """Return the lines of the table for one file."""
    peer = python(PEER, file, rows)
    found = [line(rows, f"json.loads of {file.stat().st_size / 1e6:.0f} MB (peer)", peer, peer)]
    found.append(line(rows, "check", python(CHECK, file, rows), peer))
    found.append(line(rows, "upload and check over HTTP", upload(file, rows), peer))
    found.append(line(rows, "rows read for a submit", python(SURVEY, file, rows), peer))
    library = os.environ.get("DEEPE_DATASETS_PYTHON")
    if library:
        found.append(line(rows, 'load_dataset("json")', python(LIBRARY, file, rows, interpreter=library), peer))
        found.append(line(rows, 'load_dataset("json").map', python(MAP, file, rows, interpreter=library), peer))
    return found


def line(rows: int, what: str, run: Run, peer: Run | None = None) -> tuple[str, ...]:
    """Return a line of the table."""
    ratio = f"{run.seconds / peer.seconds:.2f}" if peer is not None else ""
    memory = f"{run.peak_bytes / 2**20:.0f} MiB"
    return what, f"{rows:,}", f"{run.seconds:.2f} s", ratio, f"{run.processor:.2f} s", memory


def python(program: str, file: Path, rows: int, *, interpreter: str = sys.executable) -> Run:
    """Run a program on a file, in a process that has no other children."""
    watcher = (
        "import json, resource, subprocess, sys, time\n"
        "started = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))\n"
    )
    command = [sys.executable, "-c", watcher, interpreter, "-c", program, str(file), str(rows)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return Run(*json.loads(said.splitlines()[-1]))


def upload(file: Path, rows: int) -> Run:
    """Upload a file to a running service; processor time and memory are those of its API process."""
    with running_service(redis=False) as site:
        api = psutil.Process(site.pids["api"])
        before = api.cpu_times()
        started = time.perf_counter()
        connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=3600, blocksize=2**20)
        with file.open("rb") as stream:
            connection.request(
                "PUT", "/api/v1/datasets/bench/file", stream, {"Content-Length": str(file.stat().st_size)}
            )
            answer = connection.getresponse()
            document = json.loads(answer.read())
        seconds = time.perf_counter() - started
        assert (answer.status, document.get("rows")) == (201, rows), document
        after = api.cpu_times()
        processor = after.user + after.system - before.user - before.system
        return Run(seconds, processor, peak_bytes(api.pid))


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process held; 0 except on Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii")
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


# ---- rows in every format -------------------------------------------------------------------------------------------


def write_rows(folder: Path, rows: int) -> Path:
    """Write conversations of about 1,000 characters; every tenth has tools."""
    words = random.Random(1)
    file = folder / "rows.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            turns = [
                {"role": role, "content": " ".join(words.choices(WORDS, k=40))}
                for role in ("user", "assistant", "user", "assistant")
            ]
            row = {
                "id": number,
                "messages": turns,
                "source": "benchmark",
                **({"tools": []} if number % 10 == 0 else {}),
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return file


def flat(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows without objects in them."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield {"id": row["id"], **{f"turn{n}": turn["content"] for n, turn in enumerate(row["messages"])}}


def write_csv(file: Path) -> Path:
    target = file.with_suffix(".csv")
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for row in flat(file):
            if writer is None:
                writer = csv.DictWriter(stream, list(row))
                writer.writeheader()
            writer.writerow(row)
    return target


def write_array(file: Path) -> Path:
    target = file.with_suffix(".json")
    with file.open(encoding="utf-8") as stream:
        target.write_text(json.dumps([json.loads(line) for line in stream], ensure_ascii=False, indent=2), "utf-8")
    return target


def write_workbook(file: Path) -> Path:
    target = file.with_suffix(".xlsx")
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for number, row in enumerate(flat(file)):
        if number == 0:
            sheet.append(list(row))
        sheet.append(list(row.values()))
    book.save(target)
    return target


def write_parquet(file: Path) -> Path:
    target = file.with_suffix(".parquet")
    with file.open(encoding="utf-8") as stream:
        table = pyarrow.Table.from_pylist([json.loads(line) for line in stream])
    pyarrow.parquet.write_table(table, target, row_group_size=10_000)
    return target


if __name__ == "__main__":
    main()
