"""Nodes that agree: locks of what was installed, and packed environments for a node without a network. All real."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.domain.environment_locks import EnvironmentLock, differences
from app.executor.environments.activation import interpreter
from app.executor.environments.environment_archive import EnvironmentArchive, Pack, read_lock
from app.executor.environments.environments import LOCK, planned_prefix, read_marker
from app.registry.environments.specs import parse_spec
from tests.executor.building import PROGRAM, TINY
from tests.executor.channel import make_channel
from tests.executor.conftest import local_environment

pytestmark = [pytest.mark.xdist_group("packs")]  # a venv takes its time on a busy machine

PACKER = [sys.executable, "-u", "-m", "app.executor.environments.pack_environment"]


class Cluster:
    """Two nodes that share a folder."""

    def __init__(self, root: Path, text: str, environment: dict[str, str]) -> None:
        self.root = root
        self.text = text
        self.environment = environment
        self.spec_file = root / "environment.yml"
        self.spec_file.write_text(text)
        self.archive = EnvironmentArchive(root / "shared", "demo", parse_spec(text))

    def run(
        self, program: list[str], node: str, *options: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        command = [*program, "--name", "demo", "--envs", str(self.envs(node)), "--spec", str(self.spec_file)]
        command += ["--archive", str(self.root / "shared"), "--node", node, *options]
        environment = {**self.environment, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def build(self, node: str, *options: str, **environment: str) -> Path:
        done = self.run(PROGRAM, node, *options, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        (prefix,) = [path for path in self.envs(node).iterdir() if path.is_dir()]
        return prefix

    def pack(self, node: str) -> Pack:
        done = self.run(PACKER, node)
        assert done.returncode == 0, done.stdout + done.stderr
        pack = self.archive.usable_pack()
        assert pack is not None
        assert pack.sha256 in done.stdout
        return pack

    def envs(self, node: str) -> Path:
        return self.root / node / "envs"

    def lock(self, node: str) -> EnvironmentLock:
        lock = self.archive.lock(node)
        assert lock is not None
        return lock


def damage(cluster: Cluster) -> None:
    pack = cluster.archive.usable_pack()
    assert pack is not None
    with cluster.archive.path_of(pack).open("ab") as file:
        file.write(b"x")


def says(prefix: Path, program: str) -> str:
    command = [str(interpreter(prefix)), "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Cluster:
    """Return a cluster in which node one has built the environment and packed it."""
    root = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(root, TINY, local_environment(wheels, root))
    cluster.build("one")
    cluster.pack("one")
    return cluster


@pytest.fixture
def cluster(built: Cluster, tmp_path: Path) -> Cluster:
    """Return what the other nodes see of that cluster."""
    shutil.copytree(built.root / "shared", tmp_path / "shared")
    return Cluster(tmp_path, TINY, built.environment)


class TestWheels:
    def test_lock_names_what_was_installed_with_its_digest(self, built: Cluster) -> None:
        lock = built.lock("one")
        (prefix,) = [path for path in built.envs("one").iterdir() if path.is_dir()]
        marker = read_marker(prefix)

        assert [(one.name, one.version, len(one.sha256 or "")) for one in lock.pip] == [("tinypkg", "1.0", 64)]
        assert any(line.startswith("pip==") for line in lock.bundled)
        assert read_lock(prefix / LOCK) == lock
        assert marker is not None
        assert (marker.builder, marker.lock, marker.python_version) == ("venv", lock.digest, lock.python)

    def test_pack_is_enough_for_a_node_without_network(self, cluster: Cluster) -> None:
        pack = cluster.archive.usable_pack()

        prefix = cluster.build("two", "--offline", PIP_FIND_LINKS="")

        marker = read_marker(prefix)
        assert pack is not None
        assert marker is not None
        assert (pack.kind, pack.node, pack.lock) == ("wheels", "one", cluster.lock("one").digest)
        assert (marker.builder, marker.lock) == ("pack", pack.lock)
        assert cluster.lock("two").pip == cluster.lock("one").pip
        assert says(prefix, "import tinypkg; print(tinypkg.VALUE)") == "42"
        assert (prefix / "etc" / "conda" / "env_vars.d" / "deepe.json").is_file()
        assert not (prefix / ".deepe-wheels").exists()

    def test_lock_is_installed_from_the_sources_if_the_pack_is_damaged(self, cluster: Cluster) -> None:
        lock = cluster.lock("one")
        damage(cluster)

        prefix = cluster.build("two", "--lock", str(cluster.archive.lock_file("one")))

        marker = read_marker(prefix)
        assert prefix == planned_prefix("demo", parse_spec(TINY), cluster.envs("two"), lock=lock.digest)
        assert marker is not None
        assert (marker.builder, marker.lock) == ("venv", lock.digest)
        assert cluster.lock("two").digest == lock.digest

    def test_damaged_pack_is_all_there_is(self, cluster: Cluster) -> None:
        damage(cluster)

        done = cluster.run(PROGRAM, "two", "--offline")

        assert (done.returncode, list(cluster.envs("two").glob("demo-*"))) == (1, [])
        assert "is damaged: its sha256 is" in done.stdout

    def test_other_bytes_than_locked_are_refused(self, cluster: Cluster, tmp_path: Path) -> None:
        lock = cluster.lock("one")
        other = lock.model_copy(update={"pip": (lock.pip[0].model_copy(update={"sha256": "0" * 64}),)})
        (tmp_path / "other.json").write_text(other.model_dump_json())

        done = cluster.run(PROGRAM, "two", "--lock", str(tmp_path / "other.json"))

        assert done.returncode == 1
        assert "DO NOT MATCH THE HASHES" in done.stdout
        assert not list(cluster.envs("two").glob("demo-*"))
        assert differences(lock, lock) == []
        assert "tinypkg" in differences(lock, other)[0]


class TestConda:
    def test_lock_and_pack_of_a_prefix(self, tmp_path: Path, environment: dict[str, str]) -> None:
        channel = make_channel(tmp_path / "channel")
        text = f"channels: ['{channel}']\ndependencies: [python, greeter=1.0]\n"
        cluster = Cluster(tmp_path, text, environment)

        first = cluster.build("one", "--builder", "rattler")
        lock = cluster.lock("one")
        locked = cluster.build("three", "--lock", str(first / LOCK))
        pack = cluster.pack("one")
        shutil.rmtree(tmp_path / "channel")
        packed = cluster.build("two", "--offline")

        assert {package.name for package in lock.conda} == {"python", "greeter"}
        assert all(package.sha256 and package.url.startswith("file://") for package in lock.conda)
        assert lock.explicit.startswith("@EXPLICIT\nfile://")
        assert (pack.kind, pack.lock) == ("conda", lock.digest)
        assert (packed / "share" / "greeter" / "x").read_text() == "x"
        assert says(packed, "print(6 * 7)") == "42"
        assert {marker.lock for marker in map(read_marker, (first, locked, packed)) if marker} == {lock.digest}
        assert cluster.lock("two").node == "two"


class TestRefusals:
    def test_offline_without_a_pack_says_how_to_get_one(self, tmp_path: Path, environment: dict[str, str]) -> None:
        cluster = Cluster(tmp_path, TINY, environment)

        done = cluster.run(PROGRAM, "two", "--offline")

        assert done.returncode == 2
        assert "deepe environments pack demo" in done.stdout
        assert not cluster.envs("two").exists()

    def test_nothing_to_pack(self, tmp_path: Path, environment: dict[str, str]) -> None:
        cluster = Cluster(tmp_path, TINY, environment)

        done = cluster.run(PACKER, "one")

        assert (done.returncode, "did not build" in done.stdout) == (2, True)

    @pytest.mark.parametrize("text", ["", "{", '{"kind": "wheels"}'])
    def test_unreadable_descriptions_are_no_packs(self, tmp_path: Path, text: str) -> None:
        archive = EnvironmentArchive(tmp_path, "demo", parse_spec(TINY))
        file = archive.pack_file("wheels").with_suffix(".json")
        file.parent.mkdir(parents=True)
        file.write_text(text)
        archive.lock_file("one").parent.mkdir()
        archive.lock_file("one").write_text(text)

        assert archive.usable_pack() is None
        assert (archive.lock("one"), list(archive.locks())) == (None, [])
