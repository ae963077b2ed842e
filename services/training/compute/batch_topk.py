"""BatchTopK's selection: the strongest codes of a whole batch together, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import Encoder, select_topk
from services.training.compute.ranks import ALONE, Ranks


def select_batch_topk(encoder: Encoder, x: Tensor, k: int, ranks: Ranks = ALONE) -> Codes:
    """Codes of the N * k largest positive pre-activations of all of x [N, d_in] together, N over all ranks; exact.

    BatchTopK (Bussmann et al. 2024, arXiv:2412.06410, eq. 3) in two stages: `width` candidates of every row, then the
    best of them all. A row all of whose candidates won may hide more winners; then the width is doubled.
    """
    dict_size, width, wanted = len(encoder.weight), min(4 * k, len(encoder.weight)), ranks.world * len(x) * k
    while True:
        codes = select_topk(encoder, x, width)
        if int(ranks.total(torch.tensor(len(codes), device=x.device))) <= wanted:
            return codes
        kept = _winners(codes.value, wanted, len(x) * width, ranks)
        best = Codes(codes.rows, dict_size, codes.row[kept], codes.latent[kept], codes.value[kept])
        full = torch.bincount(best.row, minlength=len(x)).max() == width
        if width == dict_size or not int(ranks.total(full.long())):
            return best
        width = min(2 * width, dict_size)


def _winners(values: Tensor, wanted: int, most: int, ranks: Ranks) -> Tensor:
    """int64, ascending: which of this rank's values, `most` at most, are among the `wanted` largest of all."""
    if ranks.world == 1:
        return values.topk(wanted, sorted=False).indices.sort().values
    padded = values.new_full((most,), -torch.inf)
    padded[: len(values)] = values
    found = ranks.gathered(padded).topk(wanted, sorted=False).indices.sort().values
    start = ranks.rank * most
    return found[(found >= start) & (found < start + most)] - start
