"""ImageNet-1k and -22k in the layouts people have, written small: where labels come from, and what is said when they
cannot."""

import csv
import functools
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.check import check
from regvit_jax.data.sources import imagenet22k, imagenet22k_index

# In sorted order; the devkit numbers them otherwise.
WNIDS = ("n01440764", "n02012849", "n03126707")
IDS = {"n01440764": 2, "n02012849": 3, "n03126707": 1}
WORDS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
NAMES = ("tench", "crane (n02012849)", "crane (n03126707)")
VAL = ("n03126707", "n01440764", "n03126707", "n02012849")  # what validation image 1, 2, 3, 4 shows


def encoded(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded() if content is None else content)


def write_train(root):
    for wnid in WNIDS:
        for number in range(5):
            write(root / "train" / wnid / f"{wnid}_{number}.JPEG")


def write_flat(root):
    for number in range(1, 5):
        write(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")


def write_meta(path):
    """The struct array of the devkit: leaves first, then the synsets above them, whose numbers go on."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    rows = sorted((IDS[wnid], wnid) for wnid in WNIDS)
    synsets = np.empty((4, 1), dtype=[(name, object) for name in (*fields, "num_train_images")])
    for place, (number, wnid) in enumerate(rows):
        none = np.zeros((1, 0), np.uint8)
        synsets[place, 0] = (
            np.uint8(number),
            wnid,
            WORDS[wnid],
            "a gloss",
            np.uint8(0),
            none,
            np.uint8(0),
            np.uint16(5),
        )
    synsets[3, 0] = (
        *(np.uint16(4), "n00001740", "entity", "all", np.uint8(3)),
        *(np.array([[1, 2, 3]], np.uint8), np.uint8(9), np.uint16(0)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"synsets": synsets})


def write_devkit(root):
    write_meta(root / "data" / "meta.mat")
    numbers = "".join(f"{IDS[wnid]}\n" for wnid in VAL)
    (root / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(numbers)


def write_solution(path):
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["ImageId", "PredictionString"])
        # Kaggle's list is in no order, and has a box for each object.
        for number in (3, 1, 4, 2):
            wnid = VAL[number - 1]
            rows.writerow([f"ILSVRC2012_val_{number:08d}", f"{wnid} 85 1 499 272 {wnid} 2 3 4 5 "])


def shown(source):
    """{number of a validation file: label}"""
    return {int(source.name(i)[-9:-5]): source[i]["label"] for i in range(len(source))}


EXPECTED = {number: WNIDS.index(wnid) for number, wnid in enumerate(VAL, start=1)}


@pytest.fixture
def flat(tmp_path):
    write_train(tmp_path)
    write_flat(tmp_path)
    return tmp_path


def test_training_labels_are_places_of_sorted_wnids(flat):
    source = open_source(f"imagenet:{flat}")
    assert source.splits == ("train", "val") and source.class_names == WNIDS and len(source) == 15
    for i in range(15):
        assert source.name(i).startswith(WNIDS[source[i]["label"]])
    assert [source[i]["label"] for i in range(15)] == source.labels.tolist() != sorted(source.labels)
    assert Image.open(source[0]["image"]).size == (4, 4)
    assert eval_split(f"imagenet:{flat}") == f"imagenet:{flat}#val"
    again = pickle.loads(pickle.dumps(source))
    assert [again.name(i) for i in range(15)] == [source.name(i) for i in range(15)]


@pytest.mark.parametrize("place", ["devkit", "ILSVRC2012_devkit_t12"])
def test_the_devkit_numbers_are_mapped_through_meta_mat(flat, place):
    write_devkit(flat / place)
    source = open_source(f"imagenet:{flat}#val")
    assert shown(source) == EXPECTED
    assert source.class_names == NAMES


def test_the_devkit_may_stay_packed(flat, tmp_path_factory):
    unpacked = tmp_path_factory.mktemp("devkit")
    write_devkit(unpacked)
    with tarfile.open(flat / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(unpacked, "ILSVRC2012_devkit_t12")
    assert shown(open_source(f"imagenet:{flat}#val")) == EXPECTED
    whole = (flat / "ILSVRC2012_devkit_t12.tar.gz").read_bytes()
    (flat / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="devkit_t12.tar.gz cannot be read, get it again"):
        open_source(f"imagenet:{flat}#val")


def test_a_wnid_a_line(flat):
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL) + "\n\n")
    (flat / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {WORDS[wnid]}\n" for wnid in WNIDS))
    source = open_source(f"imagenet:{flat}#val")
    assert shown(source) == EXPECTED and source.class_names == NAMES
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text("n01440764\n\ntench\n")
    with pytest.raises(ValueError, match="labels.txt, line 2: '' is no wnid"):
        open_source(f"imagenet:{flat}#val")


@pytest.mark.parametrize("given", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_folders_and_list(tmp_path, given):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    write_train(root)
    write_flat(root)
    write(root / "test" / "ILSVRC2012_test_00000001.JPEG")
    write_solution(tmp_path / "LOC_val_solution.csv")
    (tmp_path / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {WORDS[wnid]}\n" for wnid in WNIDS))
    source = open_source(f"imagenet:{tmp_path / given}#val")
    assert shown(source) == EXPECTED and source.class_names == NAMES and source.splits == ("train", "val", "test")
    test = open_source(f"imagenet:{tmp_path / given}#test")
    assert test.num_classes == 0 and test[0]["label"] == -1
    assert eval_split(f"imagenet:{tmp_path / given}") == f"imagenet:{tmp_path / given}#val"


def test_caffes_list_counts_a_thousand_sorted_wnids(flat):
    filler = [f"n1{i:07d}" for i in range(997)]
    (flat / "labels.txt").write_text("".join(f'{wnid},"some words"\n' for wnid in [*filler, *WNIDS]))
    lines = [f"ILSVRC2012_val_{number:08d}.JPEG {WNIDS.index(wnid)}\n" for number, wnid in enumerate(VAL, start=1)]
    (flat / "val.txt").write_text("".join(lines))
    assert shown(open_source(f"imagenet:{flat}#val")) == EXPECTED
    # Kaggle has a file of the same name that only counts.
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001 1\nILSVRC2012_val_00000002 2\n")
    with pytest.raises(ValueError, match="line 1: expected FILE.JPEG and a number"):
        open_source(f"imagenet:{flat}#val")
    (flat / "labels.txt").unlink()
    with pytest.raises(ValueError, match="put LOC_synset_mapping.txt into"):
        open_source(f"imagenet:{flat}#val")


def test_validation_in_class_folders_needs_no_list(tmp_path):
    """As DINOv2 and torchvision want it: val/WNID/ILSVRC2012_val_….JPEG, words in labels.txt."""
    write_train(tmp_path)
    for number, wnid in enumerate(VAL, start=1):
        write(tmp_path / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / "labels.txt").write_text("".join(f"{wnid},{WORDS[wnid].split(',')[0]}\n" for wnid in WNIDS))
    source = open_source(f"imagenet:{tmp_path}#val")
    assert shown(source) == EXPECTED and source.class_names == NAMES


def test_a_subset_of_classes_keeps_its_labels_in_both_splits(flat):
    """ImageNet-100: one training folder less, the validation files still there."""
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL))
    for file in (flat / "train" / "n02012849").iterdir():
        file.unlink()
    (flat / "train" / "n02012849").rmdir()
    train, val = (open_source(f"imagenet:{flat}#{split}") for split in ("train", "val"))
    assert train.class_names == val.class_names == ("n01440764", "n03126707")
    assert shown(val) == {1: 1, 2: 0, 3: 1}


def test_validation_alone_takes_its_classes_from_the_list(tmp_path):
    write_flat(tmp_path)
    (tmp_path / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL))
    source = open_source(f"imagenet:{tmp_path}")
    assert source.splits == ("val",) and shown(source) == EXPECTED


def test_other_labels_are_another_fingerprint(flat):
    path = flat / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("\n".join(VAL))
    before = open_source(f"imagenet:{flat}#val").fingerprint
    assert open_source(f"imagenet:{flat}#val").fingerprint == before
    path.write_text("\n".join(reversed(VAL)))
    assert open_source(f"imagenet:{flat}#val").fingerprint != before


def test_what_is_missing_is_said_with_the_remedy(flat):
    with pytest.raises(FileNotFoundError, match=f"Put one of these into {flat}: ILSVRC2012_devkit_t12.tar.gz"):
        open_source(f"imagenet:{flat}#val")
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n1\n")
    with pytest.raises(FileNotFoundError, match=r"is there, but not meta.mat of the same devkit"):
        open_source(f"imagenet:{flat}#val")
    write_meta(flat / "meta.mat")
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n77\n1\n")
    with pytest.raises(ValueError, match="line 3: '77' is no ILSVRC2012_ID"):
        open_source(f"imagenet:{flat}#val")
    (flat / "meta.mat").write_text("text")
    with pytest.raises(ValueError, match="is no meta.mat of the ILSVRC2012 devkit"):
        open_source(f"imagenet:{flat}#val")
    (flat / "meta.mat").unlink()
    (flat / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(VAL[:3]))
    with pytest.raises(ValueError, match=r"1 images that the list .* does not name: ILSVRC2012_val_00000004.JPEG"):
        len(open_source(f"imagenet:{flat}#val"))
    with pytest.raises(ValueError, match="has no split 'test': it has train, val"):
        open_source(f"imagenet:{flat}#test")
    with pytest.raises(FileNotFoundError, match="These are class folders: put them into a folder train/"):
        open_source(f"imagenet:{flat / 'train'}")


def test_archives_that_are_not_unpacked_are_named(tmp_path):
    write(tmp_path / "ILSVRC2012_img_train.tar", b"")
    with pytest.raises(FileNotFoundError, match="Unpack the archives"):
        open_source(f"imagenet:{tmp_path}")
    write(tmp_path / "train" / "n01440764.tar", b"")
    with pytest.raises(FileNotFoundError, match="it holds n01440764.tar, unpack them"):
        open_source(f"imagenet:{tmp_path}")


# ImageNet-22k


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def content(wnid, number):
    return encoded(40 * WNIDS.index(wnid) + 3 * number)


@pytest.fixture
def tars(tmp_path):
    for wnid in WNIDS:
        members = {f"{wnid}_{number}.JPEG": content(wnid, number) for number in range(6)}
        write_tar(tmp_path / f"{wnid}.tar", {**members, "notes.txt": b"x"})
    return tmp_path


def test_archives_are_read_in_place(tars):
    source = open_source(f"imagenet22k:{tars}")
    assert len(source) == 18 and source.class_names == WNIDS and source.splits == ()
    names = [source.name(i) for i in range(18)]
    assert sorted(names) == sorted(f"{w}.tar/{w}_{n}.JPEG" for w in WNIDS for n in range(6))
    for i, name in enumerate(names):
        wnid, number = name[:9], int(name[-6])
        assert source[i] == {"image": content(wnid, number), "label": WNIDS.index(wnid)}
    assert source.labels.tolist() == [source[i]["label"] for i in range(18)] != sorted(source.labels)
    assert {source[i]["label"] for i in range(9)} == {0, 1, 2}
    assert source[-1] == source[17]
    with pytest.raises(IndexError):
        source[18]


def test_the_index_is_built_once_and_again_when_an_archive_changes(tars, monkeypatch):
    source = open_source(f"imagenet22k:{tars}")
    place = tars / ".regvit_index"
    assert '"n02012849": 1' in (place / "labels.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(imagenet22k_index, "_build", None)
        again = open_source(f"imagenet22k:{tars}")
    assert again.fingerprint == source.fingerprint
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000 and pickle.loads(pickled)[3] == source[3]
    before, first = (source.name(0), source[0]), source.index.samples
    write_tar(tars / "n03126707.tar", {"new.JPEG": encoded(7)})
    changed = open_source(f"imagenet22k:{tars}")
    assert len(changed) == 13 and changed.fingerprint != source.fingerprint
    assert not os.path.exists(first) and len(list(place.glob("samples_*"))) == 1
    assert open_source(f"imagenet22k:{tars}").fingerprint == changed.fingerprint
    # A run that is going on keeps the index it has; what it cannot read any more is an error that the loader replaces.
    if not before[0].startswith("n03126707"):
        assert source[0] == before[1]


def test_a_build_that_was_killed_goes_on(tars, monkeypatch):
    monkeypatch.setattr(imagenet22k_index, "_GROUP", 1)
    whole, read = imagenet22k_index._members, []

    def killed(root, name):
        if name == "n03126707.tar":
            raise KeyboardInterrupt
        return whole(root, name)

    monkeypatch.setattr(imagenet22k_index, "_members", killed)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"imagenet22k:{tars}")
    monkeypatch.setattr(imagenet22k_index, "_members", lambda root, name: read.append(name) or whole(root, name))
    resumed = open_source(f"imagenet22k:{tars}")
    assert read == ["n03126707.tar"]
    assert not (tars / ".regvit_index" / "unfinished").exists()
    # Built in one go, the index is the same.
    (tars / ".regvit_index" / "index.json").unlink()
    assert open_source(f"imagenet22k:{tars}").fingerprint == resumed.fingerprint
    for i in range(18):
        assert resumed[i]["label"] == WNIDS.index(resumed.name(i)[:9])


def test_archives_in_a_folder_that_cannot_be_written_are_indexed_in_the_cache(tars, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(imagenet22k_index.os, "access", lambda path, mode: False)
    source = open_source(f"imagenet22k:{tars}")
    assert source.index.samples.startswith(os.environ["REGVIT_CACHE"])
    assert not (tars / ".regvit_index").exists() and len(source) == 18


def test_a_damaged_archive_keeps_what_is_readable_and_is_named(tars, caplog):
    path = tars / "n02012849.tar"
    whole = path.read_bytes()
    block = 512 + -(-len(content("n02012849", 0)) // 512) * 512
    cases = {
        "cut in a member": (whole[: 2 * block + 600], 2, "n02012849_2.JPEG is cut after 88 of"),
        "cut between members": (whole[: 3 * block], 3, "ends without an end mark"),
        "a damaged header": (whole[: 3 * block] + b"\xff" * 512 + whole[3 * block + 512 :], 3, "without an end mark"),
        "empty": (b"", 0, "empty file"),
        "no archive": (b"<html>not found</html>" * 100, 0, "after 0 images"),
    }
    assert open_source(f"imagenet22k:{tars}").faults == ()
    for case, (damaged, left, reason) in cases.items():
        path.write_bytes(damaged)
        caplog.clear()
        source = open_source(f"imagenet22k:{tars}")
        assert source.labels.tolist().count(1) == left, case
        assert len(source) == 12 + left and source.num_classes == 3
        assert "n02012849.tar is damaged" in caplog.text and reason in caplog.text, case
        assert reason in "".join(check(f"imagenet22k:{tars}#[:50%]", picture="")["problems"])
        assert all(source[i]["label"] == WNIDS.index(source.name(i)[:9]) for i in range(len(source)))


def test_an_archive_cut_after_indexing_is_an_error_that_the_loader_replaces(tars):
    source = open_source(f"imagenet22k:{tars}")
    index = max(range(18), key=lambda i: source._place(i)[2])
    path = source._place(index)[0]
    with open(path, "r+b") as file:
        file.truncate(source._place(index)[2] + 10)
    with pytest.raises(OSError, match="bytes too early"):
        source[index]


def test_only_so_many_archives_are_open(tmp_path, monkeypatch):
    wnids = [f"n{i:08d}" for i in range(30)]
    for wnid in wnids:
        write_tar(tmp_path / f"{wnid}.tar", {"a.JPEG": encoded(1)})
    source = open_source(f"imagenet22k:{tmp_path}")
    monkeypatch.setattr(imagenet22k, "_archive", functools.lru_cache(maxsize=4)(imagenet22k._archive.__wrapped__))
    before = len(os.listdir("/dev/fd"))
    for i in range(30):
        source[i]
    assert len(os.listdir("/dev/fd")) <= before + 4 + 1


def test_names_longer_than_a_header_and_folders_inside(tmp_path):
    long = "n01440764/" + "x" * 150 + ".JPEG"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "n01440764.tar", {long: encoded(9), ".hidden.JPEG": b"x", "b.png": b"y"}, format=form)
        source = open_source(f"imagenet22k:{tmp_path}")
        assert sorted(source[i]["image"] for i in range(2)) == sorted([encoded(9), b"y"])


def test_class_folders_of_22k(tmp_path, caplog):
    for wnid in WNIDS:
        write(tmp_path / wnid / f"{wnid}_1.JPEG")
    (tmp_path / "n99999999").mkdir()
    (tmp_path / "words.txt").write_text("".join(f"{wnid}\t{WORDS[wnid]}\n" for wnid in WNIDS))
    source = open_source(f"imagenet22k:{tmp_path}")
    assert source.class_names == (*NAMES, "n99999999") and len(source) == 3
    assert all(source.name(i).startswith(WNIDS[source[i]["label"]]) for i in range(3))


def test_22k_says_what_it_cannot_read(tars):
    for text, message in (
        (f"imagenet22k:{tars}#train", r"has no splits, got #train: write imagenet22k:.*#\[:90%\]"),
        (f"imagenet22k:{tars}?a=b", "no options, got a"),
        (f"imagenet22k:{tars}/none", "is no folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(text)
    write(tars / "n00000001" / "a.JPEG")
    with pytest.raises(ValueError, match="3 archives and 1 class folders: keep one of the two"):
        open_source(f"imagenet22k:{tars}")
    for path in tars.glob("*.tar"):
        write_tar(path, {})
    (tars / "n00000001" / "a.JPEG").unlink()
    (tars / "n00000001").rmdir()
    with pytest.raises(FileNotFoundError, match="hold no image"):
        open_source(f"imagenet22k:{tars}")
    with pytest.raises(FileNotFoundError, match="neither archives such as"):
        open_source(f"imagenet22k:{tars / '.regvit_index'}")
