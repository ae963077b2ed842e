"""Read one text through several lenses: one forward pass of the base, then each lens on what it captured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from services.residency.families import Facts
from services.residency.hooks import capture_hooks
from services.residency.lenses import Base, Lens
from services.residency.splice import Splice, spliced


class TextRefused(ValueError):
    """The text cannot be given to the model; `field` is the request's field that is wrong."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


def token_ids(
    text: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None, facts: Facts, *, field: str = "text"
) -> list[int]:
    """The tokens to run: the given ones, else the text's, with the tokenizer's own special tokens.

    Args:
        text: used when `ids` is empty.
        ids: token ids.
        tokenizer: the model's.
        facts: the model's.
        field: what the text is called in the request.

    Raises:
        TextRefused: both or neither are given, an id is none of the vocabulary's, or there are more than fit.
    """
    if bool(text) == bool(ids):
        raise TextRefused(field, f"exactly one of {field} and token_ids is needed")
    named = "token_ids" if ids else field
    if text and tokenizer is None:
        raise TextRefused(field, "the model has no tokenizer; send token_ids")
    found = list(ids) if ids or tokenizer is None else tokenizer(text, verbose=False)["input_ids"]
    if not found:
        raise TextRefused(named, "holds no token")
    if len(found) > facts.context_length:
        raise TextRefused(named, f"{len(found)} tokens are more than the model's context of {facts.context_length}")
    if min(found) < 0 or max(found) >= facts.vocab_size:
        raise TextRefused(named, f"an id is not below the vocabulary's {facts.vocab_size}")
    return found


def activations(
    base: Base, lenses: Sequence[Lens], input_ids: Tensor, changes: Sequence[Splice] = ()
) -> dict[str, Tensor]:
    """What the lenses want of the base's forward pass over input_ids [1, S]: hook point to [1, S, d].

    The pass goes on with whatever `changes` put in; a tensor that is both replaced and wanted is the new one.
    """
    points = list(dict.fromkeys(point for lens in lenses for point in lens.hook_points))
    if not points or base.family is None:
        return {}
    with (
        base.extensions.using(None),
        spliced(base.model, base.family, changes),  # its hooks come before those that read
        capture_hooks(base.model, base.family, points) as capture,
    ):
        return capture.run(input_ids)


def on_device(ids: Sequence[int], base: Base) -> Tensor:
    """[1, S] int64 on the base's device."""
    return torch.tensor([list(ids)], dtype=torch.int64, device=next(base.model.parameters()).device)


def decoded(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None) -> Mapping[int, str]:
    """Each id's own text; empty where there is no tokenizer."""
    return {token: tokenizer.decode([token]) if tokenizer is not None else "" for token in set(ids)}
