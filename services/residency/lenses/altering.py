"""Extensions as lenses: attached beside the base, in force only while a call uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from services.residency.lenses import (
    Base,
    LensCorrupt,
    LensIncompatible,
    Probability,
    Reading,
    Spec,
    TokenReading,
    extension_files,
)
from services.residency.lenses.extension import Extension, ExtensionRefused
from services.residency.lenses.logit_lens import most_probable
from services.residency.splice import Splice, logits, spliced


class ExtensionLens:
    """One extension; its reading compares next-token distributions with and without it."""

    altering = True

    def __init__(self, lens_id: str, base: Base) -> None:
        self._lens_id = lens_id
        self._base = base
        self._away: Extension | None = None
        """The extension while it is detached."""

    @property
    def _extension(self) -> Extension:
        return self._away or self._base.extensions[self._lens_id]

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, attached or not; layers that another attached extension has are not among them."""
        return self._base.extensions.bytes_beside(self._extension)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The extension's weights."""
        return self._extension.tensors

    @property
    def hook_points(self) -> Sequence[str]:
        """None: it runs the model itself."""
        return ()

    def read(
        self,
        activations: Mapping[str, Tensor],
        input_ids: Tensor,
        top_k: int,
        prefix: int,
        changes: Sequence[Splice] = (),
    ) -> Reading:
        """Next-token distributions of the base and of the extended model."""
        base, extended = (self._predictions(name, input_ids, top_k, changes) for name in (None, self._lens_id))
        return Reading([TokenReading(base_predictions=a, predictions=b) for a, b in zip(base, extended, strict=True)])

    def _predictions(
        self, extension: str | None, input_ids: Tensor, top_k: int, changes: Sequence[Splice]
    ) -> list[list[Probability]]:
        model, family = self._base.model, self._base.family
        with self._base.extensions.using(extension), ExitStack() as stack:
            if changes:
                assert family is not None, "changes are made of a model with hook points"
                stack.enter_context(spliced(model, family, changes))
            return most_probable(logits(model, input_ids)[0], top_k)

    def move(self, device: str) -> None:
        """Bring the extension's weights to a device; detached, without the layers that an attached one has, too."""
        but = self._base.extensions.tensors_beside(self._away) if self._away is not None else ()
        self._extension.move(device, but)

    def detach(self) -> None:
        """Take the extension from those of the base, which never held it while it was inactive."""
        self._away = self._base.extensions[self._lens_id]  # before it is gone: others may be counting its bytes
        self._base.extensions.detach(self._lens_id)

    def attach(self) -> None:
        """Put it among them again, inactive."""
        if self._away is not None:
            self._base.extensions.attach(self._lens_id, self._away)
            self._away = None


def needed(spec: Spec, base: Base) -> int:
    """Device memory that the extension will add, before it is read.

    Raises:
        LensCorrupt: its files cannot be read.
    """
    with _usable():
        return extension_files.stored_bytes(_folder(spec), base.extensions)


def load(spec: Spec, base: Base) -> ExtensionLens:
    """Read an extension's files and attach it, inactive.

    Raises:
        LensIncompatible: it was made for another base.
        LensCorrupt: its files cannot be read.
    """
    with base.extensions.using(None), _usable():
        _require_base(extension_files.read_manifest(_folder(spec)), base)
        extension = extension_files.attachable(_folder(spec), base.model, among=base.extensions)
    base.extensions.attach(spec.lens_id, extension)
    return ExtensionLens(spec.lens_id, base)


def _folder(spec: Spec) -> Path:
    if spec.folder is None:
        raise LensCorrupt("an extension has files")
    return spec.folder


@contextmanager
def _usable() -> Iterator[None]:
    """Raises LensCorrupt where the files of an extension cannot be used."""
    try:
        yield
    except ExtensionRefused as error:
        raise LensCorrupt(f"the extension's files cannot be used: {error}") from error
    except OSError as error:
        raise LensCorrupt("the extension's files cannot be read") from error


def _require_base(manifest: extension_files.Manifest, base: Base) -> None:
    """Raises LensIncompatible unless the extension was made for this base, or for one that is built the same."""
    if manifest.base_digest and manifest.base_digest != base.digest:
        raise LensIncompatible("base", manifest.base_digest, base.digest)
    built = extension_files.structure(base.model)
    if manifest.base_structure != built:
        raise LensIncompatible("layers", manifest.base_structure, built)
