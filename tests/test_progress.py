"""The bar shows what was done, at what rate, and how much of the device it used."""

import io

import pytest

from vgrad import cost, progress
from vgrad.chunks import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(cost, "peak", lambda mesh: 1e9)
    return Terminal()


def shown(terminal, monkeypatch, **options):
    """A study of 100 networks, 20 of them from the store and 20 a chunk, of 3e9 flops and twelve seconds each."""
    monkeypatch.setattr("sys.stderr", terminal)
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.bar(**options) as on_progress:
        for done in range(0, 81, 20):
            on_progress(Progress(done, 20, 100, "tanh", done / 20 * 3e9))
    return terminal.getvalue()


def test_a_bar_in_a_terminal(terminal, monkeypatch):
    last = shown(terminal, monkeypatch).split("\r")[-1]
    assert last.startswith("tanh: 100%")
    assert "100/100" in last
    assert "networks/s" in last
    assert "25% of the product peak" in last  # 3e9 flops in 12 s at 1e9 a second


def test_no_bar_and_no_measurement_where_none_is_wanted(terminal, monkeypatch):
    monkeypatch.setattr(cost, "peak", lambda mesh: pytest.fail("it measured"))
    assert shown(terminal, monkeypatch, quiet=True) == ""
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    assert shown(terminal, monkeypatch) == ""
