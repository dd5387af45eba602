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
    json.dump(found, sys.stdout)


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
