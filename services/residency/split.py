"""A model that no device holds alone: its blocks over several of them, in one process, by accelerate's device map."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_max_layer_size
from transformers import PreTrainedModel

from services.residency.estimate import tensor_bytes
from services.residency.families import blocks, family_of
from services.residency.loading import Prepared, fill, prepare

Map = Mapping[str, int]
"""Path of a module to the number of the device that it and all below it are on."""


def device_map(prepared: Prepared, count: int, taken: int, device: str) -> tuple[dict[str, int], list[int]]:
    """Spread a model that is laid out evenly over devices, whole blocks only; tied weights stay together.

    Args:
        prepared: not filled.
        count: how many devices.
        taken: bytes of the first one that something else gets, and the model's share is smaller by.
        device: torch device of any of them.

    Returns:
        What is where, and the bytes of weights on each device.

    Raises:
        LoadFailed: a shape in the files is not the config's.
    """
    model = prepared.model
    stored = {
        name: weights + state
        for name, weights, state in tensor_bytes(model, prepared.entries, prepared.quantization, prepared.dtype, device)
    }
    whole = [type(block).__name__ for block in blocks(model, family_of(model)).values()]
    sizes = compute_module_sizes(model)
    total = sizes[""]
    less = taken * total // sum(stored.values())  # in bytes before quantisation, as all that accelerate knows
    largest, _ = get_max_layer_size(list(model.named_children()), sizes, whole)
    share = (total + less) // count + largest
    most = {0: max(0, share - less), **dict.fromkeys(range(1, count), share), count - 1: total}
    with _unwarned():
        found = {path: int(where) for path, where in infer_auto_device_map(model, most, whole).items()}
    held = [0] * count
    for name, size in stored.items():
        held[number_of(name, found)] += size
    return found, held


def number_of(name: str, spread: Map) -> int:
    """The number of the device of a module or tensor."""
    while name and name not in spread:
        name = name.rpartition(".")[0]
    return spread[name]


def load_split(directory: Path, quantization: str, spread: Map, devices: Sequence[str]) -> PreTrainedModel:
    """A model over `devices`, torch's names; whatever crosses from one to the next is moved by hooks of accelerate.

    Inputs and outputs are on the first device, hidden states on the device of their block.

    Raises:
        LoadFailed, CheckpointError, UnsupportedModel: the files or the model are not right.
        OSError: a file cannot be read.
        MemoryError, torch.OutOfMemoryError: it does not fit.
    """
    prepared = prepare(directory, quantization)
    model = fill(prepared, lambda name: devices[number_of(name, spread)], lambda done, total: None)
    places = {path: devices[number] for path, number in spread.items()}
    with _unwarned():
        return dispatch_model(model, places, main_device=devices[0], force_hooks=True)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Accelerate warns of numbers of devices that this process does not see, and takes the CPU for a way out."""
    log = logging.getLogger("accelerate")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
