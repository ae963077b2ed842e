"""What the torch modules' errors mean to a caller; the only place where the two vocabularies meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from services.kit import errors
from services.residency.checkpoint import CheckpointError, PickleRefused
from services.residency.families import UnknownHookPoint, UnsupportedModel
from services.residency.identity import IdentityFailed
from services.residency.intervention import InterventionRefused
from services.residency.lenses import LensCorrupt, LensIncompatible, PrefixUnknown
from services.residency.loading import LoadFailed
from services.residency.memory import is_fragmented, is_out_of_memory
from services.residency.park import Damaged
from services.residency.reading import TextRefused
from services.residency.sources import SourceNotFound, SourceUnavailable
from services.residency.texts import DatasetError


def insufficient_memory(required: int, available: int) -> errors.Exhausted:
    """Both numbers, in GB of 10^9 bytes, as spec/003 has them."""
    return errors.Exhausted(
        f"the model needs {required / 1e9:.3f} GB, {max(available, 0) / 1e9:.3f} GB are free",
        reason="INSUFFICIENT_MEMORY",
        metadata={
            "required_memory_gb": round(required / 1e9, 3),
            "available_memory_gb": round(max(available, 0) / 1e9, 3),
        },
    )


def out_of_memory(available: int) -> errors.Exhausted:
    """A forward found no room although nothing idle is left on the device; GB as above."""
    return errors.Exhausted(
        "the device ran out of memory, and nothing idle is left that could leave it",
        reason="INSUFFICIENT_MEMORY",
        metadata={"available_memory_gb": round(available / 1e9, 3)},
    )


def translated(error: BaseException) -> errors.LensmeshError | None:
    """The error to raise for one of ours or of the libraries; None for what nobody foresaw. Never holds a path."""
    known = _by_type(error)
    if known is None and is_out_of_memory(error):
        hint = ": what is free is in pieces; a restart of the board helps" if is_fragmented(error) else ""
        return errors.Exhausted(f"the device ran out of memory{hint}", reason="DEVICE_OOM", transient=True)
    return known


@contextmanager
def for_callers() -> Iterator[None]:
    """Whatever `translated` knows is raised as that."""
    try:
        yield
    except Exception as error:
        known = translated(error)
        if known is None or known is error:
            raise
        raise known from error


def _by_type(error: BaseException) -> errors.LensmeshError | None:
    if isinstance(error, errors.LensmeshError):
        return error
    make = next((make for kinds, make in _MEANINGS if isinstance(error, kinds)), None)
    return make(error) if make is not None else None


def _failed(reason: str, *facts: str) -> Callable[[Any], errors.LensmeshError]:
    """A failure with the error's own message, and the named attributes of it as metadata."""
    return lambda error: errors.Failed(
        str(error), reason=reason, metadata={name: getattr(error, name) for name in facts}
    )


_Kinds = type[BaseException] | tuple[type[BaseException], ...]
_MEANINGS: tuple[tuple[_Kinds, Callable[[Any], errors.LensmeshError]], ...] = (
    (PickleRefused, _failed("UNSAFE_FORMAT")),
    ((CheckpointError, LoadFailed, UnsupportedModel), _failed("MODEL_LOAD_FAILED")),
    (SourceNotFound, lambda error: errors.Invalid.of("model_identifier", str(error))),
    (SourceUnavailable, lambda error: errors.Unavailable(str(error), transient=True)),
    (
        LensIncompatible,
        lambda error: errors.Conflict(
            str(error),
            reason="LENS_INCOMPATIBLE",
            metadata={"what": error.what, "expected": error.expected, "found": error.found},
        ),
    ),
    (LensCorrupt, _failed("CHECKSUM_MISMATCH")),
    (Damaged, _failed("FINGERPRINT_MISMATCH")),
    (IdentityFailed, _failed("HOOK_IDENTITY_FAILED", "layer", "error", "tolerance")),
    (UnknownHookPoint, lambda error: errors.Invalid.of("hook_points", str(error))),
    (PrefixUnknown, lambda error: errors.Invalid.of("prefix", str(error))),
    (TextRefused, lambda error: errors.Invalid.of(error.field, error.description)),
    (InterventionRefused, lambda error: errors.Invalid.of(f"interventions.{error.field}", error.description)),
    (DatasetError, lambda error: errors.Invalid.of(error.field, error.message)),
)
