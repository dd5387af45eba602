"""What watching costs: a script that prints a million lines, alone and with a reader at its heels.

    python -m benchmarks.log_watch [--lines 1000000] [--runs 3] [--readers 1]

Three figures: how much slower the script is when it is watched (the medians of alternating runs on the same machine),
how many bytes the reader missed (must be 0), and how long it took from printing a line until a reader had it, for a
busy script (200 lines a second) and a quiet one (a line every 3 seconds).
"""

import argparse
import asyncio
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from app.executor.runs.log_file import LogFollower
from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio

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


async def watch(path: Path, process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Follow the file to its end; return the number of bytes and their digest."""
    follower = LogFollower(path)

    async def finish() -> None:
        await process.wait()
        follower.finish()

    waiter = asyncio.create_task(finish())
    digest, size = hashlib.sha256(), 0
    async for chunk in follower:
        digest.update(chunk.text.encode())
        size += chunk.next_offset - chunk.offset
    await waiter
    return size, digest.hexdigest()


async def print_lines(folder: Path, *, lines: int, readers: int) -> tuple[float, int]:
    """Run the script once; return its own seconds and how many bytes the readers missed."""
    path = folder / "output.log"
    with path.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            # -u as the service starts scripts: every line is a write of its own
            *(sys.executable, "-u", "-c", PRINT_LINES, str(lines)),
            stdout=output,
            stderr=subprocess.PIPE,
        )
    watched = await asyncio.gather(*(watch(path, process) for _ in range(readers)))
    assert process.stderr is not None
    seconds = float(await process.stderr.read())
    await process.wait()
    written = path.read_bytes()
    expected = (len(written), hashlib.sha256(written).hexdigest())
    missed = sum(0 if seen == expected else max(abs(expected[0] - seen[0]), 1) for seen in watched)
    path.unlink()
    return seconds, missed


async def delays(folder: Path, *, lines: int, pause: float) -> list[float]:
    """Return the seconds between the printing of each line and its arrival at a reader."""
    path = folder / "times.log"
    with path.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-c", PRINT_TIMES, str(lines), str(pause)), stdout=output
        )
    follower = LogFollower(path)

    async def finish() -> None:
        await process.wait()
        follower.finish()

    waiter = asyncio.create_task(finish())
    found: list[float] = []
    open_line = ""
    async for chunk in follower:
        now = time.monotonic()
        *complete, open_line = (open_line + chunk.text).split("\n")
        found += [now - float(line) for line in complete]
    await waiter
    return found


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--readers", type=int, default=1)
    args = parser.parse_args()
    print_machine()
    alone: list[float] = []
    watched: list[float] = []
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in range(args.runs + 1):
            for readers, figures in ((0, alone), (args.readers, watched)):
                seconds, lost = await print_lines(folder, lines=args.lines, readers=readers)
                missed += lost
                if run:  # the first pair warms up
                    figures.append(seconds)
        busy = await delays(folder, lines=2000, pause=0.005)
        quiet = await delays(folder, lines=10, pause=3)
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
    print_table(
        "from printing a line until a reader has it",
        ["", "lines", "median ms", "p99 ms"],
        [
            [name, f"{len(found)}", ms(Samples(found).median), ms(Samples(found).p99)]
            for name, found in (("busy script, 200 lines a second", busy), ("quiet script, a line every 3 s", quiet))
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
