"""Run a model with the tensor at one hook point replaced: by a reconstruction, by zeros, by a mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.residency.families import Family, locate
from services.residency.hooks import attach, forward_arguments

Replace = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Splice:
    """One replacement.

    Attributes:
        target: hook point whose tensor is replaced, for example `blocks.2.hook_mlp_out`.
        replace: (tensor at target, tensor at source or None) -> the new tensor; all [B, S, d]. It is cast to the
            target's dtype and moved to its device.
        source: hook point that runs earlier in the same pass, for a transcoder its input `blocks.2.mlp.hook_in`.
    """

    target: str
    replace: Replace
    source: str | None = None


def zeros(target: str) -> Splice:
    """Zero ablation."""
    return Splice(target, lambda y, _: torch.zeros_like(y))


def mean(target: str, value: Tensor) -> Splice:
    """Mean ablation: every position gets `value`, [d]."""
    return Splice(target, lambda y, _: value.to(y).expand_as(y))


def reconstruction(target: str, source: str, decode: Callable[[Tensor], Tensor]) -> Splice:
    """The target is what `decode` makes of the source: [N, d_in] float32 -> [N, d_out]."""

    def replace(y: Tensor, x: Tensor | None) -> Tensor:
        assert x is not None, "the splice names a source, so its hook ran first"
        return decode(x.reshape(-1, x.shape[-1]).float()).reshape(*x.shape[:-1], -1)

    return Splice(target, replace, source)


class _Open:
    """One splice in place: keeps the source's tensor between its hook and the target's."""

    def __init__(self, splice: Splice) -> None:
        self._splice = splice
        self._source: Tensor | None = None

    def see_source(self, x: Tensor) -> None:
        self._source = x

    def see_target(self, y: Tensor) -> Tensor:
        try:
            new = self._splice.replace(y, self._source)
        finally:
            self._source = None
        if new.shape != y.shape:
            raise ValueError(f"{self._splice.target} is {list(y.shape)}, its replacement {list(new.shape)}")
        return new.to(y)


@contextmanager
def spliced(model: nn.Module, family: Family, splices: Sequence[Splice]) -> Iterator[None]:
    """The model computes with these replacements inside the block, and as before outside it.

    Raises:
        UnknownHookPoint: a target or source does not exist in this model; nothing was hooked.
    """
    with ExitStack() as stack:
        for splice in splices:
            target, target_tap = locate(model, family, splice.target)
            opened = _Open(splice)
            if splice.source is not None:
                source, source_tap = locate(model, family, splice.source)
                stack.callback(attach(source, source_tap, opened.see_source).remove)
            stack.callback(attach(target, target_tap, opened.see_target).remove)
        yield


def logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Next-token logits [B, S, vocab] of one batch, ordinary (not inference) tensors, in the model's dtype."""
    with torch.no_grad():
        return model(**forward_arguments(input_ids, attention_mask)).logits


def next_token_loss(scores: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Cross entropy in nats of every token that has a predecessor, [N] float32, without masked tokens and successors.

    Args:
        scores: logits [B, S, vocab].
        input_ids: [B, S].
        attention_mask: [B, S], 1 where a token counts.
    """
    losses = nn.functional.cross_entropy(
        scores[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
    )
    if attention_mask is None:
        return losses
    counted = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    return losses[counted.flatten()]
