"""Real bubblewrap for tests that contain processes."""

import pytest

from app.domain.containment import ContainmentWish, StageNetwork
from app.executor.containment.probe import Bubblewrap, find_containment


def bubblewrap(network: StageNetwork = StageNetwork.ALL) -> Bubblewrap:
    """Return what contains stages here; skip the test, with the reason, where nothing does."""
    found, program = find_containment(ContainmentWish.AUTO, StageNetwork.ALL)
    if program is None:
        pytest.skip(f"stages cannot be contained here (apt install bubblewrap): {found.detail}")
    return Bubblewrap(program.program, network)
