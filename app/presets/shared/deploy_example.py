"""Deployment to a target of your own: an example to copy. Standard library only.

    python app/presets/shared/deploy_example.py --folderPath "$PWD/custom01-complete" --modelName shop-helper \
        --serverUrl file:///tmp/serving

It publishes a model into a serving folder: copies the files, checks every copy by its SHA-256, and puts up
`<serving folder>/<model name>/registration.json` last, so that a server watching it never sees half a model.
Replace `publish` by the calls of your own server. The last line on stdout is the result, `{"status": "success", ...}`.
"""

import argparse
import hashlib
import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The platform puts its helper modules on PYTHONPATH; in a checkout they lie beside this folder.
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared/helpers"))
import deepe
from train_callback import LevelEnum, LogEnum, write_log

SERVING_FOLDER = Path("..") / "serving"  # beside `models`, unless serverUrl is a file:// address
REGISTRATION = "registration.json"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Publish a model into a serving folder.", allow_abbrev=False)
    parser.add_argument("--trainId", default="manual", help="id of the job, for the log")
    parser.add_argument("--seq", default="1", help="number of the step in the job, for the log")
    parser.add_argument("--folderPath", required=True, help="folder of the model")
    parser.add_argument("--serverUrl", default="", help="file:// address of the serving folder")
    parser.add_argument("--modelName", required=True, help="name under which the model is served")
    parser.add_argument("--quantize", default="", help="not supported by this target")
    parser.add_argument("--template", default="", help="prompt template, kept in the registration")
    parser.add_argument("--system", default="", help="system prompt, kept in the registration")
    parser.add_argument("--parameters", default="", help="server parameters, kept in the registration")
    parser.add_argument("--basePath", default="", help="folder of the base model")
    parser.add_argument("--actualPath", default="", help="folder of the model, as the platform knows it")
    return parser


def main() -> None:
    args, _unknown = make_parser().parse_known_args()
    try:
        registration = publish(args, serving_folder(args.serverUrl))
    except (ValueError, OSError) as error:
        write_log(LevelEnum.ERROR, LogEnum.DeployError, str(error), args.trainId, args.seq, None)
        deepe.result("failed", message=str(error))
        sys.exit(1)
    write_log(LevelEnum.INFO, LogEnum.DeployCreateModelSuccess, args.modelName, args.trainId, args.seq, None)
    deepe.artifact(registration, "registration")
    deepe.result(message=f"{args.modelName} is published", registration=str(registration))


def serving_folder(url: str) -> Path:
    address = urlsplit(url)
    return Path(unquote(address.path)) if address.scheme == "file" else SERVING_FOLDER


def publish(args: argparse.Namespace, serving: Path) -> Path:
    """Copy, check, register; what was served under this name before is replaced only when the new one is whole."""
    source, name = Path(args.folderPath), args.modelName
    if not source.is_dir():
        raise ValueError(f"there is no model folder {source}")
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"'{name}' cannot be the name of a folder")
    if args.quantize not in ("", "None", "no_quantization"):
        raise ValueError(f"this target cannot quantize to {args.quantize}; choose no quantization")
    files = sorted(file for file in source.iterdir() if file.is_file())
    if not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{source} holds no weights (*.safetensors)")

    draft = serving / f".{name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    digests = {}
    for number, file in enumerate(files, start=1):
        digests[file.name] = copy_checked(file, draft / file.name)
        deepe.progress(number, len(files), file.name)
    write_registration(draft / REGISTRATION, args, digests)

    target = serving / name
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return (target / REGISTRATION).resolve()


def copy_checked(source: Path, target: Path) -> str:
    shutil.copyfile(source, target)
    wanted, found = sha256(source), sha256(target)
    if wanted != found:
        raise OSError(f"{source.name} was not copied correctly: {found} instead of {wanted}")
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_registration(path: Path, args: argparse.Namespace, digests: dict[str, str]) -> None:
    registration = {
        "model": args.modelName,
        "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": args.folderPath,
        "template": args.template,
        "system": args.system,
        "parameters": args.parameters,
        "sha256": digests,
    }
    path.write_text(json.dumps(registration, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
