"""The processes of one run: those that `accelerate launch` or torchrun started, or one alone.

All processes of a run go the same way; whatever these methods give is the same in each of them, and none returns before all have called it.
"""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from matquant.errors import MatquantError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while one measures or writes; a process that dies is the launcher's to notice


@dataclass(frozen=True)
class World:
    """rank: of this process among `size`. local: its number on its machine, and that of its GPU."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @staticmethod
    def join(device: torch.device) -> "World":
        """The processes that a launcher's environment variables tell of."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        return World(state.process_index, state.num_processes, state.local_process_index)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def place(self, device: torch.device) -> torch.device:
        """This process's own of several GPUs, where no GPU is named."""
        return torch.device(device.type, self.local) if self.size > 1 and device.type == "cuda" and device.index is None else device

    def count(self, total: int) -> int:
        """How many of `total` things fall to this process: those at rank, rank + size, ..."""
        return len(range(self.rank, total, self.size))

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself, now holding the sum of all processes'."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def total(self, number: int | float) -> float:
        """The sum of every process's number."""
        return float(sum(self.gather(number)))

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def same(self, value: T) -> T:
        """The first process's value."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def once(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it. Raises in every process what it raises there."""
        outcome: Any = None
        failed = None
        if self.first:
            try:
                outcome = work()
            except MatquantError as error:
                failed = error
        outcome, failed = self.same((outcome, failed))
        if failed is not None:
            raise failed
        return outcome

    def leave(self) -> None:
        """The end of a run that went well. One process of several ends here, without the shutdown of its interpreter.

        Gloo's threads live on where a cache of torch's still knows the group (DTensor's does), and one that lets go of a tensor while the
        interpreter shuts down aborts the process: https://github.com/pytorch/pytorch/pull/179291
        """
        if self.size > 1:
            distributed.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


ALONE = World()


def union(parts: Iterable[dict[Any, T]]) -> dict[Any, T]:
    """All entries; of two with one key the later."""
    return {key: value for part in parts for key, value in part.items()}
