"""How far a study is, in a terminal or a notebook: networks per second, time left, and the share of what the device can do.

The share is the arithmetic of the nested algorithm (`vgrad.cost`) over the time it took at the measured rate of one large product,

    share = flops done / (seconds * peak),

counted from the first finished chunk on, because that one had to be compiled.

    with vgrad.progress.bar() as on_progress:
        dataset = vgrad.study.run(config, on_progress=on_progress)
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from vgrad import cost
from vgrad.chunks import Progress

__all__ = ["bar"]


@contextlib.contextmanager
def bar(mesh=None, *, quiet: bool = False) -> Iterator[Callable[[Progress], None]]:
    """A progress bar; gives the `on_progress` for `vgrad.study.run`.

    Args:
      mesh: devices that the study runs on; their peak is measured first, in about a second. None: the default device.
      quiet: no bar. There is none either where the output goes to a file.
    """
    from tqdm.auto import tqdm

    with tqdm(unit=" networks", smoothing=0, disable=True if quiet else None) as shown:
        peak = 0.0 if shown.disable else cost.peak(mesh)
        first = None

        def on_progress(progress):
            nonlocal first
            shown.set_description(progress.what, refresh=False)
            if not progress.done:
                shown.reset(progress.total)
                shown.initial = shown.n = progress.kept
            elif first is None:  # it had to be compiled: the share is counted from here on
                first = time.perf_counter(), progress.flops
            elif peak:
                share = (progress.flops - first[1]) / (time.perf_counter() - first[0]) / peak
                shown.set_postfix_str(f"{share:.0%} of the product peak", refresh=False)
            shown.update(progress.done + progress.kept - shown.n)

        yield on_progress
