"""NestedLinear: a linear layer that holds planes and scales, and reads them at its current width.

Buffer               dtype         shape               on disk
weight               uint8         [2, out, bytes]     NAME.weight: planes 0 and 1
plane_2 ... plane_7  uint8         [out, bytes]        NAME.plane.2 ...
scale                scale_dtype   [out, groups]       NAME.scale
zero                 uint8         [out, groups]       NAME.zero (asymmetric grids only)
scale_R, zero_R      uint8         [out, groups]       NAME.scale.R, NAME.zero.R: the refit of width R

bytes = ceil(in / 8). The buffers differ from the names on disk only in `_` for `.`, because a module cannot have both a tensor
`scale` and something below it called `scale.2`; matquant.hf renames in both directions.

Everything quantized is a persistent buffer and no parameter: never trained, saved and loaded, and never taken for the dtype of
the model. A layer may hold only the leading planes; wider reads then raise MissingPlanesError.

On a GPU, `tile` puts the planes into the layout that its kernels read, in place of the buffers of planes, which become empty; what is saved
stays the same.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant.codes import planes_needed
from matquant.errors import InputError, MissingPlanesError, PlanError, choices
from matquant.kernels import reference
from matquant.kernels.gpu import ops
from matquant.kernels.gpu.layout import TiledWeight, check_slicing, tile
from matquant.packing import unpack_planes
from matquant.plan import Layout, Shape
from matquant.weight import AffineWeight, NestedWeight, Refit

_BITS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class NestedLinear(nn.Module):
    """y = x W_r^T + bias, with W_r read at `bits`, the current width.

    shape, layout: of the weight. planes: how many leading planes to hold (None: all). bias: kept as it is.
    transposed: the layer it stands for stored its weight [in, out] (GPT-2's Conv1D); the planes never do.
    Buffers start uninitialised, to be filled by a loader; `from_weight` fills them.
    """

    weight: Tensor
    bias: nn.Parameter | None
    tiles: TiledWeight | None

    def __init__(
        self,
        shape: Shape,
        layout: Layout,
        planes: int | None = None,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.in_features, self.out_features = shape, shape.in_features, shape.out
        self.layout, self.transposed, self.tiles = layout, transposed, None
        self.planes = layout.grid.bits if planes is None else planes
        self.refits = tuple(r for r in layout.refit_widths if self._needs(r) <= self.planes)
        self._bits = max(r for r in layout.widths if self._needs(r) <= self.planes)
        # The dtypes are explicit because loaders build modules under their own default dtype.
        of_bytes = {"dtype": torch.uint8, "device": device}
        row, groups = -(-shape.in_features // 8), layout.grid.groups(shape.in_features)
        self.register_buffer("weight", torch.empty(2, shape.out, row, **of_bytes))
        for k in range(2, self.planes):
            self.register_buffer(f"plane_{k}", torch.empty(shape.out, row, **of_bytes))
        self.register_buffer("scale", torch.empty(shape.out, groups, dtype=getattr(torch, layout.scale_dtype), device=device))
        zeros = () if layout.grid.symmetric else ("zero",)
        for name in (*zeros, *(f"{kind}_{r}" for r in self.refits for kind in ("scale", "zero"))):
            self.register_buffer(name, torch.empty(shape.out, groups, **of_bytes))
        self.bias = bias

    @staticmethod
    def from_weight(weight: NestedWeight, layout: Layout, bias: Tensor | None = None) -> "NestedLinear":
        """A layer with the planes, scales and refits of `weight`."""
        out, in_features = weight.codes.shape
        parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer = NestedLinear(Shape(out, in_features), layout, weight.planes, parameter, device=weight.codes.device)
        planes = weight.packed()
        tensors = {"weight": planes[:2], "scale": weight.scale, "zero": weight.zero}
        tensors |= {f"plane_{k}": planes[k] for k in range(2, weight.planes)}
        for r in layer.refits:
            tensors |= {f"scale_{r}": weight.refits[r].scale, f"zero_{r}": weight.refits[r].zero}
        for name, buffer in layer.named_buffers():
            buffer.copy_(tensors[name])  # type: ignore[arg-type]
        return layer

    def _needs(self, bits: int) -> int:
        return planes_needed(bits, self.layout.grid.bits, self.layout.slicing)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that the planes held here allow, descending."""
        return tuple(r for r in self.layout.widths if self._needs(r) <= self.planes)

    @property
    def bits(self) -> int:
        """The width that `forward` reads."""
        return self._bits

    def check_bits(self, bits: int) -> None:
        """Raise PlanError for a width the checkpoint does not offer, MissingPlanesError for one whose planes are not held."""
        if bits not in self.layout.widths:
            raise PlanError(f"{bits} bits are not offered by this checkpoint; {choices(bits, self.layout.widths)}")
        if bits not in self.widths:
            raise MissingPlanesError(
                f"{bits} bits need planes 0-{self._needs(bits) - 1}, but only 0-{self.planes - 1} were loaded; "
                f"load the model with bits={bits} or keep={bits} (the plane files must be in the folder)"
            )
        if self.tiles is not None:
            self.tiles.read(bits)

    def set_bits(self, bits: int) -> None:
        """Read at `bits` from now on. Raises as `check_bits`."""
        self.check_bits(bits)
        self._bits = bits

    def nested(self, planes: int | None = None) -> NestedWeight:
        """What the first `planes` planes (None: all that are held) say about the weight."""
        held = self.planes if planes is None else planes
        if self.tiles is not None:
            whole = self.tiles.nested()
            return replace(whole, codes=whole.codes & (0xFF << (self.layout.grid.bits - held) & 0xFF), planes=held)
        stack = torch.cat([self.weight, *(self.get_buffer(f"plane_{k}")[None] for k in range(2, held))])
        codes = unpack_planes(stack, self.in_features, self.layout.grid.bits)
        zero, refits = self._reads()
        return NestedWeight(codes, self.get_buffer("scale"), zero, self.layout.grid, self.layout.slicing, refits, held)

    def _reads(self) -> tuple[Tensor | None, dict[int, Refit]]:
        """The zeros, where there are any, and the refits."""
        refits = {r: Refit(self.get_buffer(f"scale_{r}"), self.get_buffer(f"zero_{r}")) for r in self.refits}
        return None if self.layout.grid.symmetric else self.get_buffer("zero"), refits

    def weight_at(self, bits: int) -> AffineWeight:
        """The weight at `bits`, from no more planes than it needs. Raises as `check_bits`."""
        self.check_bits(bits)
        return self.nested(self._needs(bits)).read(bits)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not x.is_floating_point():  # model code that casts to layer.weight.dtype ends here instead of computing with bytes
            raise InputError(f"a matquant layer got {x.dtype} input; it needs floats, so the model must not cast to the dtype of its weight")
        if self.tiles is not None and not (torch.is_grad_enabled() and x.requires_grad):
            return ops.linear(x, self.tiles, self._bits, self.bias)
        return reference.linear(x, self.weight_at(self._bits), self.bias)

    def _planes(self) -> list[str]:
        """Names of the buffers of planes."""
        return ["weight", *(f"plane_{k}" for k in range(2, self.planes))]

    def tile(self) -> None:
        """Read with GPU kernels from now on. Raises ResourceError where they cannot run, InputError for a slicing other than floor."""
        if self.tiles is not None:
            return
        check_slicing(self.layout.slicing)
        ops.check(self.weight.device)
        planes = [*self.weight, *(self.get_buffer(name) for name in self._planes()[1:])]
        self.tiles = tile(planes, self.in_features, self.layout.grid, self.get_buffer("scale"), *self._reads())
        for name in self._planes():
            self._buffers[name] = self.get_buffer(name)[..., :0].clone()

    def evict(self, bits: int) -> int:
        """Move the planes that `bits` bits do not need from the GPU to host memory. Returns bytes freed. Raises InputError before `tile`."""
        if self.tiles is None:
            raise InputError("planes can be evicted from tiles only; call tile() first")
        if self._bits > bits:
            raise InputError(f"the layer reads {self._bits} bits now; set_bits({bits}) before evict({bits})")
        return self.tiles.evict(bits)

    def restore(self, bits: int) -> int:
        """Bring back the planes that `bits` bits need. Returns bytes taken."""
        return 0 if self.tiles is None else self.tiles.restore(bits)

    def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
        """As if there were no tiles."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiles is not None:
            planes = self.tiles.nested().packed()
            for name, plane in zip(self._planes(), (planes[:2], *planes[2:]), strict=True):
                destination[prefix + name] = plane

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move devices but keep the dtype of the scales: model.to(torch.bfloat16) would round them and so move every weight.

        nn.Module casts floating tensors only, so scales travel as integers of the same size.
        """
        kind = self.get_buffer("scale").dtype
        self._buffers["scale"] = self.get_buffer("scale").view(_BITS_OF[kind])
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["scale"] = self.get_buffer("scale").view(kind)
        if self.tiles is not None:
            zero, refits = self._reads()
            arrays = {name: fn(array) for name, array in self.tiles.arrays.items()}
            self.tiles = replace(self.tiles, arrays=arrays, scale=self.get_buffer("scale"), zero=zero, refits=refits, moved=self.tiles.moved + 1)
        return self

    def extra_repr(self) -> str:
        grid = self.layout.grid
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, bits={self._bits} of {grid.bits}, "
            f"planes={self.planes}, group_size={grid.group_size}, slicing={self.layout.slicing}"
        )
