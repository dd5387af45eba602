"""Which accelerators a stage sees: those that its attempt holds, and no others."""

from collections.abc import Collection, Mapping, Sequence

from app.domain.accelerators import Accelerator, AcceleratorKind


def pinned(held: Collection[str], accelerators: Sequence[Accelerator]) -> Mapping[str, str]:
    """Return the variables that show a stage the accelerators `held` of a node that has these.

    CUDA cards are named by their uuid, which means the same card whatever the worker itself may see; with none, every
    card is hidden. An Apple chip cannot be hidden, and a simulated one cannot be seen.
    """
    variables = {"DEEPE_ACCELERATORS": ",".join(held)}
    if any(one.kind is AcceleratorKind.CUDA for one in accelerators):
        variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(held)}
    return variables
