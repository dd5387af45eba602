"""Every option of the libraries' configuration classes, for scripts that name the classes.

    LIBRARY_OPTIONS = {"classes": {"trl.SFTConfig": {}, "peft.LoraConfig": {}}}

    args, rest = make_parser().parse_known_args()
    args.options = Options(rest, LIBRARY_OPTIONS, args)
    args.options.check()  # `deepe_llm.check` does it
    config = args.options.build(SFTConfig, learning_rate=args.learning_rate)
    with args.options.refusing():
        trainer = SFTTrainer(args=config, ...)

What the script's parser leaves over is taken as fields of the classes and wins over what the script sets. A class may
depend on arguments that the script has: `{"trl.KTOConfig": {"objective": ["kto"]}}`. `"instead": {"use_vllm": "vllm"}`
refuses a field and names what to give. The platform reads `LIBRARY_OPTIONS` from the script, so that a method's form
lists the fields and a submission is checked before it waits for a machine.
"""

import argparse
import contextlib
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepe_fields
from deepe_rows import Refused

TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
REASONS = {
    "option_of_platform": "the platform sets it",
    "option_of_rows": "the rows are prepared by the method itself, so that it would have no effect",
    "option_of_model": "the method loads and saves the model itself",
    "option_of_script": "the method has a name of its own for it",
}
PASSED_BY_PLATFORM = frozenset(
    {
        *("train_file_name", "train_env", "train_name", "training_name", "pic_relative_path"),
        *("save_path", "base_path", "adapter_path", "dtype_str", "model_usage_type"),
    }
)
"""What a script that trains is called with as a stage for training or for saving, beyond the arguments it declares."""
PASSED_TO_ALL = frozenset(
    {
        *("max_seq_length", "max_input_length", "max_content_length", "max_samples", "lora_rank", "load_in_4bit"),
        *("num_generations", "batch_size", "grad_accum_steps", "learning_rate", "warmup_steps", "warmup_ratio"),
        *("max_grad_norm", "max_steps", "epochs", "input_train_name", "output_train_name"),
    }
)
"""The platform's parameters: a form gives all of them to every script, whatever it makes of them."""

UNLESS_GIVEN = {"router_aux_loss_coef": 0.0}
"""Fields of any class whose library default does not hold.

Of a mixture of experts, TRL adds to the loss of the tokens how unevenly those of a forward pass are spread over the
experts. It would teach the layers before the routers, and depend on which rows lie together.
"""


class Options:
    """What was given beyond a script's own arguments, for the configuration classes that it names."""

    def __init__(self, rest: Sequence[str], declared: Mapping[str, Any], args: argparse.Namespace) -> None:
        self._own = [name for name in vars(args) if name != "options"]
        self._words = list(rest)
        self._instead: Mapping[str, str] = declared.get("instead", {})
        self._paths = [path for path, when in declared["classes"].items() if _holds(when, args)]
        self._of_others = {path: when for path, when in declared["classes"].items() if path not in self._paths}
        self._of: dict[str, dict[str, Any]] = {}

    @property
    def given(self) -> dict[str, Any]:
        """Return all values by name."""
        return {name: value for values in self._of.values() for name, value in values.items()}

    def check(self) -> None:
        """Read the values. Raises `Refused` for what no class has, or is not a value of its field."""
        texts: dict[str, str] = {}
        for name, text in _pairs(self._words):
            if name in texts:
                raise Refused(f"{name} is given twice")
            if name not in PASSED_BY_PLATFORM:
                self._refuse_owned(name)
                texts[name] = text
        if not texts:
            return
        classes = {path: self._fields(path) for path in self._paths}
        for name, text in texts.items():
            path = next((path for path, fields in classes.items() if name in fields), None)
            if path is not None:
                self._of.setdefault(path, {})[name] = self._value(path, classes[path][name], text)
            elif name not in PASSED_TO_ALL:
                self._refuse_of_others(name)
                raise Refused(self._unknown(name, classes))

    def of(self, cls: Any) -> dict[str, Any]:
        """Return the values for a class, by field."""
        return next((values for path, values in self._of.items() if deepe_fields.load(path) is cls), {})

    def of_library(self, library: str) -> dict[str, Any]:
        """Return the values for the classes of a library, by field."""
        found = [values for path, values in self._of.items() if path.partition(".")[0] == library]
        return {name: value for values in found for name, value in values.items()}

    def build(self, cls: Any, **own: Any) -> Any:
        """Return the configuration: what the script sets, under what was given. Raises `Refused` as the class does."""
        given = self.of(cls)
        fields = deepe_fields.fields_of(cls)
        own |= {name: value for name, value in UNLESS_GIVEN.items() if name in fields}
        for name, value in own.items():
            field = fields.get(name)
            if field is not None and field.choices is not None and value not in field.choices and name not in given:
                known = ", ".join(str(choice) for choice in field.choices)
                raise Refused(f"{name} must be one of {known}; it is '{value}'")
        with self.refusing(given):
            return cls(**{**own, **given})

    @contextlib.contextmanager
    def refusing(self, given: Mapping[str, Any] | None = None, *, if_named: bool = False) -> Iterator[None]:
        """Turn what a library says of the values into `Refused`, so that it is read as a sentence.

        `if_named`: only what names an option or its value; during a training much else may be wrong.
        """
        given = self.given if given is None else given
        try:
            yield
        except (ValueError, TypeError, ImportError, NotImplementedError) as error:
            said = " ".join(str(error).split())
            is_missing = isinstance(error, ImportError) and not if_named
            if is_missing and not given:
                raise Refused(f"a library that is asked for is not in this environment: {said}") from error
            if not given or (if_named and not any(word in said for word in _words(given))):
                raise
            raise Refused(f"the library does not accept {_listed(given)}: {said}") from error

    def fit(self, trainer: Any) -> None:
        """Raise `Refused` for options that would have no effect in a trainer."""
        without_effect = [name for name in TABLE["measuring"] if name in self.given]
        if without_effect and trainer.eval_dataset is None:
            raise Refused(
                f"{without_effect[0]} would have no effect: this training has no held-out loss. Leave it out, or, "
                "where the method has one, hold rows out with eval_fraction"
            )

    def _refuse_owned(self, name: str) -> None:
        reasons = [(reason, names[name]) for reason, names in TABLE["refused"].items() if name in names]
        if name in self._instead:
            reasons = [("option_of_script", self._instead[name])]
        for reason, instead in reasons:
            cure = f"use {instead}" if instead else "leave it out"
            raise Refused(f"{name} cannot be set: {REASONS[reason]}; {cure}")

    def _refuse_of_others(self, name: str) -> None:
        """Refuse an option of a class that other arguments leave out."""
        for path, when in self._of_others.items():
            if name in self._fields(path):
                known = {other: values for other, values in when.items() if other in self._own}
                needed = " and ".join(f"{other}={' or '.join(map(str, values))}" for other, values in known.items())
                raise Refused(f"{name} has no effect here: it is an option of {path}, with {needed}; leave it out")

    def _fields(self, path: str) -> dict[str, deepe_fields.Field]:
        try:
            return deepe_fields.fields_of(deepe_fields.load(path))
        except ImportError as error:
            raise Refused(f"{path} is not in this environment ({error}): no option of it can be set") from error

    def _value(self, path: str, field: deepe_fields.Field, text: str) -> Any:
        try:
            return deepe_fields.from_text(field, text)
        except deepe_fields.WrongValue as error:
            raise Refused(f"{field.name} must be {error}, it is '{text}' ({path})") from None

    def _unknown(self, name: str, classes: Mapping[str, Mapping[str, Any]]) -> str:
        known = [*self._own, *(field for fields in classes.values() for field in fields)]
        parts = [one for one in known if name in one]
        near = list(dict.fromkeys([*difflib.get_close_matches(name, dict.fromkeys(known), n=3), *parts]))[:3]
        versions = dict(map(deepe_fields.library_of, classes))
        installed = ", ".join(f"{library} {version}" for library, version in versions.items())
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"there is no parameter {name}, neither of the script nor of {', '.join(classes)} ({installed}){meant}"


def options_of(args: argparse.Namespace) -> Options:
    """Return the options of a script, none for one that takes none."""
    return getattr(args, "options", None) or Options((), {"classes": {}}, args)


def _holds(when: Mapping[str, Sequence[Any]], args: argparse.Namespace) -> bool:
    """Say whether the conditions hold. One on an argument that the script does not have does."""
    return all(getattr(args, name, values[0]) in values for name, values in when.items())


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield names and texts of `--name=text`, `--name text` and `--name`, which means true."""
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise Refused(f"'{word}' is no option: options are written --name=value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = left.pop(0) if left and not left[0].startswith("--") else "true"
        yield name.replace("-", "_"), text


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the options, and values that are long enough to be told from other words."""
    for name, value in values.items():
        yield name
        items = value if isinstance(value, list) else [value]
        yield from (item for item in items if isinstance(item, str) and len(item) > 2)


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
