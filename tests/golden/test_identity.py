"""The identity check holds exactly on every family and quantization, and each known hook mistake fails it."""

from __future__ import annotations

import pytest
import torch

from services.residency.families import family_of, hook_points
from services.residency.hooks import capture_hooks
from services.residency.identity import IdentityFailed, check_identity, check_pair
from services.residency.loading import load_model
from services.residency.quantize import QUANTIZATIONS
from tests import models

LAYERS = [0, 1, 3]


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_mlp_recomputed_from_its_input_is_its_output_bit_for_bit(family, quantization):
    model = load_model(models.saved(family), quantization)
    errors = check_identity(model, family_of(model), LAYERS, models.batch(3, 20))
    assert errors == dict.fromkeys(LAYERS, 0.0)


@pytest.mark.parametrize("family", [*models.EXPERIMENTAL, "t5"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_it_holds_on_experimental_families_and_encoders(family, quantization):
    model = load_model(models.saved(family), quantization)
    assert check_identity(model, family_of(model), LAYERS, models.batch(3, 20)) == dict.fromkeys(LAYERS, 0.0)


def captured(model, sites):
    points = hook_points(sites, [2])
    with capture_hooks(model, family_of(model), points) as capture:
        return list(capture.run(models.batch(3, 20)).values())


MISTAKES = {
    "the input before the norm": ["resid_mid", "mlp_out"],
    "the norm without its gain": ["ln2_normalized", "mlp_out"],
    "the residual stream as target": ["mlp_in", "resid_post"],
    "attention as target": ["mlp_in", "attn_out"],
}


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("sites", MISTAKES.values(), ids=MISTAKES)
def test_a_hook_mistake_is_caught_with_the_errors_size(family, sites):
    model = models.tiny(family)
    x, y = captured(model, sites)
    with pytest.raises(IdentityFailed) as caught:
        check_pair(model, family_of(model), 2, x, y)
    assert caught.value.error > 0.01
    assert caught.value.layer == 2
    assert f"{caught.value.error:.3g}" in str(caught.value)


def test_gemma2s_target_before_the_post_norm_is_caught():
    model = models.tiny("gemma2")
    x, y = captured(model, ["mlp_in", "mlp_out_raw"])
    with pytest.raises(IdentityFailed):
        check_pair(model, family_of(model), 2, x, y)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_rows_in_any_order_pass_and_rows_out_of_step_fail(family):
    model = models.tiny(family)
    x, y = (tensor.flatten(0, 1) for tensor in captured(model, ["mlp_in", "mlp_out"]))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:17]
    assert check_pair(model, family_of(model), 2, x[order], y[order]) < 1e-5
    with pytest.raises(IdentityFailed):
        check_pair(model, family_of(model), 2, x[order], y[order].roll(1, 0))


def test_a_number_that_is_none_fails():
    model = models.tiny("llama")
    x, y = captured(model, ["mlp_in", "mlp_out"])
    y[0, 0, 0] = float("nan")
    with pytest.raises(IdentityFailed):
        check_pair(model, family_of(model), 2, x, y)
