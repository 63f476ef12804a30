"""Muon (Jordan et al. 2024): steps of weight matrices with singular values of about 1."""

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a polynomial that drives all of (0, 1] towards 1 (Jordan et al. 2024)
ITERATIONS = 5
SMALLEST = 1e-7  # norm
MOMENTUM = 0.95
FLAT = 8  # columns per row; flatter matrices are those of 3x3x3 convolutions
FEWEST_ROWS = 64  # of the others, when computed together


class Muon:
    """The steps of torch.optim.Muon with Nesterov momentum, in a tenth of its operations.

    Gradients and momenta lie one after the other in one tensor, ordered by shape. Matrices of about the same shape are
    orthogonalised together, padded with zeros, which stay zeros and do not change the rest.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float):
        self.matrices, self.weight_decay = matrices, weight_decay
        members, groups, self._by_scale = {}, {}, {}  # of a shape: places; of a group: shapes; of a scale: places
        for place, (rows, columns) in enumerate(matrix.shape for matrix in matrices):
            members.setdefault((rows, columns), []).append(place)
            # torch.optim.Muon takes longer steps of tall matrices
            self._by_scale.setdefault(math.sqrt(max(1, rows / columns)), []).append(place)
        for short, long, shape in sorted((min(shape), max(shape), shape) for shape in members):
            key = (short, True) if long > FLAT * short else (max(short, FEWEST_ROWS), False)
            groups.setdefault(key, []).append(shape)
        total = sum(matrix.numel() for matrix in matrices)
        self._gradient, self._momentum = (matrices[0].new_zeros(total) for _ in range(2))
        self._gradients, self.momenta = ([None] * len(matrices) for _ in range(2))  # views
        self._groups, self._of_shapes, self._padded = [], [], []  # bfloat16; of a shape: a view in each of the two
        start = 0
        for shapes in groups.values():
            size = [max(each(shape) for shape in shapes) for each in (min, max)]
            group = matrices[0].new_zeros(sum(len(members[shape]) for shape in shapes), *size, dtype=torch.bfloat16)
            self._groups.append(group)
            for shape, part in zip(shapes, group.split([len(members[shape]) for shape in shapes])):
                end = start + len(part) * math.prod(shape)
                of_shape, momenta = (flat[start:end].view(-1, *shape) for flat in (self._gradient, self._momentum))
                wide = part[:, :min(shape), :max(shape)]
                self._of_shapes.append(of_shape)
                self._padded.append(wide if shape[0] <= shape[1] else wide.mT)
                for place, gradient, momentum in zip(members[shape], of_shape, momenta):
                    self._gradients[place], self.momenta[place] = gradient, momentum
                start = end

    @torch.no_grad()
    def step(self, gradients: list[Tensor | None], rate: Tensor, ok: Tensor) -> None:
        """Take a step, or none, and leave the momenta, where `ok` is False: a tensor, for which nothing waits. Neither
        for a matrix without a gradient, as torch.optim does."""
        torch._foreach_copy_(self._gradients, [momentum if gradient is None else gradient
                                               for gradient, momentum in zip(gradients, self.momenta)])
        torch.where(ok, self._gradient, self._momentum, out=self._gradient)  # finite
        self._momentum.lerp_(self._gradient, 1 - MOMENTUM)
        self._gradient.lerp_(self._momentum, MOMENTUM)
        torch._foreach_copy_(self._padded, self._of_shapes)
        for group in self._groups:
            orthogonalise_(group)
        torch._foreach_copy_(self._of_shapes, self._padded)
        rate = rate * ok
        self._gradient.mul_(rate)
        torch._foreach_mul_([matrix for matrix, gradient in zip(self.matrices, gradients) if gradient is not None],
                            1 - rate * self.weight_decay)
        for scale, places in self._by_scale.items():
            if moved := [place for place in places if gradients[place] is not None]:
                torch._foreach_add_([self.matrices[place] for place in moved],
                                    [self._gradients[place] for place in moved], alpha=-scale)


def orthogonalise_(matrices: Tensor) -> Tensor:
    """Replace each of (N, rows, columns), rows <= columns, by U V^T, where U S V^T is its singular value decomposition;
    roughly. In place."""
    a, b, c = COEFFICIENTS
    x = matrices.div_(matrices.norm(dim=(1, 2), keepdim=True).clamp_(min=SMALLEST))
    for number in range(ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a, out=matrices if number == ITERATIONS - 1 else None)
    return x
