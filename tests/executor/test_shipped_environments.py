"""The environments of the product: what their locks hold, which one a node takes, and how it is installed."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from app.domain.environment_reports import EnvironmentState
from app.executor.environments.build_environment import Order, build
from app.executor.environments.build_progress import Downloads, Progress
from app.executor.environments.builders import Builder, BuildRules, Tools
from app.executor.environments.conda import CondaSearch
from app.executor.environments.environment_archive import EnvironmentArchive
from app.executor.environments.environments import EnvironmentFinder, planned_prefix, read_marker
from app.executor.environments.local_environments import LocalEnvironments
from app.executor.environments.lockfile import Lockfile, Machine, NotForMachine
from app.executor.environments.packs import pack
from app.executor.environments.shipped import CPU_BUILDS, NO_SOURCE, LockPlan, TorchSource, plan, shipped_as
from app.presets.catalogue import environment_specs
from app.presets.environments import Device, ShippedEnvironment, shipped_environments
from app.registry.environments.specs import parse_spec, spec_hash
from scripts.environment_locks import PLATFORMS, PYTHONS, obstacles

SHIPPED = shipped_environments()
each_environment = pytest.mark.parametrize("one", SHIPPED.values(), ids=SHIPPED)
CUDA: frozenset[Device] = frozenset({"cuda", "cpu"})
CPU: frozenset[Device] = frozenset({"cpu"})
MAC: frozenset[Device] = frozenset({"apple", "cpu"})
FASTER = TorchSource(index="https://mirror.example/cu126")


class TestLocks:
    def test_every_specification_has_one(self) -> None:
        assert set(environment_specs()) == set(SHIPPED)

    @each_environment
    def test_is_that_of_the_specification(self, one: ShippedEnvironment) -> None:
        lock = Lockfile.parse(one.lock_file.read_text())

        assert lock.spec_hash == spec_hash(parse_spec(one.spec_file.read_text())), "python -m scripts.environment_locks"

    @each_environment
    def test_every_platform_gets_all_that_is_pinned_or_there_is_a_reason(self, one: ShippedEnvironment) -> None:
        lock = Lockfile.parse(one.lock_file.read_text())
        wanted = [Requirement(text) for text in parse_spec(one.spec_file.read_text()).pip]

        assert set(obstacles(lock)) == set(one.not_on)
        for system, machine in (PLATFORMS[where] for where in PLATFORMS.keys() - one.not_on):
            for python in PYTHONS:
                here = Machine.of(python=python, system=system, machine=machine)
                installed = {file.package: file.version for file in lock.select(here)}
                pinned = [need for need in wanted if need.marker is None or need.marker.evaluate(dict(here.markers))]
                assert all(need.specifier.contains(installed[need.name.lower()]) for need in pinned)

    def test_names_what_has_no_file(self) -> None:
        lock = Lockfile.parse(SHIPPED["vllm"].lock_file.read_text())

        with pytest.raises(NotForMachine, match="triton"):
            lock.select(Machine.of(python="3.11", system="darwin", machine="arm64"))


class TestPlan:
    @pytest.mark.parametrize(
        ("name", "devices", "system", "named", "expected"),
        [
            ("trl", CUDA, "linux", NO_SOURCE, ("trl", None, False, None)),
            ("trl", CUDA, "linux", FASTER, ("trl", FASTER, False, None)),
            ("trl", CPU, "linux", NO_SOURCE, ("trl-cpu", CPU_BUILDS, True, "trl")),
            ("trl", CPU, "linux", FASTER, ("trl-cpu", FASTER, True, None)),
            ("trl", MAC, "darwin", NO_SOURCE, ("trl", None, False, None)),
            ("trl-cpu", CUDA, "linux", NO_SOURCE, ("trl-cpu", CPU_BUILDS, True, None)),
            ("simpletuner", CPU, "linux", NO_SOURCE, ("simpletuner", CPU_BUILDS, True, "simpletuner")),
            ("vllm", CUDA, "linux", FASTER, ("vllm", None, False, None)),
            ("mlx", CPU, "linux", NO_SOURCE, ("mlx", None, False, None)),
        ],
    )
    def test_accelerators_and_the_operator_decide(
        self, name: str, devices: frozenset[Device], system: str, named: TorchSource, expected: tuple[object, ...]
    ) -> None:
        found = plan(SHIPPED[name], devices, named, system=system)

        otherwise = found.otherwise and found.otherwise.name
        assert (found.environment.name, found.torch, found.cpu_build, otherwise) == expected

    def test_cpu_build_leaves_out_what_only_cuda_needs(self) -> None:
        lock = Lockfile.parse(SHIPPED["simpletuner"].lock_file.read_text())
        files = lock.select(Machine.of(python="3.11", system="linux", machine="x86_64"))

        torch, others = plan(SHIPPED["simpletuner"], CPU, NO_SOURCE, system="linux").parts(files)

        assert set(torch) == {"torch==2.9.1+cpu", "torchvision==0.24.1+cpu", "torchaudio==2.9.1+cpu"}
        left = {file.package for file in files} - {file.package for file in others}
        assert {"triton", "nvidia-cudnn-cu12"} < left
        assert "nvidia-ml-py" not in left

    def test_found_by_its_content_under_any_name(self) -> None:
        text = SHIPPED["trl"].spec_file.read_text()

        assert shipped_as(parse_spec(text)) is SHIPPED["trl"]
        assert shipped_as(parse_spec(text.replace("trl==", "trl>="))) is None


def test_node_without_the_accelerator_refuses_what_cannot_run(tmp_path: Path) -> None:
    search = CondaSearch(environ={"PATH": ""}, home=tmp_path)
    spec = SHIPPED["vllm"].spec_file.read_text()

    def reported(rules: BuildRules) -> tuple[EnvironmentState, str | None]:
        local = LocalEnvironments(envs_dir=tmp_path / "envs", search=search, rules=rules)
        (report,) = [one for one in local.look({"mine": spec}).reports if one.name == "mine"]
        return report.state, report.trouble.code if report.trouble else None

    assert reported(BuildRules(devices=CPU)) == (EnvironmentState.MISSING, "environment_needs_accelerator")
    assert reported(BuildRules(devices=CUDA)) == (EnvironmentState.KNOWN, None)


# ---- building, without any network ----------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, *, filling: int = 0) -> Path:
    """Make a package of one empty module."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{name}.py", "#" * filling)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Shop:
    """Two tiny shipped environments, `big` for CUDA and `big-cpu`, and the places that pip finds their packages in."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.registry, self.builds = root, root / "registry", root / "builds"
        self.log = root / "events.jsonl"
        packages = [wheel(self.registry, "tool", "1.0", filling=5000), wheel(self.registry, "torch", "2.0")]
        packages.append(wheel(self.registry, "triton", "3.0"))
        self.cpu_torch = wheel(self.builds, "torch", "2.0+cpu")
        self.big = self._ship("big", packages, without_cuda="big-cpu")
        self.twin = self._ship("big-cpu", packages[:2])
        self.spec = parse_spec(self.big.spec_file.read_text())
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(self.registry))
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def _ship(self, name: str, packages: list[Path], **said: str) -> ShippedEnvironment:
        lock = '[tool.deepe]\nspec-hash = ""\n'
        for path in packages:
            package, version = path.name.split("-")[:2]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lock += f'[[packages]]\nname = "{package}"\nversion = "{version}"\n'
            lock += f'wheels = [{{ url = "{path.as_uri()}", size = {path.stat().st_size}, '
            lock += f'hashes = {{ sha256 = "{digest}" }} }}]\n'
        (self.root / f"pylock.{name}.toml").write_text(lock)
        (self.root / f"{name}.yml").write_text(f"# {name}\ndependencies: [python, pip]\n")
        return ShippedEnvironment(name=name, folder=self.root, runs_on=("cuda", "cpu"), **said)

    def build(self, chosen: LockPlan) -> Path:
        prefix = planned_prefix("big", self.spec, self.root / "envs", cpu_torch=chosen.cpu_build)
        archive = EnvironmentArchive(self.root / "archive", "big", self.spec)
        order = Order("big", prefix, self.spec, self.root, plan=chosen, archive=archive, node="one")
        tools = Tools(conda=None, rattler=False, python_version="3.11.7")
        build(order, tools, Progress(str(self.log)), wanted=Builder.VENV)
        return prefix

    def on_cpu(self, source: TorchSource, *, otherwise: ShippedEnvironment | None = None) -> LockPlan:
        return LockPlan(self.twin, source, cpu_build=True, otherwise=otherwise)

    def state(self, *, cuda: bool) -> EnvironmentState:
        search = CondaSearch(environ={"PATH": ""}, home=self.root)
        finder = EnvironmentFinder(envs_dir=self.root / "envs", search=search, cuda=cuda)
        return finder.scan().find("big", self.spec).state

    @property
    def events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    return Shop(tmp_path, monkeypatch)


class TestBuild:
    def test_cpu_build_of_torch_is_taken_and_named_and_no_use_for_a_gpu(self, shop: Shop) -> None:
        prefix = shop.build(shop.on_cpu(TorchSource(find_links=str(shop.builds))))

        marker = read_marker(prefix)
        assert marker is not None
        assert {"tool==1.0", "torch==2.0+cpu"} <= set(marker.packages)
        assert not any(package.startswith("triton") for package in marker.packages)
        assert any("no NVIDIA GPU" in str(event["message"]) for event in shop.events)
        assert (shop.state(cuda=False), shop.state(cuda=True)) == (EnvironmentState.READY, EnvironmentState.STALE)

        archive = EnvironmentArchive(shop.root / "archive", "big", shop.spec)
        lock = archive.lock("one")
        assert lock is not None
        assert lock.has_cpu_torch
        pack(prefix, lock, archive, lambda step: None, cpu_torch=marker.cpu_torch)
        assert archive.usable_pack() is not None
        assert archive.usable_pack(cuda=True) is None

        size = (shop.registry / "tool-1.0-py3-none-any.whl").stat().st_size + shop.cpu_torch.stat().st_size
        last = shop.events[-1]
        assert (last["bytes_done"], last["bytes_total"], last["percent"]) == (size, size, 100.0)
        percents = [float(str(event["percent"])) for event in shop.events if "percent" in event]
        assert percents == sorted(percents)

    def test_registry_build_stands_in_where_the_source_has_none(self, shop: Shop) -> None:
        prefix = shop.build(shop.on_cpu(TorchSource(find_links=str(shop.root / "empty")), otherwise=shop.big))

        marker = read_marker(prefix)
        assert marker is not None
        assert {"torch==2.0", "triton==3.0"} <= set(marker.packages)
        assert any("not to be had" in str(event["message"]) for event in shop.events)
        assert shop.state(cuda=True) is EnvironmentState.READY

    def test_file_of_another_digest_is_refused(self, shop: Shop) -> None:
        wheel(shop.registry, "tool", "1.0", filling=4999)

        with pytest.raises(Exception, match="packages of the lock"):
            shop.build(LockPlan(shop.big))

        assert shop.state(cuda=True) is EnvironmentState.KNOWN


class TestDownloads:
    def test_counts_what_pip_prints(self) -> None:
        downloads = Downloads()
        downloads.expect({"a-1-py3-none-any.whl": 1000, "b-1-py3-none-any.whl": 500})

        for line in (
            "Collecting a==1",
            "  Downloading a-1-py3-none-any.whl.metadata (900 bytes)",
            "Downloading a-1-py3-none-any.whl (1.0 kB)",
            "Progress 400 of 1000",
        ):
            downloads.read(line)
        halfway = downloads.done
        for line in ("Progress 1000 of 1000", "Using cached b-1-py3-none-any.whl (0.5 kB)"):
            downloads.read(line)

        assert (halfway, downloads.done, downloads.expected) == (400, 1500, 1500)

    def test_total_is_unknown_without_a_lock(self) -> None:
        downloads = Downloads()

        downloads.read("Downloading https://host/x/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (191.8 MB)")
        downloads.read("Progress 1048576 of 191794682")

        assert (downloads.done, downloads.expected) == (1048576, None)
