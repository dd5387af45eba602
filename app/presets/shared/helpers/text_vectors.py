"""How Embedding-Demo makes a vector of a text: the same in training, in retrieval and in the saved model.

`embedding.json` beside the weights keeps the choices. Of a model that others made they are read from the files that
sentence-transformers writes. Heavy imports happen when a model is loaded.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import deepe_loading as loading
from deepe_rows import Refused

FILE = "embedding.json"
CHUNK = 64  # texts at once where no gradients are kept
AUTO = "auto"
MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}  # by the one name that newer releases write
QUERY_PROMPTS = ("query", "search_query", "s2p_query")
DOCUMENT_PROMPTS = ("document", "passage", "search_document")


@dataclass(frozen=True)
class How:
    """From tokens to a vector: `mean` of all tokens, the first (`cls`) or the `last` one; vectors have length 1."""

    pooling: str = "mean"
    max_length: int = 256
    query_prefix: str = ""
    document_prefix: str = ""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return what a training wrote, or what the folder says of a model that it did not make."""
        if (folder / FILE).is_file():
            return cls(**_document(folder / FILE, {}))
        query, document = prompts_of(folder)
        return cls(pooling=pooling_of(folder) or "mean", query_prefix=query, document_prefix=document)


def pooling_of(folder: Path) -> str | None:
    """Return the pooling that the folder's own files name; None if they name none.

    Raises `Refused` for vectors that are made in another way than `How` can say.
    """
    if (folder / FILE).is_file():
        return How.of(folder).pooling
    modules = {
        str(module.get("type", "")).rpartition(".")[2]: folder / str(module.get("path", ""))
        for module in _document(folder / "modules.json", [])
    }
    others = sorted(set(modules) - {"Transformer", "Pooling", "Normalize"})
    if others:
        raise Refused(
            f"the vectors of {folder} go through layers that this method neither trains nor keeps "
            f"({', '.join(others)} in modules.json); name a pooling (mean, cls or last) to train without them"
        )
    if "Pooling" not in modules:
        return None
    config = _document(modules["Pooling"] / "config.json", {})
    named = config.get("pooling_mode")
    switched = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    found = [POOLINGS.get(named)] if isinstance(named, str) else [MODES.get(name) for name in switched]
    if len(found) != 1 or found[0] is None:
        told = named or ", ".join(switched) or "none"
        raise Refused(
            f"{modules['Pooling'] / 'config.json'} asks for a pooling that this method does not have ({told}); "
            "name one (mean, cls or last)"
        )
    if config.get("include_prompt") is False and any(prompts_of(folder)):
        raise Refused(
            f"{modules['Pooling'] / 'config.json'} leaves prompts out of the pooling (include_prompt), which this "
            "method cannot do; name a pooling (mean, cls or last)"
        )
    return found[0]


def prompts_of(folder: Path) -> tuple[str, str]:
    """Return what the folder's own files put before a query and before a document."""
    if (folder / FILE).is_file():
        how = How.of(folder)
        return how.query_prefix, how.document_prefix
    config = _document(folder / "config_sentence_transformers.json", {})
    prompts = config.get("prompts") or {}
    usual = prompts.get(config.get("default_prompt_name"), "")
    query, document = (
        next((prompts[name] for name in names if name in prompts), usual) for names in (QUERY_PROMPTS, DOCUMENT_PROMPTS)
    )
    return str(query or ""), str(document or "")


def _document(path: Path, empty: Any) -> Any:
    """Return what a JSON file holds; `empty` if there is no file."""
    if not path.is_file():
        return empty
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise Refused(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, type(empty)):
        raise Refused(f"{path} has another form than expected: {type(found).__name__}")
    return found


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **loading.code(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest_of(how: How, tokenizer: Any) -> int:
    """Return how many tokens of a text are read."""
    return int(min(how.max_length, tokenizer.model_max_length))


@dataclass
class Encoder:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any
    how: How

    @classmethod
    def load(cls, base: Path, *, adapter: Path | None = None, how: How | None = None, tokenizer: Any = None) -> Self:
        """Load a base or complete model, with the adapter of a training if one is given."""
        import torch
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        safe = loading.weights(base, *([adapter] if adapter is not None else []))
        model = AutoModel.from_pretrained(base, dtype=torch.float32, **safe)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        tokenizer = tokenizer or load_tokenizer(adapter or base)
        return cls(model.to(device).eval(), tokenizer, how or How.of(adapter or base))

    @property
    def device(self) -> Any:
        return self.model.device

    @property
    def longest(self) -> int:
        """How many tokens of a text are read."""
        return longest_of(self.how, self.tokenizer)

    def encode(self, texts: list[str], *, query: bool = False) -> Any:
        """Return `(texts, dimensions)` vectors of length 1 as one batch, with gradients where the model has them."""
        import torch

        if not texts:
            return torch.zeros((0, self.model.config.hidden_size), device=self.device)
        prefix = self.how.query_prefix if query else self.how.document_prefix
        encoded = self.tokenizer(
            [prefix + text for text in texts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        ).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            states = self.model(**encoded).last_hidden_state
        return torch.nn.functional.normalize(self._pooled(states.float(), encoded["attention_mask"]), dim=1)

    def encode_all(self, texts: list[str], *, query: bool = False) -> Any:
        """The same for any number of texts, in chunks and without dropout; call it where no gradients are kept."""
        import torch

        was_training = self.model.training
        self.model.eval()
        parts = [self.encode(texts[start : start + CHUNK], query=query) for start in range(0, len(texts), CHUNK)]
        self.model.train(was_training)
        return torch.cat(parts)

    def _pooled(self, states: Any, mask: Any) -> Any:
        import torch

        if self.how.pooling == "cls":
            return states[:, 0]
        if self.how.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    def save(self, folder: Path) -> None:
        """Write the adapter (or the model), the tokenizer and how vectors are made."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(json.dumps(asdict(self.how), ensure_ascii=False, indent=1), "utf-8")
        (folder / "README.md").unlink(missing_ok=True)  # an empty form
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # written as 0600, whatever the umask says
