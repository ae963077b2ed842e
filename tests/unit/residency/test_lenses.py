"""The reading lenses' arithmetic: the logit lens ends at the model's own prediction, FVU follows its definition."""

from __future__ import annotations

import pytest
import torch

from services.residency.families import facts, family_of
from services.residency.lenses import Base, LensCorrupt, LensIncompatible, PrefixUnknown, Spec, load
from services.residency.lenses.extension import Extensions
from services.residency.lenses.features import FeatureLens, places
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.reading import activations, on_device
from services.residency.splice import logits
from tests import models

IDS = models.batch(1, 20)[0].tolist()


def base_of(family: str) -> Base:
    model = models.tiny(family)
    known = None if model.config.is_encoder_decoder else family_of(model)
    return Base(model, known, facts(model.config.to_dict()), "d" * 64, Extensions())


def coder(**info) -> Transcoder:
    make = torch.Generator().manual_seed(0)
    d, width = models.WIDTH, 96
    weights = {
        "W_enc": torch.randn(d, width, generator=make),
        "b_enc": torch.randn(width, generator=make),
        "W_dec": torch.randn(width, d, generator=make) / d,
        "b_dec": torch.randn(d, generator=make),
        "threshold": torch.zeros(width),
    }
    return Transcoder(TranscoderShape("topk", 8, (32, 64)), weights, info)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_logit_lens_reads_the_models_own_prediction_after_the_last_layer(family):
    base = base_of(family)
    lens = load(Spec("l", "logit_lens"), base)
    inputs = on_device(IDS, base)
    found = lens.read(activations(base, [lens], inputs), inputs, 4, 0)
    own = logits(base.model, inputs)[0].softmax(-1)
    for position, token in enumerate(found.tokens):
        layer, predictions = token.layers[-1]
        assert layer == base.facts.num_layers - 1
        expected, ids = own[position].topk(4)
        assert [p.token_id for p in predictions] == ids.tolist()
        torch.testing.assert_close(torch.tensor([p.probability for p in predictions]), expected)
    assert [layer for layer, _ in found.tokens[0].layers] == list(range(base.facts.num_layers))


def test_fvu_is_error_over_distance_to_the_texts_mean():
    base = base_of("gemma2")
    lens = FeatureLens(coder(), "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    inputs = on_device(IDS, base)
    seen = activations(base, [lens], inputs)
    found = lens.read(seen, inputs, 3, 0)
    x, y = (seen[point][0].double() for point in lens.hook_points)
    dense = coder().encode(x.float())
    error = (y - coder().decode(dense).double()).square()
    spread = (y - y.mean(0)).square()
    assert found.fvu == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-5)
    assert [t.fvu for t in found.tokens] == pytest.approx((error.sum(1) / spread.sum(1)).tolist(), rel=1e-5)
    values, latents = dense.topk(3)
    assert [[n for n, _ in t.features] for t in found.tokens] == latents.tolist()
    assert [[v for _, v in t.features] for t in found.tokens] == [pytest.approx(row) for row in values.tolist()]
    first = lens.read(seen, inputs, 8, 1)
    assert max(latent for token in first.tokens for latent, _ in token.features) < 32
    with pytest.raises(PrefixUnknown):
        lens.read(seen, inputs, 3, 3)


def test_a_single_token_has_no_variance_to_explain():
    base = base_of("gpt2")
    lens = FeatureLens(coder(), "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    inputs = on_device([5], base)
    found = lens.read(activations(base, [lens], inputs), inputs, 3, 0)
    assert (found.fvu, found.tokens[0].fvu) == (None, None)


def test_where_a_transcoder_reads():
    spec, at_two = Spec("l", "transcoder"), Spec("l", "transcoder", layer=2)
    pair = ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")
    assert places(coder(), at_two) == pair
    assert places(coder(layer=2), spec) == pair
    named = {"source_hook_point": "blocks.3.hook_resid_mid", "target_hook_point": "blocks.3.hook_mlp_out"}
    assert places(coder(**named), at_two) == tuple(named.values())
    normed = {"source_hook_point": "blocks.3.ln2.hook_normalized", "target_hook_point": "blocks.3.hook_mlp_out"}
    assert places(coder(**normed, apply_rmsnorm_scaling=True), spec)[0] == "blocks.3.mlp.hook_in"
    assert places(coder(**normed, apply_rmsnorm_scaling=False), spec)[0] == "blocks.3.ln2.hook_normalized"
    with pytest.raises(LensCorrupt):
        places(coder(), spec)


def test_a_model_without_hook_points_takes_no_reading_lens():
    with pytest.raises(LensIncompatible):
        load(Spec("l", "logit_lens"), base_of("t5"))
