"""JumpReLU's thresholds are moved to the asked number of active latents, whatever they are scattered like."""

from __future__ import annotations

import pytest
import torch

from services.residency.lenses.selection import Encoder
from services.training.compute.batch_topk import select_batch_topk
from services.training.compute.config import TrainConfig
from services.training.compute.ranks import ALONE
from services.training.compute.sparsity import BANDWIDTH, FACTORS, FOLLOW, PROBE_EVERY, Window, follow_threshold


def window(level: float, scatter: float = 0.1) -> tuple[Window, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """256 rows over 512 latents of pre-activations with variance 1, thresholds around `level`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    weight = torch.randn(512, 64, generator=generator) / 8
    threshold = level * (1 + scatter * torch.randn(512, generator=generator))
    parameters = {"W_enc": weight, "b_enc": torch.zeros(512), "threshold": threshold}
    config = TrainConfig(dict_size=512, num_tokens=256, batch_size=256, top_k=32, activation="jumprelu")
    return Window.of(config, parameters, x), threshold, parameters, x


@pytest.mark.parametrize("level", [1.3, 1.5, 1.55])
def test_one_factor_brings_the_batch_to_its_k(level: float) -> None:
    found, threshold, parameters, x = window(level)
    before = int((x @ parameters["W_enc"].T > threshold).sum()) / 256
    factor = found.factor(threshold, 32, ALONE)
    after = int((x @ parameters["W_enc"].T > threshold * factor).sum()) / 256
    assert abs(after - 32) < 0.2 < abs(before - 32)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_the_running_threshold_follows_what_the_batches_ask_for(activation: str) -> None:
    _, _, parameters, x = window(1.5)
    config = TrainConfig(dict_size=512, num_tokens=256, batch_size=256, top_k=32, activation=activation)
    z = (x @ parameters["W_enc"].T).flatten()
    asked = float(z.topk(256 * 32).values[-1])  # under which the batch has 32 active latents a row
    codes = select_batch_topk(Encoder(parameters["W_enc"], parameters["b_enc"]), x, 32)

    def followed(threshold: float, step: int) -> float:
        before = torch.tensor(threshold)
        return float(follow_threshold(config, parameters, before, step=step, x=x, codes=codes, ranks=ALONE))

    assert followed(0.0, 0) == pytest.approx(asked)
    assert followed(1.0, PROBE_EVERY) == pytest.approx(1.0 + FOLLOW * (asked - 1.0))
    between = 1.0 if activation == "topk" else pytest.approx(1.0 + FOLLOW * (asked - 1.0))
    assert followed(1.0, 1) == between  # a topk coder selects without it and looks now and then


def test_thresholds_far_too_high_come_down_to_what_the_window_shows() -> None:
    found, threshold, _, _ = window(2.5, scatter=0.0)
    assert 2.4 / 2.5 < found.factor(threshold, 32, ALONE) < 1


def test_a_thresholds_gradient_is_that_of_the_box_around_it() -> None:
    """Rajamanoharan et al. 2024, eq. 11, over all entries: -t/w where |z - t| < w/2, times dL/dz."""
    found, threshold, parameters, x = window(1.5)
    by_value = torch.randn(len(found.codes.value), generator=torch.Generator().manual_seed(1))
    z = x @ parameters["W_enc"].T
    dense = torch.zeros_like(z)
    dense[found.codes.row, found.codes.latent] = by_value
    inside = (z - threshold).abs() < BANDWIDTH / 2
    assert inside.any(0).sum() > 100
    expected = -(dense * inside).sum(0) * threshold / BANDWIDTH
    assert torch.allclose(found.gradient(threshold, by_value), expected, rtol=1e-4, atol=1e-4)


def test_thresholds_far_too_low_go_up_by_the_most_there_is() -> None:
    found, threshold, _, _ = window(0.2)
    assert found.factor(threshold, 32, ALONE) == float(FACTORS[-1])
