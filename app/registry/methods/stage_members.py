"""What a definition names for its stages, and where it does."""

from app.domain.call_rules import valid_module
from app.domain.definition import MethodDefinition
from app.domain.kinds import KINDS, Member, Stage
from app.domain.pointers import pointer
from app.registry.methods.trees import pointer_of


def stage_files(definition: MethodDefinition) -> dict[Stage, str]:
    """Return the file that each stage of the method names, in the order of the stages."""
    named = definition.own_stages().items()
    return {stage: config.file for stage, config in named if config.file and config.file.strip()}


def stage_modules(definition: MethodDefinition) -> dict[Stage, str]:
    """Return the module that each stage of the method names, in the order of the stages."""
    return {
        stage: config.module
        for stage, config in definition.own_stages().items()
        if config.module and valid_module(config.module) and not config.file
    }


def stage_environments(definition: MethodDefinition) -> dict[Stage, str]:
    """Return the environment that each stage of the method names, in the order of the stages."""
    named = definition.own_stages().items()
    return {stage: config.conda_env for stage, config in named if config.conda_env and config.conda_env.strip()}


def file_pointer(stage: Stage) -> str:
    """Return where a definition names the file of `stage`."""
    return member_pointer(stage, "file")


def member_pointer(stage: Stage, member: str) -> str:
    """Return where a definition has a member of `stage`."""
    return pointer_of(stage_pointer(stage), member)


def stage_pointer(stage: Stage) -> str:
    """Return where a definition has `stage`."""
    return pointer("stages", stage) if KINDS[stage].member is Member.STAGES else pointer("deployment")
