"""ade20k: the layout of ADEChallengeData2016, written by hand; what does not fit it; TFDS's copy is refused."""

import io
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from regvit_jax.data import eval_split, holdout, open_source
from regvit_jax.data.decode import DecodeError
from regvit_jax.data.loader import eval_batches
from regvit_jax.data.sources import IGNORE, require_dense
from regvit_jax.data.transforms import EvalTransform, Preprocess


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def pair(root, split, name, mask):
    """`split` is train or val, or empty for no split folders."""
    mask = np.asarray(mask)
    below = {"train": "training/", "val": "validation/", "": ""}[split]
    save(root / f"images/{below}{name}.jpg", np.zeros((*mask.shape, 3), np.uint8))
    save(root / f"annotations/{below}{name}.png", mask)


@pytest.fixture
def root(tmp_path):
    place = tmp_path / "ADEChallengeData2016"
    for number in (2, 1, 3):
        pair(place, "train", f"ADE_train_{number:08}", np.array([[0, 1, 150], [number, 12, 0]], np.uint8))
    pair(place, "val", "ADE_val_00000001", np.full((4, 5), 7, np.uint8))
    return place


def table(separator, between):
    rows = [separator.join(["Idx", "Ratio", "Train", "Val", "Name"])]
    rows += [separator.join([str(n), "0.1", "10", "1", f"thing {n}{between}object"]) for n in range(1, 151)]
    return "\n".join(rows) + "\n"


def test_zero_is_ignored_and_classes_begin_at_zero(root):
    source = open_source(f"ade20k:{root}")
    assert source.splits == ("train", "val") and len(source) == 3
    assert [source.name(i) for i in range(3)] == [f"ADE_train_{n:08}.jpg" for n in (1, 2, 3)]
    sample = source[1]
    assert sample["mask"].dtype == np.uint8
    assert sample["mask"].tolist() == [[IGNORE, 0, 149], [1, 11, IGNORE]]
    assert sample["label"] == -1 and source.labels.tolist() == [-1] * 3 and source.num_classes == 0
    assert sample["image"] == str(root / "images/training/ADE_train_00000002.jpg")
    with pytest.raises(IndexError, match="sample 3 of 3"):
        source[3]


def test_splits_have_two_names(root):
    text = f"ade20k:{root}"
    for split in ("val", "validation"):
        assert open_source(f"{text}#{split}")[0]["mask"].tolist() == [[6] * 5] * 4
        assert eval_split(f"{text}#{split}") is None  # it is the same one
    assert eval_split(text) == eval_split(f"{text}#training[:2]") == f"{text}#val"
    assert open_source(f"{text}#training").fingerprint == open_source(text).fingerprint
    with pytest.raises(ValueError, match="has no split 'test': it has train, val"):
        open_source(f"{text}#test")
    assert len(open_source(f"ade20k:{root.parent}")) == 3  # the folder that it was unpacked into


def test_names_come_from_the_table(root):
    text = f"ade20k:{root}"
    assert open_source(text).mask_names[::149] == ("class 1", "class 150")
    (root / "objectInfo150.csv").write_text(table(",", ";"))
    assert open_source(text).mask_names[::149] == ("thing 1 object", "thing 150 object")
    (root / "objectInfo150.txt").write_text(table("\t", ", "))
    names = open_source(text).mask_names
    assert len(names) == 150 and names[::149] == ("thing 1", "thing 150")
    part = open_source(f"{holdout(text)[0]}")
    assert part.mask_names == names and part.depth_range is None
    (root / "objectInfo150.txt").write_text("\n".join(table("\t", ", ").splitlines()[:100]))
    with pytest.raises(ValueError, match="objectInfo150.txt: expected .* 1 to 150, .*found 99 such lines"):
        open_source(text)


def test_one_split_only_and_a_part_without_split_folders(tmp_path):
    pair(tmp_path / "one", "val", "a", np.ones((2, 2), np.uint8))
    assert open_source(f"ade20k:{tmp_path}/one").splits == ("val",)
    pair(tmp_path / "flat", "", "a", np.ones((2, 2), np.uint8))
    source = open_source(f"ade20k:{tmp_path}/flat")
    assert source.splits == () and source[0]["mask"].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="has no split 'val': .* no folder training/ or validation/"):
        open_source(f"ade20k:{tmp_path}/flat#val")


def test_images_and_masks_come_in_pairs(root):
    (root / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 images have no map \(ADE_train_00000002.jpg\). .* Expected images/training"
    ):
        open_source(f"ade20k:{root}")
    (root / "images/training/ADE_train_00000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"and 1 maps have no image \(ADE_train_00000001.png\)"):
        open_source(f"ade20k:{root}")
    assert len(open_source(f"ade20k:{root}#val")) == 1


def test_other_layouts_are_told_what_is_expected(tmp_path, root):
    layout = "Expected images/training/NAME.jpg with annotations/training/NAME.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "images" / "training").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"ade20k:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match=f"has no folder images/: it holds nothing. Download .*{layout}"):
        open_source(f"ade20k:{tmp_path}/empty")
    with pytest.raises(FileNotFoundError, match="has no folder annotations/: it holds images"):
        open_source(f"ade20k:{tmp_path}/half")
    (tmp_path / "half" / "annotations").mkdir()
    with pytest.raises(FileNotFoundError, match=f"annotations/training is no folder, .*images/training is. {layout}"):
        open_source(f"ade20k:{tmp_path}/half")
    with pytest.raises(ValueError, match="takes no options, got size"):
        open_source(f"ade20k:{root}?size=3")


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (np.full((2, 3), 151, np.uint8), ValueError, "has the value 151: not of the annotation of 150 classes"),
        (np.full((2, 3), 256, np.uint16), ValueError, "has the value 256"),
        (np.zeros((3, 2), np.uint8), ValueError, "has 2 x 3 pixels, its image .*00000001.jpg 3 x 2: they must agree"),
        (np.zeros((2, 3, 3), np.uint8), DecodeError, "has one channel, this has shape"),
    ],
)
def test_a_mask_of_another_dataset_is_named(root, mask, kind, message):
    save(root / "annotations/training/ADE_train_00000001.png", mask)
    with pytest.raises(kind, match=rf"ADE_train_00000001.png.*{message}.*Expected images/training") as raised:
        open_source(f"ade20k:{root}")[0]
    # What cannot be decoded is replaced by the loader; what is of another dataset is not.
    assert isinstance(raised.value, DecodeError) == (kind is DecodeError)


def test_a_torn_mask_is_unreadable_as_a_torn_image_is(root):
    (root / "annotations/training/ADE_train_00000001.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(DecodeError, match="ADE_train_00000001.png: not a readable image"):
        open_source(f"ade20k:{root}")[0]


def test_a_mask_may_be_as_its_turned_image_is(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "images/training/ADE_train_00000001.jpg", np.zeros((3, 2, 3), np.uint8), exif=exif)
    assert open_source(f"ade20k:{root}")[0]["mask"].shape == (2, 3)


def test_batches_keep_what_is_ignored(root):
    spec = Preprocess(size=2, crop_ratio=1.0)
    batch = next(iter(eval_batches(open_source(f"ade20k:{root}"), EvalTransform(spec), batch_size=3)))
    # The centre two of three columns: (3 - 2) / 2 is rounded to the left one.
    assert batch["mask"].tolist() == [[[IGNORE, 0], [n - 1, 11]] for n in (1, 2, 3)]


def test_the_fingerprint_follows_masks_and_not_the_place(root, tmp_path):
    before = open_source(f"ade20k:{root}").fingerprint
    root = root.rename(tmp_path / "elsewhere")
    assert open_source(f"ade20k:{root}").fingerprint == before
    assert pickle.loads(pickle.dumps(open_source(f"ade20k:{root}"))).fingerprint == before
    save(root / "annotations/training/ADE_train_00000001.png", np.eye(40, dtype=np.uint8))
    assert open_source(f"ade20k:{root}").fingerprint != before


class SceneParse150(tfds.core.GeneratorBasedBuilder):
    """Has the name of TFDS's dataset; the fields are like its own, the name is what counts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {name: tfds.features.Image(shape=(None, None, 3)) for name in ("image", "annotation")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for number in range(4):
            file = io.BytesIO()
            Image.new("RGB", (4, 4)).save(file, "PNG")
            yield number, {"image": io.BytesIO(file.getvalue()), "annotation": io.BytesIO(file.getvalue())}


def test_the_copy_of_tfds_is_refused_for_masks_only(tmp_path, root):
    tfds.disable_progress_bar()
    SceneParse150(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    text = f"tfds:scene_parse150@{tmp_path}"
    assert len(open_source(text)) == 4 and "image" in open_source(text)[0]
    for part in (text, f"{text}#test[:2]", holdout(text)[1]):
        with pytest.raises(ValueError, match=r"scene_parse150.*instance annotations.*ade20k:"):
            require_dense(open_source(part), part)
    require_dense(open_source(f"ade20k:{root}"), f"ade20k:{root}")
