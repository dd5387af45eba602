"""Make a conda prefix with py-rattler: `python -P rattler_builder.py --prefix P --channel C... SPEC...`.

A program of its own, which imports nothing of `app`: the library may crash at interpreter exit after its work is
complete, so this ends in `os._exit` and its exit status is sure. 0 done, 1 failed, 69 no channel can be reached.
"""

import argparse
import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

import httpx
from rattler import Channel, MatchSpec, VirtualPackage, install, solve
from rattler.exceptions import GatewayError, SolverError
from rattler.install import InstallerReporter

REACH_SECONDS = 5.0


class Reporter:
    """Prints what the installer does; the library takes any part of its protocol."""

    def __init__(self) -> None:
        self._total = 0
        self._linked = 0

    def on_transaction_start(self, total_operations: int) -> None:
        self._total = total_operations

    def on_link_start(self, operation: int, package_name: str) -> int:
        self._linked += 1
        _say(f"Installing {package_name} ({self._linked}/{self._total})")
        return operation


async def make_prefix(prefix: Path, channels: Sequence[str], specs: Sequence[str]) -> None:
    """Solve and install."""
    records = await solve(sources=list(channels), specs=list(specs), virtual_packages=VirtualPackage.detect())
    _say(f"Solved: {len(records)} packages")
    requested = [MatchSpec(spec)._match_spec for spec in specs]  # the documented type is refused
    reporter = cast(InstallerReporter, Reporter())
    await install(records, target_prefix=prefix, show_progress=False, reporter=reporter, requested_specs=requested)


def reachable(channels: Sequence[str]) -> bool:
    """Say whether every channel answers; asking first is much faster than the library's own retries."""
    return all(_answers(Channel(channel).base_url) for channel in channels)


def main() -> int:
    """Run with the command line's arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prefix", type=Path, required=True)
    parser.add_argument("--channel", action="append", default=[])
    parser.add_argument("specs", nargs="+")
    options = parser.parse_args()
    if not reachable(options.channel):
        _say("No answer from the channels: " + ", ".join(options.channel))
        return os.EX_UNAVAILABLE
    try:
        asyncio.run(make_prefix(options.prefix, options.channel, options.specs))
    except GatewayError as error:
        _say(str(error))
        return os.EX_UNAVAILABLE
    except SolverError as error:
        _say(str(error))
        return 1
    return 0


def _answers(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "file":
        return Path(unquote(parts.path)).is_dir()
    try:
        return httpx.head(f"{url}noarch/repodata.json", timeout=REACH_SECONDS, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)
