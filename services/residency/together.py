"""Continue several prompts at once, each with an adapter of its own: one forward a token for all of them.

Every row gets what it would get alone but for rounding, which in a matrix product depends on the number of rows; a
generation that must give its bits again is made alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from services.residency.generation import TURN, Continuation
from services.residency.hooks import forward_arguments
from services.residency.lenses import Base
from services.residency.lenses.mixed import rows


@dataclass(slots=True)
class Together:
    """Generations under way on one base. `turn` belongs on the device's thread; call it until `done`."""

    base: Base
    works: Sequence[Continuation]
    """None of them begun, and none with interventions; each is as if it had been made alone afterwards."""
    keys: Sequence[str | None]
    """Extension of each; None for the bare base."""
    _state: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Every one has ended."""
        return all(work.done for work in self.works)

    def turn(self, tokens: int = TURN) -> None:
        """Make up to this many tokens of each.

        Raises:
            ExtensionRefused: an extension is more than LoRA, and cannot share a forward.
            KeyError: an extension is not attached.
        """
        with torch.no_grad(), rows(self.base.extensions, self.keys):
            for _ in range(tokens):
                if self.done:
                    return
                scores = self.base.model(**self._inputs()).logits[:, -1]
                for work, row in zip(self.works, scores, strict=True):
                    if not work.done:
                        work.take(row)

    def _inputs(self) -> dict[str, Any]:
        """Arguments of the next forward; a row that has ended repeats its last token."""
        device = next(self.base.model.parameters()).device
        if self.base.model.config.is_encoder_decoder:
            return self._seq2seq_inputs(device)
        if not self._state:
            ids, mask = _padded([work.prompt for work in self.works], device, left=True)
            self._state = {"mask": mask, "cache": DynamicCache(config=self.base.model.config)}
        else:
            ids = torch.tensor([work.tokens[-1:] for work in self.works], device=device)
            self._state["mask"] = torch.cat([self._state["mask"], self._state["mask"].new_ones(len(ids), 1)], 1)
        arguments: dict[str, Any] = forward_arguments(ids, self._state["mask"])
        if "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"][:, -ids.shape[1] :]
        return arguments | {"past_key_values": self._state["cache"], "use_cache": True}

    def _seq2seq_inputs(self, device: torch.device) -> dict[str, Any]:
        model = self.base.model
        if not self._state:
            ids, mask = _padded([work.prompt for work in self.works], device, left=False)
            self._state = {
                "encoder_outputs": model.get_encoder()(input_ids=ids, attention_mask=mask),
                "attention_mask": mask,
                "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()),
            }
        start = model.config.decoder_start_token_id
        last = [[work.tokens[-1] if work.tokens else start] for work in self.works]
        return {**self._state, "decoder_input_ids": torch.tensor(last, device=device), "use_cache": True}


def _padded(prompts: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, S], 0 where nothing is, and the mask, 1 where something is; both int64."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(list(prompt))
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
