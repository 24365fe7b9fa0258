"""What there is to reproduce, told without computing anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One table or figure."""

    home: str
    """Module and class in this package."""
    title: str
    count: int
    """How many pictures it takes unless told otherwise."""
    counted: str = "pictures"
    """What the count counts."""

    def __str__(self) -> str:
        return f"{self.title} ({self.count} {self.counted})"


CATALOGUE = {
    "table1": Entry("table1.Table1", "Table 1: mean MSE of R-GAP, DLG and H-GAP", 50),
    "table2": Entry("table2.Table2", "Table 2: index and reconstruction error of five networks", 6),
    "figure1": Entry(
        "figure1.Figure1", "Figure 1: losses, and the product that tells the margin", 200, "products for each loss"
    ),
    "figure3": Entry("figure3.Figure3", "Figure 3: R-GAP, DLG and H-GAP on CNN6", 6),
    "figure4": Entry("figure4.Figure4", "Figure 4: twin data, two inputs with one gradient", 10),
    "figure5": Entry("figure5.Figure5", "Figure 5: noise on the gradient, against the width of the network", 5),
    "figure6": Entry("batches.Figure6", "Figure 6: batches of two on FCN3, R-GAP and DLG", 10, "batches of two"),
    "figure7": Entry("batches.Figure7", "Figure 7: batches of five on FCN3, R-GAP and DLG", 10, "batches of five"),
    "inverting-gradients": Entry(
        "inverting_gradients.Inverting",
        "Inverting Gradients: PSNR in dB on untrained networks, one picture a gradient",
        20,
    ),
    "models": Entry("models.Models", "Models that people train, and the attacks on each (no table of the paper)", 20),
    "training": Entry("training.Training", "What training changes (no figure of the paper)", 5),
}
"""By the name on the command line, in the paper's order; then one of another paper, which checks the attack that it
brings, and two of no paper: models that people train, and what training changes."""
