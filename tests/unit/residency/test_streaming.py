"""Weights stream to the device: the host never holds more than a part of the largest file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from services.residency.spoken import HOME

SHARD = 8_000_000
READING = """
import json, sys
from pathlib import Path
from services.residency import loading
from services.residency.memory import give_back

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

loading._require_complete = lambda model: None
prepared = loading.prepare(Path(sys.argv[1]), "fp16")
give_back("cpu")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
loading.fill(prepared, "meta", lambda done, total: None)
devices = sorted({parameter.device.type for parameter in prepared.model.parameters()})
print(json.dumps([status("VmHWM") - before, devices]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the kernel's peak of a process")
def test_the_peak_is_below_the_largest_shard_and_a_third(tmp_path: Path) -> None:
    """The weights go to torch's meta device, which keeps nothing: what is left is what the host holds on the way.

    In a process of its own, whose heap no other test has left holes in.
    """
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size=SHARD)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert sum(shards) > 6 * max(shards)
    done = subprocess.run(
        [sys.executable, "-c", READING, str(tmp_path)], cwd=HOME, capture_output=True, check=True, timeout=100
    )
    peak, devices = json.loads(done.stdout)
    assert peak < 1.3 * max(shards)
    assert devices == ["meta"]
