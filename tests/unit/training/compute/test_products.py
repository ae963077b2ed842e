"""Which products are chosen, and that the choice is made once."""

from __future__ import annotations

import json

import pytest
import torch

from services.training.compute import CoderPlan, InMemory, TrainConfig, Trainer, products
from services.training.compute.products import faster

CPU = torch.device("cpu")


class Clock:
    """Tells times at which one kind of products took as long as it says."""

    def __init__(self, **seconds: float) -> None:
        self._now, self._steps = 0.0, [seconds["sparse"], seconds["dense"]] * products.TRIES
        self._asked = 0

    def perf_counter(self) -> float:
        if self._asked % 2:
            self._now += self._steps[self._asked // 2]
        self._asked += 1
        return self._now


@pytest.fixture(autouse=True)
def fresh() -> None:
    products._measured.cache_clear()


@pytest.mark.parametrize(("dense", "chosen"), [(1.0, "dense"), (1.7, "sparse"), (5.0, "sparse")])
def test_the_clearly_faster_one_is_chosen(monkeypatch: pytest.MonkeyPatch, dense: float, chosen: str) -> None:
    monkeypatch.setattr(products, "time", Clock(sparse=2.0, dense=dense))
    assert faster(d_in=8, d_out=4, widths=(8, 32), top_k=8, rows=16, device=CPU) == chosen


def test_a_sparse_dictionary_is_not_even_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "time", None)
    assert faster(d_in=8, d_out=4, widths=(1024, 4096), top_k=32, rows=16, device=CPU) == "sparse"


def test_a_training_goes_on_with_the_products_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits depend on them, and another process may measure otherwise."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    source = InMemory({"pair": (x, x[:, :5].clone())})
    plan = {"a": CoderPlan("pair", TrainConfig(dict_size=16, top_k=8, batch_size=16, num_tokens=128))}
    monkeypatch.setattr(products, "time", Clock(sparse=2.0, dense=1.0))
    whole = Trainer(source, plan)
    whole.step()
    tensors, facts = whole.state()
    kept = ({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))
    assert facts["coders"]["a"]["products"] == "dense"
    list(whole.run())

    products._measured.cache_clear()
    monkeypatch.setattr(products, "time", Clock(sparse=1.0, dense=2.0))
    resumed = Trainer(source, plan, state=kept)
    list(resumed.run())
    for name, expected in whole.state()[0].items():
        assert torch.equal(resumed.state()[0][name], expected), name
