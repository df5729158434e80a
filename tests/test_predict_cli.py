"""`vgrad predict` and `vgrad phase`, the words they say, and the prediction that a study carries."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vgrad import cli, data, nested, overlay, prediction, study, study_table, verdicts
from vgrad.meanfield import Asymptotics, Universality

INF, NAN = math.inf, math.nan
CRITICAL = {
    "relu": Universality("scale-invariant", 2**0.5, 0.0, 1.0, 1.0, NAN, NAN),
    "tanh": Universality("K*=0", 1.0, 0.0, 0.0, 1.0, 1.0, 2.0),
    "gelu": Universality("half-stable", 1.40821, 0.41584, 3.56155, 1.0, NAN, NAN),
    "sigmoid": Universality("none", 10.384, 1.4468, 50.1, 0.055, NAN, NAN),
    "softplus": Universality("none", NAN, NAN, NAN, NAN, NAN, NAN),
}


def predicted(rate, depth=12, spread=0.1):
    """A made-up prediction whose ||delta|| changes by e^rate per layer toward the input."""
    delta = rate * np.arange(depth)[::-1].astype(float)
    values = dict.fromkeys(prediction.Prediction._fields, delta) | {"std_log_delta": np.full(depth, spread)}
    return prediction.Prediction(**values)


def made(phi, deep, critical=(), sigma_w=1.0, sigma_b=0.0):
    return verdicts.Outlook(phi, sigma_w, sigma_b, Asymptotics(*deep), list(critical), CRITICAL[phi])


ORDERED, CHAOTIC = (0.5, 1.0, 0.8, 0.5, 1.44, 4.48, 4.48), (2.0, 0.3, 1.5, 0.4, 1.09, 7.0, -2.47)


@pytest.mark.parametrize(
    ("rate", "deep", "wanted"),
    [
        (-1.0, ORDERED, ["the gradient vanishes", "e^-1.0000 = 0.3679", "4.5e-5 of its size", "0.8, ordered", "6 xi_c = 27"]),
        (0.5, CHAOTIC, ["the gradient explodes", "1.5e+2 of its size", "chaotic", "c* = 0.3", "6 xi_c = 42"]),
        (0.01, (1.0, 1.0, 1.0, 0.5, 1.4, INF, INF), ["the gradient holds", "critical", "only as a power of depth"]),
        (0.3, (NAN,) * 7, ["the gradient explodes", "grows without bound"]),
        (-0.7, (0.0, 1.0, 0.25, 0.25, 0.7, 0.7, 0.7), ["the gradient vanishes", "the signal dies out, q* = 0"]),
    ],
)
def test_what_will_happen(rate, deep, wanted):
    text = verdicts.summary(made("tanh", deep), predicted(rate))
    for words in wanted:
        assert words in text, text
    assert "nan" not in text


def test_thresholds_are_those_of_a_study():
    for rate in (-0.2304, -0.2300, 0.2300, 0.2304):  # ten steps: ln 10 = 2.3026
        text = verdicts.summary(made("tanh", ORDERED), predicted(rate))
        assert f"the gradient {study_table.verdict(10 * rate)}" in text
    assert "no hidden step" in verdicts.summary(made("tanh", ORDERED), predicted(-1.0, depth=2))


@pytest.mark.parametrize(
    ("phi", "critical", "wanted"),
    [
        ("relu", [(2**0.5, 1.0, 1.0)], ["sigma_w = 1.41421 at this sigma_b (at any length)", "scale-invariant"]),
        ("relu", [], ["no sigma_w keeps the gradient", "scale-invariant"]),
        ("tanh", [(1.39, 0.76, 0.5)], ["sigma_w = 1.39000 at this sigma_b (at length 0.76)", "K* = 0", "(2 l)^-1"]),
        ("gelu", [(1.54, 0.57, 1.095)], ["at a length (0.57) that repels: chi_par = 1.0950", "half-stable: at sigma_w = 1.40821"]),
        ("gelu", [(2.0, 0.0, 1.0)], ["at a length (0) that repels"]),
        ("sigmoid", [(10.15, 45.6, 0.06)], ["sigma_w = 10.15000", "no point where gradient and length both hold", "50.1"]),
        ("softplus", [], ["no sigma_w keeps the gradient", "softplus has no critical initialization"]),
    ],
)
def test_advice(phi, critical, wanted):
    text = verdicts.advice(made(phi, ORDERED, critical))
    for words in wanted:
        assert words in text, text
    assert "nan" not in text


def test_predict_prints_the_table_and_the_words(capsys):
    cli.main(["predict", "--phi", "relu", "--depth", "40", "--sigma-w", "1.0", "--width", "64", "--batch", "4"])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if re.match(r" *\d+ ", line)]
    assert [rows[0][0], rows[-2][0], rows[-1][0]] == ["1", "39", "40"]
    # relu of half the critical variance: every hidden layer takes ln(2) / 2 of delta, and of h, exactly in the mean.
    assert float(rows[-2][3]) - float(rows[0][3]) == pytest.approx(38 * math.log(2) / 2, abs=2e-3)
    assert float(rows[-2][1]) / float(rows[0][1]) == pytest.approx(2.0**-38, rel=1e-3)
    assert "the gradient vanishes" in printed
    assert f"e^{-math.log(2) / 2:+.4f} = 0.7071 per layer" in printed
    assert "sigma_w = 1.41421 at this sigma_b" in printed


def test_phase_draws(tmp_path, capsys):
    cli.main(["phase", "--phi", "erf", "--points", "6", "--out", str(tmp_path)])
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "phase_erf.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict", "--phi", "tahn"], "did you mean 'tanh'"),
        (["predict", "--sigma-w", "-1"], "sigma_w is -1.0"),
        (["predict", "--depth", "1"], "depth is 1"),
        (["predict", "--batch", "0"], "batch size is 0"),
        (["phase", "--points", "1"], "points is 1"),
        (["phase", "--sigma-w", "2", "1"], "expected 0 <= lowest < highest"),
    ],
)
def test_a_mistake_is_a_message_and_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


DEPTHS = (2, 5, 7)


def test_all_depths_at_once_are_each_depth_alone():
    x, t = jax.random.normal(jax.random.key(0), (5, 6)), np.arange(5) % 3
    options = dict(width=20, out_dim=3, sigma_b=0.3, loss="cross_entropy")
    many = nested.predict_depths("tanh", (x, t), depths=DEPTHS, sigma_w=np.array([0.9, 1.6]), **options)
    assert many.log_delta.shape == (2, 3, 7)
    alone = prediction.predict("tanh", (x, t), depth=5, sigma_w=1.6, **options)
    for name, values in many._asdict().items():
        np.testing.assert_allclose(values[1, 1, :5], getattr(alone, name), atol=2e-5)  # same maths, two routes
        assert np.isnan(values[1, 1, 5:]).all()
        assert np.isfinite(values[:, 2]).all()


def test_targets_of_a_regression_are_predicted_for_too():
    def shape(x, t):
        return nested.predict_depths(
            "tanh", (x, t), depths=DEPTHS, sigma_w=np.ones(4), width=20, out_dim=3, loss="squared_error"
        ).log_h  # fmt: skip

    assert jax.eval_shape(shape, np.ones((5, 6), np.float32), np.ones((5, 3), np.float32)).shape == (4, 3, 7)


def test_depths_that_make_no_sense():
    options = dict(width=4, out_dim=2, sigma_w=1.0, loss="cross_entropy")
    for depths in ((), (1, 2), (3, 3), (5, 2)):
        with pytest.raises(ValueError, match="expected increasing ones of at least 2"):
            nested.predict_depths("tanh", (np.ones((2, 3)), np.zeros(2, int)), depths=depths, **options)


def test_a_study_is_predicted_by_name():
    config = study.Config(phi=("identity",), init=("uniform_recipe", "he", "xavier"), depths=(2, 4, 6), width=16, batch=6)
    schemes = {"identity": [study.scheme(name, "identity") for name in config.init]}
    found = overlay.predicted(config, data.digits(), schemes)
    dims, values, _ = found["predicted_log_delta"]
    assert dims == ("phi", "init", "depth", "layer")
    assert values.shape == (1, 3, 3, 6)
    assert np.isnan(values[:, 0]).all()  # weights with a mean
    # A linear network: every hidden layer multiplies ||delta||^2 by sigma_w^2.
    np.testing.assert_allclose(values[0, 1, 2, 0] - values[0, 1, 2, 4], 4 * math.log(2) / 2, atol=1e-5)
    np.testing.assert_allclose(values[0, 2, 2, 0] - values[0, 2, 2, 4], 0, atol=1e-5)


def test_the_benchmark_of_the_phase_diagram_agrees_with_scipy(monkeypatch):
    path = Path(__file__).parents[1] / "experiments" / "benchmarks" / "phase_diagram.py"
    spec = importlib.util.spec_from_file_location("phase_diagram", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "phase_diagram", script)
    spec.loader.exec_module(script)
    result = script.run(script.TINY)
    script.check(result)
    assert max(result["ours"]["error"].values()) < 1e-9
    assert "| ours |" in script.report(result)
