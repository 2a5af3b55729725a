"""arrange.py puts miniatures of the downloads of table 1 into class folders, by lists in their own form."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from regvit_jax.data.sources import open_source


@pytest.fixture
def download(tmp_path):
    """download({path: text, or None for an image}) -> folder"""

    def make(files):
        root = tmp_path / "download"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                Image.new("RGB", (8, 8)).save(root / name)
            else:
                (root / name).write_text(text)
        return root

    return make


CUB = {
    "CUB_200_2011/images/001.A/a.jpg": None,
    "CUB_200_2011/images/002.B/b.jpg": None,
    "CUB_200_2011/images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n",
    "CUB_200_2011/train_test_split.txt": "1 1\n2 0\n",
}


def below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))


def test_lists_become_class_folders(script, download, tmp_path):
    root, dst = download(CUB), tmp_path / "new" / "cub"
    arrange = script("table1/arrange").main
    assert arrange(["cub", str(root), str(dst)]) == 0
    assert below(dst) == ["test/002.B/b.jpg", "train/001.A/a.jpg"]
    assert open_source(f"folder:{dst}#train")[0]["label"] == 0  # links are read as files are
    assert arrange(["cub", str(root), str(dst)]) == 2  # nothing is overwritten


def test_what_lies_below_the_root_is_taken_instead_of_tfds(script, download):
    script("table1/run")
    from data_sets import TRANSFER

    files = {f"food-101/images/pho/{n}.jpg": None for n in (1, 2)}
    files |= {"food-101/meta/train.txt": "pho/1\n", "food-101/meta/test.txt": "pho/2\n"}
    files |= {f"dtd/images/lacelike/{name}.jpg": None for name in ("train", "val", "test")}
    files |= {f"dtd/labels/{name}1.txt": f"lacelike/{name}.jpg\n" for name in ("train", "val", "test")}
    files |= {"pets/images/great_pyrenees_1.jpg": None, "pets/images/Bengal_2.jpg": None}
    files |= {"pets/annotations/trainval.txt": "great_pyrenees_1 16 2 8\nBengal_2 6 1 2\n"}
    files |= {"pets/annotations/test.txt": "Bengal_2 6 1 2\n", "cub/train/a/1.jpg": None, "cub/test/a/2.jpg": None}
    root = download(files)
    found = {dataset.key: dataset.below(str(root)) for dataset in TRANSFER}
    for key in ("food", "dtd", "pets", "cub"):
        assert [len(open_source(spec)) for spec in (found[key].train, found[key].test)] == [1 + (key == "pets"), 1]
    assert len(open_source(found["dtd"].val)) == 1 and not found["cub"].val
    assert found["cars"].train.startswith("tfds:") and f"arrange.py cars DOWNLOAD {root}/cars" in found["cars"].get


def test_matlab_lists(script, download, tmp_path):
    arrange = script("table1/arrange").main
    root = download({f"jpg/image_{n:05d}.jpg": None for n in (1, 2, 3)})
    savemat(root / "imagelabels.mat", {"labels": [77, 5, 102]})
    savemat(root / "setid.mat", {"trnid": [3], "valid": [2], "tstid": [1]})
    assert arrange(["flowers", str(root), str(tmp_path / "flowers")]) == 0
    assert below(tmp_path / "flowers") == [
        *("test/077/image_00001.jpg", "train/102/image_00003.jpg", "val/005/image_00002.jpg")
    ]
    root = download({f"{split}/0000{n}.jpg": None for split in ("cars_train", "cars_test") for n in (1, 2)})
    kind = [("class", "O"), ("fname", "O")]
    for file, number in (("cars_train_annos.mat", 14), ("cars_test_annos_withlabels.mat", 3)):
        rows = np.array([[(number, "00001.jpg"), (number + 1, "00002.jpg")]], kind)
        savemat(root / file, {"annotations": rows})
    assert arrange(["cars", str(root), str(tmp_path / "cars")]) == 0
    assert below(tmp_path / "cars") == [
        *("test/003/00001.jpg", "test/004/00002.jpg", "train/014/00001.jpg", "train/015/00002.jpg")
    ]


def test_thirty_of_every_class_are_drawn_for_caltech(script, download, tmp_path):
    root = download({f"101_ObjectCategories/crab/image_{n:04d}.jpg": None for n in range(35)})
    arrange = script("table1/arrange").main
    assert arrange(["caltech101", str(root), str(tmp_path / "a")]) == 0
    drawn = below(tmp_path / "a" / "train")
    assert len(drawn) == 30 and len(below(tmp_path / "a" / "test")) == 5
    assert arrange(["caltech101", str(root), str(tmp_path / "b")]) == 0
    assert below(tmp_path / "b" / "train") == drawn


def test_cifar_becomes_an_archive_of_the_same_pixels(script, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 100, (4, 2 + 3072), np.uint8)
    rows[:, 0], rows[:, 1] = 7, [1, 0, 1, 1]  # coarse and fine labels
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    rows[:3].tofile(folder / "train.bin")
    rows[3:].tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("apple\nbaby\n")
    assert script("table1/arrange").main(["cifar100", str(folder), str(tmp_path / "cifar100.npz")]) == 0
    source = open_source(f"npz:{tmp_path}/cifar100.npz#train")
    assert len(source) == 3 and source.class_names == ("apple", "baby")
    assert [source[i]["label"] for i in range(3)] == [1, 0, 1]
    from regvit_jax.data.transforms import decode

    pixels = decode(source[2]["image"])
    assert pixels[5, 6].tolist() == [rows[2, 2 + c * 1024 + 5 * 32 + 6] for c in range(3)]


def test_incomplete_downloads_are_refused(script, download, tmp_path, capsys):
    arrange = script("table1/arrange").main
    root = download(CUB)
    (root / "CUB_200_2011/images/002.B/b.jpg").unlink()
    assert arrange(["cub", str(root), str(tmp_path / "cub")]) == 2
    assert "1 of 2 listed images are not there" in capsys.readouterr().err and not (tmp_path / "cub").exists()
    assert arrange(["flowers", str(root), str(tmp_path / "flowers")]) == 2
    assert "holds no imagelabels.mat" in capsys.readouterr().err
