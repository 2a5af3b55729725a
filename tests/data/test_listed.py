"""Listed: the lists of Aircraft, Places, Food, DTD, Pets as they are; splits share classes; errors name the line."""

import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.sources import eval_split, open_source


def write(root, lists, images, folder=""):
    for name, text in lists.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in images:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(path)
    return root


def content(source):
    """{image: class}."""
    return {source.name(i): source.class_names[source[i]["label"]] for i in range(len(source))}


def test_names_of_classes_with_blanks_and_images_without_endings(tmp_path):
    lists = {"trainval.txt": "1025794 707-320\n1340192 Boeing 717\n", "test.txt": "0056978 Boeing 717\n"}
    root = write(tmp_path, lists, ["1025794.jpg", "1340192.jpg", "0056978.jpg"], "data/images")
    text = f"list:{root}?images=data/images&train=trainval.txt&test=test.txt"
    train, test = open_source(text), open_source(f"{text}#test")
    assert content(train) == {"1025794.jpg": "707-320", "1340192.jpg": "Boeing 717"}
    # The test list has one class only: its number is that of both lists.
    assert test.labels.tolist() == [1] and test.class_names == train.class_names == ("707-320", "Boeing 717")
    assert eval_split(text) == f"{text}#test" and train.splits == ("train", "test")
    assert open(test[0]["image"], "rb").read(3) == b"\xff\xd8\xff"
    assert train.fingerprint != test.fingerprint == pickle.loads(pickle.dumps(test)).fingerprint


def test_numbers_commas_and_slices(tmp_path):
    names = [f"{letter}/{letter}bbey/gsun_{i}.jpg" for letter in "ab" for i in range(6)]
    lines = "".join(f"{name},{10 if name[0] == 'a' else 9}\n" for name in names)
    root = write(tmp_path, {"train_places205.csv": lines}, names)
    source = open_source(f"list:{root}?train=train_places205.csv")
    # By value, not by text: 9 before 10.
    assert source.class_names == ("9", "10") and content(source)[names[0]] == "10"
    # Class by class in the list, mixed in the source.
    assert 0 < np.diff(source.labels).astype(bool).sum() != 1
    assert len(open_source(f"list:{root}?train=train_places205.csv#train[:50%]")) == 6


def test_folders_are_classes_and_lists_may_be_joined(tmp_path):
    lists = {"train1.txt": "banded/banded_0002.jpg\n", "val1.txt": "/zigzag/zigzag_1.jpg\n\n# a remark\n"}
    root = write(tmp_path, lists, ["banded/banded_0002.jpg", "zigzag/zigzag_1.jpg"], "images")
    source = open_source(f"list:{root}?images=images&train=train1.txt+val1.txt")
    assert content(source) == {"banded/banded_0002.jpg": "banded", "zigzag/zigzag_1.jpg": "zigzag"}
    write(tmp_path, {"food.txt": "apple_pie/1005649\n"}, ["apple_pie/1005649.jpg"], "images")
    assert content(open_source(f"list:{root}?images=images&test=food.txt")) == {"apple_pie/1005649.jpg": "apple_pie"}
    # A tab parts what blanks do not.
    write(tmp_path, {"tab.txt": "my photo.png\tred cat\n"}, ["my photo.png"])
    assert content(open_source(f"list:{root}?train=tab.txt")) == {"my photo.png": "red cat"}
    # Pets: class, species, breed; a name in each line.
    write(tmp_path, {"pets.txt": "#Image CLASS-ID SPECIES BREED\nAbyssinian_100 1 1 1\n"}, ["Abyssinian_100.jpg"])
    assert content(open_source(f"list:{root}?train=pets.txt")) == {"Abyssinian_100.jpg": "1"}


def test_a_changed_list_is_another_source(tmp_path):
    root = write(tmp_path, {"a.txt": "1.png x\n2.png y\n"}, ["1.png", "2.png"])
    before = open_source(f"list:{root}?train=a.txt").fingerprint
    (root / "a.txt").write_text("1.png y\n2.png x\n")
    assert open_source(f"list:{root}?train=a.txt").fingerprint != before


@pytest.mark.parametrize(
    ("options", "text", "error", "says"),
    [
        ("", "", ValueError, "names no list: write list:"),
        ("?train=b.txt", "", FileNotFoundError, "no file .*b.txt"),
        ("?train=a.txt#val", "1.png x", ValueError, "no split 'val': it has train"),
        ("?train=a.txt", "\n", ValueError, "a.txt is empty"),
        ("?train=a.txt", "1.png x\n1.png", ValueError, "line 2: '1.png' has no class"),
        ("?train=a.txt", "../1.png x", ValueError, "line 1: .*leaves the folder"),
        ("?train=a.txt", "2.png x", FileNotFoundError, "2.png, the first image of the list, is not there: .images="),
        ("?train=a.txt&images=b", "1 x", FileNotFoundError, "with no ending of an image file either"),
    ],
)
def test_errors_say_what_is_wrong(options, text, error, says, tmp_path):
    root = write(tmp_path, {"a.txt": text}, ["1.png"])
    with pytest.raises(error, match=says):
        open_source(f"list:{root}{options}")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"list:{tmp_path}/nowhere?train=a.txt")
