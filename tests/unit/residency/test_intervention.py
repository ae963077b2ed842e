"""Interventions are what a plain hook on the Hugging Face module would do, and what reads under them sees that."""

from __future__ import annotations

import pytest
import torch

from services.residency.families import facts, family_of
from services.residency.intervention import Intervention, InterventionRefused, splices
from services.residency.lenses import Base, Spec, load
from services.residency.lenses.extension import Extensions
from services.residency.lenses.features import FeatureLens
from services.residency.lenses.transcoder import Transcoder, TranscoderShape
from services.residency.reading import activations
from services.residency.splice import logits, spliced
from tests import models

IDS = models.batch(1, 12)
DIRECTION = torch.linspace(-1, 1, models.WIDTH)
POINTS = ("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out")


def base_of(family: str) -> Base:
    model = models.tiny(family)
    return Base(model, family_of(model), facts(model.config.to_dict()), "d" * 64, Extensions())


def coder(d_out: int = models.WIDTH) -> Transcoder:
    make, width = torch.Generator().manual_seed(0), 96
    weights = {
        "W_enc": torch.randn(models.WIDTH, width, generator=make),
        "b_enc": torch.randn(width, generator=make),
        "W_dec": torch.randn(width, d_out, generator=make),
        "b_dec": torch.randn(d_out, generator=make),
        "threshold": torch.zeros(width),
    }
    return Transcoder(TranscoderShape("topk", 8, (32, 64)), weights)


def changed(base: Base, *interventions: Intervention) -> list:
    return splices(interventions, base.family, base.facts, IDS.shape[1])


def with_intervention(base: Base, **fields) -> torch.Tensor:
    with spliced(base.model, base.family, changed(base, Intervention(**fields))):
        return logits(base.model, IDS)


def contribution(model, layer):
    """The module whose output a layer's MLP branch adds, named by hand."""
    if hasattr(model, "transformer"):
        return model.transformer.h[layer].mlp
    block = model.model.layers[layer]
    return getattr(block, "post_feedforward_layernorm", block.mlp)


BY_HAND = {
    "zero": lambda y: y * 0,
    "scale": lambda y: y * 2.5,
    "mean": lambda y: y.mean(1, keepdim=True) + 0 * y,
    "add": lambda y: y + 2.5 * DIRECTION,
    "replace": lambda y: 0 * y + DIRECTION,
}


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("positions", [(), (3, 7)])
def test_what_a_lens_reads_under_an_intervention_is_what_plain_hooks_give(family, positions):
    base = base_of(family)
    lens = FeatureLens(coder(), *POINTS)
    (mlp,) = (module for name, module in base.model.named_modules() if name.endswith("2.mlp"))
    for op, by_hand in BY_HAND.items():
        seen = {}

        def change(_, __, y, by_hand=by_hand):
            new = by_hand(y)
            if positions:
                kept = [position for position in range(y.shape[1]) if position not in positions]
                new[:, kept] = y[:, kept]
            return new

        handles = [
            contribution(base.model, 1).register_forward_hook(change),
            mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0])),
            contribution(base.model, 2).register_forward_hook(lambda _, __, y, seen=seen: seen.update(y=y)),
        ]
        with torch.no_grad():
            base.model(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
        vector = DIRECTION.tolist() if op in ("add", "replace") else ()
        asked = Intervention("mlp_out", 1, op, vector=vector, factor=2.5, positions=positions)
        found = activations(base, [lens], IDS, changed(base, asked))
        plain = activations(base, [lens], IDS)
        for point, expected in zip(POINTS, (seen["x"], seen["y"]), strict=True):
            assert torch.equal(found[point], expected)
            assert not torch.equal(found[point], plain[point])


def test_a_tensor_that_is_replaced_and_read_is_the_new_one():
    base = base_of("llama")
    at_input = Intervention("mlp_in", 2, "replace", vector=DIRECTION.tolist())
    found = activations(base, [FeatureLens(coder(), *POINTS)], IDS, changed(base, at_input))
    assert torch.equal(found[POINTS[0]], DIRECTION.expand(1, 12, -1))
    with torch.no_grad():
        assert torch.equal(found[POINTS[1]], base.model.model.layers[2].mlp(found[POINTS[0]]))


def test_a_transcoder_takes_the_place_of_the_mlp_and_its_features_steer():
    base = base_of("gpt2")
    plain = activations(base, [FeatureLens(coder(), *POINTS)], IDS)
    spliced_in = Intervention("mlp_out", 2, "replace", transcoder=(coder(), POINTS[0]))
    found = activations(base, [FeatureLens(coder(), *POINTS)], IDS, changed(base, spliced_in))
    assert torch.equal(found[POINTS[1]][0], coder()(plain[POINTS[0]][0]))
    steered = Intervention("mlp_out", 2, "add", transcoder=(coder(), POINTS[0]), feature=5, factor=3.0)
    found = activations(base, [FeatureLens(coder(), *POINTS)], IDS, changed(base, steered))
    torch.testing.assert_close(found[POINTS[1]], plain[POINTS[1]] + 3.0 * coder().W_dec[5])


def test_the_logit_lens_reads_what_the_changed_model_predicts():
    base = base_of("gemma2")
    lens = load(Spec("l", "logit_lens"), base)
    changes = changed(base, Intervention("resid_post", 1, "zero", positions=(4, 7)))
    found = lens.read(activations(base, [lens], IDS, changes), IDS, 1, 0, changes)
    with spliced(base.model, base.family, changes):
        own = logits(base.model, IDS)[0].argmax(-1).tolist()
    assert [token.layers[-1][1][0].token_id for token in found.tokens] == own
    assert own != logits(base.model, IDS)[0].argmax(-1).tolist()


def test_interventions_do_what_they_say_at_the_positions_they_name():
    base = base_of("gemma2")
    plain = logits(base.model, IDS)
    late = with_intervention(base, site="resid_post", layer=1, op="zero", positions=[6])
    assert torch.equal(late[:, :6], plain[:, :6])
    assert not torch.allclose(late[:, 6:], plain[:, 6:], atol=1e-3)
    nothing = [0.0] * models.WIDTH
    assert torch.equal(with_intervention(base, site="mlp_out", layer=1, op="add", vector=nothing), plain)
    mean = with_intervention(base, site="blocks.3.hook_resid_post", layer=0, op="mean")
    torch.testing.assert_close(mean[0, 0], mean[0, 5])


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"op": "add"}, "vector"),
        ({"op": "replace"}, "vector"),
        ({"op": "add", "vector": [1.0]}, "vector"),
        ({"op": "replace", "vector": [1.0] * 65}, "vector"),
        ({"op": "zero", "site": "mlp"}, "site"),
        ({"op": "zero", "site": "blocks.0.hook_nothing"}, "site"),
        ({"op": "zero", "site": "blocks.4.hook_mlp_out"}, "site"),
        ({"op": "zero", "site": "blocks.x1.hook_mlp_out"}, "site"),
        ({"op": "zero", "site": "ln2_normalized"}, "site"),
        ({"op": "zero", "site": "pattern"}, "site"),
        ({"op": "zero", "layer": 4}, "layer"),
        ({"op": "zero", "positions": [3, 12]}, "positions"),
        ({"op": "add", "transcoder": (coder(), POINTS[0])}, "feature"),
        ({"op": "add", "transcoder": (coder(), POINTS[0]), "feature": 96}, "feature"),
        ({"op": "add", "transcoder": (coder(65), POINTS[0]), "feature": 1}, "transcoder_id"),
        ({"op": "replace", "transcoder": (coder(), POINTS[0])}, "transcoder_id"),
    ],
)
def test_interventions_that_do_not_fit_name_their_field(fields, wrong):
    with pytest.raises(InterventionRefused) as caught:
        with_intervention(base_of("gpt2"), **{"site": "mlp_out", "layer": 0, **fields})
    assert caught.value.field == wrong
