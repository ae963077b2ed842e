"""Weights stream to the device: the host never holds more than a part of the largest file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from services.residency import loading
from services.residency.memory import give_back

SHARD = 8_000_000


def status(name: str) -> int:
    """A figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's peak of a process")
def test_the_peak_is_below_the_largest_shard_and_a_third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights go to torch's meta device, which keeps nothing: what is left is what the host holds on the way."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=SHARD)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert sum(shards) > 6 * max(shards)
    monkeypatch.setattr(loading, "_require_complete", lambda model: None)
    prepared = loading.prepare(tmp_path, "fp16")
    give_back("cpu")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loading.fill(prepared, "meta", lambda done, total: None)
    assert status("VmHWM") - before < 1.3 * max(shards)
    assert {p.device for p in prepared.model.parameters()} == {torch.device("meta")}
