"""BatchTopK's selection: the strongest codes of a whole batch together, over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.residency.lenses.codes import Codes
from services.residency.lenses.selection import Encoder, select_above, select_topk
from services.training.compute.ranks import ALONE, Ranks


def select_batch_topk(encoder: Encoder, x: Tensor, k: int, ranks: Ranks = ALONE, likely: Tensor | None = None) -> Codes:
    """Codes of the N * k largest positive pre-activations of all of x [N, d_in] together, N over all ranks; exact.

    BatchTopK (Bussmann et al. 2024, arXiv:2412.06410, eq. 3) in two stages: four times k candidates of every row, and
    the best of them all. A row all of whose candidates won may hide more winners; but none is below the least of these,
    so that everything above that, if need be, holds them all. Where enough are above `likely`, a scalar tensor that is
    the same on all ranks, they are picked from these in one pass.
    """
    dict_size, width, wanted = len(encoder.weight), min(4 * k, len(encoder.weight)), ranks.world * len(x) * k
    if likely is not None and likely > 0:
        codes = select_above(encoder, x, likely)
        if int(ranks.total(torch.tensor(len(codes), device=x.device))) >= wanted:
            return _strongest(codes, wanted, ranks)
    best = _strongest(select_topk(encoder, x, width), wanted, ranks)
    full = torch.bincount(best.row, minlength=len(x)).max() == width
    if width == dict_size or not int(ranks.total(full.long())):
        return best
    some = best.value.min() if len(best) else best.value.new_tensor(math.inf)
    few = int(ranks.total(torch.tensor(len(best), device=x.device))) < wanted
    least = torch.zeros_like(some) if few else torch.nextafter(ranks.least(some), torch.zeros_like(some))
    return _strongest(select_above(encoder, x, least), wanted, ranks)


def _strongest(codes: Codes, wanted: int, ranks: Ranks) -> Codes:
    """The `wanted` largest of all ranks' codes, those of this rank; all where there are no more."""
    most = torch.zeros(ranks.world, dtype=torch.int64, device=codes.value.device)
    most[ranks.rank] = len(codes)
    sizes = ranks.total(most).tolist()
    if sum(sizes) <= wanted:
        return codes
    if ranks.world == 1:
        kept = codes.value.topk(wanted, sorted=False).indices.sort().values
    else:
        padded = codes.value.new_full((max(sizes),), -torch.inf)
        padded[: len(codes)] = codes.value
        found, start = ranks.gathered(padded).topk(wanted, sorted=False).indices, ranks.rank * max(sizes)
        kept = found[(found >= start) & (found < start + max(sizes))].sort().values - start
    return Codes(codes.rows, codes.dict_size, codes.row[kept], codes.latent[kept], codes.value[kept])
