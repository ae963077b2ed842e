"""What an evaluation does when memory runs out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from services.kit import errors
from services.residency.families import family_of
from services.residency.host_copy import device_bound, host_copy
from services.training import judging
from services.training.dialogue import WORDS, Judge, Spread
from services.training.domain import Judged, WantedEvaluation
from services.training.job_ports import Batch
from services.training.judgements import judge
from services.training.judging_split import Splitting
from tests import models
from tests.unit.training.compute.test_evaluation import coder

IDS = torch.randint(5, 60, (8, 12), generator=torch.Generator().manual_seed(3))


class Model:
    """A tiny GPT-2 on a device that can hold `rows` sequences at a time."""

    def __init__(self, device: str, rows: int) -> None:
        self.model, self.device, self._rows = models.tiny("gpt2").eval(), device, rows
        self.family, self.tokenizer, self.digest, self.weight_bytes = family_of(self.model), None, "base", 1000
        self.facts = SimpleNamespace(model_batch_size=4)

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        batch = arguments[-1] if work is judging.on else ()
        if batch and (self.device != "cpu" or len(batch[0]) > self._rows):
            raise errors.Exhausted("the device ran out of memory", reason="DEVICE_OOM", transient=True)
        if self.device != "cpu" and arguments == (self.device,) and work is not judging.give_back:
            return work("cpu")  # there is no GPU to put the weights on
        return None if work is judging.give_back else work(*arguments)


class World:
    """The ports of the job around one model and one folder."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.folder, self.published = model, folder, []
        self.asked: list[tuple[int, int]] = []

    async def bring(self, model_id: str) -> None: ...

    @asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[Model]:
        yield self.model

    @asynccontextmanager
    async def reading(self, uri: str) -> AsyncIterator[Path]:
        yield self.folder

    async def batches(self, wanted: WantedEvaluation, model: Any, most: int) -> list[Batch]:
        size = wanted.batch_size or model.facts.model_batch_size
        self.asked.append((most, size))
        ids = IDS[: most * size]
        return [(part, torch.ones_like(part), torch.ones_like(part)) for part in ids.split(size)]


class TwoDevices:
    """The ports of an evaluation whose model is split; the work of its process is done here.

    Only the `enough`-th process has memory enough.
    """

    facts, tokenizer, digest, weight_bytes = SimpleNamespace(model_batch_size=4), None, "base", 1000

    def __init__(self, enough: int = 1) -> None:
        self._enough, self.done = enough, []

    async def laid_out(self, model_id: str) -> TwoDevices:
        return self

    def over(self, devices: int, work_bytes: int) -> tuple[Spread, int]:
        blocks = {f"transformer.h.{layer}": layer // 2 for layer in range(4)}
        spread = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.drop", "lm_head"), 0) | blocks
        return Spread(str(models.saved("gpt2")), "none", spread | {"transformer.ln_f": 1}, ("cpu", "cpu")), work_bytes

    async def reserve(self, owner: str, size_bytes: int, ranks: int, **_: Any) -> list[str]:
        self.done.append(("reserve", owner, ranks))
        assert size_bytes > 0
        return ["3", "4"]

    async def release(self, owner: str) -> None:
        self.done.append(("release", owner))

    @asynccontextmanager
    async def start(self, start: Judge) -> AsyncIterator[TwoDevices]:
        self._said: list[Any] = []
        self._start = WORDS.from_line(WORDS.to_line(start))
        self.done.append(tuple(start.ranks))
        yield self

    async def next(self) -> Any:
        if self.done.count(("3,4",)) < self._enough:
            raise errors.Exhausted("the device ran out of memory", reason="DEVICE_OOM", transient=True)
        if not self._said:
            judge(self._start, self._said.append)
        return self._said.pop(0)


class Run:
    """A claimed evaluation."""

    job_id = "job_1"

    def __init__(self, mode: str, published: list, devices: int = 1) -> None:
        self._mode, self._published, self._devices = mode, published, devices

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            yield Path(folder)

    async def begin(self) -> tuple[WantedEvaluation, Judged]:
        wanted = WantedEvaluation("tc_1", "ds_1", num_batches=2, mode=self._mode, devices=self._devices)
        return wanted, Judged("m_1", 1, "base", "artifact://transcoder/1", {"transcoder_id": "tc_1"})

    async def unless_stopped(self, work: Any) -> Any:
        return await work

    async def checkpoint(self) -> None: ...

    async def waiting(self, reason: str | None) -> None: ...

    async def progress(self, percent: float, figures: Any) -> None: ...

    async def publish(self, figures: Any, samples: Path | None = None) -> None:
        self._published.append(figures)


def judged(tmp_path: Path, mode: str, *, rows: int, device: str = "cpu") -> tuple[dict[str, Any], World]:
    coder(models.WIDTH, b_dec=torch.ones(models.WIDTH)).save(tmp_path)
    world = World(Model(device, rows), tmp_path)
    job = judging.EvaluationJob(world, world, world, None)
    return asyncio.run(job.run(Run(mode, world.published))), world


def judged_over_two(tmp_path: Path, two: TwoDevices, mode: str = "auto") -> dict[str, Any]:
    coder(models.WIDTH, b_dec=torch.ones(models.WIDTH)).save(tmp_path)
    world = World(Model("cpu", 0), tmp_path)
    job = judging.EvaluationJob(world, world, world, Splitting(two, two, two, threads=1))
    return asyncio.run(job.run(Run(mode, world.published, devices=2)))


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    return judged(tmp_path, "auto", rows=100)[0]


def agrees(found: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in ("fvu", "ce_clean", "ce_spliced", "ce_mean_ablated", "kl", "l0", "tokens"):
        assert found[name] == pytest.approx(whole[name], rel=1e-5), name


def test_with_memory_enough_it_is_full(whole: dict[str, Any]) -> None:
    assert (whole["mode"], whole["batches"], whole["tokens"]) == ("full", 2, IDS.numel())


def test_the_next_mode_judges_the_same_text_a_sequence_at_a_time(tmp_path: Path, whole: dict[str, Any]) -> None:
    found, world = judged(tmp_path, "auto", rows=1)
    assert (found["mode"], found["batches"]) == ("safe", 8)
    assert world.asked == [(2, 4), (8, 1)]
    assert world.published == [{name: value for name, value in found.items() if name != "transcoder_id"}]
    agrees(found, whole)


def test_a_gpu_without_memory_leaves_it_to_the_host(tmp_path: Path, whole: dict[str, Any]) -> None:
    found, world = judged(tmp_path, "auto", rows=0, device="cuda:0")
    assert (found["mode"], len(world.asked)) == ("cpu", 3)
    agrees(found, whole)
    direct, _ = judged(tmp_path, "cpu", rows=0, device="cuda:0")
    assert direct["mode"] == "cpu"
    agrees(direct, whole)


def test_a_model_over_two_devices_is_judged_by_a_process_that_has_both(tmp_path: Path, whole: dict[str, Any]) -> None:
    two = TwoDevices()
    found = judged_over_two(tmp_path, two)
    assert two.done == [("reserve", "job_1", 2), ("3,4",), ("release", "job_1")]
    assert found["mode"] == "full"
    agrees(found, whole)


def test_over_two_devices_the_smaller_mode_is_another_process(tmp_path: Path, whole: dict[str, Any]) -> None:
    two = TwoDevices(enough=2)
    found = judged_over_two(tmp_path, two)
    assert two.done == [("reserve", "job_1", 2), ("3,4",)] * 2 + [("release", "job_1")]
    assert (found["mode"], found["batches"]) == ("safe", 8)
    agrees(found, whole)
    with pytest.raises(errors.Exhausted):
        judged_over_two(tmp_path, TwoDevices(enough=3))  # the host's memory is nothing to split a model over


@pytest.mark.parametrize("mode", ["full", "safe"])
def test_a_mode_that_was_asked_for_is_not_exchanged(tmp_path: Path, mode: str) -> None:
    with pytest.raises(errors.Exhausted) as caught:
        judged(tmp_path, mode, rows=0)
    assert caught.value.reason == "DEVICE_OOM"


def test_when_nothing_is_small_enough_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.Exhausted) as caught:
        judged(tmp_path, "auto", rows=0)
    assert caught.value.reason == "DEVICE_OOM"


def test_a_host_that_is_too_small_is_told_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging.psutil, "virtual_memory", lambda: SimpleNamespace(available=999))
    with pytest.raises(errors.Exhausted) as caught:
        judged(tmp_path, "auto", rows=0, device="cuda:0")
    assert caught.value.reason == "INSUFFICIENT_MEMORY"
    assert caught.value.metadata.keys() == {"required_memory_gb", "available_memory_gb"}


def test_a_copy_shares_nothing_with_its_model_but_what_is_shared_within() -> None:
    model = models.tiny("gpt2").eval()
    copied = host_copy(model)
    ids = IDS[:1]
    with torch.no_grad():
        expected = model(ids).logits
        for tensor in copied.parameters():
            assert not tensor.requires_grad
        assert torch.equal(copied(ids).logits, expected)
        own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        assert own.isdisjoint(tensor.data_ptr() for tensor in (*copied.parameters(), *copied.buffers()))
        assert len(list(copied.parameters())) == len(list(model.parameters()))


def test_weights_that_only_a_kernel_reads_are_named() -> None:
    class Packed(nn.Parameter):
        pass

    layer = nn.Linear(2, 2)
    assert device_bound(layer) == ""
    layer.weight = Packed(layer.weight.detach())
    assert device_bound(layer) == "Packed"
