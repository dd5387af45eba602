"""Rows of a DeepExtension database as documents of this service's API. Pure: nothing is read or asked here."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Final

from app.cli.deepextension.mapping import ImportMap, text_in
from app.domain.definition import CUSTOM_TARGET
from app.domain.enums import ModelState
from app.domain.lifecycle import PATHS, find_path
from app.domain.names import MAX_NAME_LENGTH, name_violations
from app.store.deepextension import MAX_FILE_BYTES

BASE: Final = "base"
DEFAULT_SAVING: Final = "linux_code/save_model"
DEFAULT_INFERENCE: Final = "qwen_inference"
_STAGES: Final = {
    "training": ("training", "train", "trainingfile", "trainfile"),
    "saving": ("saving", "save", "savingfile", "savefile"),
    "inference-customized": ("inferencecustomized", "customizedinference", "trainedinference", "inferencetrained"),
    "inference-complete": ("inferencecomplete", "completeinference", "savedinference", "inferencesaved"),
    "deployment": ("deployment", "deploy", "deployfile", "deploymentfile"),
}
_FILE: Final = ("file", "pythonfile", "path", "filename", "filepath", "name", "script")
_ENVIRONMENT: Final = ("condaenv", "env", "environment", "envname", "trainenv", "pythonenv")
_SCRIPT_NAME: Final = re.compile(r"[^\n\r\x00]{1,200}\.py\s*")
_FOLDERS: Final = ("../", "./", "/app/", "/opt/scpx/", "/")
_UNITS: Final = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3), (0, 1))


@dataclass
class Wanted:
    """A document to make, and what is to be said about it."""

    source: str
    name: str
    document: dict[str, Any] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    script: bytes | None = None
    """The training file, if the database holds it and not only its name."""


def wanted_name(kind: str, given: Any, source: str, mapping: ImportMap) -> Wanted:
    """Return a thing with the name that it gets here: what a name may not have becomes a hyphen."""
    there = text_in(given).strip()
    name = mapping.names.get(kind, {}).get(there)
    wanted = Wanted(source, name or there)
    if name is None and kind != "models" and name_violations(there):
        kept = "".join(one if one.isalnum() or one in " ._-" else "-" for one in there)
        wanted.name = re.sub("-{2,}", "-", kept).strip(" -")[:MAX_NAME_LENGTH]
    if wanted.name != there:
        wanted.changed.append(f"the name: {there!r} there")
    if not wanted.name:
        wanted.problems.append("it has no name")
    return wanted


def place(path: Any, folder: str, mapping: ImportMap) -> str | None:
    """Return a path relative to `folder` (models, datasets) of the home; None if it does not lie there."""
    given = str(path or "").strip().replace("\\", "/")
    for there, here in mapping.folders.items():
        if given == there or given.startswith(there.rstrip("/") + "/"):
            given = here.rstrip("/") + given[len(there.rstrip("/")) :]
            break
    while (prefix := next((one for one in _FOLDERS if given.startswith(one)), None)) is not None:
        given = given.removeprefix(prefix)
    parts = PurePosixPath(given).parts
    if ".." in parts or len(parts) < 2 or parts[0] != folder:
        return None
    return PurePosixPath(*parts[1:]).as_posix()


def moment(value: Any) -> str | None:
    """Return an epoch time, whose unit is told by its size, as the API takes it."""
    if not isinstance(value, int | float) or value <= 0:
        return None
    unit = next(divisor for least, divisor in _UNITS if value >= least)
    return datetime.fromtimestamp(value / unit, UTC).isoformat()


def python_file(given: Any) -> str:
    """Return the name of a stage's file with its suffix: DeepExtension leaves it out at some stages."""
    name = str(given or "").strip().removeprefix("./")
    return name if not name or name.endswith(".py") else f"{name}.py"


class Methods:
    """Turns the rows of a method into its definition."""

    def __init__(
        self,
        mapping: ImportMap,
        *,
        base: str,
        targets: Mapping[str, str],
        tools: Mapping[str, str],
        custom: Collection[str],
    ) -> None:
        """`base`: what `base` of DeepExtension is here; `targets` and `tools`: names of deploy targets by id.

        `custom`: those of them to which scripts deploy.
        """
        self._custom = custom
        self._mapping = mapping
        self._base = base
        self._targets = targets
        self._tools = tools
        self.environments: dict[str, str] = {}
        """Names there of the environments that were asked for, by their names here."""

    def environment(self, name: Any) -> str:
        """Return what an environment is called here."""
        there = str(name or "").strip() or BASE
        here = self._mapping.environments.get(there) or (self._base if there == BASE else there)
        self.environments.setdefault(here, there)
        return here

    def definition(self, row: Mapping[str, Any], settings: Mapping[str, Any] | None) -> Wanted:
        """Return the method with everything that was changed, assumed and not understood."""
        wanted = wanted_name("methods", row["name"], f"methods {row['uuid']}", self._mapping)
        wanted.document = {"name": wanted.name, "description": f"From DeepExtension, template {row['uuid']}."}
        stages = self._stages(row, settings, wanted)
        self._describe(settings, wanted)
        states = wanted.document.get("lifecycle") or []
        if ModelState.COMPLETE in states and "saving" not in stages:
            stages["saving"] = self._default(DEFAULT_SAVING, "saving", wanted)
        asked = self._asked(settings, states, stages, wanted)
        for state, stage in (("customized", "inference-customized"), ("complete", "inference-complete")):
            if asked[state] and stage not in stages:
                stages[stage] = self._default(DEFAULT_INFERENCE, stage, wanted)
            if not asked[state] and stages.pop(stage, None) is not None:
                wanted.changed.append(f"{stage} is left out: questions are switched off")
        deployment = stages.pop("deployment", None)
        if ModelState.COMPLETE not in states and stages.pop("saving", None) is not None:
            wanted.changed.append("saving is left out: the path has no complete model")
        wanted.document |= {"stages": stages, "inference": asked}
        if ModelState.ONLINE in states:
            wanted.document["deployment"] = self._deployment(settings, deployment, wanted)
        elif deployment is not None:
            wanted.changed.append("deployment is left out: the path has no online model")
        for key in (str(row["uuid"]), wanted.name):
            if key in self._mapping.methods:
                wanted.document |= self._mapping.methods[key]
                wanted.name = str(wanted.document["name"])
                wanted.changed.append(f"by the map: {', '.join(self._mapping.methods[key])}")
                break
        return wanted

    def _describe(self, settings: Mapping[str, Any] | None, wanted: Wanted) -> None:
        """Say which type and path; older releases had neither."""
        if settings is None:
            wanted.document |= {"training_type": "chat", "lifecycle": list(PATHS[1])}
            wanted.assumed.append("chat, customized and complete: this release kept no settings of methods")
            return
        types = settings["training_type"]
        types = types if isinstance(types, list) else [types]
        meanings = [self._mapping.meaning("training_type", one) for one in types]
        if not types or any(meaning is None for meaning, _ in meanings):
            wanted.problems.append(f"training_type {types}: say what it means (values.training_type of the map)")
        else:
            wanted.document["training_type"] = meanings[0][0]
            if len(types) > 1:
                wanted.changed.append(f"of the training types {types} the first: a method has one here")
            if meanings[0][1]:
                wanted.assumed.append(f"training_type {types[0]} is {meanings[0][0]}")
        path, assumed = self._mapping.meaning("life_cycle", settings["life_cycle"])
        if path is None or find_path(path) is None:
            wanted.problems.append(f"life_cycle {settings['life_cycle']}: say its path (values.life_cycle of the map)")
        else:
            wanted.document["lifecycle"] = list(path)
            if assumed:
                wanted.assumed.append(f"life_cycle {settings['life_cycle']} is {' → '.join(path)}")

    def _stages(
        self, row: Mapping[str, Any], settings: Mapping[str, Any] | None, wanted: Wanted
    ) -> dict[str, dict[str, Any]]:
        """Return what the settings say of each stage, and of training what the template says."""
        config = (settings or {}).get("python_file_config") or {}
        if not isinstance(config, dict):
            wanted.problems.append(f"python_file_config is no object: {config!r:.200}")
            config = {}
        stages: dict[str, dict[str, Any]] = {}
        for key, value in config.items():
            plain = re.sub("[^a-z]", "", str(key).lower())
            stage = next((stage for stage, names in _STAGES.items() if plain in names), None)
            read = self._stage(value)
            if stage is None or (read is None and value not in (None, "", {})):
                wanted.problems.append(f"python_file_config.{key} is not understood: {value!r:.200}")
            elif read is not None:
                stages[stage] = read
        environment = (settings or {}).get("conda_env") or row.get("train_env")
        file, wanted.script = self._train_file(row.get("train_file"), wanted)
        if "training" not in stages and file:
            stages["training"] = {"file": file, "conda_env": self.environment(environment)}
        elif "training" in stages and wanted.script is not None:
            wanted.script = None
            wanted.changed.append("the script in the template is left out: python_file_config names another file")
        return stages

    def _stage(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, str):
            value = {"file": value}
        if not isinstance(value, dict):
            return None
        members = {re.sub("[^a-z]", "", str(key).lower()): one for key, one in value.items()}
        file = next((members[name] for name in _FILE if isinstance(members.get(name), str) and members[name]), None)
        environment = next((members[name] for name in _ENVIRONMENT if members.get(name)), None)
        return None if file is None else {"file": python_file(file), "conda_env": self.environment(environment)}

    def _train_file(self, content: Any, wanted: Wanted) -> tuple[str | None, bytes | None]:
        """Return the name of the training file and, if the database holds it, its bytes."""
        if not content:
            return None, None
        if len(content) > MAX_FILE_BYTES:
            wanted.problems.append(f"its script in the database has more than {MAX_FILE_BYTES // 2**20} MiB")
            return None, None
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
        if _SCRIPT_NAME.fullmatch(text):
            return python_file(text), None
        name = re.sub("[^A-Za-z0-9]+", "_", wanted.name).strip("_").lower() or "method"
        wanted.changed.append(f"its script was kept in the database: it is the file {name}_training.py here")
        return f"{name}_training.py", content if isinstance(content, bytes) else text.encode()

    def _default(self, file: str, stage: str, wanted: Wanted) -> dict[str, Any]:
        wanted.assumed.append(f"{stage} runs {file}.py in {BASE}, DeepExtension's default")
        return {"file": python_file(file), "conda_env": self.environment(BASE)}

    def _asked(
        self,
        settings: Mapping[str, Any] | None,
        states: Sequence[str],
        stages: Mapping[str, Any],
        wanted: Wanted,
    ) -> dict[str, bool]:
        """Return which models answer questions."""
        if settings is None:
            wanted.assumed.append("questions go to every model of it")
            return {"customized": "customized" in states, "complete": "complete" in states}
        wishes = {"customized": "trained_inference_support", "complete": "saved_inference_support"}
        return {state: bool(settings[name]) and state in states for state, name in wishes.items()}

    def _deployment(
        self, settings: Mapping[str, Any] | None, own: Mapping[str, Any] | None, wanted: Wanted
    ) -> dict[str, Any]:
        """Return where the method deploys to: what its tools mean, else the one place that there is."""
        tools = (settings or {}).get("deployment_tools") or []
        target = self._target(tools if isinstance(tools, list) else [tools], wanted)
        if own is not None:
            # a script of its own goes to a server of its own kind; Ollama has its script
            return {"target": target if target in self._custom else CUSTOM_TARGET, **own}
        if target is not None:
            return {"target": target}
        wanted.problems.append(
            f"deployment_tools {tools}: say where it deploys to (values.deployment_tools or methods of the map)"
        )
        return {}

    def _target(self, tools: Sequence[Any], wanted: Wanted) -> str | None:
        """Return the deploy target that the tools mean."""
        for tool in tools:
            meaning, _ = self._mapping.meaning("deployment_tools", tool)
            if meaning is not None:
                return str(meaning)
            if (target := self._targets.get(str(tool)) or self._tools.get(str(tool))) is not None:
                wanted.assumed.append(f"deployment_tools {tool} is the deploy target {target}")
                return target
        if len(names := set(self._targets.values())) == 1:
            wanted.assumed.append(f"deployment_tools {list(tools)}: the one deploy target, {min(names)}")
            return min(names)
        return None


def profile(entries: Sequence[Mapping[str, Any]], wanted: Wanted) -> dict[str, Any]:
    """Return the parameters of a profile, each of its type; a value that is not of its type stays text."""
    parameters: dict[str, Any] = {}
    for entry in entries:
        name, kind, text = str(entry["name"]), str(entry["type"] or "string").lower(), entry["value"]
        if text is None:
            wanted.changed.append(f"{name} is left out: it has no value")
            continue
        try:
            parameters[name] = _typed(str(text), kind)
        except ValueError:
            parameters[name] = str(text)
            wanted.problems.append(f"{name}: {text!r:.100} is no {kind}; it is kept as text")
    wanted.document = parameters
    return parameters


def _typed(text: str, kind: str) -> Any:
    word = text.strip()
    if kind.startswith(("str", "text", "varchar")):
        return text
    if kind.startswith("bool"):
        if word.lower() not in ("true", "false", "1", "0"):
            raise ValueError(word)
        return word.lower() in ("true", "1")
    if kind.startswith("int"):
        return int(word)
    if kind.startswith(("float", "double", "number", "decimal")):
        return float(word)
    raise ValueError(kind)


def deploy_target(row: Mapping[str, Any], mapping: ImportMap) -> Wanted:
    """Return a deploy target: Ollama, else a server with an address of its own."""
    wanted = wanted_name("deploy_targets", row["name"], f"deploy_targets {row['id']}", mapping)
    url = str(row["url"] or "").strip()
    if url and "://" not in url:
        url = f"http://{url}"
        wanted.changed.append(f"the address: {row['url']} there")
    kind = "ollama" if "ollama" in text_in(row["name"]).lower() else CUSTOM_TARGET
    wanted.document = {"name": wanted.name, "kind": kind, "url": url.rstrip("/")}
    return wanted
