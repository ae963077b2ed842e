"""Where each model family keeps the tensors that TransformerLens names, and the defaults that follow from a config.

A hook point is `blocks.<layer>.<suffix>` with TransformerLens 4's (`TransformerBridge`) suffixes; a site is our short
alias of a suffix. Two names that look alike are different tensors: TransformerLens' `hook_mlp_in` is the residual
stream BEFORE the norm, our site `mlp_in` is what the MLP consumes (`mlp.hook_in`, which equals `ln2.hook_out`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from services.residency.layouts import FAMILIES, GEMMA2, GPT2, LLAMA, Family, Side, Tap, family_of_config

__all__ = ["FAMILIES", "Family", "Side", "Tap"]

Layer = int | str

LAYER_ID = "lensmesh_layer_id"
"""Attribute of an inserted block: its id in hook-point names. Blocks without it are the base's, numbered from 0."""

SITES: Mapping[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_in": "mlp.hook_in",
    "mlp_out": "hook_mlp_out",
    "mlp_out_raw": "mlp.hook_out",
    "mlp_hidden": "mlp.hook_post",
    "ln2_normalized": "ln2.hook_normalized",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "z": "attn.hook_z",
    "pattern": "attn.hook_pattern",
}
"""Site to hook-point suffix. `mlp_out` is what the layer adds to the residual stream, `mlp_out_raw` what the MLP module
returns (they differ in Gemma-2); `mlp_hidden` is the input of the MLP's last matrix; `resid_mid` is the residual stream
before the MLP's norm, which older transcoders took for its input. `q` and `k` are what their matrices give, before any
rotation; these, `v` and `z` hold their heads side by side. `pattern` is [heads, keys] of every token and needs
attention that is computed eagerly: it is for the length of such a capture."""

HEAD_SITES = ("q", "k", "v", "z", "pattern")

_SAME_TENSOR: Mapping[str, str] = {"ln2.hook_out": "mlp_in", "hook_mlp_in": "resid_mid", "ln2.hook_in": "resid_mid"}
_SUFFIXES: Mapping[str, str] = {**{suffix: site for site, suffix in SITES.items()}, **_SAME_TENSOR}
_HOOK_POINT = re.compile(r"blocks\.([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_.]{1,64})")


class UnknownHookPoint(ValueError):
    """The name is no hook point of this model; the message says what is possible."""


class UnsupportedModel(ValueError):
    """The model's modules are not laid out like any known family; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's config says, under one name for every family. Widths in features, context in tokens."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    encoder_decoder: bool
    dict_size: int
    group_sizes: tuple[int, ...] = field(default_factory=tuple)
    top_k: int = 32
    model_batch_size: int = 8
    dtype: str | None = None


def _first(config: Mapping[str, object], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    if default is None:
        raise UnsupportedModel(f"the config has none of {', '.join(names)}")
    return default


def _kv_heads(config: Mapping[str, object], heads: int) -> int:
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else heads
    return _first(config, "num_key_value_heads", "num_kv_heads", default=heads)


def default_top_k(dict_size: int) -> int:
    """dict_size / 200 to the nearest multiple of 32, at least 32 (spec/002: 64 for 12,288 and 192 for 36,864)."""
    return max(32, round(dict_size / 200 / 32) * 32)


def default_groups(dict_size: int, hidden_size: int) -> tuple[int, ...]:
    """Increments 1x, 2x, 4x, 9x of the width where the dictionary is 16 widths (spec/002), else scaled to sum to it."""
    if dict_size == 16 * hidden_size:
        return tuple(factor * hidden_size for factor in (1, 2, 4, 9))
    head = [dict_size * factor // 16 for factor in (1, 2, 4)]
    return (*head, dict_size - sum(head))


def facts(config: Mapping[str, object]) -> Facts:
    """The facts and defaults of a Hugging Face config in its JSON form.

    Raises:
        UnsupportedModel: the config names no width, depth or vocabulary.
    """
    model_type = str(config.get("model_type") or "")
    family = FAMILIES.get(model_type)
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", default=1)
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    dict_size = 16 * hidden
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Facts(
        model_type=model_type,
        num_layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
        hidden_size=hidden,
        intermediate_size=_first(
            config, "intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", default=4 * hidden
        ),
        vocab_size=_first(config, "vocab_size"),
        num_heads=heads,
        num_kv_heads=_kv_heads(config, heads),
        head_dim=_first(config, "head_dim", "d_kv", default=hidden // heads),
        context_length=_first(config, "max_position_embeddings", "n_positions", "n_ctx", default=512),
        encoder_decoder=bool(config.get("is_encoder_decoder")),
        dict_size=dict_size,
        group_sizes=default_groups(dict_size, hidden),
        top_k=default_top_k(dict_size),
        model_batch_size=family.model_batch_size if family else 8,
        dtype=(family.default_dtype if family else None) or (str(dtype) if dtype else None),
    )


def width_of(site: str, known: Facts, max_length: int) -> int:
    """Numbers per token at a site, in sequences of at most `max_length` tokens."""
    heads, shared = known.num_heads * known.head_dim, known.num_kv_heads * known.head_dim
    special = {"mlp_hidden": known.intermediate_size, "q": heads, "z": heads, "k": shared, "v": shared}
    special["pattern"] = known.num_heads * max_length
    return special.get(site, known.hidden_size)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, looking through wrappers that keep the original as `base_layer` (LoRA).

    Raises:
        UnsupportedModel: there is no such module.
    """
    for part in path.split(".") if path else ():
        while not hasattr(module, part) and isinstance(getattr(module, "base_layer", None), nn.Module):
            module = module.base_layer
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            raise UnsupportedModel(f"{type(module).__name__} has no module {part!r} (of {path!r})")
        module = found
    return module


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model itself, below a PEFT wrapper if there is one."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def blocks(model: nn.Module, family: Family) -> dict[Layer, nn.Module]:
    """Every block in the order it runs, by its stable id: base layers 0..n-1, inserted ones by their own id."""
    found: dict[Layer, nn.Module] = {}
    base = 0
    for block in submodule(base_model(model), family.blocks).children():
        inserted = getattr(block, LAYER_ID, None)
        if inserted is None:
            found[base] = block
            base += 1
        else:
            found[str(inserted)] = block
    return found


def family_of(model: nn.Module) -> Family:
    """The family by the config's `model_type`, else the first one whose layout the model shares (marked experimental).

    A borrowed layout is a guess: let `identity.check_identity` confirm it before anything relies on it.

    Raises:
        UnsupportedModel: no layout fits; the message names the first missing module of each.
    """
    model_type = str(getattr(base_model(model).config, "model_type", ""))
    if model_type in FAMILIES:
        found = family_of_config(base_model(model).config.to_dict())
        assert found is not None, "its name is one of the known ones"
        return found
    missing = []
    for layout in (GEMMA2, LLAMA, GPT2):
        try:
            first = next(iter(blocks(model, layout).values()))
            for site, tap in layout.taps.items():
                if site not in HEAD_SITES:
                    submodule(first, tap.path)
            submodule(base_model(model), layout.final_norm)
        except (UnsupportedModel, StopIteration) as error:
            missing.append(f"{layout.name}: {error}")
            continue
        taps = {site: tap for site, tap in layout.taps.items() if site not in HEAD_SITES or _has(first, tap.path)}
        return replace(layout, name=model_type, taps=taps, model_batch_size=8, default_dtype=None, experimental=True)
    raise UnsupportedModel(f"no family fits model type {model_type!r} ({'; '.join(missing)})")


def _has(module: nn.Module, path: str) -> bool:
    try:
        submodule(module, path)
    except UnsupportedModel:
        return False
    return True


def site_of(hook_point: str) -> tuple[Layer, str]:
    """(layer, site) of a hook point's name.

    Raises:
        UnknownHookPoint: it is not a name of the form `blocks.<layer>.<suffix>`, or the suffix is unknown.
    """
    match = _HOOK_POINT.fullmatch(hook_point)
    if match is None:
        raise UnknownHookPoint(f"{hook_point[:100]!r} is not of the form blocks.<layer>.<name>")
    site = _SUFFIXES.get(match[2])
    if site is None:
        raise UnknownHookPoint(f"no hook point ends in {match[2]!r}; known: {', '.join(sorted(_SUFFIXES))}")
    return int(match[1]) if match[1].isdecimal() else match[1], site


def hook_points(sites: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """Hook-point names of every site in every layer, layer by layer.

    Raises:
        UnknownHookPoint: a site has no alias.
    """
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise UnknownHookPoint(f"no site {unknown[0][:100]!r}; known: {', '.join(SITES)}")
    return [f"blocks.{layer}.{SITES[site]}" for layer in layers for site in sites]


def require_site(family: Family, site: str) -> Tap:
    """Where a family keeps a site.

    Raises:
        UnknownHookPoint: it has no such tensor.
    """
    if site not in family.taps:
        raise UnknownHookPoint(f"models of type {family.name} have no site {site}; they have: {', '.join(family.taps)}")
    return family.taps[site]


def locate(model: nn.Module, family: Family, hook_point: str) -> tuple[nn.Module, Tap]:
    """The module of a hook point, and which of its tensors is meant.

    Raises:
        UnknownHookPoint: the layer or the name does not exist in this model.
    """
    layer, site = site_of(hook_point)
    found = blocks(model, family)
    if layer not in found:
        raise UnknownHookPoint(f"layer {layer} is not one of this model's {len(found)} (0 to {len(found) - 1})")
    tap = require_site(family, site)
    return submodule(found[layer], tap.path), tap
