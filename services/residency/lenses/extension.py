"""Extensions of a live base: attached beside it, switched in and out by reference, never copied and never merged.

An extension is a list of edits, each of which points one attribute of the model (a child module, a layer list, a number
of its config) somewhere else. While it is inactive none of its edits is in place: the base is the very tree of modules
that was loaded, so its logits are those of the base bit for bit, hooks find the paths they know, and parking sees the
names it knows. Activating applies the edits, deactivating takes them back in reverse order; both are a few pointer
writes, whatever the size of the model.

All calls that touch the model belong on its device's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class ExtensionRefused(ValueError):
    """An extension does not fit: `field` names what is wrong with it, `description` says why."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


@dataclass(frozen=True, slots=True)
class Edit:
    """Points `owner.name` to `value`; `owner` is a module or a model's config."""

    owner: object
    name: str
    value: object


def apply(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Make the edits in order; the returned edits, applied in their order, take them back."""
    undo: list[Edit] = []
    for edit in edits:
        undo.append(Edit(edit.owner, edit.name, getattr(edit.owner, edit.name)))
        if isinstance(edit.owner, nn.Module) and isinstance(edit.value, nn.Module):
            edit.value.train(edit.owner.training)  # eval() of the model did not reach what was not in its tree
        setattr(edit.owner, edit.name, edit.value)
    return tuple(reversed(undo))


@contextmanager
def applied(edits: Sequence[Edit]) -> Iterator[None]:
    """The edits hold inside the block and are taken back after it, also when it raises."""
    undo = apply(edits)
    try:
        yield
    finally:
        apply(undo)


@dataclass(frozen=True, slots=True)
class Extension:
    """One task's alteration of a base, ready to be switched in."""

    edits: tuple[Edit, ...]
    """What activation changes, in order."""
    parameters: Mapping[str, nn.Parameter]
    """Its own parameters by their key in the checkpoint; nothing of the base is among them."""
    operations: tuple[Mapping[str, Any], ...] = ()
    """What was done to the base, in order, as manifests say it."""
    constants: tuple[torch.Tensor, ...] = ()
    """Other tensors that its modules hold and that are on its device too."""
    layers: SharedLayers | None = None
    """Inserted layers that extensions with the same ones may share while they are attached."""
    frozen: frozenset[str] = frozenset()
    """Keys of parameters that training leaves alone: another extension's layers."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by their key in the checkpoint."""
        return {key: parameter for key, parameter in self.parameters.items() if key not in self.frozen}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that moves with it."""
        return (*self.parameters.values(), *self.constants)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the extension adds to the base."""
        return _bytes(self.parameters.values())

    def then(self, other: Extension) -> Extension:
        """Both, the other's edits after ours."""
        return Extension(
            self.edits + other.edits,
            {**self.parameters, **other.parameters},
            self.operations + other.operations,
            self.constants + other.constants,
            self.layers or other.layers,
            self.frozen | other.frozen,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the weights on the CPU, by checkpoint key."""
        return {key: parameter.detach().cpu().clone() for key, parameter in self.parameters.items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the weights; the keys and shapes must be exactly its own.

        Raises:
            ExtensionRefused: keys are missing or unexpected, or a shape differs; nothing was changed.
        """
        overwrite(self.parameters, weights)

    def move(self, device: torch.device | str, but: Collection[int] = ()) -> None:
        """Bring its own weights to a device; the base's stay where they are, and so do tensors with ids of `but`."""
        for tensor in self.tensors:
            if id(tensor) not in but:
                tensor.data = tensor.data.to(device)


@dataclass(frozen=True, slots=True)
class SharedLayers:
    """Inserted layers as they were read from a file."""

    digest: str
    """blake3 of the file."""
    extension: Extension
    """The layers alone, without what adapts them."""


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def overwrite(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    """Give parameters the values of the tensors of the same keys, which must be exactly theirs.

    Raises:
        ExtensionRefused: keys are missing or unexpected, or a shape differs; nothing was changed.
    """
    require_same_tensors(parameters, weights)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])


def require_same_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """PEFT only warns when keys do not fit and keeps random weights; here a misfit is refused.

    Raises:
        ExtensionRefused: names the missing, the unexpected and the misshapen keys.
    """
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ExtensionRefused(
            "weights",
            f"expected {len(expected)} tensors, found {len(found)}; "
            f"missing {_some(missing)}, unexpected {_some(unexpected)}",
        )
    for key, tensor in expected.items():
        if found[key].shape != tensor.shape:
            raise ExtensionRefused(
                "weights", f"{key} has shape {list(found[key].shape)}, this model needs {list(tensor.shape)}"
            )


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3]) or "none"
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


class Extensions:
    """All extensions attached to one live base; at most one is active, and none after construction."""

    def __init__(self) -> None:
        self._attached: dict[str, Extension] = {}
        self._active: str | None = None
        self._undo: tuple[Edit, ...] = ()

    @property
    def active(self) -> str | None:
        """Key of the extension whose edits are in place, None for the base alone."""
        return self._active

    @property
    def nbytes(self) -> int:
        """Bytes of all attached extensions together; what several share counts once."""
        return _bytes({id(p): p for each in self._all() for p in each.parameters.values()}.values())

    @property
    def shared_bytes(self) -> int:
        """Bytes that more than one of them holds."""
        parameters = [p for each in self._all() for p in each.parameters.values()]
        holders = Counter(map(id, parameters))
        return _bytes({id(p): p for p in parameters if holders[id(p)] > 1}.values())

    def bytes_beside(self, extension: Extension) -> int:
        """Bytes of an extension, attached or not, that no attached one holds beside it."""
        held = self.tensors_beside(extension)
        return _bytes(p for p in extension.parameters.values() if id(p) not in held)

    def tensors_beside(self, extension: Extension) -> set[int]:
        """Ids of the tensors that the attached extensions hold, but for this one."""
        return {id(tensor) for each in self._all() if each is not extension for tensor in each.tensors}

    def _all(self) -> list[Extension]:
        return list(self._attached.values())  # others count while the device's thread attaches

    def layers(self, digest: str) -> Extension | None:
        """Inserted layers with this content that an attached extension holds."""
        held = (extension.layers for extension in self._attached.values())
        return next((layers.extension for layers in held if layers is not None and layers.digest == digest), None)

    def __contains__(self, key: str) -> bool:
        return key in self._attached

    def __getitem__(self, key: str) -> Extension:
        """The attached extension.

        Raises:
            KeyError: it is not attached.
        """
        return self._attached[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._attached)

    def attach(self, key: str, extension: Extension) -> None:
        """Keep an extension ready under a key of the caller's; the base does not change.

        Raises:
            KeyError: the key is taken.
        """
        if key in self._attached:
            raise KeyError(f"{key} is attached already")
        self._attached[key] = extension

    def replace(self, key: str, extension: Extension) -> None:
        """Put another extension under an attached key; if it is active, the new one is from now on.

        Raises:
            KeyError: it is not attached.
        """
        active = self._active
        if key not in self._attached:
            raise KeyError(key)
        if active == key:
            self.activate(None)
        self._attached[key] = extension
        self.activate(active)

    def activate(self, key: str | None) -> None:
        """Make one extension the active one, or none; the former's edits are taken back first.

        Raises:
            KeyError: it is not attached; the active one stays.
        """
        edits = self._attached[key].edits if key is not None else ()
        if key == self._active:
            return
        apply(self._undo)
        self._undo = apply(edits)
        self._active = key

    @contextmanager
    def using(self, key: str | None) -> Iterator[None]:
        """One extension, or the bare base, for the length of a forward pass; then the active one is back."""
        before = self._active
        self.activate(key)
        try:
            yield
        finally:
            self.activate(before)

    def detach(self, key: str) -> Extension:
        """Forget an extension, deactivated first if it is the active one; dropping the result frees its memory.

        Raises:
            KeyError: it is not attached.
        """
        extension = self._attached[key]
        if self._active == key:
            self.activate(None)
        del self._attached[key]
        return extension
