"""The module table of the design, held to the code by reading the imports."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vgrad"

# A module imports only modules of a lower level, except where a level lists its modules in groups: those of a later group may
# import those of an earlier one.
LEVELS = [
    [{"base"}, {"activations", "draws", "scaled"}, {"gaussian", "initializers"}],
    [{"gram"}, {"layers", "losses"}, {"network"}],
    [
        {"moments", "readout"}, {"criticality", "freeprob", "finite_width", "kernels"}, {"scatter"}, {"prediction", "nested"},
        {"meanfield"}, {"lanes"}, {"backprop", "profile", "jacobian"},
    ],
    [{"fit", "sweep"}, {"reduction"}],
    [
        {"flows", "jaxprs", "probes", "diagnosis"}, {"sites"}, {"instrument"}, {"diagnose"}, {"monitor"},
        {"summary", "testing", "repair"},
    ],
    [
        {"data", "store", "plots", "theory_plots", "overlay", "target", "chunks", "cost", "session", "study_table"},
        {"chunkstore", "task", "progress"}, {"study"}, {"verdicts"}, {"cli"},
    ],
]
THEORY = {
    "moments", "criticality", "meanfield", "freeprob", "finite_width", "kernels", "readout", "scatter", "prediction", "nested",
}
MEASUREMENT = {"backprop", "lanes", "profile", "jacobian", "reduction", "sweep"}
EDGE = set().union(*LEVELS[-1])
ENTRY = {"__init__", "__main__"}  # these tie the package together
RANK = {name: (level, group) for level, groups in enumerate(LEVELS) for group, names in enumerate(groups) for name in names}

MODULES = sorted(p.stem for p in PACKAGE.glob("*.py"))
INNER = [m for m in MODULES if m not in ENTRY]


def parse(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def imported(tree):
    """Every dotted name that the module imports anywhere in it, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node):
    """a.b.c of an attribute chain, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts, node = [node.attr, *parts], node.value
    return ".".join([node.id, *parts]) if isinstance(node, ast.Name) else None


def mentioned(tree):
    return {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := dotted(node))} | set(imported(tree))


def own_imports(module):
    """The modules of the package that this one imports."""
    names = [name.split(".") for name in imported(parse(module))]
    inner = {parts[1] for parts in names if parts[0] == "vgrad" and len(parts) > 1}
    assert not any(parts == ["vgrad"] for parts in names), "import the modules, not the package"
    return inner


@pytest.mark.parametrize("module", INNER)
def test_a_module_imports_only_lower_ones(module):
    assert module in RANK, f"{module} stands in no level of the table: add it to DESIGN.md and here"
    for other in own_imports(module):
        assert other in RANK, f"{module} imports vgrad.{other}, which is no module of the table"
        assert RANK[other] < RANK[module], f"{module} at {RANK[module]} imports {other} at {RANK[other]}"


def test_theory_and_measurement_never_meet():
    def reach(module, seen=frozenset()):
        for other in own_imports(module) - seen:
            seen = reach(other, seen | {other})
        return seen

    for module in INNER:
        if module in THEORY:
            assert not reach(module) & MEASUREMENT
        if module in MEASUREMENT:
            assert not reach(module) & THEORY


def test_nothing_below_imports_the_edge():
    for module in [m for m in MODULES if m not in EDGE | {"__main__"}]:
        assert not own_imports(module) & EDGE


@pytest.mark.parametrize("module", MODULES)
def test_only_public_names(module):
    for name in mentioned(parse(module)):
        for private in ("jax._", "jaxlib", "jax.interpreters", "jax.experimental", "numpy.random", "np.random"):
            assert not name.startswith(private), f"{module} uses {name}"
        assert not name.startswith("jax.config") or module in EDGE, f"{module} uses {name}: the library sets no configuration"


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_short_and_teaches(module):
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 300
    assert len(ast.get_docstring(parse(module)) or "") > 40


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__main__"])
def test_all_names_what_exists(module):
    loaded = importlib.import_module("vgrad" if module == "__init__" else f"vgrad.{module}")
    assert loaded.__all__
    assert len(set(loaded.__all__)) == len(loaded.__all__)
    assert all(hasattr(loaded, name) for name in loaded.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_shared_between_modules_is_in_all(module):
    for name in imported(parse(module)):
        if name.startswith("vgrad.") and name.count(".") == 2:
            _, other, used = name.split(".")
            assert used in importlib.import_module(f"vgrad.{other}").__all__, f"{module} imports {name}, which is not in __all__"


@pytest.mark.parametrize("module", INNER)
def test_public_functions_are_documented(module):
    tree = parse(module)
    exported = importlib.import_module(f"vgrad.{module}").__all__
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported:
            assert ast.get_docstring(node), f"vgrad.{module}.{node.name} has no docstring"


def test_importing_the_package_loads_no_extra_configures_nothing_and_computes_nothing():
    """In a fresh process, with a backend that does not exist: the first computation would fail."""
    code = """
import json, sys, warnings
warnings.simplefilter("error")
import jax
before = dict(jax.config.values)
import vgrad
after = dict(jax.config.values)
extras = ("matplotlib", "xarray", "sklearn", "tqdm", "tyro", "pandas", "h5py", "torch")
print(json.dumps([[m for m in extras if m in sys.modules], [k for k in after if before.get(k) != after[k]]]))
"""
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], []]
