"""A run under faults and its table; exit status 1 if it is not clean.

python -m tests.chaos --seed 7 --faults 200 --database postgres
"""

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.fault_injector import Plan, report, run
from tests.fork_server import fork_workers


def main() -> int:
    """Run once and print what was found."""
    parser = argparse.ArgumentParser(description="Run the service under random faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--warm", action="store_true", help="fork workers and APIs instead of starting Python anew")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run that is clean, too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="deepe-chaos-"))
    folder.chmod(0o755)
    plan = Plan(seed=arguments.seed, faults=arguments.faults, backend=arguments.database)
    with fork_workers() if arguments.warm else contextlib.nullcontext() as forks:
        outcome = asyncio.run(run(plan, folder / "run", forks))
    print(report(outcome))
    violations = outcome.verdict.violations()
    if violations or arguments.keep:
        print(f"\nkept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
