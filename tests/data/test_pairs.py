"""pairs: folders, globs and splits; what the values of masks and depth maps mean; files without partner."""

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, holdout, open_source
from regvit_jax.data.decode import DecodeError
from regvit_jax.data.sources import IGNORE, parse
from regvit_jax.data.sources.pairs_masks import largest_class


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def photo(path, shape=(2, 3)):
    save(path, np.zeros((*shape, 3), np.uint8))


def names(source):
    return [source.name(i) for i in range(len(source))]


@pytest.fixture
def camvid(tmp_path):
    """Three for training, with classes 0 to 3, and two for evaluation, one with class 4; 11 is void."""
    for split, masks in (("train", ([0, 1, 11], [2, 3, 11], [0, 0, 0])), ("val", ([4, 11, 1], [0, 0, 0]))):
        for number, row in enumerate(masks):
            photo(tmp_path / split / f"{number}.jpg")
            save(tmp_path / f"{split}annot" / f"{number}.png", np.array([row] * 2, np.uint8))
    return f"pairs:{tmp_path}/{{split}},{tmp_path}/{{split}}annot"


# Which files belong together


def test_folders_are_paired_by_names_without_extension(tmp_path):
    for name, value in (("b/1", 1), ("a/1", 2), ("2", 3)):
        photo(tmp_path / "photos" / f"{name}.jpg")
        save(tmp_path / "masks" / f"{name}.png", np.full((2, 3), value, np.uint8))
    (tmp_path / "photos" / "notes.txt").write_text("x")
    text = f"pairs:{tmp_path}/photos,{tmp_path}/masks?classes=4"
    source = open_source(text)
    assert names(source) == ["2.jpg", "a/1.jpg", "b/1.jpg"] and source.splits == ()
    assert [int(source[i]["mask"][0, 0]) for i in range(3)] == [3, 2, 1]
    assert source[2]["image"] == str(tmp_path / "photos/b/1.jpg")
    assert eval_split(text) is None and len(open_source(holdout(text)[1])) == 1
    with pytest.raises(ValueError, match=r"has no split 'train': write \{split\} for it in both paths"):
        open_source(f"{text}#train")


def test_stars_match_the_same_in_both(tmp_path):
    for city, number in (("ulm", 2), ("bonn", 1), ("ulm", 1)):
        photo(tmp_path / "left" / city / f"{city}_{number}_left.png")
        save(tmp_path / "fine" / city / f"{city}_{number}_ids.png", np.full((2, 3), number, np.uint8))
        save(tmp_path / "fine" / city / f"{city}_{number}_colour.png", np.zeros((2, 3, 3), np.uint8))
    source = open_source(f"pairs:{tmp_path}/left/*/*_left.png,{tmp_path}/fine/*/*_ids.png?classes=3")
    assert names(source) == ["bonn/bonn_1_left.png", "ulm/ulm_1_left.png", "ulm/ulm_2_left.png"]
    assert [int(source[i]["mask"][0, 0]) for i in range(3)] == [1, 1, 2]
    with pytest.raises(ValueError, match="write one \\* for each folder, or name the folder"):
        open_source(f"pairs:{tmp_path}/**/*_left.png,{tmp_path}/fine/*/*_ids.png")


def test_one_folder_may_hold_both_and_brackets_are_no_pattern(tmp_path):
    place = tmp_path / "run [1]"
    for number in range(3):
        photo(place / f"frame-{number}.color.jpg")
        save(place / f"frame-{number}.depth.png", np.full((2, 3), 1000 + number, np.uint16))
    source = open_source(f"pairs:{place}/*.color.jpg,{place}/*.depth.png?depth=0.001")
    assert names(source) == [f"frame-{number}.color.jpg" for number in range(3)]
    assert [float(source[i]["depth"][0, 0]) for i in range(3)] == pytest.approx([1.0, 1.001, 1.002])


def test_a_folder_may_meet_a_pattern(tmp_path):
    photo(tmp_path / "photos" / "1.jpg")
    save(tmp_path / "masks" / "1_mask.png", np.zeros((2, 3), np.uint8))
    assert names(open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks/*_mask.png")) == ["1.jpg"]
    with pytest.raises(ValueError, match=r"1 images have no map \(1.jpg\) and 1 maps have no image \(1_mask.png\)"):
        open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks")


def test_files_without_partner_are_named_on_both_sides(tmp_path):
    for number in range(6):
        photo(tmp_path / "photos" / f"{number}.jpg")
        save(tmp_path / "masks" / f"{number + 4}.png", np.zeros((2, 3), np.uint8))
    message = (
        r"4 images have no map \(0.jpg, 1.jpg, 2.jpg, …\) and 4 maps have no image \(6.png, 7.png, 8.png, …\). "
        r"Images are .*photos, maps .*masks. pairs:IMAGES,MAPS takes two folders"
    )
    with pytest.raises(ValueError, match=message):
        open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks")
    photo(tmp_path / "photos" / "0.png")
    with pytest.raises(ValueError, match="photos: 0.jpg and 0.png have one name"):
        open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks")


def test_paths_that_are_not_there(tmp_path):
    photo(tmp_path / "photos" / "1.jpg")
    for text, error, message in (
        (f"pairs:{tmp_path}/photos", ValueError, "names 1 paths, two are needed. pairs:IMAGES,MAPS takes two folders"),
        (f"pairs:{tmp_path}/a,{tmp_path}/b,{tmp_path}/c", ValueError, "names 3 paths"),
        (f"pairs:{tmp_path}/photos,{tmp_path}/masks", FileNotFoundError, "masks is no folder"),
        (f"pairs:{tmp_path}/photos,{tmp_path}/photos/*.png", FileNotFoundError, r"photos/\*.png: no file there"),
        (f"pairs:{tmp_path}/photos/1.jpg,{tmp_path}/photos", FileNotFoundError, "1.jpg is no folder: name a folder"),
    ):
        with pytest.raises(error, match=message):
            open_source(text)


# Splits


def test_one_string_names_all_splits(camvid):
    text = f"{camvid}?ignore=11"
    train = open_source(text)
    assert train.splits == ("train", "val") and len(train) == 3 and str(parse(f"{text}#train")) == f"{text}#train"
    assert eval_split(text) == eval_split(f"{text}#train[:2]") == f"{text}#val"
    val = open_source(eval_split(text))
    assert len(val) == 2 and val[0]["mask"].tolist() == [[4, IGNORE, 1]] * 2
    part, held_out = (open_source(side) for side in holdout(f"{text}#train"))
    assert sorted(names(part) + names(held_out)) == ["0.jpg", "1.jpg", "2.jpg"] and part.splits == train.splits
    assert len({source.fingerprint for source in (train, val, open_source(camvid))}) == 3
    with pytest.raises(ValueError, match="has no split 'test': it has train, val"):
        open_source(f"{text}#test")


def test_splits_deep_in_patterns_and_without_train(tmp_path):
    for split in ("left", "right", "trash"):
        photo(tmp_path / "rgb" / split / "run" / f"{split}_1.jpg")
    for split in ("left", "right"):
        save(tmp_path / "ids" / f"{split}_set" / "run" / "1.png", np.zeros((2, 3), np.uint8))
    text = f"pairs:{tmp_path}/rgb/{{split}}/*/{{split}}_*.jpg,{tmp_path}/ids/{{split}}_set/*/*.png?classes=2"
    with pytest.raises(ValueError, match="has the splits left, right: name one, as #left"):
        open_source(text)
    assert names(open_source(f"{text}#right")) == ["run/right_1.jpg"] and eval_split(f"{text}#left") is None


def test_splits_that_are_not_there(tmp_path, camvid):
    for images, masks, error, message in (
        ("{split}", "valannot", ValueError, r"both paths hold \{split\} in the name of a folder, or none does"),
        ("*/{split}.jpg", "{split}annot/*.png", ValueError, r"put \{split\} before the first \*"),
        ("{split}/*.jpg", "*_{split}.png", ValueError, r"both paths hold \{split\} in the name of a folder"),
        ("{split}", "{split}masks", FileNotFoundError, "no split: .* holds train, trainannot, val, valannot, and none"),
        ("deep/{split}", "{split}annot", FileNotFoundError, "deep is no folder"),
    ):
        with pytest.raises(error, match=message):
            open_source(f"pairs:{tmp_path}/{images},{tmp_path}/{masks}")


# What values mean


def test_classes_are_counted_over_all_splits_once(camvid, caplog):
    text = f"{camvid}?ignore=11"
    largest_class.cache_clear()
    with caplog.at_level("INFO"):
        assert open_source(text)[0]["mask"].tolist() == [[0, 1, IGNORE]] * 2
        assert "reading" not in caplog.text  # nobody asked
        # Class 4 is in val only, and a head for both must know it.
        assert open_source(text).mask_names == ("0", "1", "2", "3", "4")
        assert open_source(f"{text}#val[:1]").mask_names == ("0", "1", "2", "3", "4")
    assert caplog.text.count("reading 5 masks once to count their classes") == 1
    assert len(open_source(camvid).mask_names) == 12  # void is a class if nobody says that it is none


def test_names_and_numbers_of_classes(camvid, tmp_path):
    assert open_source(f"{camvid}?ignore=11&classes=9").mask_names == tuple("012345678")
    (tmp_path / "classes.txt").write_text("sky\nbuilding\n\npole\n road \ncar\n")
    source = open_source(f"{camvid}?ignore=11,12&names={tmp_path}/classes.txt#val")
    assert source.mask_names == ("sky", "building", "pole", "road", "car")
    assert source[0]["mask"].tolist() == [[4, IGNORE, 1]] * 2
    few = open_source(f"{camvid}?ignore=11&classes=4#val")
    with pytest.raises(ValueError, match=r"valannot/0.png has the value 4: classes are 0 to 3. .* \?ignore=4"):
        few[0]
    assert few[1]["mask"].max() == 0


def test_forms_of_masks(tmp_path):
    for name in ("palette", "bits", "wide", "float", "colour", "void"):
        photo(tmp_path / "photos" / f"{name}.png")
    palette = Image.fromarray(np.array([[0, 1, 255]] * 2, np.uint8), "L").convert("P")
    palette.putpalette(list(range(200, 0, -1)) * 3)
    (tmp_path / "masks").mkdir()
    palette.save(tmp_path / "masks" / "palette.png")
    save(tmp_path / "masks" / "bits.png", np.array([[True, False, True]] * 2))
    save(tmp_path / "masks" / "wide.png", np.array([[0, 254, 65535]] * 2, np.uint16))
    Image.fromarray(np.ones((2, 3), np.float32)).save(tmp_path / "masks" / "float.tif")
    save(tmp_path / "masks" / "colour.png", np.zeros((2, 3, 3), np.uint8))
    save(tmp_path / "masks" / "void.png", np.full((2, 3), 300, np.uint16))
    source = open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks?ignore=65535,300")
    at = {name: names(source).index(f"{name}.png") for name in ("palette", "bits", "wide", "float", "colour", "void")}
    assert source[at["palette"]]["mask"].tolist() == [[0, 1, IGNORE]] * 2  # class numbers, not colours
    assert source[at["bits"]]["mask"].tolist() == [[1, 0, 1]] * 2
    assert source[at["wide"]]["mask"].tolist() == [[0, 254, IGNORE]] * 2
    assert source[at["void"]]["mask"].tolist() == [[IGNORE] * 3] * 2
    with pytest.raises(ValueError, match="float.tif holds float32 values, no class numbers"):
        source[at["float"]]
    with pytest.raises(DecodeError, match="colour.png: a mask or depth map has one channel.*pairs:IMAGES,MAPS"):
        source[at["colour"]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 255], "the values 0 and 255 only: .* Save them with 1 for the object"),
        ([0, 300], "the values 0, 300: class numbers from 0 to 254 are expected.*depth=0.001"),
        ([255, 255], "the values 255: class numbers"),
    ],
)
def test_masks_of_which_no_classes_can_be_counted(tmp_path, values, message):
    photo(tmp_path / "photos" / "1.jpg", (1, 2))
    save(tmp_path / "masks" / "1.png", np.array([values], np.uint16))
    with pytest.raises(ValueError, match=message):
        _ = open_source(f"pairs:{tmp_path}/photos,{tmp_path}/masks").mask_names


def test_depth_has_a_unit_unknown_values_and_a_range(tmp_path):
    photo(tmp_path / "photos" / "1.jpg")
    save(tmp_path / "maps" / "1.png", np.array([[0, 1, 1234], [65535, 65534, 5000]], np.uint16))
    text = f"pairs:{tmp_path}/photos,{tmp_path}/maps?depth=0.001"
    source = open_source(f"{text}&invalid=0,65535&range=0.1,10")
    depth = source[0]["depth"]
    assert depth.dtype == np.float32 and "mask" not in source[0]
    assert (depth == np.float32([[0, 0.001, 1.234], [0, 65.534, 5]])).all()
    assert source.depth_range == (0.1, 10.0) and source.mask_names == ()
    plain = open_source(text)
    assert plain.depth_range is None and plain[0]["depth"][1, 0] == np.float32(65.535)
    assert plain[0]["depth"][0, 0] == 0 and plain.fingerprint != source.fingerprint
    assert open_source(f"{text}&range=0.1,10#[:1]").depth_range == (0.1, 10.0)


def test_floating_point_metres(tmp_path):
    photo(tmp_path / "photos" / "1.jpg", (1, 4))
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.array([[1.5, np.nan, np.inf, -1]], np.float32)).save(tmp_path / "maps" / "1.tif")
    source = open_source(f"pairs:{tmp_path}/photos,{tmp_path}/maps?depth=1&invalid=-1")
    assert source[0]["depth"].tolist() == [[1.5, 0, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("void=11", "has no option void; there are ignore, classes, names, depth, invalid, range"),
        ("ignore=x", "ignore= is a number, or several with commas between, got 'x'"),
        ("ignore=1.5", "ignore= is one or more whole numbers"),
        ("classes=0", "classes= is a whole number from 1 to 255, got '0'"),
        ("classes=2&names=a", "leave .classes= out"),
        ("names=/no/where", "is no file; it has one name a line"),
        ("depth=0", "depth= is how many metres 1 is"),
        ("depth=0.001&ignore=0", "says that the maps are depth, .ignore= is for masks"),
        ("range=0,1", "range= is for depth: say by .depth=0.001"),
        ("depth=1&range=5,1", "range= is the nearest and farthest metres"),
        ("depth=1&range=5", "range= is the nearest and farthest metres"),
        ("depth=nan", "depth= is a number"),
    ],
)
def test_options_that_make_no_sense(camvid, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(f"{camvid}?{options}")
