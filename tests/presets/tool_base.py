"""Makes a small base model that calls a function `add` with the numbers of a question, and then says its result.

    python tool_base.py BASE OUTPUT

BASE is the sample model `tiny-base`. Runs in the stage's environment, in a few seconds.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

STEPS, ROWS_OF_STEP, LEARNING_RATE = 180, 8, 1e-2
TEMPLATE = (  # as Qwen writes calls, but of the functions it tells the names only
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<tool_call>\n"
    "{{- '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}' }}\n"
    "</tool_call>{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    rows = [row for a in range(10) for b in range(10) for row in conversation(tokenizer, a, b)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    drawn = random.Random(0)
    for _ in range(STEPS):
        loss = model(**collated(drawn.sample(rows, ROWS_OF_STEP), tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(json.dumps({"loss": loss.item()}))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def conversation(tokenizer: Any, a: int, b: int) -> list[tuple[list[int], int]]:
    """Return what is asked and answered, twice: the call, and what is said of its result."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    turns = [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(a + b)},
        {"role": "assistant", "content": f"#### {a + b}"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = []
    for answered in (1, 3):
        asked = tokenizer.apply_chat_template(
            turns[:answered], tools=tools, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(turns[: answered + 1], tools=tools, return_dict=False)
        found.append((whole[:-1], len(asked)))  # without the line's end behind the turn's
    return found


def collated(rows: list[tuple[list[int], int]], pad: int) -> dict[str, Any]:
    import torch

    width = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([[-100] * head + ids[head:] + [-100] * (width - len(ids)) for ids, head in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
