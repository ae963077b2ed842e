"""Datasets of every source become the same rows, and rows become the same token sequences and batches each time."""

from __future__ import annotations

import json
import os

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from services.residency.texts import (
    DatasetError,
    DatasetRecord,
    Encoding,
    content_digest,
    open_rows,
    plan_batches,
    special_ids,
    tokenize,
)
from services.residency.tokens import TokenStore, tokenizer_digest
from services.residency.usable import LOOKED_AT, require_usable
from tests import models

TEXTS = ["def add(left, right):", "the quick brown fox", "x = 1"]


def inline(*texts: str) -> DatasetRecord:
    return DatasetRecord("ds_1", "inline", texts=texts or tuple(TEXTS))


def local(identifier: str, **fields: str) -> DatasetRecord:
    return DatasetRecord("ds_1", "local", identifier=identifier, **fields)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    (folder / "a.csv").write_text("text,n\n" + "".join(f'"{text}",1\n' for text in TEXTS))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(folder / "a.parquet"))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(str(folder / "dict"))
    (folder / "many").mkdir()
    for split in ("train", "test"):
        (folder / "many" / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    return folder


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "saved"])
def test_every_kind_of_local_file_gives_the_same_rows(root, tmp_path, name):
    rows = open_rows(local(name), [tmp_path / "nowhere", root], tmp_path / "cache")
    assert len(rows) == 3
    assert list(rows.texts()) == TEXTS
    assert list(rows.texts(1, 2)) == TEXTS[1:2]


def test_a_split_is_chosen_in_directories(root, tmp_path):
    assert list(open_rows(local("many", split="test"), [root], tmp_path / "cache").texts()) == ["test"]
    assert list(open_rows(local("dict", split="test"), [root]).texts()) == TEXTS
    with pytest.raises(DatasetError) as caught:
        open_rows(local("dict", split="validation"), [root])
    assert str(root) not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "link.txt", "a%2e", "a\\b", "a\0b", "", "gone.txt"])
def test_only_files_below_a_root_are_read(root, tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret")
    os.symlink(tmp_path / "secret.txt", root / "link.txt")
    with pytest.raises(DatasetError) as caught:
        open_rows(local(name), [root])
    assert caught.value.field == "identifier"
    assert str(tmp_path) not in str(caught.value)


def test_a_hub_identifier_never_reads_the_local_file_system(root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(DatasetError, match="local path"):
        open_rows(DatasetRecord("ds_1", "huggingface", identifier="many"))


def test_a_file_that_cannot_be_parsed_and_one_of_an_unknown_kind(root, tmp_path):
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "weights.pt").write_bytes(b"\x80\x04")
    for name, field in [("bad.jsonl", "dataset_id"), ("weights.pt", "identifier")]:
        with pytest.raises(DatasetError) as caught:
            open_rows(local(name), [root], tmp_path / "cache")
        assert caught.value.field == field
        assert str(root) not in str(caught.value)


def test_columns_that_are_not_there_are_named(root, tmp_path):
    with pytest.raises(DatasetError, match="no column 'body'"):
        open_rows(local("a.jsonl", text_field="body"), [root], tmp_path / "cache")
    with pytest.raises(DatasetError, match="no column 'answer'"):
        open_rows(local("a.jsonl", prompt_field="text", target_field="answer"), [root], tmp_path / "cache")


def test_pairs_of_prompt_and_target(root, tmp_path):
    (root / "pairs.jsonl").write_text(
        '{"q": "2+2=", "a": "4"}\n{"q": "3+3=", "a": null}\n{"q": "", "a": "x"}\n{"q": "5+5=", "a": "10"}\n'
    )
    rows = open_rows(local("pairs.jsonl", prompt_field="q", target_field="a"), [root], tmp_path / "cache")
    assert list(rows.pairs()) == [("2+2=", "4"), None, None, ("5+5=", "10")]
    assert list(rows.texts()) == ["2+2=4", None, None, "5+5=10"]


def test_bad_rows_are_counted_and_the_others_keep_their_number(root, tmp_path):
    (root / "holes.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    rows = open_rows(local("holes.jsonl"), [root], tmp_path / "cache")
    found = tokenize(rows, models.tokenizer(), 64)
    assert (found.rows.tolist(), found.bad_rows, found.rows_read) == ([0, 3], 2, 4)
    assert [models.tokenizer().decode(found.sequence(i)) for i in range(2)] == ["one", "two"]


def test_a_dataset_without_one_good_row_is_refused(root, tmp_path):
    (root / "none.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    rows = open_rows(local("none.jsonl", text_field="text"), [root], tmp_path / "cache")
    with pytest.raises(DatasetError, match="none of the dataset's 2 rows"):
        tokenize(rows, models.tokenizer(), 64)
    (root / "empty.txt").touch()
    for empty in (DatasetRecord("ds_1", "inline"), local("empty.txt", text_field="text")):
        with pytest.raises(DatasetError, match="no rows"):
            open_rows(empty, [root], tmp_path / "cache")


def test_long_rows_are_cut_and_the_cut_is_recorded():
    tokenizer = models.tokenizer()
    full = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = tokenize(open_rows(inline()), tokenizer, 4)
    assert found.lengths.tolist() == [min(4, len(ids)) for ids in full]
    assert found.truncated_tokens == sum(max(0, len(ids) - 4) for ids in full) > 0
    assert found.truncated_rows == sum(len(ids) > 4 for ids in full)
    for index, ids in enumerate(full):
        assert found.sequence(index).tolist() == ids[:4]


def ids_of(text):
    return models.tokenizer()(text)["input_ids"]


def test_packed_rows_lose_no_token_and_are_ended_by_eos():
    texts = ("one two", "three", "four five six")
    found = tokenize(open_rows(inline(*texts)), models.tokenizer(), Encoding(5, packing=True))
    stream = [token for text in texts for token in [*ids_of(text), 2]]
    assert found.ids.tolist() == stream
    assert found.lengths.tolist() == [5] * (len(stream) // 5) + ([len(stream) % 5] if len(stream) % 5 else [])
    assert (found.truncated_rows, found.truncated_tokens) == (0, 0)
    rows, starts, firsts = found.pieces
    assert set(found.offsets[:-1]) <= set(starts.tolist())
    for row, start, first, stop in zip(rows, starts, firsts, [*starts[1:], len(stream)], strict=True):
        whole = [*ids_of(texts[row]), 2]
        assert found.ids[start:stop].tolist() == whole[first : first + stop - start]


def test_special_tokens_are_the_tokenizers_none_or_one_bos():
    tokenizer = models.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    plain = ids_of("one two")

    def of(**options):
        return tokenize(open_rows(inline("one two")), tokenizer, Encoding(99, **options)).ids.tolist()

    assert of() == of(packing=True) == [1, *plain, 2]
    assert of(special_tokens="none") == plain
    assert of(special_tokens="bos") == [1, *plain]
    assert of(special_tokens="bos", packing=True) == [1, *plain, 2]
    tokenizer.bos_token = None
    with pytest.raises(DatasetError) as caught:
        of(special_tokens="bos")
    assert caught.value.field == "special_tokens"


def test_spans_name_the_characters_of_each_token(root):
    texts = ("naïve café, 三つ", "plain words")
    encoding = Encoding(64, special_tokens="bos", spans=True)
    found = tokenize(open_rows(inline(*texts)), models.tokenizer(), encoding)
    for row, text in enumerate(texts):
        low, high = found.offsets[row : row + 2]
        spans = found.spans[low:high].tolist()
        assert spans[0] == [-1, -1]
        assert [spans[1][0], spans[-1][1]] == [0, len(text)]
        for token, (start, stop) in zip(found.ids[low + 1 : high], spans[1:], strict=True):
            decoded = models.tokenizer().decode([token])
            assert decoded == text[start:stop] or "\ufffd" in decoded
    datasets.Dataset.from_dict({"input_ids": [[3, 4]]}).save_to_disk(str(root / "ids"))
    given = tokenize(open_rows(local("ids"), [root]), None, encoding)
    assert given.spans.tolist() == [[-1, -1]] * 2
    assert given.ids.tolist() == [3, 4], "rows that come tokenised are taken as they are"


@pytest.mark.parametrize("encoding", [Encoding(6, spans=True), Encoding(6, packing=True), Encoding(6)])
def test_tokens_are_kept_and_damaged_ones_are_not_read(tmp_path, encoding):
    found = tokenize(open_rows(inline()), models.tokenizer(), encoding).limited(9)
    store = TokenStore(tmp_path / "tokens")
    assert store.load("a") is None
    store.save("a", found)
    assert store.counted("a") == 9
    assert store.counted("b") is None
    again = store.load("a")
    for name in ("ids", "offsets", "rows", "starts", "firsts", "spans"):
        kept, there = getattr(found, name), getattr(again, name)
        assert (kept is None and there is None) or np.array_equal(kept, there)
    assert (again.rows_read, again.truncated_tokens) == (found.rows_read, found.truncated_tokens)
    path = tmp_path / "tokens" / "a.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert store.load("a") is None
    path.write_bytes(content[:40])
    assert store.load("a") is None
    assert store.counted("a") is None
    store.save("a", found, [int(found.ids[0])])
    assert store.counted("a") == 9 - int((found.ids == found.ids[0]).sum())


def test_tokens_used_least_recently_go_first(tmp_path):
    found = tokenize(open_rows(inline()), models.tokenizer(), 6)
    TokenStore(tmp_path).save("size", found)
    size = (tmp_path / "size.safetensors").stat().st_size
    (tmp_path / "size.safetensors").unlink()
    store = TokenStore(tmp_path, 2 * size)
    for age, name in enumerate(("first", "second")):
        store.save(name, found)
        os.utime(tmp_path / f"{name}.safetensors", (1000 + age, 1000 + age))
    store.load("first")
    store.save("third", found)
    assert store.load("second") is None
    assert store.load("first") is not None
    assert store.load("third") is not None


@pytest.mark.parametrize("count", [1, 3, 101, 10_001])
def test_a_dataset_is_judged_by_its_first_rows(count):
    tokenizer = models.tokenizer()

    def judged(*texts, rows=None):
        opened = open_rows(DatasetRecord("ds_1", "inline", texts=texts))
        require_usable(opened, tokenizer, Encoding(6), row_limit=rows, uncounted_ids=special_ids(tokenizer))

    bad = ("", "<eos>") * (count // 2) + ("<bos>",) * (count % 2)
    judged(*bad, "a word") if count > 3 else judged("a word", *bad)
    if count <= LOOKED_AT[-1]:
        for unusable in ((*bad,), ("",) * count):
            with pytest.raises(DatasetError) as caught:
                judged(*unusable)
            assert caught.value.field == "dataset_id"
        with pytest.raises(DatasetError):
            judged(*bad, "a word", rows=count)
    else:
        judged(*bad)  # of so many nothing is said


def test_more_rows_than_there_are():
    with pytest.raises(DatasetError) as caught:
        tokenize(open_rows(inline()), models.tokenizer(), 64, row_limit=4)
    assert caught.value.field == "sample_count"
    assert len(tokenize(open_rows(inline()), models.tokenizer(), 64, row_limit=2)) == 2


def test_tokenised_datasets_are_taken_as_they_are(root):
    ids = [[5, 6, 7], [], [9, 600], [-1], [3, 4]]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(root / "ids"))
    rows = open_rows(local("ids"), [root])
    assert rows.tokenized
    found = tokenize(rows, None, 2, vocab_size=models.VOCAB)
    assert (found.rows.tolist(), found.bad_rows, found.truncated_rows) == ([0, 4], 3, 1)
    assert found.ids.tolist() == [5, 6, 3, 4]


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 7, 100])
def test_a_token_limit_is_exact(root, limit):
    datasets.Dataset.from_dict({"input_ids": [[3, 4, 5], [6], [7, 8, 9]]}).save_to_disk(str(root / "ids"))
    found = tokenize(open_rows(local("ids"), [root]), None, 64).limited(limit)
    assert found.ids.tolist() == list(range(3, 10))[:limit]
    assert found.lengths.sum() == min(limit, 7)
    assert (found.lengths > 0).all()
    assert len(found.rows) == len(found.lengths)


def test_special_tokens_do_not_count_towards_a_limit(root):
    datasets.Dataset.from_dict({"input_ids": [[1, 3, 4], [1, 5, 2, 6], [1, 7]]}).save_to_disk(str(root / "ids"))
    whole = tokenize(open_rows(local("ids"), [root]), None, 64)
    assert whole.limited(3, (1, 2)).ids.tolist() == [1, 3, 4, 1, 5]
    assert whole.limited(4, (1, 2)).ids.tolist() == [1, 3, 4, 1, 5, 2, 6]
    assert len(whole.limited(5, (1, 2)).ids) == len(whole.ids)


def test_padding_is_on_the_right_and_masked():
    found = tokenize(open_rows(inline()), models.tokenizer(), 6)
    ids, mask = found.padded([2, 0], 6)
    assert mask.sum(1).tolist() == [found.lengths[2], found.lengths[0]]
    for row, index in enumerate([2, 0]):
        length = found.lengths[index]
        assert ids[row, :length].tolist() == found.sequence(index).tolist()
        assert not ids[row, length:].any()
        assert not mask[row, length:].any()


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 16),
    st.randoms(use_true_random=False),
)
def test_a_batch_plan_holds_every_sequence_once_and_pads_to_the_longest(lengths, batch_size, random):
    lengths = np.asarray(lengths)
    indices = np.asarray(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    plan = plan_batches(lengths, batch_size, indices)
    assert sorted(np.concatenate([batch.indices for batch in plan])) == sorted(indices)
    assert all(batch.length == lengths[batch.indices].max() for batch in plan)
    assert all(1 <= len(batch.indices) <= batch_size for batch in plan)
    assert [batch.length for batch in plan] == sorted((batch.length for batch in plan), reverse=True)
    again = plan_batches(lengths, batch_size, indices)
    assert [batch.indices.tolist() for batch in plan] == [batch.indices.tolist() for batch in again]


def test_digests_follow_the_content(root):
    assert content_digest(inline()) == content_digest(inline(*TEXTS))
    assert content_digest(inline("ab", "c")) != content_digest(inline("a", "bc"))
    before = content_digest(local("many"), [root])
    (root / "many" / "train.jsonl").write_text('{"text": "other"}\n')
    assert content_digest(local("many"), [root]) != before
    with pytest.raises(DatasetError):
        content_digest(DatasetRecord("ds_1", "huggingface", identifier="org/name"))


def test_the_unknown_token_is_text_unless_it_doubles_as_another():
    tokenizer = models.tokenizer()
    assert special_ids(tokenizer) == (0, 1, 2)
    tokenizer.unk_token = "a"
    assert special_ids(tokenizer) == (0, 1, 2)
    tokenizer.unk_token = "<eos>"
    assert special_ids(tokenizer) == (0, 1, 2)


def test_a_tokenizers_digest_ignores_how_it_was_last_called():
    tokenizer = models.tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["a b c d e f"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["zebra"])
    assert tokenizer_digest(tokenizer) != before
