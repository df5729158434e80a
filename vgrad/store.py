"""Labelled results on disk: one NetCDF file, written beside its name and then renamed, so that it is whole or not there.

`xarray.open_dataset(path)` reads it, with this library or without.
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

__all__ = ["check_writable", "load", "provenance", "save"]


def check_writable(folder: Path) -> None:
    """Makes the folder and proves that a file can be written there, before hours are spent on what could not be saved.

    Raises:
      OSError: it cannot; the message names the folder.
    """
    probe = Path(folder) / f".write-test-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write to {folder}: {reason}. Choose another folder with --out") from error


def save(dataset, path: Path) -> Path:
    """Writes an `xarray.Dataset`, replacing what is there only once the new file is whole."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    packed = {name: {"zlib": True, "complevel": 1} for name, v in dataset.data_vars.items() if v.dtype.kind == "f"}
    try:
        dataset.to_netcdf(beside, engine="h5netcdf", encoding=packed)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def load(path: Path):
    """Reads a result whole into memory. FileNotFoundError, or ValueError if it is none of ours."""
    import xarray

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; `vgrad study` writes results/study.nc.")
    dataset = xarray.load_dataset(path, engine="h5netcdf")
    if "log_delta" not in dataset:
        held = sorted(map(str, dataset.data_vars))
        raise ValueError(f"{path} holds {held}, expected log_delta: it is not a result of `vgrad study`.")
    return dataset


def provenance(config: dict[str, Any], data: str) -> dict[str, str]:
    """Attributes that say how a result came about: configuration, data, versions and device."""
    device = jax.devices()[0]
    return {
        "config": json.dumps(config, default=str),
        "data": data,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform}, {platform.machine()}, {os.cpu_count()} cores)",
        "versions": json.dumps(
            {"python": platform.python_version(), **{p: version(p) for p in ("vgrad", "jax", "jaxlib", "numpy", "xarray")}}
        ),
    }
