"""Find the decoder blocks and linear layers of any Hugging Face causal LM, and hold only one block of it at a time.

Nothing here knows an architecture: the blocks are the ModuleList with the most parameters, a quantizable layer is an nn.Linear
or a Conv1D inside a block, and everything else with a weight matrix inside a block is named in the report.

A model in safetensors is opened as a skeleton (parameters on the meta device) whose tensors are read when a block needs them.
Where the tensors in the files are not those of the modules (fused experts, GGUF), the model is loaded whole instead.
"""

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from matquant.errors import InputError, ResourceError
from matquant.plan import Shape
from matquant.recipe import Recipe

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md"]  # the card says the license
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors of a folder by name, each read from disk when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), file)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{file} is not a readable safetensors file ({error}); fetch it again") from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """From the header alone; None if there is no such tensor."""
        if name not in self._file_of:
            return None
        with safe_open(self._file_of[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def metadata(self, file: Path) -> dict[str, str]:
        """What the file's header says besides its tensors."""
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class Subset(Mapping[str, Tensor]):
    """Some of a lazy mapping's tensors, floats as `dtype` if it is given."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str], dtype: torch.dtype | None = None) -> None:
        self._tensors, self._names, self._dtype = tensors, dict.fromkeys(names), dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._tensors[name]
        return tensor.to(self._dtype) if self._dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Source:
    """A model to quantize. tensors: by parameter or buffer name of `model`. note: why it was loaded whole, or ""."""

    name: str
    folder: Path
    gguf_file: str | None
    model: PreTrainedModel
    tensors: Mapping[str, Tensor]
    note: str
    trust_remote_code: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises InputError if the folder has none."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself for a damaged tokenizer.json
            raise InputError(f"{self.name} has no usable tokenizer ({_first_line(error)}); put its tokenizer files beside the weights") from None


def resolve(model: str, revision: str | None) -> Path:
    """A local folder as it is, or a hub id fetched. Raises InputError."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds it (for GGUF: the folder, and --gguf-file {folder.name})")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"no model {model!r}: no such folder here, and the hub gave none ({_first_line(error)})") from None


def open_source(model: str, gguf_file: str | None = None, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Open a causal LM for quantization. Raises InputError for anything that is not one."""
    folder = resolve(model, revision)
    if gguf_file:
        return _open_gguf(model, folder, gguf_file)
    config = _config(model, folder, trust_remote_code)
    files = _weight_files(model, folder)
    tensors = SafetensorsFiles(files)
    skeleton = _skeleton(model, config, trust_remote_code)
    missing = [name for name, tensor in own_tensors(skeleton).items() if tensors.shape(name) != tuple(tensor.shape)]
    if not missing:
        return Source(model, folder, None, skeleton, tensors, "", trust_remote_code)
    del skeleton
    whole = load_dense(model, folder, None, trust_remote_code)
    note = f"loaded whole: the files hold {missing[0]} and {len(missing) - 1} others under other names or shapes"
    return Source(model, folder, None, whole, whole.state_dict(), note, trust_remote_code)


def _skeleton(model: str, config: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model with parameters on the meta device, typed as config.json says, and float32 buffers that it computed itself."""
    stored = config.dtype or torch.float32
    try:
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - whatever a model's constructor raises for settings that make no sense
        raise InputError(f"{model} cannot be built from its config.json ({_reason(error)}); fetch it again") from None
    for each in (skeleton.config, *(getattr(skeleton.config, name) for name in skeleton.config.sub_configs)):
        if each is not None:
            each.dtype = stored
    for parameter in skeleton.parameters():
        parameter.data = parameter.data.to(stored)
    skeleton.tie_weights()  # on the meta device every parameter was made anew, tied ones too
    return skeleton.eval()


def load_dense(model: str, folder: Path, gguf_file: str | None, trust_remote_code: bool = False, dtype: Any = "auto") -> PreTrainedModel:
    """The whole original model in memory, in evaluation mode. Raises InputError, or ResourceError if it does not fit."""
    extra: dict[str, Any] = {"use_safetensors": True}  # else transformers opens a pickle file where it finds no other
    if gguf_file:
        extra = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, ignore_mismatched_sizes=True, **extra
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise ResourceError(f"{model} does not fit in memory; use a machine with more, or a smaller model") from None
    except Exception as error:  # noqa: BLE001 - transformers raises nearly anything for a damaged model
        raise InputError(f"{model} cannot be loaded ({_reason(error)})") from None
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise InputError(f"{model}: {name} is {list(stored)} in the file, but {list(wanted)} by config.json; fetch both again")
    if lost := sorted(found["missing_keys"]):  # transformers only warns, and makes them up
        raise InputError(f"{model} lacks the tensor {lost[0]} ({len(lost)} missing in all); the model is incomplete, fetch it again")
    return loaded.eval()


def _open_gguf(model: str, folder: Path, gguf_file: str) -> Source:
    if not (folder / gguf_file).is_file():
        found = sorted(path.name for path in folder.glob("*.gguf"))
        raise InputError(f"{model} has no file {gguf_file}; it has {', '.join(found) or 'no GGUF file'}")
    whole = load_dense(model, folder, gguf_file, dtype=torch.float32)
    return Source(model, folder, gguf_file, whole, whole.state_dict(), "loaded whole: GGUF")


def _config(model: str, folder: Path, trust_remote_code: bool) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - whatever a configuration's constructor raises for values of the wrong kind
        raise InputError(f"{model} has no config.json that transformers understands ({_reason(error)})") from None
    already = getattr(config, "quantization_config", None)
    if already:
        raise InputError(f"{model} is quantized already ({_quant_method(already)}); give the original model")
    architectures = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder or (architectures and not any(name.endswith(CAUSAL) for name in architectures)):
        raise InputError(f"{model} is {', '.join(architectures) or 'an encoder-decoder'}, not a causal LM; give a decoder-only model")
    if type(config) not in AutoModelForCausalLM._model_mapping and not trust_remote_code:
        raise InputError(f"{model} has model type {config.model_type!r}, for which transformers has no causal LM")
    return config


def _quant_method(config: Any) -> str:
    return str(config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", "?"))


def _weight_files(model: str, folder: Path) -> list[Path]:
    """Those that transformers loads: one file, or those of the index; else whatever is there. Raises InputError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return _indexed(index)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        raise InputError(f"{model} holds {pickled[0]}, a pickle file, which may run code when opened; convert it to safetensors first")
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    hint = f"; for {gguf[0]} add --gguf-file {gguf[0]}" if gguf else ""
    raise InputError(f"{model} holds no .safetensors weights{hint}")


def _indexed(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is not an index of weight files; fetch it again") from None
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise InputError(f"{index} lists {file.name}, which is not in the folder; fetch it")
    return files


def fingerprint(source: Source) -> str:
    """sha256 of all weights, in one pass. Raises InputError for weights that no model can be meant to have."""
    digest = hashlib.sha256()
    parameters = dict(source.model.named_parameters())
    for name in own_tensors(source.model):
        tensor = source.tensors[name].detach().cpu().contiguous()
        if name in parameters and not tensor.is_floating_point():
            raise InputError(f"{name} is of type {tensor.dtype}; weights must be floating point, give the original model")
        if name in parameters and not tensor.isfinite().all():
            raise InputError(f"{name} holds non-finite values; the model is damaged")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name."""
    return {**dict(model.named_parameters()), **_persistent_buffers(model)}


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _reason(error: BaseException) -> str:
    """One line in words; of errors that are a bare value (KeyError: 'nope'), their kind too; of validation errors, why."""
    if isinstance(error, LookupError | ArithmeticError | TypeError | AttributeError):
        return f"{type(error).__name__}: {_first_line(error)}"
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- blocks and layers ----------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder blocks: the ModuleList with the most parameters. Raises InputError if there is none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InputError("the model has no list of decoder blocks to quantize")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layer_shape(module: nn.Module) -> Shape:
    """Output and input channels of a quantizable layer. A Conv1D holds its weight transposed, [in, out]."""
    rows, columns = module.weight.shape
    return Shape(columns, rows) if isinstance(module, Conv1D) else Shape(rows, columns)


def get_weight(module: nn.Module) -> Tensor:
    """A copy of the layer's weight as float32 [out, in]."""
    weight = module.weight.detach().float()
    return (weight.T if isinstance(module, Conv1D) else weight).contiguous().clone()


def as_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `held_as` as to layout: [out, in]."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def held_as(module: nn.Module, weight: Tensor) -> Tensor:
    """A dense [out, in] weight as the layer would hold it: its layout, dtype and device."""
    return (weight.T if isinstance(module, Conv1D) else weight).to(module.weight).contiguous()


@dataclass(frozen=True)
class Layers:
    """quantized: name -> shape, in the order of the model. skipped: (name, reason) of every other matrix in the blocks."""

    blocks: str
    count: int
    quantized: Mapping[str, Shape]
    skipped: tuple[tuple[str, str], ...]

    def of_block(self, index: int) -> list[str]:
        return [name for name in self.quantized if name.startswith(f"{self.blocks}.{index}.")]


def find_layers(model: nn.Module, recipe: Recipe) -> Layers:
    """What to quantize, and what not and why. Raises InputError where the group size fits some layer badly."""
    prefix, blocks = find_blocks(model)
    quantized: dict[str, Shape] = {}
    skipped: list[tuple[str, str]] = []
    for name, module in blocks.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear | Conv1D):
            pattern = next((p for p in recipe.skip if fnmatchcase(name, p) or name.endswith("." + p)), None)
            if pattern:
                skipped.append((name, f"asked for by --skip {pattern}"))
            else:
                quantized[name] = layer_shape(module)
        else:
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not isinstance(module, nn.Embedding):
                    skipped.append((f"{name}.{part}", f"{parameter.ndim}-D parameter of {type(module).__name__}, not a linear layer"))
    if not quantized:
        raise InputError(
            f"nothing to quantize: no linear layer is left in {prefix}" + (f" after --skip {', '.join(recipe.skip)}" if recipe.skip else "")
        )
    for name, shape in quantized.items():
        _check_group_size(name, shape, recipe.group_size)
    return Layers(prefix, len(blocks), quantized, tuple(skipped))


def _check_group_size(name: str, shape: Shape, size: int) -> None:
    if size != -1 and shape.in_features % size:
        fitting = [str(g) for g in (4, 8, 16, 32, 48, 64, 96, 128, 192, 256) if shape.in_features % g == 0]
        advice = f"use {', '.join(fitting)} or -1 (--group-size)" if fitting else "use --group-size -1"
        raise InputError(
            f"group size {size} does not divide {shape.in_features} input channels of {name}; {advice}, or skip the layer (--skip {name})"
        )


# --- one block at a time --------------------------------------------------------------------------------------------


def materialize(source: Source, module: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Fill `module` (named `prefix` in the model) with copies from the source, floats as `dtype`. Raises InputError for non-finite weights."""
    tied = {id(parameter): name for name, parameter in source.model.named_parameters()}
    for name, tensor in [*module.named_parameters(), *_persistent_buffers(module).items()]:
        full = f"{prefix}.{name}" if prefix else name
        value = source.tensors[full if full in source.tensors else tied[id(tensor)]]
        if value.is_floating_point():
            if not value.isfinite().all():
                raise InputError(f"{full} holds non-finite values; the model is damaged")
            value = value.to(dtype, copy=bool(source.note))  # a model loaded whole hands out its own memory
        set_module_tensor_to_device(module, name, device, value=value, dtype=value.dtype)
    for name, buffer in module.named_buffers():
        set_module_tensor_to_device(module, name, device, value=buffer)


def release(module: nn.Module) -> None:
    """Give a block's memory back."""
    module.to("meta")
    gc.collect()


def materialize_around(source: Source, blocks: str, device: torch.device, dtype: torch.dtype) -> None:
    """Fill everything outside the blocks but the output head, which quantization never runs."""
    head = source.model.get_output_embeddings()
    for name, module in source.model.named_modules():
        inside = name == blocks or name.startswith(f"{blocks}.")
        if not inside and module is not head and any(True for _ in [*module.parameters(recurse=False), *module.buffers(recurse=False)]):
            alone = _without_children(module)
            materialize(source, alone, name, device, dtype)


def _without_children(module: nn.Module) -> nn.Module:
    """A view of `module` that owns the same tensors but has no children."""
    view = nn.Module()
    view._parameters, view._buffers = module._parameters, module._buffers
    view._non_persistent_buffers_set = module._non_persistent_buffers_set
    return view
