"""Folders of base models for tests."""

import json
from pathlib import Path
from typing import Any

from tests.api.resources import place_base_model, safetensors

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write(folder: Path, **files: Any) -> Path:
    """Write files; `__` in a name stands for a dot, objects become JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def model(folder: Path, *, template: str | None = CHATML, eos: str = "<|im_end|>", **config: Any) -> Path:
    """Write a whole model with a tokenizer of ten tokens."""
    place_base_model(folder, **config)
    (folder / "model.safetensors").write_bytes(safetensors(**{"model.embed_tokens.weight": [10, 4]}))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    added = [{"id": number, "content": token, "special": True} for number, token in enumerate(special)]
    vocabulary = {token: number for number, token in enumerate([*special, *"abcdef"])}
    return write(
        folder,
        tokenizer__json={"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}},
        tokenizer_config__json={"eos_token": eos, **({"chat_template": template} if template else {})},
    )
