"""A trained Matryoshka transcoder: reads an MLP's input, reconstructs its output from a few active latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.residency.families import SITES, site_of
from services.residency.lenses import transcoder_files
from services.residency.lenses.codes import Codes, starts, weighted_rows
from services.residency.lenses.selection import ACTIVATIONS, Encoder, select_above, select_topk


@dataclass(frozen=True, slots=True)
class TranscoderShape:
    """What the weights alone do not say.

    Attributes:
        activation: `topk` keeps the top_k largest of every row; `batch_topk` and `jumprelu` those above the thresholds.
        top_k: active latents per row (topk) or on average (the others).
        group_sizes: increments of the nested groups; they sum to the dictionary's size.
    """

    activation: str
    top_k: int
    group_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if not self.group_sizes or min(self.group_sizes) < 1:
            raise ValueError("group_sizes: every group needs at least one latent")
        if not 1 <= self.top_k <= self.dict_size:
            raise ValueError(f"top_k: {self.top_k} is not between 1 and the dictionary's {self.dict_size}")

    @property
    def dict_size(self) -> int:
        """Latents in all."""
        return sum(self.group_sizes)

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """Cumulative widths of the nested prefixes; the last is the whole dictionary."""
        return tuple(accumulate(self.group_sizes))


class Transcoder(nn.Module):
    """y_hat = decode(encode(x)) (+ x @ W_skip.T); weights in units of x and y as they are, nothing else to apply.

    Attributes:
        W_enc: [d_in, dict_size]. b_enc: [dict_size]. W_dec: [dict_size, d_out]. b_dec: [d_out], the output's bias only.
        threshold: [dict_size], in units of pre-activations; what batch_topk and jumprelu select by, and what other
            tools use in place of a top-k.
        W_skip: [d_out, d_in] or None.
        info: plain JSON that travels with the weights: hook points, base, training figures.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    W_skip: Tensor | None

    def __init__(self, shape: TranscoderShape, weights: dict[str, Tensor], info: dict[str, Any] | None = None) -> None:
        """Take the weights; see the class for their names and shapes.

        Raises:
            ValueError: a tensor is missing, or its shape does not fit the others; it is named.
        """
        super().__init__()
        self.shape = shape
        self.info = dict(info or {})
        transcoder_files.check(weights, shape.dict_size)
        # rows of one latent lie together, for the encoder as for the decoder
        self.register_buffer("W_enc", weights["W_enc"].T.contiguous().T)
        for name in ("b_enc", "W_dec", "b_dec", "threshold"):
            self.register_buffer(name, weights[name].contiguous())
        skip = weights.get("W_skip")
        self.register_buffer("W_skip", None if skip is None else skip.contiguous())

    @property
    def d_in(self) -> int:
        """Width of what is read."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.W_dec.shape[1]

    @property
    def dict_size(self) -> int:
        """Latents."""
        return self.shape.dict_size

    @property
    def reads(self) -> str:
        """Hook point of the tensor that is read: normalised activations with the gain applied are the MLP's input.

        Raises:
            ValueError: the info names no source, or none that is a hook point.
        """
        named = str(self.info.get("source_hook_point", ""))
        layer, site = site_of(named)
        if site == "ln2_normalized" and self.info.get("apply_rmsnorm_scaling", True):
            return f"blocks.{layer}.{SITES['mlp_in']}"
        return named

    def width(self, groups: int | None) -> int:
        """Latents in the first `groups` groups; all when None.

        Raises:
            ValueError: there are not that many groups.
        """
        widths = self.shape.prefix_widths
        if groups is None:
            return widths[-1]
        if not 1 <= groups <= len(widths):
            raise ValueError(f"prefix: {groups} is not between 1 and the transcoder's {len(widths)} groups")
        return widths[groups - 1]

    @torch.no_grad()
    def encode_sparse(self, x: Tensor, groups: int | None = None) -> Codes:
        """Active latents of x [N, d_in], selected over the whole dictionary; `groups` cuts the tail afterwards."""
        encoder = Encoder(self.W_enc.T, self.b_enc)
        x = x.to(self.W_enc.dtype)
        if self.shape.activation == "topk":
            codes = select_topk(encoder, x, self.shape.top_k)
        else:
            codes = select_above(encoder, x, self.threshold)
        return codes if groups is None else codes.prefix(self.width(groups))

    def encode(self, x: Tensor, groups: int | None = None) -> Tensor:
        """Dense codes [N, dict_size] of x [N, d_in]; zero where inactive."""
        return self.encode_sparse(x, groups).dense()

    @torch.no_grad()
    def decode(self, z: Tensor, groups: int | None = None) -> Tensor:
        """[N, d_out] from dense codes [N, dict_size], from the first `groups` groups; without the skip path."""
        width = self.width(groups)
        return torch.addmm(self.b_dec, z[:, :width].to(self.W_dec.dtype), self.W_dec[:width])

    @torch.no_grad()
    def decode_sparse(self, codes: Codes) -> Tensor:
        """[N, d_out] from codes; without the skip path."""
        return self.b_dec + weighted_rows(self.W_dec, codes.latent, codes.value, starts(codes.row, codes.rows))

    @torch.no_grad()
    def forward(self, x: Tensor, groups: int | None = None) -> Tensor:
        """y_hat [N, d_out] of x [N, d_in], in the weights' dtype."""
        return self._with_skip(self.decode_sparse(self.encode_sparse(x, groups)), x)

    @torch.no_grad()
    def prefixes(self, x: Tensor) -> tuple[Codes, Tensor]:
        """Codes of x [N, d_in], and the reconstruction of every prefix from one sparse decode, [groups, N, d_out]."""
        codes = self.encode_sparse(x)
        parts = decode_groups(codes, self.W_dec, self.shape.prefix_widths)
        parts[0] += self._with_skip(self.b_dec.expand(len(x), -1), x)
        for smaller, larger in pairwise(parts):
            larger.add_(smaller)
        return codes, parts

    def _with_skip(self, y_hat: Tensor, x: Tensor) -> Tensor:
        return y_hat if self.W_skip is None else y_hat + x.to(self.W_skip.dtype) @ self.W_skip.T

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path`: SAELens' `cfg.json` and `sae_weights.safetensors`, and `transcoder.json`, ours."""
        weights = {name: tensor for name, tensor in self.state_dict().items() if tensor is not None}
        config = {"activation": self.shape.activation, "top_k": self.shape.top_k, "group_sizes": self.shape.group_sizes}
        transcoder_files.write(Path(path), weights, config, self.info)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Transcoder:
        """Read a folder that `save` wrote; every weight comes back bit for bit.

        Raises:
            ValueError: a file is missing, cut short or says something impossible; the message names the file.
        """
        weights, config, info = transcoder_files.read(Path(path), device)
        shape = TranscoderShape(config["activation"], config["top_k"], tuple(config["group_sizes"]))
        return cls(shape, weights, info)


def group_of(latent: Tensor, prefix_widths: Sequence[int]) -> Tensor:
    """int64 [nnz]: the group that each latent, int64 [nnz], belongs to."""
    return torch.bucketize(latent, torch.tensor(prefix_widths, device=latent.device), right=True)


def decode_groups(codes: Codes, W_dec: Tensor, prefix_widths: Sequence[int]) -> Tensor:
    """[groups, N, d_out]: what each group adds to the reconstruction. One sparse product for all of them."""
    groups = len(prefix_widths)
    bag = group_of(codes.latent, prefix_widths) + codes.row * groups
    parts = weighted_rows(W_dec, codes.latent, codes.value, starts(bag, codes.rows * groups))
    return parts.view(codes.rows, groups, -1).transpose(0, 1)
