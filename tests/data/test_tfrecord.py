"""tfrecord: copies that TFDS prepared as TFRecord, and files of Examples, both written here byte by byte, without
TensorFlow."""

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.check import check
from regvit_jax.data.sources import crc32c, kept_index

NAMES = ("cat", "dog", "emu")


def reference_crc(data):
    """Bit by bit."""
    register = 0xFFFFFFFF
    for value in data:
        register ^= value
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def checked(data):
    crc = reference_crc(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def records(contents):
    parts = []
    for content in contents:
        length = struct.pack("<Q", len(content))
        parts += [length, checked(length), content, checked(content)]
    return b"".join(parts)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features):
    """tf.train.Example of bytes and ints; "/" in a key is written "__"."""
    entries = b""
    for key, value in features.items():
        values = field(1, field(1, value)) if isinstance(value, bytes) else field(3, field(1, varint(value)))
        entries += field(1, field(1, key.replace("__", "/").encode()) + field(2, values))
    return field(1, entries)


def picture(value, mode="RGB", form="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), (9 * value, 0, 0) if mode == "RGB" else value).save(buffer, form)
    return buffer.getvalue()


class Zoo(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        one = {
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["head", "tail"]),
            "is_difficult": np.bool_,
        }
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(NAMES)),
            "coarse": tfds.features.ClassLabel(names=["beast", "bird"]),
            "file_name": tfds.features.Text(),
            "segmentation": tfds.features.Image(shape=(None, None, 1)),
            "depth": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
            "objects": tfds.features.Sequence(one),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples(4), "train": self._generate_examples(10)}

    def _generate_examples(self, n):
        box = tfds.features.BBox(ymin=0.0, xmin=0.5, ymax=0.5, xmax=1.0)
        for i in range(n):
            yield (
                i,
                {
                    "image": io.BytesIO(picture(i)),
                    "label": NAMES[i % 3],
                    "coarse": i % 2,
                    "file_name": f"{i}.jpg",
                    "segmentation": io.BytesIO(picture(i, "L", "PNG")),
                    "depth": np.full((4, 6), i / 4, np.float32),
                    "objects": [{"bbox": box, "label": j % 2, "is_difficult": j == 2} for j in range(i % 4)],
                },
            )


def convert(folder):
    """array_record -> TFRecord as TFDS writes it: train in two shards of 6 and 4 records."""
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split, lengths in (("train", [6, 4]), ("validation", [4])):
        source = folder / f"zoo-{split}.array_record-00000-of-00001"
        reader = array_record_module.ArrayRecordReader(str(source))
        contents = [bytes(reader.read([i])[0]) for i in range(reader.num_records())]
        reader.close()
        source.unlink()
        for i, length in enumerate(lengths):
            name = f"zoo-{split}.tfrecord-{i:05d}-of-{len(lengths):05d}"
            (folder / name).write_bytes(records(contents[:length]))
            contents = contents[length:]
        about = next(about for about in info["splits"] if about["name"] == split)
        about["shardLengths"] = [str(length) for length in lengths]
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(as array_record, the same as TFRecord)"""
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Zoo(data_dir=folder / "a").download_and_prepare(file_format="array_record")
    shutil.copytree(folder / "a", folder / "t")
    convert(folder / "t" / "zoo" / "1.0.0")
    return folder / "a" / "zoo" / "1.0.0", folder / "t" / "zoo" / "1.0.0"


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared[1], tmp_path / "1.0.0", ignore=shutil.ignore_patterns(".regvit_index"))


def test_the_check_sum_is_that_of_the_standard():
    # RFC 3720, B.4, and the check value of the catalogues.
    assert crc32c.crc32c(b"123456789") == 0xE3069283
    assert crc32c.crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c.crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(0).bytes(70_000)
    # Around the ends of a block, of 16 blocks and of 256 blocks.
    for size in (0, 1, 3, 4, 5, 255, 256, 257, 4095, 4096, 4097, 65_536, 65_537, 70_000):
        assert crc32c.crc32c(data[:size]) == reference_crc(data[:size]), size
    rows = np.frombuffer(data[:80], np.uint8).reshape(10, 8)
    sums = crc32c.of_rows(rows)
    assert sums.tolist() == [reference_crc(row.tobytes()) for row in rows]
    assert crc32c.masked(sums).astype("<u4").tobytes() == b"".join(checked(row.tobytes()) for row in rows)
    assert crc32c.masked(int(sums[0])) == int(crc32c.masked(sums)[0])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_same_samples_as_array_record(prepared, split):
    expected = open_source(f"tfds:@{prepared[0]}#{split}")
    source = open_source(f"tfrecord:{prepared[1]}#{split}")
    assert len(source) == len(expected) == {"train": 10, "validation": 4}[split]
    assert source.splits == ("train", "validation") and source.class_names == NAMES and source.faults == ()
    assert source.box_names == expected.box_names == ("head", "tail")
    for i in range(len(source)):
        mine, theirs = source[i], expected[i]
        assert mine.keys() == theirs.keys()
        for key in mine:
            np.testing.assert_array_equal(mine[key], theirs[key], err_msg=key)
    sample = source[3]
    assert sample["label"] == 0 and sample["box_labels"].tolist() == [0, 1, 0]
    assert sample["difficult"].tolist() == [False, False, True] and sample["depth"][0, 0] == 0.75
    np.testing.assert_array_equal(sample["boxes"], [[3, 0, 6, 2]] * 3)
    assert sample["image"] == picture(3)


def test_names_slices_and_options(prepared):
    text = f"tfrecord:{prepared[1]}"
    source = open_source(text)
    assert source.name(0) == "0.jpg (zoo-train.tfrecord-00000-of-00002, byte 12)"
    assert source.name(6) == "6.jpg (zoo-train.tfrecord-00001-of-00002, byte 12)"
    assert source.name(-1).startswith("9.jpg (")
    assert eval_split(text) == f"{text}#validation"
    assert [open_source(f"{text}#train[5:8]")[i]["label"] for i in range(3)] == [2, 0, 1]
    coarse = open_source(f"{text}?label=coarse")
    assert coarse.class_names == ("beast", "bird") and coarse[5]["label"] == 1
    assert coarse.fingerprint != source.fingerprint != open_source(f"{text}#validation").fingerprint
    assert open_source(f"tfrecord:zoo@{prepared[1].parents[1]}").fingerprint == source.fingerprint
    with pytest.raises(IndexError, match="sample 10 of 10"):
        source[10]
    for wrong, message in (
        ("#test", "has no split 'test': it has train, validation"),
        ("?classes=3", "has no option classes; there are image, label"),
        ("?label=fine", "has no ClassLabel 'fine'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(text + wrong)


def test_any_thread_and_any_process_reads(prepared):
    source = open_source(f"tfrecord:{prepared[1]}")
    source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: again[i % 10]["image"], range(200)))
    assert read == [picture(i % 10) for i in range(200)]


def test_the_index_is_built_once_and_again_when_a_file_changes(copy, monkeypatch):
    text = f"tfrecord:{copy}"
    source = open_source(text)
    with monkeypatch.context() as patch:
        patch.setattr(kept_index, "build_index", None)
        assert open_source(text).fingerprint == source.fingerprint
    path = copy / "zoo-train.tfrecord-00001-of-00002"
    path.write_bytes(records([picture(0)]) + path.read_bytes())
    changed = open_source(text)
    assert len(changed) == 11 and changed.fingerprint != source.fingerprint
    assert changed.faults == (f"{path} holds 5 records, dataset_info.json says 4: are they of one preparation?",)
    with pytest.raises(ValueError, match="byte 12 is no example of the features in .*features.json"):
        changed[6]


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("REGVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_index.os, "access", lambda path, mode: False)
    source = open_source(f"tfrecord:{copy}")
    assert source.index.samples.startswith(str(tmp_path / "cache" / "tfrecord"))
    assert not (copy / ".regvit_index").exists() and source[9]["image"] == picture(9)


def starts(content):
    found, at = [], 0
    while at < len(content):
        found.append(at)
        at += 16 + struct.unpack_from("<Q", content, at)[0]
    return found


def test_torn_and_damaged_files_name_the_byte_and_keep_what_is_readable(copy, caplog):
    path = copy / "zoo-train.tfrecord-00000-of-00002"
    whole = path.read_bytes()
    at = starts(whole)
    size = at[3] - at[2]
    length = bytearray(whole)
    length[at[2] + 1] ^= 1
    cases = {
        "cut in a content": (whole[: at[2] + 100], 2, f"the record at byte {at[2]} is cut after 100 of {size} bytes"),
        "cut in a check sum": (whole[: at[3] - 1], 2, f"at byte {at[2]} is cut after {size - 1} of {size} bytes"),
        "cut in a head": (whole[: at[2] + 5], 2, f"the record at byte {at[2]} is cut after 5 bytes"),
        "a damaged length": (bytes(length), 2, f"the length of the record at byte {at[2]} is damaged, after 2 records"),
        "another file": (b"<html>not found</html>" * 9, 0, "it is no TFRecord file"),
        "compressed": (zlib.compress(whole), 0, "it is compressed"),
    }
    for case, (content, left, reason) in cases.items():
        path.write_bytes(content)
        caplog.clear()
        source = open_source(f"tfrecord:{copy}")
        assert len(source) == left + 4, case
        assert [source[i]["image"] for i in range(len(source))] == [picture(i) for i in (*range(left), *range(6, 10))]
        assert len(source.faults) == 1 and f"{path} is damaged" in source.faults[0] and reason in source.faults[0], case
        assert source.faults[0].endswith(f"after {left} records of 6") and source.faults[0] in caplog.text
    assert any("it is compressed" in problem for problem in check(f"tfrecord:{copy}#train", picture="")["problems"])
    path.write_bytes(whole[: at[5]])
    assert "holds 5 records, dataset_info.json says 6" in open_source(f"tfrecord:{copy}").faults[0]
    for file in copy.glob("zoo-train*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no record of .*#train can be read: .*holds 0 records"):
        open_source(f"tfrecord:{copy}")


def test_a_damaged_content_is_an_error_that_the_loader_replaces(copy):
    path = copy / "zoo-validation.tfrecord-00000-of-00001"
    content = bytearray(path.read_bytes())
    at = starts(content)
    content[at[2] + 500] ^= 1
    path.write_bytes(content)
    source = open_source(f"tfrecord:{copy}#validation")
    assert len(source) == 4 and source.faults == ()
    assert [source[i]["label"] for i in (0, 1, 3)] == [0, 1, 0]
    with pytest.raises(OSError, match=f"record at byte {at[2]} is damaged, its check sum is wrong"):
        source[2]
    report = check(f"tfrecord:{copy}#validation", picture="")
    assert [name for name, _ in report["splits"]["validation"]["unreadable"]] == [f"{path.name}, byte {at[2] + 12}"]
    with open(path, "r+b") as file:
        file.truncate(at[3] + 20)
    with pytest.raises(OSError, match="bytes too early"):
        source[3]


def test_what_is_not_there_or_another_format(copy, prepared, tmp_path):
    (copy / "zoo-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 files of the split 'train' are not there.*00001-of-00002"):
        open_source(f"tfrecord:{copy}")
    with pytest.raises(ValueError, match="prepared as array_record, not as tfrecord: write tfds:@"):
        open_source(f"tfrecord:{prepared[0]}")
    with pytest.raises(ValueError, match=f"Read it as it is by tfrecord:@{prepared[1]}"):
        open_source(f"tfds:@{prepared[1]}")
    with pytest.raises(FileNotFoundError, match="no dataset 'mnist'"):
        open_source(f"tfrecord:mnist@{prepared[1].parents[1]}")
    with pytest.raises(FileNotFoundError, match=f"is above prepared datasets: write tfrecord:{prepared[1]}"):
        open_source(f"tfrecord:{prepared[1].parents[1]}")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        FileNotFoundError, match="it holds nothing. Expected the folder of a dataset that TFDS prepared"
    ):
        open_source(f"tfrecord:{tmp_path}/other")
    with pytest.raises(FileNotFoundError, match=r"train-00001 is not there\. Expected"):
        open_source(f"tfrecord:{tmp_path}/train-0000{{1..1}}")


def test_without_its_features_a_copy_is_read_as_examples(copy):
    (copy / "features.json").unlink()
    with pytest.raises(
        ValueError, match=r"cannot be opened.*by (tfrecord:.*tfrecord\*\?image=image&label=label)&classes=N"
    ):
        open_source(f"tfrecord:{copy}")
    source = open_source(f"tfrecord:{copy}/*.tfrecord*?image=image&label=label&classes=3#validation")
    assert [source[i] for i in range(4)] == [{"image": picture(i), "label": i % 3} for i in range(4)]


# Files of Examples


@pytest.fixture
def slim(tmp_path):
    """As TF-Slim writes ImageNet: no ending, labels from 1."""
    for split, shards in (("train", 3), ("validation", 1)):
        for shard in range(shards):
            numbers = range(4 * shard, 4 * shard + 4)
            made = [
                example(
                    image__encoded=picture(i),
                    image__class__label=1 + i % 3,
                    image__filename=b"n%d.JPEG" % i,
                    image__height=4,
                )
                for i in numbers
            ]
            (tmp_path / f"{split}-{shard:05d}-of-{shards:05d}").write_bytes(records(made))
    return tmp_path


def test_examples_by_their_usual_keys(slim):
    source = open_source(f"tfrecord:{slim}?classes=3&first=1")
    assert len(source) == 12 and source.splits == ("train", "validation") and source.num_classes == 3
    for i in range(12):
        assert source[i] == {"image": picture(i), "label": i % 3}
        assert source.name(i).startswith(f"n{i}.JPEG (train-{i // 4:05d}-of-00003, byte ")
    assert len(open_source(f"tfrecord:{slim}#validation")) == 4
    assert pickle.loads(pickle.dumps(source))[-1] == source[11]
    part = open_source(f"tfrecord:{slim}/train-0000{{0..1}}-of-00003?classes=3&first=1")
    assert len(part) == 8 and part[7] == source[7]
    assert part.faults == (f"2 of 3 files such as {slim}/train-00000-of-00003 are there: copy the others",)
    (slim / "classes.txt").write_text("background\ncat\ndog\nemu\n")
    named = open_source(f"tfrecord:{slim}")
    assert named.class_names[named[4]["label"]] == "dog" and named.fingerprint != source.fingerprint


def test_labels_that_do_not_fit_are_told(slim, caplog):
    unknown = open_source(f"tfrecord:{slim}")
    assert unknown.num_classes == 0 and unknown[0]["label"] == -1
    assert "has labels (image/class/label), and nothing says of how many classes" in caplog.text
    source = open_source(f"tfrecord:{slim}?classes=3")
    assert source[0]["label"] == 1
    with pytest.raises(ValueError, match=r"n2.JPEG .* has the label 3, of 3 classes from 0: .*first= \(1 where"):
        source[2]


def test_other_keys_are_named(tmp_path):
    made = example(picture=picture(5), target=2, caption=b"a \xc3\xa9mu", label=b"text")
    (tmp_path / "data.tfrecord").write_bytes(records([made, example(target=1), b"\xff\xff"]))
    with pytest.raises(
        ValueError, match=r"no feature image/encoded or image or jpg.*\?image=KEY: it has caption \(1 b"
    ):
        open_source(f"tfrecord:{tmp_path}")
    with pytest.raises(ValueError, match="no feature label with one integer"):
        open_source(f"tfrecord:{tmp_path}?image=picture&label=label")
    source = open_source(f"tfrecord:{tmp_path}?image=picture&label=target&classes=3")
    assert source[0] == {"image": picture(5), "label": 2, "caption": "a ému"}
    for index, message in ((1, "byte .*has not one value of 'picture'"), (2, "is no tf.train.Example")):
        with pytest.raises(OSError, match=message):
            source[index]
    for options, message in (
        ("classes=many", "number of classes, got 'many'"),
        ("first=one", "number of the first class, got 'one'"),
        ("split=1", "has no option split"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"tfrecord:{tmp_path}?image=picture&{options}")
    assert os.listdir(tmp_path / ".regvit_index")
