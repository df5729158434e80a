"""Whatever happens to a study, nothing that was committed is lost, and the result is that of an uninterrupted one, bit for bit."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from vgrad import cli, plots, session, study, task
from vgrad import store as files
from vgrad.base import Profile
from vgrad.chunkstore import Damaged, Store

pytestmark = pytest.mark.xdist_group("faults")  # its fixtures are costly: one process for all

CONFIG = study.Config(phi=("sigmoid", "relu"), init=("xavier", "he"), depths=(2, 3, 5), num_seeds=5, width=8, batch=4, chunk=3)
NUM_CHUNKS = 8  # four points, whose five seeds are cut into three and two


@pytest.fixture(scope="module")
def whole():
    return study.run(CONFIG)


@pytest.fixture
def measured(monkeypatch):
    """The chunks that are measured from here on."""
    chunks, measure = [], study.measure
    monkeypatch.setattr(study, "measure", lambda task, chunk, **options: chunks.append(chunk) or measure(task, chunk, **options))
    return chunks


def run(folder, config=CONFIG, **options):
    with Store(folder) as store:
        return study.run(config, store=store, **options)


def stop_after(number):
    """A `stopping` that is true once so many chunks are finished."""
    count = iter(range(number + 1))
    return lambda: next(count) >= number


def same(a, b):
    """Equal to the last bit, NaN for NaN, label for label."""
    assert a.identical(b), (a, b)
    for name in a.data_vars:
        assert a[name].values.tobytes() == b[name].values.tobytes(), name


def half_done(folder):
    partial = run(folder, stopping=stop_after(5))
    assert partial.attrs["complete"] == 0
    return sorted(folder.glob("*.npz"))


# Stopped and taken up again.


@pytest.mark.parametrize("number", [0, 1, 5, NUM_CHUNKS])
def test_stopped_and_resumed_is_the_uninterrupted_study(number, tmp_path, whole, measured):
    partial = run(tmp_path, stopping=stop_after(number))
    assert len(measured) == number
    assert np.isfinite(partial.plain_float32_grad_w1).sum() == sum((c.seeds[1] - c.seeds[0]) for c in measured)
    same(run(tmp_path, resume=True), whole)
    assert len(measured) == len(set(measured)) == NUM_CHUNKS  # nothing twice


def test_the_plan_of_the_store_is_followed_unless_another_is_asked_for(tmp_path, measured):
    half_done(tmp_path)
    free = CONFIG.__class__(**(vars(CONFIG) | {"chunk": None}))
    run(tmp_path, free, resume=True)
    assert len(measured) == NUM_CHUNKS
    with pytest.raises(ValueError, match=r"plan.seeds_at_once is 3 there and 1 here"):
        run(tmp_path, CONFIG.__class__(**(vars(CONFIG) | {"chunk": 2})), resume=True)


def test_the_cut_does_not_matter_beyond_rounding(whole):
    other = study.run(CONFIG.__class__(**(vars(CONFIG) | {"chunk": 10})))
    for name in whole.data_vars:
        np.testing.assert_allclose(other[name], whole[name], rtol=1e-5, atol=1e-5)


def test_an_unfinished_study_is_not_overwritten(tmp_path):
    before = {p: p.read_bytes() for p in half_done(tmp_path)}
    with pytest.raises(ValueError, match=r"holds 5 finished chunks .* go on with --resume, or remove it"):
        run(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.glob("*.npz")} == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (dict(sigma_b=0.5), r"config.sigma_b is 0.0 there and 0.5 here"),
        (dict(phi=("sigmoid", "tanh")), r"config.phi is \['sigmoid', 'relu'\] there and \['sigmoid', 'tanh'\] here"),
        (dict(key=3), r"config.key is 0 there and 3 here; data.x is '\w{16}' there and"),
    ],
)
def test_a_store_of_another_configuration_is_refused(change, what, tmp_path, measured):
    half_done(tmp_path)
    with pytest.raises(ValueError, match=what):
        run(tmp_path, CONFIG.__class__(**(vars(CONFIG) | change)), resume=True)
    assert len(measured) == 5


def test_a_store_of_other_data_code_or_precision_is_refused(tmp_path, monkeypatch, x64):
    x, y = np.random.default_rng(0).normal(size=(40, 64)), np.arange(40) % 10
    data = tmp_path / "data.npz"
    np.savez(data, x=x, y=y)
    config = study.Config(**(vars(CONFIG) | {"data": data}))
    with jax.enable_x64(False):
        run(tmp_path / "store", config, stopping=stop_after(1))
    with pytest.raises(ValueError, match=r"config.dtype is 'float32' there and 'float64' here"):
        run(tmp_path / "store", config, resume=True)
    np.savez(data, x=x + np.eye(40, 64), y=y)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"another study: data.x is '\w{16}' there and '\w{16}' here"):
        run(tmp_path / "store", config, resume=True)
    np.savez(data, x=x, y=y)
    monkeypatch.setattr(study, "version", lambda name: "9.9" if name == "jax" else "0")
    with jax.enable_x64(False), pytest.raises(ValueError, match=rf"code.jax is '{jax.__version__}' there and '9.9' here"):
        run(tmp_path / "store", config, resume=True)


# What is on the disk.


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        place = {"first": 0, "middle": len(content) // 2, "checksum": -1}[how]
        content[place] ^= 1 << 3
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "empty", "first", "middle", "checksum"])
def test_a_damaged_chunk_is_detected_named_and_measured_again(how, tmp_path, whole, measured):
    broken = half_done(tmp_path)[1]
    damage(broken, how)
    with pytest.warns(UserWarning, match=f"{broken.name} is damaged: its checksum is wrong") as warned:
        same(run(tmp_path, resume=True), whole)
    assert len(warned) == 1
    assert len(measured) == NUM_CHUNKS + 1


def test_a_chunk_of_another_study_is_no_chunk_of_this_one(tmp_path):
    ours = half_done(tmp_path / "a")[0]
    run(tmp_path / "b", CONFIG.__class__(**(vars(CONFIG) | {"key": 1})), stopping=stop_after(5))
    ours.write_bytes((tmp_path / "b" / ours.name).read_bytes())
    with pytest.warns(UserWarning, match="is a chunk of another study"):
        assert run(tmp_path / "a", resume=True).attrs["complete"] == 1


def test_a_chunk_damaged_while_the_study_runs_does_not_get_into_the_result(tmp_path):
    def spoil(progress):
        if progress.done == progress.total:
            damage(sorted(tmp_path.glob("*.npz"))[0], "middle")

    with pytest.raises(Damaged, match="--resume measures it again"):
        run(tmp_path, on_progress=spoil)


def test_a_damaged_plan_is_an_error_that_says_what_to_do(tmp_path):
    half_done(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ValueError, match=r"plan.json is damaged .* remove"):
        run(tmp_path, resume=True)


def test_chunks_are_plain_npz_files(tmp_path, whole):
    path = half_done(tmp_path)[0]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["log_delta"][0, 0], whole.log_delta.values[0, 0, 0])


def test_leftovers_are_cleaned_at_the_start(tmp_path, whole):
    half_done(tmp_path)
    (tmp_path / ".points3-4_seeds2-3.npz.0.tmp").write_bytes(b"half a chu")
    same(run(tmp_path, resume=True), whole)
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "plan.json").unlink()  # as when a store was being removed
    same(run(tmp_path), whole)


def test_a_store_is_removed_whole(tmp_path):
    with Store(tmp_path / "store") as store:
        study.run(CONFIG, store=store, stopping=stop_after(2))
        store.remove()
    assert list(tmp_path.iterdir()) == []


def test_times_of_files_mean_nothing(tmp_path, whole, measured):
    paths = half_done(tmp_path)
    for path, year in zip([*paths, tmp_path / "plan.json", tmp_path / ".lock"], [0, 5e9, 0, 5e9, 0, 5e9, 5e9], strict=True):
        os.utime(path, (year, year))
    same(run(tmp_path, resume=True), whole)
    assert len(measured) == NUM_CHUNKS


@pytest.fixture
def small_files():
    """Limits the size of a file: it stands for a full disk, a write fails half way as there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_clear_error_and_the_store_stays_valid(tmp_path, whole, measured, small_files):
    before = half_done(tmp_path)
    small_files(before[0].stat().st_size // 2)
    with pytest.raises(OSError, match=r"cannot write .*npz: File too large. Nothing finished is lost") as failed:
        run(tmp_path, resume=True)
    small_files()
    assert failed.value.errno == errno.EFBIG
    assert sorted(tmp_path.glob("*.npz")) == before
    assert not list(tmp_path.glob(".*.tmp"))
    measured.clear()
    same(run(tmp_path, resume=True), whole)
    assert len(measured) == NUM_CHUNKS - len(before)


@pytest.fixture
def read_only():
    """A folder that anybody may read; those of pytest are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)


def test_a_read_only_folder_is_an_error_before_anything_is_measured(read_only, measured, capsys):
    user = os.geteuid()
    if user == 0:  # whom no permission stops
        os.seteuid(65534)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["study", "--no-cache", "--out", str(read_only)])
        with pytest.raises(PermissionError):
            run(read_only)
    finally:
        os.seteuid(user)
    assert stopped.value.code == 2
    assert f"cannot write to {read_only}: Permission denied" in capsys.readouterr().err
    assert not measured
    assert plots.FIGURES  # imported before the user was changed: it, too, writes files


# Two runs, and signals.

HOLD = """
import sys
import tempfile
from vgrad.chunkstore import Store
with Store(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_on_a_store_is_refused_until_the_first_is_dead(tmp_path, whole):
    first = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"another run is at work in .*\(process {first.pid} on"):
            run(tmp_path)
        with pytest.raises(BlockingIOError), Store(tmp_path, member=1, num_members=2):
            pass
        first.kill()  # kill -9: the kernel lets go of the lock
        first.wait()
    same(run(tmp_path), whole)


def test_processes_of_one_distributed_run_share_the_store_and_the_last_has_the_result(tmp_path, whole):
    with Store(tmp_path, member=1, num_members=2) as one, Store(tmp_path, member=0, num_members=2) as zero:
        assert study.run(CONFIG, store=one, resume=True) is None
        with pytest.raises(BlockingIOError), Store(tmp_path):
            pass
        with pytest.raises(BlockingIOError), Store(tmp_path, member=1, num_members=2):
            pass
        one.__exit__()
        same(study.run(CONFIG, store=zero, resume=True), whole)
    assert len(list(tmp_path.glob("*.npz"))) == NUM_CHUNKS


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_distributed_run_is_no_success(times, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "roll_call", lambda *_: (0, 2))
    monkeypatch.setattr(session, "all_devices", lambda: None)
    measure = study.measure

    def disturbed(*args, **options):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*args, **options)

    monkeypatch.setattr(study, "measure", disturbed)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *OPTIONS.split(), "--distributed", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "the same command with --resume goes on" in "".join(capsys.readouterr())
    assert len(list(tmp_path.glob("study.chunks/*.npz"))) == 2 - times


def test_a_study_that_never_began_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="did you mean"):
        run(tmp_path / "store", CONFIG.__class__(phi=("tahn",)))
    assert list(tmp_path.iterdir()) == []


OPTIONS = "--phi sigmoid relu --init xavier he --depths 2 3 5 --num-seeds 5 --width 8 --batch 4 --chunk 3 --quiet --no-cache"


@pytest.mark.parametrize(
    ("signals", "code", "kept"),
    [([signal.SIGTERM], 143, 3), ([signal.SIGINT], 130, 3), ([signal.SIGINT, signal.SIGINT], 130, 2)],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C twice"],
)
def test_a_signal_stops_the_command_and_says_how_to_go_on(signals, code, kept, tmp_path, capsys, monkeypatch, whole):
    """Sent while the third chunk is in flight: it is finished, or dropped on the second Ctrl-C."""
    monkeypatch.setattr(session, "all_devices", lambda: None)
    sweep, calls = task.sweep, []

    def disturbed(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            for number in signals:
                os.kill(os.getpid(), number)
        return sweep(*args, **options)

    monkeypatch.setattr(task, "sweep", disturbed)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["study", *OPTIONS.split(), "--out", str(tmp_path)])
    assert stopped.value.code == code
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert "the same command with --resume goes on" in capsys.readouterr().out
    assert (tmp_path / "study-partial.nc").exists() == (code == 130)
    assert len(list((tmp_path / "study.chunks").glob("*.npz"))) == kept
    monkeypatch.setattr(task, "sweep", sweep)
    cli.main(["study", *OPTIONS.split(), "--resume", "--out", str(tmp_path)])
    resumed = files.load(tmp_path / "study.nc")
    for name in whole.data_vars:
        np.testing.assert_array_equal(resumed[name], whole[name])
    assert json.loads(resumed.attrs["config"]) == json.loads(whole.attrs["config"])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".nc", ".png", ".png", ".png"]


# What comes out of the device.


def out_of_memory(monkeypatch, room, error=None):
    """A device with room for so many cases. Returns the numbers of cases that were tried."""
    sweep, tried = task.sweep, []

    def small(family, grid, *, num_seeds, **options):
        tried.append(len(grid) * num_seeds)
        if tried[-1] > room:
            raise error or jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes.")
        return sweep(family, grid, num_seeds=num_seeds, **options)

    monkeypatch.setattr(task, "sweep", small)
    return tried


@pytest.mark.parametrize("error", [None, MemoryError()])
def test_out_of_memory_halves_the_portion_and_goes_on(error, monkeypatch, whole):
    tried = out_of_memory(monkeypatch, 10, error)
    config = CONFIG.__class__(**(vars(CONFIG) | {"chunk": 20}))
    results = study.run(config)
    for name in whole.data_vars:
        np.testing.assert_allclose(results[name], whole[name], rtol=1e-5, atol=1e-5)
    assert tried == [20, 10, 10]


def test_what_was_learnt_serves_the_following_chunks(monkeypatch):
    monkeypatch.setattr(task, "_plain_float32", lambda family, grid, *, num_seeds, **_: np.zeros((len(grid), num_seeds)))
    zeros = lambda family, grid, *, num_seeds, **_: Profile(*[np.zeros((len(grid), num_seeds, 3, 5))] * 6)  # noqa: E731
    monkeypatch.setattr(task, "sweep", zeros)
    tried = out_of_memory(monkeypatch, 1)
    study.run(CONFIG)
    assert tried == [3] + [1] * 20


def test_no_room_for_a_single_case_and_other_errors_are_raised(monkeypatch):
    out_of_memory(monkeypatch, 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        study.run(CONFIG)
    out_of_memory(monkeypatch, 0, jax.errors.JaxRuntimeError("INTERNAL: a fault"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        study.run(CONFIG)


def test_a_point_without_numbers_does_not_poison_its_chunk(tmp_path, whole):
    """Weights beyond float32 read NaN; the points that share their chunk read what they always do."""
    config = CONFIG.__class__(**(vars(CONFIG) | {"init": ("normal:1.0", "normal:3e38"), "chunk": 10}))
    dataset = run(tmp_path, config)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert not np.isfinite(dataset.log_delta.isel(init=1, depth=-1, layer=0)).any()
    assert np.isnan(dataset.log_delta.isel(init=1, depth=-1, layer=0)).any()
    for name in whole.data_vars:
        np.testing.assert_allclose(dataset[name].isel(init=0), whole[name].isel(init=0), rtol=1e-5, atol=1e-5)


def test_threads_are_an_executor_and_a_mesh_is_none_of_its_business(tmp_path, whole):
    with ThreadPoolExecutor(2) as pool:
        with Store(tmp_path) as store:
            same(study.run(CONFIG, store=store, executor=pool), whole)
        with pytest.raises(ValueError, match="got an executor and a mesh"):
            study.run(CONFIG, executor=pool, mesh=object())


def test_a_large_study_is_gathered_on_the_disk(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(np, "prod", lambda *a, **k: 2.0**27)  # numbers of eight bytes
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"cannot gather the results in .*: No space left on device. Nothing finished is lost"):
            run(tmp_path)
    dataset = run(tmp_path, resume=True)
    assert isinstance(dataset.log_delta.values.base.base, np.memmap) or isinstance(dataset.log_delta.values.base, np.memmap)
    same(dataset, whole)
