"""Tuned lenses: the translators' arithmetic, their file and the public tool's, and everything else refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.residency.families import facts, family_of
from services.residency.lenses import Base, LensCorrupt, LensIncompatible, Spec, load, needed
from services.residency.lenses.extension import Extensions
from services.residency.lenses.tuned_lens import FILE, PUBLIC_FILE, Translators, save
from services.residency.reading import activations, on_device
from tests import models

IDS = models.batch(1, 12)[0].tolist()
D = models.WIDTH


@pytest.fixture(scope="module")
def base() -> Base:
    model = models.tiny("gpt2")
    return Base(model, family_of(model), facts(model.config.to_dict()), "d" * 64, Extensions())


def translators(*layers: int, scale: float = 0.1) -> Translators:
    make = torch.Generator().manual_seed(0)
    return {n: (scale * torch.randn(D, D, generator=make), scale * torch.randn(D, generator=make)) for n in layers}


def read(base: Base, lens: object) -> dict[int, list[tuple[int, float]]]:
    """Layer to the last token's predictions."""
    inputs = on_device(IDS, base)
    tokens = lens.read(activations(base, [lens], inputs), inputs, 4, 0).tokens
    return {layer: [(p.token_id, p.probability) for p in rows] for layer, rows in tokens[-1].layers}


def spec(folder: Path) -> Spec:
    return Spec("l", "tuned_lens", folder)


def test_a_layer_is_read_through_its_translator_and_the_last_one_as_it_is(base: Base, tmp_path: Path) -> None:
    made = translators(0, 2)
    save(tmp_path, made, base.digest)
    lens = load(spec(tmp_path), base)
    found = read(base, lens)
    plain = read(base, load(Spec("p", "logit_lens"), base))
    last = base.facts.num_layers - 1
    assert list(found) == sorted({0, 2, last})
    assert found[last] == plain[last]
    hidden = base.model(input_ids=on_device(IDS, base), output_hidden_states=True).hidden_states[1][0, -1]
    weight, bias = made[0]
    expected = base.model.lm_head(base.model.transformer.ln_f(hidden + weight @ hidden + bias)).softmax(-1).topk(4)
    assert [token for token, _ in found[0]] == expected.indices.tolist()
    assert [p for _, p in found[0]] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert found[0] != plain[0]
    assert lens.nbytes == needed(spec(tmp_path), base) == 2 * (D * D + D) * 4


def test_translators_of_nothing_are_the_logit_lens(base: Base, tmp_path: Path) -> None:
    layers = range(base.facts.num_layers)
    save(tmp_path, translators(*layers, scale=0.0))
    assert read(base, load(spec(tmp_path), base)) == read(base, load(Spec("p", "logit_lens"), base))


def test_the_public_tools_folder_reads_the_same_a_layer_later(base: Base, tmp_path: Path) -> None:
    """Its translator i takes the stream before layer i; that of the embeddings is left out."""
    made = translators(0, 1)
    save(tmp_path / "ours", made)
    public = {"0.weight": torch.ones(D, D), "0.bias": torch.ones(D)}
    for layer, (weight, bias) in made.items():
        public |= {f"{layer + 1}.weight": weight, f"{layer + 1}.bias": bias}
    (tmp_path / "public").mkdir()
    save_file(public, tmp_path / "public" / PUBLIC_FILE)
    (tmp_path / "public" / "config.json").write_text(json.dumps({"d_model": D, "lens_type": "linear_tuned_lens"}))
    found = load(spec(tmp_path / "public"), base)
    assert read(base, found) == read(base, load(spec(tmp_path / "ours"), base))
    (tmp_path / "public" / "config.json").write_text(json.dumps({"d_model": D + 1}))
    with pytest.raises(LensIncompatible, match="width"):
        load(spec(tmp_path / "public"), base)


def test_a_pickle_is_refused_with_the_way_out(base: Base, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "params.pt")
    with pytest.raises(LensCorrupt, match="save_file"):
        load(spec(tmp_path), base)


def damaged(folder: Path, change: str) -> None:
    made = {"layers.0.weight": torch.zeros(D, D), "layers.0.bias": torch.zeros(D)}
    if change == "another tensor":
        made["lm_head.weight"] = torch.zeros(1)
    elif change == "no bias":
        del made["layers.0.bias"]
    elif change == "integers":
        made["layers.0.bias"] = torch.zeros(D, dtype=torch.int32)
    elif change == "not finite":
        made["layers.0.weight"][3, 3] = torch.nan
    elif change == "no translator":
        made = {}
    save_file(made, folder / FILE)
    if change == "truncated":
        (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])


@pytest.mark.parametrize(
    "change", ["another tensor", "no bias", "integers", "not finite", "no translator", "truncated"]
)
def test_a_damaged_file_is_refused(base: Base, tmp_path: Path, change: str) -> None:
    damaged(tmp_path, change)
    with pytest.raises(LensCorrupt):
        load(spec(tmp_path), base)


def test_another_width_layer_or_base_is_named(base: Base, tmp_path: Path) -> None:
    cases = {
        "width": ({0: (torch.zeros(D + 1, D + 1), torch.zeros(D + 1))}, ""),
        "layer": (translators(base.facts.num_layers), ""),
        "base": (translators(0), "e" * 64),
    }
    for what, (made, digest) in cases.items():
        save(tmp_path / what, made, digest)
        with pytest.raises(LensIncompatible) as caught:
            load(spec(tmp_path / what), base)
        assert caught.value.what == what
    with pytest.raises(LensCorrupt):
        load(spec(tmp_path), base)
