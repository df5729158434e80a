"""Many devices and many processes: the numbers are those of one, and whoever dies takes nobody along.

Processes share the suite's cache of compiled programs, so that only the first of them compiles.
"""

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
import pytest

from vgrad import cli, study
from vgrad import store as files
from vgrad.chunkstore import Store

pytestmark = pytest.mark.xdist_group("hosts")  # its fixtures are costly: one process for all

OPTIONS = "--phi relu --init xavier he --depths 2 3 --num-seeds 8 --width 8 --batch 4 --chunk 2 --quiet"
# One chunk takes a while, so that there is a moment at which to kill.
SLOW = """
import sys, time
from vgrad import cli, session, task
sweep, session.all_devices = task.sweep, lambda: None  # one device is one program for all processes of these tests
task.sweep = lambda *a, **k: (sweep(*a, **k), time.sleep(float(sys.argv[1])))[0]
cli.main(sys.argv[2:])
"""
EIGHT = """
import jax, numpy as np, vgrad
from vgrad import losses
x, t = np.ones((3, 4), np.float32) * np.arange(1, 4, dtype=np.float32)[:, None], np.array([0, 1, 1])
family = lambda point: vgrad.mlp(6, "tanh", 4, 2, sigma_w=point["sigma_w"])
mesh = jax.make_mesh((8,), ("cases",), axis_types=(jax.sharding.AxisType.Auto,))
options = dict(key=jax.random.key(0), num_seeds=3, depths=[2, 4], batch=(x, t), loss=losses.cross_entropy)
one, eight = (vgrad.sweep(family, {"sigma_w": [0.5, 1.0, 2.0]}, mesh=m, **options) for m in (None, mesh))
for a, b in zip(one, eight):
    np.testing.assert_allclose(a, b, atol=1e-5)
print(jax.device_count())
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Eight chunks, of data of one's own: the digits come with a library that takes every process a second to import."""
    path = tmp_path_factory.mktemp("data") / "own.npz"
    np.savez(path, x=np.random.default_rng(0).standard_normal((40, 6)), y=np.arange(40) % 3)
    return study.Config(phi=("relu",), init=("xavier", "he"), depths=(2, 3), num_seeds=8, width=8, batch=4, chunk=2, data=path)


@pytest.fixture(scope="module")
def whole(config):
    return study.run(config)


@pytest.fixture(scope="module")
def environment():
    """For child processes: one device each, no more optimisation than here, and this process's cache."""
    folder = str(jax.config.jax_compilation_cache_dir)
    cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | cache


def close(dataset, whole):
    """Another process may compile for another number of threads, so to rounding."""
    assert dataset.attrs["complete"] == 1
    for name in whole.data_vars:
        np.testing.assert_allclose(dataset[name], whole[name], rtol=1e-5, atol=1e-5)


def test_eight_devices_are_one_to_rounding_and_say_nothing_to_each_other(tmp_path, environment):
    """Nine cases, which eight devices pad to sixteen. XLA writes out the programs that it runs."""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*_compiled.*"
    flags = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    env = environment | {"JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "8"
    programs = [p.read_text() for p in tmp_path.glob("*after_optimizations.txt")]
    sharded = [p for p in programs if "num_partitions=8" in p]
    assert len(sharded) == 1
    for program in sharded:
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert collective not in program


def test_chunks_in_processes_of_a_pool(environment, config, whole, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        close(study.run(config, executor=pool), whole)


@pytest.fixture
def client(environment, monkeypatch):
    """Two workers of one thread each."""
    from distributed import Client, LocalCluster

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with LocalCluster(2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster, Client(cluster) as client:
        yield client


def test_dask_goes_on_when_a_worker_is_killed(tmp_path, client, config, whole):
    killed, workers = [], client.run(os.getpid)

    def kill_one(progress):
        if progress.done and not killed:
            killed.append(next(iter(workers.values())))
            os.kill(killed[0], signal.SIGKILL)

    with Store(tmp_path / "store") as store:
        close(study.run(config, store=store, executor=client.get_executor(), on_progress=kill_one), whole)
    assert killed
    assert killed[0] not in client.run(os.getpid).values()

    sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "cluster"))
    script = importlib.import_module("dask_study")
    sys.path.pop(0)
    close(files.load(script.main(client.scheduler.address, tmp_path, config)), whole)
    assert not (tmp_path / "study.chunks").exists()


def start(folder, environment, *, data, delay, where=()):
    command = [sys.executable, "-c", SLOW, str(delay), "study", *OPTIONS.split(), "--data", str(data), "--out", str(folder)]
    command += ["--distributed", *where]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port(ports=(0,)):
    for port in ports:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return s.getsockname()[1]
    raise AssertionError(f"none of the ports {ports} is free")


def slurm(of):
    """What Slurm's `srun` sets on one machine, for each process. jax makes the port from the job's number."""
    first = 2**16 - 2**12
    job = free_port(range(first + os.getpid() % 2**11, 2**16)) - first
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(of)}
    return [step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(of)]


def test_two_processes_of_slurm_share_a_study(tmp_path, environment, config, whole):
    processes = [start(tmp_path, environment | step, data=config.data, delay=0.0) for step in slurm(2)]
    printed = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], printed
    assert sum("study.nc" in text for text in printed) == 1
    assert sum("has done its share" in text for text in printed) == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".nc", ".png", ".png", ".png"]
    close(files.load(tmp_path / "study.nc"), whole)


def test_four_processes_of_which_the_coordinator_is_killed(tmp_path, environment, config, whole):
    port, processes = free_port(), []
    for number in range(4):
        where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "4", "--process-id", str(number)]
        processes.append(start(tmp_path, environment, data=config.data, delay=0.0 if number else 3.0, where=where))
    deadline = time.monotonic() + 120  # the first is slow: once there is a chunk, all have met
    while not list(tmp_path.glob("study.chunks/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)
    printed = [p.communicate()[0] for p in processes]
    assert [p.returncode for p in processes] == [-9, 0, 0, 0], printed
    kept = sorted(tmp_path.glob("study.chunks/*.npz"))
    assert len(kept) in (6, 7)  # those of three processes, and one of the victim at most
    before = [p.read_bytes() for p in kept]
    with Store(tmp_path / "study.chunks") as store:
        close(study.run(config, store=store, resume=True), whole)
    assert [p.read_bytes() for p in kept] == before


@pytest.mark.parametrize(
    ("environment_of_mpi", "method"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi4py"),  # version 5
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}, None),  # version 4
    ],
)
def test_where_nothing_is_found_out_the_command_asks(environment_of_mpi, method, monkeypatch, capsys, tmp_path):
    asked = []

    def initialize(*_, cluster_detection_method):
        asked.append(cluster_detection_method)
        raise ValueError("coordinator_address should be defined.")

    for name, value in environment_of_mpi.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["study", "--distributed", "--out", str(tmp_path)])
    assert asked == [method]
    words = capsys.readouterr().err
    assert "give --coordinator host:port, --num-processes and --process-id" in words
    assert ("install mpi4py" in words) == (method == "mpi4py")
