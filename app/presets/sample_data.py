"""The sample data sets, made from a few word lists: the same rows each time.

    python -m app.presets.sample_data            # writes app/presets/NAME/NAME.jsonl
    python -m app.presets.sample_data FOLDER     # the same into a folder, and the pictures of vl-demo and sd-demo

Rows are pure functions of this file, so that a test can check the files beside it against them.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from app.presets import sample_pictures, sample_signs
from app.presets.sample_pictures import COLOURS, SHAPES, picture_name

Row = dict[str, Any]

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

# An office asks its IT desk. Each answer: what people do, and with what; every pair of the two is a wording.
_IT_DESK: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Hold the power button for ten seconds, then start the computer again.": (
        ("restart", "revive", "wake up"),
        ("a frozen laptop", "a computer that hangs"),
    ),
    "Choose a new password on the account page; the old one ends at once.": (
        ("change", "reset", "renew"),
        ("my password", "the secret of my login"),
    ),
    "The printer of each floor is listed under its room number.": (
        ("print on", "send pages to", "find"),
        ("the printer of my floor", "the copier near my room"),
    ),
    "Clear the tray, take out the sheet and close all doors of the printer.": (
        ("remove", "pull out", "clear"),
        ("a paper jam", "a stuck sheet of paper"),
    ),
    "Guests get a code for the wireless network at the reception.": (
        ("connect", "bring online", "let in"),
        ("a visitor to the wifi", "a guest to the wireless network"),
    ),
    "Start the tunnel program and sign in with your token.": (
        ("work from", "reach files from", "log in from"),
        ("home over the tunnel", "outside the office by vpn"),
    ),
    "Ask your manager to approve the order in the shop of the company.": (
        ("order", "buy", "get"),
        ("a second monitor", "a new screen"),
    ),
    "Deleted mails stay in the bin for thirty days.": (
        ("restore", "bring back", "recover"),
        ("a deleted mail", "a message from the bin"),
    ),
    "Files are saved every night; name the file and the day.": (
        ("restore", "get back", "rescue"),
        ("a lost file", "an overwritten document from the backup"),
    ),
    "Write an automatic reply with the dates of your absence.": (
        ("announce", "tell senders of", "set up a reply for"),
        ("my holiday", "my absence"),
    ),
    "Mark the mail as suspicious and do not open its links.": (
        ("report", "handle", "forward"),
        ("a phishing mail", "a suspicious message"),
    ),
    "Call us at once: we lock the phone and erase it from afar.": (
        ("report", "lock", "erase"),
        ("a stolen phone", "a lost mobile"),
    ),
    "Rooms are booked in the calendar, as a guest of your meeting.": (
        ("book", "reserve", "find"),
        ("a meeting room", "a free conference room"),
    ),
    "Turn on subtitles in the settings of the call.": (
        ("show", "switch on", "read"),
        ("subtitles in a video call", "captions of a meeting"),
    ),
    "Choose the headset as microphone and speaker in the settings of the call.": (
        ("use", "fix", "select"),
        ("the microphone of my headset", "my headset in a call"),
    ),
    "Software from the catalogue installs itself, everything else needs a licence.": (
        ("install", "add", "set up"),
        ("a program from the catalogue", "new software"),
    ),
    "Restart tonight: the update needs twenty minutes.": (
        ("finish", "install", "delay"),
        ("the update of the system", "a pending upgrade of windows"),
    ),
    "Plug the dock in again and wait until its lamp is white.": (
        ("repair", "reset", "reconnect"),
        ("a dock without picture", "the docking station"),
    ),
    "The owner of the folder decides who may read it.": (
        ("open", "get rights to", "read"),
        ("a shared folder", "the folder of another team"),
    ),
    "Large files travel by a link that ends after a week.": (
        ("send", "share", "mail"),
        ("a very large file", "an attachment that is too big"),
    ),
    "Your badge opens the door again after one visit to the reception.": (
        ("renew", "unblock", "replace"),
        ("my badge", "the card that opens the door"),
    ),
    "Scan the picture with the app to add a second factor.": (
        ("add", "set up", "move"),
        ("a second factor", "the login code on my phone"),
    ),
    "Close some programs or ask for more memory.": (
        ("speed up", "help", "fix"),
        ("a slow computer", "a laptop that crawls"),
    ),
    "Bring the battery back, it is changed while you wait.": (
        ("replace", "change", "exchange"),
        ("a weak battery", "a battery that dies early"),
    ),
    "Take the language of the keyboard from the list at the lower right.": (
        ("switch", "change", "choose"),
        ("the language of my keyboard", "the keyboard layout"),
    ),
    "Record the meeting only when all have agreed.": (
        ("record", "keep", "film"),
        ("a meeting", "a video conference"),
    ),
    "The number of the desk stands on the back of each device.": (
        ("find", "read", "look up"),
        ("the inventory number", "the label of a device"),
    ),
    "Leave the device at our counter on your last day.": (
        ("return", "hand in", "give back"),
        ("my laptop when I leave", "the equipment of the company"),
    ),
    "Add the calendar of a colleague with the plus sign.": (
        ("see", "open", "add"),
        ("the calendar of a colleague", "when my team is free"),
    ),
    "Dial nine before the number to call outside.": (
        ("call", "dial", "reach"),
        ("a number outside", "a customer from the desk phone"),
    ),
}
_IT_DESK_FORMS = ("How do I {} {}?", "I need to {} {}.", "Can you help me {} {}?", "What is the way to {} {}?")

# Sums, asked as in the base models of tiny_base.py, which know them; what is learned is how to answer.
_SUM_FORMS = (
    "What is {} + {}?",
    "Add {} and {}.",
    "What is the sum of {} and {}?",
    "How much is {} plus {}?",
    "Tell me the total of {} and {}.",
)
_LIKED = "{a} + {b} = {sum}\n#### {sum}"
_DISLIKED = ("{sum}", "The answer is {sum}.")

# What is drawn; the base model of tiny_vl.py can name the colour or the shape, what is learned is to say both.
_ONE_PICTURE = ("What is in the picture?", "Describe the picture.")
_TWO_PICTURES = ("What is in the pictures?", "Describe both pictures.")


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


def embedding_demo_rows() -> list[Row]:
    """Questions to an IT desk and the text that answers them: 30 answers, 24 wordings each."""
    rows = [
        {"anchor": form.format(action, thing), "positive": answer}
        for answer, (actions, things) in _IT_DESK.items()
        for form, action, thing in product(_IT_DESK_FORMS, actions, things)
    ]
    return _shuffled(rows)


def grpo_demo_rows() -> list[Row]:
    """All sums of two digits, in five wordings, with the bare result."""
    return _shuffled([{"question": form.format(a, b), "answer": str(a + b)} for form, a, b in _sums()])


def dpo_demo_rows() -> list[Row]:
    """The same sums with an answer that shows the calculation, and one that does not."""
    rows = [
        {
            "prompt": form.format(a, b),
            "chosen": _LIKED.format(a=a, b=b, sum=a + b),
            "rejected": _DISLIKED[(a + b + number) % 2].format(sum=a + b),
        }
        for number, (form, a, b) in enumerate(_sums())
    ]
    return _shuffled(rows)


def vl_demo_rows() -> list[Row]:
    """Pictures and what they show: 20 of each colour and shape alone, and 160 pairs."""
    chance = Random(SEED)  # noqa: S311 (the same pictures each time, no secret)
    kinds = list(product(COLOURS, SHAPES))
    shown = [[kind] for kind in kinds * 20] + [[chance.choice(kinds), chance.choice(kinds)] for _ in range(160)]
    taken: set[str] = set()
    rows = [
        {
            "images": [{"imageId": _new_picture(colour, shape, chance, taken)} for colour, shape in pair],
            "question": chance.choice(_ONE_PICTURE if len(pair) == 1 else _TWO_PICTURES),
            "answer": " and ".join(f"a {colour} {shape}" for colour, shape in pair),
        }
        for pair in shown
    ]
    return _shuffled(rows)


def sd_demo_rows() -> list[Row]:
    """Neon signs and what they show: each colour, shape and place once."""
    rows = [
        {"images": [{"imageId": name}], "caption": f"a neon sign of {words}"}
        for name, words in sample_signs.pictures("sign")
    ]
    return _shuffled(rows)


def as_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(place: Callable[[str], Path]) -> None:
    """Write the rows of every data set to `place(name)`."""
    data_sets = {
        "custom01": custom01_rows,
        "sft-demo": sft_demo_rows,
        "embedding-demo": embedding_demo_rows,
        "grpo-demo": grpo_demo_rows,
        "dpo-demo": dpo_demo_rows,
        "vl-demo": vl_demo_rows,
        "sd-demo": sd_demo_rows,
    }
    for name, rows in data_sets.items():
        place(name).write_text(as_jsonl(rows()), "utf-8")


def write_with_pictures(rows: Path, folder: Path) -> None:
    """Make a folder of rows and the pictures that they name, as a whole or not at all; one that is there is kept."""
    if folder.exists():
        return
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    parsed = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    (draft / "images").mkdir(parents=True)
    for name in (image["imageId"] for row in parsed for image in row["images"]):
        drawing = sample_signs if sample_signs.is_named(name) else sample_pictures
        (draft / "images" / name).write_bytes(drawing.draw(name))
    shutil.copyfile(rows, draft / rows.name)
    draft.rename(folder)


def _sums() -> list[tuple[str, int, int]]:
    return list(product(_SUM_FORMS, range(10), range(10)))


def _new_picture(colour: str, shape: str, chance: Random, taken: set[str]) -> str:
    """No picture twice: what is held out for the score is not among what was learned."""
    while (name := picture_name(colour, shape, chance)) in taken:
        pass
    taken.add(name)
    return name


def _shuffled(rows: list[Row]) -> list[Row]:
    return Random(SEED).sample(rows, len(rows))  # noqa: S311 (a fixed order, no secret)


def main() -> None:
    if len(sys.argv) == 1:
        write(lambda name: Path(__file__).parent / name / f"{name}.jsonl")
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(lambda name: folder / f"{name}.jsonl")
    for name in ("vl-demo", "sd-demo"):
        write_with_pictures(folder / f"{name}.jsonl", folder / name)


if __name__ == "__main__":
    main()
