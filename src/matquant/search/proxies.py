"""Cheap stand-ins for sensitivities, [units, widths] each; 0 at the widest width. They rank units; they are no KL.

round_off       ||W_r - W||^2 / ||W||^2, W the widest read: needs no data
output_error    relative error of the layers' outputs on the calibration text, as report.json has it: costs nothing
fisher          1/2 sum_ij F_ij (W_r - W)_ij^2 with F_ij = mean over tokens of d_i^2 x_j^2: the diagonal of the Fisher information, where x is a
                layer's input and d the gradient of the log-probability of a token drawn from the model's own prediction; one backward pass. A
                second-order estimate of KL (https://arxiv.org/abs/1412.1193) that takes weights and tokens for independent
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from matquant import models
from matquant.checkpoint import Checkpoint
from matquant.checkpoint.files import read_bytes
from matquant.errors import CheckpointError, InputError
from matquant.report import Report
from matquant.search.probe import Probe
from matquant.search.units import Unit

MAX_REPORT_BYTES = 64 * 2**20


def round_off(checkpoint: Checkpoint, units: Sequence[Unit], widths: Sequence[int]) -> Float[np.ndarray, "units widths"]:
    """Squares summed over a unit's layers."""
    widest = max(widths)
    rows: list[list[float]] = []
    for unit in units:
        wrong, power = dict.fromkeys(widths, 0.0), 0.0
        for name in unit.layers:
            weight = checkpoint.read(name)
            whole = weight.read(widest).dense()
            power += float(whole.square().sum())
            for r in widths:
                wrong[r] += float((weight.read(r).dense() - whole).square().sum())
        rows.append([wrong[r] / max(power, 1e-30) for r in widths])
    return np.array(rows)


def output_error(checkpoint: Checkpoint, units: Sequence[Unit], widths: Sequence[int]) -> Float[np.ndarray, "units widths"]:
    """Summed over a unit's layers, what the widest width errs taken off. Raises InputError without a report of these layers."""
    try:
        content = json.loads(read_bytes(checkpoint.folder, "report.json", MAX_REPORT_BYTES))
        errors = {layer.name: layer.errors for layer in Report.from_dict(content, "report.json").layers}
        rows = [[sum(_excess(errors[name], r, max(widths)) for name in unit.layers) for r in widths] for unit in units]
    except (CheckpointError, ValueError, KeyError, RecursionError) as error:
        raise InputError(f"{checkpoint.folder} has no report of its layers' errors ({error}); choose another --loss") from None
    return np.array(rows)


def _excess(errors: Any, bits: int, widest: int) -> float:
    return max((errors[bits] or 0.0) - (errors[widest] or 0.0), 0.0)


def fisher(probe: Probe, widths: Sequence[int], seed: int = 0) -> Float[np.ndarray, "units widths"]:
    """On the probe's text, at its base."""
    probe.kl({})  # the base is in place
    generator = torch.Generator().manual_seed(seed)
    total = {(name, r): 0.0 for name in probe.layers for r in widths}
    inputs: dict[str, Tensor] = {}

    def forward(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            inputs[name] = args[0].detach().flatten(0, -2).float()
            output.register_hook(lambda gradient: add(name, gradient.detach().flatten(0, -2).float()))

        return hook

    def add(name: str, gradient: Tensor) -> None:
        information = gradient.square().T @ inputs.pop(name).square()
        layer = probe.layers[name]
        whole = models.as_rows(layer, layer.weight.data)
        for r in widths:
            change = models.as_rows(layer, probe.read(name, r)) - whole
            total[name, r] += 0.5 * float((information * change.square()).sum())

    hooks = [layer.register_forward_hook(forward(name)) for name, layer in probe.layers.items()]
    positions = 0
    try:
        for ids in probe.texts:
            with torch.enable_grad():
                embedded = probe.model.get_input_embeddings()(ids[:, :-1].to(probe.model.device)).detach().requires_grad_()
                logits = probe.model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
                logits.log_softmax(-1).gather(1, drawn).sum().backward()
            positions += len(drawn)
    finally:
        for hook in hooks:
            hook.remove()
    return np.array([[sum(total[name, r] for name in unit.layers) / positions for r in widths] for unit in probe.units])
