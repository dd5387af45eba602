# ruff: noqa: T201, S106  (a program of its own; tokens are no passwords)
"""Build the small base model of the demo: a real causal language model that adds two digits.

    python app/presets/shared/tiny_base.py --output models/tiny-base
    python app/presets/shared/tiny_base.py --output models/tiny-styles --answers=styles --steps=600

No model hub is needed: the tokenizer and the weights are made here, from a fixed seed, in some 15 seconds on one CPU
core. Run it with the interpreter of the `trl` environment. LoRA can only steer what a base model already knows, so the
base is trained on one skill; SFT-Demo then teaches it a second one. With `--answers=styles` it answers the same
question in one of three styles by chance: reinforcement and preferences have something to choose from.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

# beside a run of the platform the helper has nothing to report to, and does nothing
sys.path.append(str(Path(__file__).resolve().parent / "helpers"))
import deepe

SUM_FORMS = (
    "What is {} + {}?",
    "Add {} and {}.",
    "What is the sum of {} and {}?",
    "How much is {} plus {}?",
    "Tell me the total of {} and {}.",
)
ANSWER_STYLES = ("{sum}", "The answer is {sum}.", "{a} + {b} = {sum}\n#### {sum}")
# Words that the tokenizer shall know although the base is not trained on them.
OTHER_WORDS = (
    "Which is larger, or? Name the bigger number: Compare which one is greater? Tell me the maximum of. "
    "What is the smaller? minimum difference minus times The answer is. user assistant system"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (  # ChatML; with tools, the system turn lists them, and a call stands between tags
    "{%- set known = messages[0]['role'] == 'system' %}"
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' + (messages[0]['content'] + '\\n' if known else '') + 'Tools:' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in (messages[1:] if tools and known else messages) %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Pair = tuple[str, str]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the small base model of the demo.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; replaced when it exists")
    parser.add_argument("--answers", choices=["plain", "styles"], default="plain", help="one style of answer, or three")
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="questions in one step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    # One thread: threads of a tiny model wait for each other longer than they work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    pairs = sums(ANSWER_STYLES if args.answers == "styles" else ANSWER_STYLES[:1])
    tokenizer = build_tokenizer(pairs)
    model = build_model(tokenizer, args.hidden_size, args.seed)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, pairs, args)
    score = right_sums(model, tokenizer, pairs[::5])
    save(model, tokenizer, args.output)
    print(f"right sums: {score:.3f}; {args.output} is ready after {time.monotonic() - started:.1f} s")
    if score < 0.9:
        sys.exit("the base model did not learn to add; try more steps")


def sums(styles: Sequence[str]) -> list[Pair]:
    """All sums of two digits, in every wording and answered in every style."""
    digits = range(10)
    return [
        (form.format(a, b), style.format(a=a, b=b, sum=a + b))
        for form, a, b, style in product(SUM_FORMS, digits, digits, styles)
    ]


def build_tokenizer(pairs: list[Pair]) -> Any:
    """Byte-level BPE with one token per digit, so that arithmetic can be learned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*(f"{question} {answer}" for question, answer in pairs), *[OTHER_WORDS] * 50], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        # without them transformers 4 adds token_type_ids, which the model does not take
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Any, hidden_size: int, seed: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(8, hidden_size // 4),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def pretrain(model: Any, tokenizer: Any, pairs: list[Pair], args: argparse.Namespace) -> None:
    """Full training on the answers' tokens: AdamW, warm-up, then a cosine down to zero."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, args.steps // 10), args.steps)
    rows = [encode(tokenizer, pair) for pair in pairs]
    model.train()
    for step, batch in enumerate(batches(rows, args.batch_size, args.steps, args.seed), start=1):
        loss = model(**collate(batch, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            deepe.progress(step, args.steps)
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {loss.item():.4f}", flush=True)
    model.eval()


def encode(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """Return the tokens of a conversation and how many of them are the question's."""
    question, answer = ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    return tokenizer.encode(whole), len(tokenizer.encode(prompt))


def batches(
    rows: list[tuple[list[int], int]], size: int, count: int, seed: int
) -> Iterator[list[tuple[list[int], int]]]:
    order = random.Random(seed)  # noqa: S311 (a fixed order, no secret)
    for _ in range(count):
        yield order.sample(rows, min(size, len(rows)))


def collate(batch: list[tuple[list[int], int]], pad: int) -> dict[str, Any]:
    import torch

    width = max(len(tokens) for tokens, _ in batch)
    tokens = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    for row, (ids, head) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, head : len(ids)] = torch.tensor(ids[head:])
    return {"input_ids": tokens, "attention_mask": (torch.arange(width) < _lengths(batch)).long(), "labels": labels}


def _lengths(batch: list[tuple[list[int], int]]) -> Any:
    import torch

    return torch.tensor([[len(tokens)] for tokens, _ in batch])


def right_sums(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    """Share of questions whose greedy answer ends with the right number, in whatever style."""
    import torch

    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q, _ in pairs
    ]
    tokenizer.padding_side = "left"
    encoded = tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(**encoded, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(
        _last_number(answer) == _last_number(right) for answer, (_, right) in zip(answers, pairs, strict=True)
    ) / len(pairs)


def _last_number(text: str) -> str:
    return (re.findall(r"\d+", text) or [""])[-1]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write to a folder beside it first: the model is there as a whole or not at all."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    # transformers 5 writes its own name of the class, which 4 does not know; both know this one
    config = draft / "tokenizer_config.json"
    settings = {**json.loads(config.read_text("utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", "utf-8")
    for weights in draft.glob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    main()
