"""VL-Demo learns the answers, and nothing else, of bases in the shapes of known families; a step is taken with each.

The Qwen and InternVL families' processors need torchvision, SmolVLM's num2words too: where they are not installed, the
family is skipped with that reason. `DEEPE_TEST_PYTHON` names an interpreter that has them.
"""

import json
import shutil
from typing import Any

import pytest

from app.presets import catalogue
from app.presets.sample_pictures import draw_all
from tests.presets import vision_families
from tests.presets.conftest import NewHome

pytestmark = [pytest.mark.training, pytest.mark.xdist_group("labels")]

RING, SQUARE = "yellow-ring-15-17-11-27.png", "green-square-16-16-11-13.png"
ROWS = [
    {"image": RING, "question": "What is it?", "answer": "a ring"},
    {"image": [RING, SQUARE], "question": "What are they?", "answer": "both"},
    {
        "image": [RING, SQUARE],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "<image>\nThis?"},
            {"role": "assistant", "content": "one ring"},
            {"role": "user", "content": "And <image> this?"},
            {"role": "assistant", "content": "one square"},
        ],
    },
    {"image": "", "question": "Hello?", "answer": "no picture"},
]


@pytest.fixture(scope="module")
def found(new_home: NewHome) -> dict[str, Any]:
    """Return what the trainer holds with each family; all in one process."""
    home = new_home("vision-families")
    data = home.path / "datasets" / "mine"
    (data / "images").mkdir(parents=True)
    draw_all((RING, SQUARE), data / "images")
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shutil.copy(vision_families.__file__, home.scripts / "vision_families.py")

    run = home.run("vision_families.py", str(catalogue.ROOM), str(data), str(home.path / "bases"))

    assert run.code == 0, run.stderr
    answers: dict[str, Any] = run.json_lines[-1]
    return answers


@pytest.mark.parametrize("family", vision_families.FAMILIES)
def test_trainer_holds_what_is_shown_as_learned(found: dict[str, Any], family: str) -> None:
    held = found[family]
    if "needs" in held:
        pytest.skip(held["needs"])

    texts = {answer["text"].strip().split("<")[0] for answer in held["answers"]}
    assert texts == {"a ring", "both", "one ring", "one square", "no picture"}
    for answer in held["answers"]:
        assert answer["held"] == answer["shown"]
        assert answer["lengths"][0] == answer["lengths"][1]
        assert answer["text"].rstrip().endswith(held["end"])  # where the model is told to stop


def test_a_family_is_always_tried(found: dict[str, Any]) -> None:
    assert "answers" in found["gemma 3"]
