"""Faults done to the real command in real processes: minutes, so not part of the suite. `make faults`, or one by name:

    python tests/faults/run.py [kill] [signals] [two_runs] [distributed] [disk_full]

Every one ends with a study that is finished by --resume and equals, bit for bit, one that nobody disturbed. `disk_full` mounts a
small tmpfs and so needs root.
"""

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vgrad import store

OPTIONS = "--quiet --phi sigmoid relu --init xavier --depths 2 3 --width 8 --batch 4 --chunk 4"
NUM_KILLS = 50


def study(folder: Path, *options: str, seeds: int) -> subprocess.Popen:
    """The command, started."""
    command = [sys.executable, "-m", "vgrad", "study", *OPTIONS.split(), "--num-seeds", str(seeds), "--out", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int) -> str:
    """Its output, once it has ended with that exit code."""
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == code, (process.returncode, printed)
    return printed


def chunks(folder: Path) -> dict[str, str]:
    """Digest by name of every committed chunk; each must carry its own checksum, by arithmetic that is not the library's."""
    digests = {}
    for path in (folder / "study.chunks").glob("*.npz"):
        content = path.read_bytes()
        assert hashlib.sha256(content[:-32]).digest() == content[-32:], f"{path} is corrupt"
        digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests


def committed(folder: Path, at_least: int, process: subprocess.Popen) -> None:
    """Waits for so many chunks."""
    while len(list((folder / "study.chunks").glob("*.npz"))) < at_least:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def same(folder: Path, reference: Path) -> None:
    """The data sets are equal to the last bit."""
    a, b = store.load(folder / "study.nc"), store.load(reference / "study.nc")
    assert a.identical(b)
    for name in a.data_vars:
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def kill(scratch: Path) -> None:
    """kill -9 at 50 random moments, half of them while chunks are written."""
    seeds, chance, known, torn = 4000, random.Random(0), {}, 0
    finish(study(scratch / "whole", seeds=seeds), 0)
    for number in range(NUM_KILLS):
        process = study(scratch / "killed", "--resume", seeds=seeds)
        if number % 2:
            committed(scratch / "killed", len(known) + 1, process)
        time.sleep(chance.uniform(0, 1 if number % 2 else 4))
        process.kill()
        process.communicate()
        now = chunks(scratch / "killed")
        assert known.items() <= now.items(), "a committed chunk was lost or changed"
        torn += bool(list((scratch / "killed" / "study.chunks").glob(".*.tmp")))
        known = now
    before = len(known)
    finish(study(scratch / "killed", "--resume", seeds=seeds), 0)
    same(scratch / "killed", scratch / "whole")
    print(f"kill: {NUM_KILLS} kills, {torn} of them in the middle of a write; the last run found {before} of 2000 chunks")


def signals(scratch: Path) -> None:
    """SIGTERM, Ctrl-C, Ctrl-C twice: exit codes, and a message that says how to resume."""
    finish(study(scratch / "whole", seeds=400), 0)
    for name, sent, code in (
        ("SIGTERM", [signal.SIGTERM], 143),
        ("Ctrl-C", [signal.SIGINT], 130),
        ("Ctrl-C twice", [signal.SIGINT, signal.SIGINT], 130),
    ):
        process = study(scratch / name, seeds=400)
        committed(scratch / name, 3, process)
        for number in sent:
            process.send_signal(number)
            time.sleep(0.02)
        assert "--resume goes on" in finish(process, code)
        kept = chunks(scratch / name)
        finish(study(scratch / name, "--resume", seeds=400), 0)
        same(scratch / name, scratch / "whole")
        print(f"signals: {name}: exit code {code}, {len(kept)} of 200 chunks kept")


def two_runs(scratch: Path) -> None:
    """A second run on the same store, while the first is at work and after it was killed."""
    finish(study(scratch / "whole", seeds=400), 0)
    first = study(scratch / "shared", seeds=400)
    committed(scratch / "shared", 1, first)
    assert f"another run is at work in {scratch / 'shared' / 'study.chunks'} (process {first.pid}" in finish(
        study(scratch / "shared", "--resume", seeds=400), 2
    )
    first.kill()
    first.communicate()
    assert "go on with --resume" in finish(study(scratch / "shared", seeds=400), 2)
    finish(study(scratch / "shared", "--resume", seeds=400), 0)
    same(scratch / "shared", scratch / "whole")
    print("two_runs: the second was refused, and went on once the first was killed")


def distributed(scratch: Path) -> None:
    """Four processes of one study. The first, where they met, gets kill -9, and the second SIGTERM; the others end in peace."""
    finish(study(scratch / "whole", seeds=400), 0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = ["--distributed", "--coordinator", f"127.0.0.1:{s.getsockname()[1]}", "--num-processes", "4", "--process-id"]
    processes = [study(scratch / "shared", *meet, str(i), seeds=400) for i in range(4)]
    committed(scratch / "shared", 8, processes[0])
    processes[0].kill()
    processes[1].terminate()
    for process, code in zip(processes, (-9, 143, 0, 0), strict=True):
        finish(process, code)
    kept = chunks(scratch / "shared")
    assert 100 <= len(kept) < 200
    finish(study(scratch / "shared", "--resume", seeds=400), 0)
    same(scratch / "shared", scratch / "whole")
    print(f"distributed: two of four processes ended early, the others with exit code 0; {len(kept)} of 200 chunks were there")


def disk_full(scratch: Path) -> None:
    """A file system of 256 KiB, later of 64 MiB."""
    if os.geteuid() != 0:
        raise SystemExit("disk_full mounts a tmpfs: run it as root.")
    finish(study(scratch / "whole", seeds=400), 0)
    disk = scratch / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        message = finish(study(disk, seeds=400), 2)
        assert "No space left on device. Nothing finished is lost: make room, and go on with --resume" in message, message
        kept = chunks(disk)
        assert 0 < len(kept) < 200
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        finish(study(disk, "--resume", seeds=400), 0)
        same(disk, scratch / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)
    print(f"disk_full: {message.strip()}\ndisk_full: {len(kept)} of 200 chunks were on the full disk, and none was lost")


def main(names: list[str]) -> None:
    """All faults, or those named."""
    for fault in (kill, signals, two_runs, distributed, disk_full):
        if not names or fault.__name__ in names:
            with contextlib.ExitStack() as stack:
                fault(Path(stack.enter_context(tempfile.TemporaryDirectory())))


if __name__ == "__main__":
    main(sys.argv[1:])
