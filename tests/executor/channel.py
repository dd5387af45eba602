"""A conda channel made by hand: a `python` that starts the tests' own, and a package with an activate.d script."""

import asyncio
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from rattler.index import index_fs

SUBDIR = "osx-arm64" if sys.platform == "darwin" else "linux-64"
PYTHON_VERSION = ".".join(map(str, sys.version_info[:3]))


def make_channel(root: Path) -> str:
    """Write and index a channel with `python` and `greeter`; return its address."""
    (root / "noarch").mkdir(parents=True)
    bare = root.with_name(f"{root.name}-python")  # without the packages of the tests' own, which a build would compile
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    launcher = f'#!/bin/sh\nexec "{bare}/bin/python" "$@"\n'
    _package(root, "python", PYTHON_VERSION, {"bin/python": launcher}, executable="bin/python")
    script = 'export GREETING="hello from $CONDA_PREFIX"\nexport PATH="$CONDA_PREFIX/greeter:$PATH"\n'
    _package(root, "greeter", "1.0", {"etc/conda/activate.d/greeter.sh": script, "share/greeter/x": "x"})
    asyncio.run(index_fs(root, force=True))
    return root.as_uri()


def _package(root: Path, name: str, version: str, files: Mapping[str, str], *, executable: str = "") -> None:
    index = {"name": name, "version": version, "build": "0", "build_number": 0, "depends": [], "subdir": SUBDIR}
    paths = [
        {
            "_path": path,
            "path_type": "hardlink",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "size_in_bytes": len(text.encode()),
        }
        for path, text in files.items()
    ]
    info = {
        "info/index.json": json.dumps(index),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}),
        "info/files": "".join(f"{path}\n" for path in files),
        "info/about.json": "{}",
    }
    (root / SUBDIR).mkdir(exist_ok=True)
    with tarfile.open(root / SUBDIR / f"{name}-{version}-0.tar.bz2", "w:bz2") as archive:
        for path, text in {**info, **files}.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            member.mode = 0o755 if path == executable else 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
