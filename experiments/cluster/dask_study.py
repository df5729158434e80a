"""A study on dask workers: a local cluster here, and any other with its scheduler's address. A minute on two cores.

    python experiments/cluster/dask_study.py [tcp://scheduler:8786]

The chunks are measured by the workers and stored by this process alone, so that the workers need no folder in common with it. A
worker may die: dask sends its chunk to another. This process may die: started again, it goes on where it was.
"""

import sys
from pathlib import Path

from distributed import Client, LocalCluster
from tqdm.auto import tqdm

from vgrad import store, study
from vgrad.chunkstore import Store

CONFIG = study.Config(chunk=32)


def main(address: str | None = None, folder: Path = Path("results/dask"), config: study.Config = CONFIG) -> Path:
    """Measures the study and writes it into the folder."""
    store.check_writable(folder)
    with Client(address or LocalCluster(2, threads_per_worker=1)) as client, Store(folder / "study.chunks") as kept, tqdm() as bar:

        def on_progress(progress):
            bar.total = progress.total
            bar.update(progress.done + progress.kept - bar.n)

        dataset = study.run(config, executor=client.get_executor(), store=kept, resume=True, on_progress=on_progress)
        path = store.save(dataset, folder / "study.nc")
        if dataset.attrs["complete"]:
            kept.remove()
    print(study.table(dataset))
    return path


if __name__ == "__main__":
    print(main(*sys.argv[1:2]))
