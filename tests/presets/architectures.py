"""Small base models in the shapes of known families: architecture, tokenizer and chat template of each.

    python architectures.py FOLDER-OF-THE-PRESETS OUTPUT --steps=400 [NAME ...]

Runs in the stage's environment. With steps they learn to add two digits first, as the demo's base model does: LoRA can
steer only what a base knows.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 2048}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 128}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {  # configuration, family of the template, sizes
    "llama": ("LlamaConfig", "llama 3", GROUPED),
    "qwen2": ("Qwen2Config", "chatml with another eos", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "qwen 3", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", "gemma", GEMMA),
    "gemma3": ("Gemma3TextConfig", "gemma", GEMMA),
    "mistral": ("MistralConfig", "mistral", GROUPED | {"sliding_window": 128}),
    "phi3": ("Phi3Config", "chatml with another eos", GROUPED),  # one matrix for queries, keys and values
    "gpt2": ("GPT2Config", "none", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}),  # no Linear
    "gpt-neox": ("GPTNeoXConfig", "none", SIZES | {"max_position_embeddings": 2048}),
    "mixtral": ("MixtralConfig", "mistral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "qwen 3",
        GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--steps", type=int, default=400, help="steps of learning to add")
    args = parser.parse_args()
    sys.path += [str(args.presets / "shared/helpers"), str(args.presets / "shared")]
    import torch

    torch.set_num_threads(1)
    for name in args.names:
        print(name, flush=True)
        build(name, args.presets, args.output / name, args.steps)


def build(name: str, presets: Path, folder: Path, steps: int = 0) -> None:
    """Write a base model, with random weights if it learns nothing."""
    import tiny_base
    import torch
    import transformers

    kind, family, sizes = ARCHITECTURES[name]
    families = import_module("families")  # it lies beside this file
    families.save_base(family, presets, folder)  # its tokenizer; the weights are written over
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=len(tokenizer), **sizes, **ends)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if steps:
        learn(model, tokenizer, steps)
    tiny_base.save(model, tokenizer, folder)


def learn(model: Any, tokenizer: Any, steps: int) -> None:
    import tiny_base

    template = tokenizer.chat_template
    tokenizer.chat_template = template or "{{ bos_token }}" + import_module("deepe_chat").PLAIN_TEMPLATE

    def encode(tokenizer: Any, pair: tuple[str, str]) -> tuple[list[int], int]:
        turns = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        counts = (tokenizer.encode(text, add_special_tokens=False) for text in (whole, asked))
        return next(counts), len(next(counts))

    tiny_base.encode = encode
    settings = argparse.Namespace(learning_rate=3e-3, steps=steps, batch_size=32, seed=42)
    tiny_base.pretrain(model, tokenizer, tiny_base.sums(tiny_base.ANSWER_STYLES[:1]), settings)
    tokenizer.chat_template = template


if __name__ == "__main__":
    main()
