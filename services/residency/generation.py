"""Continue a prompt a few tokens at a time, so that others get the device in between; with interventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from services.residency.families import SITES, Family, hook_points
from services.residency.lenses import Base
from services.residency.lenses.transcoder import Transcoder
from services.residency.splice import Splice, spliced

TURN = 16
"""Tokens that one turn on the device makes."""

Op = Literal["replace", "add", "scale", "zero", "mean"]


class InterventionRefused(ValueError):
    """The intervention does not fit the model; `field` is the wrong one of its fields."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


@dataclass(frozen=True, slots=True)
class Intervention:
    """A change of the forward pass at one site.

    Attributes:
        site: site alias or hook point.
        layer: base layer; unused where `site` is a whole hook point.
        op: `replace` by the vector or by a transcoder's reconstruction, `add` factor times the vector or the feature's
            decoder row, `scale` by the factor, `zero`, or `mean` over the text so far.
        vector: of the site's width.
        transcoder: an attached one, with the hook point that it reads.
        positions: token positions; all when empty.
    """

    site: str
    layer: int
    op: Op
    vector: Sequence[float] = ()
    transcoder: tuple[Transcoder, str] | None = None
    feature: int | None = None
    factor: float = 1.0
    positions: Sequence[int] = ()

    def splice(self) -> Splice:
        """The same as a replacement at a hook point.

        Raises:
            InterventionRefused: fields are missing or contradict each other.
            UnknownHookPoint: the site does not exist.
        """
        target = hook_points([self.site], [self.layer])[0] if self.site in SITES else self.site
        source = self.transcoder[1] if self.transcoder is not None and self.op == "replace" else None
        if self.op in ("replace", "add") and not self.vector and self.transcoder is None:
            raise InterventionRefused("vector", f"{self.op} needs a vector or a transcoder")
        if self.op == "add" and self.transcoder is not None:
            self._row()
        return Splice(target, self._replace, source)

    def _row(self) -> Tensor:
        assert self.transcoder is not None, "checked by the caller"
        decoder = self.transcoder[0].W_dec
        if self.feature is None or self.feature >= len(decoder):
            raise InterventionRefused("feature", f"needs a latent below {len(decoder)}")
        return decoder[self.feature]

    def _replace(self, y: Tensor, x: Tensor | None) -> Tensor:
        new = self._changed(y, x)
        if not self.positions:
            return new
        kept = y.clone()
        inside = [position for position in self.positions if position < y.shape[1]]
        kept[:, inside] = new.to(y.dtype).expand_as(y)[:, inside]
        return kept

    def _changed(self, y: Tensor, x: Tensor | None) -> Tensor:
        match self.op:
            case "zero":
                return torch.zeros_like(y)
            case "scale":
                return y * self.factor
            case "mean":
                return y.mean(1, keepdim=True).expand_as(y)
            case "add":
                return y + self.factor * self._direction(y)
            case "replace":
                if self.transcoder is not None and x is not None:
                    return self.transcoder[0](x.reshape(-1, x.shape[-1]).float()).view(*y.shape[:-1], -1)
                return self._direction(y).expand_as(y)

    def _direction(self, y: Tensor) -> Tensor:
        if self.transcoder is not None:
            return self._row().to(y)
        if len(self.vector) != y.shape[-1]:
            raise InterventionRefused("vector", f"has {len(self.vector)} numbers, the site is {y.shape[-1]} wide")
        return torch.tensor(list(self.vector), dtype=y.dtype, device=y.device)


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
            InterventionRefused: a vector is not of its site's width.
            UnknownHookPoint: a site does not exist.
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
