"""regvit data prepare: what is written reads back through tfds:, goes on after any kill, refuses what it must."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.decode import decode
from regvit_jax.data.loader import train_batches
from regvit_jax.data.prepare import Unfinished, prepare
from regvit_jax.data.transforms import TrainTransform, resize_short

SIZE = 16


def write_image(path, seed, size=(40, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    """Two splits, three classes, photos of 40 x 24 pixels."""
    for split, count in (("train", 4), ("val", 2)):
        for label in ("ape", "bee", "cow"):
            for number in range(count):
                write_image(tmp_path / "photos" / split / label / f"{number}.jpg", 10 * number + ord(label[0]))
    return f"folder:{tmp_path / 'photos'}"


def pixels(sample):
    return decode(sample["image"])


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_what_is_prepared_reads_back_in_order(photos, tmp_path, form):
    made = tmp_path / "made"
    report = prepare(photos, str(made), size=SIZE, format=form, shards=3, workers=0)
    assert report["images"] == {"train": 12, "val": 6} and report["left_out"] == []
    text = f"tfds:@{made}"
    for split in ("train", "val"):
        before, after = open_source(f"{photos}#{split}"), open_source(f"{text}#{split}")
        assert len(after) == len(before) and after.class_names == ("ape", "bee", "cow")
        for i in range(len(before)):
            assert after[i]["label"] == before[i]["label"] and after.name(i).startswith(before.name(i))
            expected = resize_short(pixels(before[i]), SIZE).astype(int)
            found = pixels(after[i])
            # 40 x 24 at the short side of 16: 26 wide, rounded down.
            assert found.shape == (16, 26, 3)
            # JPEG keeps colour at half the resolution: a few grey levels, as long as nothing has moved.
            assert np.abs(found - expected).mean() <= (0 if form == "raw" else 5)
    assert eval_split(text) == f"{text}#val"
    assert len(list(made.glob("*-train.array_record*"))) == 3 and len(list(made.glob("*.array_record*.json"))) == 0
    assert isinstance(open_source(text)[0]["image"], np.ndarray if form == "raw" else bytes)


def test_prepared_images_train(photos, tmp_path):
    prepare(photos, str(tmp_path / "made"), size=SIZE, format="raw", workers=0)
    source = open_source(f"tfds:@{tmp_path / 'made'}#train")
    batch = next(train_batches(source, TrainTransform(8), seed=0, batch_size=4, start_step=0, stop_step=1))
    assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert set(batch["label"]) <= {0, 1, 2}


def test_a_small_jpeg_stays_as_it_is(tmp_path):
    write_image(tmp_path / "photos" / "a.jpg", 1, (12, 10), quality=30)
    write_image(tmp_path / "photos" / "b.png", 2, (12, 10))
    prepare(f"folder:{tmp_path / 'photos'}", str(tmp_path / "made"), size=SIZE, workers=0)
    source = open_source(f"tfds:@{tmp_path / 'made'}")
    assert source[0] == {"image": (tmp_path / "photos" / "a.jpg").read_bytes(), "label": -1}
    assert Image.open(io.BytesIO(source[1]["image"])).format == "JPEG"
    assert pixels(source[1]).shape == (10, 12, 3) and source.num_classes == 0


def test_captions_and_class_names_that_are_no_lines(tmp_path, caplog):
    """scenes: has captions, and what is not written is named; class names that TFDS could not keep (empty, twice, of
    two lines) are made so that it can."""
    options = dict(splits=("test",), size=SIZE, workers=0)
    for _ in range(2):  # The second time all is there already.
        report = prepare("scenes:?size=16&n=8&n_test=2", str(tmp_path / "scenes"), **options)
        assert report["not_written"] == ["box_labels", "boxes", "depth", "mask"]
    assert caplog.text.count("not in the new dataset: box_labels, boxes, depth, mask") == 2
    source, scenes = open_source(f"tfds:@{tmp_path / 'scenes'}"), open_source("scenes:?size=16&n=8&n_test=2#test")
    assert source.splits == ("test",) and source[1]["caption"] == scenes[1]["caption"]
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    encoded = np.frombuffer(image.getvalue(), np.uint8)
    arrays = dict(train_jpeg=np.tile(encoded, 4), train_offsets=len(encoded) * np.arange(5), train_labels=[0, 1, 2, 3])
    np.savez(tmp_path / "a.npz", classes=["", "crane", "two\nlines", "crane"], **arrays)
    prepare(f"npz:{tmp_path}/a.npz", str(tmp_path / "made"), workers=0)
    made = open_source(f"tfds:@{tmp_path / 'made'}")
    assert made.class_names == ("0", "crane [1]", "two lines", "crane [3]")
    assert [made[i]["label"] for i in range(4)] == [0, 1, 2, 3]


def test_a_part_of_a_source_and_chosen_splits(photos, tmp_path):
    prepare(f"{photos}#train[:50%]", str(tmp_path / "half"), size=SIZE, workers=0)
    assert open_source(f"tfds:@{tmp_path / 'half'}").splits == ("train",)
    assert len(open_source(f"tfds:@{tmp_path / 'half'}")) == 6
    for source, options, message in (
        (photos, {"splits": ("test",)}, "has no split test: it has train, val"),
        (f"{photos}#val", {"splits": ("val",)}, "names a part already"),
        (photos, {"format": "png"}, "format is one of jpeg, raw"),
        (photos, {"max_bad": 2.0}, "max_bad a share from 0 to 1"),
        (photos, {"quality": 0}, "quality is 1 to 100"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(source, str(tmp_path / "new"), workers=0, **options)
    assert not (tmp_path / "new").exists()


def test_unreadable_files_are_left_out_named_and_counted(photos, tmp_path):
    train = tmp_path / "photos" / "train"
    (train / "ape" / "0.jpg").write_bytes(b"")
    (train / "bee" / "1.jpg").write_bytes((train / "bee" / "1.jpg").read_bytes()[:200])
    report = prepare(photos, str(tmp_path / "made"), size=SIZE, shards=3, workers=0, max_bad=0.2)
    assert report["images"] == {"train": 10, "val": 6}
    assert sorted(row[:2] for row in report["left_out"]) == [["train", "ape/0.jpg"], ["train", "bee/1.jpg"]]
    assert json.loads((tmp_path / "made" / "report.json").read_text()) == report
    source = open_source(f"tfds:@{tmp_path / 'made'}")
    names = [source.name(i).split(" ")[0] for i in range(10)]
    before = open_source(photos)
    left = [before.name(i) for i in range(12) if before.name(i) not in ("ape/0.jpg", "bee/1.jpg")]
    assert names == left


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_files_stop_it(photos, tmp_path, workers):
    for label in ("ape", "bee"):
        (tmp_path / "photos" / "train" / label / "0.jpg").write_bytes(b"nothing")
    made = str(tmp_path / "made")
    with pytest.raises(Unfinished, match=r"of 18 images cannot be read so far, .* allow more by --max_bad"):
        prepare(photos, made, size=SIZE, shards=3, workers=workers, max_bad=0.05, command="regvit data prepare …")
    assert json.loads((tmp_path / "made" / "report.json").read_text())["left_out"]
    with pytest.raises(FileNotFoundError, match="is unfinished: run the same command again, regvit data prepare …"):
        open_source(f"tfds:@{made}")
    assert prepare(photos, made, size=SIZE, shards=3, workers=0, max_bad=0.2)["images"] == {"train": 10, "val": 6}


def test_a_split_without_one_readable_image_is_never_finished(photos, tmp_path):
    for path in (tmp_path / "photos" / "val").rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(Unfinished, match="no image of the split val can be read"):
        prepare(photos, str(tmp_path / "made"), size=SIZE, workers=0, max_bad=1.0)


def test_a_shard_of_unreadable_files_only(photos, tmp_path):
    source = open_source(photos)
    for i in (4, 5, 6, 7):
        (tmp_path / "photos" / "train" / source.name(i)).write_bytes(b"nothing")
    prepare(photos, str(tmp_path / "made"), size=SIZE, shards=3, workers=0, max_bad=1.0)
    made = open_source(f"tfds:@{tmp_path / 'made'}")
    assert len(made) == 8 and made.name(4).startswith(source.name(8))
    assert [made[i]["label"] for i in range(8)] == [source[i]["label"] for i in (0, 1, 2, 3, 8, 9, 10, 11)]


def test_a_folder_with_something_else_is_refused(photos, tmp_path):
    made = str(tmp_path / "made")
    prepare(photos, made, size=SIZE, workers=0)
    # The same again is done at once, whatever the number of workers.
    assert prepare(photos, made, size=SIZE, workers=2)["images"] == {"train": 12, "val": 6}
    with pytest.raises(ValueError, match="holds another dataset.*: size is 16 there and 8 now. Choose another"):
        prepare(photos, made, size=8, workers=0)
    write_image(tmp_path / "photos" / "val" / "ape" / "new.jpg", 5)
    with pytest.raises(ValueError, match="samples of val is 6 there and 7 now"):
        prepare(photos, made, size=SIZE, workers=0)
    with pytest.raises(ValueError, match=r"holds other files \(made, photos\)"):
        prepare(photos, str(tmp_path), size=SIZE, workers=0)


def test_two_preparations_are_told_apart(photos, tmp_path):
    """Shards of the same sizes, pixels of two kinds."""
    for size in (15, SIZE):
        prepare(f"{photos}#train[:2]", str(tmp_path / str(size)), size=size, format="raw", workers=0)
    assert len({open_source(f"tfds:@{tmp_path / str(size)}").fingerprint for size in (15, SIZE)}) == 2


def contents(folder):
    source = open_source(f"tfds:@{folder}")
    return [(source.name(i), source[i]) for i in range(len(source))]


def test_killed_at_any_time_it_goes_on(tmp_path):
    for number in range(120):
        write_image(tmp_path / "photos" / "ab"[number % 2] / f"{number}.jpg", number, (300, 200))
    made = tmp_path / "made"
    source = f"folder:{tmp_path / 'photos'}"
    options = ["--size=100", "--shards=24", "--workers=2"]
    command = [sys.executable, "-m", "regvit_jax.cli", "data", "prepare", source, str(made), *options]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(made.glob("*.array_record-*-of-00024"))) < 3:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    with pytest.raises(
        FileNotFoundError, match="is unfinished: run the same command again, regvit data prepare folder:"
    ):
        open_source(f"tfds:@{made}")
    kept = {path: path.stat().st_ino for path in made.glob("*.array_record-*-of-00024")}
    (made / ".made-train.array_record-00020-of-00024.1.unfinished").write_bytes(b"half")
    # In the test's own process, where a kill would be seen: what was finished is not written again.
    prepare(source, str(made), size=100, shards=24, workers=0)
    assert 3 <= len(kept) < 24 and all(path.stat().st_ino == inode for path, inode in kept.items())
    assert not list(made.glob(".*unfinished"))
    prepare(source, str(tmp_path / "whole" / "made"), size=100, shards=24, workers=0)
    assert contents(made) == contents(tmp_path / "whole" / "made")


def test_a_worker_that_is_killed_ends_it_with_a_message(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("regvit_jax.data.prepare_workers._start", _dies)
    with pytest.raises(Unfinished, match="a worker process died .* finished shards are kept"):
        prepare(photos, str(tmp_path / "made"), size=SIZE, workers=1)


def _dies(*_):
    os._exit(9)


def test_a_disk_that_is_full_is_said(photos, tmp_path, monkeypatch):
    made = str(tmp_path / "made")
    with monkeypatch.context() as patch:
        patch.setattr("regvit_jax.data.prepare_shard.replace", _full_after_the_plan)
        with pytest.raises(Unfinished, match="a shard cannot be written, .* No space left on device"):
            prepare(photos, made, size=SIZE, workers=0)
    assert prepare(photos, made, size=SIZE, workers=0)["images"] == {"train": 12, "val": 6}


def _full_after_the_plan(path, text):
    if "array_record" in path.name:
        raise OSError(28, "No space left on device")
    path.write_text(text)
