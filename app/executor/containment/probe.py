"""Whether this machine can contain stages: one sandbox is made and looked at from within.

A kernel without user namespaces, a container without the right to mount `/proc` or an old bubblewrap shows at once.
What is not certain counts as a failure.
"""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.containment import Containment, ContainmentMode, ContainmentReason, ContainmentWish, StageNetwork
from app.executor.containment.sandbox import Account, Sandbox

PROGRAM: Final = "bwrap"
_SECONDS: Final = 10
_LOOK: Final = """
test "$(id -u)" = "$4" || { echo "runs as another account"; exit 1; }
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
    account: Account | None = None


class ContainmentUnavailable(Exception):
    """The node was told to contain its stages and cannot."""

    def __init__(self, found: Containment) -> None:
        super().__init__(
            "DEEPE_CONTAINMENT=bubblewrap, DEEPE_STAGE_NETWORK=none or DEEPE_STAGE_USER asks for contained stages, "
            f"which this machine cannot have: {found.detail}. Install bubblewrap and allow user namespaces, "
            "or change the setting."
        )


class AccountUnusable(Exception):
    """Stages cannot run as the account that the operator names."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"DEEPE_STAGE_USER={name}: {why}.")


def find_account(name: str) -> Account | None:
    """Return the account that stages run as, None for the worker's own; raise `AccountUnusable`."""
    if not name:
        return None
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise AccountUnusable(name, "this machine has no such account") from error
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0:
        raise AccountUnusable(name, "only a worker that is root can run stages as another account")
    if entry.pw_uid == 0:
        raise AccountUnusable(name, "the account is root; name one without rights")
    if setpriv is None:
        raise AccountUnusable(name, "setpriv (of util-linux) is not on the PATH")
    return Account(name, entry.pw_uid, entry.pw_gid, Path(setpriv))


def find_containment(
    wish: ContainmentWish, network: StageNetwork, account: Account | None = None
) -> tuple[Containment, Bubblewrap | None]:
    """Return how stages are contained here, and by what. Blocks for some hundredths of a second.

    Raises `ContainmentUnavailable` if containment is required and cannot be had; so it is to keep stages from the
    network, and to run them as another account.
    """
    program = shutil.which(PROGRAM)
    if wish is ContainmentWish.OFF:
        reason, detail = ContainmentReason.SWITCHED_OFF, "DEEPE_CONTAINMENT=off"
    elif sys.platform != "linux":
        reason, detail = ContainmentReason.NOT_LINUX, sys.platform
    elif program is None:
        reason, detail = ContainmentReason.NOT_INSTALLED, f"{PROGRAM} is not on the PATH"
    elif trouble := probe(Path(program), network, account):
        reason, detail = ContainmentReason.PROBE_FAILED, trouble
    else:
        found = Containment(
            mode=ContainmentMode.BUBBLEWRAP, network=network, user=None if account is None else account.name
        )
        return found, Bubblewrap(Path(program), network, account)
    # nothing keeps a stage that is not contained from the network
    found = Containment(mode=ContainmentMode.OFF, network=StageNetwork.ALL, reason=reason, detail=detail)
    if wish is ContainmentWish.BUBBLEWRAP or network is StageNetwork.NONE or account is not None:
        raise ContainmentUnavailable(found)
    return found, None


def probe(program: Path, network: StageNetwork, account: Account | None = None) -> str:
    """Make a sandbox as stages get it and look from within; return what is wrong, nothing if all is well."""
    with tempfile.TemporaryDirectory(prefix="containment-") as name:
        folder = Path(os.path.realpath(name))
        for part in ("hidden", "read", "written", "tmp"):
            (folder / part).mkdir()
        (folder / "hidden" / "secret").touch()
        (folder / "read" / "known").touch()
        uid = os.geteuid()
        if account is not None:
            uid = account.uid
            os.chown(folder / "written", account.uid, account.gid)
        sandbox = Sandbox(
            hidden=(folder / "hidden", folder),
            readable=(folder / "read",),
            writable=(folder / "written",),
            network=network is StageNetwork.ALL,
            account=account,
        )
        pid = os.getpid()
        looking = ("/bin/sh", "-c", _LOOK, "sh", str(folder), str(pid), _start_of(pid), str(uid))
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
