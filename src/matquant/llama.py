"""What the engine serves: models of Llama's shape, found by their structure and tried out, not by their names.

A model is served if its blocks have the parts of `PARTS` below and if a small random model of the same configuration gives the same logits
through csrc/step.cpp as through transformers. So whatever an architecture adds (a cap on logits, a scaled embedding, another norm) is noticed
by what it does. What comes of it is `Served`, plain data: the model is then packed and run without transformers, whose modules alone would take as much
memory as a small model. So where transformers is not loaded yet, a process of its own examines the configuration (`python -m matquant.llama DIR`), once: its answer is kept in
~/.cache/matquant.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matquant.checkpoint.files import replace_whole
from matquant.codes import Grid
from matquant.errors import InputError, ResourceError, UnservedError
from matquant.kernels import cpu
from matquant.kernels.step import Block, Geometry, Stepper
from matquant.tables import rounded

PARTS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
NORMS = {"norm_in": "input_layernorm", "norm_mid": "post_attention_layernorm"}
HEAD_NORMS = {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"}
ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
STATIC_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long a text is
TRIAL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}

Packed = Callable[[str], cpu.PackedWeight]  # a layer's name -> its weight
Tensors = Callable[[str], Tensor]  # a parameter's name -> its values


@dataclass(frozen=True)
class Served:
    """A model that is served. blocks: name of their list, `count` of them. longest: positions a text may have. norm, embedding, head: names.

    biased: the PARTS that have a bias. normed: the HEAD_NORMS that there are.
    """

    blocks: str
    count: int
    longest: int
    norm: str
    embedding: str
    head: str
    biased: tuple[str, ...]
    normed: tuple[str, ...]
    geometry: Geometry

    def name(self, block: int, part: str) -> str:
        return f"{self.blocks}.{block}.{PARTS[part]}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"geometry": {**vars(self.geometry), "inv_freq": self.geometry.inv_freq.tolist()}})

    @staticmethod
    def from_json(text: str) -> "Served":
        found = json.loads(text)
        geometry = Geometry(**(found["geometry"] | {"inv_freq": torch.tensor(found["geometry"]["inv_freq"])}))
        return Served(**(found | {"biased": tuple(found["biased"]), "normed": tuple(found["normed"]), "geometry": geometry}))


def examine(folder: Path) -> Served:
    """What is served of the model of a checkpoint. Raises InputError, and UnservedError for a model that cannot be served."""
    skeleton = skeleton_of(folder)
    served = served_of(skeleton)
    try_out(skeleton.config)
    return served


def served(folder: Path) -> Served:
    """As `examine`, by a process of its own where transformers is not loaded; what was found is kept for the next time."""
    if "transformers.modeling_utils" in sys.modules:
        return examine(folder)
    known = _known(folder)
    if known.is_file():
        return Served.from_json(known.read_text())
    command, environment = [sys.executable, "-m", "matquant.llama", str(folder)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode in REFUSALS:
        raise REFUSALS[done.returncode](last)
    if done.returncode:
        raise ResourceError(f"the process that examines {folder} ended with {done.returncode} ({last}); is there enough memory?")
    found = Served.from_json(answer := done.stdout.splitlines()[-1])
    with suppress(OSError):  # a home that cannot be written to
        known.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(known, answer.encode())
    return found


def _known(folder: Path) -> Path:
    """Where an answer is kept: it depends on the configuration, on the kernels and on what they were compared with, and on nothing else."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    kernels = sorted(Path(cpu.__file__).parent.glob("libmatquant.*"))
    parts = [json.dumps(config, sort_keys=True), *(version(name) for name in ("matquant", "transformers", "torch")), cpu.isas()[0]]
    digest = hashlib.sha256("\n".join(parts).encode() + b"".join(path.read_bytes() for path in kernels)).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "matquant" / f"served-{digest[:32]}.json"


REFUSALS = {10: UnservedError, 11: InputError}  # exit codes of the process


def main(folder: str) -> int:
    """The process."""
    try:
        sys.stdout.write(examine(Path(folder)).to_json() + "\n")
        return 0
    except (UnservedError, InputError) as error:
        sys.stderr.write(f"{error}\n")
        return next(code for code, kind in REFUSALS.items() if isinstance(error, kind))


def skeleton_of(folder: Path) -> Any:
    """The model of a checkpoint without values. Raises InputError."""
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{folder} cannot be built from its config.json ({str(error).splitlines()[0]}); fetch it again") from None


def served_of(skeleton: Any) -> Served:
    """Raises UnservedError for a model that cannot be served, and says why."""
    config, base = skeleton.config, skeleton.base_model
    kind = type(skeleton).__name__
    blocks = getattr(base, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or not all(_has(blocks[0], name) for name in (*PARTS.values(), *NORMS.values())):
        raise UnservedError(f"the engine serves models of Llama's shape, and {kind} has other parts; use matquant.from_pretrained")
    if (act := _act(config)) not in ACTS:
        raise UnservedError(f"the engine knows the activations {', '.join(ACTS)}, not {act!r}; use matquant.from_pretrained")
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary not in STATIC_ROTARY:
        raise UnservedError(f"the engine has no {rotary} positions, only {', '.join(STATIC_ROTARY)}; use matquant.from_pretrained")
    names = {id(module): name for name, module in skeleton.named_modules()}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    first: Any = blocks[0]
    turned: Any = base.rotary_emb
    geometry = Geometry(
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, first.self_attn.head_dim,
        config.vocab_size, ACTS[act], config.rms_norm_eps, first.self_attn.scaling, turned.attention_scaling, turned.inv_freq.detach().float(),
    )  # fmt: skip
    return Served(
        blocks=names[id(blocks)],
        count=len(blocks),
        longest=min(filter(None, (config.max_position_embeddings, window))),
        norm=f"{names[id(blocks)].rpartition('layers')[0]}norm.weight",
        embedding=names[id(skeleton.get_input_embeddings())],
        head=names[id(skeleton.get_output_embeddings())],
        biased=tuple(part for part in PARTS if first.get_submodule(PARTS[part]).bias is not None),
        normed=tuple(name for name, path in HEAD_NORMS.items() if _has(first, path)),
        geometry=geometry,
    )


def try_out(config: Any) -> None:
    """Raise UnservedError unless a small random model of this configuration is computed as transformers computes it."""
    import transformers

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
    stepper = rounded_stepper(model, 32)
    widths, places = stepper.widths([dict.fromkeys(PARTS, 8)] * 2), torch.arange(9)
    x = model.get_input_embeddings().weight.data[ids[0]]
    got = stepper.step(widths, x, torch.zeros_like(places), places, stepper.cache(1, 9), places, exact=True)
    with torch.inference_mode():
        want = model(ids).logits[0]
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
        apart = float((got - want).abs().max() / want.abs().max())
        raise UnservedError(f"the engine computes {type(model).__name__} wrongly (logits {apart:.1g} apart in a trial); use matquant.from_pretrained")


def rounded_stepper(model: Any, group_size: int, isa: str | None = None) -> Stepper:
    """Of a small dense model at 8 bits; its linear layers are left as they are then read."""
    grid = Grid(8, group_size, symmetric=False, overlap=False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = {name: rounded(module.weight.data, grid) for name, module in linears.items()}
    for name, module in linears.items():
        module.weight.data = weights[name].read(8).dense()
    return stepper_of(served_of(model), lambda name: cpu.pack(weights[name], (8,), isa), model.get_parameter)


def stepper_of(served: Served, packed: Packed, tensors: Tensors) -> Stepper:
    """The model, of packed weights."""
    blocks: list[Block] = []
    for index in range(served.count):
        weights = {part: packed(served.name(index, part)) for part in PARTS}
        biases = {part: tensors(f"{served.name(index, part)}.bias") for part in served.biased}
        paths = NORMS | {name: HEAD_NORMS[name] for name in served.normed}
        blocks.append(Block(weights, biases, **{name: tensors(f"{served.blocks}.{index}.{path}.weight") for name, path in paths.items()}))
    head = packed(served.head)
    return Stepper(replace(served.geometry, vocabulary=head.shape[0]), blocks, tensors(served.norm), head)


def _act(config: Any) -> Any:
    """The name of a configuration's activation."""
    return getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
