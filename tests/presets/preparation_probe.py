"""What a preparation makes of rows and tells, beside what rendering them one after the other does.

    python preparation_probe.py FOLDER-OF-THE-PRESETS CASES

Runs in the stage's environment. CASES is a JSON file, `{"rows": [rows], "cases": {name: changes}}`; each case is
prepared after the one before, as an attempt of the same job.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    presets, file = map(Path, sys.argv[1:])
    sys.path.append(str(presets / "shared/helpers"))
    given = json.loads(file.read_text())
    families = importlib.import_module("families")  # of this script's folder
    base = file.parent / "base"
    os.environ["DEEPE_CACHE_DIR"] = str(file.parent / "cache")
    with contextlib.redirect_stdout(io.StringIO()):
        families.save_base("gemma", presets, base)
        found = {
            name: case(families, presets, base, given["rows"], changes) for name, changes in given["cases"].items()
        }
        found["methods"] = {
            name: ways(families, presets, base, one["method"], one) for name, one in given["methods"].items()
        }
    json.dump(found, sys.stdout)


def ways(families: Any, presets: Path, base: Path, name: str, given: dict[str, Any]) -> list[Any]:
    """Return what one process makes, what two make, and what a next attempt finds: rows, held-out ones, the notes."""
    import deepe_examples as examples
    import deepe_preparation
    import deepe_recipes

    method = families.script(presets / name / f"{name}.py")
    found: list[Any] = []
    for workers in (1, 2, 1):
        more = ["--eval_fraction=0.1", f"--preprocessing_workers={workers}", *given["options"]]
        args = families.arguments(method, base, given["rows"], *more)
        told: list[str] = []
        examples.remark = lambda sentence, _args, told=told: told.append(sentence)
        if len(found) < 2:
            deepe_preparation.remove_prepared(args)
        wanted, recipe = KINDS[name](method, args)
        preparation = method.Preparation(args, wanted)
        tokenizer = families.script(presets / "sft-demo/sft-demo.py").llm.load_tokenizer(str(base), args)
        learned, held_out = preparation.sequences(tokenizer, recipe)
        kept = [*map(deepe_recipes.written_value, held_out)]
        made = os.stat(learned.path).st_mtime_ns
        table = learned.dataset()
        found.append({"rows": [table.to_list(), kept, told, preparation.rows, learned.longest], "made": made})
        if {"example", "input_ids"} & set(table.column_names):
            rows = learned.rows()
            assert list(rows) == [rows[place] for place in range(len(rows))]
    return found


def judged(method: Any, args: Any) -> tuple[Any, Any]:
    kinds = {"preference", "labelled"} if args.objective == "kto" else {"preference"}
    return method.Wanted(kinds=frozenset(kinds), tools=False), method.RECIPES[args.objective]


KINDS: dict[str, Any] = {  # method to a function that returns what it reads, and what it makes of a row
    "dpo-demo": judged,
    "grpo-demo": lambda method, args: (method.LEARNS, method.judge_of(args).recipe(args.system_prompt)),
    "embedding-demo": lambda method, args: (method.LEARNS, method.recipe_of(method.chosen_how(args))),
}


def case(families: Any, presets: Path, base: Path, rows: list[Any], changes: dict[str, Any]) -> dict[str, Any]:
    import deepe_examples as examples
    import deepe_preparation

    sft = families.script(presets / "sft-demo/sft-demo.py")
    rows = [*changes.get("only", rows), *changes.get("rows", [])]
    options = [f"--{name}={value}" for name, value in changes.items() if name not in ("rows", "only", "afresh", "base")]
    args = families.arguments(sft, base, rows, "--max_seq_length=80", "--eval_fraction=0.1", *options)
    for name, more in changes.get("base", {}).items():
        with (base / name).open("a") as file:
            file.write(more)
    if changes.get("afresh"):
        deepe_preparation.remove_prepared(args)
    tokenizer = sft.llm.load_tokenizer(str(base), args)
    told: list[str] = []
    examples.remark = lambda sentence, _args: told.append(sentence)

    def one_by_one() -> Any:
        parts = examples.load_examples(args, sft.LEARNS)
        learned = examples.encode(parts.train, tokenizer, args)
        held_out = examples.encode(parts.held_out, tokenizer, args, held_out=True)
        return (
            sft.llm.columns_of(learned),
            [*map(asdict, held_out)],
            len(parts.train),
            max(len(one.tokens) for one in learned),
        )

    def prepared() -> Any:
        preparation = sft.Preparation(args, sft.LEARNS)
        learned, held_out = preparation.sequences(tokenizer)
        assert learned.tokens == sum(map(len, learned.dataset()["input_ids"]))
        made.append(os.stat(learned.path).st_mtime_ns)
        return learned.dataset().to_dict(), [*map(asdict, held_out)], preparation.rows, learned.longest

    made: list[int] = []
    outcomes = []
    for way in (one_by_one, prepared):
        told.clear()
        try:
            result = way()
        except sft.Refused as error:
            result = f"refused: {error}"
        outcomes.append((result, list(told)))
    refused = outcomes[1][0] if isinstance(outcomes[1][0], str) else None
    return {
        "differences": differences(*json.loads(json.dumps(outcomes))),
        "told": outcomes[1][1],
        "refused": refused,
        "sequences": 0 if refused else len(outcomes[1][0][0]["input_ids"]),
        "held out": 0 if refused else len(outcomes[1][0][1]),
        "made": made,
    }


def differences(expected: tuple[Any, list[str]], found: tuple[Any, list[str]]) -> list[str]:
    if isinstance(expected[0], str) or isinstance(found[0], str):
        return [] if expected == found else ["refusal"]
    names = ("learned", "held out", "rows", "longest")
    differ = [name for name, one, other in zip(names, expected[0], found[0], strict=True) if one != other]
    return differ + (["told"] if expected[1] != found[1] else [])


if __name__ == "__main__":
    main()
