"""Transcoders as lenses: which latents are active on each token, and how well they reconstruct the MLP's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.residency.families import SITES, UnknownHookPoint, locate
from services.residency.lenses import Base, LensCorrupt, LensIncompatible, PrefixUnknown, Reading, Spec, TokenReading
from services.residency.lenses.codes import Codes
from services.residency.lenses.transcoder import Transcoder
from services.residency.splice import Splice


class FeatureLens:
    """One transcoder on the base's device."""

    altering = False

    def __init__(self, transcoder: Transcoder, source: str, target: str) -> None:
        self._transcoder = transcoder
        self._source = source
        self._target = target

    @property
    def nbytes(self) -> int:
        """Bytes of the transcoder's weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The transcoder's."""
        return list(self._transcoder.state_dict().values())

    @property
    def hook_points(self) -> Sequence[str]:
        """The MLP's input, and the output that is compared with the reconstruction."""
        return (self._source, self._target)

    @property
    def splicing(self) -> tuple[Transcoder, str]:
        """The weights and the hook point they read, to put the reconstruction into a forward pass."""
        return self._transcoder, self._source

    def read(
        self,
        activations: Mapping[str, Tensor],
        input_ids: Tensor,
        top_k: int,
        prefix: int,
        changes: Sequence[Splice] = (),
    ) -> Reading:
        """Strongest latents of each token; FVU of each token and of the text, against the text's own mean.

        Raises:
            PrefixUnknown: `prefix` is beyond the transcoder's groups.
        """
        groups = prefix or None
        if prefix > len(self._transcoder.shape.group_sizes):
            raise PrefixUnknown(f"the transcoder has {len(self._transcoder.shape.group_sizes)} groups")
        x = activations[self._source][0].float()
        y = activations[self._target][0].double()
        codes = self._transcoder.encode_sparse(x, groups)
        missed = (y - self._transcoder.forward(x, groups).double()).square().sum(-1)
        spread = (y - y.mean(0)).square().sum(-1)
        tokens = [
            TokenReading(features=features, fvu=_ratio(error, variance))
            for features, error, variance in zip(strongest(codes, top_k), missed.tolist(), spread.tolist(), strict=True)
        ]
        return Reading(tokens, _ratio(missed.sum().item(), spread.sum().item()))

    def move(self, device: str) -> None:
        """Bring the transcoder to a device."""
        self._transcoder.to(device)

    def detach(self) -> None:
        """Nothing to take back."""

    def attach(self) -> None:
        """Nothing to put back."""


def _ratio(error: float, variance: float) -> float | None:
    """Error over variance; None where there is nothing to explain, as on a single token."""
    return error / variance if variance > 0 else None


def strongest(codes: Codes, top_k: int) -> list[list[tuple[int, float]]]:
    """(latent, activation) of each row's top_k strongest active latents, strongest first."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(codes.rows)]
    order = torch.argsort(codes.value, descending=True, stable=True)
    for row, latent, value in zip(
        codes.row[order].tolist(), codes.latent[order].tolist(), codes.value[order].tolist(), strict=True
    ):
        if len(rows[row]) < top_k:
            rows[row].append((latent, value))
    return rows


def places(transcoder: Transcoder, spec: Spec) -> tuple[str, str]:
    """(source, target) hook points of a transcoder; its own record of them, else the MLP pair of the given layer.

    A source of normalized activations with the norm's gain applied is the MLP's input itself.

    Raises:
        LensCorrupt: neither its record nor the spec names a layer.
    """
    info = transcoder.info
    source, target = info.get("source_hook_point"), info.get("target_hook_point")
    layer = spec.layer if spec.layer is not None else info.get("layer")
    if source is None or target is None:
        if layer is None:
            raise LensCorrupt("the transcoder does not say which layer it reads")
        return f"blocks.{layer}.{SITES['mlp_in']}", f"blocks.{layer}.{SITES['mlp_out']}"
    return transcoder.reads, target


def load(spec: Spec, base: Base) -> FeatureLens:
    """Read a transcoder's folder onto the base's device.

    Raises:
        LensIncompatible: it reads another layer, width or base than this one has.
        LensCorrupt: its files cannot be read.
    """
    if spec.folder is None:
        raise LensCorrupt("a transcoder has files")
    if base.family is None:
        raise LensIncompatible("a family with hook points", "decoder-only", base.facts.model_type)
    try:
        transcoder = Transcoder.load(spec.folder, device=base.model.device)
        source, target = places(transcoder, spec)
    except ValueError as error:
        raise LensCorrupt(f"the transcoder's files cannot be used: {error}") from error
    except OSError as error:
        raise LensCorrupt("the transcoder's files cannot be read") from error
    made_for = transcoder.info.get("base_digest")
    if made_for and made_for not in (base.digest, spec.base_digest):  # made for the model it belongs to or reads
        raise LensIncompatible("base", made_for, base.digest)
    width = base.facts.hidden_size
    for name, found in (("input width", transcoder.d_in), ("output width", transcoder.d_out)):
        if found != width:
            raise LensIncompatible(name, found, width)
    for point in (source, target):
        try:
            locate(base.model, base.family, point)
        except UnknownHookPoint as error:
            raise LensIncompatible("hook point", point, f"{base.facts.num_layers} layers") from error
    return FeatureLens(transcoder, source, target)
