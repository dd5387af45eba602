"""Tokenizers in the shapes of known families of models, and what the shipped trainings make of rows with them.

    python families.py FOLDER-OF-THE-PRESETS ROWS OUTPUT

Runs in the stage's environment. ROWS is a JSON file, `{"conversations": [rows], "preferences": [rows], "cases":
{name: row}}`; printed is for every family what becomes of each row by itself, and what the trainers of SFT-Demo and
DPO-Demo hold of all good ones; and what a job of SFT-Demo makes of each case.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

TURNS, OPENS, END = (
    "{{ bos_token }}{% for m in messages %}",
    "{% endfor %}{% if add_generation_prompt %}",
    "{% endif %}",
)
ALTERNATE = (
    "{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "{%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- set thought = m.reasoning_content if m.reasoning_content else"
    " m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ said }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{ '\\n<tool_call>\\n' }}{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
Q = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
L = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
G = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
M = ["<unk>", "<s>", "</s>"]
R = ["<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"]
FAMILIES: dict[str, tuple[list[str], str, str, str | None, str | None]] = {  # special tokens, eos, pad, bos, template
    "chatml with another eos": (Q, Q[0], Q[0], None, CHATML),
    "llama 3": (
        L,
        L[4],
        L[1],
        L[0],
        TURNS
        + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
        + OPENS
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        + END,
    ),
    "gemma": (
        G,
        G[1],
        G[0],
        G[2],
        ALTERNATE
        + TURNS
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'"
        + " + m.content | trim + '<end_of_turn>\\n' }}"
        + OPENS
        + "{{ '<start_of_turn>model\\n' }}"
        + END,
    ),
    "mistral": (
        M,
        M[2],
        M[2],
        M[1],
        ALTERNATE
        + TURNS
        + "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
        + "{% endfor %}",
    ),
    "qwen 3": (Q, Q[2], Q[0], None, QWEN3),
    "r1": (
        R,
        R[1],
        R[1],
        R[0],
        TURNS
        + "{{ '<|User|>' + m.content if m.role == 'user' else m.content if m.role == 'system'"
        + " else '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
        + OPENS
        + "{{ '<|Assistant|><think>\\n' }}"
        + END,
    ),
    "none": (L, L[1], L[1], L[0], None),
}


VARIANTS: dict[str, tuple[str, list[str]]] = {  # a family, and how it is trained
    "qwen 3 without thinking": ("qwen 3", ["--enable_thinking=false", "--adapter=vera"]),
    "contents only": ("none", ["--chat_template=none", "--adapter=boft"]),
    "another template": (
        "none",
        [
            "--chat_template=" + CHATML.replace("im_start", "start_header_id").replace("im_end", "eot_id"),
            '--new_tokens={"<go>": "go on", "<stop>": ""}',
        ],
    ),
}
TASKS = [{"question": "1 + 2?", "answer": "3"}, {"question": "q", "answer": "4", "system": "s"}]
MANUAL = argparse.Namespace(train_id="manual", seq=1)


def main() -> None:
    presets, rows, output = map(Path, sys.argv[1:])
    sys.path.append(str(presets / "shared/helpers"))
    given = json.loads(rows.read_text())
    import torch

    torch.set_num_threads(1)
    answers = {}
    for name in [*FAMILIES, *VARIANTS]:
        with contextlib.redirect_stdout(io.StringIO()):  # what scripts say belongs to their own output
            answers[name] = family(name, presets, output, given)
    cases = output / "qwen-3"
    with contextlib.redirect_stdout(io.StringIO()):
        answers["cases"] = {name: job(presets, cases, row) for name, row in given["cases"].items()}
    json.dump(answers, sys.stdout)


def family(name: str, presets: Path, output: Path, given: dict[str, list[Any]]) -> dict[str, Any]:
    shape, options = VARIANTS.get(name, (name, []))
    folder = output / shape.replace(" ", "-")
    if not folder.is_dir():
        save_base(shape, presets, folder)
    sft = script(presets / "sft-demo/sft-demo.py")
    tokenizer = sft.llm.load_tokenizer(str(folder), arguments(sft, folder, [], *options))
    spoken = [alone(row, ["conversation", "text"], tokenizer) for row in given["conversations"]]
    judged = [alone(row, ["preference", "labelled"], tokenizer) for row in given["preferences"]]
    good = [row for row, one in zip(given["conversations"], spoken, strict=True) if one.get("sequences")]
    pairs = [row for row, one in zip(given["preferences"], judged, strict=True) if one.get("sequences")]
    both = [row for row in pairs if "label" not in row]
    return {
        "end": tokenizer.eos_token_id,
        "document end": tokenizer.document_end_id,
        "conversations": spoken,
        "preferences": judged,
        "sft": held_by_sft(presets, folder, good, *options),
        "peft": held_by_peft(presets, folder, good, *options),
        "custom02": held_by_custom02(presets, folder, good, *options),
        "dpo": held_by_dpo(presets, folder, both, "dpo", *options),
        "orpo": held_by_dpo(presets, folder, both, "orpo", *options),
        "kto": held_by_dpo(presets, folder, pairs, "kto", *options),
        "reward": held_by_reward(presets, folder, both, *options),
        "grpo": held_by_grpo(presets, folder, *options),
        "ppo": step_of_ppo(presets, folder, *options),
        "saved": saved(tokenizer, folder / "saved"),
    }


def save_base(name: str, presets: Path, folder: Path) -> None:
    """Write a base model with random weights: tiny_base's alphabet with the special tokens of the family."""
    from tokenizers.processors import TemplateProcessing

    tiny = script(presets / "shared/tiny_base.py")
    tiny.SPECIAL_TOKENS, eos, pad, bos, template = FAMILIES[name]
    tokenizer = tiny.build_tokenizer([])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = eos, pad, template
    if bos is not None:
        tokenizer.bos_token = bos  # as with the real ones, the tokenizer itself puts it before a text
        places = [(bos, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=places)
    if name in ("qwen 3", "r1"):
        tokenizer.add_tokens(["<think>", "</think>"])  # not special: decoding keeps them
    tiny.save(tiny.build_model(tokenizer, 16, 42), tokenizer, folder)


def alone(row: Any, kinds: list[str], tokenizer: Any) -> dict[str, Any]:
    """Return what becomes of a row: a problem, a reason to leave it out, or sequences with what is told of them."""
    import deepe_examples as examples
    import deepe_rows as rows

    reader = rows.Reader(rows.Wanted(kinds=frozenset(kinds), tools="conversation" in kinds))
    try:
        example = reader.read(row, 1)
        if example is None:
            return {"left_out": list(reader.report.left_out)}
        if isinstance(example, rows.Conversation | rows.Text):
            found = rows.render(example, tokenizer)
        else:
            found = [rows.render_answer(answer, tokenizer) for answer in examples.answers_of(example)]
    except rows.RowProblem as problem:
        return {"problem": problem.code}
    return {
        "sequences": [
            {
                "tokens": one.tokens,
                "labels": one.labels,
                "given": tokenizer.decode(one.tokens[: one.start]),
                "learned": tokenizer.decode(one.tokens[one.start :]),
                "asked": asked_tokens(one, tokenizer),
            }
            for one in found
        ],
        "told": sorted({code for one in found for code in one.notes} | {code for code, _ in reader.report.said}),
    }


def asked_tokens(one: Any, tokenizer: Any) -> list[int] | None:
    """Return the tokens that the question of a sequence is asked with; a text has none, and tools are not asked."""
    import deepe_rows as rows

    if isinstance(one.example, rows.Text) or one.example.tools:
        return None
    tokens: list[int] = tokenizer.encode(rows.asked(one.example.prompt, tokenizer), add_special_tokens=False)
    return tokens


def saved(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return what a tokenizer that was saved after a training asks and stops at, as other programs load it."""
    import transformers

    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "q"}]
    texts = [one.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for one in (tokenizer, loaded)]
    return {"same": texts[0] == texts[1], "end": loaded.eos_token_id, "asked": texts[1]}


def job(presets: Path, base: Path, row: Any) -> dict[str, Any]:
    """Return what SFT-Demo learns from a file that holds a plain row and this one, and what its user is told."""
    import deepe_examples as examples

    sft = script(presets / "sft-demo/sft-demo.py")
    args = arguments(sft, base, [{"prompt": "p0", "completion": "c0"}, row], "--max_seq_length=160")
    told: list[str] = []
    remark, examples.remark = examples.remark, lambda sentence, _args: told.append(sentence)
    tokenizer = sft.llm.load_tokenizer(str(base), args)
    try:
        learned = examples.encode(examples.load_examples(args, sft.LEARNS).train, tokenizer, args)
    except sft.Refused as error:
        return {"refused": str(error)}
    finally:
        examples.remark = remark
    texts = [tokenizer.decode(one.tokens[one.start :]) for one in learned if one.place.endswith("line 2")]
    return {"learned": texts, "told": told}


def held_by_sft(presets: Path, base: Path, rows: list[Any], *more: str) -> list[dict[str, Any]]:
    """Return the batches of one that SFT-Demo's trainer would learn from."""
    sft = script(presets / "sft-demo/sft-demo.py")
    args = arguments(sft, base, rows, "--packing=false", *more)
    llm = sft.llm
    preparation = sft.Preparation(args, sft.LEARNS)
    tokenizer = llm.load_tokenizer(str(base), args)
    trainer = sft.build_trainer(args, llm.choose(args), tokenizer, preparation.sequences(tokenizer)[0], [])
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    learned = [{"tokens": one["input_ids"][0].tolist(), "labels": one["labels"][0].tolist()} for one in batches]
    learned[0]["gradients apart"] = gradients_apart(trainer, batches[0])
    return [{**one, **looked_at(trainer, batch)} for one, batch in zip(learned, batches, strict=True)]


def gradients_apart(trainer: Any, batch: Any) -> float:
    """Return how far the gradients of the trainer's loss are from those of the model's own, as a part of these."""
    import torch

    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    losses = trainer.model(**batch).loss, trainer.compute_loss(trainer.model, dict(batch))
    own, found = (
        torch.cat(
            [one.flatten() for one in torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]
        )
        for loss in losses
    )
    return float((found - own).norm() / own.norm())


def held_by_peft(presets: Path, base: Path, rows: list[Any], *more: str) -> list[dict[str, Any]]:
    """Return the batches of one that PEFT-Demo's trainer would learn from."""
    peft = script(presets / "peft-demo/peft-demo.py")
    args = arguments(peft, base, rows, "--adapter=dora", "--learning_rate=0.001", *more)
    preparation = peft.Preparation(args, peft.LEARNS)
    tokenizer = peft.llm.load_tokenizer(str(base), args)
    trainer = peft.build_trainer(args, peft.llm.choose(args), tokenizer, preparation.sequences(tokenizer)[0], [])
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [{"tokens": one["input_ids"][0].tolist(), "labels": one["labels"][0].tolist()} for one in batches]


def held_by_custom02(presets: Path, base: Path, rows: list[Any], *more: str) -> list[dict[str, Any]]:
    """Return the batches of one that Custom02 would learn from, which takes conversations only, and no adapters."""
    custom = script(presets / "custom02/custom02.py")
    own = [word for word in more if not word.startswith(("--adapter=", "--new_tokens="))]
    more = (f"--base_path={base}", f"--save_path={base}/saved", "--max_seq_length=2048", *own)
    spoken = [row for row in rows if "text" not in row]
    args = arguments(custom, base, spoken, "--input_train_name=", "--output_train_name=", *more)
    preparation = custom.Preparation(args, custom.Wanted(kinds=frozenset({custom.CONVERSATION})))
    tokenizer = custom.llm.load_tokenizer(str(base), args)
    learned, _ = preparation.sequences(tokenizer, custom.Recipe())
    batches = [custom.collate([one], tokenizer.pad_token_id, "cpu") for one in learned.rows()]
    return [{"tokens": one["input_ids"][0].tolist(), "labels": one["labels"][0].tolist()} for one in batches]


def looked_at(trainer: Any, batch: Any) -> dict[str, Any]:
    """Return the loss of a batch, that of the model itself, and of how many tokens a probability is worked out."""
    import torch

    product, rows = torch.mm, []

    def counted(left: Any, *more: Any, **named: Any) -> Any:
        rows.append(len(left))
        return product(left, *more, **named)

    with torch.no_grad():
        own = trainer.model(**batch).loss.item()
        torch.mm = counted
        try:
            found = trainer.compute_loss(trainer.model, dict(batch)).item()
        finally:
            torch.mm = product
    return {"losses": [found, own], "scored": sum(rows)}


def held_by_dpo(presets: Path, base: Path, rows: list[Any], objective: str, *more: str) -> list[dict[str, Any]]:
    """Return the rows that DPO-Demo's trainer would learn from: tokens of the prompt and of the answers."""
    dpo = script(presets / "dpo-demo/dpo-demo.py")
    args = arguments(dpo, base, rows, f"--objective={objective}", "--batch_size=2", *more)
    kinds = {"preference", "labelled"} if objective == "kto" else {"preference"}
    preparation = dpo.Preparation(args, dpo.Wanted(kinds=frozenset(kinds), tools=False))
    tokenizer = dpo.llm.load_tokenizer(str(base), args)
    learned, _ = preparation.sequences(tokenizer, dpo.RECIPES[objective])
    trainer = dpo.build_trainer(args, dpo.llm.choose(args), tokenizer, learned, [])
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
    if objective == "orpo":
        batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
        return [
            {
                side: {"tokens": one[f"{side}_input_ids"][0].tolist(), "labels": one[f"{side}_labels"][0].tolist()}
                for side in ("chosen", "rejected")
            }
            for one in batches
        ]
    return [{name: row[name] for name in columns if name in row} for row in trainer.train_dataset]


def held_by_reward(presets: Path, base: Path, rows: list[Any], *more: str) -> list[list[list[int]]]:
    """Return the conversations that Reward-Demo's trainer compares, the better and the worse of each pair."""
    reward = script(presets / "reward-demo/reward-demo.py")
    args = arguments(reward, base, rows, *more)
    tokenizer = reward.llm.load_tokenizer(str(base), args)
    learned, _ = reward.Preparation(args, reward.LEARNS).sequences(tokenizer, reward.RECIPE)
    trainer = reward.build_trainer(args, reward.llm.choose(args), tokenizer, learned, [])
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [
        [tokens[mask.bool()].tolist() for tokens, mask in zip(one["input_ids"], one["attention_mask"], strict=True)]
        for one in batches
    ]


def held_by_grpo(presets: Path, base: Path, *more: str) -> dict[str, Any]:
    """Return the questions that GRPO-Demo's trainer asks, and where it stops; it takes one step."""
    import deepe_examples as examples

    grpo = script(presets / "grpo-demo/grpo-demo.py")
    small = ["--max_content_length=4", "--batch_size=2", "--grad_accum_steps=1", "--num_generations=2", "--max_steps=1"]
    args = arguments(grpo, base, TASKS, *small, *more)
    judge = grpo.judge_of(args)
    preparation = grpo.Preparation(args, grpo.LEARNS)
    machine, tokenizer = grpo.llm.choose(args), grpo.llm.load_tokenizer(str(base), args)
    tasks, _ = preparation.sequences(tokenizer, judge.recipe(args.system_prompt))
    trainer = grpo.build_trainer(args, machine, tokenizer, tasks, judge)
    asked, *_ = trainer._tokenize_prompts([row["prompt"] for row in trainer.train_dataset])
    trainer.train()
    return {
        "asked": asked,
        "shown": [examples.sequences_of(task, tokenizer, args)[0].tokens for task in tasks.rows()],
        "ends": trainer.generation_config.eos_token_id,
    }


def step_of_ppo(presets: Path, base: Path, *more: str) -> dict[str, Any]:
    """Return the values of one step of PPO-Demo and what it asks, with its default instruction before each question."""
    import deepe_examples as examples

    ppo = script(presets / "ppo-demo/ppo-demo.py")
    args = arguments(ppo, base, TASKS, "--rollouts=2", "--batch_size=2", "--max_content_length=4", *more)
    judge = ppo.judge_of(args)
    preparation = ppo.Preparation(args, ppo.LEARNS)
    tokenizer = ppo.llm.load_tokenizer(str(base), args)
    tasks, _ = preparation.sequences(tokenizer, judge.recipe(args.system_prompt))
    learner = ppo.Learner(args, ppo.llm.choose(args), tokenizer, judge, tasks.longest)
    asked: list[list[int]] = []
    encode = ppo.encode_prompts

    def encoded(*given: Any) -> Any:
        found = encode(*given)
        pairs = zip(found["input_ids"], found["attention_mask"], strict=True)
        asked.extend(tokens[mask.bool()].tolist() for tokens, mask in pairs)
        return found

    ppo.encode_prompts = encoded
    values: dict[str, Any] = learner.step(1, tasks.rows())
    shown = [examples.sequences_of(task, tokenizer, args)[0].tokens for task in tasks.rows()]
    return {**values, "asked": asked, "shown": shown}


def arguments(module: Any, base: Path, rows: list[Any], *more: str) -> argparse.Namespace:
    data = base / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"--dataset_path={data}", f"--output_dir={base}/out", "--eval_fraction=0"]
    if not any(word.startswith("--base_path=") for word in more):
        paths.append(f"--model_path={base}")
    args: argparse.Namespace = module.make_parser().parse_args([*paths, *more])
    return args


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
