"""What a contained stage sees of its node: what its own job needs, and nothing else of the service.

    read    the system, its environment, our helpers, its script and what was pinned with it, the script root,
            its base model, data set and model, cached models of the hub, the folder of its job
    write   its run's folder, without what the worker put there, and its job's cache; folders that the operator names
    own     home, /tmp, what it leaves beside scripts and in ../logs: gone with the attempt
    hidden  everything else of DEEPE_HOME and DEEPE_NODE_HOME, the database, homes of accounts, /run, other processes

Nothing that a script can write decides what a later stage sees: a folder of a job counts only while it lies in truth in
the folder of that job.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain.containment import StageNetwork
from app.domain.kinds import KINDS
from app.domain.training_types import TYPES
from app.executor.attempts.stage_arguments import Inputs
from app.executor.attempts.stage_process import Place, StageProcess
from app.executor.containment.probe import Bubblewrap
from app.executor.containment.sandbox import (
    ACCOUNTS_AND_SOCKETS,
    RUNTIME,
    SECRETS_OF_THE_SYSTEM,
    Sandbox,
    with_links,
)
from app.executor.runs.job_spec import JobSpec
from app.executor.runs.run_folder import RunFolder
from app.presets.catalogue import ROOM as PRESETS
from app.store.home import Home, NodeHome
from app.store.tables import JobRow

PLATFORM_FOLDERS: Final = ("models", "datasets", "logs", "images", "multimodal", "knowledgeBase")
"""What DeepExtension's backend tells scripts to read and write: it names paths there itself."""
SHARED_FOLDERS: Final = ("multimodal", "knowledgeBase")
"""What every project may name in its requests."""
SERVING: Final = "serving"
"""Where the shipped deployment script publishes models for a server of this machine."""
CACHE_VARIABLES: Final = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE")
_VERSION: Final = 2  # folders below `versions` that name one: <aa>/<sha256>


@dataclass(frozen=True)
class ContainedNode:
    """What a node's operator and its settings say of contained stages.

    `service_files`: the database and files of secrets, wherever they lie. `readable`, `writable`, `hidden` are relative
    to the home or absolute.
    """

    bubblewrap: Bubblewrap
    node_home: NodeHome
    service_files: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    writable: tuple[Path, ...] = ()
    hidden: tuple[Path, ...] = ()


@dataclass(frozen=True)
class StageFiles:
    """Paths of one stage that its process does not say: what it reads, and the prefixes of its environments."""

    inputs: Inputs
    prefixes: Sequence[Path]
    more: Sequence[Path] = ()


def contained(
    node: ContainedNode, home: Home, attempt_id: str, job: JobRow, spec: JobSpec, place: Place, files: StageFiles
) -> Sandbox:
    """Return what the stage sees; blocks, and makes the folders and files that it writes."""
    own = node.node_home.attempts / attempt_id / "private"
    run = place.run
    run.cache.mkdir(exist_ok=True)
    # scripts write drafts beside the output folder and rename them into it, so these are one mount
    writable = [run.path, run.cache, run.events, *(home.root / path for path in node.writable)]
    # a file that is a mount can be neither removed nor replaced: the worker writes and shows no other through a link
    for file in (run.output_log, run.events, run.projected_events):
        file.touch()
    kept = [entry for entry in run.path.iterdir() if entry not in (run.output, run.ranks, run.events)]
    layered = {place.script_root: own / "scripts"}
    private = dict(_own_folders(place.inherited, own))
    beside = home.seen_by_scripts("..")
    if spec.runner_call is not None:
        writable += [beside / name for name in PLATFORM_FOLDERS] + [place.output]
    else:
        layered |= {beside / name: own / name for name in SHARED_FOLDERS}
        private |= {beside / "logs": own / "logs"}
        draws = KINDS[job.kind].is_inference and TYPES[spec.training_type].generates_images
        writable += [beside / "images"] if draws else []
        private |= {} if draws else {beside / "images": own / "images"}
    if KINDS[job.kind].reaches_out:
        (beside / SERVING).mkdir(exist_ok=True)
        writable.append(beside / SERVING)
    readable = [
        *map(Path, RUNTIME),
        *(home.root / path for path in node.readable),
        PRESETS,
        run.path.parent,
        *kept,
        *(each for prefix in files.prefixes for each in _environment(prefix)),
        *_pinned(home, place, spec),
        *_inputs(home, place, spec, files),
        *_cached_models(place.inherited),
    ]
    alone = node.bubblewrap.network is StageNetwork.NONE and not KINDS[job.kind].reaches_out
    return Sandbox(
        hidden=(
            *map(Path, (*ACCOUNTS_AND_SOCKETS, *SECRETS_OF_THE_SYSTEM)),
            *(home.root, node.node_home.root, *node.service_files),
            *(home.root / path for path in node.hidden),
        ),
        readable=tuple(readable),
        writable=tuple(writable),
        private=private,
        layered=layered,
        network=not alone,
        account=node.bubblewrap.account,
    )


def contained_command(
    node: ContainedNode, home: Home, sandbox: Sandbox, process: StageProcess, run: RunFolder
) -> tuple[str, ...]:
    """Return the command that starts the process in its sandbox; blocks.

    Where stages have an account of their own, what this one writes is given to it, and its group may read what the home
    has for it. In the output folder is what the worker put there.
    """
    command = sandbox.command(node.bubblewrap.program, process.argv, process.working_directory)
    if (account := sandbox.account) is not None:
        for path in (*sandbox.readable, *sandbox.layered):
            if path.is_relative_to(home.root):
                _let_group_read(path, account.gid)
        own = (*sandbox.private.values(), *sandbox.layered.values(), run.cache, run.events, run.ranks)
        for path in (*filter(Path.exists, own), run.path, run.output, *run.output.rglob("*")):
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
    return command


def _let_group_read(root: Path, gid: int) -> None:
    """Let a group read a folder or a file of the worker's account, and what lies in it; links are left alone."""
    for path in (root, *root.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a temporary file that is gone meanwhile
            found = path.lstat()
            if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
                continue
            needed = stat.S_IRGRP | (stat.S_IXGRP if stat.S_ISDIR(found.st_mode) else 0)
            if found.st_gid != gid and found.st_mode & needed >> 3 != needed >> 3:
                os.chown(path, -1, gid, follow_symlinks=False)
                found = path.lstat()
            if found.st_gid == gid and found.st_mode & needed != needed:
                path.chmod(stat.S_IMODE(found.st_mode) | needed)


def _own_folders(environment: Mapping[str, str], own: Path) -> Iterator[tuple[Path, Path]]:
    """Return the folders that a stage has of its own, by where it sees them."""
    yield Path("/tmp"), own / "tmp"  # noqa: S108  the stage's own
    yield Path("/var/tmp"), own / "var-tmp"  # noqa: S108
    named = {"home": environment.get("HOME"), "tmpdir": environment.get("TMPDIR")}
    named |= {name.lower(): environment.get(name) for name in CACHE_VARIABLES}
    for name, path in named.items():
        if path and path.startswith("/") and Path(path).is_dir():
            yield Path(path), own / name


def _cached_models(environment: Mapping[str, str]) -> Iterator[Path]:
    """Return the models in the hub's cache of the worker's account; what a stage downloads goes beside them."""
    home = Path(environment.get("HF_HOME") or Path(environment.get("HOME", ""), ".cache", "huggingface"))
    hub = Path(environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    if hub.is_absolute():
        yield from sorted(hub.glob("models--*"))


def _environment(prefix: Path) -> Iterator[Path]:
    """Return the folders of an environment: its prefix, the Python it was made from, what `.pth` files name."""
    yield prefix
    python = prefix / "bin" / "python"
    yield python.resolve().parent.parent
    for line in _lines(prefix / "pyvenv.cfg"):
        name, _, value = line.partition("=")
        if name.strip() == "home":
            yield Path(value.strip()).parent
    for file in prefix.glob("lib/python3*/site-packages/*.pth"):
        for line in _lines(file):
            if line.startswith("/") and (folder := Path(line.strip())).is_dir():
                yield folder


def _lines(file: Path) -> Sequence[str]:
    try:
        return file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ()


def _pinned(home: Home, place: Place, spec: JobSpec) -> Iterator[Path]:
    """Return the kept versions that the stage runs, whole: a tree links to what lies beside the script root."""
    named: list[Path] = [place.script.path, *place.script.import_paths] if place.script is not None else []
    named += [Path(str(spec.effective[name])) for name in spec.files if name in spec.effective]
    for path in named:
        if path.is_relative_to(home.versions):
            yield home.versions.joinpath(*path.relative_to(home.versions).parts[:_VERSION])


def _inputs(home: Home, place: Place, spec: JobSpec, files: StageFiles) -> Iterator[Path]:
    inputs = files.inputs
    named = [Path(os.path.normpath(place.script_root / str(spec.effective[name]))) for name in _named(spec)]
    for path in (inputs.base_model, inputs.model, inputs.dataset, inputs.validation, *files.more, *named):
        if path is not None and _is_where_it_says(home, path):
            yield _whole_data_set(home, path)
    if (base := inputs.base_model) is not None and base.parent == home.models:
        yield from (entry for entry in base.iterdir() if entry.is_symlink())  # as a hub's cache has them
    for picture in _pictures(spec):
        path = home.seen_by_scripts(picture)
        if _is_where_it_says(home, path):
            yield path


def _named(spec: JobSpec) -> Iterable[str]:
    return (name for name in spec.named_paths if isinstance(spec.effective.get(name), str))


def _whole_data_set(home: Home, path: Path) -> Path:
    """Return the folder of a data set that has one: its pictures and held-out rows lie there."""
    if path.is_relative_to(home.datasets) and len(parts := path.relative_to(home.datasets).parts) > 1:
        return home.datasets / parts[0]
    return path


def _pictures(spec: JobSpec) -> Iterator[str]:
    """Return the pictures of a conversation, as paths from the script root."""
    for turn in spec.question.history if spec.question is not None else ():
        for image in turn.get("images") or ():
            if isinstance(image, Mapping) and isinstance(data := image.get("data"), str) and not _is_url(data):
                yield data


def _is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*:", text) is not None


def _is_where_it_says(home: Home, path: Path) -> bool:
    """Say whether a path that a script could have replaced by a link lies in truth where it says."""
    try:
        parts = path.relative_to(home.runs).parts
    except ValueError:
        return True
    return bool(parts) and with_links(path)[0].is_relative_to(with_links(home.runs / parts[0])[0])
