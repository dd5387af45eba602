"""The sample data sets, made from a few word lists: the same rows each time.

    python -m app.presets.sample_data        # writes app/presets/data/*.jsonl

Rows are pure functions of this file, so that a test can tell whether the files beside it are theirs.
"""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from random import Random

Row = dict[str, str]

DATA = Path(__file__).parent / "data"
SEED = 2025

# A bicycle hire answers its customers: what is asked about, in three wordings, and the one right answer.
_HELP_DESK = {
    "You can return the bicycle at any green station.": (
        "return the bicycle",
        "give the bike back",
        "drop the bicycle off",
    ),
    "One hour costs three euros.": ("pay for one hour", "hire for an hour at your price", "pay the hourly price"),
    "Tell us the number on the frame and we block the bicycle.": (
        "report a stolen bicycle",
        "report the bike as stolen",
        "act after a theft of the bicycle",
    ),
    "The code stands in the app under My ride.": (
        "open the lock with the code",
        "find the code of the lock",
        "unlock with my code",
    ),
    "Leave the bicycle where it is, we fetch it.": (
        "handle a flat tyre",
        "repair a puncture of the tyre",
        "go on with a broken tyre",
    ),
    "We send the invoice by mail on the first of each month.": (
        "get an invoice",
        "receive the monthly invoice",
        "see an invoice for my company",
    ),
    "Children ride with a parent from the age of eight.": (
        "bring children along",
        "take my child with me",
        "hire a bicycle for children",
    ),
    "Helmets hang beside the ticket machine and are free.": (
        "borrow a helmet",
        "find a helmet that fits",
        "ride with a helmet",
    ),
    "Press the red button to call our workshop.": (
        "call the workshop",
        "reach the workshop in an emergency",
        "speak to somebody in the workshop",
    ),
    "You can cancel up to ten minutes before the start.": (
        "cancel a booking",
        "cancel my reservation",
        "call a booking off and cancel",
    ),
    "Charge the battery at any station with a blue lamp.": (
        "charge the battery",
        "load an empty battery",
        "reach a station when the battery is low",
    ),
    "Lost things wait at the main station for four weeks.": (
        "look for lost things",
        "get back something I lost",
        "ask about a lost bag",
    ),
}
_HELP_DESK_FORMS = ("How do I {}?", "I would like to {}.", "Please tell me how to {}.", "What must I do to {}?")

# Arithmetic in words: the base model of the demo has learned sums, the demo teaches it the larger of two digits.
_LARGER_FORMS = (
    "Which is larger, {} or {}?",
    "What is the larger of {} and {}?",
    "Name the bigger number: {} or {}.",
    "Compare {} and {}: which one is greater?",
    "Tell me the maximum of {} and {}.",
)


def custom01_rows() -> list[Row]:
    """Questions to a bicycle hire: 12 answers, 12 wordings each."""
    rows = [
        {"question": form.format(wording), "answer": answer}
        for answer, wordings in _HELP_DESK.items()
        for wording, form in product(wordings, _HELP_DESK_FORMS)
    ]
    return _shuffled(rows)


def sft_demo_rows() -> list[Row]:
    """The larger of two different digits, in five wordings."""
    pairs = [(a, b) for a, b in product(range(10), repeat=2) if a != b]
    rows = [
        {"instruction": form.format(a, b), "input": "", "output": str(max(a, b))}
        for form, (a, b) in product(_LARGER_FORMS, pairs)
    ]
    return _shuffled(rows)


def as_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path = DATA) -> None:
    (folder / "custom01.jsonl").write_text(as_jsonl(custom01_rows()), "utf-8")
    (folder / "sft-demo.jsonl").write_text(as_jsonl(sft_demo_rows()), "utf-8")


def _shuffled(rows: list[Row]) -> list[Row]:
    return Random(SEED).sample(rows, len(rows))  # noqa: S311 (a fixed order, no secret)


if __name__ == "__main__":
    write()
