"""Everything around methods, wired once by the composition roots."""

from dataclasses import dataclass

from app.domain.enums import Platform
from app.registry.environments.described_options import OptionClasses
from app.registry.methods.code_reviews import CodeReviews
from app.registry.methods.copies import MethodCopies
from app.registry.methods.files import MethodFiles
from app.registry.methods.guide import MethodGuide
from app.registry.methods.preset_install import PresetInstaller
from app.registry.methods.restoring import MethodRestoring
from app.registry.methods.runs import MethodRuns
from app.registry.methods.samples import Samples
from app.registry.methods.script_reading import ScriptReader
from app.registry.methods.service import Clock, LicenceGate, MethodRegistry
from app.registry.methods.stage_files import StageFiles
from app.registry.methods.suggesting import MethodSuggestions
from app.registry.nodes.platforms import PlatformChoice
from app.registry.scripts.root import MAX_SCRIPT_BYTES, ScriptRoot
from app.registry.scripts.versions import VersionStore
from app.store.home import Home


@dataclass(frozen=True)
class MethodServices:
    """The services of methods; they share one script root, version store and clock."""

    files: MethodFiles
    reader: ScriptReader
    registry: MethodRegistry
    runs: MethodRuns
    copies: MethodCopies
    restoring: MethodRestoring
    stage_files: StageFiles
    options: OptionClasses
    guide: MethodGuide
    suggestions: MethodSuggestions
    presets: PresetInstaller
    code_reviews: CodeReviews


def method_services(
    *,
    home: Home,
    licence: LicenceGate,
    clock: Clock,
    machine: Platform,
    platform: PlatformChoice = "auto",
    max_script_bytes: int = MAX_SCRIPT_BYTES,
    samples: bool = True,
) -> MethodServices:
    """Return the services of the methods under `home`; `machine` is this machine's platform."""
    files = MethodFiles(
        ScriptRoot(home.scripts, max_bytes=max_script_bytes), VersionStore(home.versions, beside=home.base)
    )
    reader = ScriptReader(files)
    reviews = CodeReviews(files)
    registry = MethodRegistry(files=files, reader=reader, reviews=reviews, licence=licence, clock=clock)
    runs = MethodRuns(registry=registry, files=files)
    options = OptionClasses()
    return MethodServices(
        files=files,
        reader=reader,
        registry=registry,
        runs=runs,
        copies=MethodCopies(registry=registry, runs=runs, files=files, licence=licence),
        restoring=MethodRestoring(registry=registry, files=files),
        stage_files=StageFiles(registry=registry, files=files, reviews=reviews),
        options=options,
        guide=MethodGuide(registry=registry, files=files, reader=reader, options=options, clock=clock),
        suggestions=MethodSuggestions(files=files, options=options),
        presets=PresetInstaller(
            registry=registry,
            files=files,
            clock=clock,
            choice=platform,
            machine=machine,
            samples=Samples(home=home, clock=clock) if samples else None,
        ),
        code_reviews=reviews,
    )
