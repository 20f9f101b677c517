"""Decode of a random model of Llama's shape, a CUDA graph a width on one copy of the planes, against the same model in 16 bits."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matquant.kernels.gpu import ops
from matquant.kernels.gpu.graphs import PlanGraphs
from matquant.kernels.gpu.layout import TiledWeight
from matquant.kernels.gpu.tune import random_weight

Linear = Callable[[Tensor], Tensor]
THETA = 500000.0  # Llama-3's rotary base


class Shape(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a block's layers, q k v and gate up fused."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head
        return {
            "qkv": (qkv, self.hidden), "o": (self.hidden, self.heads * self.head), "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }  # fmt: skip


@dataclass
class Tiled:
    """A layer from planes, read at `bits`."""

    tiles: TiledWeight | None
    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        assert self.tiles is not None
        return ops.linear(x, self.tiles, self.bits)


@dataclass
class Decoder:
    """One sequence, one token a step; what it reads and writes stays where it is."""

    shape: Shape
    blocks: Sequence[dict[str, Linear]]
    embedding: Tensor  # [vocabulary, hidden], also of the head
    keys: Tensor  # [layers, 1, kv_heads, context, head]
    values: Tensor
    token: Tensor  # [1]
    position: Tensor  # [1]

    @staticmethod
    def of(shape: Shape, blocks: Sequence[dict[str, Linear]], context: int, dtype: torch.dtype, device: torch.device) -> "Decoder":
        cache = (shape.layers, 1, shape.kv_heads, context, shape.head)
        embedding = torch.randn(shape.vocabulary, shape.hidden, device=device).to(dtype)
        keys, values = torch.zeros(cache, dtype=dtype, device=device), torch.zeros(cache, dtype=dtype, device=device)
        return Decoder(shape, blocks, embedding, keys, values, torch.zeros(1, dtype=torch.long, device=device),
                       torch.full((1,), context // 2, device=device))  # fmt: skip

    def step(self) -> Tensor:
        """Logits [1, vocabulary]."""
        x = self.embedding[self.token]
        seen = torch.arange(self.keys.shape[3], device=x.device) <= self.position
        for index, block in enumerate(self.blocks):
            x = x + block["o"](self._attend(block["qkv"](_norm(x)), index, seen))
            gate, up = block["gate_up"](_norm(x)).chunk(2, -1)
            x = x + block["down"](torch.nn.functional.silu(gate) * up)
        return _norm(x) @ self.embedding.T

    def _attend(self, qkv: Tensor, index: int, seen: Tensor) -> Tensor:
        s = self.shape
        q, k, v = (part.reshape(1, -1, 1, s.head) for part in qkv.split([s.heads * s.head, s.kv_heads * s.head, s.kv_heads * s.head], -1))
        self.keys[index].index_copy_(2, self.position, self._turn(k))
        self.values[index].index_copy_(2, self.position, v)
        found = torch.nn.functional.scaled_dot_product_attention(
            self._turn(q), self.keys[index], self.values[index], attn_mask=seen[None, None, None], enable_gqa=True
        )
        return found.reshape(1, -1)

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary positions."""
        half = x.shape[-1] // 2
        angle = self.position * THETA ** (-torch.arange(half, device=x.device) / half)
        cosine, sine, (a, b) = angle.cos(), angle.sin(), x.float().chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(x.dtype)


def _norm(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


def tokens_per_second(
    shape: Shape, widths: Sequence[int], group: int, dtype: torch.dtype, device: torch.device, context: int, tokens: int
) -> list[dict[str, Any]]:
    """A row for each width, and one for the model in 16 bits. Where there is no CUDA, the same steps without graphs."""
    record = None if device.type == "cuda" else lambda run: run
    weights = {name: [random_weight(*size, group, max(widths), device, i) for i in range(shape.layers)] for name, size in shape.linears().items()}
    blocks = [{name: Tiled(weights[name][i], max(widths)) for name in weights} for i in range(shape.layers)]
    layers = [layer for block in blocks for layer in block.values()]
    decoder = Decoder.of(shape, blocks, context, dtype, device)

    def switch(bits: int) -> None:
        for layer in layers:
            layer.bits = bits

    step = PlanGraphs(decoder.step, switch, layers, record)
    rows = [{"bits": bits, "tokens_per_second": _speed(lambda bits=bits: step(bits), tokens, device)} for bits in widths]
    assert all(bool(step(bits).isfinite().all()) for bits in widths)
    del step, blocks, layers, weights, decoder
    dense = [{name: _dense(*size, dtype, device) for name, size in shape.linears().items()} for _ in range(shape.layers)]
    plain = PlanGraphs(Decoder.of(shape, dense, context, dtype, device).step, lambda plan: None, [], record)
    return [*rows, {"bits": 16, "tokens_per_second": _speed(lambda: plain(16), tokens, device)}]


def _dense(out: int, columns: int, dtype: torch.dtype, device: torch.device) -> Linear:
    weight = (torch.randn(out, columns, device=device) / columns**0.5).to(dtype)
    return lambda x: torch.nn.functional.linear(x, weight)


def _speed(step: Callable[[], object], tokens: int, device: torch.device) -> float:
    """Steps a second, after the first."""
    step()
    _wait(device)
    started = time.perf_counter()
    for _ in range(tokens):
        step()
    _wait(device)
    return tokens / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
