"""Rows, labels and order of training examples."""

from __future__ import annotations

import pytest
import torch

from services.extensions.compute.examples import IGNORED, Order, from_pairs, from_texts


def test_texts_are_cut_into_rows_and_padding_carries_no_label() -> None:
    examples = from_texts([[5, 6, 7], [8, 9]], 4, separator=2)
    assert examples.ids.tolist() == [[5, 6, 7, 2], [8, 9, 2, 2]]
    assert examples.labels.tolist() == [[5, 6, 7, 2], [8, 9, 2, IGNORED]]


def test_a_lone_last_token_is_dropped_since_nothing_predicts_it() -> None:
    assert from_texts([[5, 6, 7, 8]], 4, separator=2).ids.tolist() == [[5, 6, 7, 8]]


def test_pairs_label_the_target_only_and_long_prompts_lose_their_beginning() -> None:
    examples = from_pairs([([5, 6, 7, 8], [9, 10]), ([], [11])], 5, separator=2)
    assert examples.ids.tolist() == [[7, 8, 9, 10, 2], [2, 11, 2, 2, 2]]
    assert examples.labels.tolist() == [[IGNORED, IGNORED, 9, 10, 2], [IGNORED, 11, 2, IGNORED, IGNORED]]


@pytest.mark.parametrize("target", [[], [3, 4, 5, 6]])
def test_targets_that_are_empty_or_too_long_are_refused(target: list[int]) -> None:
    with pytest.raises(ValueError, match="row 1 has a target"):
        from_pairs([([1], [2]), ([1], target)], 5, separator=2)


def test_datasets_without_text_are_refused() -> None:
    with pytest.raises(ValueError, match="no text"):
        from_texts([[]], 4, separator=2)
    with pytest.raises(ValueError, match="no rows"):
        from_pairs([], 4, separator=2)


def test_each_epoch_sees_each_example_once_in_an_order_of_its_own() -> None:
    order = Order(count=7, batch_size=3, seed=5)
    rows = torch.cat([order.batch(number) for number in range(7)]).tolist()
    epochs = [rows[start : start + 7] for start in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert order.batch(2).tolist() == Order(7, 3, 5).batch(2).tolist()


def test_the_digest_is_of_ids_and_labels() -> None:
    texts, pairs = from_texts([[5, 6]], 3, separator=2), from_pairs([([5], [6])], 3, separator=2)
    assert texts.ids.tolist() == pairs.ids.tolist()
    assert texts.digest != pairs.digest
    assert texts.digest == from_texts([[5, 6]], 3, separator=2).digest
