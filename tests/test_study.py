"""The study end to end: what is stored is what was measured, and what is printed and drawn is what was stored."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray

import vgrad
from vgrad import cli, data, losses, plots, session, store, study, task
from vgrad.study import Config

pytestmark = pytest.mark.xdist_group("study")  # its fixtures are costly: one process for all

SMALL = Config(
    phi=("sigmoid", "relu"), init=("xavier", "uniform_recipe", "orthogonal:1.5"), depths=(2, 5, 9), num_seeds=3, width=24, batch=16
)
# Deep enough and wide enough that float32 loses the gradient of the first.
DEEP = Config(phi=("sigmoid", "identity"), init=("uniform_recipe",), depths=(2, 70), num_seeds=2, width=24, batch=8)


@pytest.fixture(scope="module")
def small():
    return study.run(SMALL)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    return store.save(small, tmp_path_factory.mktemp("study") / "study.nc")


def test_every_number_is_that_of_the_network_it_names(small):
    x, t = data.digits().batch(SMALL.batch, SMALL.key)
    cases = [("sigmoid", "xavier", "normal", 1.0), ("relu", "uniform_recipe", "positive_uniform", math.sqrt(2)),
             ("relu", "orthogonal:1.5", "orthogonal", 1.5)]  # fmt: skip
    for phi, name, weights, sigma_w in cases:
        net = vgrad.mlp(24, phi, 64, 10, sigma_w=sigma_w, weights=weights)
        params = jax.jit(net.init, static_argnums=1)(jax.random.fold_in(jax.random.key(0), 2), 9)
        prof = vgrad.profile(net, params, (x, t), loss=losses.cross_entropy, depths=SMALL.depths)
        stored = small.sel(phi=phi, init=name, seed=2)
        for field, values in prof._asdict().items():
            np.testing.assert_allclose(stored[field], values, atol=2e-5)
        assert float(stored.sigma_w) == pytest.approx(sigma_w)
        np.testing.assert_allclose(np.log(stored.plain_float32_grad_w1), prof.log_grad_w[-1, 0], atol=1e-5)


def test_labels_and_attributes(saved, small):
    with xarray.open_dataset(saved) as reopened:
        assert reopened.log_delta.dims == ("phi", "init", "seed", "depth", "layer")
        assert reopened.log_delta.dtype == np.float64
        assert json.loads(reopened.attrs["config"])["num_seeds"] == 3
        assert json.loads(reopened.attrs["versions"])["jax"] == jax.__version__
        assert {"data", "device", "loss", "complete"} <= set(reopened.attrs)
        assert float(reopened.log_delta.sel(phi="relu", init="xavier", seed=1, depth=5, layer=1)) == float(
            small.log_delta[1, 0, 1, 1, 0]
        )
        assert np.isnan(reopened.log_delta.sel(depth=5, layer=6)).all()


def test_verdicts_of_a_deep_study():
    deep = study.run(DEEP)
    sigmoid, identity = study.verdicts(deep)
    assert (sigmoid.verdict, identity.verdict) == ("vanishes", "explodes")
    assert sigmoid.plain == 0  # plain float32 underflows
    assert sigmoid.log_grad_w1 < -100
    assert not math.isfinite(identity.plain) or identity.log_grad_w1 < 88
    delta = deep.log_delta.values[0, 0, :, -1]
    assert sigmoid.rate == pytest.approx(np.mean(delta[:, 0] - delta[:, 68]) / 68, abs=0.2)  # straight through the ends
    text = study.table(deep)
    assert "vanishes" in text.splitlines()[4]
    assert text.splitlines()[4].rstrip().endswith(" 0")


@pytest.mark.parametrize(
    ("log_ratio", "verdict"),
    [(-2.31, "vanishes"), (-2.29, "holds"), (2.29, "holds"), (2.31, "explodes"), (-np.inf, "dead"), (np.nan, "no reading")],
)
def test_thresholds_of_the_verdict(small, log_ratio, verdict):
    made = small.copy(deep=True)
    made.log_delta[0, 0] = -np.arange(9) * (log_ratio if np.isfinite(log_ratio) else 0) / 7
    if not np.isfinite(log_ratio):
        made.log_delta[0, 0, :, :, 0] = log_ratio
    assert study.verdicts(made)[0].verdict == verdict


@pytest.mark.parametrize(
    ("ln", "shown"), [(-1000.0, "5.1e-435"), (0.0, "1.0e+0"), (math.log(9.99), "1.0e+1"), (-math.inf, "0"), (math.nan, "nan")]
)
def test_decimal(ln, shown):
    assert study.decimal(ln) == shown


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(phi=()), ValueError, "the grid is empty"),
        (dict(init=()), ValueError, "the grid is empty"),
        (dict(phi=("tahn",)), ValueError, "did you mean 'tanh'"),
        (dict(init=("xavir",)), ValueError, "unknown initialization 'xavir', expected one of xavier"),
        (dict(init=("orthogonal:-1",)), ValueError, "sigma_w is '-1', expected a number >= 0"),
        (dict(depths=(2,)), ValueError, "expected one of at least 3"),
        (dict(depths=(5, 3)), ValueError, "expected increasing"),
        (dict(num_seeds=0), ValueError, "num_seeds is 0"),
        (dict(width=0), ValueError, "is 0, expected an integer of at least 1"),
        (dict(batch=0), ValueError, "batch size is 0"),
        (dict(batch=10_000), ValueError, "batch size is 10000"),
        (dict(sigma_b=-1.0), ValueError, "sigma_b is -1.0"),
        (dict(chunk=0), ValueError, "a chunk of 0 cases, expected at least 1"),
    ],
)
def test_bad_configurations_are_found_before_anything_is_computed(change, error, message):
    def no_progress(progress):
        raise AssertionError("it began")

    with pytest.raises(error, match=message):
        study.run(Config(**change), on_progress=no_progress)


# The command line, in this process.


def test_study_writes_and_plot_draws_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "all_devices", lambda: None)
    options = "--phi sigmoid relu --init xavier uniform_recipe orthogonal:1.5 --depths 2 5 9 --num-seeds 3 --width 24 --batch 16"
    cli.main(["study", "--no-cache", *options.split(), "--out", str(tmp_path / "new" / "folder")])
    printed, folder = capsys.readouterr().out, tmp_path / "new" / "folder"
    assert "uniform_recipe" in printed
    assert sorted(p.name for p in folder.iterdir()) == sorted(["study.nc", *(f"{name}.png" for name in plots.FIGURES)])
    cli.main(["plot", str(folder / "study.nc"), "--out", str(tmp_path)])
    assert printed.split("\n\n")[1] == capsys.readouterr().out.split("\n\n")[1].rsplit("\n", 4)[0]
    for name in plots.FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes() == (folder / f"{name}.png").read_bytes()


def test_ctrl_c_keeps_what_is_there(tmp_path, capsys, monkeypatch):
    from vgrad.sweep import sweep

    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(*args, **kwargs)

    monkeypatch.setattr(task, "sweep", interrupted)
    monkeypatch.setattr(session, "all_devices", lambda: None)
    options = "--phi sigmoid relu --init xavier --depths 2 5 --num-seeds 2 --width 8 --batch 4 --chunk 2 --no-cache"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *options.split(), "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "Interrupted" in capsys.readouterr().out
    partial = store.load(tmp_path / "study-partial.nc")
    assert partial.attrs["complete"] == 0
    assert np.isfinite(partial.log_delta.sel(phi="sigmoid", depth=5)).all()
    assert np.isnan(partial.log_delta.sel(phi="relu")).all()
    cli.main(["plot", str(tmp_path / "study-partial.nc")])
    assert "no reading" in capsys.readouterr().out


def test_a_mistake_is_a_message_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task, "sweep", lambda *a, **k: pytest.fail("it computed"))
    (tmp_path / "file").write_text("")
    bad = tmp_path / "bad.npz"
    np.savez(bad, x=np.full((4, 2), np.nan), y=np.zeros(4))
    for args, message in [
        (["--phi", "tahn"], "did you mean 'tanh'"),
        (["--out", str(tmp_path / "file" / "below")], "cannot write to"),
        (["--data", str(bad)], "NaN or inf"),
        (["--data", str(tmp_path / "none.npz")], "none.npz"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["study", "--no-cache", "--out", str(tmp_path), *args])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    for path, message in [(tmp_path / "none.nc", "there is no file"), (tmp_path / "other.nc", "expected log_delta")]:
        if path.name == "other.nc":
            store.save(xarray.Dataset({"a": ("i", np.zeros(2))}), path)
        with pytest.raises(SystemExit):
            cli.main(["plot", str(path)])
        assert message in capsys.readouterr().err


def test_help_comes_from_the_types():
    env = os.environ | {"COLUMNS": "120"}
    shown = subprocess.run([sys.executable, "-m", "vgrad", "study", "--help"], capture_output=True, text=True, env=env, check=True)
    for option in ("--phi", "--init", "--depths", "--num-seeds", "--width", "--batch", "--sigma-b", "--key", "--data", "--out"):
        assert option in shown.stdout
    assert "Units per hidden layer" in shown.stdout


def test_saving_is_whole_or_not_at_all(tmp_path, small):
    path = store.save(small, tmp_path / "study.nc")
    before = path.read_bytes()
    unwritable = small.assign_attrs(bad=object())
    with pytest.raises(TypeError):
        store.save(unwritable, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["study.nc"]


def test_figures_are_drawn_from_the_stored_data_alone(saved):
    stored = store.load(saved)
    figure = plots.delta_over_layers(stored)
    axes = figure.axes
    assert len(axes) == 6
    theory, line = axes[0].lines[-1], axes[0].lines[-2]  # sigmoid, xavier, the greatest depth: the median over seeds
    np.testing.assert_array_equal(theory.get_ydata(), stored.predicted_log_delta.values[0, 0, -1, :9])
    np.testing.assert_allclose(line.get_ydata(), np.median(stored.log_delta.values[0, 0, :, -1, :9], axis=0))
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 10))
    first = plots.grad_w1_against_depth(stored).axes[0].lines
    medians = np.median(stored.log_grad_w.values[0, 0, :, :, 0], axis=0)
    assert any(np.allclose(l.get_ydata(), medians) for l in first if len(l.get_ydata()) == 3)
    total = plots.attribution(stored).axes[0]
    delta = stored.log_delta.values[0, 0, :, -1].mean(axis=0)
    np.testing.assert_allclose(total.lines[0].get_ydata(), (delta[:-1] - delta[1:])[:7], atol=1e-5)
    tops = [bar.get_height() for bar in total.patches]
    np.testing.assert_allclose(np.add(tops[:7], tops[7:]), total.lines[0].get_ydata())
