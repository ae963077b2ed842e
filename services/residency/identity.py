"""The identity check: captured MLP inputs must give the captured MLP outputs when the model's own MLP is run on them.

A hook on the wrong side of a norm, a forgotten gain, a target before instead of after the post-norm, or rows that got
out of step between two captures all fail it: the silent bugs of published transcoder pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from services.residency.families import Family, Layer, UnsupportedModel, blocks, hook_points, submodule
from services.residency.fingerprint import fixed_input
from services.residency.hooks import capture_hooks

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest accepted relative error of rows that were selected out of their batch, where a matrix product of another
shape may round otherwise: about two units in the last place of the dtype. At the batch's own shape it is 0."""


class IdentityFailed(ValueError):
    """The captured pair is no input and output of this layer's MLP; `error` is relative, as `tolerance` is."""

    def __init__(self, layer: Layer, error: float, tolerance: float) -> None:
        super().__init__(
            f"layer {layer}: running the MLP on its captured input misses the captured output by {error:.3g} "
            f"(relative; at most {tolerance:.3g} is accepted)"
        )
        self.layer = layer
        self.error = error
        self.tolerance = tolerance


def contribution(model: nn.Module, family: Family, layer: Layer, mlp_in: Tensor) -> Tensor:
    """What a layer's MLP branch adds to the residual stream for the given input, [..., d] in and out."""
    block = blocks(model, family)[layer]
    mlp = submodule(block, family.mlp)
    y = mlp(mlp_in, torch.zeros_like(mlp_in)) if family.mlp_adds_residual else mlp(mlp_in)
    return submodule(block, family.mlp_post_norm)(y) if family.mlp_post_norm else y


def relative_error(model: nn.Module, family: Family, layer: Layer, mlp_in: Tensor, mlp_out: Tensor) -> float:
    """Largest error of a token, ‖MLP(mlp_in) - mlp_out‖ / ‖mlp_out‖ over the batch's root mean square norm.

    `mlp_in` and `mlp_out` are [..., d], the same rows of the two sites of these names.
    """
    with torch.no_grad():
        return _relative(contribution(model, family, layer, mlp_in).float() - mlp_out.float(), mlp_out)


def _relative(wrong: Tensor, right: Tensor) -> float:
    """Largest norm of a token over the root mean square norm of what is right."""
    largest, scale = wrong.float().norm(dim=-1).max(), right.float().norm(dim=-1).square().mean().sqrt()
    error = (largest / scale).item() if scale > 0 else float(largest)
    return float("inf") if math.isnan(error) else error


def check_pair(model: nn.Module, family: Family, layer: Layer, mlp_in: Tensor, mlp_out: Tensor) -> float:
    """Check rows that somebody captured, whatever their order and number; returns the relative error.

    Raises:
        IdentityFailed: the error is above `TOLERANCE` of the tensors' dtype, or not a number.
    """
    error = relative_error(model, family, layer, mlp_in, mlp_out)
    tolerance = TOLERANCE[mlp_out.dtype]
    if error > tolerance:
        raise IdentityFailed(layer, error, tolerance)
    return error


def check_identity(
    model: nn.Module, family: Family, layers: Sequence[Layer], input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[Layer, float]:
    """Capture one batch's MLP pairs and recompute them at the same shape.

    `input_ids` and `attention_mask` are [B, S].

    Returns:
        The relative error of each layer, 0.0 where the recomputation is bit for bit the same.

    Raises:
        IdentityFailed: float32 differs at all, or another dtype by more than `TOLERANCE`.
        UnknownHookPoint: a layer does not exist.
    """
    errors: dict[Layer, float] = {}
    with capture_hooks(model, family, hook_points(["mlp_in", "mlp_out"], layers)) as capture:
        found = capture.run(input_ids, attention_mask)
    for layer in layers:
        mlp_in, mlp_out = (found[point] for point in hook_points(["mlp_in", "mlp_out"], [layer]))
        errors[layer] = relative_error(model, family, layer, mlp_in, mlp_out)
        tolerance = 0.0 if mlp_out.dtype == torch.float32 else TOLERANCE[mlp_out.dtype]
        if errors[layer] > tolerance:
            raise IdentityFailed(layer, errors[layer], tolerance)
    return errors


def check_layout(model: nn.Module, family: Family) -> None:
    """Whether a layout that was borrowed from another family says what this model computes.

    In its first and last layer the MLP, recomputed from its captured input, must give what was captured behind it, and
    the residual stream before it plus that must be the stream after it.

    Raises:
        UnsupportedModel: says what does not hold, and that a layout is missing.
    """
    layers = list(blocks(model, family))
    ids = fixed_input(model.config.vocab_size, 16).to(next(model.parameters()).device)
    try:
        for layer in {layers[0], layers[-1]}:
            check_identity(model, family, [layer], ids)
            points = hook_points(["resid_mid", "mlp_out", "resid_post"], [layer])
            with capture_hooks(model, family, points) as capture:
                found = capture.run(ids)
            before, added, after = (found[point] for point in points)
            if (error := _relative(before + added - after, added)) > TOLERANCE[added.dtype]:
                raise IdentityFailed(layer, error, TOLERANCE[added.dtype])
    except IdentityFailed as error:
        raise UnsupportedModel(
            f"models of type {family.name!r} are built like a known family but compute something else, and have no "
            f"layout of their own here: what the MLP of layer {error.layer} adds to the residual stream is missed by "
            f"{error.error:.3g} (relative)"
        ) from error
