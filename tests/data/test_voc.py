"""voc: PASCAL VOC and trees of its form, written small: what the XML says, which images, which classes, which masks."""

import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, holdout, open_source
from regvit_jax.data.check import check
from regvit_jax.data.decode import DecodeError, decode_map
from regvit_jax.data.sources.voc_xml import read
from regvit_jax.data.transforms import EvalTransform, Preprocess

OBJECT = """  <object>
    <name>{name}</name>
    <pose>Unspecified</pose>
    {flags}
    <bndbox>
      <xmax>{box[2]}</xmax>
      <xmin>{box[0]}</xmin>
      <ymax>{box[3]}</ymax>
      <ymin>{box[1]}</ymin>
    </bndbox>
  </object>
"""


def xml(*objects):
    """(name, xmin, ymin, xmax, ymax, "difficult truncated" or less) each."""
    body = "".join(
        OBJECT.format(
            name=name,
            box=box,
            flags="".join(f"<{flag}>{int(flag in marks)}</{flag}>" for flag in ("truncated", "difficult")),
        )
        for name, *box, marks in objects
    )
    return f"<annotation>\n<folder>VOC2007</folder>\n<size><width>60</width></size>\n{body}</annotation>\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def photo(path, value=0, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 90, 90)).save(path)


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, np.uint8), "P")
    image.putpalette([value % 256 for value in range(768)])
    image.save(path)


SETS = {"trainval": "000005 000007 000009", "train": "000005 000009", "val": "000007", "test": "000001"}


@pytest.fixture
def root(tmp_path):
    """VOCdevkit/VOC2007 with four images."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for number in (1, 5, 7, 9):
        photo(root / "JPEGImages" / f"{number:06d}.jpg", 20 * number)
    write(root / "Annotations/000001.xml", xml(("tvmonitor", 1, 1, 60, 40, "")))
    write(
        root / "Annotations/000005.xml",
        xml(
            ("chair", 11, 21, 30, 40, ""), ("aeroplane", 1, 1, 60, 10, "truncated"), ("chair", 5, 6, 7, 8, "difficult")
        ),
    )
    write(
        root / "Annotations/000007.xml", xml(("dog", "45.70000076293945", "3.0", "60", "39.9", "difficult truncated"))
    )
    write(root / "Annotations/000009.xml", xml(("person", 2, 2, 3, 3, "")))
    for split, names in SETS.items():
        write(root / f"ImageSets/Main/{split}.txt", names.replace(" ", "\n") + "\n")
        write(root / f"ImageSets/Main/dog_{split}.txt", "\n".join(f"{name} -1" for name in names.split()) + "\n")
    return root


def names(source):
    return [source.name(index) for index in range(len(source))]


def test_boxes_are_zero_based_with_exclusive_far_edges(root):
    source = open_source(f"voc:{root}")
    assert names(source) == ["000005.jpg", "000007.jpg", "000009.jpg"]
    sample = source[0]
    assert sample["image"] == str(root / "JPEGImages" / "000005.jpg")
    # The first box is 20 x 20 pixels in the XML too: 11 to 30 and 21 to 40, both inclusive.
    np.testing.assert_array_equal(sample["boxes"], [[10, 20, 30, 40], [0, 0, 60, 10], [4, 5, 7, 8]])
    assert sample["boxes"].dtype == np.float32 and sample["box_labels"].dtype == np.int64
    assert [source.box_names[label] for label in sample["box_labels"]] == ["chair", "aeroplane", "chair"]
    assert sample["truncated"].tolist() == [False, True, False]
    assert sample["difficult"].tolist() == [False, False, True]
    # Fractions are cut off before one is taken away: 45.7 is 44, 39.9 is 39.
    np.testing.assert_array_equal(source[1]["boxes"], [[44, 2, 60, 39]])
    np.testing.assert_array_equal(source[-1]["boxes"], [[1, 1, 3, 3]])
    assert len(source.box_names) == 20 and list(source.box_names) == sorted(source.box_names)
    assert source.class_names == source.mask_names == () and "label" not in sample
    with pytest.raises(IndexError):
        source[3]


def test_a_source_survives_pickling_and_hands_out_arrays_of_its_own(root):
    source = open_source(f"voc:{root}")
    again = pickle.loads(pickle.dumps(source))
    sample = source[0]
    sample["boxes"][:] = 0
    sample["truncated"][:] = True
    assert source[0]["boxes"][0, 3] == again[0]["boxes"][0, 3] == 40 and not source[0]["truncated"][0]
    assert source.fingerprint == again.fingerprint


def test_no_hard_leaves_out_objects_and_then_images_without_any(root):
    source = open_source(f"voc:{root}?hard=no")
    assert names(source) == ["000005.jpg", "000009.jpg"]
    np.testing.assert_array_equal(source[0]["boxes"], [[10, 20, 30, 40]])
    assert not source[0]["truncated"].any() and len(open_source(f"voc:{root}?hard=yes")) == 3
    write(root / "Annotations/000005.xml", xml(("dog", 1, 1, 2, 2, "truncated")))
    write(root / "Annotations/000009.xml", xml())
    with pytest.raises(ValueError, match="no object of the split is easy"):
        open_source(f"voc:{root}?hard=no")


def test_splits_that_share_images_are_not_offered_together(root):
    assert open_source(f"voc:{root}").splits == ("trainval", "test")
    assert open_source(f"voc:{root}#train").splits == ("train", "val", "test")
    assert names(open_source(f"voc:{root}#val")) == ["000007.jpg"]
    assert eval_split(f"voc:{root}") == f"voc:{root}#test"
    assert eval_split(f"voc:{root}#train") == f"voc:{root}#val"
    # The test images of VOC2012 have no annotations: then nothing is offered beside trainval.
    (root / "Annotations/000001.xml").unlink()
    assert open_source(f"voc:{root}").splits == ("trainval",) and eval_split(f"voc:{root}") is None
    train, held_out = (open_source(part) for part in holdout(f"voc:{root}"))
    assert len(train) == 2 and len(held_out) == 1 and held_out.box_names == train.box_names != ()
    with pytest.raises(ValueError, match="none of the 1 annotations of the split can be read: .*000001.xml: there is"):
        open_source(f"voc:{root}#test")
    with pytest.raises(ValueError, match="no split 'testing': .* trainval, train, val, test"):
        open_source(f"voc:{root}#testing")
    with pytest.raises(ValueError, match="dog_val.txt says which images show one class.*'000007 -1'"):
        open_source(f"voc:{root}#dog_val")


def test_the_year_is_found_or_asked_for(root):
    devkit = root.parent
    assert len(open_source(f"voc:{devkit}")) == len(open_source(f"voc:{devkit.parent}")) == 3
    (devkit / "VOC2012").mkdir()
    with pytest.raises(ValueError, match=r"has the years 2007, 2012: name one, as voc:.*\?year=2007"):
        open_source(f"voc:{devkit}")
    assert len(open_source(f"voc:{devkit}?year=2007")) == len(open_source(f"voc:{root}?year=2007")) == 3
    with pytest.raises(FileNotFoundError, match="VOC2012 is no VOC tree: expected the folders JPEGImages/.* nothing"):
        open_source(f"voc:{devkit}?year=2012")
    with pytest.raises(ValueError, match="has the years 2007, 2012"):
        open_source(f"voc:{devkit}?year=2008")
    with pytest.raises(ValueError, match="is one tree, and not VOC2012"):
        open_source(f"voc:{root}?year=2012")


def test_masks_are_the_palette_numbers(root):
    values = np.zeros((40, 60))
    values[:20], values[20:22] = 20, 255
    for name in ("000005", "000007"):
        mask(root / f"SegmentationClass/{name}.png", values)
    mask(root / "SegmentationClassAug/000009.png", values)
    write(root / "ImageSets/Segmentation/train.txt", "000005\n")
    write(root / "ImageSets/Segmentation/val.txt", "000007\n")
    write(root / "ImageSets/Segmentation/trainaug.txt", "000009\n")
    source = open_source(f"voc:{root}?set=segmentation")
    assert names(source) == ["000005.jpg"] and source.splits == ("train", "val") and source.box_names == ()
    assert source.mask_names[:2] == ("background", "aeroplane") and len(source.mask_names) == 21
    assert source.mask_names[20] == "tvmonitor"
    np.testing.assert_array_equal(decode_map(source[0]["mask"]), values)
    assert names(open_source(f"voc:{root}?set=segmentation#val")) == ["000007.jpg"]
    augmented = open_source(f"voc:{root}?set=segmentation#trainaug")
    assert augmented[0]["mask"].endswith("SegmentationClassAug/000009.png") and augmented.splits == ("trainaug", "val")
    before = source.fingerprint
    mask(root / "SegmentationClass/000005.png", np.arange(2400).reshape(40, 60) % 21)
    assert open_source(f"voc:{root}?set=segmentation").fingerprint != before
    with pytest.raises(ValueError, match="hard= chooses among the objects"):
        open_source(f"voc:{root}?set=segmentation&hard=no")


def test_a_tree_with_other_classes(tmp_path):
    root = tmp_path / "helmets"
    for name, kind in (("a", "vest"), ("b b", "helmet")):
        photo(root / "images" / f"{name}.png")
        write(root / "Annotations" / f"{name}.xml", xml((kind, 1, 1, 9, 9, "")))
    source = open_source(f"voc:{root}")
    assert names(source) == ["a.png", "b b.png"] and source.box_names == ("helmet", "vest") and source.splits == ()
    write(root / "ImageSets/Main/train.txt", "a.png\r\n")
    write(root / "ImageSets/Main/val.txt", "b b\n")
    # The classes are those of all splits.
    source = open_source(f"voc:{root}")
    assert names(source) == ["a.png"] and source.box_names == ("helmet", "vest") and source[0]["box_labels"] == [1]
    write(root / "mine.txt", "\ufeffvest\nhelmet\n")
    assert open_source(f"voc:{root}?names=mine.txt#val")[0]["box_labels"] == [1]
    write(root / "labels.txt", "__ignore__\n_background_\nhelmet\n")
    with pytest.raises(ValueError, match=r"none of the 1 expected \(helmet\): vest. Name all of them.*names=FILE"):
        open_source(f"voc:{root}")
    with pytest.raises(FileNotFoundError, match="no file 'none.txt'"):
        open_source(f"voc:{root}?names=none.txt")
    with pytest.raises(FileNotFoundError, match=r"no folder SegmentationClass/; it has Annotations/: .*set=detection"):
        open_source(f"voc:{root}?set=segmentation")
    for name in ("a", "b b"):
        mask(root / "SegmentationClass" / f"{name}.png", np.ones((40, 60)))
    assert open_source(f"voc:{root}?set=segmentation").mask_names == ("background", "helmet")
    (root / "labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match="nothing names the classes of the masks"):
        open_source(f"voc:{root}?set=segmentation")
    write(root / "labels.txt", "helmet\nbackground\n")
    with pytest.raises(ValueError, match="the background is 0 in masks"):
        open_source(f"voc:{root}?set=segmentation")


def test_an_unknown_class_in_voc_itself_is_named(root):
    write(root / "Annotations/000009.xml", xml(("helmet", 1, 1, 9, 9, "")))
    with pytest.raises(ValueError, match="none of the 20 expected .*: helmet. Name all"):
        open_source(f"voc:{root}")


BROKEN = {
    "cut": ("<annotation><object>", "no element found"),
    "empty": ("", "no element found"),
    "other": ("<html></html>", "holds <html>, expected <annotation>"),
    "nameless": ("<annotation><object><bndbox/></object></annotation>", "object 1 has no name, no xmin"),
    "boxless": (xml(("dog", 1, 1, 2, 2, "")).replace("bndbox", "robndbox"), "object 1, 'dog', has no bndbox"),
    "word": (xml(("dog", 1, "x", 2, 2, "")), "object 1, 'dog': could not convert"),
    "nan": (xml(("dog", 1, "nan", 2, 2, "")), "no four numbers"),
    "huge": (xml(("dog", 1, 1, "1e300", 2, "")), "no four numbers"),
    "laughs": (
        '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><annotation><object><name>&b;</name></object></annotation>',
        "document type 'x'",
    ),
    "file": ('<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>', "document type"),
    "encoding": ('<?xml version="1.0" encoding="no-such"?><annotation/>', "unknown encoding"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_annotation_is_named(tmp_path, kind):
    content, reason = BROKEN[kind]
    path = tmp_path / f"{kind}.xml"
    path.write_text(content)
    with pytest.raises(DecodeError, match=f"{kind}.xml: not a readable annotation in the XML of VOC .*{reason}"):
        read(str(path))


def test_a_document_type_is_refused_in_every_encoding(tmp_path):
    content = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x [<!ENTITY a "b">]><annotation/>'
    (tmp_path / "a.xml").write_bytes(content.encode("utf-16"))
    with pytest.raises(DecodeError, match="document type"):
        read(str(tmp_path / "a.xml"))
    (tmp_path / "a.xml").write_bytes("<annotation/>".join(["\ufeff", ""]).encode())
    assert read(str(tmp_path / "a.xml")) == []


def test_parts_of_an_object_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    content = xml(("person", 4, 5, 6, 7, "")).replace("<pose>Unspecified</pose>", part)
    (tmp_path / "a.xml").write_text(content)
    (found,) = read(str(tmp_path / "a.xml"))
    assert found.kind == "person" and found.box == (3, 4, 6, 7)
    assert read(str(tmp_path / "a.xml"), first=0)[0].box == (4, 5, 6, 7)


def test_one_broken_annotation_spoils_its_image_only(root):
    write(root / "Annotations/000007.xml", "<annotation>")
    (root / "Annotations/000009.xml").unlink()
    source = open_source(f"voc:{root}")
    assert len(source) == 3 and len(source[0]["boxes"]) == 3
    with pytest.raises(DecodeError, match="000007.xml: not a readable annotation"):
        source[1]
    report = check(f"voc:{root}", picture="")
    assert [name for name, _ in report["splits"]["trainval"]["unreadable"]] == ["000007.jpg", "000009.jpg"]
    assert "000009.xml: there is no such annotation" in report["problems"][0]
    # The place of a broken one is found again behind what hard=no leaves out.
    write(root / "Annotations/000005.xml", xml(("dog", 1, 1, 2, 2, "difficult")))
    with pytest.raises(ValueError, match="000007.xml"):
        open_source(f"voc:{root}?hard=no")[0]


def test_a_report_of_objects(root, tmp_path):
    report = check(f"voc:{root}", picture=str(tmp_path / "sheet.png"))
    assert report["problems"] == [] and list(report["splits"]) == ["trainval", "test"]
    found = report["splits"]["trainval"]["boxes"]
    assert (found["images"], found["boxes"], found["difficult"], found["truncated"]) == (3, 5, 2, 2)
    assert dict(found["classes"])["chair"] == 2 and found["per_image"] == {"min": 1, "median": 1, "max": 3}
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_what_is_no_voc_tree(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"voc:{tmp_path / 'nothing'}")
    (tmp_path / "VOCtrainval_06-Nov-2007.tar").touch()
    (root / "Annotations").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no VOC tree.*found ImageSets, JPEGImages"):
        open_source(f"voc:{root}")
    with pytest.raises(ValueError, match="no option sort=yes; there are year=2007"):
        open_source(f"voc:{root}?sort=yes")
    with pytest.raises(ValueError, match="no option hard=perhaps"):
        open_source(f"voc:{root}?hard=perhaps")


def test_batches_are_made_without_the_objects(root):
    transform = EvalTransform(Preprocess(size=8))
    fields = transform(open_source(f"voc:{root}")[0], np.random.default_rng(0))
    assert set(fields) == {"image", "label"} and fields["label"] == -1


def test_the_fingerprint_follows_the_objects(root):
    before = open_source(f"voc:{root}").fingerprint
    assert open_source(f"voc:{root}").fingerprint == before != open_source(f"voc:{root}#train").fingerprint
    write(root / "Annotations/000009.xml", xml(("person", 2, 2, 3, 4, "")))
    assert open_source(f"voc:{root}").fingerprint != before
