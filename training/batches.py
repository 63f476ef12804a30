"""The visits of each step: complete pairs, and those with one scan."""

import math

import numpy as np

PAIRS_PER_INCOMPLETE = 3  # visits of an epoch (docs/results.md)


def incomplete_per_epoch(complete: list[int], incomplete: list[int], batch_size: int) -> tuple[int, int]:
    """How many incomplete visits an epoch has, and how many of them take the place of a pair.

    Batches under four are too small for that: there, they come on top of batch_size pairs (docs/results.md).
    """
    count = min(len(incomplete), math.ceil(len(complete) / PAIRS_PER_INCOMPLETE))
    return count, count if batch_size > PAIRS_PER_INCOMPLETE else 0


def steps_per_epoch(complete: list[int], incomplete: list[int], batch_size: int) -> int:
    _, inside = incomplete_per_epoch(complete, incomplete, batch_size)
    return math.ceil((len(complete) + inside) / batch_size)


def training_batch(complete: list[int], incomplete: list[int], batch_size: int, seed: int, step: int) -> list[int]:
    """The visits of step 0, 1, ..., the same in a resumed run.

    An epoch has every complete visit once, batch_size of them in a step; its last step may have fewer. Where some are
    incomplete, they take turns over the epochs, and both kinds are spread evenly over the steps.
    """
    steps = steps_per_epoch(complete, incomplete, batch_size)
    epoch, part = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(complete).tolist()
    if not incomplete:
        return order[part * batch_size:(part + 1) * batch_size]
    count, inside = incomplete_per_epoch(complete, incomplete, batch_size)
    turn, start = divmod(epoch * count, len(incomplete))
    turns = [i for each in (turn, turn + 1)
             for i in np.random.default_rng([seed, each, 1]).permutation(incomplete).tolist()][start:]
    # cut so, no step has more than batch_size visits, or where incomplete ones come on top, pairs
    (pair, other), (next_pair, next_other) = ((k * (len(order) + inside) // steps - k * inside // steps,
                                               k * count // steps) for k in (part, part + 1))
    return order[pair:next_pair] + turns[other:next_other]
