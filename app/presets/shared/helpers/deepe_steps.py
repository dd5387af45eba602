"""One step, however its rows are spread over forward passes and processes: each row counts as much as any other."""

from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """What a forward pass has of its step, as a multiple of what it would have if all were equal."""

    rows: float = 1.0
    tokens: float = 1.0


def of_whole_steps(trainer_class: Any) -> Any:
    """Return the class with the share that each forward pass has of its step.

    TRL takes the mean of the means of forward passes: short answers would count more, and a step would be another one
    when its rows are spread in another way. A subclass says with `sizes_of` what rows and tokens a batch has.
    """
    import torch

    class OfWholeSteps(trainer_class):  # type: ignore[misc]
        share = Share()

        def sizes_of(self, batch: dict[str, Any]) -> tuple[int, int]:
            raise NotImplementedError

        def get_batch_samples(self, iterator: Any, count: int, device: Any) -> tuple[list[Any], Any]:
            batches, items = super().get_batch_samples(iterator, count, device)
            own = torch.tensor([self.sizes_of(batch) for batch in batches], dtype=torch.float64, device=device)
            passes = torch.tensor([float(len(batches))], dtype=torch.float64, device=device)
            whole = torch.cat([own.sum(0), passes])
            whole = self.accelerator.reduce(whole, "sum") if batches else whole
            self._shares = deque(Share(*(sizes * whole[2] / whole[:2]).tolist()) for sizes in own)
            return batches, items

        def next_share(self) -> Share:
            self.share = self._shares.popleft() if self.model.training else Share()
            return self.share

    return OfWholeSteps
