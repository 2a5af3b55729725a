"""nyud: the lists and folders of BTS, written by hand, and files side by side without lists."""

import numpy as np
import pytest
from PIL import Image

from regvit_jax.data import eval_split, open_source

MM = np.array([[0, 1, 713], [1234, 9999, 12000]], np.uint16)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def frame(folder, number, mm=MM, rgb="", depth=""):
    save(folder / rgb / f"rgb_{number:05}.jpg", np.zeros((*np.shape(mm), 3), np.uint8))
    save(folder / depth / f"sync_depth_{number:05}.png", mm)


@pytest.fixture
def root(tmp_path):
    """As BTS has it: its training list begins with "/", its test list does not."""
    for number in (45, 3):
        frame(tmp_path / "sync/kitchen_0028b", number)
    frame(tmp_path / "sync/kitchen_0028b", 99)  # in no list
    frame(tmp_path / "official_splits/test/bathroom", 46, 2 * MM)
    line = "{0}kitchen_0028b/rgb_{1}.jpg {0}kitchen_0028b/sync_depth_{1}.png 518.8579\n"
    (tmp_path / "nyudepthv2_train_files_with_gt.txt").write_text(line.format("/", "00045") + line.format("/", "00003"))
    line = "bathroom/rgb_00046.jpg bathroom/sync_depth_00046.png 0.0  /bathroom/sync_seg_00046.png\n\n"
    (tmp_path / "nyudepthv2_test_files_with_gt.txt").write_text(line)
    return tmp_path


def test_lists_decide_the_samples_and_their_order(root):
    source = open_source(f"nyud:{root}")
    assert source.splits == ("train", "test") and source.depth_range == (0.001, 10.0) and source.mask_names == ()
    assert [source.name(i) for i in range(2)] == [f"sync/kitchen_0028b/rgb_{n}.jpg" for n in ("00045", "00003")]
    assert eval_split(f"nyud:{root}#train[:1]") == f"nyud:{root}#test"
    test = open_source(f"nyud:{root}#test[:100%]")
    assert test.name(0) == "official_splits/test/bathroom/rgb_00046.jpg" and test.depth_range == (0.001, 10.0)
    assert test[0]["image"] == str(root / test.name(0))
    with pytest.raises(ValueError, match="has no split 'val': it has train, test"):
        open_source(f"nyud:{root}#val")


def test_millimetres_become_metres(root):
    depth = open_source(f"nyud:{root}")[0]["depth"]
    # 0 is unknown and stays; what is beyond the range is left to the measurement.
    expected = np.array([[0, 0.001, 0.713], [1.234, 9.999, 12]], np.float32)
    assert depth.dtype == np.float32 and (depth == expected).all()
    assert (open_source(f"nyud:{root}#test")[0]["depth"] == np.float32([[0, 0.002, 1.426], [2.468, 19.998, 24]])).all()


def test_the_other_name_of_a_list_and_files_right_below(tmp_path):
    frame(tmp_path / "cafe", 1)
    (tmp_path / "nyu_test.txt").write_text("cafe/rgb_00001.jpg cafe/sync_depth_00001.png 518.8579")
    source = open_source(f"nyud:{tmp_path}")
    assert source.splits == ("test",) and source.name(0) == "cafe/rgb_00001.jpg"


@pytest.mark.parametrize(("rgb", "depth"), [("", ""), ("rgb", "depth"), ("a/rgb", "a/depth")])
def test_without_lists_names_pair_the_files(tmp_path, rgb, depth):
    for number in (7, 2):
        frame(tmp_path, number, rgb=rgb, depth=depth)
    source = open_source(f"nyud:{tmp_path}")
    assert source.splits == () and [source.name(i)[-13:] for i in range(2)] == ["rgb_00002.jpg", "rgb_00007.jpg"]
    assert (source[1]["depth"] == MM.astype(np.float32) / 1000).all()
    with pytest.raises(ValueError, match="has no split 'test': .* has no lists. Expected"):
        open_source(f"nyud:{tmp_path}#test")


def test_numbers_are_those_of_one_folder(tmp_path):
    """rgb_00001 of every scene has the depth of that scene."""
    for scene, factor in (("a", 1), ("b", 2)):
        frame(tmp_path / scene, 1, factor * MM)
    source = open_source(f"nyud:{tmp_path}")
    assert [float(source[i]["depth"][1, 0]) for i in range(2)] == pytest.approx([1.234, 2.468])
    (tmp_path / "b" / "sync_depth_00001.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no map \(b/rgb_00001.jpg\). Expected PATH/nyudepthv2_train"):
        open_source(f"nyud:{tmp_path}")


def test_what_a_list_names_must_be_there(root):
    gone = root / "sync/kitchen_0028b/sync_depth_00003.png"
    gone.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"1 files that .*train_files_with_gt.txt names are not below .*depth_00003.png. Expected",
    ):
        open_source(f"nyud:{root}")
    (root / "sync").rename(root / "raw")
    with pytest.raises(
        FileNotFoundError,
        match="kitchen_0028b/rgb_00045.jpg, the first of .* is not below .* nor its sync/, official_spl",
    ):
        open_source(f"nyud:{root}")
    (root / "nyudepthv2_train_files_with_gt.txt").write_text("\nkitchen_0028b/rgb_00045.jpg\n")
    with pytest.raises(ValueError, match=r"line 2 of .*gt.txt is 'kitchen_0028b/rgb_00045.jpg': it names no depth map"):
        open_source(f"nyud:{root}")
    (root / "nyudepthv2_train_files_with_gt.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty. Expected"):
        open_source(f"nyud:{root}")


def test_maps_of_other_forms_are_refused(root, tmp_path):
    path = root / "sync/kitchen_0028b/sync_depth_00045.png"
    save(path, (MM // 64).astype(np.uint8))
    with pytest.raises(ValueError, match="depth_00045.png holds uint8 values, too few for millimetres. .*16-bit png"):
        open_source(f"nyud:{root}")[0]
    save(path, MM[:, :2].copy())
    with pytest.raises(ValueError, match="depth_00045.png has 2 x 2 pixels, its image .*rgb_00045.jpg 3 x 2"):
        open_source(f"nyud:{root}")[0]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        open_source(f"nyud:{tmp_path}/none")
    (tmp_path / "new").mkdir()
    with pytest.raises(FileNotFoundError, match="no list of files and no photo rgb_"):
        open_source(f"nyud:{tmp_path}/new")
    with pytest.raises(ValueError, match="takes no options"):
        open_source(f"nyud:{root}?n=1")
