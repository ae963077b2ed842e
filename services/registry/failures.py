"""What the registry refuses, and failures that were written down, as errors."""

from __future__ import annotations

from services.kit.errors import Conflict, Exhausted, Failed, LensmeshError, NotFound, Unavailable

GB = 1_000_000_000
_BY_REASON: dict[str, type[LensmeshError]] = {
    "INSUFFICIENT_MEMORY": Exhausted,
    "QUOTA_EXCEEDED": Exhausted,
    "DEVICE_OOM": Exhausted,
    "NO_HOST": Unavailable,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Conflict,
}


def model_not_found(model_id: str) -> NotFound:
    """No such model."""
    return NotFound(f"There is no model {model_id}", reason="MODEL_NOT_FOUND", metadata={"model_id": model_id})


def insufficient_memory(required: int, available: int, device: str) -> Exhausted:
    """It does not fit; both sides in GB (10^9 bytes)."""
    return Exhausted(
        f"{device or 'No device'} has room for {available / GB:.3f} GB, and {required / GB:.3f} GB are needed",
        reason="INSUFFICIENT_MEMORY",
        metadata={
            "required_memory_gb": round(required / GB, 6),
            "available_memory_gb": round(max(0, available) / GB, 6),
            "device": device,
        },
    )


def load_failure(reason: str, message: str) -> LensmeshError:
    """The failure of a load that was written down, as an error again."""
    return _BY_REASON.get(reason, Failed)(message, reason=reason)


def not_resident(group_id: str, model_id: str) -> Conflict:
    """The group's base is not on a device."""
    return Conflict(
        f"The base of group {group_id} is not on a device; load model {model_id} first",
        reason="GROUP_NOT_RESIDENT",
        metadata={"group_id": group_id, "model_id": model_id},
    )
