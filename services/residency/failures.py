"""What the torch modules' errors mean to a caller; the only place where the two vocabularies meet."""

from __future__ import annotations

from services.kit import errors
from services.residency.checkpoint import CheckpointError, PickleRefused
from services.residency.families import UnknownHookPoint, UnsupportedModel
from services.residency.identity import IdentityFailed
from services.residency.lenses import LensCorrupt, LensIncompatible
from services.residency.loading import LoadFailed
from services.residency.memory import is_out_of_memory
from services.residency.sources import SourceNotFound, SourceUnavailable


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


def translated(error: BaseException) -> errors.LensmeshError | None:
    """The error to raise for one of ours or of the libraries; None for what nobody foresaw. Never holds a path."""
    known = _by_type(error)
    if known is None and is_out_of_memory(error):
        return errors.Exhausted("the device ran out of memory", reason="DEVICE_OOM", transient=True)
    return known


def _by_type(error: BaseException) -> errors.LensmeshError | None:
    known: errors.LensmeshError | None = None
    match error:
        case errors.LensmeshError():
            known = error
        case PickleRefused():
            known = errors.Failed(str(error), reason="UNSAFE_FORMAT")
        case CheckpointError() | LoadFailed() | UnsupportedModel():
            known = errors.Failed(str(error), reason="MODEL_LOAD_FAILED")
        case SourceNotFound():
            known = errors.Invalid.of("model_identifier", str(error))
        case SourceUnavailable():
            known = errors.Unavailable(str(error), transient=True)
        case LensIncompatible():
            facts = {"what": error.what, "expected": error.expected, "found": error.found}
            known = errors.Conflict(str(error), reason="LENS_INCOMPATIBLE", metadata=facts)
        case LensCorrupt():
            known = errors.Failed(str(error), reason="CHECKSUM_MISMATCH")
        case IdentityFailed():
            facts = {"layer": error.layer, "error": error.error, "tolerance": error.tolerance}
            known = errors.Failed(str(error), reason="HOOK_IDENTITY_FAILED", metadata=facts)
        case UnknownHookPoint():
            known = errors.Invalid.of("hook_points", str(error))
    return known
