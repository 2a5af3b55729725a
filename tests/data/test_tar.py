"""tar: WebDataset shards, written here by tarfile: what is one sample, where labels come from, what damage leaves."""

import concurrent.futures
import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, open_source
from regvit_jax.data.check import check
from regvit_jax.data.sources import kept_index


def picture(value, form="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), (9 * value, 0, 0) if mode == "RGB" else value).save(buffer, form)
    return buffer.getvalue()


def write(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def labelled(numbers, classes=3):
    return [
        member
        for i in numbers
        for member in (
            (f"{i:06d}.cls", str(i % classes)),
            (f"{i:06d}.jpg", picture(i)),
            (f"{i:06d}.txt", f"no. {i} é\n"),
        )
    ]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 4 samples for training, one of 4 for validation."""
    for shard in range(3):
        write(tmp_path / f"birds-train-{shard:06d}.tar", labelled(range(4 * shard, 4 * shard + 4)))
    write(tmp_path / "birds-val-000000.tar", labelled(range(4), classes=2))
    return tmp_path


def test_images_labels_captions_and_names(shards):
    source = open_source(f"tar:{shards}")
    assert source.splits == ("train", "val") and len(source) == 12 and source.faults == ()
    assert source.class_names == ("0", "1", "2") and source.labels.tolist() == [i % 3 for i in range(12)]
    for i in range(12):
        assert source[i] == {"image": picture(i), "label": i % 3, "caption": f"no. {i} é"}
        assert source.name(i) == f"birds-train-{i // 4:06d}.tar/{i:06d}.jpg"
    assert source[-1] == source[11]
    with pytest.raises(IndexError, match="sample 12 of 12"):
        source[12]
    assert eval_split(f"tar:{shards}") == f"tar:{shards}#val"
    # Its classes are those of training, though it shows two of them.
    assert open_source(f"tar:{shards}#val").class_names == source.class_names
    assert check(f"tar:{shards}#train", picture="")["problems"] == []


def test_masks_depth_and_other_spellings(tmp_path):
    millimetres = np.array([[0, 1500], [65535, 1]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(millimetres).save(buffer, "PNG")
    mask = picture(7, "PNG", "L")
    members = [
        # Not one after the other, in a folder, in capitals; hidden files and those without an ending are no samples.
        ("./a/x.JPG", picture(1)),
        ("./b/x.webp", picture(2, "WEBP")),
        ("._x.jpg", b"junk"),
        ("README", b"text"),
        ("./a/x.seg.png", mask),
        ("./a/x.depth.png", buffer.getvalue()),
        ("./b/x.mask.png", mask),
    ]
    write(tmp_path / "s.tar", members)
    (tmp_path / "classes.txt").write_text("".join(f"thing {i}\n" for i in range(9)))
    source = open_source(f"tar:{tmp_path}/s.tar")
    assert len(source) == 2 and source.splits == () and source.faults == ()
    assert source.class_names == () and len(source.mask_names) == 9 and source.labels.tolist() == [-1, -1]
    first, second = source[0], source[1]
    assert first["image"] == picture(1) and second["image"] == picture(2, "WEBP") and first["label"] == -1
    assert first["mask"].dtype == np.uint8 and first["mask"].tolist() == [[7] * 6] * 4
    assert (second["mask"] == first["mask"]).all() and "depth" not in second
    assert (open_source(f"tar:{tmp_path}?ignore=3,7")[0]["mask"] == 255).all()
    assert first["depth"].dtype == np.float32
    np.testing.assert_allclose(first["depth"], [[0, 1.5], [65.535, 0.001]], rtol=1e-6)
    np.testing.assert_allclose(open_source(f"tar:{tmp_path}?metres=0.0002")[0]["depth"][0], [0, 0.3], rtol=1e-6)
    assert source.name(0) == "s.tar/./a/x.JPG"
    for wrong, message in (
        ("metres=far", "unit of depth maps"),
        ("metres=0", "got '0'"),
        ("ignore=-1", "0,11; got '-1'"),
        ("scale=1", "no option scale"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"tar:{tmp_path}?{wrong}")
    write(tmp_path / "s.tar", [("x.jpg", picture(1)), ("x.depth.png", picture(1, "PNG", "L"))])
    with pytest.raises(ValueError, match="depth map of s.tar/x.jpg holds uint8 values, expected 16 bits"):
        open_source(f"tar:{tmp_path}")[0]
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(buffer, "PNG")
    write(tmp_path / "s.tar", [("x.jpg", picture(1)), ("x.seg.png", buffer.getvalue())])
    with pytest.raises(ValueError, match=r"mask of s.tar/x.jpg has the value 300: .* \?ignore=300"):
        open_source(f"tar:{tmp_path}")[0]


def test_several_pictures_are_a_choice(tmp_path):
    write(
        tmp_path / "s.tar",
        [("1.jpg", picture(1)), ("1.png", picture(2, "PNG", "L")), ("1.left.png", picture(3, "PNG"))],
    )
    with pytest.raises(
        ValueError, match=r"s.tar: the sample 1 has several pictures, jpg, png: .*\?image=jpg.*\?mask=png"
    ):
        open_source(f"tar:{tmp_path}")
    source = open_source(f"tar:{tmp_path}?mask=png")
    sample = source[0]
    assert sample.keys() == {"image", "label", "mask"} and sample["image"] == picture(1) and (sample["mask"] == 2).all()
    left = open_source(f"tar:{tmp_path}?image=left.png")
    assert left[0] == {"image": picture(3, "PNG"), "label": -1}
    assert left.fingerprint != source.fingerprint
    with pytest.raises(
        ValueError, match="no sample is in the 1 shards .*1 samples have no picture: 1.{jpg,png,left.png}"
    ):
        open_source(f"tar:{tmp_path}?image=right.png")


def test_labels_by_number_and_by_name(tmp_path):
    members = [("0.jpg", picture(0)), ("0.cls", " 1\n"), ("1.jpg", picture(1)), ("1.cls", "emu")]
    write(tmp_path / "s.tar", [*members, ("2.jpg", picture(2))])
    source = open_source(f"tar:{tmp_path}?classes=7")
    assert source.num_classes == 7 and source.labels.tolist() == [1, -1, -1] and source[1]["label"] == -1
    assert "1 samples have a label that cannot be used: 1.cls ('emu' is no number and no class" in source.faults[0]
    (tmp_path / "classnames.txt").write_text("cat\ndog\nemu\n")
    named = open_source(f"tar:{tmp_path}")
    assert named.class_names == ("cat", "dog", "emu") and named.labels.tolist() == [1, 2, -1] and named.faults == ()
    (tmp_path / "classnames.txt").write_text("cat\n\nemu\n")
    with pytest.raises(ValueError, match="classnames.txt, line 2 is empty"):
        open_source(f"tar:{tmp_path}")
    (tmp_path / "classnames.txt").unlink()
    write(tmp_path / "s.tar", [("0.jpg", picture(0)), ("0.cls", "emu")])
    with pytest.raises(ValueError, match="no label can be used. .*'emu' is no number.*are lines of .*classes.txt"):
        open_source(f"tar:{tmp_path}")
    with pytest.raises(ValueError, match="number of classes, got 'all'"):
        open_source(f"tar:{tmp_path}?classes=all")


def test_labels_in_json(tmp_path):
    entries = ({"label": 4, "w": 6}, {"label": "3"}, {"w": 1}, {"label": 1.5}, {"label": True}, [])
    members = [(f"{i}.json", json.dumps(entry)) for i, entry in enumerate(entries)]
    members += [("6.json", "{"), *((f"{i}.jpg", picture(i)) for i in range(8))]
    write(tmp_path / "s.tar", members)
    source = open_source(f"tar:{tmp_path}?label=label")
    assert source.labels.tolist() == [4, 3, -1, -1, -1, -1, -1, -1] and source.num_classes == 5
    assert (
        "5 samples have a label that cannot be used: 2.json (no JSON with 'label'), 3.json (1.5 is" in source.faults[0]
    )
    plain = open_source(f"tar:{tmp_path}")
    assert plain.num_classes == 0 and plain.faults == () and len(plain) == 8


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("", 12),
        ("/birds-*.tar", 12),
        ("/birds-train-{000000..000001}.tar", 8),
        ("/birds-{train,val}-00000[02].tar", 8),
        ("/birds-train-000002.tar", 4),
    ],
)
def test_what_a_path_may_be(shards, pattern, count):
    source = open_source(f"tar:{shards}{pattern}")
    assert len(source) == count and source.splits[0] == "train"


def test_splits_by_folder(tmp_path):
    write(tmp_path / "train" / "0.tar", labelled(range(5)))
    write(tmp_path / "train" / "1.tar", labelled(range(5, 8)))
    write(tmp_path / "test" / "0.tar", labelled(range(2)))
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    source = open_source(f"tar:{tmp_path}")
    assert source.splits == ("train", "test") and len(source) == 8 and source.name(7) == "train/1.tar/000007.jpg"
    assert len(open_source(f"tar:{tmp_path}/{{train,test}}/*.tar#test")) == 2
    alone = open_source(f"tar:{tmp_path}/test")
    assert alone.splits == () and alone.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"has no split 'val', no file name tells one; '#\[:80%\]'"):
        open_source(f"tar:{tmp_path}/test#val")
    with pytest.raises(ValueError, match="has no split 'val': it has train, test"):
        open_source(f"tar:{tmp_path}#val")


def test_what_is_not_there_is_said_with_the_layout(shards):
    for path, message in (
        (
            f"{shards}/birds-train-{{000001..000009}}.tar",
            r"train-000003.tar, .*-000005.tar, … \(7 in all\) is not there",
        ),
        (f"{shards}/none", r"none is not there. Expected WebDataset shards such as train-000000.tar"),
        (f"{shards}/*.zip", r"\*.zip is not there"),
        ("", "is not there"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            open_source(f"tar:{path}")
    write(shards / "more.tar", labelled([1]))
    with pytest.raises(ValueError, match="beside shards of train, val there are some of no split, more.tar"):
        open_source(f"tar:{shards}")
    (shards / "sub").mkdir()
    (shards / "sub" / "a.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="no shard is in .*: it holds a.txt. Expected"):
        open_source(f"tar:{shards}/sub")


def test_compressed_shards_are_refused_with_the_remedy(shards):
    path = shards / "birds-val-000000.tar"
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    with pytest.raises(ValueError, match="1 shards in .* are compressed .*gunzip them"):
        open_source(f"tar:{shards}#val")
    assert len(open_source(f"tar:{shards}")) == 12
    (shards / "birds-val-000000.tar.gz").rename(path)
    with pytest.raises(ValueError, match="no sample is in .*it is compressed, .*gunzip it"):
        open_source(f"tar:{shards}#val")


def test_a_torn_shard_keeps_what_is_readable_and_is_named(shards, caplog):
    path = shards / "birds-train-000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        offset = {member.name: member.offset for member in archive}
    cases = {
        "cut in a picture": (whole[: offset["000006.jpg"] + 600], 2, "000006.jpg is cut after 88 of"),
        # 000006 has lost its caption: whether it is whole, nobody knows.
        "cut between members": (whole[: offset["000006.txt"]], 2, "without an end mark"),
        "cut between samples": (whole[: offset["000007.cls"]], 3, "without an end mark"),
        "a damaged header": (
            whole[: offset["000005.cls"]] + b"\xff" * 512 + whole[offset["000005.jpg"] :],
            1,
            "end mark",
        ),
        "no archive": (b"<html>not found</html>" * 100, 0, "after 0 samples"),
    }
    for case, (content, left, reason) in cases.items():
        path.write_bytes(content)
        caplog.clear()
        source = open_source(f"tar:{shards}")
        assert source.labels.tolist() == [i % 3 for i in (*range(4 + left), *range(8, 12))], case
        assert [source[i]["image"] for i in range(4 + left)] == [picture(i) for i in range(4 + left)]
        assert len(source.faults) == 1 and f"{path}: it is damaged" in source.faults[0] and reason in source.faults[0]
        assert source.faults[0] in caplog.text
    assert "after 0 samples" in "".join(check(f"tar:{shards}#train", picture="")["problems"])


def test_members_that_are_there_twice_or_without_a_picture_are_named(tmp_path):
    members = [*labelled([0]), ("000000.cls", "2"), ("9.cls", "1"), ("9.json", "{}")]
    write(tmp_path / "s.tar", members)
    source = open_source(f"tar:{tmp_path}")
    # As unpacking would leave it.
    assert len(source) == 1 and source[0]["label"] == 2
    assert "1 samples have no picture: 9.{cls,json}; 1 members are there twice" in source.faults[0]


def test_the_index_is_built_once_and_again_when_a_shard_changes(shards, monkeypatch):
    text = f"tar:{shards}"
    source, val = open_source(text), open_source(f"{text}#val")
    with monkeypatch.context() as patch:
        patch.setattr(kept_index, "build_index", None)
        assert open_source(text).fingerprint == source.fingerprint
        assert open_source(f"{text}#val").fingerprint == val.fingerprint != source.fingerprint
    write(shards / "birds-train-000002.tar", labelled([20]))
    changed = open_source(text)
    assert len(changed) == 9 and changed.fingerprint != source.fingerprint and changed[8]["image"] == picture(20)
    # A run that is going on keeps the index it has; what it cannot read any more the loader replaces.
    assert source[0]["image"] == picture(0)
    with pytest.raises(OSError, match="bytes too early"):
        (shards / "birds-train-000001.tar").write_bytes(b"")
        changed[4]


def test_any_thread_and_any_process_reads(shards, monkeypatch):
    source = open_source(f"tar:{shards}")
    source[0]
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    # Two threads may open a shard at once, and one of the two files is forgotten while it is read.
    monkeypatch.setattr(kept_index, "opened", kept_index.opened.__wrapped__)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: again[i % 12]["image"], range(200))) == [picture(i % 12) for i in range(200)]
