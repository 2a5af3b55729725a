"""The lists that come with ImageNet, in the forms people have: classes of flat validation files, names of classes.

    ILSVRC2012_validation_ground_truth.txt + meta.mat   the devkit, unpacked or as ILSVRC2012_devkit_t12.tar.gz
    imagenet_2012_validation_synset_labels.txt          a wnid a line
    LOC_val_solution.csv                                Kaggle: file, wnid and boxes a line
    val.txt                                             Caffe: file and number a line (of all 1000 sorted wnids)
    LOC_synset_mapping.txt, labels.txt, words.txt       wnid and words a line

The devkit's numbers are ILSVRC2012_IDs, which are not in the order of the wnids: meta.mat says which is which.
"""

import collections
import io
import os
import pathlib
import re
import tarfile

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
SYNSETS = "imagenet_2012_validation_synset_labels.txt"
SOLUTION = "LOC_val_solution.csv"
CAFFE = "val.txt"
WORDS = ("LOC_synset_mapping.txt", "labels.txt", "words.txt")
DEVKIT = "ILSVRC2012_devkit_t12"

_FILE = "ILSVRC2012_val_{:08d}"
_WNID = re.compile(r"n\d{8}")
_WORDS = re.compile(r"(n\d{8})[\s,]+(.+)")


def places(root: str) -> tuple[str, ...]:
    """Where lists may lie: beside the split folders, above Kaggle's ILSVRC/Data/CLS-LOC, in a devkit folder there."""
    above = [root]
    if os.path.basename(root) == "CLS-LOC":
        above += [os.path.normpath(os.path.join(root, *[".."] * levels)) for levels in (3, 2, 1)]
    below = ("", "devkit", "devkit/data", DEVKIT, f"{DEVKIT}/data", "data")
    return tuple(os.path.normpath(os.path.join(place, name)) for place in above for name in below)


def ground_truth(places: tuple[str, ...], folder: str) -> dict[str, str]:
    """{file name without its ending: wnid} of the flat validation files in `folder`.

    Raises:
      FileNotFoundError: where there is none of the lists; it says which to get and where to put it.
      ValueError: for a list that cannot be read; it names the line.
    """
    for name, read in ((SYNSETS, _a_wnid_a_line), (SOLUTION, _solution)):
        path = _find(places, name)
        if path is not None:
            return read(path)
    truth, meta = _devkit(places)
    if truth is not None and meta is not None:
        return _numbers(truth, _wnid_of_id(meta))
    caffe = _find(places, CAFFE)
    if caffe is not None:
        return _caffe(caffe, places)
    half = f"{TRUTH} is there, but not {META} of the same devkit, which says what its numbers mean. " if truth else ""
    raise FileNotFoundError(
        f"{folder} is flat, and no list says what its images show. {half}Put one of these into {places[0]}: "
        f"{DEVKIT}.tar.gz, as it is (image-net.org, 2.5 MB); {SYNSETS} (TensorFlow models); {SOLUTION} (Kaggle). "
        "Or move the images into class folders"
    )


def class_names(places: tuple[str, ...], wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first of each class's words where a list has them, else the wnid; made unique (two classes are `crane`)."""
    words = _words(places)
    names = [words[wnid].split(",")[0].strip() if wnid in words else wnid for wnid in wnids]
    often = collections.Counter(names)
    return tuple(name if often[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True))


def _words(places):
    for name in WORDS:
        path = _find(places, name)
        if path is None:
            continue
        rows = [_WORDS.fullmatch(line.strip()) for line in _lines(path)]
        found = {row[1]: row[2].strip().strip('"') for row in rows if row}
        if found:
            return found
    meta = _devkit(places)[1]
    return {row[1]: row[2] for row in _synsets(meta)} if meta is not None else {}


def _find(places, name):
    for place in places:
        path = pathlib.Path(place, name)
        if path.is_file():
            return path
    return None


def _devkit(places):
    """(ground truth, meta.mat) as (where, bytes), or None for what is not there."""
    found = {name: _find(places, name) for name in (TRUTH, META)}
    found = {name: (str(path), path.read_bytes()) for name, path in found.items() if path is not None}
    archive = _find(places, f"{DEVKIT}.tar.gz")
    if len(found) < 2 and archive is not None:
        try:
            with tarfile.open(archive) as members:
                for member in members:
                    name = os.path.basename(member.name)
                    if name in (TRUTH, META):
                        found[name] = f"{archive}/{member.name}", members.extractfile(member).read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{archive} cannot be read, get it again: {error}") from error
    return found.get(TRUTH), found.get(META)


def _synsets(meta):
    """[(ILSVRC2012_ID, wnid, words)] of meta.mat."""
    import scipy.io

    where, content = meta
    try:
        rows = scipy.io.loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        rows = [(int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"])) for row in rows.reshape(-1)]
    except Exception as error:
        raise ValueError(f"{where} is no meta.mat of the ILSVRC2012 devkit: {type(error).__name__} {error}") from error
    return rows


def _wnid_of_id(meta):
    return {number: wnid for number, wnid, _ in _synsets(meta)}


def _numbers(truth, wnids):
    where, content = truth
    out = {}
    for row, line in enumerate(content.decode("ascii", "replace").split(), start=1):
        if not line.isdecimal() or int(line) not in wnids:
            raise ValueError(f"{where}, line {row}: {line!r} is no ILSVRC2012_ID of {META}")
        out[_FILE.format(row)] = wnids[int(line)]
    return out


def _a_wnid_a_line(path):
    rows = [line.strip() for line in _lines(path)]
    for row, wnid in enumerate(rows, start=1):
        if not _WNID.fullmatch(wnid):
            raise ValueError(f"{path}, line {row}: {wnid!r} is no wnid such as n01440764")
    return {_FILE.format(row): wnid for row, wnid in enumerate(rows, start=1)}


def _solution(path):
    out = {}
    for row, line in enumerate(_lines(path), start=1):
        name, _, rest = line.partition(",")
        wnid = rest[:9]
        if row == 1 and not _WNID.fullmatch(wnid):
            continue  # the header
        if not _WNID.fullmatch(wnid):
            raise ValueError(f"{path}, line {row}: no wnid behind {name!r}")
        out[name] = wnid
    return out


def _caffe(path, places):
    wnids = sorted(_words(places))
    if len(wnids) != 1000:
        raise ValueError(
            f"{path} numbers the 1000 sorted wnids, and no list here has these: put {WORDS[0]} into {places[0]}"
        )
    out = {}
    for row, line in enumerate(_lines(path), start=1):
        # Kaggle has a val.txt too: names without an ending, and numbers that only count them.
        name, _, number = line.strip().rpartition(" ")
        stem, ending = os.path.splitext(os.path.basename(name))
        if not ending or not number.isdecimal() or int(number) >= 1000:
            raise ValueError(f"{path}, line {row}: expected FILE.JPEG and a number below 1000, found {line.strip()!r}")
        out[stem] = wnids[int(number)]
    return out


def _lines(path):
    return path.read_text("utf-8", "replace").rstrip().splitlines()
