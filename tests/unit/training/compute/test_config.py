"""Every wrong field of a training is named, and rules give what the documents say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.training.compute import ConfigError, TrainConfig, fit
from services.training.compute.config import default_top_k


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"dict_size": 64, "num_tokens": 512, "batch_size": 32, "top_k": 4} | changes))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dict_size", {"dict_size": 0}),
        ("dict_size", {"dict_size": 64.0}),
        ("group_sizes", {"group_sizes": (16, 16)}),
        ("group_sizes", {"group_sizes": (0, 64)}),
        ("group_sizes", {"group_sizes": (-1, 65)}),
        ("prefix_widths", {"prefix_widths": (16, 32)}),
        ("prefix_widths", {"prefix_widths": ()}),
        ("prefix_widths", {"prefix_widths": (32, 16, 64)}),
        ("prefix_widths", {"prefix_widths": (16, 64), "group_sizes": (16, 48)}),
        ("prefix_weights", {"group_sizes": (16, 48), "prefix_weights": (1.0,)}),
        ("prefix_weights", {"group_sizes": (16, 48), "prefix_weights": (0.0, 0.0)}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 65}),
        ("top_k", {"top_k": True}),
        ("activation", {"activation": "relu"}),
        ("lr_schedule", {"lr_schedule": "step"}),
        ("dtype", {"dtype": "int8"}),
        ("batch_size", {"batch_size": 0}),
        ("num_tokens", {"num_tokens": 31}),
        ("learning_rate", {"learning_rate": 0.0}),
        ("learning_rate", {"learning_rate": float("nan")}),
        ("aux_k", {"aux_k": -1}),
        ("aux_weight", {"aux_weight": -0.5}),
        ("dead_after_tokens", {"dead_after_tokens": 0}),
        ("gradient_clip", {"gradient_clip": float("inf")}),
        ("warmup_fraction", {"warmup_fraction": 1.5}),
        ("seed", {"seed": 0.5}),
        ("unit_norm_decoder", {"unit_norm_decoder": "no"}),
    ],
)
def test_a_wrong_field_is_named(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field}: ") as caught:
        config(**changes)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "x", "y"),
    [
        ("batch_size", torch.zeros(31, 4), torch.zeros(31, 4)),
        ("y", torch.zeros(64, 4), torch.zeros(63, 4)),
        ("y", torch.zeros(64, 4), torch.zeros(64, 4, dtype=torch.float64)),
        ("x", torch.zeros(64), torch.zeros(64, 4)),
        ("x", torch.zeros(64, 4, dtype=torch.int32), torch.zeros(64, 4, dtype=torch.int32)),
    ],
)
def test_wrong_tensors_are_named(field: str, x: torch.Tensor, y: torch.Tensor) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(x, y, config())
    assert caught.value.field == field


def test_both_forms_of_the_groups_mean_the_same() -> None:
    increments, cumulative = config(group_sizes=(8, 24, 32)), config(prefix_widths=(8, 32, 64))
    assert increments.groups == cumulative.groups == (8, 24, 32)
    assert increments.shape.prefix_widths == (8, 32, 64)


def test_default_groups_are_the_proportions_of_spec002() -> None:
    assert TrainConfig(dict_size=36864, num_tokens=4096).groups == (2304, 4608, 9216, 20736)
    assert TrainConfig(dict_size=12288, num_tokens=4096).groups == (768, 1536, 3072, 6912)
    assert sum(TrainConfig(dict_size=5, num_tokens=4096, top_k=1).groups) == 5


def test_default_top_k_is_the_rule_of_spec002() -> None:
    assert [default_top_k(size) for size in (16, 4096, 12288, 36864)] == [16, 32, 64, 192]


def test_the_learning_rate_falls_with_the_dictionary_and_with_long_runs() -> None:
    def rate(dict_size: int, steps: int) -> float | None:
        return TrainConfig(dict_size=dict_size, top_k=4, num_tokens=64 * steps, batch_size=64).resolved(8).learning_rate

    assert rate(4096, 1) == rate(4096, 128) == pytest.approx(5.5e-3)
    assert rate(16_384, 128) == rate(4096, 512) == pytest.approx(2.75e-3)
    assert rate(4096, 10**6) == pytest.approx(4e-4)
    assert rate(64, 1) == 1e-2


def test_long_runs_call_a_latent_dead_after_a_smaller_part_of_them() -> None:
    def window(num_tokens: int) -> int | None:
        return TrainConfig(dict_size=64, top_k=4, num_tokens=num_tokens).resolved(8).dead_after_tokens

    assert [window(tokens) for tokens in (4096, 100_000, 250_000, 4_000_000)] == [2048, 10_000, 16_000, 64_000]


def test_defaults_are_topk_and_equal_prefixes() -> None:
    resolved = TrainConfig(dict_size=4096, num_tokens=4096).resolved(8)
    assert (resolved.activation, resolved.prefix_weights) == ("topk", (1.0,) * 4)
    assert (resolved.skip, resolved.unit_norm_decoder, resolved.dtype) == (False, False, "float32")


def test_resolving_writes_every_rule_out_and_changes_nothing_given() -> None:
    resolved = config(learning_rate=0.5).resolved(d_out=10)
    assert (resolved.learning_rate, resolved.aux_k, resolved.dead_after_tokens) == (0.5, 5, 51)
    assert None not in {resolved.group_sizes, resolved.top_k, resolved.prefix_weights, resolved.learning_rate}
    assert TrainConfig(**resolved.to_dict()).resolved(d_out=10).to_dict() == resolved.to_dict()
    assert config(aux_k=0).resolved(10).aux_k == 0
