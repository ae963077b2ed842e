"""On two GPUs: a model's halves lie on both, hidden states cross; rows and evaluations are those of one GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from services.residency.loading import prepare
from services.residency.split import device_map, load_split
from services.residency.texts import Sequences
from services.residency.tokens import TokenStore
from services.training.dialogue import Split
from services.training.split_rows import TOKENS, SplitRows
from tests import models
from tests.unit.training.compute.test_evaluation import coder, judge

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ("cuda:0", "cuda:1")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_rows_of_both_halves_are_those_of_one_gpu_and_lie_where_the_coder_is(family: str, tmp_path: Path) -> None:
    folder = models.saved(family)
    spread, held = device_map(prepare(folder, "none"), 2, 0, "cuda:0")
    assert min(held) > 0
    model = load_split(folder, "none", spread, DEVICES)
    assert {str(parameter.device) for parameter in model.parameters()} == set(DEVICES)
    ids = models.batch(8, 16).numpy().astype(np.int32)
    offsets = np.arange(0, ids.size + 1, 16)
    TokenStore(tmp_path).save(TOKENS, Sequences(ids.ravel(), offsets, np.arange(8), 8, 0, 0, 0))
    pairs = {str(layer): (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") for layer in (0, 3)}
    found = []
    for where, devices in (({"": 0}, DEVICES[:1]), (spread, DEVICES)):
        source = SplitRows(Split(str(folder), "none", where, devices, str(tmp_path), ()), pairs, DEVICES[0])
        found.append(next(source.batches(source.rows, 0, 0)))
    for name in pairs:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            assert str(other.device) == DEVICES[0]
            assert torch.allclose(one, other, atol=1e-5)


def test_an_evaluation_over_both_finds_what_one_gpu_does() -> None:
    folder, found = models.saved("gpt2"), []
    spread, _ = device_map(prepare(folder, "none"), 2, 0, "cuda:0")
    parts = models.batch(8, 16).to(DEVICES[0]).split(4)
    batches = [(part, torch.ones_like(part), torch.ones_like(part)) for part in parts]
    for where, devices in (({"": 0}, DEVICES[:1]), (spread, DEVICES)):
        transcoder = coder(models.WIDTH, scale=0.1).to(DEVICES[0])
        transcoder.info |= {"source_hook_point": "blocks.3.mlp.hook_in", "target_hook_point": "blocks.3.hook_mlp_out"}
        found.append(judge(load_split(folder, "none", where, devices), transcoder, batches))
    for name in ("fvu", "l0", "ce_clean", "ce_spliced", "ce_mean_ablated", "kl"):
        assert getattr(found[1], name) == pytest.approx(getattr(found[0], name), rel=1e-4), name
