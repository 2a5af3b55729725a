"""coco: annotations written small: boxes and their rounding, classes, splits, lists such as COCO20k's, broken files."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.check import check
from regvit_jax.data.sources import coco_json

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]


def annotation(image, bbox, category=1, crowd=0):
    outline = {"counts": [3, 4], "size": [40, 60]} if crowd else [[0.5, 0.25, 7.0, 0.5, 7.0, 9.0]]
    return {
        "segmentation": outline,
        "area": 3.5,
        "iscrowd": crowd,
        "image_id": image,
        "bbox": bbox,
        "category_id": category,
        "id": 1000 + image,
    }


def write(root, split, images, annotations, pattern="{:012d}.jpg", folder=None):
    """images: their numbers, in the order of the file."""
    rows = [{"id": n, "file_name": pattern.format(n), "width": 60, "height": 40, "license": 3} for n in images]
    whole = {"info": {"year": 2017}, "licenses": [{"id": 3, "name": "free"}], "images": rows}
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole | {"annotations": annotations, "categories": CATEGORIES}))
    for number in images:
        photo = (folder or root / split) / pattern.format(number)
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (number % 250, 0, 0)).save(photo)
    return path


@pytest.fixture
def root(tmp_path):
    """COCO2017 with three training images, one of them without objects, and one to validate on."""
    rows = [
        annotation(9, [10.5, 2.25, 20.0, 9.25], 18),
        annotation(2, [0, 0, 60, 40], 90),
        annotation(9, [11.5, 1.4, 2.0, 1.2]),
        annotation(9, [1, 1, 50, 30], 1, crowd=1),
        annotation(5, [1, 1, 50, 30], 1, crowd=1),
    ]
    write(tmp_path, "train2017", (9, 2, 5), rows)
    write(tmp_path, "val2017", (3,), [annotation(3, [1, 2, 3, 4])])
    return tmp_path


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_boxes_are_corners_rounded_halves_to_even(root):
    source = open_source(f"coco:{root}")
    assert names(source) == ["000000000002.jpg", "000000000005.jpg", "000000000009.jpg"]
    sample = source[2]
    assert sample["image"] == str(root / "train2017" / "000000000009.jpg")
    # (10.5, 2.25, 30.5, 11.5) and (11.5, 1.4, 13.5, 2.6): 10.5 and 30.5 go down, 11.5 and 13.5 up. The far edge is
    # rounded, not the width: 1.4 + 1.2 is 3, where 1 + 1 would be 2.
    np.testing.assert_array_equal(sample["boxes"], [[10, 2, 30, 12], [12, 1, 14, 3]])
    assert sample["boxes"].dtype == np.float32 and sample["box_labels"].dtype == np.int64
    assert source.box_names == ("person", "dog", "toothbrush") and sample["box_labels"].tolist() == [1, 0]
    assert source[0]["box_labels"].tolist() == [2] and source.class_names == ()
    # The crowd was its only object.
    assert source[1]["boxes"].shape == (0, 4) and source[1]["box_labels"].shape == (0,)


def test_the_source_is_small_to_pickle_and_its_own(root):
    source = open_source(f"coco:{root}")
    again = pickle.loads(pickle.dumps(source))
    source[2]["boxes"][:] = 0
    assert again[2]["boxes"].tolist() == source[2]["boxes"].tolist() != [] and again.fingerprint == source.fingerprint
    assert len(pickle.dumps(source)) < 2000


def test_the_file_is_parsed_once_and_again_when_it_is_new(root, monkeypatch):
    loads, load = [], json.loads
    monkeypatch.setattr(coco_json.json, "loads", lambda *args, **options: loads.append(1) or load(*args, **options))
    for _ in range(3):
        source = open_source(f"coco:{root}")
    assert len(loads) == 1
    write(root, "train2017", (9, 2, 5), [annotation(9, [1, 2, 3, 40])])
    assert open_source(f"coco:{root}")[2]["boxes"].tolist() == [[1, 2, 4, 42]] and len(loads) == 2
    assert open_source(f"coco:{root}").fingerprint != source.fingerprint


def test_splits_by_name_and_by_year(root):
    source = open_source(f"coco:{root}")
    assert source.splits == ("train", "val") and eval_split(f"coco:{root}") == f"coco:{root}#val"
    assert names(open_source(f"coco:{root}#val")) == names(open_source(f"coco:{root}#val2017")) == ["000000000003.jpg"]
    assert eval_split(f"coco:{root}#train2017") == f"coco:{root}#val"
    assert eval_split(f"coco:{root}#val2017") is None  # nothing but itself to evaluate on
    write(root, "val2014", (9,), [], folder=root / "images" / "val2014")
    write(root, "train2014", (7, 8), [annotation(7, [1, 2, 3, 4])])
    # val2014 holds images of train2017: they are not offered together.
    assert open_source(f"coco:{root}").splits == ("train", "val") and len(open_source(f"coco:{root}")) == 3
    assert open_source(f"coco:{root}#train2014").splits == ("train2014",)
    assert eval_split(f"coco:{root}?year=2014") == f"coco:{root}?year=2014#val"
    assert open_source(f"coco:{root}?year=2014#val")[0]["image"] == str(root / "images/val2014/000000000009.jpg")
    assert open_source(f"coco:{root}?year=2014#val").root == open_source(f"coco:{root}#val2014").root
    with pytest.raises(ValueError, match="no split 'test': it has train2014, train2017, val2014, val2017"):
        open_source(f"coco:{root}#test")
    with pytest.raises(ValueError, match="no year '2015': it has 2014, 2017"):
        open_source(f"coco:{root}?year=2015")
    with pytest.raises(ValueError, match="year=2014 and the split val2017"):
        open_source(f"coco:{root}?year=2014#val2017")


def test_a_list_chooses_and_orders(root):
    pattern = "COCO_train2014_{:012d}.jpg"
    rows = [annotation(n, [n, 1, 2, 2]) for n in (5, 6, 7, 8) for _ in range(n - 4)]
    write(root, "train2014", (5, 6, 7, 8), rows, pattern)
    lines = [f"train2014/{pattern.format(n)}" for n in (8, 5, 7, 5)]
    (root / "coco_20k_filenames.txt").write_text("\r\n".join(lines) + "\n\n")
    source = open_source(f"coco:{root}?list=coco_20k_filenames.txt")
    assert names(source) == [pattern.format(n) for n in (8, 5, 7)]  # what is there twice counts once
    assert [len(source[i]["boxes"]) for i in range(3)] == [4, 1, 3]
    assert [source[i]["boxes"][0, 0] for i in range(3)] == [8, 5, 7] and source.splits == ()
    assert names(open_source(f"coco:{root}?list={root}/coco_20k_filenames.txt#train2014")) == names(source)
    (root / "bad.txt").write_text("train2014/COCO_train2014_000000000099.jpg\n" + lines[0])
    with pytest.raises(
        ValueError, match="names 1 images .of 2. that .*instances_train2014.json has not: COCO_train201"
    ):
        open_source(f"coco:{root}?list=bad.txt")
    (root / "bad.txt").write_text("train2015/1.jpg")
    with pytest.raises(FileNotFoundError, match="instances_train2015.json is missing"):
        open_source(f"coco:{root}?list=bad.txt")
    for content in ("", "1.jpg\n", "train2014/1.jpg\nval2014/2.jpg"):
        (root / "bad.txt").write_text(content)
        with pytest.raises(ValueError, match="no list of images of one split"):
            open_source(f"coco:{root}?list=bad.txt")
    with pytest.raises(ValueError, match="leave the split and year= out"):
        open_source(f"coco:{root}?list=coco_20k_filenames.txt#val2017")
    with pytest.raises(FileNotFoundError, match="no file 'none.txt'"):
        open_source(f"coco:{root}?list=none.txt")


def test_one_folder_a_split_as_services_export_it(tmp_path):
    for split in ("train", "valid"):
        path = write(tmp_path, split, (1,), [annotation(1, [1, 2, 3, 4])])
        path.rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    source = open_source(f"coco:{tmp_path}")
    assert source.splits == ("train", "valid") and source[0]["boxes"].tolist() == [[1, 2, 4, 6]]
    assert eval_split(f"coco:{tmp_path}") == f"coco:{tmp_path}#valid"


@pytest.mark.parametrize("outline", [[[1, 2.5e-3], "x"], "none", [], {"counts": "b]", "size": []}])
def test_outlines_are_cut_out_and_nothing_else(tmp_path, outline):
    rows = [annotation(1, [1, 2, 3, 4]), annotation(1, [5, 6, 7, 8], 18) | {"segmentation": outline}]
    path = write(tmp_path, "train", (1,), rows, pattern="{}.jpg")
    whole = json.loads(path.read_text())
    whole["categories"][1]["name"] = name = '"segmentation": [1]'
    path.write_text(json.dumps(whole, indent=1))
    source = open_source(f"coco:{tmp_path}")
    assert source[0]["boxes"].tolist() == [[1, 2, 4, 6], [5, 6, 12, 14]] and source.box_names[0] == name


def with_(**changed):
    image, box = {"id": 1, "file_name": "1.jpg"}, annotation(1, [1, 2, 3, 4])
    whole = {"images": [image], "annotations": [box], "categories": CATEGORIES}
    return json.dumps(whole | changed)


WRONG = {
    "cut": (with_()[:-20], "cut short or no JSON"),
    "deep": ("[" * 100_000, "not of its form"),
    "list": ("[]", "lacks the lists images, annotations, categories, it is a list"),
    "other": ('{"images": []}', "lacks the lists annotations, categories, it has images"),
    "captions": (with_(annotations=[{"image_id": 1, "id": 2, "caption": "a dog"}]), "captions and panoptic"),
    "panoptic": (
        with_(annotations=[{"segments_info": [{"id": 1, "bbox": [1, 2, 3, 4]}], "file_name": "1.png", "image_id": 1}]),
        "captions and panoptic",
    ),
    "bbox": (with_(annotations=[annotation(1, [1, 2, 3])]), r"annotation 1001: \[1, 2, 3\] are no four numbers"),
    "nan": (with_(annotations=[annotation(1, [1, 2, 3, float("nan")])]), "no four numbers"),
    "category": (with_(annotations=[annotation(1, [1, 2, 3, 4], 7)]), "1 annotations are of no category .* number 7"),
    "stranger": (with_(annotations=[annotation(4, [1, 2, 3, 4])]), "1 annotations are of no image .* number 4"),
    "keyless": (with_(annotations=[{"image_id": 1, "bbox": [1, 2, 3, 4]}]), "annotation None: has no 'category_id'"),
    "text": (with_(images=[{"id": "one", "file_name": "1.jpg"}]), "image 'one': "),
    "nameless": (with_(images=[{"id": 1, "file_name": "1.jpg"}, {"id": 2}]), "has no id or file_name"),
    "none": (with_(images=[], annotations=[]), "no images"),
    "twice": (with_(images=[{"id": 1, "file_name": "1.jpg"}] * 2), "image 1 is there twice"),
    "names": (with_(categories=[{"id": 1}]), "a category is"),
    "away": (with_(images=[{"id": 1, "file_name": "../1.jpg"}]), "image 1: .* leaves the folder"),
    "absolute": (with_(images=[{"id": 1, "file_name": "/etc/1.jpg"}]), "leaves the folder"),
    "latin": (b'{"images": "\xff"}', "utf-8"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_such_file_is_told(tmp_path, kind):
    content, reason = WRONG[kind]
    path = tmp_path / "annotations" / "instances_train.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"instances_train.json is no annotation file like COCO's .*{reason}"):
        open_source(f"coco:{tmp_path}")


def test_what_is_no_coco_folder(root):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"coco:{root}/nothing")
    with pytest.raises(FileNotFoundError, match="expected annotations/instances_val2017.json .*found 000000000003.jpg"):
        open_source(f"coco:{root}/val2017")
    with pytest.raises(ValueError, match="no option minival; there are list=FILE and year=2014"):
        open_source(f"coco:{root}?minival=1")
    (root / "val2017").rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match="none of the images of val2017, such as 000000000003.jpg"):
        open_source(f"coco:{root}#val")


def test_a_missing_image_is_reported_and_empty_ones_are_noted(root):
    (root / "train2017" / "000000000002.jpg").unlink()
    report = check(f"coco:{root}#train", picture="")
    found = report["splits"]["train"]
    assert [name for name, _ in found["unreadable"]] == ["000000000002.jpg"]
    assert (found["boxes"]["images"], found["boxes"]["boxes"], found["boxes"]["empty"]) == (2, 2, 1)
    assert any("1 of 2 images have no box" in note and "000000000005.jpg" in note for note in report["notes"])
