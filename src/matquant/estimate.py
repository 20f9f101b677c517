"""What a run would cost, for --dry-run: bytes by arithmetic, time and memory by a rough model of the work.

Work is counted in multiplications of matrices and in touches of elements, and divided by what this machine does of each in a
short trial. Expect a factor of two either way.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matquant.codes import CodeChooser
from matquant.models import Layers, Source, own_tensors
from matquant.plan import Table
from matquant.recipe import Recipe
from matquant.residual import HIGH

TOUCHES_PER_CANDIDATE = 8  # elementwise passes over [rows, candidates] in CodeChooser.choose, and about as many for the feedback
CLIP_TOUCHES = 21 * 4 * 8  # shrinks x targets x passes in clip.joint_cost
LIVE_COPIES = 6  # float32 copies of the largest group of layers alive at once: weights, running weights, codes, errors


@dataclass(frozen=True)
class Estimate:
    """weights: quantized ones. read_bytes, bits_per_weight: of the quantized part by width, metadata included."""

    model: str
    layers: int
    weights: int
    skipped: tuple[tuple[str, str], ...]
    read_bytes: Mapping[int, int]
    bits_per_weight: Mapping[int, float]
    file_bytes: int
    memory_bytes: int
    seconds: float


def estimate_cost(source: Source, layers: Layers, recipe: Recipe, tables: Mapping[str, Table]) -> Estimate:
    """Sizes and costs of quantizing `layers` and `tables` of `source` by `recipe`."""
    layout, shapes = recipe.layout, layers.quantized
    weights = sum(shape.weights for shape in shapes.values())
    read = {bits: sum(layout.read_bits(shape, bits) for shape in shapes.values()) for bits in layout.widths}
    ours = {*shapes, *tables}
    rest = sum(t.numel() * _stored_size(source, t) for name, t in own_tensors(source.model).items() if name.removesuffix(".weight") not in ours)
    stored = sum(layout.stored_bits(shape) for shape in shapes.values()) // 8 + sum(table.stored_bytes for table in tables.values())
    return Estimate(
        source.name,
        len(shapes),
        weights,
        layers.skipped,
        {bits: count // 8 for bits, count in read.items()},
        {bits: count / weights for bits, count in read.items()},
        stored + rest,
        _memory(source, layers, recipe),
        _seconds(layers, recipe, weights),
    )


def _stored_size(source: Source, tensor: Tensor) -> int:
    """Bytes of a number that is not quantized. GGUF is expanded to float32 and stored in 16 bits."""
    return 2 if source.gguf_file and tensor.is_floating_point() else tensor.element_size()


def _memory(source: Source, layers: Layers, recipe: Recipe) -> int:
    """Peak bytes: one block and the matrices of its largest layer, all activations, and the model where it is loaded whole."""
    block = max(sum(layers.quantized[name].weights for name in layers.of_block(index)) for index in range(layers.count))
    inputs = max(shape.in_features for shape in layers.quantized.values())
    hidden = source.model.get_input_embeddings().weight.shape[1]
    sequences = recipe.num_samples + recipe.passed(recipe.num_samples) * (len(recipe.stream_widths) + 1)  # the original's inputs are kept too
    activations = sequences * recipe.seq_len * hidden * 4
    whole = sum(t.numel() * t.element_size() for t in own_tensors(source.model).values())
    loaded = whole if source.note or recipe.calibration == "self" or recipe.eval_samples else 0
    return 4 * block * LIVE_COPIES + 3 * 8 * inputs**2 + activations + 2 * loaded


def _seconds(layers: Layers, recipe: Recipe, weights: int) -> float:
    multiply, touch = _speed()
    tokens = recipe.num_samples * recipe.seq_len
    inputs = sum(shape.weights * shape.in_features for shape in layers.quantized.values())
    chooser = CodeChooser.of(recipe.targets, recipe.grid, recipe.slicing)
    passes = 2 * weights * tokens + inputs * (2 + len(recipe.bits) + 3 * len(recipe.layout.refit_widths))
    sampling = 8 * weights * recipe.seq_len if recipe.calibration == "self" else 0  # bound by memory: far from matmul speed
    measuring = (1 + len(recipe.bits)) * recipe.eval_samples * recipe.seq_len * weights
    touches = weights * (2**chooser.prefix_bits * TOUCHES_PER_CANDIDATE + (CLIP_TOUCHES if recipe.clip_search else 0))
    trained = weights * trained_tokens(recipe)
    return (passes + sampling + measuring + trained) * multiply + (touches if recipe.method in ("gptq", "block") else 0) * touch


def trained_tokens(recipe: Recipe) -> int:
    """Passes of all trainings, in tokens that go forward once: a backward pass is two, and that of a teacher which is not trained itself one more."""
    reads = recipe.layout.refit_widths
    widths = 1 if recipe.random_width else len(recipe.targets)
    taught = len(set(recipe.teachers.values()) - (set() if recipe.random_width else set(recipe.targets)))
    of_method = {
        "block": 3 * recipe.refine_steps * max(recipe.refine_tokens, recipe.seq_len) * sum(r <= HIGH for r in (*recipe.targets, *reads)),
        "omniquant": recipe.epochs * recipe.num_samples * recipe.seq_len * (3 * len(recipe.targets) + taught),
        "qat": recipe.train_tokens * (3 * widths + taught),
    }
    return of_method.get(recipe.method, 0) + 4 * recipe.finetune_reads * len(reads)


def _speed() -> tuple[float, float]:
    """(seconds a multiply-add in a matmul, seconds an element of an elementwise pass) on this machine now."""
    a = torch.randn(768, 768)
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    multiply = (time.perf_counter() - started) / (4 * 768**3)
    b = torch.randn(2**22)
    started = time.perf_counter()
    for _ in range(4):
        b * 2 + 1
    return multiply, (time.perf_counter() - started) / (8 * 2**22)
