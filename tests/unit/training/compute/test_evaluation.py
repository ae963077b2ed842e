from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.residency.families import family_of
from services.residency.hooks import capture_hooks
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.splice import logits, next_token_loss
from services.training.compute.evaluation import Evaluation, Judgement, _density
from services.training.compute.metrics import compute_fvu
from tests import models

SOURCE, TARGET = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
GROUPS = (8, 24)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return models.tiny("gpt2").eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        ids = torch.randint(5, 60, (2, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        counted = mask.clone()
        counted[:, 0] = 0
        found.append((ids, mask, counted))
    return found


def coder(width: int, *, top_k: int = 4, b_dec: Tensor | None = None, scale: float = 1.0) -> Transcoder:
    generator = torch.Generator().manual_seed(2)
    latents = sum(GROUPS)
    weights = {
        "W_enc": torch.randn(width, latents, generator=generator) * scale,
        "b_enc": torch.zeros(latents),
        "W_dec": torch.randn(latents, width, generator=generator) * scale,
        "b_dec": torch.zeros(width) if b_dec is None else b_dec,
        "threshold": torch.zeros(latents),
    }
    info = {"source_hook_point": SOURCE, "target_hook_point": TARGET}
    return Transcoder(TranscoderShape("topk", top_k, GROUPS), weights, info)


def judge(model: torch.nn.Module, transcoder: Transcoder, batches: list, groups: int | None = None) -> Judgement:
    evaluation = Evaluation(model, family_of(model), transcoder, groups)
    for ids, mask, counted in batches:
        evaluation.read(ids, mask, counted)
    for ids, mask, _ in batches:
        evaluation.score(ids, mask)
    return evaluation.result()


def pairs(model: torch.nn.Module, batches: list) -> tuple[Tensor, Tensor]:
    xs, ys = [], []
    for ids, mask, counted in batches:
        with capture_hooks(model, family_of(model), (SOURCE, TARGET)) as capture:
            found = capture.run(ids, mask)
        keep = counted.bool()
        xs.append(found[SOURCE][keep])
        ys.append(found[TARGET][keep])
    return torch.cat(xs), torch.cat(ys)


def test_fvu_and_l0_are_those_of_all_counted_tokens_together(model: torch.nn.Module, batches: list) -> None:
    x, y = pairs(model, batches)
    transcoder = coder(x.shape[1], scale=0.1)
    found = judge(model, transcoder, batches)
    expected = [compute_fvu(y, transcoder(x, groups)) for groups in (1, 2)]
    assert found.fvu_per_prefix == pytest.approx(expected, rel=1e-6)
    assert found.fvu == found.fvu_per_prefix[-1]
    active = transcoder.encode(x) > 0
    assert found.l0 == pytest.approx(float(active.sum(1).double().mean()))
    assert found.l0_per_prefix[0] == pytest.approx(float(active[:, : GROUPS[0]].sum(1).double().mean()))
    assert found.dead_fraction == pytest.approx(float((~active.any(0)).double().mean()))
    assert sum(found.density_histogram) == int(active.any(0).sum())
    assert (found.tokens, found.batches) == (len(x), 3)


def test_the_mean_as_reconstruction_is_mean_ablation(model: torch.nn.Module, batches: list) -> None:
    x, y = pairs(model, batches)
    constant = coder(x.shape[1], b_dec=y.double().mean(0).float(), scale=0.0)
    found = judge(model, constant, batches)
    assert found.fvu == pytest.approx(1.0, abs=1e-6)
    assert found.ce_spliced == pytest.approx(found.ce_mean_ablated, abs=1e-5)
    assert (found.l0, found.dead_fraction) == (0.0, 1.0)


def test_zero_as_reconstruction_recovers_nothing(model: torch.nn.Module, batches: list) -> None:
    x, _ = pairs(model, batches)
    found = judge(model, coder(x.shape[1], scale=0.0), batches)
    assert found.ce_spliced == pytest.approx(found.ce_zero_ablated, abs=1e-6)
    assert found.ce_recovered == pytest.approx(0.0, abs=1e-3)
    assert found.kl > 0


def test_the_clean_loss_is_the_models_own(model: torch.nn.Module, batches: list) -> None:
    found = judge(model, coder(pairs(model, batches)[0].shape[1]), batches)
    losses = torch.cat([next_token_loss(logits(model, ids, mask), ids, mask) for ids, mask, _ in batches])
    assert found.ce_clean == pytest.approx(float(losses.double().mean()), rel=1e-6)


def test_divergence_and_losses_are_those_of_the_spliced_models_own_predictions(
    model: torch.nn.Module, batches: list
) -> None:
    transcoder = coder(models.WIDTH, scale=0.1)
    found = judge(model, transcoder, batches)
    mlp = model.transformer.h[1].mlp
    divergence, losses, count = 0.0, 0.0, 0
    for ids, mask, _ in batches:
        for row, length in zip(ids, mask.sum(1).tolist(), strict=True):
            clean = logits(model, row[None, :length])[0].log_softmax(-1)
            hook = mlp.register_forward_hook(lambda module, args, output: transcoder(args[0][0])[None])
            spliced = logits(model, row[None, :length])[0].log_softmax(-1)
            hook.remove()
            divergence += float((clean.exp() * (clean - spliced)).sum(-1)[:-1].double().sum())
            losses -= float(spliced[:-1].gather(1, row[1:length, None]).double().sum())
            count += length - 1
    assert found.kl == pytest.approx(divergence / count, rel=1e-3)
    assert found.ce_spliced == pytest.approx(losses / count, rel=1e-4)
    expected = (found.ce_zero_ablated - found.ce_spliced) / (found.ce_zero_ablated - found.ce_clean)
    assert found.ce_recovered == pytest.approx(expected)


def test_latents_are_counted_by_the_decade_of_their_frequency() -> None:
    frequencies = torch.tensor([0.0, 1.0, 0.5, 0.1, 0.09, 0.011, 2e-8, 1e-12], dtype=torch.float64)
    assert _density(frequencies) == [2, 0, 0, 0, 0, 0, 2, 2, 1]


def test_a_prefix_is_judged_alone(model: torch.nn.Module, batches: list) -> None:
    x, _ = pairs(model, batches)
    transcoder = coder(x.shape[1], scale=0.1)
    whole, first = judge(model, transcoder, batches), judge(model, transcoder, batches, groups=1)
    assert first.fvu_per_prefix == [whole.fvu_per_prefix[0]]
    assert first.l0 == pytest.approx(whole.l0_per_prefix[0])
    assert first.ce_spliced != whole.ce_spliced
    with pytest.raises(ValueError, match="prefix"):
        Evaluation(model, family_of(model), transcoder, 3)


def test_text_without_a_token_is_refused(model: torch.nn.Module, batches: list) -> None:
    evaluation = Evaluation(model, family_of(model), coder(pairs(model, batches)[0].shape[1]))
    with pytest.raises(ValueError, match="no token"):
        evaluation.result()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_normalised_activations_are_read_with_the_gain_where_training_read_them_so(
    family: str, batches: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    rms = models.tiny(family).eval()
    width = rms.config.hidden_size
    as_mlp_in, scaled, bare = (coder(width) for _ in range(3))
    scaled.info |= {"source_hook_point": "blocks.1.ln2.hook_normalized", "apply_rmsnorm_scaling": True}
    bare.info |= {"source_hook_point": "blocks.1.ln2.hook_normalized", "apply_rmsnorm_scaling": False}
    expected, found, other = (judge(rms, one, batches) for one in (as_mlp_in, scaled, bare))
    assert found == expected
    assert other.fvu != pytest.approx(expected.fvu, rel=1e-3)
    assert other.ce_spliced != pytest.approx(expected.ce_spliced, rel=1e-6)
