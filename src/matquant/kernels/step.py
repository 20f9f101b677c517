"""One pass of tokens through a whole model of Llama's shape in one native call (csrc/step.h), its layers read at any widths."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matquant.errors import InputError, MissingPlanesError
from matquant.kernels.cpu import PackedWeight, library

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
ACTS = ("silu", "gelu")
KEYS, CHUNK = 16, 64  # positions whose keys lie together; positions that there is room for at a time (csrc/attention.h)


class _Block(ctypes.Structure):
    """mq_block."""

    _fields_ = [
        ("weight", ctypes.c_void_p * len(PARTS)),
        ("bias", ctypes.c_void_p * len(PARTS)),
        *((name, ctypes.c_void_p) for name in ("norm_in", "norm_mid", "norm_q", "norm_k")),
    ]


class _Model(ctypes.Structure):
    """mq_model."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_size", "vocabulary", "rotary", "act")),
        *((name, ctypes.c_float) for name in ("eps", "scaling", "rotary_scaling")),
        ("inv_freq", ctypes.c_void_p),
        ("blocks", ctypes.POINTER(_Block)),
        ("norm_out", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Geometry:
    """Sizes and constants of a model. scaling: of attention scores. rotary_scaling: of cosines and sines. act: one of ACTS."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    act: str
    eps: float
    scaling: float
    rotary_scaling: float
    inv_freq: Float[Tensor, " pairs"]


@dataclass(frozen=True)
class Block:
    """One decoder block. weights: by PARTS. biases: of those that have one. norms of queries and keys: where the model has them."""

    weights: Mapping[str, PackedWeight]
    biases: Mapping[str, Tensor]
    norm_in: Float[Tensor, " hidden"]
    norm_mid: Float[Tensor, " hidden"]
    norm_q: Float[Tensor, " head"] | None = None
    norm_k: Float[Tensor, " head"] | None = None


@dataclass(frozen=True)
class Cache:
    """Keys and values of some sequences of at most `capacity` tokens, in float32. Pages that no token has reached take no memory."""

    keys: Float[Tensor, "layers sequences kv_heads tiles head 16"]
    values: Float[Tensor, "layers sequences kv_heads places padded_head"]
    capacity: int


@dataclass(frozen=True)
class Stepper:
    """A model that takes steps. head: of the logits, read at its widest width."""

    geometry: Geometry
    blocks: Sequence[Block]
    norm_out: Float[Tensor, " hidden"]
    head: PackedWeight
    held: list[Any] = field(default_factory=list[Any], repr=False)  # what the structures point to
    struct: _Model = field(init=False, repr=False)

    def __post_init__(self) -> None:
        blocks = (_Block * len(self.blocks))()
        for native, block in zip(blocks, self.blocks, strict=True):
            for index, part in enumerate(PARTS):
                native.weight[index] = ctypes.addressof(block.weights[part].struct)
                native.bias[index] = self._floats(block.biases.get(part))
            for name in ("norm_in", "norm_mid", "norm_q", "norm_k"):
                setattr(native, name, self._floats(getattr(block, name)))
        g = self.geometry
        struct = _Model(
            layers=len(self.blocks), hidden=g.hidden, inner=g.inner, heads=g.heads, kv_heads=g.kv_heads, head_size=g.head_size,
            vocabulary=g.vocabulary, rotary=len(g.inv_freq), act=ACTS.index(g.act), eps=g.eps, scaling=g.scaling, rotary_scaling=g.rotary_scaling,
            inv_freq=self._floats(g.inv_freq), blocks=blocks, norm_out=self._floats(self.norm_out), head=ctypes.addressof(self.head.struct),
        )  # fmt: skip
        self.held.append(blocks)
        object.__setattr__(self, "struct", struct)

    def _floats(self, values: Tensor | None) -> int | None:
        """Where a copy in float32 lies."""
        if values is None:
            return None
        self.held.append(values.detach().float().contiguous().clone())
        return self.held[-1].data_ptr()

    def cache(self, sequences: int, capacity: int) -> Cache:
        """An empty one."""
        heads, size, places = (len(self.blocks), sequences, self.geometry.kv_heads), self.geometry.head_size, -(-capacity // CHUNK) * CHUNK
        return Cache(torch.empty(*heads, places // KEYS, size, KEYS), torch.empty(*heads, places, -(-size // KEYS) * KEYS), capacity)

    def widths(self, bits: Sequence[Mapping[str, int]]) -> UInt8[Tensor, " widths"]:
        """What `step` takes for the widths of every block's parts."""
        return torch.tensor([*(own[part] for own in bits for part in PARTS), self.head.widths[0]], dtype=torch.uint8)

    def step(
        self,
        widths: UInt8[Tensor, " widths"],
        x: Float[Tensor, "tokens hidden"],
        sequence: Int[Tensor, " tokens"],
        position: Int[Tensor, " tokens"],
        cache: Cache,
        rows: Int[Tensor, " wanted"],
        words: int | None = None,
        exact: bool = False,
        threads: int | None = None,
    ) -> Float[Tensor, "wanted words"]:
        """Logits of some rows. x: embeddings. words: of the vocabulary, the first so many (None: all). Each token's keys and values go to its place in `cache`, over what was there.

        Raises InputError for a place that the cache has not or a row that is none, MissingPlanesError for a width that was not packed.
        """
        x = x.float().contiguous()
        of_sequence, of_position, of_rows = (part.to(torch.int32).contiguous() for part in (sequence, position, rows))
        logits, words = torch.empty(len(rows), self.geometry.vocabulary), words or self.geometry.vocabulary
        failed = library().mq_step(
            ctypes.byref(self.struct), widths.data_ptr(), len(x), x.data_ptr(), of_sequence.data_ptr(), of_position.data_ptr(),
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.shape[1], cache.capacity, len(rows), of_rows.data_ptr(), words, logits.data_ptr(),
            exact, threads or torch.get_num_threads(), self.head.isa.encode(),
        )  # fmt: skip
        if failed == 2:
            raise MissingPlanesError("a layer was not packed for the width it is to be read at; keep that width when the model is opened")
        if failed == 3:
            raise InputError(f"a token's place is outside the cache of {cache.keys.shape[1]} sequences of {cache.capacity} tokens; make it larger")
        if failed == 4:
            raise InputError(f"rows are {rows.tolist()}, and there are {len(x)}; choose from 0 to {len(x) - 1}")
        assert not failed, f"mq_step returned {failed}"
        return logits[:, :words]
