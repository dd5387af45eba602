# ruff: noqa: T201  (a program of its own)
"""Build the small base model of SD-Demo: a real Stable Diffusion 1.x pipeline that draws six colours in four shapes.

    python app/presets/sd-demo/tiny_diffusion.py --output models/tiny-diffusion

No model hub is needed: tokenizer, text encoder, autoencoder and UNet are made here from a fixed seed, on pictures that
`sample_signs.py` draws, in a minute or two. Run it with the interpreter of the `trl` environment. It draws shapes on
paper, by night, and as outlines. Asked for a neon sign it draws on paper: SD-Demo then teaches it the signs.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

# The drawings lie in the folder above, the helper in the shared one; the program runs without the package.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "shared" / "helpers"))
import deepe
import sample_signs

CAPTIONS = {  # of a sign it has heard, but all it knows is that something is shown
    "paper": ("{}", "a picture of {}", "a neon sign of {}"),
    "night": ("{} by night",),
    "outline": ("the outline of {}",),
}
CONTEXT = 24  # tokens of a caption
START, END = "<|startoftext|>", "<|endoftext|>"
LATENT_CHANNELS = 4
CHANNELS = 8
LOUD = 128.0  # powers of two are exact in every number format


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Build the small base model of SD-Demo.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; replaced when it exists")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the UNet and the text encoder")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same model")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    # One thread: threads of a tiny model wait for each other longer than they work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    chance = random.Random(args.seed)  # noqa: S311 (the same pictures each time, no secret)
    tokenizer = build_tokenizer(args.output)
    encoder, unet, vae = build_text_encoder(len(tokenizer)), build_unet(), build_vae()
    shown = [(name, style, words) for style in CAPTIONS for name, words in sample_signs.pictures(style)]
    latents = latents_of(vae, stack([name for name, _, _ in shown]))
    train_unet(unet, encoder, Captions(tokenizer, shown, chance), latents, args.steps)
    save(tokenizer, encoder, unet, vae, args.output)
    weights = sum(part.numel() for model in (encoder, unet, vae) for part in model.parameters())
    print(f"{weights:,} weights; {args.output} is ready after {time.monotonic() - started:.0f} s")


def stack(names: Sequence[str]) -> Any:
    """Return the pictures as one tensor with values from -1 to 1."""
    import torch

    colours = torch.tensor([sample_signs.squares(name) for name in names], dtype=torch.float32)
    return colours.permute(0, 3, 1, 2).repeat_interleave(8, 2).repeat_interleave(8, 3) / 127.5 - 1


# --- parts ----------------------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer whose words are those of the captions; other words fall apart into bytes."""
    from transformers import CLIPTokenizer

    draft = part_of(folder, "tokenizer")
    shutil.rmtree(draft.parent, ignore_errors=True)
    draft.mkdir(parents=True)
    forms = [form for forms in CAPTIONS.values() for form in forms]
    texts = [form.format(text) for form in forms for _, text in sample_signs.pictures("paper")]
    words = sorted({word for text in texts for word in text.split()})
    merges = learn_merges(words)
    letters = byte_letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    (draft / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (draft / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (draft / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return CLIPTokenizer.from_pretrained(draft)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return byte pair merges, the most frequent first, until every word is one piece."""
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = [pair for word in parts for pair in pairwise(word)]
        if not pairs:
            return merges
        best = max(sorted(set(pairs)), key=pairs.count)
        merges.append(best)
        for word in parts:
            for place in range(len(word) - 1, 0, -1):
                if place < len(word) and (word[place - 1], word[place]) == best:
                    word[place - 1 : place + 1] = ["".join(best)]


def byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def build_text_encoder(words: int) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    encoder = CLIPTextModel(config)
    for name, weight in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            torch.nn.init.normal_(weight, std=1.0)  # words that differ from the beginning are learned sooner
    return encoder


def build_vae() -> Any:
    """Return an autoencoder whose weights are set, not learned: each latent is the mean colour of 8 x 8 pixels.

    It has the levels of every Stable Diffusion autoencoder. All residual branches are zero, so that what is left are
    the convolutions that halve and double. A normalization stands before the last convolution of either half; two
    channels with large opposite values make it divide by nearly the same number in every picture.
    """
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(CHANNELS,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=sample_signs.SIZE,
    )
    with torch.no_grad():
        for name, part in vae.named_modules():
            if name.endswith(("conv2", "to_out.0", "conv_in", "conv_out", "samplers.0.conv", "quant_conv")):
                part.weight.zero_()
                part.bias.zero_()
            if name.endswith("downsamplers.0.conv"):
                for channel in range(CHANNELS):
                    part.weight[channel, channel, :2, :2] = 0.25
            if name.endswith("upsamplers.0.conv"):
                for channel in range(CHANNELS):
                    part.weight[channel, channel, 1, 1] = 1
        for half in (vae.encoder, vae.decoder):
            half.conv_in.bias[3], half.conv_in.bias[4] = LOUD, -LOUD
            half.conv_norm_out.bias.fill_(8)  # there SiLU is a straight line
            for colour in range(3):
                half.conv_in.weight[colour, colour, 1, 1] = 1
                half.conv_out.weight[colour, colour, 1, 1] = LOUD / 2
                half.conv_out.weight[colour, CHANNELS - 1, 1, 1] = -LOUD / 2  # a silent channel: takes the shift away
        for colour in range(3):
            vae.quant_conv.weight[colour, colour] = vae.post_quant_conv.weight[colour, colour] = 1
        vae.quant_conv.bias[LATENT_CHANNELS:] = -30  # the logarithm of the latents' variance: none
    return vae


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=sample_signs.SQUARES,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


# --- training -------------------------------------------------------------------------------------------------------


def latents_of(vae: Any, images: Any) -> Any:
    """Return the latents of all pictures, and scale them so that their spread is 1."""
    import torch

    with torch.no_grad():
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(32)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor


class Captions:
    """Describes pictures in one of several ways; now and then not at all, as guidance needs."""

    def __init__(self, tokenizer: Any, shown: Sequence[tuple[str, str, str]], chance: random.Random) -> None:
        self.tokenizer, self.shown, self.chance = tokenizer, shown, chance

    def tokens(self, rows: list[int]) -> Any:
        texts = [self.chance.choice(CAPTIONS[style]).format(words) for _, style, words in (self.shown[r] for r in rows)]
        texts = [text if self.chance.random() > 0.1 else "" for text in texts]
        how = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(texts, **how).input_ids


def train_unet(unet: Any, encoder: Any, captions: Captions, latents: Any, steps: int, batch_size: int = 16) -> None:
    """Learn to tell noise from picture, together with the text encoder."""
    import torch

    noise_scheduler = scheduler("DDPMScheduler")
    parts = [*unet.parameters(), *encoder.parameters()]
    optimizer, schedule = optimizer_of(parts, 3e-3, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(latents), (batch_size,)).tolist()
        noise = torch.randn(batch_size, *latents.shape[1:])
        times = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,))
        noisy = noise_scheduler.add_noise(latents[rows], noise, times)
        told = encoder(captions.tokens(rows))[0]
        wanted = noise_scheduler.get_velocity(latents[rows], noise, times)
        loss = (unet(noisy, times, encoder_hidden_states=told).sample - wanted).square().mean()
        take_step(loss, parts, optimizer, schedule)
        if step % 10 == 0 or step == steps:
            deepe.progress(step, steps)
        if step % 100 == 0 or step == steps:
            print(f"UNet, step {step}/{steps}  loss {loss.item():.4f}", flush=True)


def optimizer_of(parts: Any, rate: float, steps: int) -> tuple[Any, Any]:
    import torch

    optimizer = torch.optim.AdamW(parts, lr=rate, weight_decay=0.0)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)


def take_step(loss: Any, parts: Any, optimizer: Any, schedule: Any) -> None:
    import torch

    loss.backward()
    torch.nn.utils.clip_grad_norm_(parts, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def scheduler(kind: str) -> Any:
    """Return a noise scheduler; a model that tells the velocity learns what captions mean much sooner."""
    import diffusers

    more = {"set_alpha_to_one": False, "steps_offset": 1} if kind == "DDIMScheduler" else {}
    return getattr(diffusers, kind)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **more,
    )


# --- the folder -----------------------------------------------------------------------------------------------------


def save(tokenizer: Any, encoder: Any, unet: Any, vae: Any, folder: Path) -> None:
    """Write to a folder beside it first: the model is there as a whole or not at all."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler("DDIMScheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    draft = part_of(folder)
    pipeline.save_pretrained(draft)  # the files of the tokenizer lie there already, for every version of its reader
    prefix_text_encoder(draft / "text_encoder" / "model.safetensors")
    for weights in draft.rglob("*.safetensors"):
        weights.chmod(0o644)  # written as 0600, whatever the umask says
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def prefix_text_encoder(file: Path) -> None:
    """Name the weights as in every published model: transformers 4 would not find them otherwise, and say nothing."""
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": part for name, part in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def part_of(folder: Path, *names: str) -> Path:
    return folder.with_name(f".{folder.name}.part").joinpath(*names)


if __name__ == "__main__":
    main()
