"""A dataset is cut into the same units every time, and every row of a unit leads back to its token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.extraction.compute import (
    Moments,
    Pace,
    UnitFiller,
    fill_units,
    make_plan,
    plan_again,
    plan_arrays,
    sequence_tensors,
    statistics_tensors,
)
from services.extraction.compute.plan import MOST_UNIT_BYTES, UNIT_SEQUENCES, NothingCounted
from services.extraction.compute.tables import hook_point_entries, merged
from services.residency.families import family_of
from services.residency.hooks import capture_hooks
from services.residency.texts import DatasetRecord, Encoding, Sequences, open_rows, tokenize
from tests import models

X, Y = "blocks.1.mlp.hook_in", "blocks.3.hook_mlp_out"
BOS = 1


def sequences_of(lengths, seed=0):
    """Random ids of these lengths, each beginning with BOS; rows 0, 2, 4, … of a dataset."""
    random = np.random.default_rng(seed)
    ids = [np.concatenate([[BOS], random.integers(3, models.VOCAB, length - 1)]) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = 2 * np.arange(len(lengths), dtype=np.int64)
    return Sequences(np.concatenate(ids).astype(np.int32), offsets, rows, 2 * len(lengths), len(lengths), 0, 0)


def plan_of(sequences, layout="rows", seed=0, batch_size=4, row_bytes=512, **options):
    return make_plan(
        sequences,
        layout=layout,
        seed=seed,
        batch_size=batch_size,
        row_bytes=row_bytes,
        uncounted_ids=(0, 1, 2),
        **options,
    )


@pytest.fixture(scope="module")
def gpt2():
    return models.tiny("gpt2")


@pytest.fixture(scope="module")
def ragged():
    return sequences_of(np.random.default_rng(1).integers(2, 20, 150))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=300),
    st.sampled_from(["rows", "sequences"]),
    st.integers(1, 9),
    st.integers(1, 2**22),
    st.integers(-5, 5),
)
def test_every_counted_token_is_in_exactly_one_unit(lengths, layout, batch_size, unit_bytes, seed):
    sequences = sequences_of(lengths)
    if max(lengths) == 1:
        with pytest.raises(NothingCounted):
            plan_of(sequences, layout)
        return
    plan = plan_of(sequences, layout, seed, batch_size, unit_bytes=unit_bytes)
    kept = np.flatnonzero(np.asarray(lengths) > 1) if layout == "rows" else np.arange(len(lengths))
    in_units = np.concatenate([unit.sequences for unit in plan.units])
    assert sorted(in_units) == kept.tolist()
    if layout == "sequences":
        assert in_units.tolist() == kept.tolist()
    batches = [batch for unit in plan.units for batch in unit.batches]
    assert sorted(np.concatenate([batch.indices for batch in batches])) == kept.tolist()
    assert [unit.first_batch for unit in plan.units] == np.cumsum(
        [0, *(len(u.batches) for u in plan.units[:-1])]
    ).tolist()
    assert sum(unit.rows for unit in plan.units) == plan.tokens == sum(lengths) - len(lengths)
    assert all(len(unit.sequences) >= min(UNIT_SEQUENCES, len(kept)) for unit in plan.units[:-1])
    assert plan_of(sequences, layout, seed, batch_size, unit_bytes=unit_bytes).digest == plan.digest


def test_units_are_as_large_as_allowed_and_no_larger():
    sequences = sequences_of([11] * 4000)
    sizes = [unit.rows for unit in plan_of(sequences).units]
    assert sizes == [2000] * 20  # 5 % of 40,000 rows
    assert [unit.rows for unit in plan_of(sequences, unit_bytes=512 * 1000).units] == [1000] * 40
    assert {len(unit.sequences) for unit in plan_of(sequences, unit_bytes=1).units[:-1]} == {UNIT_SEQUENCES}
    huge = MOST_UNIT_BYTES // 30
    assert max(unit.rows for unit in plan_of(sequences, row_bytes=huge, batch_size=1).units) == 30
    assert max(unit.rows for unit in plan_of(sequences, row_bytes=huge).units) == 40  # a batch is not cut


def test_ragged_sequences_cost_next_to_no_padding():
    lengths = np.random.default_rng(3).integers(16, 257, 2000)
    plan = plan_of(sequences_of(lengths), batch_size=8)
    batches = [batch for unit in plan.units for batch in unit.batches]
    assert sum(len(batch.indices) * batch.length for batch in batches) < 1.05 * lengths.sum()
    per_unit = [np.mean(lengths[unit.sequences]) for unit in plan.units]
    assert 20 <= len(plan.units) <= 25
    assert max(per_unit) < 2 * min(per_unit)  # and no unit is all short ones


def test_another_dataset_seed_or_batch_is_another_plan(ragged):
    other = sequences_of(ragged.lengths, seed=2)
    plans = [
        plan_of(ragged),
        plan_of(other),
        plan_of(ragged, seed=1),
        plan_of(ragged, batch_size=5),
        plan_of(ragged, layout="sequences"),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


@pytest.mark.parametrize("layout", ["rows", "sequences"])
def test_a_plan_is_read_again_from_its_arrays_and_from_no_others(ragged, layout):
    plan = plan_of(ragged, layout)
    made_with = {name: getattr(plan, name) for name in ("layout", "seed", "batch_size", "batch_tokens")}
    made_with |= {"uncounted_ids": plan.uncounted_ids, "shuffled": plan.shuffled}

    def again(arrays=None, sequences=ragged, **changes):
        return plan_again(arrays or plan_arrays(plan), sequences, plan.digest, **{**made_with, **changes})

    found = again()
    assert (found.digest, found.tokens, found.max_length) == (plan.digest, plan.tokens, plan.max_length)
    assert np.array_equal(found.counted, plan.counted)
    for one, two in zip(plan.units, found.units, strict=True):
        assert (one.index, one.first_batch, one.rows) == (two.index, two.first_batch, two.rows)
        assert one.sequences.tolist() == two.sequences.tolist()
        assert [(b.length, b.indices.tolist()) for b in one.batches] == [
            (b.length, b.indices.tolist()) for b in two.batches
        ]
    assert again(sequences=sequences_of(ragged.lengths, seed=2)) is None
    assert again(sequences=sequences_of([5, 6])) is None
    assert again(seed=1) is None
    assert again(uncounted_ids=(0, 1)) is None
    assert again(shuffled=False) is None
    for name, array in plan_arrays(plan).items():
        for place, change in ((0, 1), (-1, -1), (0, -(10**6)), (0, 10**6)):
            damaged = array.copy()
            damaged[place] += change
            assert again({**plan_arrays(plan), name: damaged}) is None
        assert again({**plan_arrays(plan), name: array[:-1]}) is None
        assert again({**plan_arrays(plan), name: array.astype(np.int64)}) is None
    assert again({"indices": plan_arrays(plan)["indices"]}) is None


def test_the_sequences_are_permuted_and_so_are_the_rows(ragged, gpt2):
    plan = plan_of(ragged)
    assert np.concatenate([unit.sequences for unit in plan.units]).tolist() != list(range(len(ragged)))
    tensors = next(fill_units(gpt2, ragged, plan, hook_points=[X], dtype=torch.float32)).tensors
    assert (tensors["seq"].diff() == 0).float().mean() < 0.1


def test_rows_may_stay_as_they_were_computed(ragged, gpt2):
    plan, shuffled = plan_of(ragged, shuffled=False), plan_of(ragged)
    kept = next(fill_units(gpt2, ragged, plan, hook_points=[X], dtype=torch.float32)).tensors
    order = [int(index) for batch in plan.units[0].batches for index in batch.indices]
    assert kept["seq"].unique_consecutive().tolist() == [index for index in order if len(ragged.sequence(index)) > 1]
    assert all(after in (before + 1, 1) for before, after in itertools.pairwise(kept["pos"].tolist()))
    tensors = next(fill_units(gpt2, ragged, shuffled, hook_points=[X], dtype=torch.float32)).tensors
    places = [list(zip(each["seq"].tolist(), each["pos"].tolist(), strict=True)) for each in (kept, tensors)]
    again = [places[0].index(place) for place in places[1]]
    assert torch.equal(kept[X][again], tensors[X])


def batches_again(sequences, plan):
    """The forward batches as sequences.safetensors tells them: (indices, ids, mask) by number."""
    tables = sequence_tensors(sequences, plan)
    lengths = tables["offset"].diff()
    for number in range(int(tables["batch"].max()) + 1):
        members = (tables["batch"] == number).nonzero().flatten()
        members = members[torch.argsort(-lengths[members], stable=True)]
        ids = torch.zeros(len(members), int(lengths[members].max()), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(members.tolist()):
            low, high = tables["offset"][index : index + 2].tolist()
            ids[row, : high - low] = tables["ids"][low:high]
            mask[row, : high - low] = 1
        yield members, ids, mask


@pytest.mark.parametrize("layout", ["rows", "sequences"])
def test_every_row_leads_back_to_its_token_and_gives_the_same_bits_again(gpt2, ragged, layout):
    plan = plan_of(ragged, layout)
    values, place_of = {X: {}, Y: {}}, set()
    for filled in fill_units(gpt2, ragged, plan, hook_points=[X, Y], dtype=torch.float32):
        tensors = filled.tensors
        if layout == "rows":
            where = torch.stack([tensors["seq"], tensors["pos"]], 1).tolist()
            token, flat = tensors["tok"].tolist(), {name: tensors[name] for name in (X, Y)}
        else:
            grid = tensors["mask"].nonzero()
            where = [(int(tensors["seq"][row]), int(column)) for row, column in grid]
            token = [int(tensors["tok"][row, column]) for row, column in grid]
            flat = {name: tensors[name][tensors["mask"].bool()] for name in (X, Y)}
            for name in (X, Y):
                assert not tensors[name][~tensors["mask"].bool()].any()
                assert tensors[name].shape == (len(tensors["seq"]), plan.max_length, models.WIDTH)
        for row, (seq, pos) in enumerate(where):
            assert ragged.sequence(seq)[pos] == token[row] != BOS
            place_of.add((seq, pos))
            for name in (X, Y):
                values[name][seq, pos] = flat[name][row]
    assert len(place_of) == plan.tokens == len(values[X])
    family = family_of(gpt2)
    planned = [batch.indices.tolist() for unit in plan.units for batch in unit.batches]
    for number, (members, ids, mask) in enumerate(batches_again(ragged, plan)):
        assert members.tolist() == planned[number]
        with capture_hooks(gpt2, family, [X, Y]) as hooks:
            found = hooks.run(ids, mask)
        for row, index in enumerate(members.tolist()):
            for column in range(1, int(mask[row].sum())):
                for name in (X, Y):
                    assert torch.equal(values[name][index, column], found[name][row, column])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("layout", ["rows", "sequences"])
def test_every_row_leads_back_to_its_dataset_row_token_and_characters(gpt2, packing, layout):
    texts = ("", *models.TEXTS)
    rows = open_rows(DatasetRecord("ds_1", "inline", texts=texts))
    tokenizer = models.tokenizer()
    sequences = tokenize(rows, tokenizer, Encoding(12, special_tokens="bos", packing=packing, spans=True))
    plan = plan_of(sequences, layout)
    tables = {name: tensor.numpy() for name, tensor in sequence_tensors(sequences, plan).items()}
    seen = set()
    for filled in fill_units(gpt2, sequences, plan, hook_points=[X], dtype=torch.float32):
        tensors = filled.tensors
        if layout == "rows":
            places = torch.stack([tensors[name] for name in ("tok", "seq", "pos")], 1).tolist()
        else:
            grid = tensors["mask"].nonzero().tolist()
            places = [(int(tensors["tok"][row, pos]), int(tensors["seq"][row]), pos) for row, pos in grid]
        for tok, seq, pos in places:
            token = tables["offset"][seq] + pos
            piece = np.searchsorted(tables["start"], token, side="right") - 1
            row, number = tables["row"][piece], tables["first"][piece] + token - tables["start"][piece]
            whole = tokenizer(texts[row], return_offsets_mapping=True)
            assert whole["input_ids"][number - 1] == tok, "number 0 is the BOS"
            assert tuple(tables["span"][token]) == whole["offset_mapping"][number - 1]
            seen.add((int(row), int(number)))
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert len(seen) == plan.tokens == sum(length if packing else min(length, 11) for length in lengths)


@pytest.mark.parametrize("most", [130, 250])
def test_a_batch_that_does_not_fit_is_split_and_keeps_its_bits(gpt2, most):
    sequences = sequences_of(np.random.default_rng(1).integers(2, 100, 40))
    plan, model = plan_of(sequences, batch_size=16), models.tiny("gpt2")
    passes, halved = [], []

    def limited(_, args, kwargs):
        shape = kwargs["input_ids"].shape
        if shape.numel() > most and len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passes.append(shape)

    model.register_forward_pre_hook(limited, with_kwargs=True)
    pace = Pace()
    for whole in fill_units(gpt2, sequences, plan, hook_points=[X, Y], dtype=torch.float32):
        filler = UnitFiller(sequences, plan, whole.unit, [X, Y], torch.float32, pace=pace)
        for batch in whole.unit.batches:
            passes.clear()
            filler.run(model, family_of(model), batch)
            assert sum(count for count, _ in passes) == len(batch.indices)
            assert {length for _, length in passes} == {batch.length}
            assert all(shape.numel() > 30 for shape in passes if len(passes) > 1)
            halved.append(pace.halved)
        assert all(torch.equal(tensor, filler.tensors[name]) for name, tensor in whole.tensors.items())
        sums = filler.moments()[X].tensors("")
        assert all(torch.equal(tensor, sums[name]) for name, tensor in whole.moments()[X].tensors("").items())
    assert halved[0] > 0
    assert halved[len(halved) // 2] == halved[-1], "it remembers what fitted"


def test_memory_that_is_short_from_the_beginning_is_not_overrun():
    seen = []
    pace = Pace(free_bytes=2 * 100 * 50, token_bytes=10)  # 500 tokens in half of it
    for length in (100, 600):
        list(pace.parts(7, length, lambda part: seen.append(part.stop - part.start), "cpu"))
    assert seen == [4, 3, *[1] * 7]

    def run(part):
        raise MemoryError

    with pytest.raises(MemoryError):
        list(pace.parts(1, 5, run, "cpu"))
    assert pace.halved == 0


def test_no_batch_has_more_tokens_than_asked_for(ragged):
    plan = plan_of(ragged, batch_size=8, batch_tokens=40)
    batches = [batch for unit in plan.units for batch in unit.batches]
    assert all(len(batch.indices) == 1 or len(batch.indices) * batch.length <= 40 for batch in batches)
    assert max(len(batch.indices) for batch in batches) == 8
    assert sum(len(batch.indices) for batch in batches) == sum(np.diff(ragged.offsets) > 1)
    assert plan.digest != plan_of(ragged, batch_size=8).digest


def test_patterns_of_all_lengths_lie_in_one_table():
    pattern, k = "blocks.2.attn.hook_pattern", "blocks.2.attn.hook_k"
    model, sequences = models.tiny("llama"), sequences_of([5, 9, 3, 9])
    plan = plan_of(sequences, batch_size=2)
    filled, *more = fill_units(model, sequences, plan, hook_points=[pattern, k], dtype=torch.float32)
    tensors = filled.tensors
    assert not more
    assert tensors[k].shape == (plan.tokens, 32)
    weights = tensors[pattern].unflatten(1, (4, plan.max_length))
    torch.testing.assert_close(weights.sum(-1), torch.ones(plan.tokens, 4))
    for row, position in enumerate(tensors["pos"].tolist()):
        assert weights[row, :, position].all()
        assert not weights[row, :, position + 1 :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_those_of_the_stored_rows(gpt2, ragged, dtype):
    plan = plan_of(ragged)
    filled = list(fill_units(gpt2, ragged, plan, hook_points=[X, Y], dtype=dtype))
    assert all(unit.tensors[X].dtype == dtype for unit in filled)
    whole = merged(unit.moments() for unit in filled)
    entries = {entry.name: entry for entry in hook_point_entries(whole)}
    statistics = statistics_tensors(whole)
    for name, site in ((X, "mlp_in"), (Y, "mlp_out")):
        rows = torch.cat([unit.tensors[name] for unit in filled]).double()
        torch.testing.assert_close(statistics[f"{name}.mean"], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(statistics[f"{name}.second_moment"], rows.square().mean(0), rtol=1e-12, atol=1e-12)
        assert entries[name].site == site
        assert entries[name].variance == pytest.approx(float(rows.var(0, correction=0).sum()), rel=1e-9)
        assert entries[name].mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)


def test_moments_survive_their_tensors():
    moments = Moments.empty(3)
    moments.add(torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)))
    again = Moments.from_tensors(moments.tensors("x"), "x")
    assert (again.count, again.mean_norm, again.variance) == (1000, moments.mean_norm, moments.variance)
    assert torch.equal(again.mean, moments.mean)
    again.merge(moments)
    assert again.count == 2000
    assert torch.equal(again.mean, moments.mean)


@pytest.mark.parametrize("layout", ["rows", "sequences"])
def test_a_unit_has_the_same_bits_whenever_it_is_run(gpt2, ragged, layout):
    plan = plan_of(ragged, layout)
    first, again = (list(fill_units(gpt2, ragged, plan, hook_points=[X, Y], dtype=torch.float32)) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        tensors, moments = two.tensors, two.moments()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.tensors.items())
        assert all(torch.equal(found.squares, moments[name].squares) for name, found in one.moments().items())


@pytest.mark.parametrize("layout", ["rows", "sequences"])
def test_memory_that_a_written_unit_gives_back_holds_the_next_one_and_nothing_of_the_first(gpt2, ragged, layout):
    plan = plan_of(ragged, layout)
    kept = list(fill_units(gpt2, ragged, plan, hook_points=[X, Y], dtype=torch.float32))
    places = set()
    for one, filled in zip(kept, fill_units(gpt2, ragged, plan, hook_points=[X, Y], dtype=torch.float32), strict=True):
        tensors = filled.tensors
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.tensors.items())
        places |= {tensors[X].data_ptr(), tensors[Y].data_ptr()}
        assert not tensors[X].is_inference(), "it may be trained on"
        filled.release()
    assert len(kept) > 1
    assert len(places) == 2
