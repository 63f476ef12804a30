"""The visits of each step: complete pairs, and those with one scan."""

import math

import numpy as np

PAIRS_PER_INCOMPLETE = 3  # visits, in stage 2 (docs/results.md)


def steps_per_epoch(complete: list[int], incomplete: list[int], batch_size: int) -> int:
    """Incomplete visits take up to a quarter of the places; batches under four keep all of theirs for pairs."""
    places = min(batch_size // (PAIRS_PER_INCOMPLETE + 1), len(incomplete) * batch_size // len(complete))
    return math.ceil(len(complete) / (batch_size - places))


def training_batch(complete: list[int], incomplete: list[int], batch_size: int, seed: int, step: int) -> list[int]:
    """The visits of step 0, 1, ..., the same in a resumed run.

    An epoch has every complete visit once, batch_size of them in a step, the last of which may have fewer; or, among
    incomplete visits, all steps about as many. Of these, an epoch has up to one for every PAIRS_PER_INCOMPLETE complete
    ones; they take turns over the epochs.
    """
    steps = steps_per_epoch(complete, incomplete, batch_size)
    epoch, part = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(complete)
    if not incomplete:
        return order[part * batch_size:(part + 1) * batch_size].tolist()
    count = min(len(incomplete), math.ceil(len(complete) / PAIRS_PER_INCOMPLETE))
    turn, first = divmod(epoch * count, len(incomplete))
    turns = np.concatenate([np.random.default_rng([seed, each, 1]).permutation(incomplete)
                            for each in (turn, turn + 1)])[first:first + count]
    return [i for visits in (order, turns)
            for i in visits[part * len(visits) // steps:(part + 1) * len(visits) // steps].tolist()]
