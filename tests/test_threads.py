"""Threads within a loop of small steps, and after it."""

from collections.abc import Iterator

import pytest
import torch

from matquant.threads import WORTH, for_steps_of


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_steps_take_one_thread_and_large_ones_all() -> None:
    for elements, threads in ((WORTH - 1, 1), (WORTH, 3)):
        with for_steps_of(elements):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 3


def test_an_error_within_gives_them_back() -> None:
    with pytest.raises(KeyError), for_steps_of(1):
        raise KeyError
    assert torch.get_num_threads() == 3


def test_loops_within_loops() -> None:
    with for_steps_of(1):
        with for_steps_of(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
