"""`deepe presets`: list, show and install the methods that the product ships."""

import json
from typing import Annotated

import typer

from app.cli.client import call_service, list_items, segment
from app.cli.command import DEFAULT_URL, AsJson, Url, typed
from app.cli.output import print_fields, print_table, write

app = typer.Typer(no_args_is_help=True, help="Methods that the product ships.")


PresetName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the preset.")]


@app.command("list")
def list_presets(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the shipped methods and what became of them here."""
    found = list_items(url, "/presets", as_json=as_json)
    rows = [
        (entry["name"], ", ".join(entry["platforms"]), _preset_state(entry), entry["description"]) for entry in found
    ]
    print_table(("name", "platforms", "", "description"), rows, nothing="No presets.")


@app.command("show")
def show_preset(name: PresetName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show a shipped method and what comes with it to try it."""
    found = call_service(url, lambda api: api.get(f"/presets/{segment(name)}"), as_json=as_json)
    samples = found["samples"]
    given = [f"-p {parameter}={json.dumps(value)}" for parameter, value in samples["parameters"].items()]
    chosen = f"-b {samples['base_model']} -d {samples['dataset']} --through {samples['through']}"
    ready = found["installed"] and samples["base_model"] and samples["dataset"]
    print_fields(
        {
            "Name": found["name"],
            "State": _preset_state(found),
            "Platforms": ", ".join(found["platforms"]),
            "Description": found["description"],
            "Samples": samples["detail"],
            "Data set": samples["dataset"],
            "Base model": samples["base_model"],
            "Try it": typed(" ".join(["jobs submit", found["name"], chosen, *given, "-w"])) if ready else None,
            "Then ask": "\n".join(samples["questions"]),
        }
    )


@app.command("install")
def install_preset(name: PresetName, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Install a shipped method with its samples, also what was deleted."""
    made = call_service(url, lambda api: api.post(f"/presets/{segment(name)}:install"), as_json=as_json)
    write(f"{made['id']}  {made['name']}\n")


def _preset_state(preset: dict[str, object]) -> str:
    if preset["removed"]:
        return "deleted here"
    if not preset["installed"]:
        return "not installed"
    return f"version {preset['installed_version']}"
