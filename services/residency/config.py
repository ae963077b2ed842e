"""Settings of a device-owning process."""

from __future__ import annotations

from services.kit.config import Bytes, Settings


class ResidencySettings(Settings):
    """What this process may use of its device."""

    device_memory_limit: Bytes = 0
    """Bytes of the device that models, lenses and jobs may use, `6GiB` for example; 80 % of what it has when 0."""
    custom_classes: str = ""
    """Model classes for source `custom`, `package.module:Class` each, comma-separated; each has a `model_type` of its
    own. They are imported when a device process starts."""
    model_cache_limit: Bytes = 50_000_000_000
    """Most bytes of downloaded and of quantised weights on this machine's disk; the least recently used leave first."""
    park_memory_limit: Bytes | None = None
    """Bytes of host memory for parked models; half of what is available at start when unset, none where device and
    host share one memory."""
