"""Every kind of adapter: made as the scripts make it, learning, saved, loaded to be asked, and merged.

    python adapters_probe.py HELPERS SCRIPTS BASE OUTPUT

Runs in the stage's environment. Printed is for each case how far the answers of the loaded and of the merged model are
from those of the trained one, and how far these are from the base's, by the largest difference of two logits.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

helpers, scripts, base, output = map(Path, sys.argv[1:])
sys.path.append(str(helpers))
import deepe_adapter_kinds as kinds  # noqa: E402
import deepe_arguments as arguments  # noqa: E402
import deepe_ask as ask  # noqa: E402
import deepe_llm as llm  # noqa: E402
import deepe_tokens as tokens  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

spec = importlib.util.spec_from_file_location("save_model", scripts / "save_model.py")
assert spec is not None
assert spec.loader is not None
saving = importlib.util.module_from_spec(spec)
spec.loader.exec_module(saving)

NEW = json.dumps({"<go>": "", "<sum>": "the sum of"})


def namespace(**more: Any) -> argparse.Namespace:
    known = {"lora_rank": 4, "lora_alpha": 8, "seed": 3, "max_steps": 20, "epochs": 1, "batch_size": 1, "train_id": "1"}
    return argparse.Namespace(**known | {"seq": 1, "new_tokens": None, "model_path": str(base)} | more)


def logits(model: Any, given: Any) -> Any:
    model.eval()
    with torch.no_grad():
        return model(input_ids=given).logits[:, -given.shape[1] :]


def case(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from peft import get_peft_model

    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens(tokenizer, args)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens.make_room(model, tokenizer)
    texts = ["<go> Which is larger, 3 or 8? <sum>"] if args.new_tokens else ["Which is larger, 3 or 8?"]
    given = tokenizer(texts, return_tensors="pt")["input_ids"]
    before = logits(model, given)
    start = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    model = get_peft_model(model, kinds.adapter_config(args, model, llm.linear_layers(model), rows=20))
    trainer = SimpleNamespace(
        model=model,
        get_train_dataloader=lambda: [{"input_ids": given, "attention_mask": torch.ones_like(given)}],
        add_callback=lambda _callback: None,
    )
    kinds.prepare_adapter(args, trainer)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=given, labels=given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapter = output / name
    trained = logits(model, given)
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    loaded, source = ask.load_model(AutoModelForCausalLM, folder, adapter)
    found = {
        "losses": losses,
        "changed": (trained - before).abs().max().item(),
        "loaded": (logits(loaded, given) - trained).abs().max().item(),
        "source": source == adapter,
        "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
    }
    paths = {"base_path": str(folder), "adapter_path": str(adapter), "model_usage_type": "chat"}
    try:
        merged = saving.with_merged_adapter(namespace(**paths), "float32")
    except saving.Refused as refusal:
        return found | {"refused": str(refusal)}
    rows = getattr(model, "new_token_ids", [])
    tables = (merged.get_input_embeddings(), merged.get_output_embeddings())
    return found | {
        "merged": (logits(merged, given) - trained).abs().max().item(),
        "rows": [
            rows,
            [bool((one.weight[rows] != two[rows]).any(1).all()) for one, two in zip(tables, start, strict=True)],
        ],
        "others": all(
            torch.equal(one.weight[: rows[0] if rows else None], two[: rows[0] if rows else None])
            for one, two in zip(tables, start, strict=True)
        ),
        "text": AutoTokenizer.from_pretrained(adapter).decode(given[0], skip_special_tokens=True),
    }


def untied(folder: Path) -> Path:
    """Return a copy of the base whose head is a table of its own."""
    target = output / "untied-base"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.9)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def main() -> None:
    torch.set_num_threads(1)
    output.mkdir()
    found: dict[str, Any] = {}
    for kind in arguments.ADAPTERS:
        try:
            found[kind] = case(kind, base, namespace(adapter=kind))
        except Exception as error:
            found[kind] = {"error": f"{type(error).__name__}: {error}"}
    other = untied(base)
    for name, folder, more in (
        ("tokens", base, {"adapter": "lora"}),
        ("tokens of dora, untied", other, {"adapter": "dora", "new_tokens_special": True}),
        ("tokens of adalora, untied", other, {"adapter": "adalora"}),
    ):
        try:
            found[name] = case(name.replace(",", ""), folder, namespace(new_tokens=NEW, **more))
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    print("found " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
