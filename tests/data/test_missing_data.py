"""A source whose data are not there says what to download and how to lay it out."""

import pytest

from regvit_jax.data import open_source


@pytest.mark.parametrize(
    ("kind", "download", "layout"),
    [
        ("imagenet", "ILSVRC2012_img_train.tar", "train/n01440764/"),
        ("ade20k", "ADEChallengeData2016.zip", "images/training/NAME.jpg with annotations/training/NAME.png"),
        ("nyud", "sync.zip", "nyudepthv2_train_files_with_gt.txt"),
        ("voc", "VOCtrainval_06-Nov-2007.tar", "VOCdevkit/VOC2007/JPEGImages/"),
        ("coco", "annotations_trainval2017.zip", "annotations/instances_val2017.json"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_what_to_download_and_where_to_put_it(kind, download, layout, there, tmp_path):
    """Without the folder, and with one that holds other things."""
    place = tmp_path / "data"
    if there:
        place.mkdir()
        (place / "notes.md").write_text("nothing yet")
    with pytest.raises(FileNotFoundError) as told:
        open_source(f"{kind}:{place}")
    message = str(told.value)
    assert str(place) in message and download in message and layout in message and "\n" not in message


def test_the_list_of_coco20k_is_asked_for_by_name(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no file 'coco_20k.txt'.*COCO20k comes with LOST"):
        open_source(f"coco:{tmp_path}?list=coco_20k.txt")
