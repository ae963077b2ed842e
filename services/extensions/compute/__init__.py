"""Extensions in pure torch and PEFT, for the service and for notebooks.

model = LoRAExtension(base_model, ExtensionConfig(lora_r=16, lora_alpha=32)).create_adapter("my-task")
"""

from __future__ import annotations

from services.extensions.compute.config import ConfigInvalid, ExtensionConfig, LayerPlacement
from services.extensions.compute.exchange import export, import_adapter
from services.extensions.compute.loss import held_out_loss
from services.extensions.compute.merge import Merged, merge
from services.extensions.compute.settings import TrainSettings
from services.extensions.compute.task_extensions import HybridExtension, LoRAExtension, TransformerLayerExtension
from services.extensions.compute.train import Trainer

__all__ = [
    "ConfigInvalid",
    "ExtensionConfig",
    "HybridExtension",
    "LayerPlacement",
    "LoRAExtension",
    "Merged",
    "TrainSettings",
    "Trainer",
    "TransformerLayerExtension",
    "export",
    "held_out_loss",
    "import_adapter",
    "merge",
]
