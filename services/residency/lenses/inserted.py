"""Transformer layers inserted into a live base: a copy of a neighbour whose residual branches add nothing at first.

LLaMA Pro (arXiv:2401.02415, section 3.2) zeroes a copied block's output projections, which makes it an identity with
a gradient; so it is done here for every residual branch, scaled instead of zeroed where that is asked for. Families
that norm after the addition (BERT, BART) are not known here: behind such a norm no block is an identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from services.residency.families import LAYER_ID, submodule
from services.residency.lenses.extension import Edit, Extension, ExtensionRefused
from services.residency.loading import target_dtypes
from services.residency.quantize import dequantized, is_quantized, linear_modules


@dataclass(frozen=True, slots=True)
class Stack:
    """Where a family keeps one of its stacks of layers, and what ends each residual branch of a layer."""

    blocks: str
    """Path of the module list."""
    outputs: tuple[str, ...]
    """Last linear module of every residual branch, relative to a block."""
    count: str = "num_hidden_layers"
    """Field of the model's config with the number of layers."""
    branch_norms: tuple[str, ...] = ()
    """Norms on a branch's output before it is added; they undo any factor on what they norm but zero."""
    gain_offset: float = 0.0
    """What such a norm adds to its weight to get its gain."""
    relative_bias: str = ""
    """Attention that may own the stack's relative position bias, relative to a block."""
    mlp_inputs: tuple[str, ...] = ()
    """Linear modules that make the MLP's neurons, as far as a model has them; the last of `outputs` reads them."""


def _t5_inputs(sublayer: str) -> tuple[str, ...]:
    return tuple(f"{sublayer}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1"))


_LLAMA = Stack("model.layers", ("self_attn.o_proj", "mlp.down_proj"), mlp_inputs=("mlp.gate_proj", "mlp.up_proj"))
STACKS: Mapping[str, Mapping[str, Stack]] = {
    "gpt2": {"decoder": Stack("transformer.h", ("attn.c_proj", "mlp.c_proj"), mlp_inputs=("mlp.c_fc",))},
    "llama": {"decoder": _LLAMA},
    "mistral": {"decoder": _LLAMA},
    "gemma2": {
        "decoder": Stack(
            _LLAMA.blocks,
            _LLAMA.outputs,
            mlp_inputs=_LLAMA.mlp_inputs,
            branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            gain_offset=1.0,
        )
    },
    "t5": {
        "encoder": Stack(
            "encoder.block",
            ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
            count="num_layers",
            relative_bias="layer.0.SelfAttention",
            mlp_inputs=_t5_inputs("layer.1"),
        ),
        "decoder": Stack(
            "decoder.block",
            ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
            count="num_decoder_layers",
            relative_bias="layer.0.SelfAttention",
            mlp_inputs=_t5_inputs("layer.2"),
        ),
    },
}
"""Stacks by model type and position; a new family is one entry."""


def stack_of(model: PreTrainedModel, position: str) -> Stack:
    """The stack that a position names; a model with one stack has no other.

    Raises:
        ExtensionRefused: layers cannot be inserted into this model, or it has no such stack.
    """
    model_type = model.config.model_type
    stacks = STACKS.get(model_type)
    if stacks is None:
        known = ", ".join(sorted(STACKS))
        raise ExtensionRefused(
            "model_id",
            f"no layer of {model_type} is known to preserve the model's function; known are {known} "
            "(behind a norm that follows the addition, as in BERT and BART, no layer can)",
        )
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ExtensionRefused("model_id", "its attention depends on each layer's number, which insertion changes")
    if position not in stacks:
        raise ExtensionRefused("layer.position", f"this model has no {position}; it has {', '.join(stacks)}")
    return stacks[position]


def insert(
    model: PreTrainedModel,
    position: str,
    *,
    index: int | None = None,
    scale: float = 0.0,
    mlp_width: int | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Extension:
    """Make a layer for a live base, which is left as it was.

    Args:
        model: the base without extensions, or its skeleton; quantised layers give an unquantised copy.
        position: `encoder` or `decoder`.
        index: number the new layer will have, 1 to the number of layers; at the end when None.
        scale: factor on what each residual branch adds; 0 leaves the model's function exactly as it is.
        mlp_width: neurons of its MLP: those of the layer before that have the largest weights; all when None.
        weights: the layer's tensors by checkpoint key, instead of a scaled copy of the layer before it.

    Raises:
        ExtensionRefused: the model, position, index or weights do not fit.
    """
    stack = stack_of(model, position)
    blocks = model.get_submodule(stack.blocks)
    assert isinstance(blocks, nn.ModuleList)
    index = len(blocks) if index is None else index
    if not 1 <= index <= len(blocks):
        raise ExtensionRefused("layer.index", f"must be 1 to {len(blocks)} in the {position}, got {index}")
    block = _copy(model, blocks[index - 1], stack)
    if mlp_width is not None:
        _narrow(block, stack, mlp_width)
    setattr(block, LAYER_ID, f"{position}-{index}-inserted")
    _renumber_new(block, index)
    prefix = f"{stack.blocks}.{index}."
    width = {} if mlp_width is None else {"mlp_width": mlp_width}
    extension = Extension(
        edits=_edits(model, stack, blocks, block, index),
        parameters={prefix + name: parameter for name, parameter in block.named_parameters()},
        operations=({"op": "insert", "position": position, "index": index} | width,),
        constants=tuple(block.buffers()),
    )
    if weights is None:
        _scale(block, stack, scale)
    else:
        extension.load({key: tensor for key, tensor in weights.items() if key.startswith(prefix)})
    return extension


def _copy(model: PreTrainedModel, source: nn.Module, stack: Stack) -> nn.Module:
    """The block before, as its base has it: unquantised, and without the adapters that are in force."""
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    block = deepcopy(source, {id(config): config for config in configs})
    dtype_of = target_dtypes(model, model.get_input_embeddings().weight.dtype)
    adapted = [path for path, module in block.named_modules() if hasattr(module, "base_layer")]
    for path in adapted:
        _put(block, path, block.get_submodule(path).base_layer)
    for path, module in linear_modules(block).items():
        if is_quantized(module):
            _put(block, path, _unquantized(submodule(source, path), dtype_of(path)))
    if stack.relative_bias:
        attention = block.get_submodule(stack.relative_bias)
        if attention.has_relative_attention_bias:  # only a stack's first block owns one and hands it to the others
            attention.has_relative_attention_bias = False
            del attention.relative_attention_bias
    return block.requires_grad_(True).train(source.training)


def _put(block: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _unquantized(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """PEFT's own helper is not used: on a CPU it moves int8 weights in place, after which the base cannot run."""
    module = getattr(module, "base_layer", module)
    weight = dequantized(module, dtype)
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype, copy=True))
    return linear


def _narrow(block: nn.Module, stack: Stack, width: int) -> None:
    """Leave an unquantised block's MLP its `width` neurons with the largest product of in- and outgoing norms.

    Raises:
        ExtensionRefused: it has fewer.
    """
    modules = linear_modules(block)
    inputs = [modules[path] for path in stack.mlp_inputs if path in modules]
    output = modules[stack.outputs[-1]]
    have = _weight(output).shape[1]
    if not 1 <= width <= have:
        raise ExtensionRefused("layer.mlp_width", f"must be 1 to {have}, the MLP's neurons, got {width}")
    importance = _weight(output).float().norm(dim=0)
    for module in inputs:
        importance = importance * _weight(module).float().norm(dim=1)
    kept = importance.topk(width).indices.sort().values
    for module in inputs:
        _resize(module, _weight(module)[kept], None if module.bias is None else module.bias.detach()[kept])
    _resize(output, _weight(output)[:, kept], None)


def _weight(module: nn.Linear | Conv1D) -> torch.Tensor:
    """[out, in] of a linear map; Conv1D keeps it the other way round."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _resize(module: nn.Linear | Conv1D, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Give a linear map another weight [out, in] and bias [out]."""
    if isinstance(module, Conv1D):
        module.nf, module.nx = weight.shape
        module.weight = nn.Parameter(weight.T.contiguous())
    else:
        module.out_features, module.in_features = weight.shape
        module.weight = nn.Parameter(weight.clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())


def _scale(block: nn.Module, stack: Stack, scale: float) -> None:
    with torch.no_grad():
        if stack.branch_norms and scale > 0:
            for path in stack.branch_norms:
                weight = block.get_submodule(path).weight
                weight.add_(stack.gain_offset).mul_(scale).sub_(stack.gain_offset)
            return
        for path in stack.outputs:
            for parameter in block.get_submodule(path).parameters():
                parameter.mul_(scale)


def _edits(
    model: PreTrainedModel, stack: Stack, blocks: nn.ModuleList, block: nn.Module, index: int
) -> tuple[Edit, ...]:
    after = [*blocks[:index], block, *blocks[index:]]
    parent, _, name = stack.blocks.rpartition(".")
    owner = model.get_submodule(parent)
    edits = [Edit(owner, name, nn.ModuleList(after))]
    for number, moved in enumerate(after):
        edits.extend(
            Edit(module, "layer_idx", number)
            for module in moved.modules()
            if getattr(module, "layer_idx", number) not in (None, number)
        )
    return (*edits, *_config_edits(model, stack, owner, len(after), index))


def _config_edits(model: PreTrainedModel, stack: Stack, owner: nn.Module, count: int, index: int) -> Sequence[Edit]:
    """T5's stacks have configs of their own, where each calls its number of layers `num_layers`."""
    edits = [Edit(model.config, stack.count, count)]
    if owner.config is not model.config:
        edits.append(Edit(owner.config, "num_layers", count))
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        edits.append(Edit(model.config, "layer_types", [*types[:index], types[index - 1], *types[index:]]))
    return edits


def _renumber_new(block: nn.Module, index: int) -> None:
    for module in block.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = index
