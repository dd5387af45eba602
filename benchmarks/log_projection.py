"""What it costs to look for curves in a stage's output, beside counting its lines.

    python -m benchmarks.log_projection [--lines 1000000]

Four kinds of output: lines that say nothing of a training, lines that name a loss without a step, reports of a step,
and a bar that is drawn anew. The peer splits the same bytes into lines. Processor time of one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from app.executor.attempts.log_projection import LogProjector
from benchmarks.reporting import print_machine, print_table, ratio

KINDS: dict[str, Callable[[int], str]] = {
    "nothing of a training": lambda number: f"line {number} of a script that says a lot, and nothing that matters\n",
    "a loss without a step": lambda number: f"line {number} of a script that says a lot: loss 0.123456 rate 2e-05\n",
    "a report of a step": lambda number: f"step {number} loss 0.123456 learning rate 2e-05 grad_norm 1.25\n",
    "a bar drawn anew": lambda number: f"\r 10%|#         | {number}/2000000 [00:10<01:30,  1.00it/s]",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    lines = parser.parse_args().lines
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            [name, *_measure(Path(folder), "".join(map(line, range(lines))), lines)] for name, line in KINDS.items()
        ]
    print_table(f"{lines:,} lines", ["output", "split (peer) lines/s", "projected lines/s", "/ peer"], rows)


def _measure(folder: Path, text: str, lines: int) -> list[str]:
    output, events = folder / "output.log", folder / "events.jsonl"
    output.write_text(text)
    begun = time.thread_time()
    len(output.read_bytes().splitlines())
    split = time.thread_time() - begun
    begun = time.thread_time()
    projector = LogProjector(output, events)
    while projector.advance(final=True):
        pass
    projected = time.thread_time() - begun
    events.unlink(missing_ok=True)
    return [f"{lines / split:,.0f}", f"{lines / projected:,.0f}", ratio(projected, split)]


if __name__ == "__main__":
    main()
