"""The training job with fakes of its ports: it learns, resumes bit for bit, and leaves base and ledger as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.extensions.adapters.team import TeamProcesses
from services.extensions.domain import Documents, Lora, NewExtension, NewTraining, Training
from services.extensions.operations import Operations
from services.extensions.training import TrainingJob, settings_of
from services.kit import errors
from services.residency.lenses.extension_files import attachable, read_manifest
from tests.models import batch, tiny
from tests.unit.extensions.fakes import (
    KEY,
    MODEL,
    FakeBases,
    FakeCatalogue,
    FakeDatasets,
    FakeRun,
    FakeStore,
    Stopped,
    documents,
)

WANTED = NewTraining("x_1", "ds_1", "ds_2", steps=12, batch_size=4, learning_rate=5e-3, max_length=16, seed=1)


class Bench:
    """A created extension and a job that trains it."""

    def __init__(self, root: Path) -> None:
        self.store, self.catalogue, self.bases = FakeStore(root), FakeCatalogue(), FakeBases()
        self.datasets = FakeDatasets({"ds_1": documents(), "ds_2": documents(5), "ds_single": documents(1)})
        self.job = self.with_checkpoints_every(1e9)

    def with_checkpoints_every(self, seconds: float) -> TrainingJob:
        return TrainingJob(
            self.store,
            self.catalogue,
            self.bases,
            self.datasets,
            self.catalogue,
            teams=TeamProcesses(),
            checkpoint_seconds=seconds,
        )

    async def claimed(self, wanted: NewTraining = WANTED, **options: object) -> FakeRun:
        operations = Operations(self.store, self.catalogue, self.bases, self.datasets)
        new = NewExtension(model_id=MODEL, task_name="task-one", kind="lora", lora=Lora(r=4))
        made = await operations.create(new, key=KEY, validate_only=False)
        state = Training(wanted=wanted, extension=replace(made, job_id="job_1"), artifact_uri=made.artifact_uri)
        return FakeRun(self.store, state, **options)

    def weights(self, run: FakeRun) -> dict[str, torch.Tensor]:
        return attachable(self.store.path(run.state.artifact_uri), tiny("gpt2", 2)).state()

    def assert_nothing_left(self) -> None:
        assert list(self.bases.base.attached) == []
        assert self.bases.leases == 0
        assert self.catalogue.reserved == {}
        with torch.no_grad():
            assert torch.equal(self.bases.base.model(batch()).logits, tiny("gpt2", 2)(batch()).logits)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_training_learns_publishes_and_leaves_nothing_behind(bench: Bench) -> None:
    expected = tiny("gpt2", 2)(batch()).logits.detach()

    def base_is_bare(figures: dict) -> None:
        with torch.no_grad():
            assert torch.equal(bench.bases.base.model(batch()).logits, expected)

    run = await bench.claimed(on_progress=base_is_bare)
    result = await bench.job.run(run)
    assert result["steps"] == 12
    assert result["loss_after"] < result["loss_before"] - 0.2
    assert [told["step"] for told in run.told] == list(range(1, 13))
    assert run.told[-1]["percent"] == 100
    assert run.told[-1]["loss"] < run.told[0]["loss"]
    assert bench.catalogue.most_reserved > 0
    manifest = read_manifest(bench.store.path(run.state.artifact_uri))
    assert manifest.training == {
        name: result[name] for name in ("steps", "tokens", "loss_before", "loss_after", "best_step")
    }
    assert manifest.base_digest == "digest-of-tiny"
    bench.assert_nothing_left()


async def test_a_stopped_training_goes_on_bit_for_bit(bench: Bench) -> None:
    whole = await bench.claimed()
    expected = await bench.job.run(whole)

    run = await bench.claimed(stop_after=5)
    with pytest.raises(Stopped):
        await bench.job.run(run)
    assert run.saves == 1
    bench.assert_nothing_left()
    run.stop_after = None
    result = await bench.job.run(run)
    assert (result["loss_before"], result["loss_after"]) == (expected["loss_before"], expected["loss_after"])
    assert [told["step"] for told in run.told] == list(range(1, 13))
    ours, theirs = bench.weights(run), bench.weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


async def test_states_are_saved_while_it_runs(bench: Bench) -> None:
    run = await bench.claimed()
    await bench.with_checkpoints_every(0).run(run)
    assert run.saves == 12


async def test_a_training_that_had_finished_is_not_done_twice(bench: Bench) -> None:
    run = await bench.claimed()
    result = await bench.job.run(run)
    artifact, steps = run.state.artifact_uri, run.steps
    assert await bench.job.run(run) == result
    assert (run.state.artifact_uri, run.steps) == (artifact, steps)


async def test_a_job_whose_extension_went_on_without_it_stops(bench: Bench) -> None:
    run = await bench.claimed()
    run.job_id = "job_0"
    with pytest.raises(errors.Conflict, match="another training"):
        await bench.job.run(run)


async def test_the_last_tenth_is_held_out_when_no_dataset_is_named(bench: Bench) -> None:
    train, judged = documents(25).held_out()
    assert (len(train), len(judged)) == (23, 2)
    assert Documents(pairs=(((1,), (2,)), ((3,), (4,)))).held_out() == (
        Documents(pairs=(((1,), (2,)),)),
        Documents(pairs=(((3,), (4,)),)),
    )
    result = await bench.job.run(await bench.claimed(NewTraining("x_1", "ds_1", steps=2, max_length=16)))
    assert result["loss_before"] > 0


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (NewTraining("x_1", "ds_single", steps=1), "held_out_dataset_id"),
        (NewTraining("x_1", "ds_1", steps=1, max_length=999), "max_length"),
    ],
)
async def test_requests_that_cannot_be_trained_name_the_field(bench: Bench, wanted: NewTraining, field: str) -> None:
    with pytest.raises(errors.Invalid) as invalid:
        await bench.job.run(await bench.claimed(wanted))
    assert invalid.value.violations[0][0] == field
    bench.assert_nothing_left()


async def test_a_diverged_training_fails_with_its_reason(bench: Bench) -> None:
    run = await bench.claimed()
    async with bench.bases.lease(MODEL) as base:
        norm = base.model.transformer.ln_f.weight
    original = norm.detach().clone()

    def spoil(figures: dict) -> None:
        with torch.no_grad():
            norm.fill_(float("nan"))

    run.on_progress = spoil
    with pytest.raises(errors.Failed) as failed:
        await bench.job.run(run)
    assert failed.value.reason == "NON_FINITE_LOSS"
    assert run.state.result is None
    with torch.no_grad():
        norm.copy_(original)
    bench.assert_nothing_left()


def test_epochs_become_steps() -> None:
    assert settings_of(NewTraining("x", "d", epochs=1.5, batch_size=4), 10, "fp32").steps == 4
    assert settings_of(NewTraining("x", "d", steps=7), 10, "fp32").batch_size == 8
    assert settings_of(NewTraining("x", "d", steps=100), 10, "fp32").warmup_steps == 5
