"""Loading by our own reader gives exactly what transformers' own loader gives, from private memory."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from services.residency.checkpoint import CheckpointError, PickleRefused, read_header, read_headers
from services.residency.estimate import parameter_count
from services.residency.loading import LoadFailed, load_model, read_config, skeleton
from services.residency.splice import logits
from tests import models


def theirs(family: str, path=None):
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(path or models.saved(family)).eval()


def scores(model):
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=models.batch(), decoder_input_ids=models.batch(seed=1)).logits
    return logits(model, models.batch())


@pytest.mark.parametrize("family", [*models.FAMILIES, "t5"])
def test_weights_and_logits_equal_those_of_from_pretrained(family):
    model, reference = load_model(models.saved(family), "none"), theirs(family)
    assert torch.equal(scores(model), scores(reference))
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(("quantization", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_conversions_equal_those_of_from_pretrained(quantization, dtype):
    model = load_model(models.saved("t5"), quantization)
    reference = AutoModelForSeq2SeqLM.from_pretrained(models.saved("t5"), dtype=dtype)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in reference.named_parameters()}
    assert all(torch.equal(p, reference.state_dict()[n]) for n, p in model.state_dict().items())


def test_none_keeps_the_checkpoints_own_dtype(tmp_path):
    models.tiny("llama").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path, "none").parameters()} == {torch.bfloat16}


def test_memory_is_private(tmp_path):
    path = models.copied(tmp_path, "gpt2")
    model = load_model(path, "none")
    before = scores(model)
    file = path / "model.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    file.write_bytes(b"")
    assert torch.equal(scores(model), before)


def test_a_checkpoint_without_the_base_models_prefix_and_with_saved_masks(tmp_path):
    """As openai-community/gpt2 has it."""
    path = models.copied(tmp_path, "gpt2")
    stored = {name.removeprefix("transformer."): t for name, t in load_file(path / "model.safetensors").items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(stored, path / "model.safetensors")
    assert torch.equal(scores(load_model(path, "none")), scores(theirs("gpt2")))


def test_several_files_and_an_index(tmp_path):
    models.tiny("llama").save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    seen = []
    model = load_model(tmp_path, "none", progress=lambda done, total: seen.append(done / total))
    assert torch.equal(scores(model), scores(models.tiny("llama")))
    assert seen[-1] == 1.0
    (next(tmp_path.glob("*00002*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="1 of"):
        load_model(tmp_path, "none")


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_load_is_whole_while_another_thread_lays_models_out(quantization):
    path = models.saved("gpt2")
    expected = scores(load_model(path, quantization))
    config, done = read_config(path), threading.Event()

    def lay_out() -> None:
        while not done.is_set():
            skeleton(config, torch.bfloat16)

    other = threading.Thread(target=lay_out)
    other.start()
    try:
        found = [load_model(path, quantization) for _ in range(5)]
    finally:
        done.set()
        other.join()
    assert all(torch.equal(scores(model), expected) for model in found)


def test_t5s_head_is_untied_only_where_the_file_holds_another_one(tmp_path):
    path = models.copied(tmp_path, "t5")
    tied = skeleton(read_config(path), torch.float32)
    assert parameter_count(tied, read_headers(path)) == sum(p.numel() for p in models.tiny("t5").parameters())
    stored = load_file(path / "model.safetensors")
    stored["lm_head.weight"] = torch.randn(models.VOCAB, models.WIDTH)
    save_file(stored, path / "model.safetensors")
    model = load_model(path, "none")
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.shared.weight, stored["shared.weight"])
    extra = models.VOCAB * models.WIDTH
    assert parameter_count(tied, read_headers(path)) == sum(p.numel() for p in models.tiny("t5").parameters()) + extra


def test_progress_is_told_at_least_every_5_percent_of_a_large_tensor(tmp_path):
    from services.residency.checkpoint import read_tensors

    save_file({"a": torch.zeros(1000, 1000), "b": torch.zeros(10)}, tmp_path / "model.safetensors")
    entries = read_headers(tmp_path)
    steps = []
    dict(read_tensors(tmp_path, entries, steps.append))
    total = sum(entry.nbytes for entry in entries)
    assert sum(steps) == total
    assert max(steps) <= 0.05 * total


def test_pickles_are_refused_with_the_way_out(tmp_path):
    path = models.copied(tmp_path, "gpt2")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        load_model(path, "none")


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path):
    path = models.copied(tmp_path, "gpt2")
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(LoadFailed):
        load_model(path, "none")
    (path / "config.json").write_text(json.dumps(config))
    load_model(path, "none")
    assert not (tmp_path / "ran").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_an_error_and_never_a_crash(tmp_path, data):
    good = (models.saved("gpt2") / "model.safetensors").read_bytes()
    content = bytearray(good[: data.draw(st.integers(0, 12000), label="length")])
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(file)


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "content",
    [
        header(a=F32 | {"data_offsets": [0, 4]}) + b"\0" * 8,
        header(a=F32 | {"data_offsets": [0, 8]}, b=F32 | {"data_offsets": [4, 12]}) + b"\0" * 16,
        header(a=F32 | {"data_offsets": [-8, 0]}) + b"\0" * 16,
        header(a={"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(a={"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(a=[1, 2]) + b"\0" * 8,
        b"\2\0\0\0\0\0\0\0[]",
    ],
    ids=["too few bytes", "overlap", "negative offset", "negative shape", "dtype", "no object", "no header"],
)
def test_headers_that_lie(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(file)
