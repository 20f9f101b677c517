"""Recipe: everything a quantization run depends on. Every default stands here, once; command-line flags are its fields.

`targets` maps a width to its weight lam_r in sum_r lam_r loss_r, where a loss of 1 is what a run dedicated to that width is expected
to lose (objective.py); with `normalize` off, in units of the squared parent step, as the papers count. {8: 1} is the classic method.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args, no_type_check

import yaml

from matquant.codes import WIDTHS, Grid, Slicing, check_rule
from matquant.errors import RecipeError, choices
from matquant.plan import SCALE_BITS, Layout

Feedback = Literal["per-width", "mean"]
Decay = Literal["cosine", "constant"]
Divergence = Literal["kl", "reverse-kl", "mse"]
METHOD_NAMES = ("minmax", "gptq", "block", "omniquant", "qat")
TRAIN_DTYPES = ("float32", "bfloat16")


def _targets() -> dict[int, float]:
    return {8: 0.08, 6: 0.05, 4: 0.25, 3: 0.5, 2: 1.0}


ORIGINAL = 0  # names the stream of the original model where streams are named by their widths
DRIFTS = 4  # from 5 bits up, what a layer is given hardly differs from what the original gives it
STREAM_SAMPLES = 32  # more sequences for a stream cost time in proportion and gain little: docs/LOG.md
FAVOR = 3.0  # how much more a favoured width weighs


def decayed(decay: Decay, done: float) -> float:
    """Share of a learning rate that is left when a share `done` of the steps is made."""
    return 1.0 if decay == "constant" else 0.5 * (1 + math.cos(math.pi * done))


def _help(text: str, **kwargs: Any) -> Any:
    return field(metadata={"help": text}, **kwargs)


@no_type_check  # for checkers at run time, as under pytest: it refuses bad values itself, in words
@dataclass(frozen=True)
class Recipe:
    method: str = _help(
        "how codes are chosen: gptq; block (gptq, then training block by block); minmax (round to nearest); omniquant (learned clipping, block by block); qat (training of the whole model)",
        default="gptq",
    )
    bits: tuple[int, ...] = _help("read widths that the checkpoint offers, for instance 8,6,4,3,2", default=(8, 6, 4, 3, 2))
    targets: Mapping[int, float] = _help(
        "widths that are optimised and the weight of each, for instance 8:.08,6:.05,4:.25,3:.5,2:1", default_factory=_targets
    )
    normalize: bool = _help(
        "count a target's loss relative to what a run dedicated to it would lose; off = raw lambdas, as in the papers", default=True
    )
    favor: tuple[int, ...] = _help("targets that matter most to you, for instance 4,3: their weights are tripled", default=())
    parent_bits: int = _help("stored width of a code", default=8)
    group_size: int = _help("input channels that share a scale; -1 = the whole row", default=64)
    symmetric: bool = _help("zero fixed at the middle of the grid, not stored; off = a stored zero per group", default=False)
    overlap: bool = _help("residual cells overlap above 4 bits (docs/FORMAT.md)", default=False)
    slicing: Slicing = _help("how r bits are taken from a code: floor, round or round-overflow", default="floor")
    scale_dtype: str = _help("storage of scales: float16, bfloat16 or float32", default="float16")
    head_bits: int = _help(
        "stored width of the output head and the embeddings, which are rounded to nearest and part of no plan; 0 = as they came", default=8
    )
    refit_bits: int = _help("widths up to this one get a refit, two bytes a group; 0 = none", default=5)
    clip_search: bool = _help("search the range of each group instead of spanning the largest weight", default=True)
    act_order: bool = _help("visit input channels in order of descending activation power", default=True)
    static_groups: bool = _help("fix scales before the first code is chosen; off = when the group is reached, as the papers do", default=True)
    feedback: Feedback = _help("error feedback of gptq: per-width, or mean (MatGPTQ's rule)", default="per-width")
    streams: tuple[int, ...] = _help("widths calibrated on activations of their own; none named = every target up to 4 bits", default=())
    stream_samples: int = _help(
        "sequences that each of these streams passes, the first of all; 0 = 32, or with methods block and omniquant, which train on them, all",
        default=0,
    )
    asymmetric_calibration: float = _help("share of the inputs' drift that weights make up for (GPTAQ): 0 to 1", default=0.5)
    sweeps: int = _help("rounds of refit and coordinate descent over the codes after GPTQ", default=3)
    refine_steps: int = _help("training steps of each width, and of each read (method block)", default=60)
    refine_tokens: int = _help("tokens of a training step: whole sequences, at least one", default=1024)
    refine_reach: float = _help("how far training may move a code, in parent codes: at 4 bits; twice as far with each bit less", default=0.7)
    refine_dtype: str = _help(
        "what blocks compute in while they are trained: float32 or bfloat16 (faster on hardware that has it)", default="float32"
    )
    finetune_reads: int = _help(
        "tokens on which, codes chosen, the read of each narrow width is tuned end to end towards the original's predictions; 0 = not", default=0
    )
    finetune_rate: float = _help("learning rate of that, in steps of the width: of zeros, and of scales as they move the mean code", default=0.003)
    train_text: str = _help("text of end-to-end training, as for --calibration; none = the calibration text", default="")
    train_tokens: int = _help("tokens to train on end to end (method qat)", default=1_000_000)
    batch_tokens: int = _help("tokens of a step of end-to-end training: whole sequences, at least one", default=4096)
    train_dtype: str = _help(
        "what the model computes in while it is trained end to end: float32 or bfloat16 (faster on hardware that has it)", default="float32"
    )
    learning_rate: float = _help("of weights (method qat)", default=2e-5)
    learn_scales: bool = _help("train scales, zeros and the reads of narrow widths too (method qat), at --finetune-rate", default=True)
    warmup: float = _help("share of the steps in which learning rates rise (method qat)", default=0.1)
    decay: Decay = _help("learning rates after that: cosine (to 0) or constant (methods qat, omniquant)", default="cosine")
    weight_decay: float = _help("of AdamW, for weights (method qat)", default=0.0)
    teachers: Mapping[int, int] = _help(
        "widths that learn from another, for instance 2:8,4:8; with method qat also from 0 = the original model (methods qat, omniquant)",
        default_factory=dict[int, int],
    )
    teachers_only: bool = _help(
        "a width with a teacher learns from it alone, not from the next token or the original block too (methods qat, omniquant)", default=False
    )
    divergence: Divergence = _help("distance to a teacher's predictions: kl, reverse-kl or mse of logits (method qat)", default="kl")
    temperature: float = _help("of both predictions in that distance (method qat)", default=1.0)
    balance_gradients: bool = _help("targets weigh the widths' gradients instead of their losses (method qat)", default=False)
    random_width: bool = _help("a random width for each layer and step, by the targets' weights, instead of all widths (method qat)", default=False)
    epochs: int = _help("rounds over the calibration sequences (method omniquant)", default=20)
    clip_rate: float = _help("learning rate of clipping (method omniquant)", default=0.01)
    transform: bool = _help("learn scales and shifts of inputs that their makers take over (method omniquant)", default=True)
    transform_rate: float = _help("learning rate of these (method omniquant)", default=0.005)
    token_power: float = _help(
        "in the training of blocks each token's error counts over its power (the original's or its own, whichever is larger) to this: "
        "1 = as a share of it, 0 = as it is, as in the papers",
        default=1.0,
    )
    damping: float = _help("added to the diagonal of H, as a share of its mean", default=0.01)
    skip: tuple[str, ...] = _help("shell-style patterns of module names to leave unquantized", default=())
    calibration: str = _help("FILE.txt, FILE.jsonl, hf:DATASET[:SPLIT], or self (text sampled from the model)", default="self")
    num_samples: int = _help("calibration sequences", default=32)
    seq_len: int = _help("tokens of a calibration or evaluation sequence", default=512)
    eval_samples: int = _help("sequences held out of the calibration text for the report; 0 = no report of quality", default=8)
    seed: int = _help("of the choice of sequences and of sampling", default=0)
    rotate: bool = _help("rotate the residual stream and the value heads before quantizing (QuaRot without online rotations)", default=False)

    def __post_init__(self) -> None:
        self._check_widths()
        self._check_choice("method", METHOD_NAMES)
        self._check_choice("scale_dtype", SCALE_BITS)
        self._check_choice("feedback", get_args(Feedback))
        for name, allowed in {
            "refine_dtype": TRAIN_DTYPES,
            "train_dtype": TRAIN_DTYPES,
            "decay": get_args(Decay),
            "divergence": get_args(Divergence),
        }.items():
            self._check_choice(name, allowed)
        self._check_numbers()
        if self.method == "block" and (self.parent_bits != 8 or self.slicing != "floor"):
            raise RecipeError(
                f"method block needs parent_bits 8 and slicing floor, not {self.parent_bits} and {self.slicing}; change them, or use method gptq"
            )
        self._check_teachers()
        if self.finetune_reads and not self.layout.refit_widths:
            raise RecipeError(
                "finetune_reads tunes the reads of widths that have their own, and none has: refit_bits is below all bits; raise it, for instance to 4"
            )
        used = {self.stream_of(r) for r in self.targets}
        if self.feedback == "mean" and len(used) > 1:
            named = " and ".join("the original's" if r == ORIGINAL else f"that of {r} bits" for r in sorted(used, reverse=True))
            raise RecipeError(
                f"feedback mean keeps one running weight, which needs one stream for all targets, not {named}; "
                f"name one, for instance --streams {self.parent_bits}"
            )
        if self.act_order and not self.static_groups:
            raise RecipeError("act_order needs static_groups: groups reached in another order would have no fixed members; switch one of them")
        if self.clip_search and not self.static_groups:
            raise RecipeError("clip_search needs static_groups: it searches before the first code is chosen; switch clip_search off")

    def _check_numbers(self) -> None:
        for name, low in {
            "num_samples": 1,
            "seq_len": 2,
            "eval_samples": 0,
            "refit_bits": 0,
            "stream_samples": 0,
            "sweeps": 0,
            "refine_steps": 1,
            "refine_tokens": 1,
            "finetune_reads": 0,
            "train_tokens": 1,
            "epochs": 1,
            "batch_tokens": 1,
            "seed": 0,
        }.items():
            if getattr(self, name) < low:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if self.seed >= 2**63:
            raise RecipeError(f"seed is {self.seed}; it must be below 2^63")
        if not 0 < self.refine_reach <= 128:
            raise RecipeError(f"refine_reach is {self.refine_reach}; it must be above 0 and at most 128 parent codes, for instance 4")
        for name, example in {
            "damping": 0.01,
            "finetune_rate": 0.003,
            "learning_rate": 1e-5,
            "clip_rate": 0.01,
            "transform_rate": 0.005,
            "temperature": 1,
        }.items():
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be a positive number, for instance {example}")
        if not 0 <= self.warmup <= 1 or not 0 <= self.weight_decay < float("inf"):
            raise RecipeError(f"warmup is {self.warmup} and weight_decay {self.weight_decay}; one is a share from 0 to 1, the other at least 0")
        for name in ("asymmetric_calibration", "token_power"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be from 0 to 1, for instance 0.5")

    def _check_teachers(self) -> None:
        if self.method in ("qat", "omniquant") and self.overlap:
            raise RecipeError(f"method {self.method} trains no overlapping residuals; switch overlap off")
        for width, teacher in self.teachers.items():
            if width not in self.targets:
                raise RecipeError(f"teachers names {width} bits, which is no target; {choices(width, self.targets)}")
            if teacher == ORIGINAL:
                if self.method == "omniquant":
                    raise RecipeError(f"teachers has {width}:{ORIGINAL}, but method omniquant learns from the original anyway; name a wider width")
            else:
                check_rule(teacher, self.grid, self.slicing)
                if teacher <= width:
                    raise RecipeError(f"{teacher} bits cannot teach {width} bits; a teacher is wider, or {ORIGINAL} for the original model")
        if self.teachers_only and not self.teachers:
            raise RecipeError("teachers_only, but no width has a teacher; name some, for instance --teachers 2:8")

    def _check_choice(self, name: str, allowed: Any) -> None:
        if getattr(self, name) not in allowed:
            raise RecipeError(f"{name} is {getattr(self, name)!r}; {choices(getattr(self, name), allowed)}")

    def _check_widths(self) -> None:
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise RecipeError(f"bits is {list(self.bits)}; give each read width once, for instance 8,6,4,3,2")
        if not self.targets:
            raise RecipeError("targets is empty; give at least one width and its weight, for instance 8:1")
        for width in self.favor:
            if width not in self.targets:
                raise RecipeError(f"favor names {width} bits, which is no target; {choices(width, self.targets)}")
        for width in (*self.bits, *self.targets, *self.streams):
            check_rule(width, self.grid, self.slicing)
        if self.head_bits and self.head_bits not in WIDTHS:
            raise RecipeError(f"head_bits is {self.head_bits}; give 2 to 8, or 0 to leave the output head and the embeddings as they came")
        for width, lam in self.targets.items():
            if not 0 < lam < float("inf"):
                raise RecipeError(f"targets gives {width} bits the weight {lam}; weights must be positive")
        object.__setattr__(self, "bits", tuple(sorted(self.bits, reverse=True)))
        object.__setattr__(self, "streams", tuple(sorted(set(self.streams), reverse=True)))
        object.__setattr__(self, "targets", {r: float(self.targets[r]) for r in sorted(self.targets, reverse=True)})
        object.__setattr__(self, "teachers", {r: self.teachers[r] for r in sorted(self.teachers, reverse=True)})

    @property
    def grid(self) -> Grid:
        return Grid(self.parent_bits, self.group_size, self.symmetric, self.overlap)

    @property
    def layout(self) -> Layout:
        refits = tuple(r for r in self.bits if r <= self.refit_bits)
        return Layout(self.grid, self.slicing, self.bits, refits, self.scale_dtype)

    @property
    def importance(self) -> Mapping[int, float]:
        """`targets`, those of `favor` tripled."""
        return {r: lam * (FAVOR if r in self.favor else 1.0) for r, lam in self.targets.items()}

    def aiming_at(self, targets: Mapping[int, float]) -> "Recipe":
        """The same with other targets, each width calibrated on the stream that it has here."""
        return replace(self, targets=targets, favor=(), streams=self.stream_widths, teachers={}, teachers_only=False)

    @property
    def stream_widths(self) -> tuple[int, ...]:
        """The widths that have activations of their own, descending."""
        return self.streams or tuple(r for r in self.targets if r <= DRIFTS)

    def passed(self, sequences: int) -> int:
        """How many of the calibration sequences these pass."""
        return min(self.stream_samples or (sequences if self.method in ("block", "omniquant") else STREAM_SAMPLES), sequences)

    def stream_of(self, bits: int) -> int:
        """The stream that calibrates a width: the narrowest that is no narrower than it, else the original's."""
        return min((r for r in self.stream_widths if r >= bits), default=ORIGINAL)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back to an equal recipe."""
        targets = {str(r): lam for r, lam in self.targets.items()}
        lists = {name: list(getattr(self, name)) for name in ("bits", "favor", "streams", "skip")}
        teachers = {str(r): teacher for r, teacher in self.teachers.items()}
        return asdict(self) | lists | {"targets": targets, "teachers": teachers}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Recipe":
        """Raises RecipeError for unknown names, wrong types or values outside what is allowed."""
        known = {f.name: f for f in fields(Recipe)}
        for name in data:
            if name not in known:
                raise RecipeError(f"a recipe has no setting {name!r}; {choices(name, known)}")
        default = Recipe()
        return Recipe(**{name: _coerce(name, value, getattr(default, name)) for name, value in data.items()})

    @staticmethod
    def of_record(data: Mapping[str, Any]) -> "Recipe":
        """The recipe of a finished run. What it could not say yet is what was done then, and no default of today. Raises RecipeError."""
        return Recipe.from_dict({"head_bits": 0, **data})

    @staticmethod
    def load(path: Path) -> "Recipe":
        """Read a YAML or JSON recipe. Raises RecipeError."""
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date such as 2020-13-45
            raise RecipeError(f"cannot read the recipe {path}: {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"the recipe {path} must map settings to values, such as `group_size: 64`")
        return Recipe.from_dict(cast(dict[str, Any], data))

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: "Recipe") -> list[str]:
        """Lines `name: ours -> theirs` for every setting that differs."""
        ours, theirs = self.to_dict(), other.to_dict()
        return [f"{name}: {ours[name]} -> {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def _coerce(name: str, value: Any, like: Any) -> Any:
    """`value` from JSON or YAML as the type of the field's default `like`."""
    try:
        if isinstance(like, Mapping):
            kind = _whole if name == "teachers" else float
            return {_whole(width): kind(entry) for width, entry in dict(value).items()}
        if isinstance(like, tuple):
            if not isinstance(value, (list, tuple)):
                raise ValueError("a list")
            return tuple(_text(v) if name == "skip" else _whole(v) for v in cast("list[Any]", value))
        if isinstance(like, bool):
            if not isinstance(value, bool):
                raise ValueError("true or false")
            return value
        if isinstance(like, int):
            return _whole(value)
        if isinstance(like, float) and isinstance(value, bool):
            raise ValueError("a number")
        return float(value) if isinstance(like, float) else _text(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{name} is {value!r}; it must look like {like!r} ({error})") from None


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("a whole number")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    return value
