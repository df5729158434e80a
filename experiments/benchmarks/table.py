"""The table of the benchmark, as Markdown that is also legible in a terminal, from the contents of its JSON file alone."""

import json
import statistics
from pathlib import Path
from typing import Any

from peers import PEERS

__all__ = ["align", "report", "save"]

# On the medium workload: (peer, quantity, at least so many times that of vgrad).
TARGETS = [
    ("torch_loop", "warm", 10.0), ("torch_func", "warm", 3.0), ("unrolled", "warm", 3.0), ("scan", "warm", 4.0),
    ("masked", "warm", 4.0), ("numpy", "warm", 1.0), ("numpy_threads", "warm", 1.0), ("unrolled", "cold", 4.0),
    ("masked", "peak_mb", 1.0), ("masked", "program_mb", 1.0),
]  # fmt: skip
COMPILE_TARGET = 1.5  # the largest depth against the smallest
_HEAD = ("workload", "peer", "cold s", "process s", "warm s", "cold x", "warm x", "peak", "memory MB", "program MB")


def report(result: dict[str, Any]) -> str:
    """The whole table as Markdown, from the contents of the JSON file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    median = _medians(result)
    rates = _product_rates(median)
    lines = [
        "# All depths of a sweep: this library and its peers", "",
        f"{result['processor']}, {result['cores']} cores; JAX on {result['device']}, {result['jax_devices']} devices. "
        f"Python {result['python']}, {versions}. Medians of {result['repeats']} fresh processes, interleaved.", "",
        "Cold: definition to first result. Process: with interpreter, imports and loading. x: times what this library takes. "
        "Peak: share of the rate of a large float32 product by the same library, the best of its processes ("
        + ", ".join(f"{library} {rate:.0f} GFLOP/s" for library, rate in rates.items()) + "), nested algorithms only. "
        "All peers agree on ln ||dW_l|| to 1e-3. Memory: of the process, the compiler's included; program: what the largest "
        "compiled program needs on a device.", "",
    ]  # fmt: skip
    if result["quick"]:
        lines += ["**A quick run of small sizes: no figure below means anything.**", ""]
    lines += align([_HEAD, *(_row(result, median, rates, w, n) for w in median for n in median[w])])
    lines += ["", *(f"- {PEERS[n].what}: skipped, {why}." for n, why in result["skipped"].items())]
    measured = {n for by_name in median.values() for n in by_name}
    lines += [
        f"- {p.what}: timed on 1 in {p.share} seeds, times multiplied." for n, p in PEERS.items() if n in measured and p.share > 1
    ]
    for w, s in result["sizes"].items():
        depths = f"{len(s['depths'])} depths {s['depths'][0]}..{s['depths'][-1]}"
        lines.append(f"- {w}: width {s['width']}, batch {s['batch']}, {depths}, {s['seeds']} seeds; nested {s['gflop']:.1f} GFLOP.")
    lines += ["", *align([("target", "wanted", "measured", ""), *_targets(result, median)])]
    return "\n".join(lines) + "\n"


def _medians(result):
    quantities = ("cold", "wall", "warm", "peak_mb", "program_mb", "product_gflops")
    known = lambda each, q: [r[q] for r in each if r[q] is not None]  # noqa: E731
    middle = lambda each: {q: statistics.median(known(each, q)) for q in quantities if known(each, q)}  # noqa: E731
    return {w: {n: middle(each) for n, each in by_name.items()} for w, by_name in result["runs"].items()}


def _library(name):
    return PEERS[name].function.split(".")[0].removeprefix("peers_")


def _product_rates(median):
    """GFLOP/s of each library: the best of its processes, some of which run with a single thread."""
    rates = {}
    for by_name in median.values():
        for name, m in by_name.items():
            rates[_library(name)] = max(m["product_gflops"], rates.get(_library(name), 0.0))
    return rates


def _row(result, median, rates, workload, name):
    m, ours = median[workload][name], median[workload]["vgrad"]
    share = result["sizes"][workload]["gflop"] / m["warm"] / rates[_library(name)]
    return (
        workload, PEERS[name].what, f"{m['cold']:.2f}", f"{m['wall']:.2f}", f"{m['warm']:.3f}", f"{m['cold'] / ours['cold']:.2f}",
        f"{m['warm'] / ours['warm']:.2f}", f"{share:.0%}" if PEERS[name].nested else "", f"{m['peak_mb']:.0f}",
        f"{m['program_mb']:.0f}" if "program_mb" in m else "",
    )  # fmt: skip


def _targets(result, median):
    """Rows of what was claimed, what was measured, and whether it held."""
    by_name = median.get("medium", {})
    for name, quantity, wanted in TARGETS:
        if name in by_name:
            ratio = by_name[name][quantity] / by_name["vgrad"][quantity]
            label = {"peak_mb": "peak memory of the process", "program_mb": "memory of the program"}.get(quantity, quantity)
            yield f"medium, {label}: {PEERS[name].what}", f">= {wanted:g}x", f"{ratio:.2f}x", _verdict(result, ratio >= wanted)
    seconds = {int(d): statistics.median(r["total"] for r in each) for d, each in result["compile"].items()}
    shallow, deep = min(seconds), max(seconds)
    for depth, s in seconds.items():
        ratio = s / seconds[shallow]
        wanted = (f"<= {COMPILE_TARGET}x", _verdict(result, ratio <= COMPILE_TARGET)) if depth == deep else ("", "")
        yield f"compile one network of depth {depth}", wanted[0], f"{s:.2f} s, {ratio:.2f}x", wanted[1]


def _verdict(result, held):
    return "" if result["quick"] else "ok" if held else "short"


def align(rows):
    """Rows of strings, the first the heading, as a Markdown table that is also legible as it stands."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def save(result: dict[str, Any], text: str, out: Path) -> None:
    """The JSON file, and the table beside it as Markdown."""
    out.write_text(json.dumps(result, indent=1))
    out.with_suffix(".md").write_text(text)
