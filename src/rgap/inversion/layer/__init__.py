"""The two kinds of constraints on one layer's input, and the input that satisfies them.

    W x = z - b      weight constraints, one row per output value   (Eq. 16)
    K x = grad W     gradient constraints, one row per weight       (Eq. 15)

K is block diagonal: one matrix K0 for every input channel (`Layer.kernel_matrix`). Its singular vectors split each
channel into a *dominant* subspace, which the gradient alone determines, and a *trailing* one. k is small but nearly
exact, while z carries the errors of all layers after this one; so the dominant part of the input comes from the
gradient alone, and only the trailing part is solved for jointly, from the weight rows and what is left of the gradient
rows, scaled to the same size. Where the trailing subspace is empty the layer passes no error on at all.

The trailing part is solved for by a dense factor of its normal equations (`direct`) or by conjugate gradients, which
form no matrix (`iterative`); whichever takes fewer operations, unless the caller chooses.
"""

from rgap.inversion.layer.cost import Solver, bytes_needed
from rgap.inversion.layer.rows import LayerRows, Rhs
from rgap.inversion.layer.system import LayerSolution, LayerSystem

__all__ = ["LayerRows", "LayerSolution", "LayerSystem", "Rhs", "Solver", "bytes_needed"]
