"""boxes: a boxes.json in its forms, XML beside images; what `regvit data check` says of boxes, counted by hand."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.check import check
from regvit_jax.data.check_boxes import measured
from regvit_jax.data.check_report import as_text
from regvit_jax.data.contact_sheet import GAP, SIDE, draw
from regvit_jax.data.sources import Source

XML = (
    "<annotation><object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    "</object></annotation>"
)


def photo(path, value=0, size=(60, 40), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 90, 90)).save(path, **options)


def written(root, content, files=("1.jpg", "b/2.png"), below="images"):
    for value, name in enumerate(files):
        photo(root / below / name, 50 * value)
    (root / "boxes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return f"boxes:{root}"


def names(source):
    return [source.name(index) for index in range(len(source))]


FORMS = {
    "plain": ({"1.jpg": [[1, 2, 3.5, 4]], "b/2.png": []}, ()),
    "flat": ({"1.jpg": [1, 2, 3.5, 4], "b/2.png": []}, ()),
    "stems": ({"1": [[1, 2, 3.5, 4]], "b/2": []}, ()),
    "below": ({"images/1.jpg": [[1, 2, 3.5, 4]], "images/b/2.png": []}, ()),
    "labels": ({"1.jpg": {"boxes": [[1, 2, 3.5, 4]], "labels": ["cat"]}, "b/2.png": {"boxes": []}}, ("cat",)),
    "objects": ({"1": {"width": 9, "boxes": [{"class": "cat", "xyxy": [1, 2, 3.5, 4]}]}, "b/2": []}, ("cat",)),
    "width": ({"1": [{"label": "cat", "xywh": [1, 2, 2.5, 2]}], "b/2": []}, ("cat",)),
    "keys": ({"1": [{"name": "cat", "xmin": 1, "ymin": 2, "xmax": 3.5, "ymax": 4}], "b/2": []}, ("cat",)),
    "list": ([{"file": "1.jpg", "boxes": [[1, 2, 3.5, 4]]}, {"file_name": "b/2.png", "boxes": []}], ()),
    "numbers": ({"1.jpg": {"boxes": [[1, 2, 3.5, 4]], "labels": [0]}, "b/2.png": []}, ("0",)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("below", ["images", "."])
def test_the_forms_of_boxes_json(tmp_path, form, below):
    content, classes = FORMS[form]
    source = open_source(written(tmp_path, content, below=below))
    assert names(source) == ["1.jpg", "b/2.png"] and source.box_names == classes and source.splits == ()
    sample = source[0]
    assert sample["image"] == str((tmp_path / below / "1.jpg").resolve()) and sample["boxes"].dtype == np.float32
    np.testing.assert_array_equal(sample["boxes"], [[1, 2, 3.5, 4]])
    assert source[1]["boxes"].shape == (0, 4) and ("box_labels" in sample) == bool(classes)
    if classes:
        assert sample["box_labels"].tolist() == [0] and source[1]["box_labels"].dtype == np.int64
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint == open_source(f"boxes:{tmp_path}/boxes.json").fingerprint


WRONG = {
    "cut": ('{"1.jpg": [[1, 2', "boxes.json: .*expected"),
    "nothing": ("{}", "it names no image"),
    "number": ("3", "it holds a int"),
    "coco": ({"images": [], "annotations": []}, "the form of COCO.*coco:"),
    "nameless": ([{"boxes": []}], 'an entry of the list has no "file"'),
    "three": ({"1.jpg": [[1, 2, 3]]}, r"entry '1.jpg': \[1, 2, 3\] are no four numbers"),
    "word": ({"1.jpg": [[1, 2, 3, "x"]]}, "entry '1.jpg'"),
    "nan": ({"1.jpg": [[1, 2, 3, float("nan")]]}, "no four numbers"),
    "bbox": ({"1.jpg": [{"bbox": [1, 2, 3, 4]}]}, r'"xyxy" \(corners\) or "xywh" .*this one has bbox'),
    "keys": ({"1.jpg": {"objects": []}}, 'it has no "boxes" but objects'),
    "labels": ({"1.jpg": {"boxes": [[1, 2, 3, 4]], "labels": []}}, "1 boxes and labels"),
    "label": ({"1.jpg": {"boxes": [[1, 2, 3, 4]], "labels": [0.5]}}, "a label is a name"),
    "twice": ([{"file": "1.jpg", "boxes": []}, {"file": "1.jpg", "boxes": []}], "entry '1.jpg': is there twice"),
    "again": ({"1.jpg": [], "1": []}, "names an image twice: 1.jpg"),
    "away": ({"../1.jpg": []}, "leaves the folder"),
    "widths": (
        {"1.jpg": [[30, 20, 5, 6], [1, 2, 3, 4]]},
        r"1 of 2 boxes have no extent, such as \[30.0, 20.0, 5.0, 6.0",
    ),
    "some": ({"1": [{"xyxy": [1, 2, 3, 4], "label": "a"}, [1, 2, 3, 4]]}, "some here are .*nothing"),
    "kinds": ({"1": {"boxes": [[1, 2, 3, 4]] * 2, "labels": [0, "a"]}}, "some here are"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_another_form_is_told(tmp_path, kind):
    content, reason = WRONG[kind]
    with pytest.raises(ValueError, match=reason):
        open_source(written(tmp_path, content))


def test_names_of_classes(tmp_path):
    content = {"1.jpg": {"boxes": [[1, 2, 3, 4]] * 2, "labels": ["dog", "cat"]}, "b/2.png": []}
    text = written(tmp_path, content)
    assert open_source(text).box_names == ("cat", "dog") and open_source(text)[0]["box_labels"].tolist() == [1, 0]
    (tmp_path / "labels.txt").write_text("bird\ndog\ncat\n")
    assert open_source(text).box_names == ("bird", "dog", "cat")
    assert open_source(text)[0]["box_labels"].tolist() == [1, 2]
    (tmp_path / "other.txt").write_text("dog\n")
    with pytest.raises(ValueError, match="labels that are none of the 1 classes of .*other.txt: cat"):
        open_source(text + "?names=other.txt")
    (tmp_path / "other.txt").write_text("dog\ndog\n")
    with pytest.raises(ValueError, match="no list of classes, one name a line: dog twice"):
        open_source(text + "?names=other.txt")
    (tmp_path / "boxes.json").write_text(json.dumps({"1": {"boxes": [[1, 2, 3, 4]], "labels": [3]}}))
    with pytest.raises(ValueError, match="labels that are none of the 3 classes"):
        open_source(text)


def test_images_that_are_missing_and_images_that_no_entry_names(tmp_path):
    text = written(tmp_path, {"1.jpg": [[1, 2, 3, 4]], "9.jpg": [[1, 2, 3, 4]]})
    source = open_source(text)
    assert names(source) == ["1.jpg", "9.jpg"]
    report = check(text, picture="")
    assert report["splits"][""]["unreadable"] == [["9.jpg", f"{tmp_path}/images/9.jpg is missing"]]
    (tmp_path / "boxes.json").write_text('{"8.jpg": []}')
    with pytest.raises(FileNotFoundError, match="names 1 images, and none is in .*images: it holds .*1.jpg.*not 8.jpg"):
        open_source(text)


@pytest.mark.parametrize("place", ["", "images", "annotations"])
def test_xml_beside_the_images(tmp_path, place):
    below = "" if place == "" else "images"
    for name, value in (("1", 0), ("2", 100)):
        photo(tmp_path / below / f"{name}.jpg", value)
    for name, kind in (("1", "raccoon"),):
        path = tmp_path / place / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(XML.format(kind, 1, 2, 30, 40))
    source = open_source(f"boxes:{tmp_path}")
    assert names(source) == ["1.jpg"] and source.box_names == ("raccoon",)
    np.testing.assert_array_equal(source[0]["boxes"], [[0, 1, 30, 40]])
    np.testing.assert_array_equal(open_source(f"boxes:{tmp_path}?first=0")[0]["boxes"], [[1, 2, 30, 40]])
    (tmp_path / place / "2.xml").write_text("<annotation>")
    assert len(open_source(f"boxes:{tmp_path}")) == 2
    assert check(f"boxes:{tmp_path}", picture="")["splits"][""]["unreadable"][0][0] == "2.jpg"
    (tmp_path / place / "1.xml").write_text("")
    with pytest.raises(ValueError, match="none of the 2 annotations .* can be read: .*1.xml: not a readable"):
        open_source(f"boxes:{tmp_path}")
    (tmp_path / place / "1.xml").write_text(XML.format("raccoon", 5, 5, 4, 9))
    with pytest.raises(ValueError, match="1 of 1 boxes have no extent"):
        open_source(f"boxes:{tmp_path}")


def test_a_folder_a_split_with_the_classes_of_all(tmp_path):
    for split, kind in (("train", "dog"), ("valid", "cat")):
        photo(tmp_path / split / f"{kind}.jpg")
        (tmp_path / split / f"{kind}.xml").write_text(XML.format(kind, 1, 1, 9, 9))
    source = open_source(f"boxes:{tmp_path}")
    assert source.splits == ("train", "valid") and names(source) == ["dog.jpg"] and source.box_names == ("cat", "dog")
    assert open_source(f"boxes:{tmp_path}#valid")[0]["box_labels"] == [0] and source[0]["box_labels"] == [1]
    assert eval_split(f"boxes:{tmp_path}") == f"boxes:{tmp_path}#valid"
    with pytest.raises(ValueError, match="no split 'test': it has train, valid"):
        open_source(f"boxes:{tmp_path}#test")


def test_what_holds_no_boxes(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"boxes:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        open_source(f"boxes:{tmp_path}")
    photo(tmp_path / "1.jpg")
    with pytest.raises(
        FileNotFoundError, match=r'expected boxes.json in it, with {"1.jpg": .*1.xml beside 1.jpg or in'
    ):
        open_source(f"boxes:{tmp_path}")
    with pytest.raises(ValueError, match="no option first=2; there are"):
        open_source(f"boxes:{tmp_path}?first=2")
    with pytest.raises(ValueError, match="no option sort=1; there are"):
        open_source(f"boxes:{tmp_path}?sort=1")


# data check


def test_boxes_are_measured_against_their_image():
    boxes = [[0, 0, 30, 20], [-1, 0, 30, 20], [-1.5, 0, 5, 5], [0, 0, 30, 20], [0, 0, 5, 21.5], [9, 9, 9, 12]]
    sample = {"boxes": np.array(boxes), "box_labels": np.array([0, 0, 0, 0, 1, 1]), "difficult": np.arange(6) < 2}
    found = measured(sample, (20, 30))["boxes"]
    assert (found.count, found.over, found.outside, found.thin, found.twice, found.difficult) == (6, 1, 2, 1, 1, 2)
    assert found.truncated == 0 and found.labels == (0, 0, 0, 0, 1, 1)
    assert measured({}, (20, 30)) == {} and measured({"boxes": []}, (20, 30))["boxes"].count == 0
    for bad in ({"boxes": np.zeros((2, 3))}, {"boxes": [[0, 0, np.inf, 1]]}):
        assert "expected (n, 4)" in measured(bad, (20, 30))["problem"]
    assert "1 boxes and 2 box_labels" in measured({"boxes": [[0, 0, 1, 1]], "box_labels": [0, 0]}, (2, 3))["problem"]


def test_the_report_says_what_is_wrong_with_boxes(tmp_path):
    content = {
        "1.jpg": {"boxes": [[0, 0, 60, 40], [5, 5, 70, 9]], "labels": ["a", "b"]},
        "2.jpg": {"boxes": [[0, 0, 60.5, 40]], "labels": ["a"]},
        "3.jpg": {"boxes": []},
        "4.jpg": {"boxes": [[0, 0, 9, 9]] * 2, "labels": ["a", "a"]},
    }
    text = written(tmp_path, content, [f"{number}.jpg" for number in (1, 2, 3)])
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(tmp_path / "images/4.jpg", 200, exif=turned)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    report = check(text, picture="")
    assert report["problems"] == ["1 boxes reach over the edge of their image by more than a pixel: 1.jpg"]
    notes = "\n".join(report["notes"])
    assert "1 boxes reach over the edge of their image by a pixel or less: 2.jpg" in notes
    assert "1 boxes are there twice in their image: 4.jpg" in notes
    assert "1 of 4 images have no box, there is nothing to find in them: 3.jpg" in notes
    assert "1 of 3 classes have no box in the 4 images decoded: c" in notes
    assert "1 images with boxes are turned by their EXIF orientation" in notes
    assert report["splits"][""]["boxes"] == {
        "images": 4,
        "boxes": 5,
        "per_image": {"min": 0.0, "median": 1.5, "max": 2.0},
        "empty": 1,
        "difficult": 0,
        "truncated": 0,
        "classes": [["a", 4], ["b", 1], ["c", 0]],
    }
    assert "5 in 4 images (min 0, median 1.5, max 2), 1 empty" in as_text(report)
    assert json.loads(json.dumps(report)) == report


class Coloured(Source):
    """One box of class 0, and a difficult one of class 1 inside of it."""

    box_names = ("cat", "dog")

    def __len__(self):
        return 1

    def __getitem__(self, index):
        boxes = np.array([[0, 0, 32, 32], [8, 8, 24, 24]], np.float32)
        flags = np.array([False, True])
        return {
            "image": np.zeros((32, 32, 3), np.uint8),
            "boxes": boxes,
            "box_labels": np.arange(2),
            "difficult": flags,
        }


def test_frames_have_the_colours_of_their_classes_and_difficult_ones_are_thin():
    sheet = np.asarray(draw([(Coloured(), 0, -1)]))[GAP : GAP + SIDE, GAP : GAP + SIDE].astype(int)
    row, quarter = sheet[SIDE // 2], SIDE // 4
    red, other = row[0], row[quarter]
    assert red.tolist() == row[1].tolist() == [255, 40, 40] and not row[2].any()
    assert other.max() == 255 and other[2] == 255 and not row[quarter + 1].any() and not row[quarter - 1].any()
