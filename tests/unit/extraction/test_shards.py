"""A cache written by hand with plain safetensors is read, checked, and iterated in the same random order each time."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file

from services.residency.shards import (
    MANIFEST,
    SEQUENCES,
    STATISTICS,
    CorruptCache,
    FileEntry,
    HookPointEntry,
    Manifest,
    ShardEntry,
    ShardReader,
    file_digest,
    shard_name,
)

X, Y = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
COUNTS = [7, 12, 5, 9, 11, 8, 6, 10, 13, 4]
TOTAL = sum(COUNTS)


def entry(path, **fields):
    kind = ShardEntry if fields else FileEntry
    return kind(path.name, path.stat().st_size, file_digest(path), **fields)


def write(directory, shards, layout="rows", shuffled=True, counts=COUNTS):
    """A cache of these shards; every other file is valid too."""
    entries = []
    for index, (tensors, rows) in enumerate(zip(shards, counts, strict=True)):
        save_file(tensors, directory / shard_name(index))
        entries.append(entry(directory / shard_name(index), rows=rows, sequences=1))
    moments = {
        f"{name}.{part}": torch.ones(2, dtype=torch.float64) for name in (X, Y) for part in ("mean", "second_moment")
    }
    save_file(moments, directory / STATISTICS)
    save_file({"row": torch.arange(3)}, directory / SEQUENCES)
    manifest = Manifest(
        hook_points=tuple(HookPointEntry(name, "mlp_in", 1, 2, 1.0, 2.0) for name in (X, Y)),
        layout=layout,
        dtype="float32",
        shuffled=shuffled,
        tokens=sum(counts),
        samples=len(counts),
        max_length=4,
        uncounted_ids=(0,),
        shards=tuple(entries),
        sequences=entry(directory / SEQUENCES),
        statistics=entry(directory / STATISTICS),
        model={"id": "m_1"},
        dataset={"id": "ds_1"},
        plan={"seed": 0},
    )
    (directory / MANIFEST).write_text(manifest.to_json())
    return manifest


@pytest.fixture
def cache(tmp_path):
    """Row r of the cache is [r, r] in X and [-r, -r] in Y."""
    start, shards = 0, []
    for count in COUNTS:
        x = torch.arange(start, start + count, dtype=torch.float32).repeat(2, 1).T.contiguous()
        shards.append({X: x, Y: -x, "tok": torch.arange(count, dtype=torch.int32)})
        start += count
    write(tmp_path, shards)
    return tmp_path


def numbers(batches):
    return torch.cat([batch.rows[X][:, 0] for batch in batches]).int().tolist()


def test_the_manifest_survives_its_json(tmp_path):
    manifest = write(tmp_path, [{X: torch.ones(2, 2)}], counts=[2])
    assert Manifest.from_json(manifest.to_json()) == manifest == ShardReader(tmp_path).manifest
    for wrong in ("{}", "[]", '{"format": "other"}', "x", manifest.to_json().replace('"tokens"', '"tokenz"')):
        (tmp_path / MANIFEST).write_text(wrong)
        with pytest.raises(CorruptCache, match=r"manifest\.json is corrupt"):
            ShardReader(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CorruptCache, match=r"manifest\.json is missing"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3, 16, TOTAL, TOTAL + 9])
def test_every_pass_gives_every_row_once_and_x_stays_with_y(cache, batch_size):
    batches = list(
        itertools.islice(ShardReader(cache).iter_rows([X, Y], batch_size, seed=3), 3 * TOTAL // batch_size + 3)
    )
    for batch in batches:
        assert batch.rows[X].shape == (batch_size, 2)
        assert torch.equal(batch.rows[X], -batch.rows[Y])
    seen = numbers(batches)
    first, second = seen[:TOTAL], seen[TOTAL : 2 * TOTAL]
    assert sorted(first) == sorted(second) == list(range(TOTAL))
    assert first != second


def test_a_batch_mixes_shards(cache):
    batch = next(ShardReader(cache).iter_rows([X], 24, seed=0))
    edges = torch.tensor(list(itertools.accumulate(COUNTS)))
    assert len(torch.bucketize(batch.rows[X][:, 0].contiguous(), edges, right=True).unique()) >= 6


@pytest.mark.parametrize("cut", [0, 1, 4, 9, 10, 11, 25])
def test_iteration_goes_on_from_a_cursor(cache, cut):
    whole = list(itertools.islice(ShardReader(cache).iter_rows([X], 10, seed=5), 40))
    cursor = whole[cut].cursor
    assert cursor == 10 * (cut + 1)
    rest = itertools.islice(ShardReader(cache).iter_rows([X], 10, seed=5, start=cursor), 8)
    assert numbers(rest) == numbers(whole[cut + 1 : cut + 9])


def test_a_single_shard_begins_elsewhere_in_every_pass(tmp_path):
    x = torch.arange(50.0).repeat(2, 1).T.contiguous()
    write(tmp_path, [{X: x}], counts=[50])
    starts = {numbers([batch])[0] for batch in itertools.islice(ShardReader(tmp_path).iter_rows([X], 50), 6)}
    assert len(starts) > 3


def test_seeds_give_different_orders(cache):
    first, second = (numbers(itertools.islice(ShardReader(cache).iter_rows([X], 17, seed=seed), 5)) for seed in (1, 2))
    assert first != second


def test_rows_of_the_layout_sequences_are_the_counted_ones(tmp_path):
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.uint8)
    x = torch.arange(8.0).view(2, 4, 1).expand(2, 4, 2).contiguous()
    write(tmp_path, [{X: x, "mask": mask}], layout="sequences", shuffled=False, counts=[4])
    batches = list(itertools.islice(ShardReader(tmp_path).iter_rows([X], 4), 3))
    assert [sorted(numbers([batch])) for batch in batches] == [[0, 1, 2, 5]] * 3
    assert len({tuple(numbers([batch])) for batch in batches}) > 1


def test_unknown_hook_points_are_refused(cache):
    reader = ShardReader(cache)
    with pytest.raises(KeyError):
        next(reader.iter_rows([X, "blocks.2.hook_mlp_out"], 4))
    with pytest.raises(KeyError):
        reader.shard(0, ["z"])
    with pytest.raises(KeyError):
        reader.statistics("z")


@pytest.mark.parametrize("name", [shard_name(3), SEQUENCES, STATISTICS])
def test_damage_is_found_and_refused(cache, name):
    path = cache / name
    content = bytearray(path.read_bytes())
    reader = ShardReader(cache)
    assert reader.verify() == []

    def read():
        found = ShardReader(cache)
        return {SEQUENCES: found.sequences, STATISTICS: lambda: found.statistics(X)}.get(name, lambda: found.shard(3))()

    read()
    content[-1] ^= 1
    for damaged, problem in [(bytes(content), "corrupt"), (content[:-9], "truncated"), (content + b"x", "corrupt")]:
        path.write_bytes(damaged)
        assert [(found.name, what) for found, what in reader.verify()] == [(name, problem)]
        with pytest.raises(CorruptCache, match=problem):
            read()
    path.unlink()
    assert [(found.name, what) for found, what in reader.verify()] == [(name, "missing")]
    with pytest.raises(CorruptCache, match="missing"):
        read()
