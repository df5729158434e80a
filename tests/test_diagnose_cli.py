"""`vgrad diagnose` on models in files: what is printed, what is drawn, and the exit codes that CI relies on."""

import math
import re
import sys

import numpy as np
import pytest

import vgrad
from vgrad import cli, plots, target

# Three linear layers of width 4, a multiple of the identity each, on one row: ln ||delta|| changes by ln(size) per layer.
MODEL = '''
import jax.numpy as jnp
import numpy as np
from helper import total

def model(sizes, phi=lambda z: z):
    params = {f"layer{i}": np.eye(4, dtype=np.float32) * np.float32(s) for i, s in enumerate(sizes)}
    def loss_fn(params, x):
        for w in params.values():
            x = phi(x @ w)
        return total(x)
    return loss_fn, params, (np.ones((1, 4), np.float32),)

def healthy(): return model([1, 1, 1, 1])
def vanishing(): return model([1, 1, 1, 1e-4])
def exploding(): return model([1, 1, 1, 1e4])
def slowly(): return model([1, 0.4, 0.4, 0.4, 0.4])
def cut(): return model([1, 0, 1, 1])
def dead(): return model([1, -1, 1], lambda z: jnp.maximum(z, 0))
def nan(): return model([1, np.nan, 1])
def broken(): return 1 / 0
def untraceable(): return (lambda p, x: jnp.sum(x @ p) if p[0, 0] > 0 else 0.0), np.eye(4, dtype=np.float32), (np.ones((1, 4)),)
def mismatched(): return (lambda p, x: jnp.sum(x @ p)), np.eye(4, dtype=np.float32), (np.ones((1, 5), np.float32),)
def pair(): return model([1])[:2]
def no_tuple(): return *model([1])[:2], np.ones(4)
def no_loss(): return 1.0, {}, ()
def nothing(): pass
number = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "helper.py").write_text("import jax.numpy as jnp\ndef total(x): return jnp.sum(x)\n")
    (folder / "a_model.py").write_text(MODEL)
    return folder / "a_model.py"


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    """`load` prepends to sys.path, as running a script does; here that ends with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def reports(file):
    """Diagnoses by the name of the function, each measured once."""
    known = {}

    def of(name):
        if name not in known:
            loss_fn, params, args = target.load(f"{file}:{name}")
            known[name] = vgrad.diagnose(loss_fn, params, *args)
        return known[name]

    return of


def run(capsys, *args):
    """Exit code, standard output, standard error."""
    try:
        cli.main(["diagnose", *map(str, args)])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("healthy", set()), ("vanishing", {"vanishing"}), ("exploding", {"exploding"}), ("slowly", {"vanishing"}),
        ("cut", {"vanishing"}), ("dead", {"dead", "vanishing"}), ("nan", {"non-finite"}),
    ],
)  # fmt: skip
def test_problems_of_models_made_to_have_them(reports, name, expected):
    assert set(target.problems(reports(name))) == expected


def test_problems_give_their_numbers(reports):
    """ln 1e-4 = -9.21 between the last two of four layers; 0.4 per layer is -0.916 nats."""
    assert "9.2 below" in target.problems(reports("vanishing"))["vanishing"]
    assert "9.2 above" in target.problems(reports("exploding"))["exploding"]
    assert f"{math.log(0.4):+.3f}" in target.problems(reports("slowly"))["vanishing"]
    assert "layer1" in target.problems(reports("nan"))["non-finite"]


def test_the_table_the_verdict_and_the_exit_code(capsys, file, tmp_path):
    figure = tmp_path / "new folder" / "out.png"
    code, out, err = run(capsys, f"{file}:vanishing", "--figure", figure, "--fail-on", "dead", "vanishing")
    assert code == 1
    assert err.startswith("vgrad: vanishing: ")
    row = next(line.split() for line in out.splitlines() if "layer3" in line)
    assert row[:2] == ["4", "layer3"]
    assert f"{math.log(2):.2f}" in row  # delta = dJ/dz of the last layer is four ones
    assert str(figure) in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_only_what_is_asked_for_fails(capsys, file):
    code, out, err = run(capsys, f"{file}:vanishing", "--fail-on", "exploding")
    assert (code, err) == (0, "")
    assert "layer0" in out


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("{file}", "expected path/to/file.py:function"), ("{file}:", "expected path/to/file.py:function"),
        ("{folder}/none.py:make", "no file .*none.py"), ("{file}:healhty", "did you mean 'healthy'"),
        ("{file}:zzz", "has no function 'zzz': it has model, healthy"), ("{file}:number", "is a int, expected a function"),
        ("{file}:pair", r"returned 2 values, expected \(loss_fn, params, args\)"), ("{file}:nothing", "returned a NoneType"),
        ("{file}:no_tuple", r"returned a ndarray for args, expected a tuple: \(x,\)"), ("{file}:no_loss", "a float for a loss"),
        ("{file}:untraceable", "loss_fn cannot be traced"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_message_and_exit_code_2(capsys, file, named, words):
    code, out, err = run(capsys, named.format(file=file, folder=file.parent))
    assert (code, out) == (2, "")
    assert err.startswith("vgrad: ")
    assert "Traceback" not in err
    assert re.search(words, err), err


@pytest.mark.parametrize(("name", "error"), [("broken", "ZeroDivisionError"), ("mismatched", "TypeError")])
def test_a_mistake_in_the_model_shows_where_it_is(capsys, file, name, error):
    code, out, err = run(capsys, f"{file}:{name}")
    assert (code, out) == (2, "")
    assert error in err
    assert f"in {'broken' if name == 'broken' else '<lambda>'}" in err


@pytest.mark.parametrize("name", ["healthy", "cut", "nan"])
def test_the_figure_shows_what_the_report_holds(reports, name):
    report = reports(name)
    backward, gains, forward, shares = plots.diagnosis(report).axes
    finite = lambda v, other: np.where(np.isfinite(v), v, other)  # noqa: E731
    for ax, fields in ((backward, ("log_delta", "log_grad_w")), (forward, ("log_rms_z", "log_w"))):
        for line, field in zip(ax.lines, fields, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), finite(getattr(report, field), np.nan))
    heights = np.reshape([bar.get_height() for bar in gains.patches], (2, -1))
    np.testing.assert_array_equal(heights, [finite(v, 0) for v in (report.log_gain_backward, report.log_gain_forward)])
    assert [t.get_text() for t in shares.get_xticklabels()] == list(report.site)
    assert all(ax.get_ylabel() and ax.get_legend() for ax in (backward, gains, forward, shares))
