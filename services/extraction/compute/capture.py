"""Activations of a model in memory, batch by batch, and the check that MLP pairs are pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from services.residency.families import Family, Layer, family_of, locate, site_of
from services.residency.hooks import capture_hooks
from services.residency.identity import check_identity

PAIR_INPUTS = {"mlp_in", "ln2_normalized"}
"""Sites that are the input of an MLP pair."""
TokenBatch: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Token ids [B, S] int64, or (ids, attention mask), the mask [B, S] with 1 on real tokens."""


def capture(model: nn.Module, batches: Iterable[TokenBatch], hook_points: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Activations at several hook points from one forward pass per batch, which stops behind the deepest of them.

    The model carries no hook of ours before, between and after the batches.

    Args:
        model: a Hugging Face model; in eval mode unless dropout is wanted.
        batches: token ids on any device.
        hook_points: TransformerLens names such as `blocks.2.mlp.hook_in`.

    Returns:
        Per batch: hook point to [tokens, d], the unmasked tokens row by row, in the model's dtype and on its device;
        an attention pattern is [tokens, heads, keys].

    Raises:
        UnknownHookPoint: a hook point does not exist in this model; before any batch is taken.
        UnsupportedModel: the model is of no known layout; before any batch is taken.
    """
    family = family_of(model)
    for hook_point in hook_points:
        locate(model, family, hook_point)
    return _captured(model, family, batches, hook_points)


def _captured(
    model: nn.Module, family: Family, batches: Iterable[TokenBatch], hook_points: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = (part.to(device) for part in batch) if isinstance(batch, tuple) else (batch.to(device), None)
        chosen = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().flatten()

        def take(tensor: Tensor, chosen: Tensor | None = chosen) -> Tensor:
            flat = tensor.flatten(0, 1)
            return flat.clone() if chosen is None else flat.index_select(0, chosen)

        with capture_hooks(model, family, hook_points) as hooks:
            found = hooks.run(ids, mask, take=take)
        yield found


def paired_layers(hook_points: Sequence[str]) -> list[Layer]:
    """Layers of which both the MLP's input and what its branch adds are among the hook points."""
    sites: dict[Layer, set[str]] = {}
    for layer, site in map(site_of, hook_points):
        sites.setdefault(layer, set()).add(site)
    return [layer for layer, found in sites.items() if "mlp_out" in found and found & PAIR_INPUTS]


def identity_errors(
    model: nn.Module, family: Family, hook_points: Sequence[str], ids: Tensor, mask: Tensor
) -> dict[str, float]:
    """Relative error of the identity check on one batch, by layer; empty where there is no MLP pair.

    Raises:
        IdentityFailed: a captured pair is no input and output of its MLP.
    """
    device = next(model.parameters()).device
    layers = paired_layers(hook_points)
    found = check_identity(model, family, layers, ids.to(device), mask.to(device)) if layers else {}
    return {str(layer): error for layer, error in found.items()}
