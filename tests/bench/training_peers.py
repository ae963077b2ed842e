"""The public trainers as contestants; runs in their environment (sparsify, dictionary-learning, SAELens).

sparsify trains transcoders as it is. The other two train autoencoders only: their encoder is made to read x while
everything else of them sees y. Each gets its data in the scale its own documentation asks for, and its own rule for
the learning rate unless another one is given.
"""

from __future__ import annotations

import math
import os
import sys
import types
from typing import Any

import torch
from torch import Tensor

from tests.bench.training_contestants import BATCH, GROUPS, WIDTH, WIDTHS, Race

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


class Sparsify:
    """TopK transcoder, Adam; no nesting."""

    def __init__(self, race: Race) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        torch.manual_seed(0)
        config = SparseCoderConfig(
            num_latents=race.dict_size, k=race.top_k, transcode=True, skip_connection=False, normalize_decoder=False
        )
        self._coder = coder = SparseCoder(WIDTH, config, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            coder.b_dec.copy_(race.y.mean(0))
            coder.encoder.bias.copy_(-(race.x.mean(0) @ coder.encoder.weight.T))
        rate = race.learning_rate or 2e-4 / math.sqrt(race.dict_size / 2**14)
        self._optimizer = torch.optim.Adam(coder.parameters(), lr=rate)

    def step(self, x: Tensor, y: Tensor) -> object:
        out = self._coder(x, y)
        out.fvu.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return out.fvu.item()

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        found = self._coder.encode(x)
        return torch.zeros(len(x), self._coder.num_latents).scatter(1, found.top_indices, found.top_acts)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self._coder.W_dec + self._coder.b_dec


class DictionaryLearning:
    """MatryoshkaBatchTopKTrainer; rows scaled to a mean square norm of 1, as its buffer does."""

    def __init__(self, race: Race) -> None:
        stub: Any = types.ModuleType("nnsight")  # its activation buffer imports it, its trainers do not
        stub.LanguageModel = object
        sys.modules.setdefault("nnsight", stub)
        from dictionary_learning.trainers import matryoshka_batch_top_k as peer

        class Reads(peer.MatryoshkaBatchTopKSAE):
            source: Tensor

            def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
                return super().encode(self.source + self.b_dec, return_active, use_threshold)

        warm = max(1, race.steps // 20)
        self._trainer = peer.MatryoshkaBatchTopKTrainer(
            steps=race.steps, activation_dim=WIDTH, dict_size=race.dict_size, k=race.top_k, layer=0, lm_name="none",
            group_fractions=[size / sum(GROUPS) for size in GROUPS], dict_class=Reads, lr=race.learning_rate,
            warmup_steps=warm, threshold_start_step=warm, seed=0, device="cpu",
        )  # fmt: skip
        self._scale = tuple(data.square().sum(1).mean().rsqrt() for data in (race.x, race.y))
        self._number = 0

    def step(self, x: Tensor, y: Tensor) -> object:
        self._trainer.ae.source = x * self._scale[0]
        self._number += 1
        return self._trainer.update(self._number - 1, y * self._scale[1])

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Selected over the rows together, so that k is kept whatever the threshold has learned."""
        self._trainer.ae.source = x * self._scale[0]
        return self._trainer.ae.encode(x, use_threshold=False)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        coder = self._trainer.ae
        return (codes @ coder.W_dec + coder.b_dec) / self._scale[1]


class SAELens:
    """MatryoshkaBatchTopKTrainingSAE under SAETrainer; rows scaled to norms of sqrt(d), as its scaler does."""

    def __init__(self, race: Race) -> None:
        from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, SAETrainer
        from sae_lens.config import SAETrainerConfig

        class Reads(MatryoshkaBatchTopKTrainingSAE):
            source: Tensor

            def encode_with_hidden_pre(self, x: Tensor) -> Any:
                return super().encode_with_hidden_pre(self.source)

        torch.manual_seed(0)
        config = MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=WIDTH, d_sae=race.dict_size, k=race.top_k, matryoshka_widths=list(WIDTHS), device="cpu",
            apply_b_dec_to_input=False,
        )  # fmt: skip
        rate = race.learning_rate or SAETrainerConfig.lr
        trainer = SAETrainerConfig(
            total_training_samples=race.steps * BATCH, train_batch_size_samples=BATCH, device="cpu",
            lr_warm_up_steps=max(1, race.steps // 20), lr=rate, lr_end=rate / 10,
        )  # fmt: skip
        self._coder = Reads(config)
        self._trainer = SAETrainer(trainer, self._coder, iter(()))
        self._scale = tuple(math.sqrt(WIDTH) / data.norm(dim=1).mean() for data in (race.x, race.y))
        with torch.no_grad():
            self._coder.b_dec.copy_((race.y * self._scale[1]).mean(0))

    def step(self, x: Tensor, y: Tensor) -> object:
        self._coder.source = x * self._scale[0]
        self._trainer.step(y * self._scale[1])
        self._trainer.n_training_steps += 1
        return None

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Selected over the rows together; in units of unit-norm decoder rows, as it decodes them."""
        self._coder.source = x * self._scale[0]
        return self._coder.encode_with_hidden_pre(x)[0]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        coder = self._coder
        rows = coder.W_dec / coder.W_dec.norm(dim=1, keepdim=True)
        return (codes @ rows + coder.b_dec) / self._scale[1]


PEERS = {
    "sparsify, 1 prefix": Sparsify,
    "dictionary-learning": DictionaryLearning,
    "SAELens": SAELens,
}
