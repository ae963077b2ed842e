"""Training as a whole: it learns, its seed decides, it goes on bit for bit, it stops at values that are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from services.training.compute import (
    CoderPlan,
    ConfigError,
    InMemory,
    NonFiniteLoss,
    TrainConfig,
    Trainer,
    Transcoder,
    coders_of,
    compute_fvu,
    fit,
)
from services.training.compute.batches import Pairs, shuffled
from services.training.compute.coder import _BETAS, Coder
from services.training.compute.dead import revive
from services.training.compute.schedule import learning_rate


def planted(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse features read from 32 dimensions and written to 24, on top of a constant; d_in differs from d_out."""
    world = torch.Generator().manual_seed(99)
    read, write = torch.randn(40, 32, generator=world), torch.randn(40, 24, generator=world)
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(rows, 40, generator=generator) * (torch.rand(rows, 40, generator=generator) < 0.05)
    return features @ read + 3, features @ write * 0.01 - 5


def config(**changes: Any) -> TrainConfig:
    base = {"dict_size": 64, "group_sizes": (16, 48), "top_k": 4, "batch_size": 128, "num_tokens": 128 * 60}
    return TrainConfig(**(base | {"learning_rate": 1e-2} | changes))


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
def test_it_learns_a_planted_map(activation: str, skip: bool) -> None:
    transcoder, reports = fit(*planted(4096), config(activation=activation, skip=skip, num_tokens=128 * 400))
    x, y = planted(2048, seed=1)
    assert compute_fvu(y, transcoder(x)) < 0.2
    assert reports[-1].fvu < 0.2 < reports[0].fvu
    active = transcoder.encode(x).gt(0).sum(1).float().mean().item()
    assert active < 4.16
    least = 3.5 if activation == "topk" else 3.84  # of the k largest some are not positive
    assert skip or active > least  # a linear path leaves less to do
    last = reports[-1]
    assert (
        last.fvu == last.fvu_per_prefix[-1] == last.fvu_min <= last.fvu_mean <= last.fvu_max == last.fvu_per_prefix[0]
    )
    assert len(last.fvu_per_prefix) == len(last.l0_per_prefix) == 2
    assert last.l0_per_prefix[0] < last.l0_per_prefix[1] == last.l0


def test_the_first_prefix_is_trained_and_not_only_cut_off() -> None:
    nested, _ = fit(*planted(4096), config(num_tokens=128 * 200))
    plain, _ = fit(*planted(4096), config(num_tokens=128 * 200, prefix_weights=(0.0, 1.0)))
    x, y = planted(2048, seed=1)
    assert compute_fvu(y, nested(x, 1)) < 0.9 * compute_fvu(y, plain(x, 1))


def test_every_step_is_reported_in_order() -> None:
    seen = []
    _, reports = fit(*planted(1024), config(num_tokens=128 * 3 + 1), on_step=seen.append)
    assert seen == reports
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert reports[-1].tokens_seen == 512
    assert all(report.seconds > 0 and report.gradient_norm > 0 for report in reports)
    assert reports[0].to_dict()["fvu_per_prefix"] == list(reports[0].fvu_per_prefix)


def test_the_report_adds_up() -> None:
    _, reports = fit(*planted(1024), config(dead_after_tokens=128, num_tokens=128 * 20))
    for report in reports:
        assert report.loss == pytest.approx(report.l2_loss + report.aux_loss / 32)
    assert any(report.aux_loss > 0 for report in reports if report.dead_fraction > 0)


def test_what_each_coder_costs_is_told() -> None:
    source = InMemory({"a": planted(500), "b": planted(500, seed=5)})
    trainer = Trainer(source, plans("a") | {"large": CoderPlan("b", config(dict_size=2048, group_sizes=(48, 2000)))})
    for _ in range(4):
        small, large = trainer.step()
    assert 0 < small.share < large.share < small.share + large.share <= 1
    assert small.coder_tokens_per_second == large.coder_tokens_per_second
    assert large.share == pytest.approx(large.seconds * large.coder_tokens_per_second / (2 * 128))
    assert large.tokens_per_second == pytest.approx(128 / large.seconds)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_unit_norm_decoder_stays_one_and_learns(activation: str) -> None:
    x, y = planted(4096)
    resolved = config(activation=activation, unit_norm_decoder=True, num_tokens=128 * 400).resolved(24)
    coder = Coder.start("a", resolved, x, y)
    for _, rows in zip(range(400), shuffled(len(x), 128, 0, 0), strict=False):
        report = coder.step(x[rows], y[rows])
    assert torch.allclose(coder.parameters["W_dec"].norm(dim=1), torch.ones(64), atol=1e-5)
    assert report.fvu < 0.35
    lengths = coder.transcoder().W_dec.norm(dim=1)
    assert torch.allclose(lengths, lengths[0].expand(64), rtol=1e-5)


def test_a_unit_norm_decoder_gets_no_gradient_along_itself() -> None:
    x, y = planted(512)
    coder = Coder.start("a", config(unit_norm_decoder=True).resolved(24), x, y)
    before = coder.parameters["W_dec"].clone()
    coder.step(x[:128], y[:128])
    along = (coder.tensors()["optimizer.W_dec.exp_avg"] * before).sum(1)
    assert coder.tensors()["optimizer.W_dec.exp_avg"].norm() > 100 * along.norm()


@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_a_gradient_is_cut_to_its_largest_norm(clip: float) -> None:
    x, y = planted(512)
    coder = Coder.start("a", config(gradient_clip=clip).resolved(24), x, y)
    report = coder.step(x[:128], y[:128])
    taken = torch.stack([coder.tensors()[f"optimizer.{name}.exp_avg"].norm() for name in coder.parameters]).norm()
    used = float(taken) / (1 - _BETAS[0])  # Adam's first mean holds this part of its only gradient
    assert used == pytest.approx(min(clip, report.gradient_norm), rel=1e-4)
    assert 1e-3 < report.gradient_norm < 1e9


def test_scaling_the_data_changes_nothing_but_the_units() -> None:
    x, y = planted(1024)
    plain, _ = fit(x, y, config())
    scaled, _ = fit(x * 8, y / 4, config())  # powers of two: exact
    assert torch.allclose(scaled(x * 8) * 4, plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_scales_are_folded_in_once_and_saved_bit_for_bit(tmp_path: Path, activation: str) -> None:
    x, y = planted(1024)
    trainer = Trainer(InMemory({"a": (x, y)}), plans(activation=activation, skip=True))
    list(trainer.run())
    coder, transcoder = trainer.coders[0], trainer.transcoders()["a"]
    source, target, trained = coder.scale.source, coder.scale.target, coder.parameters
    assert abs(target - 1) > 0.5  # otherwise nothing is folded
    assert torch.equal(transcoder.W_enc, (trained["W_enc"] * source).T)
    assert torch.equal(transcoder.b_enc, trained["b_enc"])
    assert torch.equal(transcoder.W_dec, trained["W_dec"] / target)
    assert torch.equal(transcoder.b_dec, trained["b_dec"] / target)
    assert transcoder.W_skip is not None
    assert torch.equal(transcoder.W_skip, trained["W_skip"] * (source / target))
    transcoder.save(tmp_path / "saved")
    loaded = Transcoder.load(tmp_path / "saved")
    for name, tensor in transcoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(x), transcoder(x))


def test_the_seed_decides() -> None:
    x, y = planted(1024)
    first, again, other = (fit(x, y, config(seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first.W_enc, again.W_enc)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_enc, other.W_enc)


def plans(names: str = "a", **changes: Any) -> dict[str, CoderPlan]:
    return {name: CoderPlan(name, config(**changes)) for name in names}


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_a_restored_training_goes_on_bit_for_bit(activation: str) -> None:
    source = InMemory({"a": planted(500), "b": planted(500, seed=5)})
    wanted = plans("ab", activation=activation, dead_after_tokens=256, num_tokens=128 * 12)
    whole = Trainer(source, wanted)
    for _ in range(7):
        whole.step()
    tensors, facts = whole.state()
    kept = ({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))
    rest = [[report.loss for report in step] for step in whole.run()]

    resumed = Trainer(source, wanted, state=kept)
    assert [[report.loss for report in step] for step in resumed.run()] == rest
    for name, expected in whole.state()[0].items():
        assert torch.equal(resumed.state()[0][name], expected), name
    for name, transcoder in whole.transcoders().items():
        for key, tensor in transcoder.state_dict().items():
            if tensor is not None:
                assert torch.equal(resumed.transcoders()[name].state_dict()[key], tensor), key


def test_the_state_of_another_training_is_refused() -> None:
    source = InMemory({"a": planted(500)})
    trainer = Trainer(source, plans())
    trainer.step()
    tensors, facts = trainer.state()
    with pytest.raises(ValueError, match="another training"):
        Trainer(source, plans(top_k=3), state=(tensors, facts))
    for name in ("parameter.W_dec", "optimizer.W_dec.exp_avg", "idle_rows"):
        with pytest.raises(ValueError, match=r"missing|expected"):
            coders_of(({key: tensor for key, tensor in tensors.items() if name not in key}, facts))
    with pytest.raises(ValueError, match=r"parameter\.b_enc"):
        coders_of((tensors | {"a/parameter.b_enc": torch.zeros(3)}, facts))


def test_coders_of_one_stream_are_trained_as_each_alone() -> None:
    pairs = {"a": planted(500), "b": planted(500, seed=5)}
    wanted = plans("ab") | {"variant": CoderPlan("b", config(top_k=2))}
    together = Trainer(InMemory(pairs), wanted)
    alone = Trainer(InMemory({"b": pairs["b"]}), {"variant": wanted["variant"]})
    for _ in range(5):
        together.step()
        alone.step()
    assert [coder.name for coder in together.coders] == ["a", "b", "variant"]
    assert torch.equal(together.coders[2].parameters["W_enc"], alone.coders[0].parameters["W_enc"])


@pytest.mark.parametrize(
    ("field", "second"),
    [
        ("plans", CoderPlan("elsewhere", config())),
        ("batch_size", CoderPlan("a", config(batch_size=64))),
        ("num_tokens", CoderPlan("a", config(num_tokens=256))),
        ("seed", CoderPlan("a", config(seed=7))),
    ],
)
def test_plans_that_cannot_share_a_stream_are_refused(field: str, second: CoderPlan) -> None:
    with pytest.raises(ConfigError) as caught:
        Trainer(InMemory({"a": planted(500)}), plans() | {"second": second})
    assert caught.value.field == field


class Spoilt(InMemory):
    """Holds no number in the targets of its second batch."""

    def batches(self, batch_size: int, seed: int, start: int) -> Iterator[Pairs]:
        for number, found in enumerate(super().batches(batch_size, seed, start)):
            yield found if number != 1 else {name: (x, y * torch.nan) for name, (x, y) in found.items()}


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    trainer = Trainer(Spoilt({"a": tuple(part[:128] for part in planted(128))}), plans())
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
    with pytest.raises(NonFiniteLoss) as caught:
        trainer.step()
    assert (caught.value.coder, caught.value.step) == ("a", 1)
    assert caught.value.facts["finite_y"] is False
    assert caught.value.facts["finite_x"] is True
    for name, tensor in trainer.state()[0].items():
        assert torch.equal(tensor, before[name]), name
    assert trainer.step_count == 1


def test_a_nan_in_the_input_is_not_taken_for_silence() -> None:
    x, y = planted(512)
    x[:, 0] = float("nan")
    with pytest.raises(NonFiniteLoss):
        fit(x, y, config())


def test_dead_latents_come_back_through_their_encoder() -> None:
    x, y = planted(2048)
    resolved = config(dead_after_tokens=128, num_tokens=128 * 200).resolved(24)
    coder = Coder.start("a", resolved, x, y)
    coder.parameters["b_enc"][:32] = -1e3  # half of the latents can never be active
    encoder_before = coder.parameters["W_enc"][:32].clone()
    for step, rows in zip(range(60), shuffled(len(x), 128, 0, 0), strict=False):
        report = coder.step(x[rows], y[rows])
        if step == 1:
            assert report.dead_fraction >= 0.5
            assert torch.equal(coder.parameters["W_enc"][:32], encoder_before)  # far below zero: no gradient yet
            coder.parameters["b_enc"][:32] = -3.0
    assert not torch.equal(coder.parameters["W_enc"][:32], encoder_before)


def test_every_row_is_seen_once_a_pass_in_another_order_each_time() -> None:
    stream = torch.cat(list(islice(shuffled(100, 32, 1, 0), 7)))[:200]
    first, second = stream[:100], stream[100:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert first.tolist() != second.tolist()
    assert torch.equal(next(shuffled(100, 32, 1, 64)), stream[64:96])
    assert torch.equal(next(shuffled(100, 32, 1, 96)), stream[96:128])
    assert not torch.equal(next(shuffled(100, 32, 2, 0)), stream[:32])


def test_learning_rate_rises_holds_and_falls() -> None:
    linear = config(num_tokens=128 * 100, warmup_fraction=0.1).resolved(24)
    rates = [learning_rate(linear, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[10] == rates[79] == 1e-2
    assert rates[90] == pytest.approx(5e-3)
    assert 0 < rates[99] < 1e-3
    constant = config(lr_schedule="constant").resolved(24)
    assert learning_rate(constant, 59) == 1e-2
    cosine = config(lr_schedule="cosine", warmup_fraction=0.0).resolved(24)
    assert learning_rate(cosine, 30) == pytest.approx(5e-3)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_bfloat16_products_train_float32_weights_and_thresholds(activation: str) -> None:
    wanted = config(dtype="bfloat16", activation=activation, num_tokens=128 * 200)
    transcoder, reports = fit(*planted(4096), wanted)
    for tensor in (transcoder.W_enc, transcoder.W_dec, transcoder.threshold):
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())
    assert reports[-1].fvu < 0.3 < reports[0].fvu


def test_what_a_bfloat16_training_keeps_is_float32() -> None:
    x, y = planted(512)
    coder = Coder.start("a", config(dtype="bfloat16", activation="jumprelu").resolved(24), x, y)
    coder.step(x[:128], y[:128])
    assert {tensor.dtype for name, tensor in coder.tensors().items() if name != "idle_rows"} == {torch.float32}


def test_thresholds_learn_at_a_tenth_of_the_rate() -> None:
    """Adam's first step moves everything that has a gradient by the whole rate; steering multiplies all thresholds."""
    x, y = planted(512)
    coder = Coder.start("a", config(activation="jumprelu", warmup_fraction=0.0).resolved(24), x, y)
    bias, threshold = coder.parameters["b_enc"].clone(), coder.parameters["threshold"].clone()
    coder.step(x[:128], y[:128])
    assert float((coder.parameters["b_enc"] - bias).abs().max()) == pytest.approx(1e-2, rel=1e-3)
    least, most = coder.parameters["threshold"].aminmax()
    assert threshold[0] * (most - least) / (most + least) == pytest.approx(1e-3, rel=1e-3)


def test_dead_latents_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = planted(512)
    coder = Coder.start("a", config(aux_k=4).resolved(24), x, y)
    coder.parameters["b_enc"][50:62] = -100
    coder._idle_rows[50:62] = 10**6
    revived = []

    def spy(parameters: Any, dead: torch.Tensor, *given: Any, **more: Any) -> Any:
        revived.append(dead.tolist())
        return revive(parameters, dead, *given, **more)

    monkeypatch.setattr("services.training.compute.coder.revive", spy)
    for _ in range(4):
        coder.step(x[:128], y[:128])
    assert revived == [[50, 51, 52, 53], [54, 55, 56, 57], [58, 59, 60, 61], [50, 51, 52, 53]]
