"""The transcoder's map, its prefixes and its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.residency.lenses.transcoder import Transcoder, TranscoderShape


def make(activation: str = "topk", *, skip: bool = False) -> Transcoder:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {"W_enc": draw(6, 16), "b_enc": draw(16), "W_dec": draw(16, 5), "b_dec": draw(5)}
    weights["threshold"] = torch.full((16,), 0.7)
    if skip:
        weights["W_skip"] = draw(5, 6)
    return Transcoder(
        TranscoderShape(activation, 3, (2, 4, 10)), weights, {"source_hook_point": "blocks.2.mlp.hook_in"}
    )


def reference(transcoder: Transcoder, x: torch.Tensor) -> torch.Tensor:
    pre = x @ transcoder.W_enc + transcoder.b_enc
    if transcoder.shape.activation == "topk":
        values, indices = pre.topk(3, 1)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())
    return pre.relu() * (pre > transcoder.threshold)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_forward_is_the_formula(activation: str, skip: bool) -> None:
    transcoder, x = make(activation, skip=skip), torch.randn(20, 6)
    z = reference(transcoder, x)
    assert torch.allclose(transcoder.encode(x), z, atol=1e-6)
    expected = z @ transcoder.W_dec + transcoder.b_dec
    assert torch.allclose(transcoder.decode(transcoder.encode(x)), expected, atol=1e-5)
    if skip:
        expected = expected + x @ transcoder.W_skip.T
    assert torch.allclose(transcoder(x), expected, atol=1e-5)


def test_prefixes_select_over_the_whole_dictionary_and_cut_afterwards() -> None:
    transcoder, x = make(skip=True), torch.randn(20, 6)
    codes, prefixes = transcoder.prefixes(x)
    z = reference(transcoder, x)
    assert torch.allclose(codes.dense(), z, atol=1e-6)
    for groups, width in ((1, 2), (2, 6), (3, 16)):
        cut = z.clone()
        cut[:, width:] = 0
        expected = cut @ transcoder.W_dec + transcoder.b_dec + x @ transcoder.W_skip.T
        assert torch.allclose(prefixes[groups - 1], expected, atol=1e-5)
        assert torch.allclose(transcoder(x, groups), expected, atol=1e-5)
        assert torch.equal(transcoder.encode(x, groups), transcoder.encode_sparse(x, groups).dense())


def test_a_prefix_that_does_not_exist_is_named() -> None:
    for groups in (0, 4):
        with pytest.raises(ValueError, match=r"prefix: \d is not between 1 and the transcoder's 3 groups"):
            make().encode(torch.zeros(1, 6), groups)


@pytest.mark.parametrize("skip", [False, True])
def test_a_saved_transcoder_comes_back_bit_for_bit(tmp_path: Path, skip: bool) -> None:
    transcoder, x = make("batch_topk", skip=skip), torch.randn(8, 6)
    transcoder.save(tmp_path / "t")
    again = Transcoder.load(tmp_path / "t")
    assert again.shape == transcoder.shape
    assert again.info == transcoder.info
    for name, tensor in transcoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(x), transcoder(x))


def test_the_folder_is_what_saelens_reads(tmp_path: Path) -> None:
    make(skip=True).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu_skip_transcoder"
    assert (config["d_in"], config["d_sae"], config["d_out"]) == (6, 16, 5)
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none"
    assert config["metadata"]["hook_name"] == "blocks.2.mlp.hook_in"
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {
        "W_enc": (6, 16),
        "b_enc": (16,),
        "W_dec": (16, 5),
        "b_dec": (5,),
        "threshold": (16,),
        "W_skip": (5, 6),
    }


def test_a_damaged_folder_is_refused_by_the_files_name(tmp_path: Path) -> None:
    make().save(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"^sae_weights\.safetensors: ") as caught:
        Transcoder.load(tmp_path)
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "transcoder.json").write_text("{")
    with pytest.raises(ValueError, match=r"^transcoder\.json: "):
        Transcoder.load(tmp_path)


def test_weights_that_do_not_fit_are_named() -> None:
    good = {name: tensor for name, tensor in make().state_dict().items() if tensor is not None}
    for name, wrong in (("b_enc", torch.zeros(15)), ("W_dec", torch.zeros(15, 5)), ("threshold", torch.zeros(1))):
        with pytest.raises(ValueError, match=f"^{name}: "):
            Transcoder(make().shape, good | {name: wrong})
    with pytest.raises(ValueError, match="b_dec: missing"):
        Transcoder(make().shape, {name: tensor for name, tensor in good.items() if name != "b_dec"})


def test_its_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    """A mapping of a file that is cut short ends the process."""
    transcoder, x = make(), torch.randn(20, 6)
    transcoder.save(tmp_path)
    loaded = Transcoder.load(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"\0" * 64)
    assert torch.equal(loaded(x), transcoder(x))
