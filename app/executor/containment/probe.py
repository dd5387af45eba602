"""Whether this machine can contain stages: one sandbox is made and looked at from within.

A kernel without user namespaces, a container without the right to mount `/proc` or an old bubblewrap shows at once.
What is not certain counts as a failure.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.containment import Containment, ContainmentMode, ContainmentReason, ContainmentWish, StageNetwork
from app.executor.containment.sandbox import Sandbox

PROGRAM: Final = "bwrap"
_SECONDS: Final = 10
_LOOK: Final = """
test -e "$1/hidden/secret" && { echo "a hidden folder is seen"; exit 1; }
(: > "$1/hidden/made") 2> /dev/null && { echo "a hidden folder can be written"; exit 1; }
(: > "$1/read/made") 2> /dev/null && { echo "a readable folder can be written"; exit 1; }
test -e "$1/read/known" || { echo "a readable folder is not seen"; exit 1; }
test -e "/proc/$2/stat" && test "$(cut -d ' ' -f 22 "/proc/$2/stat")" = "$3" && { echo "processes are seen"; exit 1; }
(: > "$1/written/made") || { echo "a writable folder cannot be written"; exit 1; }
echo contained
"""


@dataclass(frozen=True)
class Bubblewrap:
    """The program that contains stages here, and what they reach."""

    program: Path
    network: StageNetwork


class ContainmentUnavailable(Exception):
    """The node was told to contain its stages and cannot."""

    def __init__(self, found: Containment) -> None:
        super().__init__(
            "DEEPE_CONTAINMENT=bubblewrap or DEEPE_STAGE_NETWORK=none asks for contained stages, which this machine "
            f"cannot have: {found.detail}. Install bubblewrap and allow user namespaces, or change the setting."
        )


def find_containment(wish: ContainmentWish, network: StageNetwork) -> tuple[Containment, Bubblewrap | None]:
    """Return how stages are contained here, and by what. Blocks for some hundredths of a second.

    Raises `ContainmentUnavailable` if containment is required and cannot be had; so it is to keep stages from the
    network.
    """
    program = shutil.which(PROGRAM)
    if wish is ContainmentWish.OFF:
        reason, detail = ContainmentReason.SWITCHED_OFF, "DEEPE_CONTAINMENT=off"
    elif sys.platform != "linux":
        reason, detail = ContainmentReason.NOT_LINUX, sys.platform
    elif program is None:
        reason, detail = ContainmentReason.NOT_INSTALLED, f"{PROGRAM} is not on the PATH"
    elif trouble := probe(Path(program), network):
        reason, detail = ContainmentReason.PROBE_FAILED, trouble
    else:
        return Containment(mode=ContainmentMode.BUBBLEWRAP, network=network), Bubblewrap(Path(program), network)
    # nothing keeps a stage that is not contained from the network
    found = Containment(mode=ContainmentMode.OFF, network=StageNetwork.ALL, reason=reason, detail=detail)
    if wish is ContainmentWish.BUBBLEWRAP or network is StageNetwork.NONE:
        raise ContainmentUnavailable(found)
    return found, None


def probe(program: Path, network: StageNetwork) -> str:
    """Make a sandbox as stages get it and look from within; return what is wrong, nothing if all is well."""
    with tempfile.TemporaryDirectory(prefix="containment-") as name:
        folder = Path(os.path.realpath(name))
        for part in ("hidden", "read", "written", "tmp"):
            (folder / part).mkdir()
        (folder / "hidden" / "secret").touch()
        (folder / "read" / "known").touch()
        sandbox = Sandbox(
            hidden=(folder / "hidden", folder),
            readable=(folder / "read",),
            writable=(folder / "written",),
            network=network is StageNetwork.ALL,
        )
        pid = os.getpid()
        looking = ("/bin/sh", "-c", _LOOK, "sh", str(folder), str(pid), _start_of(pid))
        try:
            done = subprocess.run(
                sandbox.command(program, looking, Path("/")),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_SECONDS,
                text=True,
                check=False,
                start_new_session=True,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 0 and done.stdout == "contained\n" and (folder / "written" / "made").exists():
            return ""
        said = (done.stdout + done.stderr).strip().splitlines()
        return said[-1] if said else f"{program} ended with {done.returncode}"


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since the boot: with it, a pid names one process."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()[19]
