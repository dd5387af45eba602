"""What a contained process sees of the machine, and the command line of bubblewrap that makes it so.

The process sees the machine's files read-only, without the folders that are `hidden`; of these again what it may read
or write. It has processes, shared memory, devices and, if so planned, a network of its own. It has no capability,
whoever runs it, and gets none by a set-user-id program.

Mounts are made from the root down, so a deeper path decides for itself. Links are resolved here: what lies in a hidden
folder and is a link is made again as one, since bubblewrap mounts on what is there.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

MAX_ENTRIES: Final = 1000
"""Entries of a layered folder that are mounted one by one: bubblewrap takes 9000 words. A larger one is read-only."""

DEVICES: Final = ("nvidia*", "dri", "kfd", "infiniband", "accel")
"""What accelerators and their links between machines are reached by."""
ACCOUNTS_AND_SOCKETS: Final = ("/home", "/root", "/run", "/tmp", "/var/tmp")  # noqa: S108
RUNTIME: Final = ("/run/systemd/resolve", "/run/resolvconf", "/run/nvidia-persistenced", "/run/opengl-driver")
"""What is read in `/run`: names of servers, the driver."""
SECRETS_OF_THE_SYSTEM: Final = (
    *("/etc/shadow", "/etc/shadow-", "/etc/gshadow", "/etc/gshadow-"),
    *("/etc/ssh", "/etc/ssl/private", "/etc/sudoers", "/etc/sudoers.d"),
    "/etc/deepe",  # settings of the service, where the unit of docs/examples has them
)
_NOTHING: Final = "/dev/null"
_KEPT_UNTIL_THE_CHANGE: Final = tuple(
    word
    for name in ("SETUID", "SETGID", "SETPCAP", "DAC_READ_SEARCH")  # the last to enter folders of the account
    for word in ("--cap-add", f"CAP_{name}")
)
_LINKS: Final = 40  # as many as the kernel follows


@dataclass(frozen=True)
class Account:
    """An account of the machine that a contained process runs as; `setpriv` is the program that changes to it.

    Root alone can do that: the sandbox is made with root's rights then, and what runs in it has none of them.
    """

    name: str
    uid: int
    gid: int
    setpriv: Path


class _Mount(IntEnum):
    """What is shown at a path; where two are planned for one path, the higher one is made."""

    HIDDEN = 0
    READABLE = 1
    PRIVATE = 2
    WRITABLE = 3


@dataclass(frozen=True)
class Sandbox:
    """What a process sees. Paths are absolute; those that are not there are left out.

    `private`: folders of its own, by the path where it sees them. `layered`: folders that it sees with what they hold,
    read-only, and can write beside that into a folder of its own; it never changes what others see.
    """

    hidden: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    private: Mapping[Path, Path] = field(default_factory=dict)
    layered: Mapping[Path, Path] = field(default_factory=dict)
    network: bool = True
    account: Account | None = None

    def command(self, program: Path, argv: Sequence[str], working_directory: Path) -> tuple[str, ...]:
        """Return the command that runs `argv` with no more than this; blocks, and makes the private folders."""
        mounts = _Mounts()
        for path in self.hidden:
            mounts.add(path, _Mount.HIDDEN)
        for path in self.readable:
            mounts.add(path, _Mount.READABLE)
        private = dict(self.private)
        for folder, own in self.layered.items():
            entries = _entries(folder)
            if len(entries) > MAX_ENTRIES:
                mounts.add(folder, _Mount.READABLE)
                continue
            private[folder] = own
            for entry in entries:
                mounts.add(entry, _Mount.READABLE)
        for shown, own in private.items():
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            mounts.add(shown, _Mount.PRIVATE, own)
        for path in self.writable:
            mounts.add(path, _Mount.WRITABLE)
        return (
            str(program),
            *("--unshare-pid", "--unshare-ipc", "--unshare-cgroup-try", "--cap-drop", "ALL"),
            *(("--unshare-user",) if self.account is None else _KEPT_UNTIL_THE_CHANGE),
            *(() if self.network else ("--unshare-net",)),
            *("--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/dev/shm", "--proc", "/proc"),  # noqa: S108
            *_devices(),
            *mounts.options(),
            *("--chdir", str(working_directory)),
            *(("--", *argv) if self.account is None else _as_account(self.account, argv)),
        )


def with_links(path: Path) -> tuple[Path, Mapping[Path, str]]:
    """Return where `path` is in truth, and the links on the way there: what each says, by where it lies in truth."""
    links: dict[Path, str] = {}
    left = list(reversed(path.absolute().parts[1:]))
    real, followed = Path("/"), 0
    while left:
        part = left.pop()
        here = real.parent if part == ".." else real / part
        if followed < _LINKS and here.is_symlink():
            followed += 1
            target = str(here.readlink())
            links[here] = target
            real = Path("/") if target.startswith("/") else real
            left += [piece for piece in reversed(target.split("/")) if piece not in ("", ".")]
        else:
            real = here
    return real, links


class _Mounts:
    """Mounts by the true path where each is made."""

    def __init__(self) -> None:
        self._kinds: dict[Path, _Mount] = {}
        self._sources: dict[Path, Path] = {}
        self._links: dict[Path, str] = {}

    def add(self, path: Path, kind: _Mount, source: Path | None = None) -> None:
        real, links = with_links(path)
        if real == Path("/") or not os.path.lexists(real):
            return
        self._links.update(links)
        if self._kinds.get(real, kind) <= kind:
            self._kinds[real] = kind
            self._sources[real] = source or real

    def options(self) -> Iterator[str]:
        """Return bubblewrap's options, parents first."""
        closed: list[Path] = []
        made: set[Path] = set()
        for path in sorted({*self._kinds, *self._links}, key=lambda one: len(one.parts)):
            over = self._over(path)
            if over in (_Mount.HIDDEN, _Mount.PRIVATE):
                for folder in self._between(path):
                    if folder not in made:  # bubblewrap itself would close it to other accounts
                        made.add(folder)
                        yield from ("--dir", str(folder))
            if path not in self._kinds:
                if over in (_Mount.HIDDEN, _Mount.PRIVATE):
                    yield from ("--symlink", self._links[path], str(path))
                continue
            kind, source = self._kinds[path], str(self._sources[path])
            match kind:
                case _Mount.HIDDEN if not path.is_dir():
                    yield from ("--ro-bind", _NOTHING, str(path))
                case _Mount.HIDDEN:
                    yield from ("--tmpfs", str(path))
                    closed.append(path)
                case _Mount.READABLE if over in (None, _Mount.READABLE):
                    pass  # is seen, and cannot be written
                case _Mount.READABLE:
                    yield from ("--ro-bind", source, str(path))
                case _:
                    yield from ("--bind", source, str(path))
        for path in closed:  # what is not kept is not written either: it would take memory, and look as if it were kept
            yield from ("--remount-ro", str(path))

    def _between(self, path: Path) -> Sequence[Path]:
        """Return the folders on the way from the mount that shows `path` to it, parents first."""
        parents = list(path.parents)
        shown = next(place for place, parent in enumerate(parents) if parent in self._kinds)
        return parents[:shown][::-1]

    def _over(self, path: Path) -> _Mount | None:
        """Return what shows the folder that `path` is in; None if it is the machine's own, read-only."""
        return next((self._kinds[parent] for parent in path.parents if parent in self._kinds), None)


def _as_account(account: Account, argv: Sequence[str]) -> Iterator[str]:
    """Return the last options, and a command that becomes the account before it becomes `argv`."""
    yield from ("--setenv", "USER", account.name, "--setenv", "LOGNAME", account.name, "--", str(account.setpriv))
    yield from (f"--reuid={account.uid}", f"--regid={account.gid}", "--init-groups")
    yield from ("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--", *argv)


def _entries(folder: Path) -> Sequence[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return ()


def _devices() -> Iterator[str]:
    found: Iterable[Path] = (path for pattern in DEVICES for path in sorted(Path("/dev").glob(pattern)))
    for path in found:
        yield from ("--dev-bind-try", str(path), str(path))
