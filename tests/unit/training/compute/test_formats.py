from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.training.compute import FORMATS, ConfigError, TrainConfig, export, fit, load_foreign
from services.training.compute.formats import conversion

D, LATENTS, GROUPS, K = 12, 96, (16, 32, 48), 6
LAYER = 3
INFO = {
    "layer": LAYER,
    "source_hook_point": f"blocks.{LAYER}.mlp.hook_in",
    "target_hook_point": f"blocks.{LAYER}.hook_mlp_out",
}


def coder(activation: str = "topk", *, skip: bool = False, d_out: int = D, **info: Any) -> Transcoder:
    draw = torch.Generator().manual_seed(7)
    weights = {
        "W_enc": torch.randn(D, LATENTS, generator=draw),
        "b_enc": torch.randn(LATENTS, generator=draw) * 0.1,
        "W_dec": torch.randn(LATENTS, d_out, generator=draw),
        "b_dec": torch.randn(d_out, generator=draw),
        "threshold": torch.rand(LATENTS, generator=draw) + 2.0,
    }
    if skip:
        weights["W_skip"] = torch.randn(d_out, D, generator=draw)
    return Transcoder(TranscoderShape(activation, K, GROUPS), weights, {**INFO, **info})


def inputs(rows: int = 4000, seed: int = 3) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def gain() -> Tensor:
    return 1 + 0.4 * torch.randn(D, generator=torch.Generator().manual_seed(5))


def assert_same(found: Transcoder, expected: Transcoder) -> None:
    assert found.shape == expected.shape
    assert found.info == expected.info
    ours, theirs = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


NATIVE = [
    ("sae_lens", "jumprelu"),
    ("sparsify", "topk"),
    ("circuit_tracer", "topk"),
    ("circuit_tracer", "jumprelu"),
    ("gemma_scope", "jumprelu"),
]


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize(("name", "activation"), NATIVE)
def test_what_a_format_has_words_for_comes_back_bit_for_bit(
    name: str, activation: str, skip: bool, tmp_path: Path
) -> None:
    transcoder = coder(activation, skip=skip)
    options = {"gain": gain()} if name == "gemma_scope" else {}
    if name == "gemma_scope" and skip:
        with pytest.raises(ConfigError, match="skip"):
            export(transcoder, name, tmp_path / "out", **options)
        return
    found = export(transcoder, name, tmp_path / "out", **options)
    assert found.thresholds == ""
    assert_same(load_foreign(tmp_path / "out", name), transcoder)


@pytest.mark.parametrize("name", ["sae_lens", "circuit_tracer", "gemma_scope"])
def test_what_is_converted_comes_back_as_it_was_written(name: str, tmp_path: Path) -> None:
    options = {"gain": gain()} if name == "gemma_scope" else {}
    found = export(coder(), name, tmp_path, calibrate=inputs(), **options)
    assert found.transcoder.shape.activation == "jumprelu"
    assert_same(load_foreign(tmp_path, name), found.transcoder)


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_others_need_nothing_of_ours(name: str, tmp_path: Path) -> None:
    """Without the files beside them: one group, and the same reconstructions."""
    transcoder = coder("topk" if name == "sparsify" else "jumprelu")
    options = {"gain": gain()} if name == "gemma_scope" else {}
    folder = tmp_path / "layers.3.mlp"
    export(transcoder, name, folder, **options)
    for file in folder.glob("transcoder*"):
        file.unlink()
    found = load_foreign(folder, name, **options)
    assert found.shape.group_sizes == (LATENTS,)
    x = inputs(200)
    torch.testing.assert_close(found(x), transcoder(x), rtol=1e-5, atol=1e-5)
    if name != "sae_lens":
        assert found.info["layer"] == LAYER


def test_the_files_have_the_names_and_shapes_of_their_tools(tmp_path: Path) -> None:
    """As research of their sources has it; the real loaders read them in tests/interop."""
    skip, plain = coder("jumprelu", skip=True), coder()
    export(skip, "sae_lens", tmp_path / "sae_lens")
    tensors = load_file(tmp_path / "sae_lens" / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "W_enc": (D, LATENTS),
        "b_enc": (LATENTS,),
        "W_dec": (LATENTS, D),
        "b_dec": (D,),
        "threshold": (LATENTS,),
        "W_skip": (D, D),
    }
    config = json.loads((tmp_path / "sae_lens" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu_skip_transcoder"
    assert config["apply_b_dec_to_input"] is False
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    export(plain, "sparsify", tmp_path / "sparsify")
    tensors = load_file(tmp_path / "sparsify" / "sae.safetensors")
    assert torch.equal(tensors["encoder.weight"], plain.W_enc.T)
    assert tensors.keys() == {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    config = json.loads((tmp_path / "sparsify" / "cfg.json").read_text())
    assert (config["k"], config["num_latents"], config["d_in"], config["transcode"]) == (K, LATENTS, D, True)
    export(skip, "circuit_tracer", tmp_path / "set")
    tensors = load_file(tmp_path / "set" / "layer_3.safetensors")
    assert tensors.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "activation_function.threshold"}
    assert torch.equal(tensors["W_enc"], skip.W_enc.T)
    bare = coder("jumprelu")
    export(bare, "gemma_scope", tmp_path / "scope", gain=gain())
    with np.load(tmp_path / "scope" / "params.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
        assert {arrays[name].dtype for name in arrays.files} == {np.dtype(np.float32)}
        normalized = inputs(100)
        pre = normalized @ torch.from_numpy(arrays["W_enc"]) + torch.from_numpy(arrays["b_enc"])
    expected = (normalized * gain()) @ bare.W_enc + bare.b_enc
    torch.testing.assert_close(pre, expected, rtol=1e-5, atol=1e-5)


def test_a_set_holds_every_layer_with_what_is_ours(tmp_path: Path) -> None:
    layers = {n: coder("topk", layer=n, source_hook_point=f"blocks.{n}.mlp.hook_in") for n in (0, 1)}
    for transcoder in layers.values():
        export(transcoder, "circuit_tracer", tmp_path)
    for n, transcoder in layers.items():
        assert_same(load_foreign(tmp_path, "circuit_tracer", layer=n), transcoder)
    with pytest.raises(ValueError, match="name one layer"):
        load_foreign(tmp_path, "circuit_tracer")
    with pytest.raises(ConfigError, match=r"config.yaml"):
        export(coder("jumprelu"), "circuit_tracer", tmp_path)


def test_gemma_scope_without_the_gain_says_what_it_reads(tmp_path: Path) -> None:
    transcoder = coder("jumprelu")
    export(transcoder, "gemma_scope", tmp_path / "layer_3", gain=gain())
    for file in (tmp_path / "layer_3").glob("transcoder*"):
        file.unlink()
    bare = load_foreign(tmp_path / "layer_3" / "params.npz", "gemma_scope")
    assert bare.info["source_hook_point"] == "blocks.3.ln2.hook_normalized"
    assert bare.info["apply_rmsnorm_scaling"] is False
    x = inputs(100)
    torch.testing.assert_close(bare(x), transcoder(x * gain()), rtol=1e-5, atol=1e-5)
    export(bare, "gemma_scope", tmp_path / "again")  # its own convention: nothing to bridge
    assert_same(load_foreign(tmp_path / "again", "gemma_scope"), bare)
    with pytest.raises(ConfigError, match="gain"):
        export(bare, "gemma_scope", tmp_path / "never", gain=gain())
    with pytest.raises(ConfigError, match="gain"):
        export(transcoder, "gemma_scope", tmp_path / "never")
    with pytest.raises(ConfigError, match="zero"):
        export(transcoder, "gemma_scope", tmp_path / "never", gain=torch.zeros(D))
    residual = coder("jumprelu", source_hook_point="blocks.3.hook_resid_mid")
    with pytest.raises(ConfigError, match="hook_resid_mid"):
        export(residual, "gemma_scope", tmp_path / "never", gain=gain())


def test_gemma_scope_2_is_read_with_its_skip_path(tmp_path: Path) -> None:
    transcoder = coder("jumprelu", skip=True)
    tensors = {
        "w_enc": transcoder.W_enc.contiguous(),
        "w_dec": transcoder.W_dec,
        "b_enc": transcoder.b_enc,
        "b_dec": transcoder.b_dec,
        "threshold": transcoder.threshold,
        "affine_skip_connection": transcoder.W_skip.T.contiguous(),
    }
    folder = tmp_path / "layer_5_width_16k_l0_small_affine"
    folder.mkdir()
    save_file(tensors, folder / "params.safetensors")
    found = load_foreign(folder, "gemma_scope")
    assert found.info["source_hook_point"] == "blocks.5.mlp.hook_in"
    x = inputs(100)
    torch.testing.assert_close(found(x), transcoder(x))


@pytest.mark.parametrize("gains", [gain(), gain() * 1e-3, -gain()])
def test_the_bridge_over_the_gain_loses_no_bit(gains: Tensor) -> None:
    W_enc = coder().W_enc
    bare, lost = conversion.without_gain(W_enc, gains)
    assert not torch.equal(conversion.with_gain(bare, gains), W_enc)  # float32 alone is not enough
    assert torch.equal(conversion.with_gain(bare, gains, lost), W_enc)


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_calibrated_thresholds_keep_l0_on_the_calibration_rows(activation: str) -> None:
    transcoder, x = coder(activation), inputs()
    found = conversion.to_jumprelu(transcoder, x)
    assert found.wanted_l0 == pytest.approx(K)
    assert found.l0 == pytest.approx(K, rel=0.01)
    assert found.l0 == pytest.approx(float((found.transcoder.encode(x) > 0).sum(1).double().mean()))
    assert found.thresholds == "scalar" if activation == "batch_topk" else found.thresholds in ("scalar", "per_latent")


def test_per_latent_thresholds_keep_every_latents_frequency() -> None:
    transcoder, x = coder(), inputs()
    codes = transcoder.encode_sparse(x)
    thresholds = conversion._fitted("per_latent", transcoder, x, codes)
    converted = conversion._with_thresholds(transcoder, thresholds)
    assert torch.equal(converted.encode_sparse(x).counts(), codes.counts())


def test_rows_that_occur_again_and_again_keep_the_l0_too() -> None:
    """As in real text: a threshold has all of them above it or none."""
    transcoder, x = coder(), inputs(80).repeat_interleave(50, 0)
    thresholds = conversion._fitted("per_latent", transcoder, x, transcoder.encode_sparse(x))
    converted = conversion._with_thresholds(transcoder, thresholds)
    assert len(converted.encode_sparse(x)) == pytest.approx(K * len(x), rel=0.01)
    part = x[:3990]  # now the counts are no multiples of how often a row occurs
    codes = transcoder.encode_sparse(part)
    thresholds = conversion._per_latent(transcoder, x, codes.counts())
    assert len(conversion._with_thresholds(transcoder, thresholds).encode_sparse(x)) == pytest.approx(
        len(codes), rel=0.01
    )


def test_the_better_thresholds_are_kept() -> None:
    """A latent that is loud but rarely wins needs a threshold of its own; latents that are all alike share one."""
    x = inputs()
    loud = coder()
    loud.b_enc[:30] += 6.0  # they crowd the top: one threshold for all would silence the rest
    alike = coder()
    alike.W_enc /= alike.W_enc.norm(dim=0)
    alike.b_enc.zero_()
    for transcoder in (loud, alike):
        missed = {}
        fitted, others = x[:3000], x[3000:]
        codes = transcoder.encode_sparse(fitted)
        for kind in ("scalar", "per_latent"):
            thresholds = conversion._fitted(kind, transcoder, fitted, codes)
            one = conversion._with_thresholds(transcoder, thresholds)
            missed[kind] = float((one(others) - transcoder(others)).square().sum())
        assert conversion.to_jumprelu(transcoder, x).thresholds == min(missed, key=missed.get)


def test_a_trained_transcoder_reports_what_its_conversion_costs(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(64, 16, generator=draw)
    active = (torch.rand(8000, 64, generator=draw) < 0.06) * torch.rand(8000, 64, generator=draw)
    x = active @ features
    y = torch.tanh(x @ torch.randn(16, 16, generator=draw) / 4)
    costs = {}
    for activation in ("topk", "batch_topk"):
        config = TrainConfig(dict_size=128, num_tokens=60_000, top_k=8, batch_size=256, activation=activation)
        transcoder, _ = fit(x[:6000], y[:6000], config)
        transcoder.info |= INFO
        found = export(transcoder, "sae_lens", tmp_path / activation, calibrate=x[:6000], held_out=(x[6000:], y[6000:]))
        assert found.calibrated_l0 == pytest.approx(found.wanted_l0, rel=0.01)
        assert found.converted.l0 == pytest.approx(found.original.l0, rel=0.1)
        assert found.original.fvu < 0.5
        costs[activation] = found.converted.fvu / found.original.fvu
    assert costs["batch_topk"] < costs["topk"]  # it was trained with one threshold in mind
    assert costs["batch_topk"] < 1.05


@pytest.mark.parametrize("groups", [1, 2])
def test_a_prefix_is_a_transcoder_of_its_own(groups: int, tmp_path: Path) -> None:
    transcoder, x = coder("jumprelu", skip=True), inputs(300)
    found = export(transcoder, "sae_lens", tmp_path, prefix=groups, held_out=(x, transcoder(x)))
    loaded = load_foreign(tmp_path, "sae_lens")
    assert loaded.shape.group_sizes == GROUPS[:groups]
    torch.testing.assert_close(loaded(x), transcoder(x, groups))
    assert found.original == found.converted
    with pytest.raises(ConfigError, match="prefix"):
        export(transcoder, "sae_lens", tmp_path, prefix=4)
    with pytest.raises(ConfigError, match="sparsify"):
        export(coder(), "sparsify", tmp_path, prefix=1)


@pytest.mark.parametrize("format_", ["pt", ""])
def test_unknown_formats_are_refused(format_: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format"):
        export(coder(), format_, tmp_path)
    with pytest.raises(ConfigError, match="format"):
        load_foreign(tmp_path, format_)


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for activation in ("jumprelu", "batch_topk"):
        with pytest.raises(ConfigError, match="sparsify"):
            export(coder(activation), "sparsify", tmp_path / "never")
    for name in ("sparsify", "circuit_tracer"):
        with pytest.raises(ConfigError, match="width"):
            export(coder(d_out=D + 1), name, tmp_path / "never")
    with pytest.raises(ConfigError, match="calibrate"):
        export(coder(), "sae_lens", tmp_path / "never", calibrate=inputs()[:, :-1])
    assert list(tmp_path.rglob("*.*")) == []


def damaged(folder: Path, name: str, **changes: Any) -> None:
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "file", "changes", "said"),
    [
        ("sae_lens", "cfg.json", {"architecture": "standard"}, "architecture"),
        ("sae_lens", "cfg.json", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ("sae_lens", "cfg.json", {"normalize_activations": "layer_norm"}, "normalize_activations"),
        ("sparsify", "cfg.json", {"transcode": False}, "autoencoder"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", "cfg.json", {"k": 0}, "k is 0"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(
    name: str, file: str, changes: dict, said: str, tmp_path: Path
) -> None:
    export(coder("topk" if name == "sparsify" else "jumprelu"), name, tmp_path)
    damaged(tmp_path, file, **changes)
    with pytest.raises(ValueError, match=said):
        load_foreign(tmp_path, name)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_named_and_their_folder_is_not(name: str, tmp_path: Path) -> None:
    options = {"gain": gain()} if name == "gemma_scope" else {}
    export(coder("topk" if name == "sparsify" else "jumprelu"), name, tmp_path, **options)
    (weights,) = [f for f in tmp_path.iterdir() if f.suffix in (".npz", ".safetensors") and "transcoder" not in f.name]
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=weights.name) as caught:
        load_foreign(tmp_path, name)
    assert str(tmp_path) not in str(caught.value)
    weights.unlink()
    with pytest.raises(ValueError, match=r"npz|safetensors") as caught:
        load_foreign(tmp_path, name)
    assert str(tmp_path) not in str(caught.value)


def test_an_npz_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    arrays = {name: np.zeros(3, np.float32) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    np.savez(tmp_path / "params.npz", threshold=np.array([print], dtype=object), **arrays)
    with pytest.raises(ValueError, match="plain arrays"):
        load_foreign(tmp_path, "gemma_scope")


def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    export(coder("jumprelu"), "sae_lens", tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file(tensors | {"log_scale": torch.ones(1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="log_scale"):
        load_foreign(tmp_path, "sae_lens")
