# ruff: noqa: T201  (a program of its own)
"""Download a model from a hub: resumable, every file compared with the size and digest that the hub names.

    python app/presets/shared/download_model.py --repository org/name --draft models/.name --output models/name

Standard library only. The hub is the one of `HF_ENDPOINT`; `HF_TOKEN` opens what is not public. Files are gathered in a
folder beside the output, so that a second run continues, and the output is there as a whole or not at all.
"""

import argparse
import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import deepe
from deepe_addresses import AddressPolicy, opener

ENDPOINT = "https://huggingface.co"
TRIES = 6
PAUSE_SECONDS = float(os.environ.get("DEEPE_DOWNLOAD_PAUSE_SECONDS", "1"))
SILENCE_SECONDS = 60.0
PIECE_BYTES = 1024 * 1024
KEEP_FREE_BYTES = 1024**3
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_FILES = 10_000
UNFINISHED = ".incomplete"
MIB = 1024 * 1024
# the same weights once more, in forms that no method trains from
OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml", ".tflite", ".ot",
    ".mlmodel", ".pb",
)  # fmt: skip


class Refused(Exception):
    """The download cannot succeed; the message says why and what helps."""


@dataclass(frozen=True)
class File:
    """A file of the repository. `sha256` is that of large files, `blob` the digest that Git has of the others."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Download a model from a hub.", allow_abbrev=False)
    parser.add_argument("--repository", required=True, help="organisation/name on the hub")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    parser.add_argument("--draft", type=Path, required=True, help="folder where the files are gathered")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    hub = Hub(os.environ.get("HF_ENDPOINT") or ENDPOINT, os.environ.get("HF_TOKEN"))
    try:
        commit, files = hub.files(args.repository, args.revision)
        wanted = chosen(files)
        total = sum(file.size for file in wanted)
        print(f"{args.repository} at {commit}: {len(wanted)} of {len(files)} files, {total / MIB:.0f} MiB", flush=True)
        args.draft.mkdir(parents=True, exist_ok=True)
        require_space(args.draft, wanted)
        progress = Progress(total)
        for file in wanted:
            hub.fetch(args.repository, commit, file, args.draft, progress)
        place(args.draft, args.output, {file.path for file in wanted})
    except Refused as refused:
        sys.exit(f"Refused: {refused}")
    print(f"{args.output.name} is ready", flush=True)


class SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the token from other hosts than the hub."""

    def redirect_request(self, request: Any, *rest: Any) -> urllib.request.Request | None:
        following = super().redirect_request(request, *rest)
        if following is not None and following.host != request.host:
            following.remove_header("Authorization")
        return following


class Hub:
    """Reads a hub by its HTTP API."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self.endpoint = endpoint.rstrip("/")
        if urllib.parse.urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise SystemExit(f"HF_ENDPOINT must begin with http:// or https://, not {endpoint}")
        self.headers = {"User-Agent": "deepextension", **({"Authorization": f"Bearer {token}"} if token else {})}
        # a redirect leads to no file of this machine, and to no metadata service
        self.opener = opener(AddressPolicy.ANY, SameHostToken())

    def files(self, repository: str, revision: str) -> tuple[str, list[File]]:
        """Return the commit of a revision and its files."""
        address = f"{self.endpoint}/api/models/{quoted(repository)}/revision/{urllib.parse.quote(revision, safe='')}"

        def read() -> Any:
            with self.opened(f"{address}?blobs=true", repository) as answer:
                return json.loads(answer.read(MAX_ANSWER_BYTES))

        try:
            document = patiently(read, "the list of files")
            siblings = document["siblings"]
            files = [file_of(entry) for entry in siblings]
            commit = str(document["sha"])
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self.endpoint} does not answer as a hub does; set HF_ENDPOINT to one that does") from error
        if len(files) > MAX_FILES:
            raise Refused(f"{repository} has {len(files)} files; at most {MAX_FILES} are downloaded")
        return commit, files

    def fetch(self, repository: str, commit: str, file: File, folder: Path, progress: "Progress") -> None:
        """Bring one file into the folder, or the rest of it."""
        target = folder / file.path
        if target.is_file():
            if digest_fits(target, file):
                progress.add(file.size, file.path)
                return
            target.unlink()
        address = f"{self.endpoint}/{quoted(repository)}/resolve/{commit}/{quoted(file.path)}"
        draft = target.with_name(target.name + UNFINISHED)
        draft.parent.mkdir(parents=True, exist_ok=True)

        def read() -> None:
            self.receive(address, repository, file, draft, progress)
            if not digest_fits(draft, file):
                progress.add(-draft.stat().st_size, file.path)
                draft.unlink()
                raise OSError("it is not what the hub says it is (digest)")

        if draft.is_file():
            progress.add(min(draft.stat().st_size, file.size), file.path)
        patiently(read, file.path)
        draft.replace(target)

    def receive(self, address: str, repository: str, file: File, draft: Path, progress: "Progress") -> None:
        """Append what is missing to the draft."""
        there = draft.stat().st_size if draft.is_file() else 0
        if there > file.size:
            draft.unlink()
            there = 0
        if there == file.size and file.size:
            return
        with self.opened(address, repository, start=there) as answer:
            if there and answer.status != http.client.PARTIAL_CONTENT:  # this hub sends whole files only
                progress.add(-there, file.path)
                there = 0
            with draft.open("ab" if there else "wb") as stream:
                while piece := answer.read(PIECE_BYTES):
                    there += len(piece)
                    if there > file.size:
                        raise OSError(f"it is longer than the {file.size} bytes that the hub says")
                    stream.write(piece)
                    progress.add(len(piece), file.path)
                stream.flush()
                os.fsync(stream.fileno())
        if there < file.size:
            raise OSError(f"{there} of {file.size} bytes came")

    def opened(self, address: str, repository: str, *, start: int = 0) -> Any:
        headers = {**self.headers, **({"Range": f"bytes={start}-"} if start else {})}
        try:
            return self.opener.open(urllib.request.Request(address, headers=headers), timeout=SILENCE_SECONDS)  # noqa: S310 (the handlers know http only)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                raise Refused(
                    f"{self.endpoint} does not give {repository} to this caller (HTTP {error.code}). "
                    "The name may be wrong; else accept the model's licence there and set HF_TOKEN for the worker"
                ) from error
            if error.code == http.client.NOT_FOUND:
                raise Refused(f"{self.endpoint} has no such model or revision: {repository}") from error
            raise OSError(f"HTTP {error.code}") from error


class Progress:
    """Reports how much is there, about once a second."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.told = total, 0, 0.0

    def add(self, count: int, name: str) -> None:
        self.done += count
        if time.monotonic() - self.told > 1 or self.done == self.total:
            self.told = time.monotonic()
            deepe.progress(self.done // MIB, max(1, self.total // MIB), name)
            print(f"{self.done / MIB:.1f} of {self.total / MIB:.1f} MiB  {name}", flush=True)


def file_of(entry: Any) -> File:
    """Return a file as the hub's list describes it."""
    path, lfs = entry["rfilename"], entry.get("lfs") or {}
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise Refused(f"the hub names a file outside of the model: {path!r}")
    return File(path, int(lfs.get("size", entry["size"])), lfs.get("sha256"), entry.get("blobId"))


def chosen(files: list[File]) -> list[File]:
    """Return the files of a model: of weights that are there in several forms the safetensors."""
    visible = [file for file in files if not any(part.startswith(".") for part in PurePosixPath(file.path).parts)]
    safe = [file for file in visible if file.path.endswith(".safetensors")]
    if safe:
        visible = [file for file in visible if not file.path.endswith(OTHER_WEIGHTS)]
    names = {file.path for file in visible}
    # a variant of half the precision beside the weights themselves
    kept = [file for file in visible if ".fp16." not in file.path or file.path.replace(".fp16.", ".") not in names]
    if not any(file.path.endswith("config.json") or file.path == "model_index.json" for file in kept):
        raise Refused("the repository has no config.json, so it is no model that can be trained")
    return [file for file in kept if not (safe and file.path.startswith(("original/", "onnx/", "openvino/")))]


def require_space(folder: Path, files: list[File]) -> None:
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    missing = sum(file.size for file in files) - there
    if missing > (free := shutil.disk_usage(folder).free) - KEEP_FREE_BYTES:
        raise Refused(f"{missing // MIB} MiB are to come, and {free // MIB} MiB are free; make room and start it again")


def digest_fits(path: Path, file: File) -> bool:
    """Whether a file is the one that the hub describes."""
    if path.stat().st_size != file.size:
        return False
    with path.open("rb") as stream:
        if file.sha256 is not None:
            return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
        if file.blob is not None:
            git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
            return hashlib.file_digest(stream, lambda: git).hexdigest() == file.blob
    return True


def patiently(read: Any, what: str) -> Any:
    """Call it again after what passes by itself, some times and ever later."""
    for tried in range(1, TRIES + 1):
        try:
            return read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            if tried == TRIES:
                raise Refused(f"{what} could not be read: {reason}") from error
            pause = PAUSE_SECONDS * 2**tried
            print(f"{what}: {reason}; again in {pause:g} s", flush=True)
            time.sleep(pause)
    raise AssertionError("the last try returned or raised")


def place(draft: Path, output: Path, wanted: set[str]) -> None:
    """Give the folder its name, without what an earlier revision left in it."""
    for path in [path for path in draft.rglob("*") if path.is_file()]:
        if path.relative_to(draft).as_posix() not in wanted:
            path.unlink()
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(output)


def quoted(path: str) -> str:
    return urllib.parse.quote(path, safe="/")


if __name__ == "__main__":
    main()
