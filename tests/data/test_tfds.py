"""tfds: datasets that TFDS prepared, here by a tiny builder of its own, without TensorFlow."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from regvit_jax.data import eval_split, open_source

NAMES = ("cat", "dog", "emu")


def encoded(value, size=(6, 4), mode="RGB", form="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 0)).save(buffer, form)
    return buffer.getvalue()


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Pictures of three animals; the one at 2 is grey and the one at 3 CMYK, whatever the features say."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="rich")]
    MODES = ("RGB", "RGB", "L", "CMYK")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
            "file_name": tfds.features.Text(),
        }
        if self.builder_config.name == "rich":
            features |= {
                "coarse": tfds.features.ClassLabel(names=["beast", "bird"]),
                "segmentation": tfds.features.Image(shape=(None, None, 1)),
                "depth": tfds.features.Tensor(shape=(None, None), dtype=np.uint16, encoding="zlib"),
                "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()}),
                "caption": tfds.features.Text(),
            }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples(4), "train": self._generate_examples(10)}

    def _generate_examples(self, n):
        for i in range(n):
            mode = self.MODES[i] if i < 4 else "RGB"
            image = encoded((i, 0, 0, 0) if mode == "CMYK" else i, mode=mode)
            example = {"image": io.BytesIO(image), "label": NAMES[i % 3], "file_name": f"{i}.jpg"}
            if self.builder_config.name == "rich":
                example |= {
                    "coarse": i % 2,
                    "segmentation": io.BytesIO(encoded(i, mode="L", form="PNG")),
                    "depth": np.full((4, 6), 1000 * i, np.uint16),
                    "objects": [{"bbox": tfds.features.BBox(ymin=0.0, xmin=0.5, ymax=0.5, xmax=1.0)}] * (i % 3),
                    "caption": f"animal {i} é",
                }
            yield i, example


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for config in ("plain", "rich"):
        Tiny(config=config, data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def test_pictures_labels_and_names(data_dir):
    source = open_source(f"tfds:tiny/plain:1.0.0@{data_dir}")
    assert source.splits == ("train", "test") and source.class_names == NAMES and len(source) == 10
    for i in range(10):
        sample = source[i]
        assert sample.keys() == {"image", "label"} and sample["label"] == i % 3
        # As it was stored: grey and CMYK are for our own decoder.
        assert Image.open(io.BytesIO(sample["image"])).mode == (Tiny.MODES[i] if i < 4 else "RGB")
    assert source[1]["image"] == encoded(1) and source[-1] == source[9]
    assert source.name(3) == "3.jpg (tiny/plain/1.0.0#train[3])"
    with pytest.raises(IndexError, match="sample 10 of 10"):
        source[10]


def test_splits_and_slices(data_dir):
    text = f"tfds:tiny/plain@{data_dir}"
    assert eval_split(text) == f"{text}#test" and len(open_source(f"{text}#test")) == 4
    part = open_source(f"{text}#train[2:5]")
    assert [part[i]["label"] for i in range(3)] == [2, 0, 1]
    with pytest.raises(ValueError, match="has no split 'val': it has train, test"):
        open_source(f"{text}#val")


def test_other_features_by_their_types(data_dir):
    source = open_source(f"tfds:tiny/rich@{data_dir}")
    sample = source[5]
    assert sample["label"] == 2 and sample["caption"] == "animal 5 é"
    assert np.asarray(Image.open(io.BytesIO(sample["mask"]))).tolist() == [[5] * 6] * 4
    assert sample["depth"].shape == (4, 6) and (sample["depth"] == 5000).all()
    # ymin xmin ymax xmax in parts of 4 x 6 pixels.
    np.testing.assert_array_equal(sample["boxes"], [[3, 0, 6, 2]] * 2)
    assert source[3]["boxes"].shape == (0, 4)


def test_features_are_chosen_by_options(data_dir):
    text = f"tfds:tiny/rich@{data_dir}"
    coarse = open_source(f"{text}?label=coarse")
    assert coarse.class_names == ("beast", "bird") and coarse[5]["label"] == 1
    assert coarse.fingerprint != open_source(text).fingerprint
    with pytest.raises(ValueError, match=r"has no ClassLabel 'fine' for \?label=: its features are .*coarse \(ClassL"):
        open_source(f"{text}?label=fine")
    with pytest.raises(ValueError, match="has no picture 'depth'"):
        open_source(f"{text}?image=depth")
    with pytest.raises(ValueError, match="has no option labels; there are image, label"):
        open_source(f"{text}?labels=fine")


def test_the_folder_of_a_builder_is_enough(data_dir):
    """Its class is never asked: TFDS knows no builder of this name."""
    folder = data_dir / "tiny" / "plain" / "1.0.0"
    text = f"tfds:@{folder}"
    program = f"""
import pickle, sys
from regvit_jax.data import open_source
source = open_source({text!r})
source = pickle.loads(pickle.dumps(source))
print(len(source), source[4]["label"], source.class_names, source.fingerprint)
print([name for name in ("tensorflow", "jax", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"10 1 {NAMES} {open_source(text).fingerprint}", "[]"]
    assert open_source(text).fingerprint == open_source(f"tfds:tiny/plain@{data_dir}").fingerprint
    assert open_source(text).fingerprint != open_source(f"{text}#test").fingerprint


def test_a_pickled_source_holds_no_records(data_dir):
    source = open_source(f"tfds:tiny/plain@{data_dir}")
    source[0]
    assert len(pickle.dumps(source)) < 1000
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_the_newest_version_is_taken(data_dir, tmp_path):
    for version in ("1.9.0", "1.10.0"):
        shutil.copytree(data_dir / "tiny" / "plain" / "1.0.0", tmp_path / "tiny" / version)
        info = tmp_path / "tiny" / version / "dataset_info.json"
        info.write_text(info.read_text().replace('"1.0.0"', f'"{version}"'))
    assert open_source(f"tfds:tiny@{tmp_path}").title.endswith("1.10.0")
    assert open_source(f"tfds:tiny:1.9.0@{tmp_path}").title.endswith("1.9.0")
    with pytest.raises(FileNotFoundError, match="no prepared version 2.0.0: it holds 1.10.0, 1.9.0"):
        open_source(f"tfds:tiny:2.0.0@{tmp_path}")


def test_the_default_folder_is_that_of_tfds(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(open_source("tfds:tiny/plain")) == 10


def test_what_is_not_there_is_said_with_what_is(data_dir, tmp_path):
    for text, message in (
        ("tfds:", "needs a name or a folder"),
        (f"tfds:ti ny@{data_dir}", "write tfds:NAME@DIR"),
        (f"tfds:tiny@{tmp_path}/none", "is no folder here"),
        ("tfds:tiny@gs://bucket/data", "mount the bucket"),
        (f"tfds:mnist@{data_dir}", r"holds no dataset 'mnist': it holds .*tiny"),
        (f"tfds:tiny@{data_dir}", "the configurations plain, rich: choose one, as tfds:tiny/plain@"),
        (f"tfds:tiny/poor@{data_dir}", "no configuration 'poor': it holds plain, rich"),
        (f"tfds:@{data_dir}/tiny", "is no prepared dataset, it has no dataset_info.json: it holds plain, rich"),
        (f"tfds:tiny@{data_dir}/tiny/plain/1.0.0", "is itself a prepared dataset: write tfds:@"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(text)


@pytest.fixture
def copy(data_dir, tmp_path):
    return shutil.copytree(data_dir / "tiny" / "plain" / "1.0.0", tmp_path / "copy")


@pytest.mark.parametrize("form", ["tfrecord", "parquet", None])
def test_other_formats_are_refused_with_the_remedy(copy, form):
    info = json.loads((copy / "dataset_info.json").read_text())
    info["fileFormat"] = form
    (copy / "dataset_info.json").write_text(json.dumps({key: value for key, value in info.items() if value}))
    with pytest.raises(ValueError, match=f"is prepared as {form or 'tfrecord'}, .* --file_format=array_record"):
        open_source(f"tfds:@{copy}")


def test_a_missing_shard_is_named(copy):
    shard = next(copy.glob("tiny-test*"))
    shard.unlink()
    assert len(open_source(f"tfds:@{copy}")) == 10
    with pytest.raises(FileNotFoundError, match=f"1 of 1 files of the split 'test' are not there.*{shard.name}"):
        open_source(f"tfds:@{copy}#test")


def test_a_damaged_record_is_an_error_that_the_loader_replaces(copy):
    shard = next(copy.glob("tiny-train*"))
    source = open_source(f"tfds:@{copy}")
    damaged = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(damaged, np.uint8))  # shards are padded with zeros
    damaged[used[len(used) // 3]] ^= 1
    shard.write_bytes(damaged)
    again = pickle.loads(pickle.dumps(source))
    unreadable = []
    for i in range(10):
        try:
            assert again[i] == source[i]
        except OSError as error:
            unreadable.append((i, str(error)))
    assert 1 <= len(unreadable) < 10 and all(f"record {i} of" in message for i, message in unreadable)
