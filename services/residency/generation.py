"""Continue a prompt a few tokens at a time, so that others get the device in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from services.residency.families import Family
from services.residency.lenses import Base
from services.residency.splice import Splice, spliced

TURN = 16
"""Tokens that one turn on the device makes."""


@dataclass(slots=True)
class Continuation:
    """A generation under way. `turn` belongs on the device's thread; call it until `done`."""

    base: Base
    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    splices: Sequence[Splice] = ()
    end_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    """What was made so far."""
    done: bool = False
    _state: dict[str, Any] = field(default_factory=dict)
    _generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self._generator.manual_seed(self.seed)

    def turn(self, family: Family | None, tokens: int = TURN) -> None:
        """Make up to this many tokens.

        Raises:
            InterventionRefused: an intervention among the splices cannot be made at its site.
        """
        device = next(self.base.model.parameters()).device
        with torch.no_grad():
            for _ in range(tokens):
                self.take(self._scores(self._inputs(device), family))
                if self.done:
                    return

    def take(self, scores: Tensor) -> None:
        """Add the token that the logits [vocab] give."""
        self.tokens.append(self._pick(scores))
        self.done = self.tokens[-1] in self.end_ids or len(self.tokens) >= self.max_new_tokens

    def _scores(self, inputs: Mapping[str, Any], family: Family | None) -> Tensor:
        """Logits [vocab] of the next token."""
        if not self.splices:
            return self.base.model(**inputs).logits[0, -1]
        assert family is not None, "only models with hook points take interventions"
        with spliced(self.base.model, family, self.splices):
            return self.base.model(**inputs).logits[0, -1]

    def _inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments of the next forward: the last token and a cache, or everything where a splice sees positions."""
        config = self.base.model.config
        if config.is_encoder_decoder:
            return self._seq2seq_inputs(device)
        if self.splices:
            return {"input_ids": torch.tensor([[*self.prompt, *self.tokens]], device=device), "use_cache": False}
        cache = self._state.setdefault("cache", DynamicCache(config=config))
        new = self.tokens[-1:] if self.tokens else self.prompt
        return {"input_ids": torch.tensor([list(new)], device=device), "past_key_values": cache, "use_cache": True}

    def _seq2seq_inputs(self, device: torch.device) -> dict[str, Any]:
        """T5's own cache would be cut to the config's number of decoder layers, which an extension may exceed."""
        model = self.base.model
        if "encoder_outputs" not in self._state:
            source = torch.tensor([list(self.prompt)], device=device)
            self._state["encoder_outputs"] = model.get_encoder()(input_ids=source)
            self._state["cache"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        last = self.tokens[-1] if self.tokens else model.config.decoder_start_token_id
        return {
            "encoder_outputs": self._state["encoder_outputs"],
            "decoder_input_ids": torch.tensor([[last]], device=device),
            "past_key_values": self._state["cache"],
            "use_cache": True,
        }

    def _pick(self, scores: Tensor) -> int:
        if self.temperature == 0:
            return int(scores.argmax())
        chances = (scores.float().cpu() / self.temperature).softmax(-1)
        return int(torch.multinomial(chances, 1, generator=self._generator))
