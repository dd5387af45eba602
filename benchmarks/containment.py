"""What containment costs: from a submit to the first line, contained and not, in turn.

    python -m benchmarks.containment [--runs 20]

Two services with a worker each, without Redis. The peer is the one that does not contain.
"""

import argparse
from collections import defaultdict

from benchmarks.reporting import Samples, ms, print_machine, print_table, ratio
from benchmarks.service import running_service
from benchmarks.submit_latency import PRINTED, STARTED, add_method, measure

OFF, ON = "off", "bubblewrap"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    print_machine()
    found: dict[tuple[str, str], Samples] = defaultdict(Samples)
    with (
        running_service(redis=False, DEEPE_CONTAINMENT=OFF) as plain,
        running_service(redis=False, DEEPE_CONTAINMENT=ON) as contained,
    ):
        sites = {OFF: plain, ON: contained}
        for site in sites.values():
            add_method(site)
            measure(site)  # warms up both processes
        for _ in range(args.runs):
            for name, site in sites.items():
                steps = measure(site)
                found[name, STARTED].seconds.append(steps[STARTED])
                found[name, PRINTED].seconds.append(steps[PRINTED])
                found[name, "of it, from start to first line"].seconds.append(steps[PRINTED] - steps[STARTED])
    rows = []
    for step in (STARTED, PRINTED, "of it, from start to first line"):
        off, on = found[OFF, step], found[ON, step]
        rows.append([step, ms(off.median), ms(on.median), ms(on.p99), ratio(on.median, off.median)])
    print_table(
        f"{args.runs} submits each, ms", ["", "not contained", "contained", "contained, p99", "contained / not"], rows
    )


if __name__ == "__main__":
    main()
