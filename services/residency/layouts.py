"""Which modules of each model family hold the tensors that `services.residency.families` names.

Paths are Hugging Face's. What a family has no tensor for has no entry: where attention and MLP run side by side
(GPT-J, most Falcons) there is no residual stream between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

Side = Literal["input", "output", "normalized", "pattern"]
Part = Literal["q", "k", "v"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of what one matrix gives for queries, keys and values together, [..., groups * (queries + 2) * d_head].

    Each group holds some heads of queries, then one of keys, then one of values. GPT-2's three blocks side by side are
    one group with one head of the whole width.
    """

    part: Part
    groups: int = 1
    queries: int = 1

    def get(self, fused: Tensor) -> Tensor:
        """The part, head by head: [..., groups * heads * d_head]."""
        return self._slots(fused).flatten(-3)

    def put(self, fused: Tensor, new: Tensor) -> Tensor:
        """A copy of `fused` with the part replaced."""
        changed = fused.clone()
        slots = self._slots(changed)
        slots.copy_(new.reshape(slots.shape))
        return changed

    def _slots(self, fused: Tensor) -> Tensor:
        heads = fused.unflatten(-1, (self.groups, self.queries + 2, -1))
        first = {"q": 0, "k": self.queries, "v": self.queries + 1}[self.part]
        return heads[..., first : first + (self.queries if self.part == "q" else 1), :]


@dataclass(frozen=True, slots=True)
class Tap:
    """One tensor of a block: which module, and which of its tensors.

    `side` is its input, its output, of a norm x/rms without gain, or of an attention module its pattern; `cut` takes a
    part of it.
    """

    path: str
    side: Side
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of one family. Paths in `taps`, `attention` and `mlp*` are relative to a block."""

    name: str
    blocks: str
    embedding: str
    final_norm: str
    unembedding: str
    attention: str
    mlp: str
    mlp_norm: str
    taps: dict[str, Tap]
    mlp_post_norm: str | None = None
    gain_offset: float = 0.0
    """What the norm adds to its stored weight to get the gain: 1 in the Gemma families."""
    rms_norm: bool = True
    model_batch_size: int = 8
    """Default rows of a forward pass (spec/002: 32 for GPT-2, 4 for Gemma-2)."""
    default_dtype: str | None = None
    """dtype that the family is best run in; None keeps the checkpoint's."""
    mlp_adds_residual: bool = False
    """Whether the MLP module is also given the residual stream and adds it (BLOOM)."""
    experimental: bool = False


def _taps(attention: Tap, mlp: str, norm: str, contribution: str, down: str) -> dict[str, Tap]:
    return {
        "resid_pre": Tap("", "input"),
        "resid_mid": Tap(norm, "input"),
        "resid_post": Tap("", "output"),
        "attn_out": attention,
        "mlp_in": Tap(mlp, "input"),
        "mlp_out": Tap(contribution, "output"),
        "mlp_out_raw": Tap(mlp, "output"),
        "mlp_hidden": Tap(f"{mlp}.{down}", "input"),
        "ln2_normalized": Tap(norm, "normalized"),
    }


def _projections(attention: str, out: str, inner: str = "", suffix: str = "_proj") -> dict[str, Tap]:
    """Sites of an attention module with a matrix each for queries, keys and values."""
    within = f"{attention}.{inner}" if inner else attention
    heads = {name: Tap(f"{within}.{name}{suffix}", "output") for name in ("q", "k", "v")}
    return {**heads, "z": Tap(f"{within}.{out}", "input"), "pattern": Tap(attention, "pattern")}


def _fused(attention: str, matrix: str, out: str, groups: int = 1, queries: int = 1) -> dict[str, Tap]:
    """Sites of an attention module with one matrix for queries, keys and values together."""
    parts: tuple[Part, ...] = ("q", "k", "v")
    heads: dict[str, Tap] = {part: Tap(f"{attention}.{matrix}", "output", Cut(part, groups, queries)) for part in parts}
    return {**heads, "z": Tap(f"{attention}.{out}", "input"), "pattern": Tap(attention, "pattern")}


def _without(taps: Mapping[str, Tap], *sites: str) -> dict[str, Tap]:
    return {site: tap for site, tap in taps.items() if site not in sites}


GPT2 = Family(
    name="gpt2",
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    unembedding="lm_head",
    attention="attn",
    mlp="mlp",
    mlp_norm="ln_2",
    taps=_taps(Tap("attn", "output"), "mlp", "ln_2", "mlp", "c_proj") | _fused("attn", "c_attn", "c_proj"),
    rms_norm=False,
    model_batch_size=32,
)
GPT_NEO = replace(GPT2, name="gpt_neo", taps=GPT2.taps | _projections("attn", "out_proj", "attention"))
GPTJ = replace(
    GPT2,
    name="gptj",
    mlp_norm="ln_1",
    taps=_without(
        _taps(Tap("attn", "output"), "mlp", "ln_1", "mlp", "fc_out") | _projections("attn", "out_proj"),
        *("resid_mid", "ln2_normalized"),
    ),
    model_batch_size=8,
    experimental=True,
)
BLOOM = replace(
    GPT2,
    name="bloom",
    embedding="transformer.word_embeddings",
    attention="self_attention",
    mlp_norm="post_attention_layernorm",
    mlp_adds_residual=True,
    taps=_taps(
        Tap("self_attention.dense", "output"), "mlp", "post_attention_layernorm", "mlp.dense_4h_to_h", "dense_4h_to_h"
    ),
    model_batch_size=8,
    experimental=True,
)
FALCON = replace(BLOOM, name="falcon", mlp_adds_residual=False)
LLAMA = Family(
    name="llama",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    unembedding="lm_head",
    attention="self_attn",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
    taps=_taps(Tap("self_attn", "output"), "mlp", "post_attention_layernorm", "mlp", "down_proj")
    | _projections("self_attn", "o_proj"),
)
MISTRAL = replace(LLAMA, name="mistral")
GEMMA = replace(LLAMA, name="gemma", gain_offset=1.0)
GEMMA2 = Family(
    name="gemma2",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    unembedding="lm_head",
    attention="self_attn",
    mlp="mlp",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    taps=_taps(
        Tap("post_attention_layernorm", "output"),
        "mlp",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "down_proj",
    )
    | _projections("self_attn", "o_proj"),
    gain_offset=1.0,
    model_batch_size=4,
    default_dtype="bfloat16",
)
_T5_ATTENTION = "layer.0.SelfAttention"
T5 = Family(
    name="t5",
    blocks="encoder.block",
    embedding="shared",
    final_norm="encoder.final_layer_norm",
    unembedding="lm_head",
    attention=_T5_ATTENTION,
    mlp="layer.1.DenseReluDense",
    mlp_norm="layer.1.layer_norm",
    taps=_taps(
        Tap(_T5_ATTENTION, "output"), "layer.1.DenseReluDense", "layer.1.layer_norm", "layer.1.DenseReluDense", "wo"
    )
    | _without(_projections(_T5_ATTENTION, "o", suffix=""), "pattern"),
)
"""Its encoder: a forward pass stops there, before the decoder would need a target."""
FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (GPT2, GPT_NEO, GPTJ, BLOOM, FALCON, LLAMA, MISTRAL, GEMMA, GEMMA2, T5)
}


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """The family of a Hugging Face config in its JSON form, None where it is unknown."""
    family = FAMILIES.get(str(config.get("model_type") or ""))
    if family is BLOOM:
        heads = int(config.get("n_head") or config.get("num_attention_heads") or 1)
        return replace(family, taps=family.taps | _fused("self_attention", "query_key_value", "dense", heads))
    return _falcon(config) if family is FALCON else family


def _falcon(config: Mapping[str, Any]) -> Family:
    """Falcons differ in the layout of their fused matrix, and in whether attention and MLP share one norm."""
    heads, new = int(config["num_attention_heads"]), bool(config.get("new_decoder_architecture"))
    shared = 1 if config.get("multi_query", True) else heads
    groups = int(config.get("num_kv_heads") or heads) if new else shared
    parallel = new or config.get("parallel_attn", True)
    norm = "post_attention_layernorm"
    if parallel:
        norm = "ln_mlp" if new and config.get("num_ln_in_parallel_attn") in {None, 2} else "input_layernorm"
    taps = _taps(Tap("self_attention", "output"), "mlp", norm, "mlp", "dense_4h_to_h")
    if parallel:
        taps = _without(taps, "resid_mid", *([] if norm == "ln_mlp" else ["ln2_normalized"]))
    taps |= _fused("self_attention", "query_key_value", "dense", groups, heads // groups)
    return replace(FALCON, mlp_norm=norm, taps=taps)
