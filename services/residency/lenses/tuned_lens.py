"""Tuned lenses (Belrose et al. 2023, arXiv 2303.08112, section 3): a translator per layer, then the model's last steps.

The file `tuned_lens.safetensors` holds `layers.<n>.weight` [d, d] and `layers.<n>.bias` [d], floating point, for some
or all layers n: the residual stream h after layer n is read as unembed(h + weight @ h + bias), the identity taken out
of the translator, as the public tool stores it. Its metadata may name `base_digest`. Nothing else may be in it. Layers
without a translator are not read, but the last one, which is the model's own prediction.

The public tool's folders (config.json and `params`) are read where their tensors are safetensors: `<i>.weight` and
`<i>.bias` translate the stream before layer i, so they become ours of layer i - 1; number 0 reads the embeddings, which
no layer comes before, and is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.residency.checkpoint import CheckpointError, Entry, read_header, read_tensors
from services.residency.lenses import Base, LensCorrupt, LensIncompatible, Spec
from services.residency.lenses.logit_lens import LogitLens

FILE = "tuned_lens.safetensors"
PUBLIC_FILE = "params.safetensors"
_OURS = re.compile(r"layers\.(\d{1,4})\.(weight|bias)")
_PUBLIC = re.compile(r"(\d{1,4})\.(weight|bias)")
Translators = dict[int, tuple[Tensor, Tensor]]
"""Layer to weight [d, d] and bias [d]."""


class TunedLens(LogitLens):
    """Reads the layers that it has translators for, and the last one."""

    def __init__(self, base: Base, translators: Translators) -> None:
        super().__init__(base)
        last = max(self._points.values())
        self._points = {point: n for point, n in self._points.items() if n in translators or n == last}
        self._translators = translators

    @property
    def nbytes(self) -> int:
        """Bytes of the translators."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The translators'."""
        return [tensor for pair in self._translators.values() for tensor in pair]

    def translated(self, layer: int, residual: Tensor) -> Tensor:
        """The stream after a layer, as the last layer would have it."""
        if layer not in self._translators:
            return residual
        weight, bias = self._translators[layer]
        return residual + torch.nn.functional.linear(residual, weight, bias)

    def move(self, device: str) -> None:
        """Bring the translators to a device."""
        self._translators = {n: (w.to(device), b.to(device)) for n, (w, b) in self._translators.items()}


def needed(spec: Spec, base: Base) -> int:
    """Bytes that the translators will take on the base's device, by the file's header.

    Raises:
        LensCorrupt: there is no file, or another one than the module's description allows.
    """
    return sum(entry.numel for entry in _entries(_file(spec), base)) * base.model.dtype.itemsize


def load(spec: Spec, base: Base) -> TunedLens:
    """Read the translators onto the base's device, in its dtype.

    Raises:
        LensIncompatible: another width or base, or a layer that the base does not have.
        LensCorrupt: the file cannot be read, or holds something else.
    """
    file = _file(spec)
    made_for = _metadata(file).get("base_digest")
    if made_for and made_for not in (base.digest, spec.base_digest):
        raise LensIncompatible("base", made_for, base.digest)
    entries = _entries(file, base)
    target = {"device": base.model.device, "dtype": base.model.dtype}
    found: dict[int, dict[str, Tensor]] = {}
    try:
        for entry, tensor in read_tensors(file.parent, entries, lambda _: None):
            layer, part = _place(entry, public=file.name == PUBLIC_FILE)
            found.setdefault(layer, {})[part] = tensor.to(**target)
    except (CheckpointError, OSError) as error:
        raise LensCorrupt("the lens's file cannot be read") from error
    if not all(tensor.isfinite().all() for parts in found.values() for tensor in parts.values()):
        raise LensCorrupt("a translator is not finite")
    return TunedLens(base, {layer: (parts["weight"], parts["bias"]) for layer, parts in found.items()})


def save(folder: Path, translators: Translators, base_digest: str = "") -> None:
    """Write the file that `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, (weight, bias) in translators.items():
        tensors[f"layers.{layer}.weight"], tensors[f"layers.{layer}.bias"] = weight.contiguous(), bias.contiguous()
    save_file(tensors, folder / FILE, {"base_digest": base_digest} if base_digest else {"format": "pt"})


def _file(spec: Spec) -> Path:
    if spec.folder is None:
        raise LensCorrupt("a tuned lens has files")
    for name in (FILE, PUBLIC_FILE):
        if (spec.folder / name).is_file():
            return spec.folder / name
    if any(spec.folder.glob("params.pt*")):
        raise LensCorrupt(
            "params.pt is a pickle, which can run code when it is read; save it again as params.safetensors with "
            "safetensors.torch.save_file(torch.load('params.pt', weights_only=True), 'params.safetensors')"
        )
    raise LensCorrupt(f"there is no {FILE}")


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise LensCorrupt("the lens's file cannot be read") from error


def _place(entry: Entry, *, public: bool) -> tuple[int, str]:
    """(layer, part) of a tensor; layer -1 for the public tool's translator of the embeddings."""
    found = (_PUBLIC if public else _OURS).fullmatch(entry.name)
    if found is None:
        raise LensCorrupt(f"{entry.name[:100]!r} is no part of a tuned lens")
    return int(found[1]) - public, found[2]


def _entries(file: Path, base: Base) -> list[Entry]:
    """The tensors to read, checked: names, dtypes, shapes, and that every translator is whole."""
    try:
        entries = read_header(file)
    except (CheckpointError, OSError) as error:
        raise LensCorrupt("the lens's file cannot be read") from error
    width, kept, places = base.facts.hidden_size, [], set()
    if file.name == PUBLIC_FILE:
        _require_public(file.parent, width)
    for entry in entries:
        layer, part = _place(entry, public=file.name == PUBLIC_FILE)
        if not entry.dtype.is_floating_point:
            raise LensCorrupt(f"{entry.name} is not floating point")
        if entry.shape != ((width, width) if part == "weight" else (width,)):
            raise LensIncompatible("width", entry.shape[-1] if entry.shape else 0, width)
        if layer >= base.facts.num_layers:
            raise LensIncompatible("layer", layer, f"{base.facts.num_layers} layers")
        if layer >= 0:
            kept.append(entry)
            places.add((layer, part))
    layers = {layer for layer, _ in places}
    if not layers or len(places) != 2 * len(layers):
        raise LensCorrupt("a translator needs a weight and a bias, and there must be one")
    return kept


def _require_public(folder: Path, width: int) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
        kind, stored = config.get("lens_type", "linear_tuned_lens"), config["d_model"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise LensCorrupt("config.json is missing or not valid") from error
    if kind != "linear_tuned_lens":
        raise LensCorrupt("only linear tuned lenses can be read")
    if stored != width:
        raise LensIncompatible("width", stored, width)
