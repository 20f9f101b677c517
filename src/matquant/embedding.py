"""Modules that read tables: a head that is no part of plans, an embedding that reads its rows from planes, and a head that is tied to one.

NestedHead        the buffers of a NestedLinear; always at the width that it is stored in
NestedEmbedding   the same buffers; looks rows up, and lets the module that it stands for do the rest (a model may scale what it looks up)
TiedHead          no tensor of its own: multiplies with the table of a NestedEmbedding

So a tied table is in memory once, in a state dict once and in a file once, under the embedding's name.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matquant.errors import InputError
from matquant.linear import NestedLinear
from matquant.plan import Table
from matquant.tables import Rows


class NestedHead(NestedLinear):
    """A linear layer outside of plans."""

    def __init__(self, table: Table, bias: nn.Parameter | None = None, device: torch.device | str | None = None) -> None:
        super().__init__(table.shape, table.layout, bias=bias, device=device)

    def evict(self, bits: int) -> int:
        """Nothing: all of it is read, whatever the layers are read at."""
        return 0


class NestedEmbedding(NestedHead):
    """An embedding of rows in planes. old: the module that it stands for, which loses its weight and gets, at each look-up, the rows that were asked for.

    shared: whether a TiedHead multiplies with the table.
    """

    def __init__(self, table: Table, old: nn.Embedding, device: torch.device | str | None = None) -> None:
        super().__init__(table, device=device)
        self.num_embeddings, self.embedding_dim = table.shape.out, table.shape.in_features
        self.shared = False
        kind = old.weight.dtype
        del old.weight
        # Without rows it has no memory and is in no file, but tells the model's dtype, which casts change.
        old.register_buffer("weight", torch.empty(0, table.shape.in_features, dtype=kind, device=device), persistent=False)
        self.padding_idx, old.padding_idx = old.padding_idx, None  # it counts for gradients alone, and would be looked for among the rows
        self.old = old

    @property
    def rows(self) -> Rows:
        planes = [*self.weight, *(self.get_buffer(name) for name in self._planes()[1:])]
        zero = None if self.layout.grid.symmetric else self.get_buffer("zero")
        return Rows(Table(self.shape, self.layout), planes, self.get_buffer("scale"), zero)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch hidden"]:  # type: ignore[override]
        rows = self.rows[input.flatten()].to(self.old.weight.dtype)
        places = torch.arange(input.numel(), device=input.device).reshape(input.shape)
        return torch.func.functional_call(self.old, {"weight": rows}, (places,))

    def multiply(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch tokens"]:
        """x times the table."""
        return super().forward(x)

    def tile(self) -> None:
        """For `multiply` alone. Planes stay too, for looking up."""
        if not self.shared:
            return
        held = {name: self._buffers[name] for name in self._planes()}
        super().tile()
        self._buffers.update(held)


class TiedHead(nn.Module):
    """logits = x E^T + bias, with the table E of an embedding."""

    def __init__(self, table: NestedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._of = (table,)  # a tuple, so that the table is no part of this module
        table.shared = True
        self.in_features, self.out_features, self.bias = table.in_features, table.out_features, bias

    @property
    def table(self) -> NestedEmbedding:
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        """Of the table, as for any quantized layer."""
        return self.table.weight

    def forward(self, x: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch tokens"]:
        if self.table.weight.is_meta:
            raise InputError("the embedding is offloaded, and the head is tied to it; give it a device of its own in device_map")
        y = self.table.multiply(x.to(self.table.weight.device))
        return y if self.bias is None else y + self.bias


def plain(module: Any, kind: torch.dtype, known: dict[int, nn.Parameter]) -> nn.Module:
    """The layer that a reader of a table stands for, dense. known: what was made of tables, so that tied ones stay tied."""
    table = module.table if isinstance(module, TiedHead) else module
    if id(table) not in known:
        known[id(table)] = nn.Parameter(table.weight_at(table.bits).dense(kind))
    if isinstance(module, NestedEmbedding):
        del module.old.weight
        module.old.weight, module.old.padding_idx = known[id(table)], module.padding_idx
        return module.old
    with torch.device("meta"):
        head = nn.Linear(module.in_features, module.out_features)
    head.weight, head.bias = known[id(table)], module.bias
    return head
