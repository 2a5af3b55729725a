"""Where a dataset that TFDS prepared lies: NAME[/CONFIG][:VERSION]@DIR -> the folder with its dataset_info.json.

TFDS keeps DIR/name/version or DIR/name/config/version. Found here by the folders alone, so that no builder class is
imported; TFDS's own search wants the class to know the default configuration.
"""

import json
import os
import pathlib
import re

INFO = "dataset_info.json"
# `regvit data prepare` keeps its plan here; a folder with a plan and without INFO is unfinished.
PLAN = "prepare.json"

_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>[^:@]+))?(?::(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def prepared_folder(path: str, kind: str = "tfds") -> str:
    """The folder that `path`, the part of the source string behind `kind:`, names.

    Raises:
      FileNotFoundError: if it is not there, or unfinished; the message says what is there.
      ValueError: if `path` cannot be read, or leaves a choice.
    """
    name, _, place = path.partition("@")
    place = place or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = pathlib.Path(os.path.abspath(os.path.expanduser(place)))
    parts = _NAME.fullmatch(name)
    if name and parts is None:
        raise ValueError(
            f"cannot read {kind}:{path}: write {kind}:NAME@DIR, {kind}:NAME/CONFIG:1.0.0@DIR or {kind}:@FOLDER"
        )
    if not name and "@" not in path:
        raise ValueError(f"{kind}: needs a name or a folder: write {kind}:NAME@DIR or {kind}:@FOLDER")
    if not root.is_dir():
        raise FileNotFoundError(
            f"{kind}:{path}: {root} is no folder here"
            + (": mount the bucket (gcsfuse), the files are read from a file system" if "://" in place else "")
        )
    if parts is None:
        return _finished(root, kind)
    dataset = root / parts["name"]
    if not dataset.is_dir():
        if (root / INFO).is_file():
            raise FileNotFoundError(f"{root} is itself a prepared dataset: write {kind}:@{place}")
        raise FileNotFoundError(f"{root} holds no dataset {parts['name']!r}: it holds {_folders(root)}")
    if parts["config"]:
        folder = dataset / parts["config"]
        if not folder.is_dir():
            raise FileNotFoundError(f"{dataset} has no configuration {parts['config']!r}: it holds {_folders(dataset)}")
    else:
        folder = dataset if _versions(dataset) else _only_config(dataset, path, kind)
    versions = _versions(folder)
    version = parts["version"] or max(versions, key=_number, default=None)
    if version not in versions:
        raise FileNotFoundError(f"{folder} has no prepared version {version or ''}: it holds {_folders(folder)}")
    return _finished(folder / version, kind)


def _finished(folder, kind):
    if (folder / INFO).is_file():
        return str(folder)
    if (folder / PLAN).is_file():
        command = json.loads((folder / PLAN).read_text())["command"]
        raise FileNotFoundError(f"{folder} is unfinished: run the same command again, {command}")
    raise FileNotFoundError(
        f"{folder} is no prepared dataset, it has no {INFO}: it holds {_folders(folder)}. "
        f"Write {kind}:NAME@DIR for the dataset NAME below a TFDS data_dir"
    )


def _only_config(dataset, path, kind):
    configs = [entry for entry in sorted(dataset.iterdir()) if entry.is_dir() and _versions(entry)]
    if len(configs) == 1:
        return configs[0]
    if not configs:
        raise FileNotFoundError(f"{dataset} holds no prepared version: it holds {_folders(dataset)}")
    example = f"{kind}:{dataset.name}/{configs[0].name}@{path.partition('@')[2] or dataset.parent}"
    raise ValueError(f"{dataset} has the configurations {', '.join(c.name for c in configs)}: choose one, as {example}")


def _versions(folder):
    return [entry.name for entry in folder.iterdir() if _VERSION.fullmatch(entry.name) and (entry / INFO).is_file()]


def _number(version):
    return [int(part) for part in version.split(".")]


def _folders(folder):
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return (", ".join(names[:10]) + (", …" if len(names) > 10 else "")) or "nothing"
