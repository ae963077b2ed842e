"""What a request means for a model and a cache."""

from __future__ import annotations

from typing import Any

import pytest

from services.kit import errors
from services.residency.gang import CUDA_CONTEXT_BYTES
from services.training.dialogue import Progress
from services.training.domain import BaseModel, Cache, Plan, Sites, Wanted
from services.training.figures import figures_of
from services.training.judging import modes_of
from services.training.requests import batches_for, memory_bytes, resolve, settled

MODEL = BaseModel("m_1", "gemma2", "base", num_layers=4, hidden_size=32)
WIDTHS = {f"blocks.{layer}.{suffix}": 32 for layer in (1, 2) for suffix in ("mlp.hook_in", "hook_mlp_out")}


def wanted(*layers: int, **changes: Any) -> Wanted:
    options = {"dict_size": 64, "top_k": 4, "batch_size": 64, **changes.pop("options", {})}
    fields = {"model_id": MODEL.id, "layers": layers, "cache_id": "", "dataset_id": "ds", "sites": Sites()}
    return Wanted(**{**fields, "options": options, **changes})


def planned(*layers: int, num_tokens: int, devices: int = 1) -> Plan:
    return resolve(wanted(*(layers or (1,)), options={"num_tokens": num_tokens}, devices=devices), MODEL, None)


def field_of(caught: pytest.ExceptionInfo[errors.Invalid]) -> str:
    return caught.value.violations[0][0]


def test_every_layer_and_configuration_is_a_coder_with_its_own_name() -> None:
    plan = resolve(wanted(1, 2, variants=((Sites(), {"top_k": 8}),)), MODEL, None)
    assert [(coder.name, coder.layer, coder.config["top_k"]) for coder in plan.coders] == [
        ("layer-1", 1, 4),
        ("layer-2", 2, 4),
        ("layer-1-variant-1", 1, 8),
        ("layer-2-variant-1", 2, 8),
    ]
    assert plan.hook_points == tuple(WIDTHS)
    assert Plan.from_json(plan.as_json()) == plan


def test_the_sites_decide_what_is_read_and_how_it_is_called() -> None:
    normal = resolve(wanted(1), MODEL, None).coders[0]
    assert (normal.source, normal.source_hook_point, normal.target) == (
        "blocks.1.mlp.hook_in",
        "blocks.1.mlp.hook_in",
        "blocks.1.hook_mlp_out",
    )
    scaled = resolve(wanted(1, sites=Sites("ln2_normalized")), MODEL, None).coders[0]
    assert (scaled.source, scaled.source_hook_point) == ("blocks.1.mlp.hook_in", "blocks.1.ln2.hook_normalized")
    assert scaled.apply_rmsnorm_scaling is True
    bare = resolve(wanted(1, sites=Sites("ln2_normalized", False)), MODEL, None).coders[0]
    assert (bare.source, bare.apply_rmsnorm_scaling) == ("blocks.1.ln2.hook_normalized", False)
    legacy = resolve(wanted(1, sites=Sites("resid_mid")), MODEL, None).coders[0]
    assert legacy.source == legacy.source_hook_point == "blocks.1.hook_resid_mid"


def test_a_variant_that_changes_the_dictionary_gets_groups_of_its_own() -> None:
    groups = {"group_sizes": (16, 48)}
    plan = resolve(wanted(1, options=groups, variants=((Sites(), {"dict_size": 128}),)), MODEL, None)
    assert [coder.config["group_sizes"] for coder in plan.coders] == [[16, 48], [8, 16, 32, 72]]


def test_the_data_decides_what_the_request_left_open() -> None:
    cache = Cache("act_1", MODEL.id, "base", "artifact://x", 5000, WIDTHS)
    plan = settled(planned(1, num_tokens=0), cache, 2)
    assert (plan.num_tokens, plan.base_digest) == (5000, "base")
    config = plan.coders[0].config
    assert (config["num_tokens"], config["dead_after_tokens"], config["aux_k"]) == (5000, 500, 16)
    assert settled(planned(1, num_tokens=640), cache, 2).coders[0].config["num_tokens"] == 640


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("source.cache_id", {"model_id": "m_2", "model_digest": "other"}),
        ("source.cache_id", {"widths": {"blocks.1.mlp.hook_in": 32}}),
        ("batch_size", {"tokens": 63}),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(field: str, changes: dict[str, Any]) -> None:
    fitting = {"model_id": MODEL.id, "model_digest": "base", "storage_uri": "", "tokens": 64, "widths": WIDTHS}
    resolve(wanted(1), MODEL, Cache("act_1", **fitting))
    with pytest.raises(errors.Invalid) as caught:
        resolve(wanted(1), MODEL, Cache("act_1", **(fitting | changes)))
    assert field_of(caught) == field


def test_a_cache_of_the_same_files_under_another_id_fits() -> None:
    cache = Cache("act_1", "m_2", MODEL.digest, "", 64, WIDTHS)
    assert resolve(wanted(1), MODEL, cache).hook_points == planned(1, num_tokens=64).hook_points


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("source.live", {"dataset_id": "", "cache_id": "act_1"}),
        ("devices", {"devices": 2}),
        ("source.split", {"live": False, "split": True, "devices": 2}),
        ("devices", {"split": True}),
    ],
)
def test_what_cannot_be_live_or_split_is_refused(field: str, changes: dict[str, Any]) -> None:
    assert resolve(wanted(1, live=True), MODEL, None).live
    assert resolve(wanted(1, live=True, split=True, devices=3), MODEL, None).ranks == 1
    with pytest.raises(errors.Invalid) as caught:
        resolve(wanted(1, **{"live": True, **changes}), MODEL, None)
    assert field_of(caught) == field


def test_norms_without_rms_have_no_rms_scaling() -> None:
    gpt2 = BaseModel("m_1", "gpt2", "base", 4, 32)
    with pytest.raises(errors.Invalid) as caught:
        resolve(wanted(1, sites=Sites("ln2_normalized")), gpt2, None)
    assert field_of(caught) == "apply_rmsnorm_scaling"
    assert resolve(wanted(1, sites=Sites("ln2_normalized", False)), gpt2, None).coders[0].source.endswith("normalized")


def test_memory_counts_weights_gradients_and_moments_of_every_coder() -> None:
    one, two = (memory_bytes(planned(*layers, num_tokens=640), WIDTHS, "cpu") for layers in ((1,), (1, 2)))
    assert two - one == 4 * 4 * (64 * (32 + 32 + 1) + 32)
    on_gpu = memory_bytes(planned(1, num_tokens=640), WIDTHS, "cuda:0")
    assert on_gpu == one + CUDA_CONTEXT_BYTES


def test_how_many_batches_a_mode_means() -> None:
    assert [batches_for("safe", size * 10**9) for size in (1, 2, 6, 20, 21)] == [50, 30, 10, 5, 3]
    assert (batches_for("full", 10**12), batches_for("cpu", 0)) == (200, 10)


def test_modes_get_smaller_where_memory_may_run_out() -> None:
    assert modes_of("auto") == ("full", "safe", "cpu")
    assert modes_of("safe") == ("safe",)


def test_figures_are_means_over_coders_and_per_coder() -> None:
    names = ("loss", "l2_loss", "aux_loss", "fvu", "fvu_min", "fvu_max", "fvu_mean", "l0", "dead_fraction")
    more = {"learning_rate": 0.1, "gradient_norm": 1.0, "seconds": 1.0, "share": 0.5, "tokens_per_second": 20.0}
    more["l0_per_prefix"] = [1.0, 2.0]
    coders = [
        {"coder": "layer-1", "fvu_per_prefix": [0.5, 0.25], **dict.fromkeys(names, 1.0), **more},
        {"coder": "layer-2", "fvu_per_prefix": [0.75, 0.5], **dict.fromkeys(names, 2.0), **more},
    ]
    found = figures_of(Progress(3, 192, 10.0, 5.0, coders), planned(1, 2, num_tokens=640))
    assert (found["step"], found["tokens_seen"], found["num_tokens"], found["eta_seconds"]) == (3, 192, 640, 5.0)
    assert (found["fvu"], found["fvu_per_prefix"], found["learning_rate"]) == (1.5, [0.625, 0.375], 0.1)
    assert (found["l0_per_prefix"], found["gradient_norm"], found["coder_tokens_per_second"]) == ([1.0, 2.0], 1.0, 20.0)
    assert [(coder["layer"], coder["fvu"]) for coder in found["coders"]] == [(1, 1.0), (2, 2.0)]
    assert [(coder["name"], coder["share"]) for coder in found["coders"]] == [("layer-1", 0.5), ("layer-2", 0.5)]
    coders[1]["fvu_per_prefix"] = [0.5]
    assert figures_of(Progress(3, 192, 10.0, 5.0, coders), planned(1, 2, num_tokens=640))["fvu_per_prefix"] == []
