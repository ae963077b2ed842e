"""What each kind of extension is made of: its counts, and the weights it begins with.

A new kind is one file here and its entry in `KINDS`.
"""

from __future__ import annotations

from services.extensions.compute.kinds.hybrid import HybridKind
from services.extensions.compute.kinds.kind import Draft, Kind, Operations
from services.extensions.compute.kinds.layer import LayerKind, add
from services.extensions.compute.kinds.lora import LoraKind

__all__ = ["KINDS", "Draft", "Kind", "Operations", "add"]

KINDS: dict[str, Kind] = {"lora": LoraKind(), "layer": LayerKind(), "hybrid": HybridKind()}
"""Every kind by its name in manifests and requests."""
