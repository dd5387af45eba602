"""Deployment to an Ollama server over its HTTP API. Standard library only.

    python app/presets/shared/deploy_ollama.py --folderPath "$PWD/sft-complete" --modelName my-model \
        --serverUrl http://127.0.0.1:11434 --quantize q4_K_M --template "{{ .Prompt }}"

Every file of the folder goes up under its SHA-256 (`POST /api/blobs/sha256:<hex>`), then `POST /api/create` makes the
model of them and quantizes it. The last line on stdout is the result, `{"status": "success", ...}`.
"""

import argparse
import hashlib
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
from deepe_addresses import opener
from train_callback import LevelEnum, LogEnum, write_log

UPLOAD_TIMEOUT_S = 600  # without a byte in either direction
CREATE_TIMEOUT_S = 3600  # quantizing a large model is silent for minutes
NOT_QUANTIZED = ("", "None", "no_quantization")


class Failed(Exception):
    """The deployment failed for a reason that a sentence explains; `code` is for the log."""

    def __init__(self, code: LogEnum, message: str) -> None:
        super().__init__(message)
        self.code = code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Deploy a model to an Ollama server.", allow_abbrev=False)
    parser.add_argument("--trainId", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--folderPath", required=True, help="folder of the complete model")
    parser.add_argument("--serverUrl", required=True, help="address of the server, such as http://127.0.0.1:11434")
    parser.add_argument("--modelName", required=True, help="name of the model on the server")
    parser.add_argument("--quantize", default="", help="q8_0, q4_K_M, q4_K_S; empty or None keeps the numbers")
    parser.add_argument("--template", default="", help="prompt template in Ollama's language")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--parameters", default="", help='JSON object of options, such as {"temperature": 0.2}')
    parser.add_argument("--basePath", default="", help="folder of the base model")
    parser.add_argument("--actualPath", default="", help="folder of the model, as the platform knows it")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    args.serverUrl = args.serverUrl.rstrip("/")
    try:
        deploy(args)
    except Failed as error:
        log(args, error.code, str(error), level=LevelEnum.ERROR)
        deepe.result("failed", message=str(error))
        sys.exit(1)
    deepe.result(message=f"{args.modelName} is deployed to {args.serverUrl}", model=args.modelName)


def deploy(args: argparse.Namespace) -> None:
    folder = Path(args.folderPath)
    if not folder.is_dir():
        raise Failed(LogEnum.DeployError, f"there is no model folder {folder}")
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if not files:
        raise Failed(LogEnum.DeployUploadFoldersFailed, f"the model folder {folder} is empty")
    body = create_body(args)

    log(args, LogEnum.DeployInitializeOllama, args.serverUrl)
    check_server(args.serverUrl)
    log(args, LogEnum.DeployUploadingFolders, args.folderPath)
    body["files"] = {file.name: upload(args, file, number, len(files)) for number, file in enumerate(files, start=1)}
    log(args, LogEnum.DeployUploadFoldersSuccess, f"{args.folderPath},{len(files)}")
    create(args, body)


def create_body(args: argparse.Namespace) -> dict[str, Any]:
    """Return the request without its files; what is empty is left out, so that the server's own defaults hold."""
    body: dict[str, Any] = {"model": args.modelName}
    if args.template not in ("", "None"):
        body["template"] = args.template
    else:
        sentence = "no template is given: the server takes the one it finds in the model, or none at all"
        log(args, LogEnum.ParamCheckWarning, sentence, level=LevelEnum.WARNING)
        deepe.note(sentence)
    if args.system not in ("", "None"):
        body["system"] = args.system
    if args.parameters not in ("", "None"):
        body["parameters"] = options(args.parameters)
    if args.quantize not in NOT_QUANTIZED:
        log(args, LogEnum.DeployEnableQuantize, args.quantize)
        body["quantize"] = args.quantize
    return body


def options(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise Failed(LogEnum.DeployError, f"parameters is not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise Failed(LogEnum.DeployError, "parameters must be a JSON object")
    return parsed


def check_server(url: str) -> None:
    try:
        with opener(None, urllib.request.HTTPRedirectHandler()).open(url, timeout=10):
            pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Failed(LogEnum.DeployOllamaError, f"the Ollama server {url} cannot be reached: {error}") from error


def upload(args: argparse.Namespace, file: Path, number: int, total: int) -> str:
    """Send one file; return its name on the server. The server compares the bytes with the digest in the address."""
    log(args, LogEnum.DeployCalculateSha256Start, file.name)
    with file.open("rb") as content:
        digest = "sha256:" + hashlib.file_digest(content, "sha256").hexdigest()
    log(args, LogEnum.DeployCalculateSha256Success, f"{file.name},{digest}")

    log(args, LogEnum.DeployUploadingFiles, file.name)
    with file.open("rb") as content:
        request = urllib.request.Request(f"{args.serverUrl}/api/blobs/{digest}", data=content, method="POST")
        request.add_header("Content-Length", str(file.stat().st_size))
        request.add_header("Content-Type", "application/octet-stream")
        status = send(request, file.name)
    log(args, LogEnum.DeployUploadFileSuccess if status == 201 else LogEnum.DeployUploadFileSkip, file.name)
    deepe.progress(number, total, file.name)
    return digest


def send(request: urllib.request.Request, name: str) -> int:
    try:
        with opener().open(request, timeout=UPLOAD_TIMEOUT_S) as response:
            status = int(response.status)
    except urllib.error.HTTPError as error:
        reason = error.read(500).decode(errors="replace").strip()
        message = f"the server refused {name}: {error.code} {reason}"
        raise Failed(LogEnum.DeployUploadFileFailed, message) from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(LogEnum.DeployUploadFileError, f"uploading {name} failed: {error}") from error
    if status not in (200, 201):
        raise Failed(LogEnum.DeployUploadFileFailed, f"the server answered {status} to {name}")
    return status


def create(args: argparse.Namespace, body: dict[str, Any]) -> None:
    """Make the model of the files; the server streams what it does, one JSON object a line."""
    log(args, LogEnum.DeployCreateModelStart, args.modelName)
    request = urllib.request.Request(f"{args.serverUrl}/api/create", data=json.dumps(body).encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    log(args, LogEnum.DeploySendingCreateModel, args.modelName)
    last = ""
    try:
        with opener().open(request, timeout=CREATE_TIMEOUT_S) as response:
            log(args, LogEnum.DeployCreateStatusCode, str(response.status))
            for line in objects(response):
                if "error" in line:
                    raise Failed(
                        LogEnum.DeployCreateModelFailed, f"the server could not make the model: {line['error']}"
                    )
                last = str(line.get("status", last))
                print(last, flush=True)
    except urllib.error.HTTPError as error:
        reason = error.read(500).decode(errors="replace").strip()
        message = f"the server could not make the model: {error.code} {reason}"
        raise Failed(LogEnum.DeployCreateModelFailed, message) from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(LogEnum.DeployNetworkError, f"the connection broke while the model was made: {error}") from error
    if last != "success":
        raise Failed(LogEnum.DeployNotFullSuccess, f"the server stopped before it was done; it last said '{last}'")
    log(args, LogEnum.DeployCreateModelSuccess, args.modelName)


def objects(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if not line.strip():
            continue
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            text = line[:200].decode(errors="replace")
            raise Failed(LogEnum.DeployCreateModelRawResponse, f"the server answered no JSON: {text}") from error
        yield parsed if isinstance(parsed, dict) else {"status": str(parsed)}


def log(args: argparse.Namespace, code: LogEnum, message: str, *, level: LevelEnum = LevelEnum.INFO) -> None:
    write_log(level, code, message, args.trainId, args.seq, None)


if __name__ == "__main__":
    main()
