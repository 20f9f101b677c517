"""Rotate a model before it is quantized: the same function, with its outliers spread over all channels.

    the residual stream     x' = Q^T x      Q orthogonal [hidden, hidden]
    every value head        v' = R^T v      R orthogonal [head, head], one for all heads, so that grouped queries need no thought

What reads the stream through an RMSNorm of weight g takes it over (x and x' have the same root mean square); what writes to it
turns its output. Of a linear layer W [out, in] with bias b, for the spaces that its input and its output live in:

    input in the stream     W <- W diag(g) Q, and g <- 1        output in the stream    W <- Q^T W, b <- Q^T b
    input in the values     W <- W (I x R)                      output in the values    W <- (I x R)^T W, b <- (I x R)^T b
    embedding               E <- E Q                            head                    H <- H diag(g) Q, so it is no longer tied

The result is an ordinary model of the same architecture, and nothing turns when it runs. Rotations are Hadamard matrices with
random signs where the size allows, as in QuaRot (https://arxiv.org/abs/2404.00456) and the R1 and R2 of SpinQuant
(https://arxiv.org/abs/2405.16406). Left out: their rotations at run time (inputs of down_proj, queries and keys).

Arithmetic is float64. Each tensor is turned when it is asked for, so memory stays that of a block.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from matquant import models
from matquant.errors import RecipeError
from matquant.recipe import Recipe

SLAB = 8192  # rows of an embedding in float64 at a time: 256 MiB at 4096 channels


# --- which tensor takes part how ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """reads, writes: the space of a layer's input and output ("stream", "values" or none). norm: whose weight it takes over.

    folded: a norm whose weight goes into its readers. tied: where its weight comes from if the model ties it.
    """

    reads: str | None = None
    writes: str | None = None
    norm: str | None = None
    folded: bool = False
    tied: str | None = None


FOLDED = Part(folded=True)
_ATTENTION = "model.layers.*.input_layernorm"
_MLP = "model.layers.*.post_attention_layernorm"
LLAMA = {
    "model.embed_tokens": Part(reads="stream"),  # a row of the embedding is a vector of the stream
    _ATTENTION: FOLDED,
    "model.layers.*.self_attn.q_proj": Part(reads="stream", norm=_ATTENTION),
    "model.layers.*.self_attn.k_proj": Part(reads="stream", norm=_ATTENTION),
    "model.layers.*.self_attn.v_proj": Part(reads="stream", norm=_ATTENTION, writes="values"),
    "model.layers.*.self_attn.o_proj": Part(reads="values", writes="stream"),
    _MLP: FOLDED,
    "model.layers.*.mlp.gate_proj": Part(reads="stream", norm=_MLP),
    "model.layers.*.mlp.up_proj": Part(reads="stream", norm=_MLP),
    "model.layers.*.mlp.down_proj": Part(writes="stream"),
    "model.norm": FOLDED,
    "lm_head": Part(reads="stream", norm="model.norm", tied="model.embed_tokens"),
}
QWEN3 = {"model.layers.*.self_attn.q_norm": Part(), "model.layers.*.self_attn.k_norm": Part()}  # of single heads, behind the projection

# By model type, as in transformers.models.TYPE. A family enters after its forward pass was read and its test passes, not by likeness.
FAMILIES: Mapping[str, Mapping[str, Part]] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA | QWEN3}


def rotated(source: models.Source, recipe: Recipe) -> models.Source:
    """The same model with its stream and its value heads turned if the recipe says so, else `source` itself.

    source.model, a skeleton of its own, is changed in place: its head is untied. Raises RecipeError for a family that is not in FAMILIES.
    """
    if not recipe.rotate:
        return source
    parts = _parts(source.model)
    config = source.model.config
    head: Any = source.model.get_output_embeddings()
    tied = head.weight is source.model.get_input_embeddings().weight
    if tied:
        config.tie_word_embeddings = False
        head.weight = nn.Parameter(torch.empty_like(head.weight, device="meta"), requires_grad=head.weight.requires_grad)
    generator = torch.Generator().manual_seed(recipe.seed)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spaces = {"stream": Rotation.random(config.hidden_size, generator), "values": Rotation.random(head_size, generator)}
    wide = frozenset(f"{name}.weight" for name in models.find_layers(source.model, recipe).quantized)
    return replace(source, tensors=RotatedTensors(source.tensors, list(models.own_tensors(source.model)), parts, tied, spaces, wide))


def _parts(model: PreTrainedModel) -> Mapping[str, Part]:
    """The row of FAMILIES that describes every tensor of `model`. Raises RecipeError if none does."""
    kind = str(model.config.model_type)
    advice = f"supported are {', '.join(FAMILIES)}; drop --rotate (rotate: false in the recipe)"
    if kind not in FAMILIES:
        raise RecipeError(f"rotate does not know how models of type {kind!r} are built; {advice}")
    if type(model).__module__ != f"transformers.models.{kind}.modeling_{kind}":
        raise RecipeError(f"rotate knows the {kind} of transformers, but this model brings its own {type(model).__name__}; {advice}")
    parts = FAMILIES[kind]
    for name in models.own_tensors(model):
        part = parts.get(_pattern(name))
        if part is None or not name.endswith((".weight", ".bias")) or (part.folded and name.endswith(".bias")):
            raise RecipeError(f"rotate does not know the tensor {name}, which is no part of a {kind} as it was tested; {advice}")
    return parts


def _pattern(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.*.mlp.up_proj"""
    return re.sub(r"\.\d+\.", ".*.", name).rpartition(".")[0]


class RotatedTensors(Mapping[str, Tensor]):
    """The tensors `names` of a turned model, made from the originals when asked for.

    They keep the type that they are stored in, but those in `wide` are float32: a weight that is quantized next need not be rounded before.
    The embedding and the head are rounded: KL to the original 1e-7 and 6e-7 in float16, 8e-6 and 4e-5 in bfloat16 (stories15M, SmolLM2-135M).
    """

    def __init__(
        self,
        originals: Mapping[str, Tensor],
        names: list[str],
        parts: Mapping[str, Part],
        tied: bool,
        spaces: Mapping[str, "Rotation"],
        wide: frozenset[str],
    ) -> None:
        self._originals, self._names, self._parts = originals, dict.fromkeys(names), parts
        self._tied, self._spaces, self._wide = tied, spaces, wide

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        part = self._parts[_pattern(name)]
        original = self._originals[f"{part.tied}.weight" if self._tied and part.tied else name]
        if part.folded:
            return torch.ones_like(original)
        if part == Part() or not original.is_floating_point():  # whoever asked refuses what is no float
            return original
        dtype = torch.float32 if name in self._wide else original.dtype
        if name.endswith(".bias"):
            return self._turn(original.double()[:, None], None, part.writes)[:, 0].to(dtype)
        gain = None if part.norm is None else self._originals[self._beside(name, part.norm)].double()
        slabs = [original] if part.writes else original.split(SLAB)
        scaled = (slab.double() if gain is None else slab.double() * gain for slab in slabs)
        return torch.cat([self._turn(slab, part.reads, part.writes).to(dtype) for slab in scaled])

    def _beside(self, name: str, norm: str) -> str:
        """The weight of `norm` in the block of `name`."""
        index = re.search(r"\.(\d+)\.", name)
        return norm.replace("*", index[1] if index else "") + ".weight"

    def _turn(self, w: Float64[Tensor, "out inputs"], reads: str | None, writes: str | None) -> Float64[Tensor, "out inputs"]:
        w = self._spaces[reads].apply(w) if reads else w
        return self._spaces[writes].apply(w.T).T.contiguous() if writes else w

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- rotations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix diag(signs) (S x core) of size n = 2^a m, S the normalized Hadamard matrix of size 2^a by Sylvester."""

    signs: Float64[Tensor, " n"]
    core: Float64[Tensor, "m m"]

    @staticmethod
    def random(size: int, generator: torch.Generator) -> "Rotation":
        """A Hadamard matrix with random signs if there is one by Sylvester and Paley; else any orthogonal matrix, by QR of a Gaussian one."""
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        twos = (size & -size).bit_length() - 1
        core = next((h / math.sqrt(len(h)) for a in range(twos, -1, -1) if (h := hadamard_core(size >> a)) is not None), None)
        if core is None:
            q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
            core = q * r.diagonal().sign()  # uniform over rotations: https://arxiv.org/abs/math-ph/0609050
        return Rotation(signs, core)

    def apply(self, x: Float64[Tensor, "rows blocks_n"]) -> Float64[Tensor, "rows blocks_n"]:
        """x (I x Q): every n neighbours of a row turned, by a fast Walsh-Hadamard transform of a stages and one product with the core."""
        n, m = len(self.signs), len(self.core)
        y = (x.reshape(-1, n) * self.signs).reshape(-1, n // m, m) @ self.core
        stride = m
        while stride < n:
            first, second = y.reshape(-1, n // (2 * stride), 2, stride).unbind(2)
            y = torch.stack((first + second, first - second), 2) / math.sqrt(2)
            stride *= 2
        return y.reshape(x.shape)


def hadamard_core(size: int) -> Float64[Tensor, "m m"] | None:
    """A Hadamard matrix, entries 1 and -1 and H H^T = m I, of size 1 or by Paley from a prime p; None if neither fits.

        p = 3 mod 4, size p + 1:     H = I + S,  S = [[0, 1], [-1, C]]                          C_ij = (i - j | p), Legendre's symbol
        p = 1 mod 4, size 2(p + 1):  H = S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],  S = [[0, 1], [1, C]]

    https://en.wikipedia.org/wiki/Paley_construction. Sylvester's doubling leads from these to 288, 576, 2304, 3584, 5120 ...
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _prime(size - 1):
        return torch.eye(size, dtype=torch.float64) + _conference(size - 1, -1.0)
    if size % 4 == 0 and _prime(p := size // 2 - 1) and p % 4 == 1:
        s, one = _conference(p, 1.0), torch.eye(p + 1, dtype=torch.float64)
        return torch.kron(s, torch.tensor([[1.0, 1], [1, -1]]).double()) + torch.kron(one, torch.tensor([[1.0, -1], [-1, -1]]).double())
    return None


def _conference(p: int, border: float) -> Float64[Tensor, "m m"]:
    """S above, of size p + 1; border: the left column's sign."""
    symbol = torch.full((p,), -1.0, dtype=torch.float64)
    symbol[torch.arange(p) ** 2 % p] = 1.0
    symbol[0] = 0.0
    s = torch.zeros(p + 1, p + 1, dtype=torch.float64)
    index = torch.arange(p)
    s[1:, 1:] = symbol[(index[:, None] - index) % p]
    s[0, 1:], s[1:, 0] = 1.0, border
    return s


def _prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))
