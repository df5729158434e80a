"""What the documentation shows is what the code does."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np

from vgrad import activations

ROOT = Path(__file__).parents[1]


def test_the_readme_example_prints_what_it_says():
    readme = (ROOT / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", readme, re.S).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    numbers = [np.array(re.findall(r"[-+]?\d+\.\d+", text), float) for text in (printed.getvalue(), shown)]
    assert len(code.strip().splitlines()) <= 15
    np.testing.assert_allclose(*numbers, rtol=1e-3, atol=2e-3)  # the same draws; rounding differs from machine to machine
    assert [line.split()[0] for line in printed.getvalue().splitlines()] == [line.split()[0] for line in shown.splitlines()]


def test_the_table_of_activations_is_the_registry():
    assert activations.table() in (ROOT / "docs" / "activations.md").read_text()
