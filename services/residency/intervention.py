"""Changes of a forward pass that a request asks for: splicing, ablation, steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from services.residency.families import (
    SITES,
    Facts,
    Family,
    UnknownHookPoint,
    hook_points,
    require_site,
    site_of,
    width_of,
)
from services.residency.lenses.transcoder import Transcoder
from services.residency.splice import Splice

Op = Literal["replace", "add", "scale", "zero", "mean"]


class InterventionRefused(ValueError):
    """The intervention does not fit the model; `field` is the wrong one of its fields."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


@dataclass(frozen=True, slots=True)
class Intervention:
    """A change of the forward pass at one site.

    Attributes:
        site: site alias or hook point.
        layer: base layer; unused where `site` is a whole hook point.
        op: `replace` by the vector or by a transcoder's reconstruction, `add` factor times the vector or the feature's
            decoder row, `scale` by the factor, `zero`, or `mean` over the text so far.
        vector: of the site's width.
        transcoder: an attached one, with the hook point that it reads.
        positions: token positions; all when empty.
    """

    site: str
    layer: int
    op: Op
    vector: Sequence[float] = ()
    transcoder: tuple[Transcoder, str] | None = None
    feature: int | None = None
    factor: float = 1.0
    positions: Sequence[int] = ()

    def splice(self, family: Family, known: Facts) -> Splice:
        """The same as a replacement at a hook point of a model.

        Raises:
            InterventionRefused: fields are missing, contradict each other or do not fit the model.
        """
        target = hook_points([self.site], [self.layer])[0] if self.site in SITES else self.site
        width = self._width(target, family, known)
        source = None
        if self.op in ("replace", "add"):
            self._require_operand(width)
            if self.op == "add" and self.transcoder is not None:
                self._row()
            if self.op == "replace" and self.transcoder is not None:
                source = self.transcoder[1]
        return Splice(target, self._replace, source)

    def _width(self, target: str, family: Family, known: Facts) -> int | None:
        """Numbers at the site; None in a layer of an extension, which may have a width of its own."""
        try:
            layer, site = site_of(target)
            tap = require_site(family, site)
        except UnknownHookPoint as error:
            raise InterventionRefused("site", str(error)) from error
        if tap.side in ("normalized", "pattern"):
            raise InterventionRefused("site", f"{site} can be read, not replaced")
        if not isinstance(layer, int):
            return None
        if layer >= known.num_layers:
            field = "layer" if self.site in SITES else "site"
            raise InterventionRefused(field, f"layer {layer} is not one of the model's, 0 to {known.num_layers - 1}")
        return width_of(site, known, known.context_length)

    def _require_operand(self, width: int | None) -> None:
        """That what is put or added there is given, and as wide as the site."""
        if self.transcoder is not None:
            if width is not None and self.transcoder[0].d_out != width:
                found = f"writes {self.transcoder[0].d_out} numbers, the site is {width} wide"
                raise InterventionRefused("transcoder_id", found)
        elif not self.vector:
            raise InterventionRefused("vector", f"{self.op} needs a vector or a transcoder")
        elif width is not None and len(self.vector) != width:
            raise InterventionRefused("vector", f"has {len(self.vector)} numbers, the site is {width} wide")

    def _row(self) -> Tensor:
        assert self.transcoder is not None, "checked by the caller"
        decoder = self.transcoder[0].W_dec
        if self.feature is None or self.feature >= len(decoder):
            raise InterventionRefused("feature", f"needs a latent below {len(decoder)}")
        return decoder[self.feature]

    def _replace(self, y: Tensor, x: Tensor | None) -> Tensor:
        new = self._changed(y, x)
        if not self.positions:
            return new
        kept = y.clone()
        inside = [position for position in self.positions if position < y.shape[1]]
        kept[:, inside] = new.to(y.dtype).expand_as(y)[:, inside]
        return kept

    def _changed(self, y: Tensor, x: Tensor | None) -> Tensor:
        match self.op:
            case "zero":
                return torch.zeros_like(y)
            case "scale":
                return y * self.factor
            case "mean":
                return y.mean(1, keepdim=True).expand_as(y)
            case "add":
                return y + self.factor * self._direction(y)
            case "replace" if self.transcoder is None:
                return self._direction(y).expand_as(y)
            case "replace":
                if x is None:
                    raise InterventionRefused("transcoder_id", "it reads what comes behind the site")
                return self.transcoder[0](x.reshape(-1, x.shape[-1]).float()).view(*y.shape[:-1], -1)

    def _direction(self, y: Tensor) -> Tensor:
        if self.transcoder is not None:
            return self._row().to(y)
        if len(self.vector) != y.shape[-1]:
            raise InterventionRefused("vector", f"has {len(self.vector)} numbers, the site is {y.shape[-1]} wide")
        return torch.tensor(list(self.vector), dtype=y.dtype, device=y.device)


def splices(
    interventions: Sequence[Intervention], family: Family, known: Facts, tokens: int | None = None
) -> list[Splice]:
    """All of them as replacements.

    Args:
        interventions: what is wanted.
        family: of the model.
        known: of the model.
        tokens: length of a text that the base reads; None for one that grows, maybe with an extension's layers.

    Raises:
        InterventionRefused: one does not fit the model or the text.
    """
    found = [change.splice(family, known) for change in interventions]
    if tokens is None:
        return found
    for change, made in zip(interventions, found, strict=True):
        layer = site_of(made.target)[0]
        if not isinstance(layer, int):
            raise InterventionRefused("site", f"{layer} is no layer of the base")
        if any(position >= tokens for position in change.positions):
            raise InterventionRefused("positions", f"the text has {tokens} tokens")
    return found
