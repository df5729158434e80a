"""Figures of the theory show the numbers that theory gives."""

import jax
import numpy as np
import pytest
import xarray
from matplotlib.figure import Figure
from matplotlib.text import Text

from vgrad import meanfield, theory_plots


@pytest.fixture(scope="module")
def relu():
    return theory_plots.diagram("relu", (0.5, 2.0), (0.0, 1.0), 7)


def drawn(figure: Figure, path):
    """Saves, so that everything is laid out, and gives all texts."""
    figure.savefig(path)
    assert path.stat().st_size > 5000
    return [t.get_text() for t in figure.findobj(Text)]


def test_the_diagram_of_relu_is_its_closed_form(relu):
    sigma_w, sigma_b = np.meshgrid(relu.sigma_w, relu.sigma_b)
    settles = sigma_w**2 < 2
    np.testing.assert_allclose(relu.deep.chi_1[settles], sigma_w[settles] ** 2 / 2, rtol=1e-5)
    length = sigma_b**2 / (1 - sigma_w**2 / 2)
    np.testing.assert_allclose(relu.deep.q_star[settles], length[settles], rtol=1e-4, atol=1e-6)
    assert np.isnan(relu.deep.q_star[~settles & (sigma_b > 0)]).all()
    np.testing.assert_allclose(np.nanmax(relu.line[0]), 2**0.5, rtol=1e-5)


def test_the_phase_diagram_shows_what_was_computed(relu, tmp_path):
    figure = theory_plots.phase_diagram(relu)
    ax, bar = figure.axes[:2]
    mesh = ax.collections[0].get_array()
    shown = np.ma.getdata(mesh).ravel()
    growth = np.log(relu.deep.chi_1)
    inside = np.isfinite(relu.deep.q_star.ravel()) & (np.abs(growth.ravel()) < 1)
    np.testing.assert_allclose(shown[inside], growth.ravel()[inside], rtol=1e-6)
    texts = drawn(figure, tmp_path / "phase.png")
    assert any("fan" in t for t in texts)
    assert any("no bound" in t for t in texts)
    assert "nats" in bar.get_ylabel()
    critical = next(line for line in ax.lines if line.get_label() == "critical")
    np.testing.assert_allclose(np.asarray(critical.get_xdata())[np.isfinite(critical.get_ydata())], 2**0.5, rtol=1e-5)


def test_cobweb_follows_the_maps(tmp_path):
    figure = theory_plots.cobweb("erf", sigma_w=2.0, sigma_b=0.3, steps=5)
    star = jax.jit(lambda w, b: meanfield.asymptotics("erf", sigma_w=w, sigma_b=b))(2.0, 0.3)
    for ax, fixed in zip(figure.axes, (star.q_star, star.c_star), strict=True):
        point = ax.lines[-1]
        np.testing.assert_allclose([point.get_xdata()[0], point.get_ydata()[0]], fixed, rtol=1e-5)
        grid, values = ax.lines[0].get_xdata(), ax.lines[0].get_ydata()
        for path in ax.lines[2:-1]:
            x, y = (np.asarray(v, float) for v in (path.get_xdata(), path.get_ydata()))
            assert (x[1::2] == x[::2][: len(x[1::2])]).all()  # straight up to the map, and straight across to the diagonal
            np.testing.assert_allclose(y[1::2], np.interp(x[1::2], grid, values), atol=2e-3 * float(grid[-1]))
    drawn(figure, tmp_path / "cobweb.png")
    # E erf(u)^2 in closed form. Williams, 1997.
    q = np.asarray(figure.axes[0].lines[0].get_xdata(), float)
    wanted = 4 * 2 / np.pi * np.arcsin(2 * q / (1 + 2 * q)) + 0.09
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), wanted, rtol=1e-4)


def test_cobweb_needs_a_fixed_point():
    with pytest.raises(ValueError, match="grows without bound"):
        theory_plots.cobweb("relu", sigma_w=2.0, sigma_b=0.1)


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    fields = ("log_delta", "log_grad_w", "log_grad_b", "log_h")
    dims = ("phi", "init", "seed", "depth", "layer")
    measured = {name: (dims, rng.normal(size=(1, 2, 5, 2, 4))) for name in fields}
    theory = {f"predicted_{name}": ((*dims[:2], *dims[3:]), rng.normal(size=(1, 2, 2, 4))) for name in fields}
    return xarray.Dataset(measured | theory, coords={"phi": ["tanh"], "init": ["he", "xavier"], "depth": [2, 4]})


def test_theory_lies_over_the_seeds_band(dataset, tmp_path):
    figure = theory_plots.theory_over_profile(dataset, "tanh", "xavier")
    for ax, name in zip(figure.axes, ("log_delta", "log_grad_w", "log_grad_b", "log_h"), strict=True):
        median, theory = ax.lines
        np.testing.assert_allclose(median.get_ydata(), np.median(dataset[name].values[0, 1, :, 1], axis=0))
        np.testing.assert_array_equal(theory.get_ydata(), dataset[f"predicted_{name}"].values[0, 1, 1])
        assert theory.get_label() == "mean field"
    assert any("mean field" in t for t in drawn(figure, tmp_path / "profile.png"))


def test_a_combination_that_is_not_there(dataset):
    with pytest.raises(ValueError, match="expected one of the study's: he, xavier"):
        theory_plots.theory_over_profile(dataset, "tanh", "orthogonal")
    with pytest.raises(ValueError, match="run it again"):
        theory_plots.theory_over_profile(dataset.drop_vars("predicted_log_delta"), "tanh", "he")
