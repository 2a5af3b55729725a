"""Sources: the string, slices, holdouts; folders as people have them; npz archives."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, holdout, open_source
from regvit_jax.data.sources import parse


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def names(source):
    return [source.name(i) for i in range(len(source))]


def encoded(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_npz(path, **splits):
    arrays = {}
    for split, labels in splits.items():
        images = [encoded(10 * label) for label in labels]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(images), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, images)])
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)
    np.savez(path, **arrays)


@pytest.fixture
def ten(tmp_path):
    for i in range(10):
        write_image(tmp_path / f"{i}.png", i)
    return f"folder:{tmp_path}"


# The string


@pytest.mark.parametrize(
    "text",
    [
        "folder:/a",
        "folder:/a#train",
        "npz:gs://b/c.npz#test[:80%]",
        "scenes:?count=9&size=8#val[3:]",
        "folder:C:/a b#[-5:]",
    ],
)
def test_a_string_survives_parsing(text):
    assert str(parse(text)) == text


def test_hash_and_question_mark_may_belong_to_the_path():
    spec = parse("folder:/a#1/b?c/d#train")
    assert (spec.path, spec.options, spec.split) == ("/a#1/b?c/d", {}, "train")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("/photos", "folder:/photos"),
        ("floder:/photos", "kind one of .*folder, "),
        ("folder:/a#train[:80", "write #train"),
        ("folder:/a#train[1.5:]", "write #train"),
        ("folder:/a?x=1&y", "write \\?name=value"),
        ("folder:/a?x=1&x=2", "given twice"),
    ],
)
def test_a_malformed_string_is_told_how_to_write_it(text, remedy):
    with pytest.raises(ValueError, match=remedy):
        parse(text)


# Slices and holdouts


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[2:5]", [2, 3, 4]),
        ("[:30%]", [0, 1, 2]),
        ("[80%:]", [8, 9]),
        ("[-2:]", [8, 9]),
        ("[-30%:-10%]", [7, 8]),
        ("[:]", range(10)),
    ],
)
def test_slices_are_parts_in_order(ten, part, expected):
    assert names(open_source(f"{ten}#{part}")) == [f"{i}.png" for i in expected]


@pytest.mark.parametrize("percent", [1, 33, 50, 66.6])
def test_two_slices_that_meet_cover_everything_once(ten, percent):
    if round(10 * percent / 100) == 0:
        with pytest.raises(ValueError, match="samples 0 to 0 of 10"):
            open_source(f"{ten}#[:{percent}%]")
        return
    first, second = open_source(f"{ten}#[:{percent}%]"), open_source(f"{ten}#[{percent}%:]")
    assert names(first) + names(second) == [f"{i}.png" for i in range(10)]


@pytest.mark.parametrize("part", ["[5:5]", "[7:3]", "[:11]", "[-11:]"])
def test_a_slice_that_is_no_part_is_refused(ten, part):
    with pytest.raises(ValueError, match="of 10"):
        open_source(f"{ten}#{part}")


def test_holdout_is_a_fixed_disjoint_tenth(tmp_path):
    for i in range(40):
        write_image(tmp_path / f"{i:02}.png")
    train, held_out = holdout(f"folder:{tmp_path}")
    train_names, eval_names = names(open_source(train)), names(open_source(held_out))
    assert len(eval_names) == 4 and sorted(train_names + eval_names) == [f"{i:02}.png" for i in range(40)]
    assert eval_names == names(open_source(held_out))
    assert eval_names != [f"{i:02}.png" for i in range(4)]
    assert eval_split(train) == held_out
    assert len({open_source(text).fingerprint for text in (train, held_out, f"folder:{tmp_path}")}) == 3


def test_holdout_of_a_slice_stays_inside_it(ten):
    train, held_out = holdout(f"{ten}#[2:6]")
    assert sorted(names(open_source(train)) + names(open_source(held_out))) == ["2.png", "3.png", "4.png", "5.png"]


# Folders


def test_class_folders_give_sorted_labels_and_a_mixed_order(tmp_path):
    for i in range(20):
        write_image(tmp_path / "dog" / f"{i}.JPG")
        write_image(tmp_path / "cat" / "deep" / "er" / f"{i}.webp")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("cat", "dog") and source.num_classes == 2 and source.splits == ()
    for i in range(40):
        assert source[i]["label"] == ("cat", "dog").index(source.name(i).split("/")[0])
        assert Image.open(source[i]["image"]).size == (4, 4)
    # Sorted by name, the first half would be cats only.
    assert {source[i]["label"] for i in range(10)} == {0, 1}


def test_a_new_file_moves_no_other(tmp_path):
    for i in range(20):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png")
    before = names(open_source(f"folder:{tmp_path}"))
    write_image(tmp_path / "a" / "new.png")
    assert [name for name in names(open_source(f"folder:{tmp_path}")) if name != "a/new.png"] == before


def test_split_folders_share_the_classes_of_train(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "train/c/0.png", "valid/c/0.png", "test/0.png"):
        write_image(tmp_path / name)
    train, valid, test = (open_source(f"folder:{tmp_path}{split}") for split in ("", "#valid", "#test"))
    assert train.splits == valid.splits == ("train", "valid", "test") and len(train) == 3
    assert valid.class_names == ("a", "b", "c") and valid[0]["label"] == 2
    assert test.num_classes == 0 and test[0]["label"] == -1
    assert eval_split(f"folder:{tmp_path}#train[:50%]") == f"folder:{tmp_path}#valid"
    assert eval_split(f"folder:{tmp_path}#valid") == f"folder:{tmp_path}#test"
    write_image(tmp_path / "valid" / "unheard" / "0.png")
    with pytest.raises(ValueError, match="no class of the split 'train': unheard"):
        len(open_source(f"folder:{tmp_path}#valid"))


def test_a_class_named_train_is_no_split(tmp_path):
    for name in ("car", "train", "tram"):
        write_image(tmp_path / name / "0.png")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("car", "train", "tram")
    with pytest.raises(ValueError, match=r"no split 'train': it holds 3 folders \(car, train, tram\)"):
        open_source(f"folder:{tmp_path}#train")
    assert eval_split(f"folder:{tmp_path}") is None


def test_only_a_train_folder_is_a_split(tmp_path):
    write_image(tmp_path / "train" / "a" / "0.png")
    write_image(tmp_path / "train" / "b" / "0.png")
    assert open_source(f"folder:{tmp_path}").class_names == ("a", "b")
    assert eval_split(f"folder:{tmp_path}") is None


def test_images_beside_folders_mean_no_labels(tmp_path, caplog):
    write_image(tmp_path / "holiday" / "1.png")
    write_image(tmp_path / "loose.png")
    source = open_source(f"folder:{tmp_path}")
    assert source.num_classes == 0 and names(source) == ["holiday/1.png", "loose.png"]
    assert "without labels" in caplog.text


def test_hidden_and_other_files_are_left_out(tmp_path, caplog):
    for name in ("a/0.png", "a/._0.png", ".cache/0.png", "b/0.png"):
        write_image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.xml").write_text("x")
    with caplog.at_level("INFO"):
        source = open_source(f"folder:{tmp_path}")
        assert sorted(names(source)) == ["a/0.png", "b/0.png"]
    assert source.class_names == ("a", "b")
    assert "2 files that are not images" in caplog.text


def test_a_link_that_leads_back_up_ends(tmp_path):
    write_image(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert names(open_source(f"folder:{tmp_path}")) == ["a/0.png"]


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(f"folder:{tmp_path}/none")
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        open_source(f"folder:{tmp_path}")
    (tmp_path / "a.mp4").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"it holds 1 files \(a.mp4\). Expected files ending in"):
        open_source(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        open_source(f"folder:{tmp_path}/a.mp4")
    with pytest.raises(ValueError, match="no options, got depth"):
        open_source(f"folder:{tmp_path}?depth=1")


def test_the_fingerprint_follows_content_not_place(tmp_path):
    for place in ("here", "there"):
        write_image(tmp_path / place / "0.png")
        write_image(tmp_path / place / "1.png")
    here, there = (open_source(f"folder:{tmp_path}/{place}").fingerprint for place in ("here", "there"))
    assert here == there
    (tmp_path / "there" / "1.png").write_bytes(b"longer or shorter")
    assert open_source(f"folder:{tmp_path}/there").fingerprint != here
    (tmp_path / "here" / "1.png").rename(tmp_path / "here" / "2.png")
    assert open_source(f"folder:{tmp_path}/here").fingerprint != here


def test_a_pickled_folder_needs_no_second_listing(tmp_path):
    for i in range(300):
        (tmp_path / f"a_rather_long_file_name_{i:05}.jpg").touch()
    source = open_source(f"folder:{tmp_path}")
    listed = names(source)
    pickled = pickle.dumps(source)
    assert len(pickled) < 300 * (31 + 8 + 4) + 2000
    (tmp_path / "zz.jpg").touch()
    assert names(pickle.loads(pickled)) == listed


# Archives


def test_an_archive_gives_bytes_and_labels(tmp_path):
    write_npz(tmp_path / "a.npz", test=[2, 0], train=[0, 1, 2])
    source = open_source(f"npz:{tmp_path}/a.npz")
    assert source.splits == ("train", "test") and source.class_names == ("0", "1", "2") and len(source) == 3
    assert [source[i] for i in range(3)] == [{"image": encoded(10 * i), "label": i} for i in range(3)]
    assert eval_split(f"npz:{tmp_path}/a.npz") == f"npz:{tmp_path}/a.npz#test"
    assert source.name(1) == "a.npz#train[1]"
    with pytest.raises(IndexError):
        source[3]


def test_a_pickled_archive_is_its_path(tmp_path):
    write_npz(tmp_path / "a.npz", train=[0] * 50)
    source = open_source(f"npz:{tmp_path}/a.npz")
    source[0]
    assert len(pickle.dumps(source)) < 1000
    assert pickle.loads(pickle.dumps(source))[49] == source[49]


def test_an_archive_written_anew_is_read_anew(tmp_path):
    write_npz(tmp_path / "a.npz", train=[0, 1])
    before = open_source(f"npz:{tmp_path}/a.npz")
    assert before[1]["label"] == 1
    write_npz(tmp_path / "a.npz", train=[1, 0, 1])
    after = open_source(f"npz:{tmp_path}/a.npz")
    assert (len(after), after[1]["label"]) == (3, 0) and after.fingerprint != before.fingerprint


def test_an_archive_without_labels_is_unlabelled(tmp_path):
    np.savez(tmp_path / "a.npz", all_jpeg=np.zeros(5, np.uint8), all_offsets=[0, 2, 5])
    source = open_source(f"npz:{tmp_path}/a.npz")
    assert source.num_classes == 0 and source[1] == {"image": b"\0\0\0", "label": -1}


def test_an_archive_that_does_not_fit_together_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    bytes_ = np.zeros(5, np.uint8)
    for arrays, message in (
        ({"images": bytes_}, "holds no split: .* found images"),
        ({"train_jpeg": bytes_}, "no train_offsets"),
        ({"train_jpeg": bytes_, "train_offsets": [0, 2]}, r"n\+1 growing integers from 0 to the 5 bytes"),
        ({"train_jpeg": bytes_, "train_offsets": [0, 3, 2, 5]}, "growing"),
        ({"train_jpeg": bytes_, "train_offsets": [0, 5], "train_labels": [0, 1]}, "1 images but train_labels"),
        ({"train_jpeg": bytes_, "train_offsets": [0, 5], "train_labels": [3], "classes": ["a"]}, "only 1 classes"),
        ({"a_jpeg": bytes_, "b_jpeg": bytes_}, "has the splits a, b: name one"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            open_source(f"npz:{path}")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(f"npz:{tmp_path}/none.npz")
    path.write_text("text")
    with pytest.raises(ValueError, match="no npz archive"):
        open_source(f"npz:{path}")


# Labels of all samples, without reading them


def test_labels_are_those_of_the_samples(tmp_path):
    for i in range(30):
        write_image(tmp_path / "photos" / "abc"[i % 3] / f"{i}.png")
    write_npz(tmp_path / "a.npz", train=[0, 1, 2, 1])
    np.savez(tmp_path / "b.npz", all_jpeg=np.zeros(5, np.uint8), all_offsets=[0, 2, 5])
    photos = f"folder:{tmp_path / 'photos'}"
    for text in (photos, f"{photos}#[20%:70%]", *holdout(photos), f"npz:{tmp_path}/a.npz", f"npz:{tmp_path}/b.npz"):
        source = open_source(text)
        assert source.labels.tolist() == [source[i]["label"] for i in range(len(source))], text
    assert open_source("scenes:?size=8&n=2&n_test=1").labels is None
    assert open_source("scenes:?size=8&n=2&n_test=1#train[1:]").labels is None
