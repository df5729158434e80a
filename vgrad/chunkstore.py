"""A folder of finished chunks: what was measured survives whatever stops the measuring.

A finished chunk becomes one file: an .npz with its SHA-256 behind it,

    file = npz || sha256(npz),

written beside its name, flushed to the disk and then renamed. So whatever kills the process, a chunk is whole or not there, and
whatever changes the file later is seen. `np.load` reads it as it is. `plan.json` says what the chunks belong to: configuration,
data, code and the plan itself.
"""

import contextlib
import hashlib
import io
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgrad.chunks import Chunk, Memory, Plan

try:
    import fcntl
except ImportError:  # a platform without it has no lock on the store; the commits stay atomic
    fcntl = None

__all__ = ["Damaged", "Store"]

_DIGEST = hashlib.sha256().digest_size
_LABEL = "vgrad_chunk"


class Damaged(ValueError):
    """A chunk whose checksum is wrong, or that belongs to another study. The message names its file."""


class Store(Memory):
    """Chunks in a folder, for one run, or for the processes of one distributed run, at a time. A context manager.

    The kernel holds the lock (flock) and lets go of it however the process ends, so nothing has to be found out from process
    numbers or clocks. Should a file system have no locks, two runs at once waste work but write the same chunks.

    Args:
      folder: made if it is not there.
      member, num_members: which process of how many this is; each works on its own chunks, and they share the lock.
    Raises:
      OSError: the folder cannot be written to.  BlockingIOError: another run is at work in it.
    """

    def __init__(self, folder: Path, *, member: int = 0, num_members: int = 1):
        self.folder, self.member, self.num_members = Path(folder), member, num_members
        self._plan, self._of = self.folder / "plan.json", ""
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Store":
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            if self.num_members > 1:
                self._lock(held, ".lock", shared=True)
                self._lock(held, f".lock-{self.member}")
            else:
                self._lock(held, ".lock")
            mine = f"*.{self.member}.tmp" if self.num_members > 1 else "*.tmp"
            for leftover in self.folder.glob("." + mine):
                leftover.unlink(missing_ok=True)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def begin(self, identity: Mapping[str, Any], plan: Plan, *, resume: bool, fixed: bool) -> Plan:
        """Takes up what the folder holds, or starts anew. Returns the plan to follow.

        Args:
          identity: what the results depend on, as nested mappings of what JSON can write. Two studies of one identity and one plan
            are the same study.
          plan: how to cut a new study.
          resume: go on with what is there. A folder with chunks is refused otherwise.
          fixed: `plan` was asked for by the user, and must be that of the folder.
        Raises:
          ValueError: chunks are there and `resume` is False; or they are of another study, and the message says in what.
        """
        ours: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        with contextlib.ExitStack() as held:
            if self.num_members > 1:
                self._lock(held, ".begin", wait=True)
            if not self._plan.exists():
                for orphan in self.folder.glob("*.npz"):  # of a store that was being removed
                    orphan.unlink(missing_ok=True)
                self._write(self._plan, json.dumps(ours | {"plan": plan._asdict()}, indent=1).encode())
            elif not resume:
                num = sum(1 for _ in self.folder.glob("*.npz"))
                raise ValueError(
                    f"{self.folder} holds {num} finished chunks of a study that was stopped: go on with --resume, or remove it."
                )
        try:
            theirs = json.loads(self._plan.read_text())
            plan = plan if fixed else Plan(**theirs["plan"])
            other = _differences(theirs, ours | {"plan": plan._asdict()})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._plan} is damaged ({error}): remove {self.folder} and start anew.") from error
        if other:
            raise ValueError(
                f"{self.folder} belongs to another study: {'; '.join(other)}. Choose another folder with --out, or remove this one."
            )
        self._of = hashlib.sha256(json.dumps(theirs, sort_keys=True).encode()).hexdigest()
        return plan

    def missing(self, chunks: Iterable[Chunk]) -> list[Chunk]:
        """Those that are not finished."""
        there = {path.name for path in self.folder.glob("*.npz")}
        return [c for c in chunks if self._path(c).name not in there]

    def discard_damaged(self, chunks: Iterable[Chunk]) -> list[str]:
        """Reads every finished chunk, removes those whose checksum is wrong, and says which and why."""
        messages = []
        for chunk in chunks:
            try:
                self.read(chunk)
            except FileNotFoundError:
                continue
            except Damaged as error:
                messages.append(str(error))
                self._path(chunk).unlink(missing_ok=True)
        return messages

    def commit(self, chunk: Chunk, arrays: Mapping[str, np.ndarray]) -> None:
        """Makes a chunk part of the store, whole or not at all.

        Raises:
          OSError: it cannot be written, as on a full disk; what was there stays valid.
        """
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, **{_LABEL: np.array(self._label(chunk))})  # pyright: ignore[reportArgumentType]
        payload = buffer.getvalue()
        self._write(self._path(chunk), payload + hashlib.sha256(payload).digest())

    def read(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk. `Damaged` if they are not those that were committed."""
        with np.load(io.BytesIO(self._payload(chunk)), allow_pickle=False) as file:
            arrays = dict(file)
        if str(arrays.pop(_LABEL)) != self._label(chunk):
            raise Damaged(f"{self._path(chunk)} is a chunk of another study. --resume measures it again.")
        return arrays

    def empty(self, shape, dtype) -> np.ndarray:
        """An array to gather chunks in; from 1 GiB on a nameless file in the folder, so that a study may exceed the memory."""
        if np.prod(shape, dtype=float) * np.dtype(dtype).itemsize < 2**30:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:  # the map keeps what it is of
            return np.memmap(file, dtype, "w+", shape=shape)

    def last_to_finish(self) -> None:
        """Waits until no other process of a distributed run looks for missing chunks or gathers them, and keeps the others out."""
        if self.num_members > 1:
            self._lock(self._held, ".finish", wait=True)

    def remove(self) -> None:
        """Removes what the store holds, the plan first: should this be cut short, the rest counts as leftovers."""
        self._plan.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, chunk):
        return self.folder / "points{}-{}_seeds{}-{}.npz".format(*chunk.points, *chunk.seeds)

    def _label(self, chunk):
        return f"{self._of} {self._path(chunk).name}"

    def _payload(self, chunk):
        path = self._path(chunk)
        content = path.read_bytes()
        payload, digest = content[:-_DIGEST], content[-_DIGEST:]
        if hashlib.sha256(payload).digest() != digest:
            raise Damaged(f"{path} is damaged: its checksum is wrong. --resume measures it again.")
        return payload

    def _write(self, path, content):
        beside = path.with_name(f".{path.name}.{self.member}.tmp")
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"cannot write {path}: {reason}. Nothing finished is lost: make room, and go on with --resume"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)

    def _lock(self, held, name, *, shared=False, wait=False):
        """Locks a file of the folder until `held` closes."""
        path, mine = self.folder / name, f"process {os.getpid()} on {socket.gethostname()}"
        while True:
            file = held.enter_context(open(path, "a+"))  # noqa: SIM115
            try:
                if fcntl is not None:
                    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read() or "another process"
                message = f"another run is at work in {self.folder} ({owner}): wait for it, or choose another folder with --out"
                raise BlockingIOError(error.errno, message) from None
            except OSError as error:
                message = f"{self.folder} is on a file system without locks ({error.strerror}): start one run at a time."
                warnings.warn(message, stacklevel=4)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break  # else its owner removed the store while we waited
            self.folder.mkdir(parents=True, exist_ok=True)
        file.truncate(0)
        file.write(mine)
        file.flush()


def _sync_folder(path):
    """A rename is on the disk once its folder is."""
    with contextlib.suppress(PermissionError):  # not every platform opens a folder
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _differences(theirs, ours, name=""):
    """What differs between two nested mappings, a phrase for each leaf."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return [] if theirs == ours else [f"{name} is {theirs!r} there and {ours!r} here"]
    return [d for k in theirs | ours for d in _differences(theirs.get(k), ours.get(k), f"{name}.{k}" if name else k)]
