"""Layers that training inserts by the config's schedule (progressive stacking, Gong et al. 2019, ICML)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from services.extensions.compute.config import ExtensionConfig
from services.extensions.compute.kinds import add
from services.residency.lenses.extension import Extensions


def insert_due(
    model: PreTrainedModel, attached: Extensions, key: str, config: ExtensionConfig, steps_done: int
) -> dict[str, nn.Parameter]:
    """Insert every layer whose step has come; called again it does nothing, so a resumed training calls it first.

    A layer begins as a copy of the layer before it as that is by then, without the adapters on it, scaled as
    configured: at scale 0 the step after it begins with the loss that the step before it ended with.

    Args:
        model: the base.
        attached: where the extension is; it is replaced there, active or not.
        key: the extension.
        config: its configuration.
        steps_done: optimizer steps so far.

    Returns:
        The new layers' parameters by checkpoint key, for the optimizer.

    Raises:
        ExtensionRefused: a layer does not fit the model.
    """
    before = whole = attached[key]
    there = sum(operation["op"] == "insert" for operation in whole.operations)
    with attached.using(None):
        for placement in config.placements:
            stacks = 2 if placement.position == "both" else 1
            if there >= stacks:
                there -= stacks
            elif placement.from_step <= steps_done:
                whole = add(model, whole, placement)
    if whole is before:
        return {}
    attached.replace(key, whole)
    return {name: parameter for name, parameter in whole.parameters.items() if name not in before.parameters}
