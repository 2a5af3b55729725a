"""The workdir of a run: one run at a time, one config for good, and a record of where it ran."""

import fcntl
import json
import logging
import os
import pathlib
import platform
import socket
import sys
import time
from importlib import metadata

from ml_collections import ConfigDict

from regvit_jax import config as configs

PACKAGES = ("regvit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


class WorkdirError(ValueError):
    """The workdir cannot be used for this run."""


class Workdir:
    """A folder held by one run (process 0 holds the lock), released by `close` or by the death of the process.

    Args:
      path: made if absent; a relative one is resolved now.
      active: False on every process but the first: nothing is written or locked.

    Raises:
      WorkdirError: if another live run holds it.
    """

    def __init__(self, path: str | os.PathLike, *, active: bool = True):
        self.path = pathlib.Path(path).expanduser().absolute()
        self._active, self._lock = active, None
        if not active:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise WorkdirError(
                f"{self.path} is in use by another run ({lock.read().strip() or 'unknown'}): wait for it or use another"
            ) from error
        lock.truncate(0)
        lock.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        self._lock = lock

    def bind(self, config: ConfigDict) -> None:
        """Ties the workdir to a config: writes config.json, or checks the one that is there.

        Raises:
          WorkdirError: if it holds another config, with the differences; keys that do not change the result may differ.
        """
        file = self.path / "config.json"
        new = json.loads(configs.to_json(config))
        if file.is_file():
            old = json.loads(file.read_text())
            if old.get("schema") != configs.SCHEMA:
                raise WorkdirError(
                    f"{file} has config schema {old.get('schema')}, this version reads {configs.SCHEMA}: use another "
                    "workdir"
                )
            changed, runtime = configs.differences(old, new)
            if changed:
                lines = "\n".join(f"  {name}: {was!r} there, {now!r} now" for name, (was, now) in changed.items())
                raise WorkdirError(
                    f"{self.path} holds a run with another config:\n{lines}\nUse another --workdir, or give the same "
                    "values to resume."
                )
            for name, (was, now) in runtime.items():
                logging.info("config.%s: was %r, is now %r (does not change the result)", name, was, now)
        if self._active:
            _write(file, configs.to_json(config))

    def record_environment(self, devices: list) -> None:
        """env.json: versions, devices, host and command of the newest start."""
        if self._active:
            versions = {name: metadata.version(name) for name in PACKAGES if _installed(name)}
            record = {
                "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "command": sys.argv,
                "host": socket.gethostname(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "devices": [str(d) for d in devices],
                "device_kind": devices[0].device_kind,
                "versions": versions,
                "environment": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "REGVIT_"))},
            }
            _write(self.path / "env.json", json.dumps(record, indent=2) + "\n")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all: a kill in between leaves the old file."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    os.replace(fresh, path)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
