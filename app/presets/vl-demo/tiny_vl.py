# ruff: noqa: T201, S106  (a program of its own; tokens are no passwords)
"""Build the small vision-language model of VL-Demo: a real LLaVA that names the colour or the shape of what is drawn.

    python app/presets/vl-demo/tiny_vl.py --output models/tiny-vl

No model hub is needed: tokenizer, weights and pictures are made here, from a fixed seed, on one CPU core. Run it with
the interpreter of the `trl` environment. LoRA can only steer what a base model already sees, so the base learns colours
and shapes one at a time, of one picture or of two; VL-Demo then teaches it to say what the pictures show.
"""

import argparse
import io
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# The drawings lie in the folder above, the helper in the shared one; the program runs without the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared" / "helpers"))
import deepe
import sample_pictures as drawings

QUESTIONS = ("Which colour is it?", "Which shape is it?")
ABOUT_TWO = ("Which colours are they?", "Which shapes are they?")
# Words that the tokenizer shall know although the base is not trained on them.
OTHER_WORDS = "What is in the picture? Describe both pictures. user system"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '<image>\\n' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PATCH = 8

Example = tuple[list[str], str, str]
"""Names of pictures, a question about them, its answer."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the small model of VL-Demo.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; replaced when it exists")
    parser.add_argument("--steps", type=int, default=250, help="training steps with words")
    parser.add_argument("--sight_steps", type=int, default=100, help="training steps of the vision tower before")
    parser.add_argument("--batch_size", type=int, default=16, help="questions in one step")
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
    processor = build_processor()
    model = build_model(processor.tokenizer, args.hidden_size, args.seed)
    weights = sum(weight.numel() for weight in model.parameters())
    print(f"{weights:,} weights, {len(processor.tokenizer)} tokens", flush=True)
    learn_to_see(model, processor, args)
    pretrain(model, processor, args)
    score = right_answers(model, processor, examples(200, random.Random(args.seed + 1)))  # noqa: S311
    save(model, processor, args.output)
    print(f"right answers: {score:.3f}; {args.output} is ready after {time.monotonic() - started:.1f} s")
    if score < 0.85:
        sys.exit("the base model did not learn to see; try more steps")


def examples(count: int, chance: random.Random) -> list[Example]:
    """Questions about the colour or the shape of one picture, and of two."""
    found: list[Example] = []
    for number in range(count):
        kinds = [(chance.choice(list(drawings.COLOURS)), chance.choice(drawings.SHAPES)) for _ in range(1 + number % 2)]
        names = [drawings.picture_name(*kind, chance, of_base=True) for kind in kinds]
        asked = chance.randrange(2)
        question = (QUESTIONS if len(kinds) == 1 else ABOUT_TWO)[asked]
        found.append((names, question, " and ".join(("", "a ")[asked] + kind[asked] for kind in kinds)))
    return found


def build_processor() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"{word} and {word} and a {word}" for word in (*drawings.COLOURS, *drawings.SHAPES)]
    core.train_from_iterator([*QUESTIONS, *ABOUT_TWO, *words, OTHER_WORDS] * 50, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    size = {"height": drawings.SIZE, "width": drawings.SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, hidden_size: int, seed: int) -> Any:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

    torch.manual_seed(seed)
    layers = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": 2}
    vision = SiglipVisionConfig(
        **layers, num_attention_heads=4, image_size=drawings.SIZE, patch_size=PATCH, vision_use_head=False
    )
    words = Qwen3Config(
        **layers,
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(8, hidden_size // 4),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=words,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(drawings.SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def learn_to_see(model: Any, processor: Any, args: argparse.Namespace) -> None:
    """Train the vision tower alone to tell colours and shapes: with words as the only teacher it takes far longer."""
    import torch

    tower, chance = model.model.vision_tower, random.Random(args.seed)  # noqa: S311 (a fixed order, no secret)
    kinds = [list(drawings.COLOURS), list(drawings.SHAPES)]
    heads = [torch.nn.Linear(args.hidden_size, len(names)) for names in kinds]
    weights = [*tower.parameters(), *(weight for head in heads for weight in head.parameters())]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    for step in range(1, args.sight_steps + 1):
        drawn = [[chance.randrange(len(names)) for names in kinds] for _ in range(2 * args.batch_size)]
        names = [drawings.picture_name(kinds[0][c], kinds[1][s], chance, of_base=True) for c, s in drawn]
        pixels = processor.image_processor([picture(name) for name in names], return_tensors="pt")["pixel_values"]
        seen = tower(pixels, output_hidden_states=True).hidden_states[-1].mean(dim=1)
        wanted = torch.tensor(drawn).T
        loss = sum(
            torch.nn.functional.cross_entropy(head(seen), right) for head, right in zip(heads, wanted, strict=True)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            deepe.progress(step, args.sight_steps + args.steps)
        if step % 50 == 0:
            print(f"sight {step}/{args.sight_steps}  loss {loss.item():.4f}", flush=True)


def pretrain(model: Any, processor: Any, args: argparse.Namespace) -> None:
    """Train all but the vision tower on the answers' tokens, each step with pictures of its own."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model.model.vision_tower.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, args.steps // 10), args.steps)
    chance = random.Random(args.seed)  # noqa: S311 (a fixed order, no secret)
    model.train()
    for step in range(1, args.steps + 1):
        loss = model(**batch(processor, examples(args.batch_size, chance))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            deepe.progress(args.sight_steps + step, args.sight_steps + args.steps)
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}/{args.steps}  loss {loss.item():.4f}", flush=True)
    model.eval()


def batch(processor: Any, some: list[Example]) -> Any:
    """Encode questions with their answers; only the answers are learned."""
    processor.tokenizer.padding_side = "right"
    answers = [f"{answer}<|im_end|>\n" for _, _, answer in some]
    encoded = encode(processor, some, answers)
    labels = encoded["input_ids"].clone()
    for row, answer in enumerate(answers):
        whole = int(encoded["attention_mask"][row].sum())
        labels[row, : whole - len(processor.tokenizer(answer)["input_ids"])] = -100
        labels[row, whole:] = -100
    encoded["labels"] = labels
    return encoded


def encode(processor: Any, some: list[Example], answers: list[str]) -> Any:
    prompts = []
    for names, question, _ in some:
        content = [*({"type": "image"} for _ in names), {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    pictures = [[picture(name) for name in names] for names, _, _ in some]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    return encoded


def picture(name: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(drawings.draw(name)))


def right_answers(model: Any, processor: Any, some: list[Example]) -> float:
    """Share of questions whose greedy answer is right."""
    import torch

    processor.tokenizer.padding_side = "left"
    encoded = encode(processor, some, [""] * len(some))
    with torch.no_grad():
        output = model.generate(**encoded, max_new_tokens=8, do_sample=False)
    given = processor.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text.strip() == answer for text, (_, _, answer) in zip(given, some, strict=True)) / len(some)


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write to a folder beside it first: the model is there as a whole or not at all."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    for weights in draft.glob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


if __name__ == "__main__":
    main()
