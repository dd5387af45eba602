"""What a stage sees of the node's accelerators."""

from pathlib import Path

import pytest

from app.domain.accelerators import Accelerator, AcceleratorKind
from app.executor.attempts.pinning import pinned
from app.executor.environments.activation import stage_environment
from tests.job_rows import cards

CUDA, APPLE, SIMULATED = (cards(2, kind=kind) for kind in AcceleratorKind)


@pytest.mark.parametrize(
    ("held", "accelerators", "variables"),
    [
        (["card-1"], CUDA, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "card-1"}),
        (["card-0", "card-1"], CUDA, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "card-0,card-1"}),
        ([], CUDA, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ""}),
        (["card-0"], APPLE, {}),
        (["card-0"], SIMULATED, {}),
        ([], [], {}),
    ],
)
def test_stage_sees_what_its_attempt_holds(
    held: list[str], accelerators: list[Accelerator], variables: dict[str, str]
) -> None:
    assert pinned(held, accelerators) == {"DEEPE_ACCELERATORS": ",".join(held), **variables}


def test_pins_win_over_what_the_worker_was_started_with(tmp_path: Path) -> None:
    base = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}

    seen = stage_environment(base, tmp_path, pinned(["card-1"], CUDA))

    assert seen["CUDA_VISIBLE_DEVICES"] == "card-1"
    assert seen["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
