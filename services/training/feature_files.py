"""Feature samples as files: `features.safetensors` and `features.json`; and as the JSON of feature dashboards.

The latter is what SAEDashboard's neuronpedia runner writes and Neuronpedia takes: `batch-<n>.json`, each with
`model_id`, `layer`, `sae_set` and `features`. Tables of correlated neurons and histograms, which we do not have, are
empty there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.training.compute.features import BEFORE

TENSORS, FACTS = "features.safetensors", "features.json"
FEATURES_A_BATCH = 256
_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Context:
    """A latent's activations on a piece of text; the token it was chosen for is at `peak`."""

    tokens: Sequence[str]
    token_ids: Sequence[int]
    values: Sequence[float]
    peak: int


@dataclass(frozen=True, slots=True)
class FeatureSample:
    """What is known of one latent."""

    feature: int
    density: float
    """Part of the tokens that it was active on."""
    contexts: Sequence[Context]
    top_logits: Sequence[tuple[int, str, float]]
    bottom_logits: Sequence[tuple[int, str, float]]
    nearest: Sequence[tuple[int, float]]
    """Other latents and the cosine of their decoder rows with its own."""


def write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write samples into an empty folder.

    Args:
        folder: where.
        tensors: latent, value, tokens, values (see `Contexts`), counts [D], logit_ids, logits [D, 2k], nearest,
            cosines [D, n].
        facts: rows, strings (token id to text), model_id, layer, dataset_id, transcoder_id.
    """
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


class Samples:
    """Reads what `write` wrote; only what is asked for is read from the disk."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / TENSORS
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self._strings: dict[str, str] = self.facts["strings"]

    def of(self, feature: int) -> FeatureSample:
        """One latent's."""
        with safe_open(self._file, "pt") as stored:
            latent = stored.get_tensor("latent")
            first, last = torch.searchsorted(latent, torch.tensor([feature, feature + 1])).tolist()
            tokens, values = (stored.get_slice(name)[first:last] for name in ("tokens", "values"))
            rows = {name: stored.get_slice(name)[feature].tolist() for name in _BY_LATENT}
        return self._sample(feature, tokens, values, rows)

    def all(self) -> Iterator[FeatureSample]:
        """Every latent that was active."""
        stored = load_file(self._file)
        ends = torch.bincount(stored["latent"], minlength=len(stored["counts"])).cumsum(0).tolist()
        first = 0
        for feature, last in enumerate(ends):
            if last > first:
                rows = {name: stored[name][feature].tolist() for name in _BY_LATENT}
                yield self._sample(feature, stored["tokens"][first:last], stored["values"][first:last], rows)
            first = last

    def _sample(self, feature: int, tokens: Tensor, values: Tensor, rows: Mapping[str, Any]) -> FeatureSample:
        logits = [
            (token, self._text(token), value) for token, value in zip(rows["logit_ids"], rows["logits"], strict=True)
        ]
        half = len(logits) // 2
        return FeatureSample(
            feature=feature,
            density=rows["counts"] / self.facts["rows"],
            contexts=[self._context(*pair) for pair in zip(tokens.tolist(), values.tolist(), strict=True)],
            top_logits=logits[:half],
            bottom_logits=logits[half:],
            nearest=list(zip(rows["nearest"], rows["cosines"], strict=True)),
        )

    def _context(self, tokens: list[int], values: list[float]) -> Context:
        kept = [place for place, token in enumerate(tokens) if token >= 0]
        ids = [tokens[place] for place in kept]
        shown = [values[place] for place in kept]
        return Context([self._text(token) for token in ids], ids, shown, kept.index(BEFORE))

    def _text(self, token: int) -> str:
        return self._strings[str(token)]


_BY_LATENT = ("counts", "logit_ids", "logits", "nearest", "cosines")


def write_dashboards(samples: Samples, folder: Path) -> None:
    """`batch-<n>.json` for all latents that were active."""
    batch: list[dict[str, Any]] = []
    number = 0
    for sample in samples.all():
        batch.append(dashboard(sample, samples.facts))
        if len(batch) == FEATURES_A_BATCH:
            _write_batch(folder, number, batch, samples.facts)
            batch, number = [], number + 1
    if batch or not number:
        _write_batch(folder, number, batch, samples.facts)


def dashboard(sample: FeatureSample, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One latent as a feature dashboard has it; the strongest contexts are its group of top activations."""
    strongest = max((max(context.values) for context in sample.contexts), default=0.0)
    empty: dict[str, Any] = {name: [] for name in _EMPTY}
    return empty | {
        "feature_index": sample.feature,
        "neg_str": [text for _, text, _ in sample.bottom_logits],
        "neg_values": [value for _, _, value in sample.bottom_logits],
        "pos_str": [text for _, text, _ in sample.top_logits],
        "pos_values": [value for _, _, value in sample.top_logits],
        "frac_nonzero": sample.density,
        "n_prompts_total": facts["sequences"],
        "n_tokens_in_prompt": facts["length"],
        "dataset": facts["dataset_id"],
        "activations": [
            {
                "bin_min": -1,
                "bin_max": strongest,
                "bin_contains": -1,
                "tokens": list(context.tokens),
                "values": list(context.values),
                "qualifying_token_index": context.peak,
            }
            for context in sample.contexts
        ],
    }


def _write_batch(folder: Path, number: int, features: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    content = {
        "model_id": facts["model_id"],
        "layer": facts["layer"],
        "sae_set": facts["transcoder_id"],
        "sae_id_suffix": None,
        "features": features,
    }
    (folder / f"batch-{number}.json").write_text(json.dumps(content), encoding="utf-8")
