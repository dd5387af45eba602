"""Links between a node and its database that can be cut: a proxy, or a network namespace where the kernel lets us."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

from tests.chaos.proxy import Line, Proxy
from tests.worker.harness import WORKER


class Link(Protocol):
    """The only way of a node to its database."""

    address: str
    command: Sequence[str]  # starts a worker on the far side

    def cut(self) -> None:
        """Let nothing through any more."""

    def mend(self) -> None:
        """Let everything through again."""


class ProxyLink:
    """A proxy that swallows what it gets, or breaks connections, as `trouble` says."""

    address = "127.0.0.1"
    command: Sequence[str] = WORKER

    def __init__(self, proxy: Proxy, trouble: Line) -> None:
        self._proxy = proxy
        self._trouble = trouble

    def cut(self) -> None:
        self._proxy.become(self._trouble)

    def mend(self) -> None:
        self._proxy.become(Line.GOOD)


class NamespaceLink:
    """A pair of virtual network cards; the worker lives in a namespace that has nothing but the far one."""

    def __init__(self, number: int) -> None:
        self._space = f"deepe-{os.getpid()}-{number}"
        self._card = f"dx{os.getpid()}.{number}"
        network = f"10.231.{os.getpid() % 250}.{4 * number}"
        self.address = network.rpartition(".")[0] + f".{4 * number + 1}"
        self._far = network.rpartition(".")[0] + f".{4 * number + 2}"
        self.command: Sequence[str] = ("ip", "netns", "exec", self._space, *WORKER)

    def open(self) -> None:
        far = f"{self._card}f"
        for line in (
            f"netns add {self._space}",
            f"link add {self._card} type veth peer name {far} netns {self._space}",
            f"addr add {self.address}/30 dev {self._card}",
            f"link set {self._card} up",
            f"-n {self._space} addr add {self._far}/30 dev {far}",
            f"-n {self._space} link set {far} up",
            f"-n {self._space} link set lo up",
        ):
            _ip(line)

    def close(self) -> None:
        for line in (f"netns del {self._space}", f"link del {self._card}"):
            with suppress(subprocess.CalledProcessError):
                _ip(line)

    def cut(self) -> None:
        _ip(f"link set {self._card} down")

    def mend(self) -> None:
        _ip(f"link set {self._card} up")


@contextmanager
def namespaces(count: int) -> Iterator[list[NamespaceLink]]:
    """Make so many namespaces with their links."""
    links = [NamespaceLink(number) for number in range(count)]
    try:
        for link in links:
            link.open()
        yield links
    finally:
        for link in links:
            link.close()


def namespaces_are_permitted() -> bool:
    """Try it."""
    if sys.platform != "linux":
        return False
    try:
        with namespaces(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True, capture_output=True)
