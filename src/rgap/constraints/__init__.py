"""The two kinds of constraints on one layer's input, and the input that satisfies them.

    W x = z - b      weight constraints, one row per output value   (Eq. 16)
    K x = grad W     gradient constraints, one row per weight       (Eq. 15)

K is block diagonal: one matrix K0 for every input channel (`Layer.kernel_matrix`). Its singular vectors split each
channel into *strong* directions, which the gradient alone determines, and *weak* ones. k is small but nearly exact,
while z carries the errors of all layers after this one; so the strong directions come from the gradient alone, and
only the weak ones are solved for jointly, from the weight rows and what is left of the gradient rows, scaled to the
same size. Where no direction is weak the layer passes no error on at all.

The weak directions are solved for by a dense factor of their normal equations (`direct`) or by conjugate gradients,
which form no matrix (`iterative`); whichever takes fewer operations, unless the caller chooses.
"""

from rgap.constraints.cost import Solver, bytes_needed
from rgap.constraints.rows import Rows, Side
from rgap.constraints.system import Solved, System

__all__ = ["Rows", "Side", "Solved", "Solver", "System", "bytes_needed"]
