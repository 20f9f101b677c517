"""transformers reads and writes matquant checkpoints: `from_pretrained(folder, bits=4)`, `set_bits(model, 3)`.

The folder decides what is quantized: the modules that matquant.checkpoint.Checkpoint finds there are replaced by NestedLinear
while the model is still on the meta device, holding only the planes that the widest wanted width needs, and embeddings and heads that are stored as
tables by the modules of embedding.py; transformers then loads the tensors as it loads any other. Tensors of other planes are not asked for, so they are never read from disk.

transformers warns about most faults of a checkpoint and goes on with uninitialised memory. Here every one is an error: headers
are checked before loading (Checkpoint.open), missing, extra and misshapen tensors while loading, values after it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matquant.checkpoint import Checkpoint, choose
from matquant.checkpoint.format import value_problem
from matquant.codes import planes_needed
from matquant.embedding import NestedEmbedding, NestedHead, TiedHead, plain
from matquant.errors import CheckpointError, InputError
from matquant.linear import NestedLinear
from matquant.plan import BitPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "matquant"
_OURS = r"\.(plane|scale|zero)_[2-8]$"  # buffers of NestedLinear whose names on disk have a dot


class MatquantConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, kept word for word in `stored`, and apart from it what to load.

    bits: the width or plan to read at (None: the default of the checkpoint, or the widest here if that is missing).
    keep: the widest width to keep loaded for `set_bits` (None: of each layer the width that `bits` gives it; everything if `bits` is None too).
    """

    def __init__(self, bits: int | BitPlan | None = None, keep: int | None = None, stored: Mapping[str, Any] | None = None) -> None:
        self.quant_method = METHOD
        self.bits, self.keep = bits, keep
        self.stored = dict(stored or {})

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From config.json. A key "load", which no file has, is what `from_pretrained` below asks for."""
        stored = {key: value for key, value in config_dict.items() if key != "load"}
        load = config_dict.get("load", {})
        config = cls(_plan_from(load.get("bits")), load.get("keep"), stored)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What save_pretrained writes: the width in use is no property of the checkpoint (it would replace the stored default)."""
        return {**self.stored, "quant_method": METHOD}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What AutoModel...from_pretrained(folder, quantization_config=MatquantConfig(bits=4)) may override."""
        return {"bits": self.bits, "keep": self.keep}


def _plan_from(bits: Any) -> int | BitPlan | None:
    return BitPlan(bits["default"], bits["layers"]) if isinstance(bits, Mapping) else bits


class MatquantHfQuantizer(HfQuantizer):
    """Builds and checks the model around transformers' own loading. One instance serves one load."""

    requires_calibration = True  # a float model cannot be quantized on the fly: matquant quantize does that
    quantization_config: MatquantConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan: dict[str, int] = {}  # module name in the model -> bits
        self.tables: list[str] = []  # module names in the model
        self.planes: set[int] = set()  # how many planes layers hold
        self.checked = False

    # --- before loading -------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        files: list[str] | None = kwargs.get("checkpoint_files")
        if not files:
            raise InputError("a matquant checkpoint is loaded from a folder, not from a state dict; give its path")
        checkpoint = Checkpoint.open(Path(files[0]).parent)
        config = self.quantization_config
        plan, keep = choose(checkpoint, config.bits, config.keep)
        checkpoint.check_files(keep)  # sha256: a flipped bit in a plane would load as well as any other
        wanted = set(checkpoint.weight_files(keep))
        # In place: transformers opens exactly these files later. Shards of planes we do not need may be absent here.
        files[:] = [file for file in files if Path(file).name in wanted]
        grid, slicing = checkpoint.layout.grid, checkpoint.layout.slicing
        own = config.bits is not None and config.keep is None  # nobody will switch: each layer holds the planes that it reads
        for name in checkpoint.modules:
            planes = planes_needed(plan.bits(name) if own else keep, grid.bits, slicing)
            self.plan[replace(model, name, checkpoint, planes)] = plan.bits(name)
            self.planes.add(planes)
        self.tables = put_tables(model, checkpoint)
        _refuse_tied(model, (*self.plan, *self.tables))
        self._refuse_incomplete(model)

    def get_weight_conversions(self) -> list[Any]:
        """Names on disk <-> names of buffers; transformers applies the reverse when saving."""
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(rf"\.{kind}\.\1", rf"\.{kind}_([2-8])") for kind in ("plane", "scale", "zero")]

    # --- while loading --------------------------------------------------------------------------------------------------

    def _refuse_incomplete(self, model: "PreTrainedModel") -> None:
        """Turn transformers' report of missing, unexpected and mismatched tensors, which it only logs, into an error.

        A class other than the one that was saved (AutoModel, a classifier) has other tensors by design; there, only ours count.
        """
        adjust: Callable[[Any], None] = model._adjust_missing_and_unexpected_keys
        strict = type(model).__name__ in (model.config.architectures or ())

        def check(info: Any) -> None:
            del model.__dict__["_adjust_missing_and_unexpected_keys"]
            adjust(info)
            # planes and refits that nobody asked for; Checkpoint.open has refused those that no checkpoint may have
            info.unexpected_keys = {key for key in info.unexpected_keys if not re.search(_OURS, key)}
            ours = tuple(f"{path}." for path in (*self.plan, *self.tables))
            faults = {
                "lacks": sorted(info.missing_keys),
                "has, unknown to the model,": sorted(info.unexpected_keys),
                "has in the wrong shape": sorted(key for key, *_ in info.mismatched_keys),
            }
            faults = {fault: [name for name in names if strict or name.startswith(ours)] for fault, names in faults.items()}
            for fault, names in faults.items():
                if names:
                    info.mismatched_keys = set()  # else its own error would replace this one
                    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                    raise CheckpointError(f"the checkpoint {fault} {', '.join(names[:3])}{more}; get it again (matquant verify names the damage)")
            self.checked = True

        model._adjust_missing_and_unexpected_keys = check

    # --- after loading --------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        if not self.checked:  # a transformers that no longer calls the hook above would load damaged folders in silence
            raise InputError(
                "this version of transformers does not report missing tensors to matquant; install transformers 5.23, with which it was tested"
            )
        for path in (*self.plan, *self.tables):
            layer = model.get_submodule(path)
            assert isinstance(layer, NestedLinear)
            check_values(path, layer)
            layer.set_bits(self.plan.get(path, layer.bits))

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | str | None = None) -> "PreTrainedModel":
        """Every NestedLinear becomes the layer it stands for (Conv1D in GPT-2, else its file would not load), at its current width."""
        from transformers.pytorch_utils import Conv1D

        if isinstance(dtype, str):  # transformers passes config.dtype, which save_pretrained turns into a word
            dtype = getattr(torch, dtype)
        kind = model.dtype if dtype is None else dtype
        if any(layer.weight.is_meta for layer in model.modules() if isinstance(layer, NestedLinear)):
            raise InputError("cannot dequantize a model that is offloaded to disk; load it without offloading")
        _dense_tables(model, kind)
        for path, layer in layers_of(model).items():
            weight = layer.weight_at(layer.bits).dense(kind)
            with torch.device("meta"):
                plain = Conv1D(layer.out_features, layer.in_features) if layer.transposed else nn.Linear(layer.in_features, layer.out_features)
            plain.weight = nn.Parameter(weight.T.contiguous() if layer.transposed else weight)
            plain.bias = layer.bias
            model.set_submodule(path, plain)
        return model.to(kind)

    def is_serializable(self) -> bool:
        """Raises InputError for layers with different planes, which are no checkpoint."""
        if len(self.planes) > 1:
            raise InputError(
                f"the model holds {min(self.planes)} to {max(self.planes)} planes a layer, which is no checkpoint; load it with keep=8 to save it"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _place(model: "PreTrainedModel", name: str) -> str | None:
    """Where the checkpoint's `name` is in the model; None if it is not."""
    prefix = model.base_model_prefix
    for path in dict.fromkeys([name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]):  # AutoModel has no prefix
        with suppress(AttributeError):
            model.get_submodule(path)
            return path
    return None


def replace(model: "PreTrainedModel", name: str, checkpoint: Checkpoint, planes: int) -> str:
    """Put an empty NestedLinear where the checkpoint says `name`; return where that is in the model. Raises CheckpointError."""
    from transformers.pytorch_utils import Conv1D

    shape = checkpoint.modules[name]
    if (path := _place(model, name)) is None:
        raise CheckpointError(f"the checkpoint quantizes {name}, which {type(model).__name__} does not have; config.json is of another model")
    old = model.get_submodule(path)
    # By forward and not by class: a subclass that computes something else must not become a plain matrix product.
    transposed = type(old).forward is Conv1D.forward
    if not transposed and type(old).forward is not nn.Linear.forward:
        raise CheckpointError(f"the checkpoint quantizes {name}, which is a {type(old).__name__} and no linear layer in {type(model).__name__}")
    size = (old.weight.shape[1], old.weight.shape[0]) if transposed else tuple(old.weight.shape)
    if size != (shape.out, shape.in_features):
        raise CheckpointError(
            f"{name} is [{shape.out}, {shape.in_features}] in the checkpoint but {list(size)} in the model; config.json is of another model"
        )
    model.set_submodule(path, NestedLinear(shape, checkpoint.layout, planes, old.bias, transposed, device="meta"))
    return path


def put_tables(model: "PreTrainedModel", checkpoint: Checkpoint) -> list[str]:
    """Put what reads tables in the places of heads and embeddings; return where the tables are in the model. Raises CheckpointError."""
    found: list[str] = []
    for name, table in checkpoint.tables.items():
        if (path := _place(model, name)) is None:
            if type(model).__name__ not in (model.config.architectures or ()):
                continue  # AutoModel has no head
            raise CheckpointError(f"the checkpoint has a table {name}, which {type(model).__name__} does not have; config.json is of another model")
        old: Any = model.get_submodule(path)
        looked_up = isinstance(old, nn.Embedding)
        if not looked_up and type(old).forward is not nn.Linear.forward:
            raise CheckpointError(f"the checkpoint has a table {name}, which is a {type(old).__name__} and neither embedding nor linear layer")
        if tuple(old.weight.shape) != (table.shape.out, table.shape.in_features):
            raise CheckpointError(
                f"the table {name} is [{table.shape.out}, {table.shape.in_features}] in the checkpoint but {list(old.weight.shape)} in the model; "
                "config.json is of another model"
            )
        model.set_submodule(path, NestedEmbedding(table, old, device="meta") if looked_up else NestedHead(table, old.bias, device="meta"))
        found.append(path)
    _tie(model, found)
    return found


def _tie(model: Any, tables: Iterable[str]) -> None:
    """Let heads that are tied to one of these embeddings read its table. transformers would tie tensors, and has none to tie any more."""
    for target, source in dict(model.all_tied_weights_keys).items():
        path, owner = (key.removesuffix(".weight") for key in (target, source))
        if owner in tables and path not in tables and isinstance(table := model.get_submodule(owner), NestedEmbedding):
            model.set_submodule(path, TiedHead(table, model.get_submodule(path).bias))
            del model.all_tied_weights_keys[target]
            model._tied_weights_keys = {key: other for key, other in model._tied_weights_keys.items() if key != target}


def _dense_tables(model: Any, kind: torch.dtype) -> None:
    """Heads and embeddings become what they stand for, and are tied as before."""
    known: dict[int, nn.Parameter] = {}
    for path, module in [(path, module) for path, module in model.named_modules() if isinstance(module, NestedHead | TiedHead)]:
        model.set_submodule(path, plain(module, kind, known))
    if "_tied_weights_keys" in vars(model):
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _refuse_tied(model: "PreTrainedModel", quantized: Iterable[str]) -> None:
    """A quantized layer cannot share its weight: saving would drop it and the reload give NaN."""
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    for path in quantized:
        if path in tied:
            raise CheckpointError(f"{path} is quantized but tied to the embedding; set tie_word_embeddings to false in config.json")


def check_values(path: str, layer: NestedLinear) -> None:
    """Raise CheckpointError unless every tensor of a loaded layer has its dtype and values that the format allows."""
    for name, buffer in layer.named_buffers(recurse=False):
        kind = getattr(torch, layer.layout.scale_dtype) if name == "scale" else torch.uint8
        if buffer.dtype != kind:
            raise CheckpointError(f"{path}.{name} was loaded as {buffer.dtype}, not {kind}; get the checkpoint again")
        problem = None if buffer.is_meta else value_problem(name.replace("_", "."), buffer, layer.in_features, layer.layout)
        if problem:  # on the meta device: offloaded to disk
            raise CheckpointError(f"{path}.{name} {problem}; get the checkpoint again (matquant verify names the damage)")


def layers_of(model: nn.Module) -> dict[str, NestedLinear]:
    """What plans are about."""
    return {path: module for path, module in model.named_modules() if isinstance(module, NestedLinear) and not isinstance(module, NestedHead)}


def register() -> None:
    """Make transformers know matquant checkpoints. Does nothing the second time."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(MatquantConfig)
        auto.register_quantizer(METHOD)(MatquantHfQuantizer)
    # transformers honours what a quantization_config argument asks for only if its class is in this tuple; else it says nothing
    known = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    if known and MatquantConfig not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, MatquantConfig)


# --- what users call ----------------------------------------------------------------------------------------------------


def from_pretrained(
    path_or_id: str | Path,
    bits: int | BitPlan | None = None,
    *,
    keep: int | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    **kwargs: Any,
) -> "PreTrainedModel":
    """Load a causal LM from a matquant folder or Hub id, reading at `bits`.

    bits: a width, or a plan (layer name -> width); None = the default of the checkpoint and everything it has.
    keep: the widest width that `set_bits` may switch to later; planes beyond it are neither downloaded nor read. None = every layer holds
    the planes of its own width and no others.
    Other keywords go to AutoModelForCausalLM.from_pretrained. Raises InputError, PlanError, MissingPlanesError, CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    hub = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
    folder = locate(path_or_id, bits, keep, **hub)
    checkpoint = Checkpoint.open(folder)
    choose(checkpoint, bits, keep)  # says what is wrong before transformers says something else
    code = {"trust_remote_code": kwargs["trust_remote_code"]} if "trust_remote_code" in kwargs else {}
    config = AutoConfig.from_pretrained(folder, **code)
    asked = {"default": bits.default, "layers": dict(bits.overrides)} if isinstance(bits, BitPlan) else bits
    # transformers takes widths only through the config (as keyword it hands them to the model's constructor)
    config.quantization_config = {**checkpoint.config["quantization_config"], "load": {"bits": asked, "keep": keep}}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, device_map=device_map, **kwargs)


def locate(path_or_id: str | Path, bits: int | BitPlan | None, keep: int | None, **hub: Any) -> Path:
    """The local folder, after downloading from the Hub the files that these widths need. Raises InputError."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if isinstance(path_or_id, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id) or path_or_id.startswith("."):
        raise InputError(f"no folder {path_or_id}; give the folder of a matquant checkpoint, or a Hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    widest = keep or (max(bits.default, *bits.overrides.values(), 0) if isinstance(bits, BitPlan) else bits)
    # One plane more than the bits covers every slicing rule; the rest of a folder is small.
    skip = [] if widest is None else [f"model-plane{k}-*" for k in range(widest + 1, 8)]
    try:
        found = snapshot_download(path_or_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"], ignore_patterns=skip, **hub)
    except (OSError, ValueError, HfHubHTTPError) as error:  # no network, no such name, bad name
        raise InputError(f"cannot get {path_or_id} from the Hub ({error}); give a local folder, or check the name and the connection") from None
    return Path(found)


def set_bits(model: nn.Module, bits: int | BitPlan) -> None:
    """Switch every layer to a width or a plan; nothing is switched if any cannot. Raises PlanError, MissingPlanesError."""
    layers = layers_of(model)
    if not layers:
        raise InputError("the model has no matquant layers; load it with matquant.from_pretrained")
    plan = BitPlan(bits) if isinstance(bits, int) else bits
    plan.check(layers, next(iter(layers.values())).layout.widths)
    for path, layer in layers.items():
        layer.check_bits(plan.bits(path))
    for path, layer in layers.items():
        layer.set_bits(plan.bits(path))


register()  # whoever imports this module first, `import matquant` or transformers.quantizers through it, finds it done
