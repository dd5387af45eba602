"""Which lock a node installs for an environment that the product ships, and where its torch comes from.

The registry's torch for Linux is the build for CUDA: with what it needs it is some gigabytes that a machine without an
NVIDIA GPU cannot use. Such a node takes the CPU build, which only torch's own index has; where that cannot be reached,
the registry's. A source that the operator names serves every node's torch. What comes from a source is bound to its
version; everything else is bound to its digest.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from app.domain.environment_locks import LockedFile
from app.domain.errors import Invalid
from app.presets.environments import Device, ShippedEnvironment, shipped_environments
from app.registry.environments.specs import EnvironmentSpec, parse_spec, spec_hash

_TORCH = frozenset({"torch", "torchvision", "torchaudio"})
# what torch's build for CUDA needs and nothing else does; nvidia-ml-py is no part of it
_FOR_CUDA = re.compile(
    r"^(triton|cuda-(toolkit|bindings|pathfinder)|"
    r"nvidia-(cublas|cuda-(cupti|nvrtc|runtime)|cudnn|cufft|cufile|curand|cusolver|cusparse|cusparselt|nccl|nvjitlink|"
    r"nvshmem|nvtx)(-cu\d+)?)$"
)


class EnvironmentNeedsAccelerator(Invalid):
    """What is in the environment runs on accelerators that the node does not have."""

    code = "environment_needs_accelerator"


class EnvironmentNotForPlatform(Invalid):
    """Packages of the lock have no file for this machine."""

    code = "environment_not_for_platform"


@dataclass(frozen=True)
class TorchSource:
    """A place with builds of torch: an index, or a folder or page of links. Both empty: none is named."""

    index: str = ""
    find_links: str = ""

    def __bool__(self) -> bool:
        return bool(self.index or self.find_links)

    @property
    def options(self) -> Sequence[str]:
        """Return pip's options."""
        # an index that cannot be reached is said in seconds, not after minutes
        found = ["--index-url", self.index, "--retries", "1", "--timeout", "20"] if self.index else []
        return [*found, *(("--find-links", self.find_links) if self.find_links else ())]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.index, self.find_links)))


NO_SOURCE = TorchSource()
CPU_BUILDS = TorchSource(index="https://download.pytorch.org/whl/cpu")


@dataclass(frozen=True)
class LockPlan:
    """Whose lock is installed, and where torch comes from; None: from the registry, as the lock says."""

    environment: ShippedEnvironment
    torch: TorchSource | None = None
    cpu_build: bool = False
    otherwise: ShippedEnvironment | None = None
    """Whose lock to install if `torch` offers nothing; None: fail."""

    def parts(self, files: Sequence[LockedFile]) -> tuple[Sequence[str], Sequence[LockedFile]]:
        """Return the requirements of torch that its source must serve, and what is installed as it is locked."""
        if self.torch is None:
            return (), files
        # without the label pip would take the registry's build from a place that has both
        build = "+cpu" if self.cpu_build else ""
        torch = [f"{file.package}=={file.version}{build}" for file in files if file.package in _TORCH]
        return torch, [file for file in files if file.package not in _TORCH and not is_for_cuda(file.package)]


def shipped_as(spec: EnvironmentSpec) -> ShippedEnvironment | None:
    """Return the shipped environment of this specification, under whatever name it is registered."""
    return _by_spec().get(spec_hash(spec))


def plan(
    environment: ShippedEnvironment, devices: frozenset[Device], named: TorchSource, *, system: str = sys.platform
) -> LockPlan:
    """Decide what a node with these accelerators installs; `named`: the source that the operator names."""
    own = named if named and environment.torch_source else None
    cpu = system == "linux" and ("cuda" not in devices or "cuda" not in environment.runs_on)
    if not cpu or not environment.has_torch:
        return LockPlan(environment, own)
    twin = shipped_environments()[environment.without_cuda] if environment.without_cuda else environment
    otherwise = environment if own is None and "cuda" in environment.runs_on else None
    return LockPlan(twin, own or CPU_BUILDS, cpu_build=True, otherwise=otherwise)


def accelerator_refusal(environment: ShippedEnvironment, devices: frozenset[Device]) -> Invalid | None:
    """Say what the environment needs that the node has not."""
    if devices.isdisjoint(environment.runs_on):
        return EnvironmentNeedsAccelerator(
            environment=environment.name, accelerators=", ".join(_NAMES[one] for one in environment.runs_on)
        )
    return None


def is_for_cuda(package: str) -> bool:
    """Return whether only torch's build for CUDA needs the package."""
    return _FOR_CUDA.match(package) is not None


_NAMES: Mapping[Device, str] = {"cuda": "NVIDIA GPU (CUDA)", "apple": "Apple GPU", "cpu": "CPU"}


@cache
def _by_spec() -> Mapping[str, ShippedEnvironment]:
    shipped = shipped_environments().values()
    return {spec_hash(parse_spec(one.spec_file.read_text("utf-8"))): one for one in shipped}
