"""A request gets its defaults from model and dataset; its key follows whatever decides the content."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.extraction.domain import BaseModel, Options, Rates, Survey, Wanted
from services.extraction.requests import estimate, resolve, row_bytes
from services.kit import errors
from services.residency.families import facts, hook_points

MODEL = BaseModel(
    id="m_1",
    model_type="llama",
    identifier="org/model",
    revision="",
    digest="d1",
    quantization="none",
    config={
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    },
    num_layers=4,
    hidden_size=64,
    context_length=2048,
    parameter_count=1_000_000,
    batch_size=8,
)
DATASET = Survey(digest="t1", size_bytes=70_000, rows=100)
WANTED = Wanted("m_1", "ds_1", layer_indices=(0, 3))
NO_HISTORY = Rates(None, None)


def pairs(*layers: int) -> Wanted:
    return replace(WANTED, layer_indices=layers, sites=("mlp_in", "mlp_out"))


def test_defaults_come_from_the_model():
    options = resolve(WANTED, MODEL, DATASET)
    assert options == Options(
        hook_points=("blocks.0.hook_resid_post", "blocks.3.hook_resid_post"),
        layout="sequences",
        dtype="bfloat16",
        batch_size=8,
        max_length=1024,
        sample_count=None,
        max_tokens=0,
        extension_id="",
        extension_uri="",
        seed=0,
    )
    assert resolve(WANTED, replace(MODEL, context_length=256), DATASET).max_length == 256


@pytest.mark.parametrize(
    ("quantization", "config", "dtype"),
    [
        ("none", {"dtype": "float16"}, "float16"),
        ("none", {"torch_dtype": "bfloat16", "dtype": None}, "bfloat16"),
        ("none", {"dtype": None}, "float32"),
        ("none", {"dtype": "float64"}, "float32"),
        ("int8", {"dtype": "bfloat16"}, "bfloat16"),
        ("fp16", {"dtype": "float32"}, "float16"),
        ("bf16", {"dtype": "float32"}, "bfloat16"),
    ],
)
def test_the_dtype_is_the_models(quantization, config, dtype):
    model = replace(MODEL, quantization=quantization, config={**MODEL.config, **config})
    assert resolve(WANTED, model, DATASET).dtype == dtype


@pytest.mark.parametrize(
    ("hook_points", "layout"),
    [
        (["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"], "rows"),
        (["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in"], "rows"),
        (["blocks.1.mlp.hook_in", "blocks.2.hook_mlp_out"], "sequences"),
        (["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"], "sequences"),
        (["blocks.1.hook_mlp_out"], "sequences"),
    ],
)
def test_only_whole_mlp_pairs_are_rows_by_default(hook_points, layout):
    wanted = Wanted("m_1", "ds_1", hook_points=tuple(hook_points))
    assert resolve(wanted, MODEL, DATASET).layout == layout
    assert resolve(replace(wanted, layout="sequences"), MODEL, DATASET).layout == "sequences"


def test_a_normalized_input_with_its_gain_is_what_the_mlp_consumes():
    scaled = replace(WANTED, sites=("ln2_normalized", "mlp_out"), apply_rmsnorm_scaling=True)
    options = resolve(scaled, MODEL, DATASET)
    assert (options.hook_points, options.layout) == (tuple(hook_points(["mlp_in", "mlp_out"], [0, 3])), "rows")
    bare = resolve(replace(scaled, apply_rmsnorm_scaling=False), MODEL, DATASET)
    assert (bare.hook_points[0], bare.layout) == ("blocks.0.ln2.hook_normalized", "rows")
    gpt2 = replace(MODEL, model_type="gpt2", config={**MODEL.config, "model_type": "gpt2"})
    for wrong, model in ((scaled, gpt2), (replace(scaled, sites=("mlp_in",)), MODEL)):
        with pytest.raises(errors.Invalid) as caught:
            resolve(wrong, model, DATASET)
        assert caught.value.violations[0][0] == "apply_rmsnorm_scaling"


@pytest.mark.parametrize("names", [{"sites": ("resid_mid",)}, {"hook_points": ("blocks.1.ln2.hook_normalized",)}])
def test_a_site_that_the_family_has_not_is_refused(names):
    gptj = replace(MODEL, model_type="gptj", config={**MODEL.config, "model_type": "gptj"})
    wanted = replace(WANTED, layer_indices=(1,) if "sites" in names else (), **names)
    with pytest.raises(errors.Invalid, match="gptj") as caught:
        resolve(wanted, gptj, DATASET)
    assert caught.value.violations[0][0] == next(iter(names))


def test_a_pattern_is_computed_by_other_kernels_and_shares_no_cache():
    with_pattern = resolve(replace(WANTED, sites=("resid_post", "pattern")), MODEL, DATASET)
    without = replace(with_pattern, hook_points=with_pattern.hook_points[:1])
    assert with_pattern.key(MODEL, DATASET) != without.key(MODEL, DATASET)


def test_the_order_of_rows_is_kept_where_there_are_rows():
    options = resolve(replace(pairs(1), keep_order=True), MODEL, DATASET)
    assert options.keep_order
    assert options.key(MODEL, DATASET) != resolve(pairs(1), MODEL, DATASET).key(MODEL, DATASET)
    with pytest.raises(errors.Invalid) as caught:
        resolve(replace(WANTED, keep_order=True), MODEL, DATASET)
    assert caught.value.violations[0][0] == "keep_order"


def test_a_gemma_stored_as_float32_is_kept_so():
    gemma = replace(MODEL, model_type="gemma2", config={**MODEL.config, "model_type": "gemma2", "dtype": "float32"})
    assert resolve(WANTED, gemma, DATASET).dtype == "float32"


def test_layers_of_an_extension_need_one():
    wanted = Wanted("m_1", "ds_1", hook_points=("blocks.x1.hook_resid_post",), extension_id="x_1")
    assert resolve(wanted, MODEL, DATASET, "artifact://extension/0").hook_points == wanted.hook_points
    with pytest.raises(errors.Invalid, match="hook_points"):
        resolve(replace(wanted, extension_id=""), MODEL, DATASET)


def test_models_that_cannot_be_extracted_from():
    with pytest.raises(errors.Conflict):
        resolve(WANTED, replace(MODEL, config={}), DATASET)
    bart = replace(MODEL, model_type="bart", config={**MODEL.config, "model_type": "bart", "is_encoder_decoder": True})
    with pytest.raises(errors.Unsupported) as caught:
        resolve(WANTED, bart, DATASET)
    assert caught.value.violations[0][0] == "model_id"


def test_of_an_encoder_decoder_the_encoder_is_read():
    config = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 64, "num_layers": 4, "num_heads": 4}
    t5 = replace(MODEL, model_type="t5", config={**config, "d_kv": 16, "d_ff": 128, "vocab_size": 512})
    options = resolve(pairs(0, 3), t5, DATASET)
    assert (options.hook_points, options.layout) == (tuple(hook_points(["mlp_in", "mlp_out"], [0, 3])), "rows")
    assert row_bytes(options, facts(t5.config), 9) == 4 * 64 * 4
    with pytest.raises(errors.Invalid, match="t5") as caught:
        resolve(replace(WANTED, sites=("pattern",)), t5, DATASET)
    assert caught.value.violations[0][0] == "sites"


def test_options_survive_json():
    options = resolve(pairs(1), MODEL, DATASET)
    assert Options.from_json(options.as_json()) == options


def test_the_key_ignores_hook_points_and_nothing_else():
    options = resolve(pairs(1), MODEL, DATASET)
    key = options.key(MODEL, DATASET)
    assert resolve(pairs(1, 2), MODEL, DATASET).key(MODEL, DATASET) == key
    assert replace(options, sample_count=100).key(MODEL, DATASET) == key  # all there are
    others = [
        replace(options, layout="sequences"),
        replace(options, dtype="float32"),
        replace(options, batch_size=9),
        replace(options, max_length=100),
        replace(options, sample_count=99),
        replace(options, max_tokens=5),
        replace(options, seed=1),
        replace(options, extension_uri="artifact://extension/1"),
    ]
    keys = {other.key(MODEL, DATASET) for other in others}
    keys |= {
        options.key(replace(MODEL, digest="d2"), DATASET),
        options.key(replace(MODEL, quantization="int8"), DATASET),
    }
    keys |= {
        options.key(replace(MODEL, identifier="org/other"), DATASET),
        options.key(MODEL, replace(DATASET, digest="t2")),
    }
    assert len(keys - {key}) == 12


def test_bytes_of_a_row_count_every_width():
    known = facts(MODEL.config)
    assert row_bytes(resolve(pairs(0, 1), MODEL, DATASET), known, 9) == 4 * 64 * 2
    wide = resolve(replace(WANTED, sites=("mlp_hidden", "mlp_out"), dtype="float32"), MODEL, DATASET)
    assert row_bytes(wide, known, 9) == 2 * (192 + 64) * 4
    heads = replace(wide, hook_points=tuple(hook_points(["q", "k", "v", "z", "pattern"], [0])))
    shared = replace(known, num_heads=4, head_dim=16, num_kv_heads=2)
    assert row_bytes(heads, shared, 9) == (64 + 32 + 32 + 64 + 4 * 9) * 4


def test_an_estimate_uses_history_where_there_is_some():
    options = resolve(pairs(0, 3), MODEL, DATASET)
    guessed = estimate(options, MODEL, DATASET, rates=NO_HISTORY, device="cpu")
    assert (guessed.samples, guessed.size_bytes) == (100, 100 * 200 * 4 * 64 * 2)  # 3.5 bytes a token
    known = estimate(options, MODEL, DATASET, rates=Rates(1000.0, 50.0), device="cpu")
    assert (known.seconds, known.size_bytes) == (5.0, 100 * 50 * 4 * 64 * 2)
    assert estimate(options, MODEL, DATASET, rates=NO_HISTORY, device="cuda:0").seconds < guessed.seconds
    later = estimate(options, MODEL, DATASET, rates=Rates(1000.0, 50.0, 2.0), device="cpu")
    assert later.seconds == 7.0
    few = estimate(replace(options, sample_count=10), MODEL, DATASET, rates=Rates(1000.0, 50.0), device="cpu")
    assert (few.samples, few.seconds) == (10, 0.5)
    capped = estimate(replace(options, max_tokens=500), MODEL, DATASET, rates=Rates(1000.0, 50.0), device="cpu")
    assert capped.seconds == 0.5
    grid = estimate(replace(options, layout="sequences"), MODEL, DATASET, rates=NO_HISTORY, device="cpu")
    assert grid.size_bytes == 100 * 1024 * 4 * 64 * 2
    first_layer = estimate(resolve(pairs(0), MODEL, DATASET), MODEL, DATASET, rates=NO_HISTORY, device="cpu")
    assert first_layer.seconds == pytest.approx(guessed.seconds / 4, abs=1e-3)
    unknown = estimate(options, MODEL, replace(DATASET, rows=None), rates=NO_HISTORY, device="cpu")
    assert 0 < unknown.samples < 100
