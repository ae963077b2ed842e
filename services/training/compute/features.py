"""Where each latent is strongest, in bounded memory; its direct effect on the logits; its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import BLOCK_ELEMENTS
from services.residency.lenses.transcoder import Transcoder

BEFORE, AFTER = 24, 7
"""Tokens of a context before and after the one where the latent is strongest."""
LOGITS, NEIGHBOURS = 10, 5


@dataclass(frozen=True, slots=True)
class Contexts:
    """Top contexts of all latents, ordered by latent, strongest first; n of them, each W = BEFORE + 1 + AFTER tokens.

    latent: int64 [n]. value: float [n], the activation at column BEFORE. tokens: int64 [n, W], -1 where the sequence
    had none. values: float [n, W], the latent's activation at each token, 0 where it was not active.
    """

    latent: Tensor
    value: Tensor
    tokens: Tensor
    values: Tensor

    def take(self, index: Tensor) -> Contexts:
        """Those that `index`, int64 [m], names, in its order."""
        return Contexts(self.latent[index], self.value[index], self.tokens[index], self.values[index])


class FeatureSampler:
    """Keeps the `most` strongest sequences of every latent: a heap a latent, all of them updated at once.

    Entries below their latent's weakest kept one are dropped first, so that after the first batches hardly any is left
    to sort.
    """

    def __init__(self, dict_size: int, most: int, device: torch.device | str = "cpu") -> None:
        """Room for `most` contexts of each of `dict_size` latents."""
        width = BEFORE + 1 + AFTER
        self._most = most
        self._floor = torch.zeros(dict_size, device=device)
        self.counts = torch.zeros(dict_size, dtype=torch.int64, device=device)
        self.rows = self.sequences = self.length = 0
        self.contexts = Contexts(
            torch.zeros(0, dtype=torch.int64, device=device),
            torch.zeros(0, device=device),
            torch.zeros(0, width, dtype=torch.int64, device=device),
            torch.zeros(0, width, device=device),
        )

    def add(self, codes: Codes, ids: Tensor, mask: Tensor, counted: Tensor) -> None:
        """Take one batch.

        Args:
            codes: of the counted tokens, in their order in the flattened batch.
            ids: int64 [B, S].
            mask: [B, S], 0 on padding.
            counted: [B, S], whose activations the codes are of.
        """
        self.counts += codes.counts()
        self.rows += codes.rows
        self.sequences, self.length = self.sequences + len(ids), max(self.length, ids.shape[1])
        place = counted.flatten().bool().nonzero()[:, 0]
        sequence = place[codes.row] // ids.shape[1]
        above = (codes.value > self._floor[codes.latent]).nonzero()[:, 0]
        once = above[_strongest(codes.latent[above] * len(ids) + sequence[above], codes.value[above], 1)]
        new = once[_strongest(codes.latent[once], codes.value[once], self._most)]
        if not len(new):
            return
        latent, value = codes.latent[new], codes.value[new].float()
        tokens, values = _windows(codes, new, place, ids, mask)
        old = self.contexts
        merged = Contexts(
            torch.cat([old.latent, latent]),
            torch.cat([old.value, value]),
            torch.cat([old.tokens, tokens]),
            torch.cat([old.values, values]),
        )
        self.contexts = merged.take(_strongest(merged.latent, merged.value, self._most))
        full = torch.bincount(self.contexts.latent, minlength=len(self._floor)) == self._most
        weakest = torch.full_like(self._floor, torch.inf).scatter_reduce(
            0, self.contexts.latent, self.contexts.value, "amin"
        )
        self._floor = torch.where(full, weakest, 0)


@torch.no_grad()
def logit_effects(transcoder: Transcoder, unembedding: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens that each latent's decoder row raises and lowers most when it is added to the last residual stream.

    Args:
        transcoder: on the device of the other two.
        unembedding: [vocab, d_out].
        gain: of the norm before it, [d_out]; its division by the stream's size is left out, it changes no order.

    Returns:
        ids int64 and values float32, both [D, 2 * LOGITS]: the largest first, then the smallest first.
    """
    count = min(LOGITS, len(unembedding))
    ids, values = [], []
    for rows in _blocks(transcoder.W_dec, len(unembedding)):
        logits = (rows if gain is None else rows * gain.to(rows)) @ unembedding.to(rows).T
        high, low = logits.topk(count, dim=1), logits.topk(count, dim=1, largest=False)
        ids.append(torch.cat([high.indices, low.indices], 1))
        values.append(torch.cat([high.values, low.values], 1))
    return torch.cat(ids), torch.cat(values).float()


@torch.no_grad()
def nearest_rows(transcoder: Transcoder) -> tuple[Tensor, Tensor]:
    """Of each latent the others whose decoder rows point the same way: ids int64 and cosines, both [D, NEIGHBOURS]."""
    unit = functional.normalize(transcoder.W_dec, dim=1)
    count = min(NEIGHBOURS, len(unit) - 1)
    ids, cosines, start = [], [], 0
    for rows in _blocks(unit, len(unit)):
        similar = rows @ unit.T
        similar[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
        found = similar.topk(count, dim=1)
        ids.append(found.indices)
        cosines.append(found.values)
        start += len(rows)
    return torch.cat(ids), torch.cat(cosines).float()


def _blocks(matrix: Tensor, width: int) -> Iterator[Tensor]:
    yield from matrix.split(max(1, BLOCK_ELEMENTS // width))


def _strongest(group: Tensor, value: Tensor, most: int) -> Tensor:
    """int64: the places of each group's `most` largest values, ordered by group, then by value, largest first."""
    order = value.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    own = group[order]
    rank = torch.arange(len(own), device=own.device) - torch.searchsorted(own, own)
    return order[rank < most]


def _windows(codes: Codes, new: Tensor, place: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and activations around the entries `new` of the codes, both [len(new), W]."""
    length = ids.shape[1]
    centre = place[codes.row[new]]
    offsets = torch.arange(-BEFORE, AFTER + 1, device=ids.device)
    column = (centre % length)[:, None] + offsets
    flat = (centre - centre % length)[:, None] + column.clamp(0, length - 1)
    there = (column >= 0) & (column < length) & mask.flatten().bool()[flat]
    tokens = torch.where(there, ids.flatten()[flat], -1)
    row_of = torch.full((ids.numel(),), -1, device=ids.device)
    row_of[place] = torch.arange(len(place), device=ids.device)
    keys = codes.row * codes.dict_size + codes.latent  # ascending: codes are ordered so
    wanted = row_of[flat] * codes.dict_size + codes.latent[new, None]
    found = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    active = there & (row_of[flat] >= 0) & (keys[found] == wanted)
    return tokens, torch.where(active, codes.value[found].float(), 0.0)
