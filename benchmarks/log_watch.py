"""What watching costs: scripts whose output is read through `GET /jobs/{job}/events` of a real API process.

    python -m benchmarks.log_watch [--lines 1000000] [--runs 3] [--readers 1] [--idle-readers 100]

Four figures: how much slower a script is when it is watched (the medians of alternating runs on the same machine), how
many bytes the readers missed (must be 0), how long it took from printing a line until a reader had it (for a busy
script, 200 lines a second, and a quiet one, a line every 3 seconds), and what readers of a silent job cost the API.

The jobs are rows that this program claims and ends, as a node does; their scripts are children of this program.
"""

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any

from app.domain.projects import DEFAULT_SCOPE
from app.settings import database_url
from app.store.home import Home
from app.store.session import Database
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from benchmarks.service import ApiProcess, api_process
from tests.job_rows import Runner, add_job, new_runner

PRINT_LINES = """
import sys, time
begun = time.perf_counter()
for number in range(int(sys.argv[1])):
    print(f"line {number} of a script that says a lot: loss 0.123456 learning rate 2e-05")
sys.stdout.flush()
print(time.perf_counter() - begun, file=sys.stderr)
"""

PRINT_TIMES = """
import sys, time
for number in range(int(sys.argv[1])):
    print(time.monotonic())
    time.sleep(float(sys.argv[2]))
"""


async def events(port: int, job_id: str) -> AsyncIterator[tuple[str, Any]]:
    """Yield name and data of each event of the job; raises if the stream ends without its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET /api/v1/jobs/{job_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        rest = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            rest += await reader.readexactly(size)
            await reader.readexactly(2)
            *blocks, rest = rest.split(b"\n\n")
            for block in blocks:
                fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
                if b"data" not in fields:
                    continue
                name = fields[b"event"].decode()
                yield name, json.loads(fields[b"data"])
                if name == "end":
                    return
        raise AssertionError("the stream broke off")
    finally:
        writer.close()


class Bench:
    """A running API and the node that this program plays."""

    def __init__(self, api: ApiProcess, runner: Runner) -> None:
        self.api = api
        self.runner = runner

    @asynccontextmanager
    async def job(self) -> AsyncIterator[tuple[str, Path]]:
        """Yield a running job and the path of its output; end it afterwards."""
        job_id = await add_job(self.runner.database)
        won = await self.runner.start(job_id)
        yield job_id, self.runner.folder(job_id).output_log
        await self.runner.end(won)

    async def watch(self, job_id: str) -> tuple[int, str]:
        """Read the job's output to its end; return the number of bytes and their digest."""
        digest, size = hashlib.sha256(), 0
        async for name, data in events(self.api.port, job_id):
            if name == "log":
                digest.update(data["text"].encode())
                size += data["next_offset"] - data["offset"]
        return size, digest.hexdigest()

    async def print_lines(self, *, lines: int, readers: int) -> tuple[float, int]:
        """Run the script once; return its own seconds and how many bytes the readers missed."""
        async with self.job() as (job_id, path):
            watching = [asyncio.create_task(self.watch(job_id)) for _ in range(readers)]
            with path.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    # -u as the service starts scripts: every line is a write of its own
                    *(sys.executable, "-u", "-c", PRINT_LINES, str(lines)),
                    stdout=output,
                    stderr=subprocess.PIPE,
                )
            assert process.stderr is not None
            seconds = float(await process.stderr.read())
            await process.wait()
        watched = await asyncio.gather(*watching)
        with path.open("rb") as written:
            expected = (path.stat().st_size, hashlib.file_digest(written, "sha256").hexdigest())
        missed = sum(0 if seen == expected else max(abs(expected[0] - seen[0]), 1) for seen in watched)
        path.unlink()
        return seconds, missed

    async def delays(self, *, lines: int, pause: float) -> Samples:
        """Return the seconds between the printing of each line and its arrival at a reader."""
        found = Samples()

        async def watch(job_id: str) -> None:
            open_line = ""
            async for name, data in events(self.api.port, job_id):
                if name == "log":
                    now = time.monotonic()
                    *complete, open_line = (open_line + data["text"]).split("\n")
                    found.seconds += [now - float(line) for line in complete]

        async with self.job() as (job_id, path):
            watching = asyncio.create_task(watch(job_id))
            with path.open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-u", "-c", PRINT_TIMES, str(lines), str(pause)), stdout=output
                )
            await process.wait()
        await watching
        assert len(found.seconds) == lines
        return found

    async def idle(self, readers: int, *, seconds: float) -> tuple[float, float]:
        """Return the API's processor seconds and switches of threads a second while readers wait for a silent job."""
        async with self.job() as (job_id, _), AsyncExitStack() as stack:
            for _ in range(readers):
                stream = events(self.api.port, job_id)
                stack.push_async_callback(stream.aclose)  # type: ignore[attr-defined]
                while (await anext(stream))[1].get("status") != "running":
                    pass
            await asyncio.sleep(3)  # until all have settled
            before, begun = (self.api.processor_seconds(), self.api.switches()), time.monotonic()
            await asyncio.sleep(seconds)
            after, took = (self.api.processor_seconds(), self.api.switches()), time.monotonic() - begun
        return (after[0] - before[0]) / took, (after[1] - before[1]) / took


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--idle-readers", type=int, default=100)
    parser.add_argument("--idle-seconds", type=float, default=20)
    args = parser.parse_args()
    print_machine()
    with api_process() as api:
        database = Database(database_url(f"sqlite:///{api.home / 'deepe.db'}"), scope=DEFAULT_SCOPE)
        bench = Bench(api, await new_runner(database, Home(api.home)))
        await measure(bench, args)
        await database.close()


async def measure(bench: Bench, args: argparse.Namespace) -> None:
    alone: list[float] = []
    watched: list[float] = []
    missed = 0
    for run in range(args.runs + 1):
        for readers, figures in ((0, alone), (args.readers, watched)):
            seconds, lost = await bench.print_lines(lines=args.lines, readers=readers)
            missed += lost
            if run:  # the first pair warms up
                figures.append(seconds)
    print_table(
        f"{args.lines:,} lines, {args.readers} reader(s), {args.runs} alternating runs",
        ["the script's own time", "median s", "least s", "most s", "/ peer"],
        [
            [
                name,
                f"{median(found):.2f}",
                f"{min(found):.2f}",
                f"{max(found):.2f}",
                ratio(median(found), median(alone)),
            ]
            for name, found in (("alone (peer)", alone), ("watched", watched))
        ],
    )
    print(f"  bytes lost: {missed}")
    busy = await bench.delays(lines=2000, pause=0.005)
    quiet = await bench.delays(lines=20, pause=3)
    print_table(
        "from printing a line until a reader has it",
        ["", "lines", "median ms", "p99 ms"],
        [
            [name, f"{len(found.seconds)}", ms(found.median), ms(found.p99)]
            for name, found in (("busy script, 200 lines a second", busy), ("quiet script, a line every 3 s", quiet))
        ],
    )
    counts = (0, 1, args.idle_readers)
    idle = [await bench.idle(count, seconds=args.idle_seconds) for count in counts]
    print_table(
        "the API process while a job says nothing",
        ["readers of the job", "processor ms/s", "thread switches/s"],
        [[str(count), ms(seconds), f"{switches:.0f}"] for count, (seconds, switches) in zip(counts, idle, strict=True)],
    )


if __name__ == "__main__":
    asyncio.run(main())
