"""What an evaluation does with a model: one of the service, or one over all devices of a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.kit import errors
from services.residency.failures import for_callers
from services.residency.families import Family, base_model, family_of, submodule
from services.residency.lenses.transcoder import Transcoder as Weights
from services.residency.loading import load_tokenizer
from services.residency.split import load_split
from services.training import feature_files, state_files
from services.training.compute.evaluation import Evaluation
from services.training.compute.features import FeatureSampler, logit_effects, nearest_rows
from services.training.compute.trainer import coders_of
from services.training.dialogue import Found, Judge, Message, Passed, Spread
from services.training.domain import Judged
from services.training.job_ports import Batch

LEAST_TOLD_SECONDS = 0.5
_PARTS = ("ids", "mask", "counted")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is judged: the files of a transcoder, or of a checkpoint with the coder's name."""

    folder: str
    coder: str = ""
    hook_points: Mapping[str, Any] = field(default_factory=dict)
    """Of the coder."""

    @classmethod
    def of(cls, judged: Judged, folder: Path) -> Subject:
        """With its files in `folder`."""
        if judged.coder is None:
            return cls(str(folder))
        return cls(str(folder), judged.coder.name, judged.coder.hook_points)

    @property
    def nbytes(self) -> int:
        """Of its files."""
        return sum(file.stat().st_size for file in Path(self.folder).iterdir())

    def weights(self, device: str) -> Weights:
        """Of the transcoder, or of a checkpoint's coder as it was then."""
        if not self.coder:
            return Weights.load(Path(self.folder), device)
        (tensors, facts), _ = state_files.read(Path(self.folder))
        (coder,) = coders_of((tensors, {**facts, "coders": {self.coder: facts["coders"][self.coder]}}))
        with torch.no_grad():
            return coder.transcoder(dict(self.hook_points)).to(device)


def steps_of(evaluation: Evaluation, batches: Sequence[Batch]) -> list[tuple[Callable[..., None], tuple[Tensor, ...]]]:
    """Both passes, batch by batch."""
    return [(evaluation.read, batch) for batch in batches] + [(evaluation.score, batch[:2]) for batch in batches]


def on(device: str, step: Callable[..., None], batch: tuple[Tensor, ...]) -> None:
    """One of the steps."""
    step(*(part.to(device) for part in batch))


def figures_of(evaluation: Evaluation, seconds: float) -> dict[str, Any]:
    """What was found, under API.md's names.

    Raises:
        errors.Invalid: the text has no token to compare.
    """
    try:
        found = asdict(evaluation.result())
    except ValueError as error:
        raise errors.Invalid.of("dataset_id", str(error)) from error
    per_prefix = found["fvu_per_prefix"]
    return {
        **found,
        "fvu_min": min(per_prefix),
        "fvu_max": max(per_prefix),
        "fvu_mean": sum(per_prefix) / len(per_prefix),
        "prefix": len(per_prefix),
        "seconds": seconds,
    }


def sampler_of(weights: Weights, most: int, device: str) -> FeatureSampler | None:
    """For `most` contexts of every latent, none when 0."""
    return FeatureSampler(weights.dict_size, most, device) if most else None


@dataclass(frozen=True, slots=True)
class Sampled:
    """Feature samples, and what tells more of their latents."""

    sampler: FeatureSampler
    weights: Weights
    model: nn.Module
    family: Family
    tokenizer: Any

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Contexts, and what only the weights tell: effects on the logits and neighbours; texts of all tokens there."""
        sampler, base, device = self.sampler, base_model(self.model), self.weights.W_dec.device
        norm = submodule(base, self.family.final_norm).weight.detach() + self.family.gain_offset
        unembedding = submodule(base, self.family.unembedding).weight.detach()
        logit_ids, logits = logit_effects(self.weights, unembedding.to(device), norm.to(device))
        nearest, cosines = nearest_rows(self.weights)
        contexts = sampler.contexts
        tensors = {"latent": contexts.latent, "tokens": contexts.tokens, "values": contexts.values}
        tensors |= {"counts": sampler.counts, "logit_ids": logit_ids, "logits": logits}
        used = torch.cat([contexts.tokens.flatten(), logit_ids.flatten()]).unique().tolist()
        texts = {str(token): self._text_of(token) for token in used if token >= 0}
        told = {"strings": texts, "rows": sampler.rows, "sequences": sampler.sequences, "length": sampler.length}
        feature_files.write(folder, {**tensors, "nearest": nearest, "cosines": cosines}, {**facts, **told})

    def _text_of(self, token: int) -> str:
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    """For `Judge.batches`."""
    save_file(
        {
            f"{name}.{number}": part.contiguous()
            for number, batch in enumerate(batches)
            for name, part in zip(_PARTS, batch, strict=True)
        },
        path,
    )


def judge(start: Judge, send: Callable[[Message], object]) -> None:
    """The work of a process that has the model over all of its devices; rows and transcoder are on the first one.

    Raises:
        errors.LensmeshError: the model cannot be loaded, the text has no token to compare, or memory ran out.
    """
    spread = Spread(**start.model)
    device, directory = spread.devices[0], Path(spread.directory)
    with for_callers():
        model = load_split(directory, spread.quantization, spread.spread, spread.devices)
        family, weights = family_of(model), Subject(**start.subject).weights(device)
        stored = load_file(start.batches)
        batches = [tuple(stored[f"{name}.{n}"] for name in _PARTS) for n in range(len(stored) // len(_PARTS))]
        sampler = sampler_of(weights, start.samples_per_feature, device)
        begin = told = time.monotonic()
        evaluation = Evaluation(model, family, weights, start.prefix or None, sampler)
        for done, (step, batch) in enumerate(steps_of(evaluation, batches), start=1):
            on(device, step, batch)
            if time.monotonic() - told >= LEAST_TOLD_SECONDS:
                told = time.monotonic()
                send(Passed(done))
        figures = figures_of(evaluation, time.monotonic() - begin)
        if sampler is not None:
            sampled = Sampled(sampler, weights, model, family, load_tokenizer(directory))
            sampled.write(Path(start.samples), start.facts)
    send(Found(figures))
