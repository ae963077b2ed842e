"""Several, narrow, shared and later inserted layers: what they preserve, what they share, what they count."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from services.extensions.compute.blueprint import Blueprint
from services.extensions.compute.config import ConfigInvalid, ExtensionConfig, LayerPlacement
from services.extensions.compute.count import distinct_parameters, skeleton_of
from services.extensions.compute.kinds import KINDS
from services.extensions.compute.progressive import insert_due
from services.extensions.compute.task_extensions import HybridExtension, LoRAExtension, TransformerLayerExtension
from services.residency.lenses.extension import Extension, ExtensionRefused, Extensions
from services.residency.lenses.extension_files import attachable, over_layers, read_manifest, retrained
from services.residency.loading import load_model
from tests.models import batch, saved, tiny


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        targets = {"decoder_input_ids": batch(seed=1)} if model.config.is_encoder_decoder else {}
        return model(input_ids=batch(), **targets).logits


def layer(position: str = "decoder", index: int | None = None, scale: float = 0.0, **more: object) -> LayerPlacement:
    return LayerPlacement(position=position, index=index, initialization_scale=scale, **more)


SEVERAL = {
    "gpt2": (layer(index=1), layer(index=3), layer()),
    "llama": (layer(index=2), layer(index=3, mlp_width=40)),
    "mistral": (layer(index=1, mlp_width=7), layer()),
    "gemma2": (layer(index=1), layer(mlp_width=100)),
    "t5": (layer("both", 1), layer("encoder", 3, mlp_width=9), layer("decoder", mlp_width=1)),
}


def disturb(extension: Extension, seed: int = 4) -> None:
    generator = torch.Generator().manual_seed(seed)
    extension.load({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in extension.state().items()})


def made(folder: Path, model: PreTrainedModel, kind: str, config: ExtensionConfig, **more: object) -> Path:
    """An extension's folder, as the service makes it."""
    folder.mkdir(parents=True)
    base = distinct_parameters(tiny(model.config.model_type, model.config.num_hidden_layers))
    Blueprint(kind=kind, task_name="task-one", config=config, base_parameters=base, **more).prepare(model)(folder)
    return folder


@pytest.mark.parametrize("family", SEVERAL)
def test_several_layers_preserve_every_bit_count_exactly_and_survive_saving(family: str, tmp_path: Path) -> None:
    model = tiny(family, 3)
    before = logits(model)
    for kind, create in (
        (TransformerLayerExtension, "create_extended_model"),
        (HybridExtension, "create_hybrid_model"),
    ):
        config = ExtensionConfig(lora_r=1, layers=SEVERAL[family], save_path=tmp_path / kind.kind)
        extension = kind(model, config)
        assert torch.equal(logits(getattr(extension, create)("task-one")), before)
        counts = extension.parameter_counts("task-one")
        assert counts == KINDS[kind.kind].counts(tiny(family, 3), config, counts.base)
        disturb(extension.attached["task-one"])
        extended = logits(model)
        assert not torch.equal(extended, before)
        folder = extension.save("task-one")
        extension.switch_to(None)
        assert torch.equal(logits(model), before)
        other = kind(tiny(family, 3), config)
        assert torch.equal(logits(other.switch_to(other.load(folder))), extended)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generation_through_several_layers_is_the_same_with_and_without_a_cache(family: str) -> None:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    extension = TransformerLayerExtension(tiny(family, 3), ExtensionConfig(layers=SEVERAL[family]))
    model = extension.create_extended_model("task-one")
    disturb(extension.attached["task-one"])
    own = EncoderDecoderCache(DynamicCache(), DynamicCache()) if family == "t5" else None
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(batch(), use_cache=True, past_key_values=own, **options)
    assert torch.equal(cached, model.generate(batch(), use_cache=False, **options))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_quantised_bases_keep_every_bit(family: str, quantization: str) -> None:
    model = load_model(saved(family, 3), quantization)
    before = logits(model)
    extension = HybridExtension(model, ExtensionConfig(lora_r=1, layers=SEVERAL[family]))
    assert torch.equal(logits(extension.create_hybrid_model("task-one")), before)
    inserted = {p.dtype for p in extension.attached["task-one"].parameters.values()}
    assert inserted == {torch.float32}
    disturb(extension.attached["task-one"])
    assert not torch.equal(logits(model), before)
    extension.switch_to(None)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("layers", "field"),
    [
        ((layer(index=2), layer(index=2)), "layers.index"),
        ((layer(), layer(index=1)), "layers.index"),
        ((layer(index=5),), "layer.index"),
        ((layer(mlp_width=10_000),), "layer.mlp_width"),
        ((layer("encoder"), layer("both")), "layer.position"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(layers: tuple[LayerPlacement, ...], field: str) -> None:
    for model in (tiny("llama", 3), skeleton_of(json.loads(tiny("llama", 3).config.to_json_string()))):
        with pytest.raises(ExtensionRefused) as refused:
            KINDS["hybrid"].counts(model, ExtensionConfig(lora_r=1, layers=layers), 1)
        assert refused.value.field == field


def test_a_narrow_mlp_keeps_the_neurons_with_the_largest_weights() -> None:
    model = tiny("gpt2", 2)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, 17].mul_(100)
    extension = TransformerLayerExtension(model, ExtensionConfig(layers=(layer(scale=1.0, mlp_width=1),)))
    extension.create_extended_model("task-one")
    held = extension.attached["task-one"].parameters
    source = model.transformer.h[1].mlp
    assert torch.equal(held["transformer.h.2.mlp.c_fc.weight"][:, 0], source.c_fc.weight[:, 17])
    assert torch.equal(held["transformer.h.2.mlp.c_fc.bias"], source.c_fc.bias[17:18])
    assert torch.equal(held["transformer.h.2.mlp.c_proj.weight"][0], source.c_proj.weight[17])
    whole = TransformerLayerExtension(tiny("llama", 2), ExtensionConfig(layers=(layer(scale=1.0, mlp_width=192),)))
    plain = TransformerLayerExtension(tiny("llama", 2), ExtensionConfig(layers=(layer(scale=1.0),)))
    outputs = [logits(extension.create_extended_model("task-one")) for extension in (whole, plain)]
    assert torch.equal(*outputs)


def test_adapters_and_attaching_draw_no_random_numbers() -> None:
    state = torch.get_rng_state()
    for model, variant in ((tiny("gpt2", 2), variant) for variant in ("lora", "dora", "adalora")):
        config = ExtensionConfig(lora_r=2, lora_variant=variant, layers=(layer(mlp_width=3),))
        HybridExtension(model, config).create_hybrid_model("task-one")
    assert torch.equal(torch.get_rng_state(), state)


# Shared layers


def shared_pair(tmp_path: Path, **more: object) -> tuple[Path, Path, ExtensionConfig]:
    """A hybrid with layers that do something, and another one over the same layers."""
    model = tiny("t5", 2)
    config = ExtensionConfig(lora_r=4, layers=(layer("both", scale=0.5),))
    first = made(tmp_path / "first", model, "hybrid", config)
    over = ExtensionConfig(lora_r=4, shared_layer_of="x_1", **more)
    return first, made(tmp_path / "second", model, "hybrid", over, seed=9, shared=first), over


def test_a_shared_layer_is_on_disk_once_and_outlives_the_extension_it_came_from(tmp_path: Path) -> None:
    first, second, _ = shared_pair(tmp_path)
    files = [folder / "inserted.safetensors" for folder in (first, second)]
    assert files[0].samefile(files[1])
    manifests = [read_manifest(folder) for folder in (first, second)]
    assert manifests[0].inserted_digest == manifests[1].inserted_digest != ""
    counts = [manifest.parameter_counts for manifest in manifests]
    assert counts[1]["shared"] == counts[1]["layer"] == counts[0]["layer"] > 0 == counts[0]["shared"]
    assert counts[1]["trainable"] == counts[1]["lora"] == counts[0]["lora"]
    total = counts[1]["base"] + counts[1]["lora"] + counts[1]["layer"]
    assert counts[1]["trainable_over_total"] == counts[1]["lora"] / total
    model = tiny("t5", 2)
    with_it = attachable(second, model)
    for path in first.rglob("*.*"):
        path.unlink()
    again = attachable(second, model)
    assert all(torch.equal(again.parameters[key], value) for key, value in with_it.parameters.items())


def test_a_shared_layer_is_in_memory_once_and_each_task_is_as_alone(tmp_path: Path) -> None:
    first, second, _ = shared_pair(tmp_path)
    model, alone = tiny("t5", 2), {}
    base = logits(model)
    for key, folder in (("a", first), ("b", second)):
        by_itself = Extensions()
        by_itself.attach(key, attachable(folder, model))
        with by_itself.using(key):
            alone[key] = logits(model)
    together = Extensions()
    for key, folder in (("a", first), ("b", second)):
        together.attach(key, attachable(folder, model, among=together))
    layers = [key for key in together["b"].parameters if key in together["b"].frozen]
    assert layers
    assert all(together["a"].parameters[key] is together["b"].parameters[key] for key in layers)
    adapters = together["b"].nbytes - sum(together["b"].parameters[key].nbytes for key in layers)
    assert together.bytes_beside(together["b"]) == adapters
    assert together.nbytes == together["a"].nbytes + adapters
    for key in ("a", "b", "a"):
        together.activate(key)
        assert torch.equal(logits(model), alone[key])
    together.detach("a")
    assert together.bytes_beside(together["b"]) == together["b"].nbytes == together.nbytes
    with together.using("b"):
        assert torch.equal(logits(model), alone["b"])
    assert torch.equal(logits(model), base)


def test_what_is_attached_to_be_trained_shares_nothing(tmp_path: Path) -> None:
    first, second, _ = shared_pair(tmp_path)
    model, attached = tiny("t5", 2), Extensions()
    attached.attach("training", attachable(first, model))
    attached.attach("lens", attachable(second, model, among=attached))
    theirs = {id(parameter) for parameter in attached["training"].parameters.values()}
    assert theirs.isdisjoint(map(id, attached["lens"].parameters.values()))


def test_training_the_second_task_changes_nothing_of_the_first(tmp_path: Path) -> None:
    first, second, _ = shared_pair(tmp_path)
    model = tiny("t5", 2)
    extension = attachable(second, model)
    assert extension.trainable.keys() == extension.parameters.keys() - extension.frozen
    with torch.no_grad():
        for parameter in extension.trainable.values():
            parameter.add_(1.0)
    (tmp_path / "next").mkdir()
    retrained(second, extension, {"steps": 1})(tmp_path / "next")
    assert (tmp_path / "next" / "inserted.safetensors").samefile(first / "inserted.safetensors")
    again = attachable(tmp_path / "next", model)
    assert all(torch.equal(again.parameters[key], value) for key, value in extension.parameters.items())


def test_training_the_shared_layer_gives_those_who_share_it_a_next_version(tmp_path: Path) -> None:
    first, second, _ = shared_pair(tmp_path, train_shared_layer=True)
    model = tiny("t5", 2)
    extension = attachable(second, model)
    assert extension.frozen == frozenset()
    assert read_manifest(second).parameter_counts["shared"] == 0
    disturb(extension)
    before = {key: value.clone() for key, value in load_file(first / "inserted.safetensors").items()}
    for name in ("second", "first"):
        (tmp_path / f"{name}-2").mkdir()
    retrained(second, extension, {})(tmp_path / "second-2")
    assert all(torch.equal(load_file(first / "inserted.safetensors")[key], value) for key, value in before.items())
    over_layers(first, tmp_path / "second-2" / "inserted.safetensors")(tmp_path / "first-2")
    old, new = attachable(first, model), attachable(tmp_path / "first-2", model)
    for key, parameter in new.parameters.items():
        expected = extension.parameters if key in before else old.parameters
        assert torch.equal(parameter, expected[key]), key


@pytest.mark.parametrize("how", ["kind", "nobody", "no layers", "other base"])
def test_layers_that_cannot_be_shared_are_refused(how: str, tmp_path: Path) -> None:
    config = ExtensionConfig(lora_r=4, shared_layer_of="x_1")
    family = "llama" if how == "other base" else "t5"
    other = made(tmp_path / "o", tiny(family, 2), "lora" if how == "no layers" else "hybrid", ExtensionConfig(lora_r=4))
    kind, shared = ("layer" if how == "kind" else "hybrid"), (None if how == "nobody" else other)
    with pytest.raises(ExtensionRefused) as refused:
        made(tmp_path / "n", tiny("t5", 2), kind, config, shared=shared)
    assert refused.value.field == "shared_layer_of"


def test_notebooks_share_layers_between_tasks_in_memory(tmp_path: Path) -> None:
    layers = (layer(scale=0.5, mlp_width=7),)
    extension = HybridExtension(tiny("gpt2", 2), ExtensionConfig(lora_r=4, layers=layers, save_path=tmp_path))
    extension.create_hybrid_model("task-one")
    extension.create_hybrid_model("task-two", seed=1, shared_with="task-one")
    one, two = (extension.attached[name] for name in ("task-one", "task-two"))
    assert two.frozen
    assert all(one.parameters[key] is two.parameters[key] for key in two.frozen)
    counts = extension.parameter_counts("task-two")
    assert counts == KINDS["hybrid"].counts(
        tiny("gpt2", 2), ExtensionConfig(lora_r=4, shared_layer_of="task-one"), counts.base, one.operations[:1]
    )
    expected = logits(extension.switch_to("task-two"))
    again = HybridExtension(tiny("gpt2", 2), extension.config)
    assert torch.equal(logits(again.switch_to(again.load(extension.save("task-two")))), expected)


# Layers that training inserts later


LATER = (layer(index=1), layer(index=3, from_step=5), layer(from_step=5), layer(from_step=8, mlp_width=3))


@pytest.mark.parametrize("kind", ["layer", "hybrid"])
def test_layers_are_inserted_when_their_step_comes(kind: str, tmp_path: Path) -> None:
    model = tiny("llama", 3)
    config = ExtensionConfig(lora_r=2, layers=LATER)
    folder = made(tmp_path / "x", model, kind, config)
    assert ExtensionConfig.from_dict(read_manifest(folder).config) == config
    attached = Extensions()
    attached.attach("key", attachable(folder, model))
    disturb(attached["key"])
    attached.activate("key")
    seen = [len(model.model.layers)]
    for step in range(10):
        before, known = logits(model), set(attached["key"].parameters)
        new = insert_due(model, attached, "key", config, step)
        assert torch.equal(logits(model), before)
        assert known.isdisjoint(new)
        assert known | new.keys() == attached["key"].parameters.keys()
        assert not any("lora_" in key for key in new), "adapters of the neighbour are not copied"
        assert insert_due(model, attached, "key", config, step) == {}
        seen.append(len(model.model.layers))
    assert seen == [4] * 6 + [6] * 3 + [7] * 2
    counts = read_manifest(folder).parameter_counts
    assert counts["trainable"] == sum(p.numel() for p in attached["key"].parameters.values())

    disturb(attached["key"])
    trained = logits(model)
    (tmp_path / "y").mkdir()
    retrained(folder, attached["key"], {"steps": 10})(tmp_path / "y")
    again = Extensions()
    attached.activate(None)
    again.attach("again", attachable(tmp_path / "y", model, among=again))
    with again.using("again"):
        assert torch.equal(logits(model), trained)


def test_a_later_layer_copies_its_neighbour_as_it_is_by_then(tmp_path: Path) -> None:
    model = tiny("gpt2", 2)
    config = ExtensionConfig(layers=(layer(), layer(scale=1.0, from_step=1)))
    attached = Extensions()
    attached.attach("key", attachable(made(tmp_path / "x", model, "layer", config), model))
    disturb(attached["key"])
    new = insert_due(model, attached, "key", config, 1)
    for key, parameter in new.items():
        assert torch.equal(parameter, attached["key"].parameters[key.replace("h.3.", "h.2.")])


def test_what_cannot_be_inserted_later_is_refused_at_once(tmp_path: Path) -> None:
    config = ExtensionConfig(layers=(layer(), layer(index=9, from_step=3)))
    with pytest.raises(ExtensionRefused):
        made(tmp_path / "x", tiny("gpt2", 2), "layer", config)


# The configuration as a whole


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"layers": (layer(), layer(scale=2.0))}, ["layers[1].initialization_scale"]),
        ({"layers": (layer(index=0), layer("top"))}, ["layers[0].index", "layers[1].position"]),
        ({"layers": (layer(mlp_width=0),)}, ["layers[0].mlp_width"]),
        ({"layers": (layer(from_step=1),)}, ["layers[0].from_step"]),
        ({"layers": (layer(), layer(from_step=4), layer(from_step=2))}, ["layers[2].from_step"]),
        ({"layers": (layer(),), "layer_index": 2}, ["layers"]),
        ({"layers": (layer(),), "shared_layer_of": "x_1"}, ["layers"]),
        ({"train_shared_layer": True}, ["train_shared_layer"]),
        ({"shared_layer_of": "x_1", "freeze_base": False}, ["shared_layer_of"]),
        ({"lora_target_r": 4}, ["lora_target_r"]),
        ({"lora_variant": "adalora", "lora_target_r": 16}, ["lora_target_r"]),
        ({"lora_variant": "adalora", "lora_r": 1}, ["lora_r"]),
    ],
)
def test_contradictions_are_named(values: dict, fields: list[str]) -> None:
    with pytest.raises(ConfigInvalid) as invalid:
        ExtensionConfig(**values)
    assert [field for field, _ in invalid.value.violations] == fields


def test_a_configuration_survives_its_json() -> None:
    for config in (
        ExtensionConfig(),
        ExtensionConfig(lora_variant="adalora", lora_target_r=3, layers=SEVERAL["t5"], freeze_base=False),
        ExtensionConfig(shared_layer_of="x_1", train_shared_layer=True, lora_target_modules=("q", "v")),
    ):
        assert ExtensionConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_removing_a_task_frees_its_memory() -> None:
    gc.collect()
    gc.disable()
    try:
        for kind, create in ((LoRAExtension, "create_adapter"), (HybridExtension, "create_hybrid_model")):
            extension = kind(tiny("llama", 2), ExtensionConfig(lora_r=4))
            getattr(extension, create)("task-one")
            parameters = extension.attached["task-one"].parameters.values()
            held = [weakref.ref(parameter) for parameter in parameters]
            del parameters
            extension.remove("task-one")
            assert extension.attached.nbytes == 0
            assert [ref for ref in held if ref() is not None] == []
    finally:
        gc.enable()
