"""`compose.yaml`: valid, complete in itself, without secrets."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.ops.test_image import subcommands

ROOT = Path(__file__).parents[2]
SECRETS = ("DEEPE_API_TOKEN", "POSTGRES_PASSWORD")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "compose.yaml").read_text("utf-8")


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text)["services"]
    return found


def test_has_api_worker_postgres_and_redis(services: dict[str, Any]) -> None:
    assert set(services) == {"api", "worker", "postgres", "redis"}


def test_waits_only_for_services_that_can_say_they_are_healthy(services: dict[str, Any]) -> None:
    image_has_check = "HEALTHCHECK" in (ROOT / "Dockerfile").read_text("utf-8")
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            check = services[name].get("healthcheck", {"test": image_has_check and "build" in services[name]})
            assert check.get("test")


def test_declares_every_volume_that_it_mounts(text: str, services: dict[str, Any]) -> None:
    mounted = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())}

    assert mounted == set(yaml.safe_load(text)["volumes"])


def test_runs_commands_that_exist(services: dict[str, Any]) -> None:
    ours = {name: service["command"][0] for name, service in services.items() if "build" in service}

    assert ours == {"api": "serve", "worker": "worker"}
    assert set(ours.values()) <= subcommands()


def test_sets_only_variables_that_the_service_reads(services: dict[str, Any]) -> None:
    names = {name for service in services.values() if "build" in service for name in service["environment"]}

    assert {name.removeprefix("DEEPE_").lower() for name in names} <= set(Settings.model_fields)


def test_gives_api_and_worker_the_same_home_and_servers(services: dict[str, Any]) -> None:
    api, worker = services["api"], services["worker"]

    token = {"DEEPE_API_TOKEN"}
    assert {name: value for name, value in api["environment"].items() if name not in token}.items() <= worker[
        "environment"
    ].items()
    assert token.isdisjoint(worker["environment"])
    assert "home:/data" in api["volumes"]
    assert "home:/data" in worker["volumes"]


@pytest.mark.parametrize("secret", SECRETS)
def test_demands_every_secret_and_has_no_default(text: str, secret: str) -> None:
    uses = re.findall(rf"\$\{{{secret}([^}}]*)\}}", text)

    assert uses
    assert all(use.startswith(":?") for use in uses)


def test_opens_no_port_to_other_machines(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_pins_the_images_of_others(services: dict[str, Any]) -> None:
    images = [service["image"] for service in services.values() if "build" not in service]

    assert all(re.search(r":\d", image) for image in images)


def test_database_url_is_one_that_the_service_takes(services: dict[str, Any]) -> None:
    url = re.sub(r"\$\{[^}]*\}", "abc123", services["api"]["environment"]["DEEPE_DATABASE_URL"])

    assert Settings(database_url=url).database_url == "postgresql+asyncpg://deepe:abc123@postgres:5432/deepe"
