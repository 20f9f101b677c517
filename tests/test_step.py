"""The native step against transformers on texts of several chunks, for heads of many shapes and every instruction set at hand."""

from typing import Any

import pytest
import torch
import transformers

from matquant import llama
from matquant.errors import InputError
from matquant.kernels import cpu
from matquant.kernels.step import PARTS

LENGTH = 150  # three chunks of 64 positions, the last in part
SHAPES = {  # heads, heads of keys, size of a head
    "one head": (1, 1, 64),
    "a head for each of keys": (4, 4, 8),
    "three share": (6, 2, 20),
    "more share than pass together": (20, 1, 16),
    "sizes beyond a block of values": (2, 1, 80),
}


def model_of(heads: int, kv_heads: int, size: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=240, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size,
        vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(heads)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "_proj" in name:
            parameter.data *= 8  # scores that differ: attention to few positions
    return model


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_several_chunks(shape: str, isa: str) -> None:
    model = model_of(*SHAPES[shape])
    stepper, ids, places = llama.rounded_stepper(model, -1, isa), torch.randint(0, 128, (LENGTH,)), torch.arange(LENGTH)
    widths, x = stepper.widths([dict.fromkeys(PARTS, 8)] * 2), model.get_input_embeddings().weight.data[ids]
    with torch.inference_mode():
        want = model(ids[None]).logits[0]
    cache = stepper.cache(2, LENGTH)
    for part in (cache.keys, cache.values):
        part.fill_(torch.nan)  # what no token has reached must not count
    whole = stepper.step(widths, x, torch.ones_like(places), places, cache, places, exact=True, threads=2)
    torch.testing.assert_close(whole, want, rtol=2e-3, atol=2e-3)
    # the same bit for bit in parts of many and of few rows, and by any number of threads
    again, at = stepper.cache(2, LENGTH), 0
    for count, threads in ((64, 1), (3, 2), (1, 3), (1, 1), (60, 3), (5, 2), (16, 1)):
        own = places[at : at + count]
        got = stepper.step(widths, x[own], torch.ones_like(own), own, again, torch.arange(count), exact=True, threads=threads)
        assert torch.equal(got, whole[own])
        at += count
    assert at == LENGTH


def test_rows_that_are_not_there() -> None:
    model = model_of(1, 1, 64)
    stepper, zero = llama.rounded_stepper(model, -1, "scalar"), torch.zeros(2, dtype=torch.long)
    arguments = stepper.widths([dict.fromkeys(PARTS, 8)] * 2), torch.zeros(2, 240), zero, torch.arange(2), stepper.cache(1, 2)
    assert stepper.step(*arguments, torch.tensor([1, 1, 0])).shape == (3, 128)
    with pytest.raises(InputError, match=r"rows are \[0, 2\], and there are 2; choose from 0 to 1"):
        stepper.step(*arguments, torch.tensor([0, 2]))
