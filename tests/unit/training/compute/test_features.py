from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.training import feature_files
from services.training.compute.features import AFTER, BEFORE, FeatureSampler, logit_effects, nearest_rows

D, LATENTS, K, MOST = 8, 24, 3, 4


def coder() -> Transcoder:
    draw = torch.Generator().manual_seed(4)
    weights = {
        "W_enc": torch.randn(D, LATENTS, generator=draw),
        "b_enc": torch.zeros(LATENTS),
        "W_dec": torch.randn(LATENTS, D, generator=draw),
        "b_dec": torch.zeros(D),
        "threshold": torch.zeros(LATENTS),
    }
    return Transcoder(TranscoderShape("topk", K, (8, 16)), weights)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(ids, mask, counted, x [B, S, D]) with padding, an uncounted first token, and sequences longer than a context."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 90, (4, 50), generator=draw)
        mask = torch.ones_like(ids)
        mask[2, 30:] = 0
        counted = mask.clone()
        counted[:, 0] = 0
        found.append((ids, mask, counted, torch.randn(4, 50, D, generator=draw)))
    return found


def sampled(transcoder: Transcoder, data: list) -> FeatureSampler:
    sampler = FeatureSampler(LATENTS, MOST)
    for ids, mask, counted, x in data:
        sampler.add(transcoder.encode_sparse(x.flatten(0, 1)[counted.flatten().bool()]), ids, mask, counted)
    return sampler


def by_hand(transcoder: Transcoder, data: list) -> dict[int, list[tuple[float, list[int], list[float]]]]:
    """The same from dense activations, sequence by sequence."""
    found: dict[int, list] = {latent: [] for latent in range(LATENTS)}
    for ids, mask, counted, x in data:
        for row in range(len(ids)):
            acts = transcoder.encode(x[row]) * counted[row][:, None]
            for latent in range(LATENTS):
                value, peak = acts[:, latent].max(0)
                if value <= 0:
                    continue
                places = range(int(peak) - BEFORE, int(peak) + AFTER + 1)
                there = [0 <= place < 50 and bool(mask[row, place]) for place in places]
                tokens = [int(ids[row, place]) if ok else -1 for place, ok in zip(places, there, strict=True)]
                values = [float(acts[place, latent]) if ok else 0.0 for place, ok in zip(places, there, strict=True)]
                found[latent].append((float(value), tokens, values))
    return {latent: sorted(kept, reverse=True)[:MOST] for latent, kept in found.items()}


def test_the_strongest_sequences_of_every_latent_are_kept_with_their_contexts() -> None:
    transcoder, data = coder(), batches()
    sampler = sampled(transcoder, data)
    expected = by_hand(transcoder, data)
    contexts = sampler.contexts
    assert torch.equal(contexts.latent, contexts.latent.sort().values)
    for latent, kept in expected.items():
        own = contexts.take((contexts.latent == latent).nonzero()[:, 0])
        assert own.value.tolist() == pytest.approx([value for value, _, _ in kept])
        assert own.tokens.tolist() == [tokens for _, tokens, _ in kept]
        torch.testing.assert_close(own.values, torch.tensor([values for _, _, values in kept]))
        assert torch.equal(own.values[:, BEFORE], own.value)


def test_memory_is_bounded_and_density_is_counted_over_all_rows() -> None:
    transcoder, data = coder(), batches(12)
    sampler = sampled(transcoder, data)
    assert len(sampler.contexts.latent) <= LATENTS * MOST
    x = torch.cat([x.flatten(0, 1)[counted.flatten().bool()] for _, _, counted, x in data])
    assert sampler.rows == len(x)
    assert torch.equal(sampler.counts, (transcoder.encode(x) > 0).sum(0))


def test_a_batch_in_which_nothing_is_active_changes_nothing() -> None:
    transcoder, data = coder(), batches(2)
    sampler = sampled(transcoder, data)
    before = sampler.contexts
    ids, mask, counted, _ = data[0]
    quiet = transcoder.encode_sparse(torch.zeros(int(counted.sum()), D))
    sampler.add(quiet, ids, mask, counted)
    assert sampler.contexts is before


def test_logit_effects_and_neighbours_are_those_of_the_dense_products() -> None:
    transcoder = coder()
    unembedding, gain = torch.randn(200, D), torch.rand(D) + 0.5
    ids, values = logit_effects(transcoder, unembedding, gain)
    logits = (transcoder.W_dec * gain) @ unembedding.T
    assert torch.equal(ids[:, :10], logits.topk(10).indices)
    assert torch.equal(ids[:, 10:], logits.topk(10, largest=False).indices)
    torch.testing.assert_close(values, logits.gather(1, ids))
    nearest, cosines = nearest_rows(transcoder)
    similar = torch.nn.functional.cosine_similarity(transcoder.W_dec[:, None], transcoder.W_dec[None], dim=-1)
    similar.fill_diagonal_(-2)
    assert torch.equal(nearest, similar.topk(5).indices)
    torch.testing.assert_close(cosines, similar.topk(5).values)


def test_dashboards_have_the_fields_that_their_readers_know(tmp_path: Path) -> None:
    """Names and types as in SAEDashboard's `NeuronpediaDashboardBatch`."""
    transcoder, data = coder(), batches()
    sampler = sampled(transcoder, data)
    ids, logits = logit_effects(transcoder, torch.randn(90, D), None)
    nearest, cosines = nearest_rows(transcoder)
    contexts = sampler.contexts
    tensors = {"latent": contexts.latent, "tokens": contexts.tokens, "values": contexts.values}
    tensors |= {"counts": sampler.counts, "logit_ids": ids, "logits": logits, "nearest": nearest, "cosines": cosines}
    strings = {str(token): f"t{token}" for token in range(90)}
    facts = {"rows": sampler.rows, "strings": strings, "sequences": 24, "length": 50, "model_id": "m", "layer": 1}
    feature_files.write(tmp_path, tensors, facts | {"transcoder_id": "tc", "dataset_id": "ds"})
    samples = feature_files.Samples(tmp_path)
    one = samples.of(3)
    assert one.density == pytest.approx(int(sampler.counts[3]) / sampler.rows)
    assert [context.values[context.peak] for context in one.contexts] == pytest.approx(
        contexts.value[contexts.latent == 3].tolist()
    )
    assert all(text == f"t{token}" for c in one.contexts for text, token in zip(c.tokens, c.token_ids, strict=True))
    assert one.nearest[0] == (int(nearest[3, 0]), pytest.approx(float(cosines[3, 0])))
    assert [sample for sample in samples.all() if sample.feature == 3] == [one]
    feature_files.write_dashboards(samples, tmp_path)
    batch = json.loads((tmp_path / "batch-0.json").read_text())
    assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    feature = next(one for one in batch["features"] if one["feature_index"] == 3)
    assert feature["pos_str"] == [text for _, text, _ in one.top_logits]
    assert feature["frac_nonzero"] == one.density
    for shown, context in zip(feature["activations"], one.contexts, strict=True):
        assert shown.keys() == {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
        assert shown["tokens"] == list(context.tokens)
        assert shown["values"][shown["qualifying_token_index"]] == max(shown["values"])
