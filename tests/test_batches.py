"""The visits of each step."""

import time

import numpy as np
import pytest

from training.batches import steps_per_epoch, training_batch


def test_an_epoch_visits_all_pairs_once_in_a_seeded_order():
    positions = list(range(10))
    assert steps_per_epoch(positions, [], 4) == 3
    first, again, second = ([training_batch(positions, [], 4, 0, step) for step in steps]
                            for steps in (range(3), range(3), range(3, 6)))
    assert sorted(i for batch in first for i in batch) == positions and [len(batch) for batch in first] == [4, 4, 2]
    assert first == again != second and sorted(i for batch in second for i in batch) == positions


@pytest.mark.parametrize("pairs, others, size, steps, per_epoch", [
    (10, 31, 4, 4, 4), (40, 40, 8, 7, 14), (16, 5, 4, 6, 5), (40, 9, 4, 13, 9), (40, 40, 5, 11, 14), (31, 7, 8, 5, 7),
    (10, 33, 2, 5, 4), (9, 40, 3, 3, 3), (1, 5, 1, 1, 1), (2, 1, 3, 1, 1), (9, 9, 2, 5, 3)])  # on top
def test_incomplete_visits_take_turns_and_leave_the_pairs_most_of_a_batch(pairs, others, size, steps, per_epoch):
    complete, incomplete = list(range(pairs)), list(range(pairs, pairs + others))
    assert steps_per_epoch(complete, incomplete, size) == steps
    batches, added = [training_batch(complete, incomplete, size, 0, step) for step in range(2 * others * steps)], []
    for start in range(0, len(batches), steps):
        epoch = batches[start:start + steps]
        assert sorted(i for batch in epoch for i in batch if i in complete) == complete
        numbers = [sum(i in complete for i in batch) for batch in epoch]
        assert min(numbers) >= 1 and max(numbers) <= size and max(numbers) - min(numbers) <= 2
        more = [len(batch) - number for batch, number in zip(epoch, numbers, strict=True)]
        assert sum(more) == per_epoch and max(more) - min(more) <= 1
        assert max(map(len, epoch)) <= (size if size > 3 else size + 1)
        added += [i for batch in epoch for i in batch if i in incomplete]
    turns = np.array(added).reshape(-1, others)
    assert (np.sort(turns) == incomplete).all() and (others == 1 or not (turns == turns[0]).all())


def test_the_batches_of_a_large_study_take_no_time():
    complete, incomplete, start = list(range(10_000)), list(range(10_000, 30_000)), time.perf_counter()
    assert len(training_batch(complete, incomplete, 4, 0, 10_000)) == 4
    assert time.perf_counter() - start < 1  # 0.01 s; ten thousand permutations take ten
