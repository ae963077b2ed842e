"""Two processes that share every batch train what one process trains."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from services.training.compute import ConfigError, InMemory, Trainer
from services.training.compute.ranks import Ranks
from tests.unit.training.compute import together


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What two ranks and one process found, trained on the same data."""
    folder = tmp_path_factory.mktemp("ranks")
    children = [
        subprocess.Popen([sys.executable, "-m", together.__name__, str(rank), "2", str(folder)]) for rank in (0, 1)
    ]
    assert [child.wait(100) for child in children] == [0, 0]
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)] + [together.trained(Ranks())]


@pytest.mark.parametrize("name", together.CODERS)
def test_the_same_global_batch_gives_the_same_loss(found: list[dict[str, torch.Tensor]], name: str) -> None:
    first, second, alone = (part[f"{name}/losses"] for part in found)
    assert torch.equal(first, second)
    assert torch.allclose(first, alone, rtol=0, atol=1e-4)
    assert alone[-1] < alone[0]
    assert torch.allclose(found[0][f"{name}/l0"], found[2][f"{name}/l0"], rtol=1e-2)


@pytest.mark.parametrize("name", together.CODERS)
def test_the_ranks_hold_the_same_weights_and_count_the_same_dead(
    found: list[dict[str, torch.Tensor]], name: str
) -> None:
    first, second, alone = found
    of_coder = [key for key in first if key.startswith(f"{name}/")]
    assert len(of_coder) > 10
    for key in of_coder:
        assert torch.equal(first[key], second[key]), key
    assert torch.equal(first[f"{name}/idle_rows"], alone[f"{name}/idle_rows"])
    assert torch.equal(first[f"{name}/dead"], alone[f"{name}/dead"])
    assert alone[f"{name}/dead"].any()


def test_the_thresholds_are_those_of_the_whole_batch(found: list[dict[str, torch.Tensor]]) -> None:
    for name in ("topk", "batch_topk"):
        assert torch.allclose(found[0][f"{name}/threshold"], found[2][f"{name}/threshold"], rtol=1e-3)


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(InMemory({"pair": together.data()}), together.plans(), ranks=Ranks(0, 3))
    assert caught.value.field == "batch_size"
