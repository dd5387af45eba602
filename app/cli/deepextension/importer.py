"""Brings what a DeepExtension database holds to a service, through its API: its rules and its licence apply.

Nothing is marked as imported. A thing is there already if one of its name says the same; another one of that name is
left as it is. So an import can be repeated at any time.
"""

import ast
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.cli.client import Api, segment
from app.cli.command import Misused
from app.cli.deepextension.destination import Destination, said_in
from app.cli.deepextension.documents import (
    BASE,
    Methods,
    Wanted,
    deploy_target,
    place,
    profile,
    wanted_name,
)
from app.cli.deepextension.lineage import Lineage, id_key
from app.cli.deepextension.mapping import VALUES, ImportMap, text_in
from app.cli.deepextension.report import Entry, Outcome, Report
from app.domain.definition import CUSTOM_TARGET
from app.domain.names import BASE_ENVIRONMENT
from app.store.deepextension import TABLES, Found, Row

EQUIPPED_BASE = "deepextension"
"""The shipped environment that has what DeepExtension's `base` has."""
_OF_BASE_MODELS = {
    "template": "give it to the deployment of a job",
    "inference": "questions to a model run the script of its method",
    "deploy_config": "a method says where its models are deployed",
}
"""What base models have there and not here."""

_NEEDS_LICENCE = "adding methods needs a commercial licence (deepe license install): the present one is {state}"
RowsOf = Callable[[Sequence[str], Path], int]
"""Writes the rows of a data set that the database holds into a file, and returns how many there are."""


@dataclass(frozen=True)
class Options:
    """How an import is done."""

    dry_run: bool
    tenant: str | None
    installation: Path | None
    profiles: Path


class Importer:
    """One run of an import. `report` tells what became of each thing, in the order in which they depend."""

    def __init__(self, api: Api, found: Found, mapping: ImportMap, options: Options, rows_of: RowsOf) -> None:
        self._api = api
        self._found = found
        self._mapping = mapping
        self._options = options
        self._rows_of = rows_of
        self._tenant = _tenant(found, options.tenant)
        self._environments = {one["name"] for one in api.items("/environments")}
        self._presets = {one["name"]: bool(one["installed"]) for one in api.items("/presets")}
        self._base = EQUIPPED_BASE if EQUIPPED_BASE in self._environments else BASE_ENVIRONMENT
        licence = api.get("/license")["state"]
        self._unlicensed = [] if licence == "valid" else [_NEEDS_LICENCE.format(state=licence)]
        self._targets: dict[str, str] = {}
        self._custom: set[str] = set()
        self._methods: dict[str, str] = {}
        self._base_models: dict[str, str] = {}
        self.report = Report(
            release=found.release,
            dry_run=options.dry_run,
            tenant=self._tenant,
            missing_tables=[table.name for key, table in TABLES.items() if found.rows[key] is None],
            missing_columns=found.missing_columns,
            values=self._values(),
        )
        self._to = Destination(api, mapping, self.report)

    def run(self) -> Report:
        """Take over everything."""
        methods = Methods(
            self._mapping, base=self._base, targets=self._targets, tools=self._tools(), custom=self._custom
        )
        self._take_deploy_targets()
        definitions = [(row, methods.definition(row, self._settings(row))) for row in self._own("methods", shared=True)]
        self._take_environments(methods)
        self._take_base_models()
        self._take_datasets()
        for row, wanted in definitions:
            self._take_method(row, wanted)
        self._take_profiles()
        self._take_models()
        return self.report

    # ---- what belongs to the tenant ---------------------------------------------------------------------------------

    def _own(self, table: str, *, shared: bool = False) -> list[Row]:
        """Return the rows of the tenant, those without one, and with `shared` those that others share with it."""
        given = {str(row["method"]) for row in self._found.of("shared_methods") if str(row["tenant"]) == self._tenant}
        return [
            row
            for row in self._found.of(table)
            if self._tenant is None
            or row.get("tenant") is None
            or str(row["tenant"]) == self._tenant
            or (shared and (str(row["uuid"]) in given or row.get("is_system")))
        ]

    def _settings(self, row: Row) -> Row | None:
        """Return the settings of a method: the tenant's own before those of another."""
        rows = [one for one in self._found.of("method_settings") if str(one["method"]) == str(row["uuid"])]
        own = [one for one in rows if str(one["tenant"]) == self._tenant]
        return next(iter(own or rows), None)

    def _tools(self) -> dict[str, str]:
        """Return the deploy target that a serving tool has, by the tool's id."""
        names = {text_in(row["name"]).lower(): text_in(row["name"]) for row in self._own("deploy_targets")}
        tools = {str(row["id"]): text_in(row["factory"]).lower() for row in self._found.of("deploy_tools")}
        return {number: names[factory] for number, factory in tools.items() if factory in names}

    def _values(self) -> dict[str, dict[str, Any]]:
        """Return the numbers whose meaning is not published: how often each is there, and what it was taken for."""
        settings = self._found.of("method_settings")
        found: dict[str, dict[str, Any]] = {}
        for name in VALUES.keys() - {"model_type"}:
            several = (row[name] if isinstance(row[name], list) else [row[name]] for row in settings)
            counts = Counter(str(value) for values in several for value in values)
            found[name] = {
                value: {"count": count, "meaning": self._mapping.meaning(name, value)[0]}
                for value, count in sorted(counts.items())
            }
        return found

    # ---- each kind --------------------------------------------------------------------------------------------------

    def _take_environments(self, methods: Methods) -> None:
        sources = {methods.environment(row["name"]): f"environments {row['id']}" for row in self._own("environments")}
        for here, there in methods.environments.items():
            entry = self._to.entry("environments", Wanted(sources.get(here, "methods"), here))
            if here != there:
                entry.changed.append(f"{there} there")
            elif here == BASE:
                entry.assumed.append("DeepExtension's base has torch, trl, requests, redis; base here is plain Python")
            if here in self._environments:
                entry.outcome = Outcome.PRESENT
            elif self._to.is_wanted(entry):
                self._to.make(entry, partial(self._api.post, "/environments", {"name": here}))

    def _take_deploy_targets(self) -> None:
        newest = {text_in(row["name"]): row for row in self._own("deploy_targets")}
        for row in self._own("deploy_targets"):
            wanted = deploy_target(row, self._mapping)
            entry = self._to.entry("deploy_targets", wanted)
            if newest[text_in(row["name"])] is not row:
                entry.outcome = Outcome.LEFT_OUT
                entry.changed.append("a newer entry of the same tool counts")
                continue
            self._to.put(entry, "/deploy-targets", wanted.document, compared=("kind", "url"))
            if entry.outcome in (Outcome.TAKEN, Outcome.PRESENT):
                self._targets[str(row["id"])] = wanted.name
                if wanted.document["kind"] == CUSTOM_TARGET:
                    self._custom.add(wanted.name)

    def _take_base_models(self) -> None:
        folders: set[str] = set(self._api.get("/base-models:unregistered")["items"])
        folders |= {one["path"].removeprefix("models/") for one in self._api.items("/base-models")}
        for row in self._own("base_models"):
            wanted = wanted_name("base_models", row["name"], f"base_models {row['id']}", self._mapping)
            path = self._model_folder(row["path"])
            entry = self._to.entry("base_models", wanted)
            if path is None:
                entry.problems.append(f"its path does not lie in models/: {row['path']!r} (folders of the map)")
            for column, cure in _OF_BASE_MODELS.items():
                if row[column] not in (None, "", {}, []):
                    entry.changed.append(f"its {column} is left out: {cure}")
            description = text_in(row["title"]) if text_in(row["title"]) != wanted.name else ""
            document = {"name": wanted.name, "path": path, "description": description}
            known = {"path": f"models/{path}"}
            missing = [] if path in folders else [f"no whole model lies in models/{path}"]
            self._to.put(
                entry, "/base-models", document, compared=("path",), as_read=known, check=partial(list, missing)
            )
            if entry.outcome in (Outcome.TAKEN, Outcome.PRESENT):
                for key in (row["name"], text_in(row["title"]), path, id_key(row["id"])):
                    self._base_models.setdefault(str(key), wanted.name)

    def _model_folder(self, path: Any) -> str | None:
        """Return a folder relative to `models/`; a path without any folder is one of it."""
        found = place(path, "models", self._mapping)
        return found or (place(f"models/{path}", "models", self._mapping) if path else None)

    def _take_datasets(self) -> None:
        for row in self._own("datasets"):
            wanted = wanted_name("datasets", row["name"], f"datasets {row['uuid']}", self._mapping)
            entry = self._to.entry("datasets", wanted)
            files = [one for one in self._found.of("files") if str(one["belongs_to"]) == str(row["uuid"])]
            names = [str(row["uuid"]), *(str(one["uuid"]) for one in files)]
            with tempfile.TemporaryDirectory(prefix="deepe-import-") as folder, said_in(entry):
                self._take_dataset(entry, row, self._candidates(row, files, names), names, Path(folder))

    def _candidates(self, row: Row, files: Sequence[Row], names: Sequence[str]) -> list[str]:
        """Return where the file may lie, relative to `datasets/`: as it is written, else in the usual layout."""
        written = [place(one["path"], "datasets", self._mapping) for one in files]
        usual = [f"{env}/{row['tenant']}/{name}.jsonl" for env in ("prod", "test", "dev") for name in names]
        return [one for one in dict.fromkeys([*written, *usual]) if one is not None]

    def _take_dataset(
        self, entry: Entry, row: Row, candidates: Sequence[str], names: Sequence[str], folder: Path
    ) -> None:
        if not self._to.is_wanted(entry):
            return
        there = self._to.there("/datasets", entry.name)
        if there is not None and there["path"].removeprefix("datasets/") in candidates:
            entry.outcome, entry.id = Outcome.PRESENT, there["id"]
            return
        for path in candidates:
            checked = self._api.post("/datasets:validate", {"path": path, "name": None if there else entry.name})
            if any(one["code"] == "path_not_found" for one in checked["violations"]):
                continue
            document = {"name": entry.name, "path": path, "description": str(row["description"] or "")}
            problems = [f"{one['pointer']}: {one['detail']}" for one in checked["violations"]]
            known = {"path": f"datasets/{path}"}
            self._to.put(entry, "/datasets", document, compared=("path",), as_read=known, problems=problems)
            return
        file = self._local_dataset(entry, candidates, names, folder)
        if file is None:
            entry.problems.append(f"no file of it: looked for datasets/{', datasets/'.join(candidates)}")
            return
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._to.put(entry, "/datasets", {}, compared=("digest",), as_read={"digest": digest},
                  create=lambda: self._api.put_file(f"/datasets/{segment(entry.name)}/file", file))  # fmt: skip

    def _local_dataset(
        self, entry: Entry, candidates: Sequence[str], names: Sequence[str], folder: Path
    ) -> Path | None:
        """Return the file in the installation's folder, else one with the rows that the database holds."""
        root = self._options.installation
        for path in candidates if root is not None else ():
            assert root is not None
            if (file := root / "datasets" / path).is_file():
                entry.changed.append(f"it is uploaded from {file}")
                return file
        file = folder / "rows.jsonl"
        if count := self._rows_of(names, file):
            entry.changed.append(f"its {count} rows come from the database: there is no file")
            return file
        return None

    def _take_method(self, row: Row, wanted: Wanted) -> None:
        if wanted.name in self._presets and wanted.name not in self._mapping.names.get("methods", {}).values():
            wanted.changed.append(f"the name: {wanted.name} is a method that this product ships")
            wanted.name = wanted.document["name"] = f"{wanted.name}-DeepExtension"
        entry = self._to.entry("methods", wanted)
        if not wanted.document["stages"]:
            entry.problems.append("it has no file that could be run (methods of the map can name one)")
        uploads: dict[str, bytes] = {}
        with said_in(entry):
            uploads = {} if wanted.problems else self._scripts(wanted, entry)

        def create() -> Any:
            for path, content in uploads.items():
                self._api.put_bytes(f"/scripts/{segment(path)}", content)
            return self._api.post("/methods", wanted.document)

        self._to.put(
            entry, "/methods", wanted.document,
            compared=("training_type", "lifecycle", "stages", "inference", "deployment"),
            problems=self._unlicensed, check=lambda: self._method_problems(wanted, uploads), create=create,
        )  # fmt: skip
        came_from_it = entry.outcome in (Outcome.TAKEN, Outcome.PRESENT)
        if entry.outcome is Outcome.KEPT:  # imported before and changed since, if it says so
            came_from_it = str(row["uuid"]) in self._to.there("/methods", wanted.name)["description"]
        if came_from_it:
            self._methods[str(row["uuid"])] = wanted.name
        elif self._presets.get(there := text_in(row["name"])):
            self._methods[str(row["uuid"])] = there  # what this product ships under the name

    def _scripts(self, wanted: Wanted, entry: Entry) -> dict[str, bytes]:
        """Return the files that are to be uploaded: those that the service has not."""
        uploads: dict[str, bytes] = {}
        stages = [*wanted.document["stages"].values(), wanted.document.get("deployment") or {}]
        for path in dict.fromkeys(stage["file"] for stage in stages if stage.get("file")):
            training = wanted.document["stages"].get("training") or {}
            kept = wanted.script if path == training.get("file") else None
            there = self._api.bytes_or_none(f"/scripts/{segment(path)}")
            if there is not None:
                if kept is not None and there[0] != kept:
                    entry.problems.append(f"the script root has another {path}; it stays as it is")
                continue
            local = self._options.installation and self._options.installation / "deep-e-python" / path
            if kept is not None:
                uploads[path] = kept
            elif local is not None and local.is_file():
                uploads[path] = local.read_bytes()
                entry.changed.append(f"{path} is uploaded from {local}")
            else:
                entry.problems.append(f"the script root has no {path}; put it there, or name the --installation")
            if path in uploads and not _is_python(uploads[path]):
                entry.problems.append(f"{path} is no Python file; nothing of it is uploaded")
        return uploads

    def _method_problems(self, wanted: Wanted, uploads: Mapping[str, bytes]) -> list[str]:
        """Return what the service would say, without what the import itself will have made until then."""
        found = self._api.post("/methods:validate", wanted.document)["violations"]
        stages = {**wanted.document["stages"], "deployment": wanted.document.get("deployment") or {}}
        target = stages["deployment"].get("target")
        planned = {
            "unknown_environment": any(
                stage.get("conda_env") in self._to.planned["environments"] for stage in stages.values()
            ),
            "file_not_found": bool(uploads),
            "unknown_deploy_target": target in self._to.planned["deploy_targets"],
        }
        return [f"{one['pointer']}: {one['detail']}" for one in found if not planned.get(one["code"])]

    def _take_profiles(self) -> None:
        entries = self._own("profile_entries")
        for row in self._own("profiles"):
            wanted = wanted_name("profiles", row["name"], f"profiles {row['uuid']}", self._mapping)
            own = [one for one in entries if str(one["profile"]) == str(row["uuid"])]
            content = json.dumps(profile(own, wanted), ensure_ascii=False, indent=2) + "\n"
            file = self._options.profiles / f"{wanted.name}.json"
            entry = self._to.entry("profiles", wanted)
            notes, entry.problems = entry.problems, []
            if not self._to.is_wanted(entry):
                continue
            entry.id = str(file)
            if file.exists():
                entry.outcome = Outcome.PRESENT if file.read_text("utf-8") == content else Outcome.KEPT
            else:
                entry.outcome = Outcome.TAKEN
                if not self._options.dry_run:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(content, "utf-8")
            entry.problems = notes

    def _take_models(self) -> None:
        lineage = Lineage(self._own("models"), self._found, self._mapping, self._base_models, self._methods)
        self.report.values["model_type"] = lineage.model_types()
        for row, wanted in lineage.wanted():
            entry = self._to.entry("models", wanted)
            if row["is_deleted"]:
                entry.outcome = Outcome.LEFT_OUT
                entry.problems = []
                entry.changed.append("it is deleted there")
                continue
            path, state = wanted.document.get("path"), wanted.document.get("state")
            self._to.put(
                entry, "/models", wanted.document, compared=("state", "path"),
                as_read={"state": state, "path": None if path is None else f"models/{path}"},
                check=partial(self._model_problems, wanted.document),
            )  # fmt: skip
            if entry.outcome in (Outcome.TAKEN, Outcome.PRESENT):
                lineage.taken(row, wanted)

    def _model_problems(self, document: Mapping[str, Any]) -> list[str]:
        planned = {
            "/base_model": self._to.planned["base_models"],
            "/method": self._to.planned["methods"],
            "/parent": self._to.planned["models"],
        }
        found = self._api.post("/models:validate", document)["violations"]
        return [
            f"{one['pointer']}: {one['detail']}"
            for one in found
            if document.get(one["pointer"][1:]) not in planned.get(one["pointer"], ())
        ]


def _is_python(content: bytes) -> bool:
    """Return whether the service would take the bytes as a script."""
    try:
        ast.parse(content.decode())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _tenant(found: Found, wanted: str | None) -> str | None:
    """Return the tenant whose things are taken. Raises `Misused` if there are several and none was named."""
    owned = [row for key in TABLES if key != "shared_methods" for row in found.of(key)]
    tenants = sorted({str(row["tenant"]) for row in owned if row.get("tenant") is not None})
    if wanted is not None and wanted not in tenants:
        raise Misused(f"There is no tenant {wanted}; there are {', '.join(tenants) or 'none'}.")
    if wanted is None and len(tenants) > 1:
        raise Misused(
            f"The database has several tenants: {', '.join(tenants)}.",
            notes=("Say with --tenant whose things are to be taken; run it once for each.",),
        )
    return wanted or next(iter(tenants), None)
