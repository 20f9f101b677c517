"""How many threads a loop of small steps is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Elements of a step from which several threads pay: waking one costs about as long as one core takes for half as many elements.
# Measured in docs/LOG.md.
WORTH = 2**18


@contextmanager
def for_steps_of(elements: int) -> Iterator[None]:
    """Compute in one thread within, if each step touches fewer elements than are worth sharing; threads are the process's, so only there."""
    threads = torch.get_num_threads()
    if threads == 1 or elements >= WORTH:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
