"""What the training job decides, with fakes of everything around it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.kit import errors
from services.kit.jobs import Cancelled, Paused, StaleLease
from services.training.dialogue import Finished, Live, Progress, Saved, Split, Start, Written
from services.training.domain import Cache, Checkpoint, NewTranscoder, Plan, Task
from services.training.job import TrainingJob
from tests.unit.training.test_requests import MODEL, planned

TOKENS = 1280
CHECKPOINT = Checkpoint("ckpt_1", 3, 192, 0.5, "artifact://checkpoint/1", 10, datetime(2026, 1, 1, tzinfo=UTC))
CACHE = Cache("act_1", MODEL.id, "base", "artifact://activation_cache/1", 5000, {})


def progress(tokens: int) -> Progress:
    names = ("loss", "l2_loss", "aux_loss", "fvu", "fvu_min", "fvu_max", "fvu_mean", "l0", "dead_fraction", "seconds")
    figures: dict[str, Any] = dict.fromkeys((*names, "learning_rate", "gradient_norm", "share"), 0.25)
    figures |= {"fvu_per_prefix": [0.5, 0.25], "l0_per_prefix": [1.0, 2.0], "tokens_per_second": 20.0}
    return Progress(tokens // 64, tokens, 10.0, 1.0, [{"coder": "layer-1", **figures}])


FINISHED = Finished(TOKENS // 64, TOKENS, {"layer-1": 0.1})


@dataclass
class World:
    """All ports at once; remembers what was done, in order."""

    task: Task
    says: deque[Any] = field(default_factory=deque)
    done: list[Any] = field(default_factory=list)
    stop_before: dict[int, Exception] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    budget: int = 10**9
    taken_by: str = ""
    answers_save: bool = True
    asked: int = 0
    started: Start | None = None
    reserved: tuple[int, int] = (0, 0)

    # Run
    async def begin(self) -> Task:
        return self.task

    async def unless_stopped(self, work: Awaitable[Any]) -> Any:
        self.asked += 1
        if (reason := self.stop_before.pop(self.asked, None)) is not None:
            work.close()  # type: ignore[attr-defined]
            raise reason
        return await work

    async def waiting(self, reason: str | None) -> None:
        self.done.append(("waiting", reason))

    async def settle(self, plan: Plan, cache_id: str, step: int) -> None:
        self.done.append(("settle", plan.num_tokens, cache_id, step))

    async def progress(self, percent: float, figures: Mapping[str, Any]) -> None:
        self.done.append(("progress", round(percent)))

    async def finalizing(self) -> None:
        self.done.append("finalizing")

    @contextmanager
    def staging(self, kind: str) -> Iterator[Path]:
        yield Path("/staging") / kind

    async def checkpointed(self, folder: Path, saved: Saved) -> None:
        self.done.append(("checkpoint", saved.step))

    async def publish(self, made: Sequence[tuple[NewTranscoder, Path]]) -> list[str]:
        self.done.append(("publish", [new.coder for new, _ in made], made[0][0].tokens_seen))
        return [f"tc_{new.coder}" for new, _ in made]

    # Extractions
    async def start_extraction(self, model_id: str, dataset_id: str, plan: Plan, request_id: str) -> str:
        self.done.append(("extract", dataset_id, request_id))
        return "ext_1"

    async def finished(self, extraction_id: str) -> str:
        return CACHE.id

    async def open(self, cache_id: str) -> Cache:
        return replace(CACHE, widths=dict.fromkeys(self.task.plan.hook_points, 32))

    async def streamed(self, model_id: str, dataset_id: str, plan: Plan) -> Cache:
        self.done.append(("streamed", dataset_id))
        return replace(await self.open(""), id="", storage_uri="")

    def live(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> Live:
        return Live("host:1", "/state", "", str(folder), model_id, dataset_id, plan.hook_points, 0)

    # Splits
    async def open_split(self, model_id: str, dataset_id: str, plan: Plan, folder: Path) -> SplitModel:
        self.done.append(("split", dataset_id, str(folder)))
        return SplitModel(await self.streamed(model_id, dataset_id, plan))

    # Ledger
    async def reserve(
        self, owner: str, size_bytes: int, ranks: int, *, waiting: Callable[[str], Awaitable[None]], uses: Any
    ) -> list[str]:
        if self.taken_by:
            await waiting(self.taken_by)
        if size_bytes > self.budget:
            raise errors.Exhausted(reason="INSUFFICIENT_MEMORY")
        self.done.append("reserve")
        self.reserved = (size_bytes, ranks)
        return [str(number) for number in range(ranks)]

    async def release(self, owner: str) -> None:
        self.done.append("release")

    # Files
    @asynccontextmanager
    async def reading(self, uri: str) -> AsyncIterator[Path]:
        yield Path(uri.replace("artifact:/", "/store"))

    # Children
    @asynccontextmanager
    async def start_child(self, start: Start) -> AsyncIterator[World]:
        self.started = start
        self.done.append(("child", start.cache, start.state))
        try:
            yield self
        finally:
            self.done.append("gone")

    async def next(self) -> Any:
        message = self.says.popleft()
        if isinstance(message, Exception):
            raise message
        return message

    async def save(self, folder: Path) -> Saved | None:
        if not self.answers_save:
            self.says.appendleft(FINISHED)
            return None
        return Saved(7, 448, 0.3)

    async def write(self, folders: Mapping[str, Path], infos: Mapping[str, Mapping[str, Any]]) -> Written:
        self.done.append(("write", dict(infos["layer-1"])))
        return Written(dict.fromkeys(folders, (32, 32)))


class Extractions:
    def __init__(self, world: World) -> None:
        self.start, self.finished, self.open = world.start_extraction, world.finished, world.open
        self.streamed, self.live = world.streamed, world.live


class Splits:
    def __init__(self, world: World) -> None:
        self.open = world.open_split


@dataclass
class SplitModel:
    cache: Cache

    def over(self, devices: int, work_bytes: int) -> tuple[Split, int]:
        spread = {str(number): number for number in range(devices)}
        return Split("/model", "int8", spread, ["cpu"] * devices, "/tokens", ()), work_bytes + 7


class Children:
    def __init__(self, world: World) -> None:
        self.start = world.start_child


def world(*says: Any, **changes: Any) -> World:
    task = Task("job_1", MODEL.id, None, CACHE.id, planned(num_tokens=TOKENS), None, False, (), "me")
    return World(replace(task, **changes), deque(says))


def run(world: World, checkpoint_tokens: int = 10**9, checkpoint_seconds: float = 1e9) -> Any:
    job = TrainingJob(
        Extractions(world),
        Splits(world),
        world,
        world,
        Children(world),
        device="cpu",
        threads=6,
        checkpoint_tokens=checkpoint_tokens,
        checkpoint_seconds=checkpoint_seconds,
    )
    return asyncio.run(job.run(world))


def test_from_a_cache_to_transcoders() -> None:
    found = world(progress(640), progress(1280), FINISHED)
    assert run(found) == {"transcoder_ids": ["tc_layer-1"]}
    info = found.done[-4][1]
    assert (info["layer"], info["base_digest"], info["tokens_seen"]) == (1, "base", TOKENS)
    assert (info["source_hook_point"], info["target_hook_point"]) == ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    found.done[-4] = "write"
    assert found.done == [
        ("settle", TOKENS, "act_1", 0),
        "reserve",
        ("child", "/store/activation_cache/1", ""),
        ("progress", 50),
        ("progress", 100),
        "finalizing",
        "write",
        ("publish", ["layer-1"], TOKENS),
        "gone",
        "release",
    ]


def test_a_dataset_is_extracted_first_and_the_data_decides_the_tokens() -> None:
    found = world(FINISHED, cache_id=None, dataset_id="ds_1", plan=planned(num_tokens=0))
    run(found)
    assert found.done[:4] == [
        ("extract", "ds_1", "job_1"),
        ("waiting", "extraction ext_1"),
        ("waiting", None),
        ("settle", 5000, "act_1", 0),
    ]


def test_a_live_stream_stands_for_the_cache_and_is_found_by_the_process_itself() -> None:
    plan = replace(planned(num_tokens=0), live=True)
    found = world(FINISHED, cache_id=None, dataset_id="ds_1", plan=plan)
    run(found)
    assert found.done[:2] == [("streamed", "ds_1"), ("settle", 5000, "", 0)]
    assert found.started is not None
    assert found.started.live is not None
    assert (found.started.cache, found.started.live["folder"]) == ("", "/staging/stream")
    assert found.started.live["hook_points"] == plan.hook_points


def test_a_split_model_is_one_process_with_all_the_devices() -> None:
    plan = replace(planned(num_tokens=0), live=True, split=True, devices=2)
    found = world(FINISHED, cache_id=None, dataset_id="ds_1", plan=plan)
    run(found)
    assert found.done[:4] == [
        ("split", "ds_1", "/staging/stream"),
        ("streamed", "ds_1"),
        ("settle", 5000, "", 0),
        "reserve",
    ]
    alone = world(FINISHED, cache_id=None, dataset_id="ds_1", plan=replace(plan, split=False, devices=1))
    run(alone)
    assert found.reserved == (alone.reserved[0] + 7, 2)
    assert found.started is not None
    assert (found.started.ranks, found.started.threads, found.started.live) == (["0,1"], 6, None)
    assert found.started.split is not None
    assert (found.started.split["spread"], found.started.split["quantization"]) == ({"0": 0, "1": 1}, "int8")


def test_what_was_published_before_is_not_made_again() -> None:
    found = world(transcoder_ids=("tc_1", "tc_2"))
    assert run(found) == {"transcoder_ids": ["tc_1", "tc_2"]}
    assert found.done == []


def test_it_goes_on_from_its_checkpoint() -> None:
    found = world(FINISHED, checkpoint=CHECKPOINT)
    run(found)
    assert ("settle", TOKENS, "act_1", CHECKPOINT.step) in found.done
    assert ("child", "/store/activation_cache/1", "/store/checkpoint/1") in found.done


def test_a_checkpoint_is_made_transcoders_of_without_any_data() -> None:
    found = world(FINISHED, checkpoint=CHECKPOINT, finalize=True)
    assert run(found) == {"transcoder_ids": ["tc_layer-1"]}
    assert found.done[0] == ("child", "", "/store/checkpoint/1")
    assert "reserve" not in found.done


def test_checkpoints_are_written_by_tokens_and_by_time() -> None:
    by_tokens = world(*(progress(tokens) for tokens in (300, 640, 700, 1000, 1280)), FINISHED)
    run(by_tokens, checkpoint_tokens=600)
    places = [index for index, what in enumerate(by_tokens.done) if what == ("checkpoint", 7)]
    assert [by_tokens.done[place - 1] for place in places] == [("progress", 50), ("progress", 100)]
    by_time = world(progress(64), progress(128), FINISHED)
    run(by_time, checkpoint_seconds=0.0)
    assert by_time.done.count(("checkpoint", 7)) == 2


@pytest.mark.parametrize("reason", [Paused(), Cancelled()])
def test_stopped_it_keeps_its_state_first(reason: Exception) -> None:
    found = world(progress(640), progress(1280))
    found.stop_before = {3: reason}
    with pytest.raises(type(reason)):
        run(found)
    assert found.done[-4:] == [("progress", 50), ("checkpoint", 7), "gone", "release"]


def test_paused_after_its_last_step_it_completes_and_cancelled_it_does_not() -> None:
    paused = world(progress(1280))
    paused.stop_before, paused.answers_save = {3: Paused()}, False
    assert run(paused) == {"transcoder_ids": ["tc_layer-1"]}
    cancelled = world(progress(1280))
    cancelled.stop_before, cancelled.answers_save = {3: Cancelled()}, False
    with pytest.raises(Cancelled):
        run(cancelled)
    assert not any(what[0] == "publish" for what in cancelled.done if isinstance(what, tuple))


def test_without_its_lease_it_writes_nothing() -> None:
    found = world(progress(640))
    found.stop_before = {3: StaleLease()}
    with pytest.raises(StaleLease):
        run(found)
    assert found.done[-3:] == [("progress", 50), "gone", "release"]


def test_memory_that_is_not_there_stops_it_before_a_process_is_started() -> None:
    found = world(FINISHED)
    found.budget = 10
    with pytest.raises(errors.Exhausted):
        run(found)
    assert found.done == [("settle", TOKENS, "act_1", 0), "release"]


def test_it_says_who_has_the_device_alone() -> None:
    found = world(FINISHED)
    found.taken_by = "cpu is not to be shared"
    run(found)
    assert found.done[1:3] == [("waiting", "cpu is not to be shared"), "reserve"]


def test_every_rank_gets_its_device_and_its_share_of_the_threads() -> None:
    found = world(FINISHED, plan=planned(num_tokens=TOKENS, devices=2))
    run(found)
    assert found.started is not None
    assert (found.started.ranks, found.started.threads, found.started.plan["threads"]) == (["0", "1"], 3, 6)
    again = world(FINISHED, plan=replace(planned(num_tokens=TOKENS, devices=2), threads=4))
    run(again)
    assert again.started is not None
    assert (again.started.threads, again.started.plan["threads"]) == (2, 4)  # what it began with


def test_a_process_that_dies_gives_the_memory_back() -> None:
    found = world(progress(640), errors.Failed(reason="TRAINING_FAILED", transient=True))
    with pytest.raises(errors.Failed):
        run(found)
    assert found.done[-2:] == ["gone", "release"]
