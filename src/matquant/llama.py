"""What the engine serves: models of Llama's shape, found by their structure and tried out, not by their names.

A model is served if its blocks have the parts of `PARTS` below and if a small random model of the same configuration gives the same logits
through csrc/step.cpp as through transformers. So whatever an architecture adds (a cap on logits, a scaled embedding, another norm) is noticed
by what it does.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from matquant.codes import Grid, fit_grid, nearest_code
from matquant.errors import InputError
from matquant.kernels import cpu
from matquant.kernels.step import Block, Geometry, Stepper
from matquant.weight import NestedWeight

PARTS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NORMS = {"norm_in": "input_layernorm", "norm_mid": "post_attention_layernorm"}
HEAD_NORMS = {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"}
ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
STATIC_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a text is
TRIAL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}

Weights = Callable[[str], NestedWeight]  # a layer's name -> its weight
Tensors = Callable[[str], Tensor]  # a parameter's name -> its values


@dataclass(frozen=True)
class Plan:
    """Where the parts of a model are. blocks: the list's name. longest: positions a text may have."""

    model: Any
    blocks: str
    longest: int

    def name(self, block: int, part: str) -> str:
        return f"{self.blocks}.{block}.{PARTS[part]}"


def skeleton_of(folder: Path) -> Any:
    """The model of a checkpoint without values. Raises InputError."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder} cannot be built from its config.json ({str(error).splitlines()[0]}); fetch it again") from None


def plan_of(skeleton: Any) -> Plan:
    """Raises InputError for a model that cannot be served, and says why."""
    config, base = skeleton.config, skeleton.base_model
    kind = type(skeleton).__name__
    blocks = getattr(base, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not all(_has(blocks[0], name) for name in (*PARTS.values(), *NORMS.values())):
        raise InputError(f"the engine serves models of Llama's shape, and {kind} has other parts; use matquant.from_pretrained")
    if (act := _act(config)) not in ACTS:
        raise InputError(f"the engine knows the activations {', '.join(ACTS)}, not {act!r}; use matquant.from_pretrained")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in STATIC_ROTARY:
        raise InputError(f"the engine has no {rotary} positions, only {', '.join(STATIC_ROTARY)}; use matquant.from_pretrained")
    prefix = next(name for name, module in skeleton.named_modules() if module is blocks)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return Plan(skeleton, prefix, min(filter(None, (config.max_position_embeddings, window))))


def try_out(config: Any) -> None:
    """Raise InputError unless a small random model of this configuration is computed as transformers computes it."""
    small = copy.deepcopy(config)
    for name, value in TRIAL.items():
        setattr(small, name, value)
    small.pad_token_id = None
    if getattr(small, "head_dim", None):
        small.head_dim = 16
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[: TRIAL["num_hidden_layers"]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.uniform_(0.5, 1.5)
        ids = torch.randint(0, TRIAL["vocab_size"], (1, 9))
    grid = Grid(8, 32, symmetric=False, overlap=False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {name: rounded(module.weight.data, grid) for name, module in linears.items()}
    for name, module in linears.items():
        module.weight.data = weights[name].read(8).dense()
    plan = plan_of(model)
    head = next(weights[name] for name, module in linears.items() if module is model.get_output_embeddings())
    stepper = stepper_of(plan, weights.__getitem__, model.get_parameter, dict.fromkeys(weights, (8,)), head)
    widths, places = stepper.widths([dict.fromkeys(PARTS, 8)] * 2), torch.arange(9)
    x = model.get_input_embeddings().weight.data[ids[0]]
    got = stepper.step(widths, x, torch.zeros_like(places), places, stepper.cache(1, 9), places, exact=True)
    with torch.inference_mode():
        want = model(ids).logits[0]
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
        apart = float((got - want).abs().max() / want.abs().max())
        raise InputError(f"the engine computes {type(model).__name__} wrongly (logits {apart:.1g} apart in a trial); use matquant.from_pretrained")


def stepper_of(
    plan: Plan, weights: Weights, tensors: Tensors, widths: Mapping[str, tuple[int, ...]], head: NestedWeight, isa: str | None = None
) -> Stepper:
    """The model, packed layer by layer. widths: that each layer is to be read at."""
    model, config = plan.model, plan.model.config
    base, first = model.base_model, model.base_model.layers[0]
    prefix = plan.blocks.rpartition("layers")[0]
    blocks: list[Block] = []
    for index in range(len(base.layers)):
        packed = {part: cpu.pack(weights(name := plan.name(index, part)), widths[name], isa) for part in PARTS}
        biases = {part: tensors(f"{plan.name(index, part)}.bias") for part in PARTS if first.get_submodule(PARTS[part]).bias is not None}
        norms = {name: tensors(f"{plan.blocks}.{index}.{path}.weight") for name, path in NORMS.items()}
        norms |= {name: tensors(f"{plan.blocks}.{index}.{path}.weight") for name, path in HEAD_NORMS.items() if _has(first, path)}
        blocks.append(Block(packed, biases, **norms))
    rotary = base.rotary_emb
    geometry = Geometry(
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, first.self_attn.head_dim,
        len(head.codes), ACTS[_act(config)], config.rms_norm_eps, first.self_attn.scaling, rotary.attention_scaling, rotary.inv_freq.detach(),
    )  # fmt: skip
    return Stepper(geometry, blocks, tensors(f"{prefix}norm.weight"), cpu.pack(head, (head.grid.bits,), isa))


def rounded(weight: Tensor, grid: Grid) -> NestedWeight:
    """A weight [out, in] rounded to nearest."""
    size = weight.shape[1] // grid.groups(weight.shape[1])
    grouped = weight.float().reshape(len(weight), -1, size)
    scale, zero = fit_grid(grouped, grid, torch.float16)
    t = grouped / scale[..., None] + (grid.center if zero is None else zero[..., None])
    return NestedWeight(nearest_code(t, grid).reshape(weight.shape), scale.half(), None if zero is None else zero.to(torch.uint8), grid, "floor")


def _act(config: Any) -> Any:
    """The name of a configuration's activation."""
    return getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
