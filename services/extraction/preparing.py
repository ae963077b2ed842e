"""What comes before the first batch, whether a cache is filled or a stream is fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from services.extraction.compute import Plan, identity_errors, make_plan, plan_again
from services.extraction.compute.pace import Pace, bytes_at_work, fits
from services.extraction.compute.plan import TOKENS_AT_ONCE, NothingCounted
from services.extraction.domain import BaseModel, Mode, Options, Survey, Wanted
from services.extraction.job_ports import LeasedModel
from services.extraction.ports import Catalogue, Datasets, Tokenized
from services.extraction.requests import resolve, row_bytes
from services.kit import errors
from services.residency.shards import DTYPES
from services.residency.texts import special_ids


async def look_up(
    catalogue: Catalogue, datasets: Datasets, wanted: Wanted, device: str
) -> tuple[BaseModel, Survey, Options]:
    """What a request is about, and its options with every default resolved; `device` says how much goes at once.

    Raises:
        errors.Invalid: a field is wrong.
        errors.NotFound: there is no such model or dataset.
    """
    model = await catalogue.model(wanted.model_id)
    survey = await datasets.survey(wanted.dataset_id, model)
    uri = await catalogue.extension_uri(wanted.model_id, wanted.extension_id) if wanted.extension_id else ""
    options = resolve(wanted, model, survey, uri)
    await datasets.require_usable(wanted.dataset_id, options, model)
    at_once = TOKENS_AT_ONCE["cuda" if device.startswith("cuda") else "cpu"]
    return model, survey, replace(options, batch_tokens=at_once)


def check_files(record: BaseModel, model: LeasedModel) -> None:
    """That what runs is what was registered.

    Raises:
        errors.Failed: `CHECKSUM_MISMATCH`.
    """
    if record.digest != model.description["digest"]:
        raise errors.Failed("the model's files are not those that were registered", reason="CHECKSUM_MISMATCH")


def planned(options: Options, tokenized: Tokenized, model: LeasedModel, **changes: Any) -> Plan:
    """Units and batches; `changes` go to `make_plan`.

    Raises:
        errors.Invalid: `DATASET_UNUSABLE`: no token would be a row.
    """
    lengths = tokenized.sequences.lengths
    room = {"row_bytes": row_bytes(options, model.facts, int(lengths.max()))}
    try:
        return make_plan(tokenized.sequences, **_made_with(options, model) | room | changes)
    except NothingCounted as error:
        raise errors.Invalid(str(error), reason="DATASET_UNUSABLE", violations=[("dataset_id", str(error))]) from error


def planned_once(
    options: Options,
    tokenized: Tokenized,
    model: LeasedModel,
    *,
    arrays: Mapping[str, np.ndarray] | None,
    digest: str,
) -> Plan:
    """The plan of this digest from its kept arrays, else a plan that is made now.

    Raises:
        errors.Invalid: as `planned`.
    """
    kept = None
    if arrays is not None:
        kept = plan_again(arrays, tokenized.sequences, digest, **_made_with(options, model))
    return kept or planned(options, tokenized, model)


def _made_with(options: Options, model: LeasedModel) -> dict[str, Any]:
    return {
        "layout": options.layout,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "batch_tokens": options.batch_tokens,
        "uncounted_ids": special_ids(model.tokenizer) if model.tokenizer is not None else (),
        "shuffled": not options.keep_order,
    }


def identity(options: Options, tokenized: Tokenized, plan: Plan, model: LeasedModel) -> dict[str, float]:
    """Largest relative errors of the identity check on the plan's first batch; on the device's thread.

    Raises:
        IdentityFailed: a captured pair is no input and output of its MLP.
    """
    batch = plan.units[0].batches[0]
    ids, mask = map(torch.from_numpy, tokenized.sequences.padded(batch.indices, batch.length))

    def check(part: slice) -> dict[str, float]:
        return identity_errors(model.model, model.family, options.hook_points, ids[part], mask[part])

    device = next(model.model.parameters()).device.type
    found = list(Pace().parts(len(ids), batch.length, check, device))
    return {layer: max(errors[layer] for errors in found) for layer in found[0]}


async def placed(options: Options, model: LeasedModel) -> tuple[Mode, LeasedModel]:
    """The mode that the memory left allows, and the model where it runs in it.

    Raises:
        errors.Unsupported, errors.Exhausted: mode cpu cannot be.
    """
    mode = options.mode
    if mode == "auto" and not model.on_host and not fits(model.free_bytes, _token_bytes(options, model)):
        mode = "cpu"
    return mode, model if mode != "cpu" or model.on_host else await model.host_copy()


def pace(mode: Mode, options: Options, model: LeasedModel) -> Pace:
    """How many sequences run at once."""
    match mode:
        case "full":
            return Pace()
        case "safe":
            return Pace(0, _token_bytes(options, model))
        case _:
            return Pace(model.free_bytes, _token_bytes(options, model))


def _token_bytes(options: Options, model: LeasedModel) -> int:
    return bytes_at_work(model.facts, DTYPES[options.dtype].itemsize)
