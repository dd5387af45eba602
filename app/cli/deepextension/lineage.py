"""Models of a DeepExtension database with the trainings, savings and deployments that made them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.cli.deepextension.documents import Wanted, moment, place, wanted_name
from app.cli.deepextension.mapping import ImportMap
from app.domain.enums import ModelState
from app.store.deepextension import Found, Row


class Lineage:
    """Models in the order in which they were made from one another.

    `base_models` and `methods` are the names here, by what DeepExtension calls them by.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        found: Found,
        mapping: ImportMap,
        base_models: Mapping[str, str],
        methods: Mapping[str, str],
    ) -> None:
        self._rows = rows
        self._mapping = mapping
        self._base_models = base_models
        self._methods = methods
        self._savings = {str(row["task"]): row for row in found.of("savings")}
        self._deployments = {str(row["task"]): row for row in found.of("deployments")}
        jobs = {str(row["job"]): row for row in found.of("trainings")}
        tasks = {str(row["task"]): str(row["job"]) for row in found.of("training_tasks")}
        self._trainings = {task: jobs[job] for task, job in tasks.items() if job in jobs}
        self._states = {
            **dict.fromkeys(self._trainings, ModelState.CUSTOMIZED),
            **dict.fromkeys(self._savings, ModelState.COMPLETE),
            **dict.fromkeys(self._deployments, ModelState.ONLINE),
        }
        # what the tasks say of some models tells what the numbers of the others mean
        self._meanings = {
            str(row["type"]): self._states[str(row["task"])] for row in rows if str(row["task"]) in self._states
        }
        self._taken: dict[str, str] = {}

    def model_types(self) -> dict[str, dict[str, Any]]:
        """Return how often each number is there, and what it was taken for."""
        counts = Counter(str(row["type"]) for row in self._rows)
        return {number: {"count": count, "meaning": self._told(number)} for number, count in sorted(counts.items())}

    def wanted(self) -> Iterator[tuple[Row, Wanted]]:
        """Yield each model; those that it was made from come before it."""
        for state in (*ModelState, None):
            for row in self._rows:
                task = str(row["task"])
                if self._states.get(task, self._told(str(row["type"]))) == state:
                    made_by = self._savings.get(task) or self._deployments.get(task) or {}
                    yield row, self._document(row, state, made_by, self._training(row, made_by))

    def taken(self, row: Row, wanted: Wanted) -> None:
        """Say that a model is here now: others may be made from it."""
        for key in (row["task"], wanted.document.get("path")):
            if key is not None:
                self._taken.setdefault(str(key), wanted.name)

    def _told(self, number: str) -> Any:
        return self._mapping.meaning("model_type", number)[0] or self._meanings.get(number)

    def _training(self, row: Row, made_by: Row) -> Row | None:
        """Return what trained the model, or what it was made from."""
        source = self._savings.get(str(made_by.get("saving")), made_by)
        return self._trainings.get(str(source.get("training") or row["task"]))

    def _document(self, row: Row, state: ModelState | None, made_by: Row, training: Row | None) -> Wanted:
        wanted = wanted_name("models", row["name"], f"models {row['task']}", self._mapping)
        if state is None:
            wanted.problems.append(f"model_type {row['type']}: say its state (values.model_type of the map)")
        elif str(row["task"]) not in self._states:
            wanted.assumed.append(f"{state}, by its model_type {row['type']}: what made it is not known")
        document: dict[str, Any] = {
            "name": wanted.name,
            "state": state,
            "base_model": self._base_of(row, made_by),
            "method": self._method_of(made_by, training),
            "parent": self._parent_of(made_by, wanted),
            "parameters": _parameters(training),
            "origin": {"system": "DeepExtension", "task": str(row["task"])},
            "made_at": moment(row["created_at"]),
        }
        if document["base_model"] is None:
            wanted.problems.append(f"its base model is not here: {row['base_model'] or row['base_path']!r}")
        if document["method"] is None:
            wanted.problems.append("its method is not here")
        if state is ModelState.ONLINE:
            document |= {"url": str(made_by.get("server_url") or ""), "quantize": made_by.get("quantize")}
        else:
            path = row["path"] or made_by.get("save_path")
            document["path"] = place(path, "models", self._mapping)
            if document["path"] is None:
                wanted.problems.append(f"its path does not lie in models/: {path!r} (folders of the map)")
        wanted.document = {key: value for key, value in document.items() if value is not None}
        return wanted

    def _base_of(self, row: Row, made_by: Row) -> str | None:
        paths = (place(path, "models", self._mapping) for path in (row["base_path"], made_by.get("base_model_path")))
        keys = (row["base_model"], *paths, id_key(made_by.get("base_model_id")))
        return next((self._base_models[str(key)] for key in keys if key and str(key) in self._base_models), None)

    def _method_of(self, made_by: Row, training: Row | None) -> str | None:
        keys = (made_by.get("method"), (training or {}).get("method"))
        return next((self._methods[str(key)] for key in keys if key and str(key) in self._methods), None)

    def _parent_of(self, made_by: Row, wanted: Wanted) -> str | None:
        """Return the model that it was made from: by the task that made that one, else by its folder."""
        folders = (made_by.get("lora_adapter_path"), made_by.get("save_model_path"))
        paths = [place(path, "models", self._mapping) for path in folders]
        keys = [str(key) for key in (made_by.get("saving"), made_by.get("training"), *paths) if key]
        parent = next((self._taken[key] for key in keys if key in self._taken), None)
        if keys and parent is None:
            wanted.assumed.append("what it was made from is not here: it stands alone")
        return parent


def id_key(number: Any) -> str:
    """Return the key of an id among names and paths."""
    return f"id {number}"


def _parameters(training: Row | None) -> dict[str, Any]:
    """Return what a training was called with."""
    for name in ("job_parameters", "task_parameters"):
        if isinstance(value := (training or {}).get(name), dict):
            return value
    return {}
