"""Read the forms in which trainers print: bars, dictionaries, and lines of named numbers.

Pure functions of one line each. A line is at most `MAX_LINE_BYTES` long, and no pattern looks at a character more than
a fixed number of times, so a line costs microseconds whatever stands in it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_LINE_BYTES = 4096
_RECORD = b"[log_data]:"

# one of these stands in every line that is read here
WORTH_READING = re.compile(
    rb"loss|Loss|LOSS|%\||\xe2\x94\x81|\xe2\x96[\xb2\xbc]|val[ \x1b]|\{['\"]|\xc2\xb7 iters|\.\.\., iters"
)

# a loss says something at the beginning of a line, or beside what it belongs to
_LIKELY = re.compile(
    rb"step|epoch|iter|batch|%\||\{['\"]|\xe2\x94\x81|\xe2\x96[\xb2\xbc]|val[ \x1b]|\xc2\xb7"
    rb"|^(?:\[\w+\]:? )?\W{0,8}\w{0,12}[ _.-]?loss",
    re.IGNORECASE,
)
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_RANK = re.compile(r"^(?:\[(?:rank:? ?|default)?(?P<rank>\d+)\]:?\s?)+")
_STREAM = re.compile(r"^\[(?:ERR|OUT|STDERR|STDOUT)\] ")

_NUMBER = r"[-+]?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf|NaN|Infinity)"
_SCALES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
# what is measured; settings such as a learning rate say nothing when they stand alone
_MEASURED = r"loss(?:es)?|\w+_loss|acc|\w*accuracy|ppl|perplexity|rewards?|kl|f1|bleu|rouge\w?|mae|mse|rmse|wer|cer|auc"
_SETTING = r"lr|learning[_ ]rate|grad[_ ]?norm|gnorm"
_PART = r"(?:train(?:ing)?|val(?:id(?:ation)?)?|eval|test|step|avg|average|mean)"
_NAMED = re.compile(
    rf"(?<![\w/])((?:{_PART}[ _/.-])?(?:{_MEASURED}|{_SETTING}))['\"]?"
    rf"\s{{0,8}}[:=]?\s{{0,8}}({_NUMBER})([kKM%]?)(?![\w.])",
    re.IGNORECASE,
)
_IS_MEASURED = re.compile(rf"(?:^|[ _/.-])(?:{_MEASURED})$", re.IGNORECASE)
_STEP = re.compile(
    r"(?<![\w.])(?:global[_ ]?step|steps?|iter(?:ation)?s?|batch)\b['\"]?"
    r"[\s:=#\[(]{0,3}(\d+)(?:\s?/\s?(\d+))?(?![\d.])",
    re.IGNORECASE,
)
_EPOCH = re.compile(r"(?<![\w.])epoch\b[\s:=#\[(]{0,3}(\d+)(?:\s?/\s?(\d+))?(?![\d.])", re.IGNORECASE)
_STEP_WITHIN = 80  # characters from the line's beginning: what a model answers may hold such words as well

_BAR = re.compile(
    r"^\s{0,20}(?P<about>[^|%]{0,120}?)\s{0,9}(?P<percent>\d{1,3})%\|[^|]{0,400}\|\s{0,9}"
    r"(?P<done>[\d.]+)(?P<done_scale>[kMGT]?)/(?P<total>[\d.]+)(?P<total_scale>[kMGT]?)(?P<unit>[A-Za-z]{0,2}) "
    r"\[[\d:]+<[^,\]]*(?:,\s{0,9}(?P<rate>[^,\]]*))?(?P<more>[^\]]*)\]"
)
_RICH_BAR = re.compile(
    r"^\s{0,20}(?P<about>[^\u2501\u2578\u257a]{0,120}?)\s{0,9}[\u2501\u2578\u257a]{3}[\u2501\u2578\u257a ]{0,400}"
    r"(?:\d{1,3}%\s{0,9})?(?P<done>\d+)/(?P<total>\d+)\s(?P<more>.*)$"
)
_AFTER_RICH = re.compile(rf"(?<!\S)([A-Za-z_][\w/.]{{0,60}}):\s({_NUMBER})(?!\S)")
_POSTFIX = re.compile(rf"([A-Za-z_][\w/.@ -]{{0,40}})=({_NUMBER})([kM%]?)(?=\s?(?:,|$))")
_TRAINING_BAR = re.compile(r"epoch|train|\bsteps?\b|\biter", re.IGNORECASE)
_OTHER_BAR = re.compile(
    r"eval|valid|test|predict|sanity|token|load|map|filter|sav|writ|generat|dataset|split|template|pack|truncat|encod",
    re.IGNORECASE,
)

_ENTRY = re.compile(
    rf"['\"]([^'\"{{}}]{{1,100}})['\"]\s?:\s{{0,8}}(?:[A-Za-z][\w.]{{0,20}}\()?['\"]?({_NUMBER})(%?)(?=['\"\s,)}}\]])"
)
_STEP_OF_TOTAL = re.compile(r"['\"](?:[\w ]{0,30}step/\w{0,30}steps|iteration)['\"]\s?:\s?['\"](\d+)/(\d+)")
_STEP_KEYS = ("global_step", "step", "current_steps", "iteration", "iter")
_TOTAL_KEYS = ("total_steps", "max_steps")
_NO_METRICS = {*_STEP_KEYS, *_TOTAL_KEYS, "percentage", "total_flos"}

_OF_BRACKET = re.compile(r"\]?[\s,]{0,8}\[\s{0,8}(\d+)/(\d+)")

# mlx-lm: a line of words, and since 0.32 a row of a table
_MLX = re.compile(r"^Iter (\d+): (Train|Val) loss ")
_MLX_TRAIN = re.compile(
    rf"^\s{{1,12}}(\d+) {{4,12}}({_NUMBER}) [\u25b2\u25bc]\s{{1,12}}([\d,]+)\s{{1,12}}[\d.]+k\s{{0,9}}$"
)
_MLX_VALIDATION = re.compile(rf"^\s{{1,12}}(\d+) {{4,12}}val\s{{1,12}}({_NUMBER})\s{{1,12}}[\d.]+s\s{{0,9}}$")
_MLX_TOTAL = re.compile(r"(?:^Starting training\.\.\., iters: |batch \u00b7 iters\s{1,20}[\d,]+ \u00b7 )([\d,]+)")


@dataclass(frozen=True)
class Bar:
    """A progress bar. `epoch` is its own when it counts the batches of one epoch; `epochs` how many there will be."""

    step: int
    total: int
    epoch: int | None = None
    epochs: int | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Values:
    """Named numbers, with what the line itself says of when."""

    values: Mapping[str, float | None]
    step: int | None = None
    total: int | None = None
    epoch: int | None = None
    is_dictionary: bool = False


@dataclass(frozen=True)
class Total:
    """How many steps there will be."""

    steps: int


Form = Bar | Values | Total


def printed_forms(line: bytes) -> Sequence[Form]:
    """Read a line without its end; nothing if it is none of the forms, or of another process than the first.

    A script that prints while its bar is drawn leaves both on one line.
    """
    if not _LIKELY.search(line):
        return ()
    text = line[:MAX_LINE_BYTES].partition(_RECORD)[0].decode("utf-8", "replace")
    text = _STREAM.sub("", _ESCAPES.sub("", text))
    if (mark := _RANK.match(text)) is not None:
        if int(mark["rank"]):
            return ()
        text = text[mark.end() :]
    if "%|" in text and (match := _BAR.match(text)):
        forms = (_bar(match), _report(text[match.end() :]))
    elif "\u2501" in text:
        forms = (_rich_bar(text), None)
    else:
        forms = (None, _report(text))
    return tuple(form for form in forms if form is not None)


def _report(text: str) -> Values | Total | None:
    if "\u25bc" in text or "\u25b2" in text or " val " in text:
        return _mlx_row(text)
    if "iters" in text and (total := _MLX_TOTAL.search(text)):
        return Total(int(total[1].replace(",", "")))
    return _dictionary(text) if "{'" in text or '{"' in text else _named(text)


def measures(name: str) -> bool:
    """Say whether a value of this name is a measurement, such as a loss."""
    return "loss" in name or _IS_MEASURED.search(name) is not None


def number(text: str, suffix: str = "") -> float | None:
    """Return a printed number; None for NaN and infinity. A percentage stays the number that is printed."""
    value = float(text.replace(",", "")) * _SCALES.get(suffix, 1)
    return value if math.isfinite(value) else None


def _bar(match: re.Match[str]) -> Bar | None:
    if match["unit"] or (match["rate"] or "").rstrip().endswith("B/s"):
        return None
    if match["done_scale"] or match["total_scale"] or "." in match["done"] + match["total"]:
        return None  # rounded: no step can be told
    values = {name.strip(): number(text, suffix) for name, text, suffix in _POSTFIX.findall(match["more"])}
    return _training_bar(match["about"], int(match["done"]), int(match["total"]), values)


def _rich_bar(text: str) -> Bar | None:
    match = _RICH_BAR.match(text)
    if match is None:
        return None
    values = {name: number(value) for name, value in _AFTER_RICH.findall(match["more"])}
    return _training_bar(match["about"], int(match["done"]), int(match["total"]), values)


def _training_bar(about: str, done: int, total: int, values: dict[str, float | None]) -> Bar | None:
    if (about and not _TRAINING_BAR.search(about)) or _OTHER_BAR.search(about.replace("Training", "")):
        return None
    values.pop("v_num", None)  # Lightning's number of the run
    epoch = None if re.search(r"\bsteps?\b", about, re.IGNORECASE) else _EPOCH.search(about)
    if epoch is None:
        return Bar(done, total, values=values)
    return Bar(done, total, epoch=int(epoch[1]), epochs=int(epoch[2]) if epoch[2] else None, values=values)


def _mlx_row(text: str) -> Values | None:
    if match := _MLX_TRAIN.match(text):
        values = {"loss": number(match[2]), "tokens_per_second": number(match[3])}
        return Values(values, step=int(match[1]))
    if match := _MLX_VALIDATION.match(text):
        return Values({"validation_loss": number(match[2])}, step=int(match[1]))
    return _named(text)


def _dictionary(text: str) -> Values | None:
    begin = min(place for place in (text.find("{'"), text.find('{"')) if place >= 0)
    end = text.rfind("}") + 1
    entries = {name: number(value) for name, value, _ in _ENTRY.findall(text[begin:end])}
    values = {name: value for name, value in entries.items() if name not in _NO_METRICS}
    if not any(measures(name) for name in values):
        return None
    named = _STEP_OF_TOTAL.search(text)
    step = int(named[1]) if named else _count(entries, _STEP_KEYS)
    total = int(named[2]) if named else _count(entries, _TOTAL_KEYS)
    before = text[:begin]
    if step is None and (found := _STEP.search(before[:_STEP_WITHIN])):
        step, total = int(found[1]), int(found[2]) if found[2] else None
    epoch = _EPOCH.search(before[:_STEP_WITHIN])
    if step is None and epoch is None and "epoch" not in values:
        # no report of a training by its looks: settings, a row of data
        return Values(values, is_dictionary=True) if set(values) <= _known(values) else None
    return Values(values, step, total, int(epoch[1]) if epoch else None, is_dictionary=True)


def _known(values: Mapping[str, object]) -> set[str]:
    setting = re.compile(rf"(?:^|[ _/.-])(?:{_SETTING})$", re.IGNORECASE)
    return {name for name in values if measures(name) or setting.search(name)}


def _count(entries: Mapping[str, float | None], names: tuple[str, ...]) -> int | None:
    value = next((entries[name] for name in names if entries.get(name) is not None), None)
    return int(value) if value is not None and value >= 0 else None


def _named(text: str) -> Values | None:
    mlx = _MLX.match(text)
    step, epoch = _STEP.search(text[:_STEP_WITHIN]), _EPOCH.search(text[:_STEP_WITHIN])
    if step is None and epoch is not None:
        step = _OF_BRACKET.match(text, epoch.end())
    if step is None and epoch is None and _NAMED.match(text.lstrip(" -|")) is None:
        return None
    found = _NAMED.findall(text)
    if not any(_IS_MEASURED.search(name) for name, _, _ in found):
        return None
    values = {name.lower().replace(" ", "_"): number(value, suffix) for name, value, suffix in found}
    if mlx:
        values = {_MLX_NAMES.get(name, name): value for name, value in values.items()}
    return Values(
        values,
        step=int(step[1]) if step else None,
        total=int(step[2]) if step and step[2] else None,
        epoch=int(epoch[1]) if epoch else None,
    )


_MLX_NAMES = {"train_loss": "loss", "val_loss": "validation_loss"}
