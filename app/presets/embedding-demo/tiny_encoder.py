# ruff: noqa: T201  (a program of its own)
"""Build the small text encoder of Embedding-Demo: a real BERT with random weights that knows the words of the sample.

    python app/presets/embedding-demo/tiny_encoder.py --output models/tiny-encoder

No model hub is needed: the vocabulary is learned from the sample's questions and answers, the weights come from a fixed
seed, in a few seconds on one CPU core. Run it with the interpreter of the `trl` environment. It has learned nothing:
whatever it knows after Embedding-Demo, it learned there.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).with_name("embedding-demo.jsonl")
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the small encoder of the demo.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; replaced when it exists")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model")
    parser.add_argument("--vocabulary", type=int, default=600, help="word pieces that the tokenizer knows at most")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    tokenizer = build_tokenizer([text for row in rows for text in row.values()], args.vocabulary)
    model = build_model(tokenizer, args.hidden_size, args.seed)
    save(model, tokenizer, args.output)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights:,} weights, {len(tokenizer)} tokens; {args.output} is ready")


def build_tokenizer(texts: list[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    core = Tokenizer(models.WordPiece(word_pieces(words, vocabulary), unk_token="[UNK]"))  # noqa: S106 (no password)
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.decoder = decoders.WordPiece()
    cls, sep = core.token_to_id("[CLS]"), core.token_to_id("[SEP]")
    core.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]  # the types tell a query from its document
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, model_input_names=inputs, **names)


def word_pieces(words: list[str], most: int) -> dict[str, int]:
    """Return the pieces of the words, with their numbers.

    The trainer numbers the letters within words as they come out of a hash table, in another order in each process, and
    all that it learns hangs on these numbers. Letters that are named before it begins keep theirs.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = sorted({f"##{letter}" for word in words for letter in word[1:]})
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 (a token, no password)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = [*SPECIAL_TOKENS, *letters]
    core.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=most, special_tokens=named, show_progress=False)
    )
    return dict(core.get_vocab())


def build_model(tokenizer: Any, hidden_size: int, seed: int) -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 suits wide models; here most of the signal would be lost
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertModel(config)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write to a folder beside it first: the model is there as a whole or not at all."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    for weights in draft.glob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    main()
