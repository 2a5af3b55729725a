"""regvit data check: a dataset with one of every fault, counted by hand; the picture."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data.check import check
from regvit_jax.data.check_report import as_text
from regvit_jax.data.contact_sheet import COLUMNS, GAP, SIDE, chosen, draw
from regvit_jax.data.sources import IGNORE, Source


def write(path, value=0, size=(20, 20), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


@pytest.fixture
def fine(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for label in range(2):
            for number in range(count):
                value = 100 * label + 10 * number + (5 if split == "val" else 0)
                write(tmp_path / "fine" / split / "ab"[label] / f"{number}.png", value)
    return tmp_path / "fine"


def test_nothing_is_wrong_with_a_sound_dataset(fine):
    report = check(f"folder:{fine}", picture="")
    assert report["problems"] == report["notes"] == [] and report["eval_split"] == "val"
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["samples"], train["classes"], train["decoded"], train["unlabelled"]) == (6, 2, 6, 0)
    assert train["fewest"] == ["a", 3] and train["most"] == ["a", 3] and val["most"] == ["a", 2]
    assert train["kinds"] == {"PNG RGB": 6} and train["width"]["median"] == 20
    text = as_text(report)
    assert "train: 6 images, 2 classes, 3 each" in text and "problems: none" in text
    assert json.loads(json.dumps(report)) == report


def test_one_of_every_fault(fine):
    train = fine / "train"
    (train / "a" / "0.png").write_bytes(b"")
    (train / "a" / "broken.jpg").write_bytes(b"\xff\xd8 no more of it")
    write(train / "b" / "long.png", 1, (200, 20))
    write(train / "b" / "tiny.png", 2, (8, 20))
    write(train / "b" / "cmyk.jpg", 3, mode="CMYK")
    turned = Image.Exif()
    turned[0x0112] = 6
    write(train / "b" / "turned.jpg", 4, exif=turned)
    (train / "b" / "other_label.png").write_bytes((train / "a" / "1.png").read_bytes())
    (train / "b" / "again.png").write_bytes((train / "b" / "1.png").read_bytes())
    (fine / "val" / "a" / "leak.png").write_bytes((train / "b" / "2.png").read_bytes())
    report = check(f"folder:{fine}", picture="")
    unreadable = report["splits"]["train"]["unreadable"]
    assert sorted(name for name, _ in unreadable) == ["a/0.png", "a/broken.jpg"] and all(
        reason for _, reason in unreadable
    )
    assert report["splits"]["train"]["kinds"] == {"PNG RGB": 9, "JPEG CMYK": 1, "JPEG RGB": 1}
    problems, notes = "\n".join(report["problems"]), "\n".join(report["notes"])
    assert "train: 2 of 13 decoded images are unreadable" in problems and "a/broken.jpg: " in problems
    assert "1 images are in two splits, byte for byte: b/2.png = a/leak.png" in problems
    assert "1 images have two labels, byte for byte" in problems and len(report["problems"]) == 3
    assert "1 images are there more than once" in notes
    assert "have a side below 16 pixels: b/tiny.png" in notes
    assert "times as long as wide: b/long.png" in notes
    assert "turned by their EXIF orientation: b/turned.jpg" in notes and len(report["notes"]) == 4


class Odd(Source):
    """Five samples in three classes, the last of which is empty; one sample has no label."""

    class_names = ("a", "b", "c")
    labels = np.array([0, 0, 1, -1, 1])

    def __len__(self):
        return 5

    def __getitem__(self, index):
        mask = np.zeros((4 if index == 4 else 30, 30), np.uint8)
        return {"image": np.full((30, 30, 3), index, np.uint8), "label": int(self.labels[index]), "mask": mask}


def test_labels_and_masks_that_do_not_fit(monkeypatch):
    monkeypatch.setattr("regvit_jax.data.check.open_source", lambda text: Odd())
    report = check("folder:/odd", picture="")
    assert [text.split("\n")[0].split(":")[0] for text in report["problems"]] == [
        "1 of 5 decoded images are unreadable",
        "1 classes have no image",
        "1 images have no label, the others do",
    ]
    assert report["splits"][""]["unreadable"] == [
        ["4", "its mask has shape (4, 30), the image (30, 30): they must agree"]
    ]
    assert "its mask has shape" in as_text(report) and report["splits"][""]["kinds"] == {"array uint8 3 channels": 4}


def test_a_sample_is_drawn_of_each_split(fine):
    report = check(f"folder:{fine}", sample=3, picture="")
    assert [found["decoded"] for found in report["splits"].values()] == [3, 3]
    assert report["splits"]["train"]["most"] == ["a", 3]  # counts are of all
    assert [found["decoded"] for found in check(f"folder:{fine}", sample=0, picture="")["splits"].values()] == [6, 4]
    only = check(f"folder:{fine}#val[:50%]", picture="")
    assert list(only["splits"]) == ["val"] and only["splits"]["val"]["samples"] == 2


def test_what_is_worth_a_note(tmp_path):
    for number in range(101):
        (tmp_path / "few").mkdir(exist_ok=True)
        write(tmp_path / "many" / f"{number}.png", number)
    write(tmp_path / "few" / "0.png", 200)
    notes = "\n".join(check(f"folder:{tmp_path}", sample=1, picture="")["notes"])
    assert "classes are uneven: many has 101 images, few 1" in notes
    notes = check(f"folder:{tmp_path / 'many'}", sample=1, picture="")
    assert notes["notes"] == [] and notes["splits"][""]["classes"] == 0
    assert "a fixed tenth is held out" in as_text(notes)


def test_the_contact_sheet_shows_every_class_in_order(tmp_path):
    colours = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}
    for name, colour in colours.items():
        for number in range(9):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20), colour).save(path)
    out = tmp_path / "new" / "sheet.png"
    report = check(f"folder:{tmp_path / 'photos'}", picture=str(out))
    assert report["picture"] == str(out)
    sheet = np.asarray(Image.open(out))
    cells = 27
    assert sheet.shape[1] == COLUMNS * (SIDE + GAP) + GAP
    middles = [
        (GAP + row * ((sheet.shape[0] - GAP) // 4) + SIDE // 4, GAP + column * (SIDE + GAP) + SIDE // 2)
        for row, column in (divmod(place, COLUMNS) for place in range(cells))
    ]
    shown = [tuple(sheet[middle].tolist()) for middle in middles]
    assert shown == [colour for colour in colours.values() for _ in range(9)]


def test_the_sheet_takes_from_as_many_classes_as_there_are():
    class Look:
        def __init__(self, label):
            self.label = label

    looks = [Look(0)] * 500 + [Look(label) for label in range(1, 40)]
    labels = [look.label for look in chosen(looks, 48)]
    assert len(labels) == 48 and labels == sorted(labels) and set(labels) == set(range(40))
    assert len({look.label for look in chosen([Look(label) for label in range(100)], 48)}) == 48


class Boxed(Source):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.fromarray(np.pad(np.ones((16, 16), np.uint8), 8)).save(buffer, "PNG")
        boxes = np.array([[8, 8, 24, 24]], np.float32)
        return {"image": np.zeros((32, 32, 3), np.uint8), "label": -1, "mask": buffer.getvalue(), "boxes": boxes}


def test_masks_and_boxes_are_drawn_where_they_are():
    sheet = np.asarray(draw([(Boxed(), 0, -1)]))[GAP : GAP + SIDE, GAP : GAP + SIDE]
    quarter = SIDE // 4
    assert (sheet[quarter, quarter] == (255, 40, 40)).all()  # the corner of the box
    assert sheet[SIDE // 2, SIDE // 2].any() and not sheet[quarter // 2, quarter // 2].any()  # the tint of class 1


class Mapped(Source):
    """Ten-pixel squares: a mask of three named classes with a quarter ignored, and depth with a fifth unknown."""

    mask_names = ("floor", "wall", "lamp")
    depth_range = (0.5, 5.0)
    dense_refusal = "it is made up"

    def __len__(self):
        return 4

    def __getitem__(self, index):
        mask = np.zeros((10, 20), np.uint8)
        mask[:, :5], mask[:, 5:8] = IGNORE, 1
        depth = np.full((10, 20), 2.0, np.float32)
        depth[:2], depth[2], depth[3, 0] = 0, 8.0, np.nan
        image = np.full((10, 20, 3), index, np.uint8)
        if index == 1:
            mask[:], depth[:] = IGNORE, 0
        elif index == 2:
            return {"image": image, "mask": mask.astype(float), "depth": depth}
        elif index == 3:
            mask[0, 0] = 7
            return {"image": image, "mask": mask}
        return {"image": image, "mask": mask, "depth": depth}


def test_masks_and_depth_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("regvit_jax.data.check.open_source", lambda text: Mapped())
    report = check("folder:/mapped", picture=str(tmp_path / "sheet.png"))
    found = report["splits"][""]
    # Samples 0, 1 and 3: ignored are 50 and 200 and 49 of 200 pixels each; 1 is on 30 of 150 and 30 of 151.
    assert found["mask"]["maps"] == 3 and found["mask"]["ignored"] == pytest.approx(299 / 600)
    assert found["mask"]["classes"] == [
        ["floor", pytest.approx(240 / 301)],
        ["wall", pytest.approx(60 / 301)],
        ["lamp", 0.0],
    ]
    # Samples 0 and 1: 40 rows' and one pixel, and all 200, are unknown; a row of 20 is farther than 5 m.
    assert found["depth"] == {
        "maps": 2,
        "unknown": pytest.approx(241 / 400),
        "nearest": 2.0,
        "median": 2.0,
        "farthest": 8.0,
    }
    problems, notes = "\n".join(report["problems"]), "\n".join(report["notes"])
    assert "1 of 4 decoded images are unreadable\n      2: its mask holds float64 values, no class numbers" in problems
    assert "1 masks have a class number above 2, with 3 classes: 3" in problems
    assert "1 images have no depth, the others do: 3" in problems and len(report["problems"]) == 3
    assert "1 masks have no pixel that counts: 1" in notes and "1 depth maps have no known pixel: 1" in notes
    assert "1 of 3 classes are in none of the 3 masks decoded: lamp" in notes
    assert "13 % of the known depth is outside the 0.5 to 5 m that count" in notes  # 20 of 159
    assert "segmentation and depth are refused on it: it is made up" in notes
    text = as_text(report)
    assert "mask       3 maps, 3 classes, 50 % of the pixels ignored\n             floor: 80 %, wall: 20 %\n" in text
    assert "depth      2 maps, 2.00 to 8.00 m, median 2.00 m, 60 % of the pixels unknown" in text
    assert json.loads(json.dumps(report)) == report
    # Three samples are drawn, each twice as wide as a picture, and as high as the pictures are.
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (3 * 2 * (SIDE + GAP) + GAP, SIDE // 2 + 2 * 13 + 2 * GAP)


def test_a_wrong_unit_is_asked_about(monkeypatch):
    class Far(Source):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": np.zeros((20, 20, 3), np.uint8), "depth": np.full((20, 20), 1810.0, np.float32)}

    monkeypatch.setattr("regvit_jax.data.check.open_source", lambda text: Far())
    report = check("folder:/far", picture="")
    assert report["problems"] == [] and "the median depth is 1810 m: is the unit right" in report["notes"][0]


def test_depth_is_drawn_beside_and_ignored_pixels_keep_their_colours():
    class One(Source):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            mask = np.full((32, 32), IGNORE, np.uint8)
            mask[:, 16:] = 1
            depth = np.zeros((32, 32), np.float32)
            depth[:16], depth[16:24] = 1, 2
            return {"image": np.full((32, 32, 3), 200, np.uint8), "mask": mask, "depth": depth}

    sheet = np.asarray(draw([(One(), 0, -1)]))
    assert sheet.shape[1] == 2 * (SIDE + GAP) + GAP
    photo, beside = (
        sheet[GAP : GAP + SIDE, GAP : GAP + SIDE],
        sheet[GAP : GAP + SIDE, 2 * GAP + SIDE : 2 * (GAP + SIDE)],
    )
    assert (photo[:, : SIDE // 2] == 200).all() and (photo[:, SIDE // 2 :] != 200).any(-1).all()
    near, far, unknown = beside[0, 0].astype(int), beside[SIDE * 5 // 8, 0].astype(int), beside[-1, 0]
    assert near.sum() > far.sum() + 300 and len(set(unknown.tolist())) == 1  # bright, dark, grey
