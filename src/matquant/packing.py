"""Codes <-> planes. Plane 0 holds the most significant bit of every code.

    planes[i, o, b] bit k  =  bit (c - 1 - i) of codes[o, 8 b + k]

Within a byte the first input channel is the least significant bit; a row whose length is no multiple of 8 is padded with
zero bits. Unpacking spreads a byte over the eight byte lanes of an int64 by table and shifts whole lanes, eight codes at a
time: a lane never carries into the next, because a code has at most 8 bits.
"""

import sys
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

CHUNK = 2**18  # codes that are worked on at a time: 256 KiB, half of a small second-level cache

assert sys.byteorder == "little", "the byte-lane trick below assumes a little-endian machine"


def pack_planes(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "bits out bytes"]:
    """Split `bits`-wide codes into `bits` planes of ceil(in / 8) bytes a row."""
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).reshape(rows, -(-columns // 8), 8)
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    planes = [(((padded >> (bits - 1 - i)) & 1) * place).sum(-1, dtype=torch.uint8) for i in range(bits)]
    return torch.stack(planes)


def _spread(device: torch.device) -> Tensor:
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    return ((byte >> torch.arange(8, dtype=torch.uint8)) & 1).view(torch.int64).squeeze(1).to(device)


@cache
def _spread_by(shift: int) -> Any:
    """The table as an array of numpy's, shifted within its lanes."""
    return _spread(torch.device("cpu")).numpy() << shift


def unpack_planes(planes: UInt8[Tensor, "held out bytes"], in_features: int, bits: int) -> UInt8[Tensor, "out in"]:
    """Codes of a `bits`-wide parent from its first `held` planes; the bits of the planes that are not given are zero."""
    held, rows, columns = planes.shape
    if planes.device.type == "cpu":
        return _unpack_on_cpu(planes, in_features, bits)
    table = _spread(planes.device)
    lanes = torch.zeros(rows, columns, dtype=torch.int64, device=planes.device)
    for plane in planes:
        lanes = (lanes << 1) | table[plane.int()]
    codes = lanes.view(torch.uint8).reshape(rows, 8 * columns)[:, :in_features]
    return (codes << (bits - held)).contiguous()


def _unpack_on_cpu(planes: Tensor, in_features: int, bits: int) -> Tensor:
    """The same by numpy's take, some rows at a time, so that what is at work stays in a core's cache: about eight times as fast."""
    held, rows, columns = planes.shape
    given, tables = planes.numpy(), [_spread_by(bits - 1 - index) for index in range(held)]
    lanes = np.zeros((rows, columns), np.int64)
    step = max(1, CHUNK // max(1, 8 * columns))
    part = np.empty((min(step, rows), columns), np.int64)
    for first in range(0, rows, step):
        own = lanes[first : first + step]
        for table, plane in zip(tables, given[:, first : first + step], strict=True):
            np.bitwise_or(own, np.take(table, plane, out=part[: len(own)], mode="clip"), out=own)
    codes = lanes.view(np.uint8)[:, :in_features]
    return torch.from_numpy(np.ascontiguousarray(codes))  # pyright: ignore[reportUnknownMemberType]
