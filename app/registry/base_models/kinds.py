"""What people bring as a base model that is none: each kind is recognised by its files and named with the cure."""

from pathlib import Path
from typing import Final

from app.domain.plain_text import shown
from app.registry.models.check import (
    ADAPTER_CONFIG,
    CONFIG,
    MAX_JSON_BYTES,
    PIPELINE,
    has_adapter,
    listing,
    tensor_files,
    torch_files,
)
from app.registry.models.files import UnusableFile, read_json_object
from app.registry.models.folders import Walk, link_target, relative_name

TRAINING_STATE: Final = ("optimizer.pt", "optimizer.bin", "optimizer.safetensors", "trainer_state.json")
_HALF: Final = (".incomplete", ".part", ".crdownload", ".download", ".aria2")
_ASIDE: Final = frozenset({"README.md", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"})
_TOKENIZER: Final = (
    "tokenizer",
    "vocab.",
    "merges.txt",
    "special_tokens_map",
    "added_tokens",
    "spiece",
    "chat_template",
)
# weights in a format that no method trains from, by the name of their file
_FOREIGN: Final = (
    ("*.gguf", "GGUF"), ("*.onnx", "ONNX"), ("onnx/*.onnx", "ONNX"), ("*.onnx_data", "ONNX"),
    ("consolidated*.pth", "Meta"), ("*.ckpt", "ckpt"), ("tf_model.h5", "TensorFlow"), ("saved_model.pb", "TensorFlow"),
    ("flax_model*.msgpack", "Flax"),
    ("*.nemo", "NeMo"), ("*.mlmodel", "Core ML"), ("*.tflite", "TensorFlow Lite"), ("openvino_model.xml", "OpenVINO"),
)  # fmt: skip


def refuse_links(folder: Path, found: Walk) -> None:
    """Raise `UnusableFile` for a link in a model that is not one of its files."""
    for code, links in (
        ("base_model_link_leaves", found.leaving),
        ("model_link_broken", found.broken),
        ("model_link_to_folder", found.folders),
    ):
        for path in links:
            raise UnusableFile(code, relative_name(folder, path), target=link_target(path))


def refuse_other_kinds(folder: Path) -> None:
    """Raise `UnusableFile` if the folder is something else than a model that can be trained."""
    names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - _ASIDE
    if not names:
        raise UnusableFile("base_model_is_empty", folder)
    _refuse_hub_cache(folder)
    if half := sorted(name for name in names if name.endswith(_HALF)):
        raise UnusableFile("base_model_half_downloaded", half[0])
    weights = tensor_files(folder) or torch_files(folder) or list(folder.glob("*.safetensors.index.json"))
    if has_adapter(folder) and PIPELINE not in names:
        _refuse_adapter(folder, with_model=CONFIG in names and bool(weights))
    if PIPELINE in names or (CONFIG in names and weights):
        return
    for pattern, name in _FOREIGN:
        if file := next(iter(sorted(folder.glob(pattern))), None):
            raise UnusableFile("base_model_in_other_format", file, format=name)
    if CONFIG in names:
        if unfinished := sorted(folder.rglob("*.incomplete")):
            raise UnusableFile("base_model_half_downloaded", unfinished[0])
        if names - {CONFIG}:
            raise UnusableFile("weights_missing", folder, holds=listing(folder))
        return
    if weights:
        raise UnusableFile("base_model_without_config", weights[0])
    if any(name in names for name in TRAINING_STATE) or any(folder.glob("global_step*")):
        raise UnusableFile("base_model_is_training_state", folder)
    if "modules.json" in names or any(folder.glob("*/config.json")):
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise UnusableFile("base_model_in_subfolder", folder, subfolder=shown(inner[0]) if inner else "-")
    if any(name.startswith(_TOKENIZER) for name in names):
        raise UnusableFile("base_model_is_tokenizer", folder)


def _refuse_hub_cache(folder: Path) -> None:
    for cache in (folder, *sorted(folder.glob("models--*"))):
        snapshots = cache / "snapshots"
        if snapshots.is_dir() and ((cache / "blobs").is_dir() or (cache / "refs").is_dir()):
            revisions = sorted(entry for entry in snapshots.iterdir() if entry.is_dir())
            inner = revisions[0] if revisions else snapshots
            inside = folder.name + "/" + inner.relative_to(folder).as_posix()
            raise UnusableFile("base_model_is_hub_cache", folder, snapshot=shown(inside, limit=300))


def _refuse_adapter(folder: Path, *, with_model: bool) -> None:
    if with_model:
        raise UnusableFile("base_model_with_adapter", ADAPTER_CONFIG)
    base = None
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json_object(folder / ADAPTER_CONFIG, max_bytes=MAX_JSON_BYTES).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        raise UnusableFile("base_model_is_adapter", folder, base=shown(base))
    raise UnusableFile("base_model_is_nameless_adapter", folder)
