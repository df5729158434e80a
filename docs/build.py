"""Writes what the documentation shows: the table of activations, and the default study's verdicts and figures. `make figures`."""

import sys
from pathlib import Path

import jax

import vgrad.activations
from vgrad import plots, store, study, theory_plots

HERE = Path(__file__).parent

ACTIVATIONS = f"""# Activations

By name in `vgrad.mlp(phi=...)`, or any elementwise function. Written by `make figures` from `vgrad.activations.REGISTRY`; every
range and slope is verified numerically in `tests/test_activations.py`. Ranges are open or closed as the case may be; a slope at
infinity is the limit of phi(z) / z.

{vgrad.activations.table()}
"""


def main(results: Path) -> None:
    """Everything from the code and one study."""
    (HERE / "activations.md").write_text(ACTIVATIONS)
    dataset = store.load(results)
    (HERE / "study.txt").write_text(f"{study.table(dataset)}\n\n{dataset.attrs['data']}; {dataset.attrs['device']}\n")
    plots.save_all(dataset, HERE)
    with jax.enable_x64(True):
        diagram = theory_plots.diagram("tanh", (0.3, 3.0), (0.0, 1.5), 96)
        theory_plots.phase_diagram(diagram).savefig(HERE / "phase_tanh.png", dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
