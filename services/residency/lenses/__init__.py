"""Lenses: small artifacts on one model. This is the port that the pool knows; each kind is one module beside it.

Reading lenses look at activations and may be used together. Altering lenses change what the model computes; the pool
keeps them inactive except for the length of a call that wants one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a process that trains transcoders imports this package, and is not to wait for transformers
    from torch import Tensor
    from transformers import PreTrainedModel

    from services.residency.families import Facts, Family
    from services.residency.lenses.extension import Extensions
    from services.residency.splice import Splice


class LensIncompatible(ValueError):
    """The lens does not fit the model: `what` differs, with both values."""

    def __init__(self, what: str, expected: object, found: object) -> None:
        super().__init__(f"the lens needs {what} {expected}, the model has {found}")
        self.what = what
        self.expected = expected
        self.found = found


class PrefixUnknown(ValueError):
    """The dictionary does not have that many groups."""


class LensCorrupt(ValueError):
    """The lens's files cannot be read; the group it belongs to stays as it is."""


@dataclass(frozen=True, slots=True)
class Base:
    """The resident model as lenses see it."""

    model: PreTrainedModel
    family: Family | None
    """None for models without hook points (encoder-decoder)."""
    facts: Facts
    digest: str
    """Content digest of the model's files."""
    extensions: Extensions


@dataclass(frozen=True, slots=True)
class Spec:
    """What to attach. `folder` holds the artifact's files, None for kinds without files."""

    lens_id: str
    kind: str
    folder: Path | None = None
    base_digest: str = ""
    layer: int | None = None
    source_model_id: str = ""
    """Model whose activations it reads; its own base when empty."""
    artifact_uri: str = ""
    """Handle of the files; the same one names the same files."""


@dataclass(frozen=True, slots=True)
class Probability:
    """A token and its probability, 0 to 1."""

    token_id: int
    probability: float


@dataclass(slots=True)
class TokenReading:
    """One position as a lens reads it; a kind fills what it knows."""

    features: list[tuple[int, float]] = field(default_factory=list)
    """(latent, activation), strongest first."""
    fvu: float | None = None
    """Squared error of the reconstruction over the squared distance to the text's mean."""
    layers: list[tuple[int, list[Probability]]] = field(default_factory=list)
    """(layer, most probable next tokens read there)."""
    base_predictions: list[Probability] = field(default_factory=list)
    predictions: list[Probability] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as one lens reads it, one entry per token; `fvu` over the whole text where the kind has one."""

    tokens: list[TokenReading]
    fvu: float | None = None


class Lens(Protocol):
    """What every kind offers. All methods run on the device's thread."""

    @property
    def altering(self) -> bool:
        """Whether it changes what the model computes; then its id is a key of `Base.extensions`."""

    @property
    def nbytes(self) -> int:
        """Device memory that it adds to the base."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Everything that `move` moves."""

    @property
    def hook_points(self) -> Sequence[str]:
        """What `read` needs of the base's forward pass over the text."""

    def read(
        self,
        activations: Mapping[str, Tensor],
        input_ids: Tensor,
        top_k: int,
        prefix: int,
        changes: Sequence[Splice] = (),
    ) -> Reading:
        """Read a text.

        Args:
            activations: hook point to [1, S, d], of the base with no altering lens active, and with the changes.
            input_ids: [1, S].
            top_k: features or tokens per position.
            prefix: use only that many groups of a dictionary; all when 0.
            changes: replacements in the forward passes that the lens runs itself.
        """

    def move(self, device: str) -> None:
        """Bring its own weights to a torch device."""

    def detach(self) -> None:
        """Take back what `load` left in the base, if anything."""

    def attach(self) -> None:
        """Put it there again."""


Load = Callable[[Spec, Base], Lens]

KINDS: Mapping[str, str] = {
    "transcoder": "services.residency.lenses.features",
    "extension": "services.residency.lenses.altering",
    "logit_lens": "services.residency.lenses.logit_lens",
    "tuned_lens": "services.residency.lenses.tuned_lens",
}
"""Kind to the module whose `load(spec, base)` makes it; a new kind is one module and one line. A module may have a
`needed(spec, base)` too."""


def needed(spec: Spec, base: Base) -> int:
    """Device memory that a lens will add as far as its kind knows before it is read; `Lens.nbytes` knows afterwards.

    Raises:
        LensCorrupt: the files cannot be read.
    """
    kind = import_module(KINDS[spec.kind])
    return kind.needed(spec, base) if hasattr(kind, "needed") else 0


def load(spec: Spec, base: Base, source: Base | None = None) -> Lens:
    """Read a lens's files onto the base's device and check that it fits.

    Args:
        spec: what to attach.
        base: the model it belongs to.
        source: the model whose activations it reads, where that is another one.

    Raises:
        LensIncompatible: made for another base, layer or width.
        LensCorrupt: the files cannot be read.
        KeyError: no module makes this kind.
    """
    digests = (base.digest, base.digest if source is None else source.digest)
    if spec.base_digest and spec.base_digest not in digests:
        raise LensIncompatible("base", spec.base_digest, base.digest)
    if source is not None and source.facts.vocab_size != base.facts.vocab_size:
        raise LensIncompatible("vocab_size", base.facts.vocab_size, source.facts.vocab_size)
    read = base if source is None else source
    if spec.layer is not None and not 0 <= spec.layer < read.facts.num_layers:
        raise LensIncompatible("layer", spec.layer, f"{read.facts.num_layers} layers")
    return import_module(KINDS[spec.kind]).load(spec, read)
