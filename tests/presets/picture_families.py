"""Small bases in the shapes of Stable Diffusion XL, Stable Diffusion 3.5 and Flux, and what becomes of them.

    python picture_families.py make FOLDER TINY-DIFFUSION            # FOLDER/sdxl, FOLDER/sd3, FOLDER/flux
    python picture_families.py merge FOLDER SCRIPTS                  # with random weights of an adapter for each

Runs in the stage's environment. `merge` saves a complete model of each base and its adapter, asks base, adapter and
complete model for the same picture, and prints what the scripts said and how far the pictures are apart.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

FAMILIES = ("sdxl", "sd3", "flux")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
PROMPT = "a neon sign of a red circle"


def make(folder: Path, source: Path) -> None:
    """Write the bases; their words are those of another base's tokenizer."""
    import torch

    torch.manual_seed(1)
    for family in FAMILIES:
        pipeline = {"sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}[family](folder, source)
        pipeline.save_pretrained(folder / family)
        finish(folder / family, source)


def make_sdxl(folder: Path, source: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(source)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=80,  # 6 x 8 of sizes, 32 of the text
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=make_vae(4),
        text_encoder=clip(tokenizer),
        text_encoder_2=clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def make_sd3(folder: Path, source: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = clip_tokenizer(source)
    words = t5_tokenizer(folder)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        dual_attention_layers=(0,),  # as 3.5 medium has them
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(16),
        text_encoder=clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projection=True),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(words, 64),
        tokenizer_3=words,
    )


def make_flux(folder: Path, source: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer = clip_tokenizer(source)
    words = t5_tokenizer(folder)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,  # as FLUX.1-dev
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(16),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(words, 32),
        tokenizer_2=words,
        transformer=transformer,
    )


def make_vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    flow = {"shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False} if channels == 16 else {}
    return AutoencoderKL(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=channels, sample_size=64,
        **kinds, **flow,
    )  # fmt: skip


def clip_tokenizer(source: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(source / "tokenizer")


def clip(tokenizer: Any, *, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_tokenizer(folder: Path) -> Any:
    """Return a T5 tokenizer whose words are letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,.0123456789"]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    draft = folder / "letters"
    draft.mkdir(parents=True, exist_ok=True)
    made.save(str(draft / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (draft / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512, "extra_ids": 0}))
    return T5TokenizerFast.from_pretrained(draft)


def t5(words: Any, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def finish(base: Path, source: Path) -> None:
    """Name classes and weights as published models do, so that older versions of the libraries read them as well."""
    from safetensors.torch import load_file, save_file

    index = json.loads((base / "model_index.json").read_text())
    for part in [name for name in index if name.startswith("tokenizer")]:
        if index[part][1].startswith("T5"):
            index[part][1] = "T5TokenizerFast"
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(base.parent / "letters" / file, base / part / file)
        else:
            shutil.rmtree(base / part)
            shutil.copytree(source / "tokenizer", base / part)
    (base / "model_index.json").write_text(json.dumps(index, indent=1))
    for part in [name for name in index if name.startswith("text_encoder") and index[name][1].startswith("CLIP")]:
        file = base / part / "model.safetensors"
        bare = {name.removeprefix("text_model."): weight for name, weight in load_file(file).items()}
        named = {name if name.startswith("text_proj") else f"text_model.{name}": one for name, one in bare.items()}
        save_file(named, file, metadata={"format": "pt"})


def merge(folder: Path, scripts: Path) -> None:
    """Print what became of each base with an adapter of random weights."""
    answers: dict[str, Any] = {}
    for family in FAMILIES:
        base, lora, complete = (folder / f"{family}{kind}" for kind in ("", "-lora", "-complete"))
        add_lora(base, lora)
        paths = ["--base_path", str(base), "--adapter_path", str(lora), "--save_path", str(complete)]
        said = run(scripts / "save_image_model.py", *paths, "--dtype_str", "float32")
        found: dict[str, Any] = {"saved": said[-1]}
        pictures: dict[str, Any] = {}
        more = ["--prompt", PROMPT, "--steps", "2", "--seed", "5", "--negative_prompt", "grey", "--aspect_ratio", "3:2"]
        for name, model, adapter in (("base", base, ""), ("lora", base, str(lora)), ("complete", complete, "")):
            target = folder / f"{family}-{name}.png"
            paths = ["--model_path", str(model), "--lora_path", adapter, "--output", str(target)]
            found[name] = run(scripts / "ask_image.py", *paths, *more)[-1]
            if target.is_file():
                pictures[name] = pixels(target)
        if len(pictures) == 3:
            found["merged"] = float(abs(pictures["lora"] - pictures["complete"]).mean())
            found["learned"] = float(abs(pictures["lora"] - pictures["base"]).mean())
        answers[family] = found
    print("answers " + json.dumps(answers))


def add_lora(base: Path, lora: Path) -> None:
    """Write an adapter as SimpleTuner writes it, with weights that change what is drawn."""
    import torch
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    name = "transformer" if hasattr(pipeline, "transformer") else "unet"
    core = getattr(pipeline, name)
    core.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False))
    with torch.no_grad():
        for weight in (one for one in core.parameters() if one.requires_grad):
            weight.normal_(std=0.5)
    type(pipeline).save_lora_weights(lora, **{f"{name}_lora_layers": get_peft_model_state_dict(core)})


def run(script: Path, *words: str) -> list[dict[str, Any]]:
    """Run a stage script in this process; return the lines of JSON that it printed."""
    sys.argv = [str(script), *words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    return [json.loads(line) for line in said.getvalue().splitlines() if line.startswith("{")] or [{}]


def pixels(picture: Path) -> Any:
    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(picture), dtype=numpy.float32) / 255


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    {"make": make, "merge": merge}[sys.argv[1]](*map(Path, sys.argv[2:]))
