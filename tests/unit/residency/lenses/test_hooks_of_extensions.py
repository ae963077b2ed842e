"""Hook points keep their meaning through adapters and inserted layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from services.residency.families import SITES, Family, blocks, family_of, hook_points
from services.residency.hooks import capture_hooks
from services.residency.lenses import lora
from services.residency.lenses.extension import Extension, applied
from services.residency.lenses.inserted import insert
from services.residency.loading import load_model
from tests.models import batch, saved, tiny

FAMILIES = ("gpt2", "llama", "mistral", "gemma2")


def hybrid(model: PreTrainedModel, *, b: float) -> Extension:
    """A layer that adds nothing behind layer 0, and adapters on every linear module; `b` fills lora_B."""
    layer = insert(model, "decoder", index=1, scale=0.0)
    with applied(layer.edits):
        shapes = lora.adaptable(model)
        weights = lora.fresh_weights(shapes, 2, 0)
        filled = {key: tensor + b if "lora_B" in key else tensor for key, tensor in weights.items()}
        return layer.then(lora.build(model, LoraConfig(r=2, target_modules=sorted(shapes)), filled))


def captured(model: PreTrainedModel, family: Family, points: list[str]) -> dict[str, torch.Tensor]:
    with capture_hooks(model, family, points) as capture:
        return capture.run(batch())


@pytest.fixture(params=[*FAMILIES, "int8", "int4"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(saved("llama", 3), request.param) if "int" in request.param else tiny(request.param, 3)


def test_the_bases_layers_keep_their_numbers_and_their_tensors(model: PreTrainedModel) -> None:
    family = family_of(model)
    points = hook_points(list(SITES), [0, 1, 2])
    before = captured(model, family, points)
    with applied(hybrid(model, b=0.0).edits):
        assert list(blocks(model, family)) == [0, "decoder-1-inserted", 1, 2]
        after = captured(model, family, points)
        sites = ["resid_pre", "resid_post", "mlp_out", "pattern"]  # with the pattern: attention as before
        inserted = captured(model, family, hook_points(sites, ["decoder-1-inserted"]))
    assert all(torch.equal(after[point], before[point]) for point in points)
    assert torch.equal(inserted["blocks.decoder-1-inserted.hook_resid_pre"], before["blocks.0.hook_resid_post"])
    assert torch.equal(inserted["blocks.decoder-1-inserted.hook_resid_post"], before["blocks.1.hook_resid_pre"])
    assert not inserted["blocks.decoder-1-inserted.hook_mlp_out"].any()
    assert list(blocks(model, family)) == [0, 1, 2]


def test_a_hook_on_an_adapted_module_sees_what_the_module_with_its_adapter_sees(model: PreTrainedModel) -> None:
    """`mlp_hidden` is the input of a linear module that the adapter wraps; the MLP's output includes the adapter's."""
    family = family_of(model)
    points = hook_points(["mlp_hidden", "mlp_out_raw", "mlp_in"], [2])
    with applied(hybrid(model, b=0.05).edits):
        tensors = captured(model, family, points)
        block = blocks(model, family)[2]
        down = getattr(block.mlp, "c_proj", None) or block.mlp.down_proj
        assert hasattr(down, "base_layer")
        with torch.no_grad():
            assert torch.equal(down(tensors["blocks.2.mlp.hook_post"]), tensors["blocks.2.mlp.hook_out"])
            assert torch.equal(block.mlp(tensors["blocks.2.mlp.hook_in"]), tensors["blocks.2.mlp.hook_out"])
            assert not torch.equal(down.base_layer(tensors["blocks.2.mlp.hook_post"]), tensors["blocks.2.mlp.hook_out"])
