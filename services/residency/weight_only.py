"""int8 and int4 weights in plain torch, for devices where bitsandbytes cannot run: stored small, computed as floats.

int8 is absmax per output row. int4 is nf4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E): blocks of 64 along the
flattened weight, each with its largest magnitude, which is itself stored in 8 bits by groups of 256 (section 3,
double quantisation, linear here).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK, NESTED_BLOCK = 64, 256
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
PARTS = {"int8": ("scales",), "int4": ("largest", "nested", "offset", "code")}
"""Buffers beside the weight."""


class WeightOnlyLinear(nn.Linear):
    """A linear map whose weight is int8 [out, in], or pairs of 4-bit indices [ceil(out * in / 2)]; see the module."""

    def __init__(self, in_features: int, out_features: int, quantization: str) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.quantization = quantization

    @classmethod
    def of(cls, weight: Tensor, quantization: str, device: str) -> WeightOnlyLinear:
        """Quantise a weight [out, in]; the rounding is done on the CPU, so that every device has the same bits."""
        parts = _int8(weight.float()) if quantization == "int8" else _int4(weight.float())
        made = cls(weight.shape[1], weight.shape[0], quantization)
        made.put({name: part.to(device) for name, part in parts.items()})
        return made

    def put(self, parts: dict[str, Tensor]) -> None:
        """Take over a weight and its scales, by the names of `PARTS`, as they are."""
        self.weight = nn.Parameter(parts["weight"], requires_grad=False)
        for name in PARTS[self.quantization]:
            self.register_buffer(name, parts[name], persistent=False)

    @property
    def parts(self) -> dict[str, Tensor]:
        """What `put` takes."""
        return {"weight": self.weight.data, **{name: getattr(self, name) for name in PARTS[self.quantization]}}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that it stands for."""
        if self.quantization == "int8":
            return self.weight.to(dtype) * self.scales.to(dtype)[:, None]
        indices = torch.stack((self.weight >> 4, self.weight & 15), -1).flatten().int()
        largest = self.largest.float() * self.nested.repeat_interleave(NESTED_BLOCK)[: len(self.largest)] + self.offset
        count = self.out_features * self.in_features
        values = self.code[indices[:count]]
        values = functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK) * largest[:, None]
        return values.flatten()[:count].view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the dtype of `x`."""
        return functional.linear(x, self.dequantized(x.dtype), self.bias)


def state_bytes(quantization: str, out_features: int, in_features: int) -> int:
    """Bytes of what `PARTS` names."""
    if quantization == "int8":
        return 4 * out_features
    blocks = math.ceil(out_features * in_features / BLOCK)
    return blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 + 4 * len(NF4)


def _int8(weight: Tensor) -> dict[str, Tensor]:
    scales = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"weight": (weight / scales[:, None]).round().to(torch.int8), "scales": scales}


def _int4(weight: Tensor) -> dict[str, Tensor]:
    flat = weight.flatten()
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    stored = _nested(largest)
    code = torch.tensor(NF4)
    between = (code[1:] + code[:-1]) / 2
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    indices = torch.bucketize(scaled.flatten()[: len(flat)], between).to(torch.uint8)
    high, low = functional.pad(indices, (0, len(flat) % 2)).view(-1, 2).unbind(1)
    return {"weight": high << 4 | low, "code": code, **stored}


def _nested(largest: Tensor) -> dict[str, Tensor]:
    """8 bits for each of [blocks], about their mean."""
    offset = largest.mean()
    centred = functional.pad(largest - offset, (0, -len(largest) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = centred.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    rounded = (centred / nested[:, None]).round().to(torch.int8).flatten()[: len(largest)]
    return {"largest": rounded.clone(), "nested": nested, "offset": offset.reshape(1)}
