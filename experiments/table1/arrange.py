"""Puts downloads of table 1 that list: cannot read into class folders: links to the images, which stay where they are.

    python experiments/table1/arrange.py cub /downloads/CUB_200_2011 /data/cub

For whoever has no TensorFlow to prepare them with TFDS. DOWNLOAD is the unpacked folder, DST becomes DST/train/CLASS/…,
test/ and, where the data set has one, val/. CIFAR's binary files become one archive of PNG images, DST.npz.
"""

import argparse
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

import numpy as np

Entry = tuple[str, str, pathlib.Path]  # split, class, image


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=[*LISTS, *CIFAR])
    parser.add_argument("download", type=pathlib.Path)
    parser.add_argument("dst", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        if args.dst.exists():
            raise FileExistsError(f"{args.dst} is there already: remove it, or name another place")
        if args.dataset in CIFAR:
            counts = pack(args.download, args.dst, *CIFAR[args.dataset])
        else:
            counts = link(LISTS[args.dataset](args.download.resolve()), args.dst)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.dst}: " + ", ".join(f"{split} {count} images" for split, count in counts.items()))
    return 0


def link(entries: Iterator[Entry], dst: pathlib.Path) -> dict[str, int]:
    """Makes DST/split/class/image links, all or none. Returns {split: images}."""
    entries = list(entries)
    gone = [path for _, _, path in entries if not path.is_file()]
    if gone or not entries:
        raise FileNotFoundError(f"{len(gone)} of {len(entries)} listed images are not there, such as {gone[:1]}")
    unfinished = dst.with_name(f".{dst.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    counts: dict[str, int] = {}
    for split, name, path in entries:
        place = unfinished / split / name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
        counts[split] = counts.get(split, 0) + 1
    os.replace(unfinished, dst)
    return counts


def pack(download: pathlib.Path, dst: pathlib.Path, label_bytes: int, splits: dict[str, tuple[str, ...]]):
    """CIFAR's records, label bytes and 3 x 32 x 32 pixels each, as an archive that npz: reads."""
    from PIL import Image

    arrays, names = {}, find(download, "batches.meta.txt", "fine_label_names.txt").read_text().split()
    for split, files in splits.items():
        rows = np.concatenate([np.fromfile(find(download, file), np.uint8) for file in files])
        rows = rows.reshape(-1, label_bytes + 3072)
        encoded = []
        for pixels in rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            encoded.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
        arrays[f"{split}_labels"] = rows[:, label_bytes - 1].astype(np.int32)  # of two, the second is the fine one
    dst.parent.mkdir(parents=True, exist_ok=True)
    unfinished = dst.with_name(f".{dst.name}.unfinished.npz")
    np.savez(unfinished, classes=np.array(names), **arrays)
    os.replace(unfinished, dst)
    return {split: len(arrays[f"{split}_labels"]) for split in splits}


def find(root: pathlib.Path, *names: str) -> pathlib.Path:
    """The first file or folder of one of these names in `root` or up to three folders below it."""
    for pattern in ("", "*/", "*/*/", "*/*/*/"):
        for name in names:
            if found := sorted(root.glob(pattern + name)):
                return found[0]
    raise FileNotFoundError(f"{root} holds no {' or '.join(names)}: is it the unpacked download?")


def lines(path: pathlib.Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def cub(root):
    files = dict(line.split() for line in lines(find(root, "images.txt")))
    images = find(root, "images")
    for line in lines(find(root, "train_test_split.txt")):
        number, training = line.split()
        yield ("train" if training == "1" else "test"), files[number].split("/")[0], images / files[number]


def caltech101(root):
    """Thirty of a class, drawn with seed 0: which ones the published numbers are of is not known."""
    rng = np.random.default_rng(0)
    for folder in sorted(path for path in find(root, "101_ObjectCategories").iterdir() if path.is_dir()):
        images = sorted(folder.glob("*.jpg"))
        drawn = set(rng.permutation(len(images))[:30].tolist())
        for place, path in enumerate(images):
            yield ("train" if place in drawn else "test"), folder.name, path


def cars(root):
    from scipy.io import loadmat

    for split, lists in (("train", ("cars_train_annos.mat",)), ("test", ("cars_test_annos_withlabels.mat",))):
        folder = find(root, f"cars_{split}")
        for row in np.atleast_1d(loadmat(find(root, *lists), squeeze_me=True)["annotations"]):
            yield split, f"{int(row['class']):03d}", folder / str(row["fname"])


def flowers(root):
    from scipy.io import loadmat

    labels = np.atleast_1d(loadmat(find(root, "imagelabels.mat"), squeeze_me=True)["labels"])
    lists, images = loadmat(find(root, "setid.mat"), squeeze_me=True), find(root, "jpg")
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        for number in np.atleast_1d(lists[key]).tolist():
            yield split, f"{labels[number - 1]:03d}", images / f"image_{number:05d}.jpg"


LISTS = {function.__name__: function for function in (cub, caltech101, cars, flowers)}
CIFAR = {
    "cifar10": (1, {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)}),
    "cifar100": (2, {"train": ("train.bin",), "test": ("test.bin",)}),
}

if __name__ == "__main__":
    sys.exit(main())
