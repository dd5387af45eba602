"""How a node contains what stages can see and touch: what it is asked for, and what it does."""

from enum import StrEnum

from pydantic import ConfigDict, Field

from app.domain.values import Value


class ContainmentWish(StrEnum):
    """What the operator of a node asks for."""

    AUTO = "auto"  # where this machine can
    OFF = "off"
    BUBBLEWRAP = "bubblewrap"  # or the worker does not start


class ContainmentMode(StrEnum):
    """What the node does."""

    OFF = "off"
    BUBBLEWRAP = "bubblewrap"


class StageNetwork(StrEnum):
    """What stages reach."""

    ALL = "all"  # whatever the worker's machine does
    NONE = "none"  # a loopback of their own


class ContainmentReason(StrEnum):
    """Why a node does not contain stages."""

    SWITCHED_OFF = "switched_off"
    NOT_LINUX = "not_linux"
    NOT_INSTALLED = "not_installed"
    PROBE_FAILED = "probe_failed"


class Containment(Value):
    """How the stages of a node are contained."""

    model_config = ConfigDict(frozen=True)

    mode: ContainmentMode = Field(description="`bubblewrap`: a stage sees what it needs, and its own processes only.")
    network: StageNetwork = Field(description="`none`: stages but deployments have a loopback of their own only.")
    user: str | None = Field(default=None, description="Account that stages run as; null: the worker's.")
    reason: ContainmentReason | None = Field(default=None, description="Why stages are not contained.")
    detail: str = Field(default="", description="What the probe said.", examples=["bwrap: No permissions"])
