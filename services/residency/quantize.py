"""Turn the linear maps of a model into int8 or int4 modules, one weight at a time: bitsandbytes', where it runs.

Everything else (embeddings, norms, the unembedding) keeps its dtype. Two settings are measured necessities: int8
without outlier decomposition (`llm_int8_threshold` 0.0), since with the default a row's result depends on its batch;
int4 without the repacking for avx512_bf16, which is lossy, changes the weights at the first forward and leaves LoRA
without gradients.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from services.residency import weight_only
from services.residency.kernels import TORCH, kernel_of
from services.residency.weight_only import WeightOnlyLinear

Quantization = Literal["none", "fp16", "bf16", "int8", "int4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

CAST: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""dtype that a quantization converts to; the others keep the checkpoint's for what they do not quantise."""

INT8_THRESHOLD = 0.0
INT4_BLOCK = 64
INT4_NESTED_BLOCK = 256
_INT4_TABLES = (16 + 256 + 1) * 4
"""bitsandbytes keeps per weight: the 16 values of nf4, the 256 of the nested code and the offset, float32."""


def linear_modules(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The modules that int8 and int4 replace, by path: every linear map but the unembedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def state_bytes(quantization: str, out_features: int, in_features: int, device: str) -> int:
    """Bytes of scales and tables beside one quantised weight."""
    if kernel_of(quantization, device) == TORCH:
        return weight_only.state_bytes(quantization, out_features, in_features)
    if quantization == "int8":
        return 4 * out_features
    blocks = math.ceil(out_features * in_features / INT4_BLOCK)
    return blocks + 4 * math.ceil(blocks / INT4_NESTED_BLOCK) + _INT4_TABLES


def weight_bytes(quantization: str, numel: int) -> int:
    """Bytes of one quantised weight without its scales."""
    return numel if quantization == "int8" else math.ceil(numel / 2)


def bitsandbytes_linear(weight: Tensor, *, bias: bool, quantization: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A bitsandbytes module with the given weight; its bias, where there is one, is on the meta device still.

    Args:
        weight: [out, in] on the CPU, floating point.
        bias: whether the module adds one.
        quantization: int8 or int4 (nf4 with double quantisation).
        dtype: what int4 computes in; int8 follows its input.
        device: where the quantised weight goes.
    """
    import bitsandbytes as bnb  # noqa: PLC0415 - seconds to import, and only two quantizations need it

    out_features, in_features = weight.shape
    module = _empty_linear(in_features, out_features, bias, quantization, dtype)
    if quantization == "int8":
        module.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        parameter = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", module=module)
        module.weight = parameter.to(device)
    return module


def _empty_linear(in_features: int, out_features: int, bias: bool, quantization: str, dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes module on the meta device."""
    import bitsandbytes as bnb  # noqa: PLC0415 - as above

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # warns at every float32 forward
    if quantization == "int8":
        return bnb.nn.Linear8bitLt(
            in_features, out_features, bias=bias, has_fp16_weights=False, threshold=INT8_THRESHOLD, device="meta"
        )
    module: nn.Module = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    module.support_avx512bf16_for_cpu = False
    return module


def replace_linear(
    model: nn.Module, path: str, stored: Tensor, *, quantization: str, dtype: torch.dtype, device: str
) -> None:
    """Put a quantised module in the place of the linear map at `path`, keeping its bias parameter.

    `stored` is the weight as the checkpoint holds it: [out, in], or [in, out] for GPT-2's Conv1D.
    """
    old = model.get_submodule(path)
    weight = stored.T.contiguous() if isinstance(old, Conv1D) else stored
    if kernel_of(quantization, device) == TORCH:
        new: nn.Module = WeightOnlyLinear.of(weight, quantization, device)
    else:
        new = bitsandbytes_linear(
            weight, bias=old.bias is not None, quantization=quantization, dtype=dtype, device=device
        )
    _replace(model, path, new)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent.get_submodule(name)
    new.bias = old.bias
    new.train(old.training)
    setattr(parent, name, new)


def is_quantized(module: nn.Module) -> bool:
    """Whether any module in it holds its weight in 8 or 4 bits."""
    return any(isinstance(each, WeightOnlyLinear) or _is_bitsandbytes(each) for each in module.modules())


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes")


def dequantized(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a quantised linear map stands for."""
    import bitsandbytes as bnb  # noqa: PLC0415 - as in `bitsandbytes_linear`

    if isinstance(module, WeightOnlyLinear):
        return module.dequantized(dtype)
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    state: Any = module.state
    scales = state.SCB if state.SCB is not None else weight.SCB
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales).to(dtype)


def parts_of(module: nn.Module) -> dict[str, Tensor]:
    """What a quantised module's weight consists of, for `put_back`; nothing for other modules."""
    if isinstance(module, WeightOnlyLinear):
        return module.parts
    if not _is_bitsandbytes(module):
        return {}
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        return {"weight": weight.data, **weight.quant_state.as_dict(packed=True)}
    scales = weight.SCB if weight.SCB is not None else module.state.SCB
    return {"weight": weight.data, "SCB": scales}


def put_back(
    model: nn.Module, path: str, parts: dict[str, Tensor], *, quantization: str, dtype: torch.dtype, device: str
) -> None:
    """Put a module of `parts_of` another model's in the place of the linear map at `path`, keeping its bias."""
    old = model.get_submodule(path)
    out_features, in_features = old.weight.T.shape if isinstance(old, Conv1D) else old.weight.shape
    if kernel_of(quantization, device) == TORCH:
        own = WeightOnlyLinear(in_features, out_features, quantization)
        own.put({name: part.to(device) for name, part in parts.items()})
        _replace(model, path, own)
        return
    import bitsandbytes as bnb  # noqa: PLC0415 - as in `bitsandbytes_linear`

    weight = parts.pop("weight").to(device)
    module = _empty_linear(in_features, out_features, old.bias is not None, quantization, dtype)
    if quantization == "int8":
        module.weight = bnb.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=parts["SCB"].to(device)
        )
    else:
        module.weight = bnb.nn.Params4bit.from_prequantized(weight, parts, device=device, module=module)
    _replace(model, path, module)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that holds the model's memory, by name: parameters, buffers and bitsandbytes' scales and tables."""
    found = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        state = getattr(module, "state", None)
        weight = getattr(module, "weight", None)
        scales = getattr(state, "SCB", None) if state is not None else None
        scales = scales if scales is not None else getattr(weight, "SCB", None)
        if isinstance(scales, Tensor):
            found[f"{path}.SCB"] = scales
        found.update(_quant_state(f"{path}.quant_state", getattr(weight, "quant_state", None)))
    return found


def _quant_state(prefix: str, state: object) -> dict[str, Tensor]:
    if state is None:
        return {}
    found = {f"{prefix}.{key}": value for key, value in vars(state).items() if isinstance(value, Tensor)}
    found.update(_quant_state(f"{prefix}.nested", getattr(state, "state2", None)))
    return found


def resident_bytes(model: nn.Module) -> int:
    """Bytes of memory that the model's tensors hold; a tied or shared tensor counts once."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in tensors_of(model).values()
        if tensor.device.type != "meta"
    }
    return sum(storages.values())
