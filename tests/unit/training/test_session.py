"""The training process's inside: what it says, writes and goes on from, without the process around it."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.residency.lenses.transcoder import Transcoder
from services.residency.lines import Gone
from services.residency.shards import CorruptCache
from services.training import dialogue, session, state_files
from services.training.compute import InMemory, TrainConfig
from services.training.dialogue import Finished, Message, Progress, Save, Saved, Start, Write, Written
from services.training.domain import CoderSpec, Plan

STEPS, BATCH = 12, 32


def plan(**changes: Any) -> Plan:
    config = TrainConfig(dict_size=32, top_k=3, batch_size=BATCH, num_tokens=STEPS * BATCH, **changes)
    coders = [
        CoderSpec(
            name=f"layer-{layer}",
            layer=layer,
            source=f"in.{layer}",
            target=f"out.{layer}",
            source_hook_point=f"in.{layer}",
            source_site="mlp_in",
            target_site="mlp_out",
            apply_rmsnorm_scaling=False,
            config=config.resolved(4).to_dict(),
        )
        for layer in (1, 2)
    ]
    return Plan(tuple(coders), STEPS * BATCH, "digest")


class Rows(InMemory):
    """Stands for a cache: the same rows whatever the folder."""

    broken_at: int | None = None

    def __init__(self, folder: Path, pairs: dict[str, tuple[str, str]]) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            {
                name: (torch.randn(200, 6, generator=generator), torch.randn(200, 4, generator=generator))
                for name in pairs
            }
        )

    def facts_of(self, pair: str, rows: int, seed: int, start: int) -> dict[str, Any]:
        return {"read": [pair, rows, start]}

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Any]:
        for number, batch in enumerate(super().batches(batch_size, seed, start), start // batch_size):
            if self.broken_at is not None and number >= self.broken_at:
                yield {name: (x, y * float("nan")) for name, (x, y) in batch.items()}
            else:
                yield batch


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> type[Rows]:
    class Own(Rows):
        pass

    monkeypatch.setattr(session, "CacheRows", Own)
    monkeypatch.setattr(session, "QUIET_SECONDS", 0.0)
    return Own


def talk(start: Start, *first: Any, last: Any = None) -> list[Message]:
    """All that the process says to commands that wait for it, and to one that it gets when it has finished."""
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for command in first:
        commands.put(command)
    said: list[Message] = []

    def hear(message: Message) -> None:
        said.append(dialogue.WORDS.from_line(dialogue.WORDS.to_line(message)))
        if isinstance(message, Finished):
            commands.put(last)

    session.run(start, commands, hear)
    return said


def ending(folder: Path) -> Write:
    names = ("layer-1", "layer-2")
    return Write({name: str(folder / name) for name in names}, {name: {"layer": name} for name in names})


def test_it_tells_its_progress_writes_checkpoints_and_transcoders(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    start = Start(plan().as_json(), "cpu", cache="cache")
    said = talk(start, Save(str(tmp_path / "state")), last=ending(tmp_path))
    progress = [one for one in said if isinstance(one, Progress)]
    assert [one.step for one in progress] == list(range(1, STEPS + 1))
    assert progress[-1].tokens_seen == STEPS * BATCH
    assert progress[-1].eta_seconds == 0
    assert [coder["coder"] for coder in progress[0].coders] == ["layer-1", "layer-2"]
    saved = next(one for one in said if isinstance(one, Saved))
    assert (saved.step, saved.tokens_seen) == (1, BATCH)
    assert saved.fvu == pytest.approx(sum(coder["fvu"] for coder in progress[0].coders) / 2)
    finished, written = said[-2:]
    assert isinstance(finished, Finished)
    assert finished.train_fvu["layer-1"] == pytest.approx(sum(one.coders[0]["fvu"] for one in progress) / STEPS)
    assert isinstance(written, Written)
    assert written.widths == {"layer-1": [6, 4], "layer-2": [6, 4]}
    assert Transcoder.load(tmp_path / "layer-2").info == {"layer": "layer-2"}


def test_from_a_checkpoint_it_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, rest, state = tmp_path / "whole", tmp_path / "rest", tmp_path / "state"
    state.mkdir()
    first = talk(Start(plan().as_json(), "cpu", cache="cache"), Save(str(state)), last=ending(whole))
    second = talk(Start(plan().as_json(), "cpu", cache="cache", state=str(state)), last=ending(rest))
    assert next(one.step for one in second if isinstance(one, Progress)) == 2
    assert first[-2] == second[-2]
    for name in ("layer-1", "layer-2"):
        for file in ("sae_weights.safetensors", "transcoder.json", "cfg.json"):
            assert (whole / name / file).read_bytes() == (rest / name / file).read_bytes()


def test_a_checkpoint_alone_is_made_transcoders_of(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    talk(Start(plan().as_json(), "cpu", cache="cache"), Save(str(state)), last=ending(tmp_path / "whole"))
    finished, written = talk(Start(plan().as_json(), "cpu", state=str(state)), last=ending(tmp_path / "early"))
    assert isinstance(finished, Finished)
    assert (finished.step, finished.tokens_seen) == (1, BATCH)
    assert isinstance(written, Written)
    early, whole = (Transcoder.load(tmp_path / kind / "layer-1") for kind in ("early", "whole"))
    assert not torch.equal(early.W_enc, whole.W_enc)


def test_a_checkpoint_that_is_asked_for_after_the_last_step_is_not_written(tmp_path: Path) -> None:
    commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
    said: list[Message] = []

    def hear(message: Message) -> None:
        said.append(message)
        if isinstance(message, Finished):
            commands.put(Save(str(tmp_path)))
            commands.put(ending(tmp_path))

    session.run(Start(plan().as_json(), "cpu", cache="cache"), commands, hear)
    assert not any(isinstance(one, Saved) for one in said)
    assert isinstance(said[-1], Written)


@pytest.mark.parametrize("step", [0, 8])  # in the sample that the start is taken from, and after it
def test_a_loss_that_is_not_finite_is_told_with_the_batchs_facts(rows: type[Rows], step: int) -> None:
    rows.broken_at = step
    gone = talk(Start(plan().as_json(), "cpu", cache="cache"))[-1]
    assert isinstance(gone, Gone)
    assert gone.reason == "NON_FINITE_LOSS"
    assert (gone.facts["step"], gone.facts["coder"], gone.facts["finite_y"]) == (step, "layer-1", False)
    assert gone.facts["read"] == (["in.1 out.1", BATCH, step * BATCH] if step else ["in.1 out.1", 200, 0])
    assert gone.facts.get("l2_loss", "nan") == "nan"  # which a database can store


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CorruptCache("shard-00000.safetensors", "truncated"), "CHECKSUM_MISMATCH"),
        (torch.OutOfMemoryError("CUDA out of memory"), "DEVICE_OOM"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "DEVICE_OOM"),
        (ValueError("another training"), "TRAINING_FAILED"),
    ],
)
def test_what_is_foreseen_to_go_wrong_is_told(
    rows: type[Rows], monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(rows, "batches", fail)
    gone = talk(Start(plan().as_json(), "cpu", cache="cache"))[-1]
    assert isinstance(gone, Gone)
    assert gone.reason == reason


def test_what_nobody_foresaw_ends_the_process(rows: type[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(rows, "batches", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        talk(Start(plan().as_json(), "cpu", cache="cache"))


def test_a_damaged_checkpoint_is_told_by_the_files_name(tmp_path: Path) -> None:
    talk(Start(plan().as_json(), "cpu", cache="cache"), Save(str(tmp_path)), last=ending(tmp_path / "x"))
    tensors = tmp_path / state_files.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-4])
    gone = talk(Start(plan().as_json(), "cpu", cache="cache", state=str(tmp_path)))[-1]
    assert gone == Gone("TRAINING_FAILED", "state.safetensors: cannot be read")
    facts = json.loads((tmp_path / state_files.FACTS).read_text())
    (tmp_path / state_files.FACTS).write_text(json.dumps(facts | {"format": 9}))
    gone = talk(Start(plan().as_json(), "cpu", cache="cache", state=str(tmp_path)))[-1]
    assert gone == Gone("TRAINING_FAILED", "state.json: format 9, expected 1")


def test_a_line_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="not a line of ours"):
        dialogue.WORDS.from_line(b'["Nonsense", {}]\n')
