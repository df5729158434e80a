"""What the documentation shows is what the code does."""

import contextlib
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from vgrad import activations

ROOT = Path(__file__).parents[1]


EXAMPLES = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
NUMBER = r"[-+]?\d+\.\d+"


@pytest.mark.parametrize(("code", "shown"), EXAMPLES, ids=["profile", "diagnose"])
def test_the_readme_example_prints_what_it_says(code, shown):
    printed = io.StringIO()
    as_a_reader = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with contextlib.redirect_stdout(printed), as_a_reader[0], as_a_reader[1]:
        exec(code, {})
    numbers = [np.array(re.findall(NUMBER, text), float) for text in (printed.getvalue(), shown)]
    np.testing.assert_allclose(*numbers, rtol=1e-3, atol=2e-3)  # the same draws; rounding differs from machine to machine
    assert re.sub(NUMBER, "", printed.getvalue()).split() == re.sub(NUMBER, "", shown).split()
    assert len(code.strip().splitlines()) <= 15


def test_the_table_of_activations_is_the_registry():
    assert activations.table() in (ROOT / "docs" / "activations.md").read_text()


def test_the_guide_to_the_code_names_every_module():
    guide = (ROOT / "README.md").read_text().split("## Reading the code")[1].split("\n## ")[0]
    modules = {p.stem for p in (ROOT / "vgrad").glob("*.py")} - {"__init__", "__main__"}
    assert set(re.findall(r"`(\w+)`", guide)) == modules
