"""Rows of a model in the training's own process: every token once a pass, and a position alone says which come next."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from services.kit import errors
from services.residency.families import Family, family_of
from services.residency.hooks import capture_hooks
from services.residency.loading import load_model
from services.residency.texts import Sequences
from services.residency.tokens import TokenStore
from services.training import split_rows
from services.training.dialogue import Split
from services.training.split_rows import TOKENS, SplitRows
from tests import models

SPECIAL = 1
POINTS = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
PAIRS = {"pair": POINTS}
BATCH = 32


def sequences(lengths: list[int]) -> Sequences:
    """Each begins with a token that is not counted."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = models.batch(1, int(offsets[-1]))[0].numpy().astype(np.int32)
    ids[offsets[:-1]] = SPECIAL
    return Sequences(ids, offsets, np.arange(len(lengths)), len(lengths), 0, 0, 0)


@pytest.fixture
def lengths() -> list[int]:
    return [5 + 7 * n % 23 for n in range(24)]


@pytest.fixture
def split(tmp_path: Path, lengths: list[int]) -> Split:
    TokenStore(tmp_path).save(TOKENS, sequences(lengths))
    folder = models.saved("gpt2", 2)
    spread = {"transformer.wte": 0, "transformer.wpe": 0, "transformer.drop": 0, "transformer.h.0": 0, "lm_head": 0}
    spread |= {"transformer.h.1": 1, "transformer.ln_f": 1}
    return Split(str(folder), "none", spread, ("cpu", "cpu"), str(tmp_path), (SPECIAL,))


def of_a_pass(source: SplitRows, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """One pass as one batch."""
    return next(source.batches(source.rows, seed, number * source.rows))["pair"]


def in_order(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def test_a_pass_holds_the_pair_of_every_counted_token_once(
    split: Split, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_rows, "POOL_BYTES", 60 * 2 * models.WIDTH * 4)
    source = SplitRows(split, PAIRS, "cpu")
    assert source.rows == sum(lengths) - len(lengths)
    assert source.widths == {"pair": (models.WIDTH, models.WIDTH)}
    model = load_model(models.saved("gpt2", 2), "none")
    expected: list[dict[str, Tensor]] = []
    with capture_hooks(model, family_of(model), POINTS) as capture:
        for index in range(len(lengths)):
            ids = torch.from_numpy(sequences(lengths).sequence(index).astype(np.int64))[None]
            expected.append(capture.run(ids, None, lambda tensor: tensor[0, 1:].clone()))
    x, y = of_a_pass(source, 0, 0)
    for found, point in ((x, POINTS[0]), (y, POINTS[1])):
        wanted = torch.cat([one[point] for one in expected])
        assert torch.allclose(in_order(found), in_order(wanted), rtol=1e-4, atol=1e-5)
    again, _ = of_a_pass(source, 0, 1)
    assert not torch.allclose(again, x, atol=1e-5)
    assert torch.allclose(in_order(again), in_order(x), atol=1e-5)
    assert not torch.allclose(of_a_pass(source, 1, 0)[0], x, atol=1e-5)


def test_from_any_position_come_the_rows_that_come_there(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_rows, "POOL_BYTES", 60 * 2 * models.WIDTH * 4)
    source = SplitRows(split, PAIRS, "cpu")
    whole = [batch["pair"] for batch in islice(source.batches(BATCH, 3, 0), 2 * source.rows // BATCH)]
    for start in (1, source.rows // BATCH, source.rows // BATCH + 2):
        x, y = next(source.batches(BATCH, 3, start * BATCH))["pair"]
        assert torch.equal(x, whole[start][0])
        assert torch.equal(y, whole[start][1])
    assert source.facts_of("pair", BATCH, 3, BATCH)["max_x"] == float(whole[1][0].max())


def test_a_split_changes_no_bit(split: Split) -> None:
    alone = Split(split.directory, "none", {"": 0}, ("cpu",), split.folder, split.uncounted)
    one, two = (SplitRows(which, PAIRS, "cpu") for which in (alone, split))
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(of_a_pass(one, 0, 0), of_a_pass(two, 0, 0), strict=True)
    )


def test_a_hook_on_the_wrong_side_of_a_norm_is_told(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> Family:
        family = family_of(model)
        return replace(family, taps={**family.taps, "mlp_in": family.taps["resid_mid"]})

    monkeypatch.setattr(split_rows, "family_of", wrong)
    with pytest.raises(errors.Failed) as caught:
        SplitRows(split, PAIRS, "cpu")
    assert caught.value.reason == "HOOK_IDENTITY_FAILED"
