"""What the scripts of experiments/ share: a part of a data set is not taken for it, nothing is measured twice, and what
is missing is told with the way to get it."""

import io
import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def loaded(script):
    script("table1/run")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """npz: of eight classes, from dark to light, as many images as the stand-in has: so compilations are shared."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 48), ("test", 24)):
        files = []
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 100, (32, 32, 3), np.uint8) + np.uint8(20 * (i % 8))).save(file, "png")
            files.append(file.getvalue())
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.arange(count) % 8
    path = tmp_path_factory.mktemp("photos") / "photos.npz"
    np.savez(path, classes=np.arange(8).astype(str), **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("images", "classes", "whole"),
    [
        ((6667, 3333), 100, True),
        ((6650, 3330), 100, True),  # a few files that are gone
        ((6667, 3333), 99, False),
        ((3334, 3333), 100, False),  # without its validation part
        ((6667, 1000), 100, False),
        ((6667, 3333), None, False),
    ],
)
def test_a_data_set_is_known_by_its_numbers_of_images_and_classes(images, classes, whole):
    from data_sets import TRANSFER

    aircraft = next(dataset for dataset in TRANSFER if dataset.key == "aircraft")
    assert aircraft.is_published(images, classes) == whole


def test_a_stand_in_is_never_a_published_data_set():
    from data_sets import scenes

    assert not scenes("top-1").is_published((48, 24), 8)


SETTINGS = ("C=0.01,1", "draws=2", "max_iter=20", "batch_size=24", "tokens.rule=percentile", "value=99")


def test_other_images_get_a_column_of_their_own(run, photos, tmp_path, capsys):
    options = ["--only=cifar10", f"--data=cifar10={photos}", "--image_size=32"]
    options += [f"--set={text}" for text in SETTINGS]
    assert run("table1", tmp_path, *options) == 0
    rows = [row for row in json.loads((tmp_path / "table1.json").read_text())["rows"] if not row["published"]]
    assert [row["label"] for row in rows] == [f"tiny, {token}" for token in ("cls", "normal", "outlier", "register0")]
    assert {key for row in rows for key in row["cells"]} == {f"cifar10 of {photos}#test"}
    printed = capsys.readouterr().out
    assert f"{photos}#test, which is not CF10, 48 / 24 images" in printed
    assert "not the protocol of this table: image_size=32, C=(0.01, 1.0), draws=2, max_iter=20, rule=" in printed
    results = tmp_path / "tiny/eval/tokens-cifar10/results.json"
    before = results.stat().st_mtime_ns
    assert (
        run("table1", tmp_path, *options, "--set=workers=0", "--set=batch_size=16") == 0
    )  # no number depends on these
    assert results.stat().st_mtime_ns == before
    assert run("table1", tmp_path, *options, "--set=C=0.01,2") == 0
    assert results.stat().st_mtime_ns != before


def test_all_that_is_missing_is_told_with_the_way_to_get_it(run, tmp_path, capsys):
    assert run("table1", tmp_path, f"--data_root={tmp_path}/none") == 2
    error = capsys.readouterr().err
    assert f"python experiments/table1/arrange.py cub DOWNLOAD {tmp_path}/none/cub" in error
    assert "VOCtest_06-Nov-2007.tar" in error and "/none/imagenet/train/n01440764/" in error
    assert error.count("\n    ") == 14 and "--skip_missing" in error
    assert not (tmp_path / "tiny").exists()


def test_missing_data_sets_may_be_skipped(run, tmp_path, capsys):
    assert run("table3", tmp_path, f"--data_root={tmp_path}/none", "--skip_missing") == 0
    assert "| published: DINOv2 | 35.3 | 40.2 | 26.9 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--only=birds", "no data set is called 'birds'"),
        ("--data=cub", "write KEY=SOURCE"),
        ("--eval_data=cub=folder:/x", "--data cub=SOURCE is missing"),
        ("--model=a/b=/x", "the name becomes a folder"),
        ("--model=tiny=/x", "each once"),
        (
            "--stand_in --set=stepz=3",
            "--set stepz=3: write KEY=VALUE or tokens.KEY=VALUE with KEY one of C, batch_size",
        ),
        ("--stand_in --set=data=npz:x", "--set data=npz:x: write"),
        ("--stand_in --set=token.draws=3", "--set token.draws=3: write KEY=VALUE"),
    ],
)
def test_mistakes_are_refused(run, tmp_path, capsys, option, said):
    assert run("table1", tmp_path, *option.split()) == 2
    assert said in capsys.readouterr().err


def test_options_are_typed_and_left_to_the_evaluator_they_name():
    from measurements import _settings

    texts = ["blocks=-4,-1", "segmentation.flip=yes", "lr=1", "depth.layers=4", "loss_mean=known"]
    found = {"blocks": (-4, -1), "flip": True, "lr": 1.0, "loss_mean": "known"}
    assert _settings("segmentation", texts) == found


def test_the_protocols_are_those_of_the_paper():
    import protocols

    linear, ade20k, ms = protocols.linear(), protocols.segmentation(), protocols.segmentation(multi_scale=True)
    assert (linear.options["steps"], linear.options["train_batch_size"]) == (12_500, 1024)
    assert 2 * len(linear.options["lr"]) * len(linear.options["blocks"]) == 52
    assert linear.preparation == {"size": 224, "crop_ratio": 0.875}
    assert (ade20k.options["steps"], ade20k.options["crop"], ade20k.options["stride"]) == (40_000, 512, 341)
    assert len(ms.options["scales"]) == 5 and ms.options["flip"] and not ade20k.preparation
    depth = protocols.depth(4).options
    assert (depth["layers"], depth["steps"], depth["crop"]) == (4, 38_400, "eigen")


def test_markdown_by_hand():
    from results_table import Cell, Column, Table, markdown, published

    columns = [Column("a", "A", "top-1, %"), Column("b", "B", "RMSE, m", 1.0, 3)]
    table = Table("T", columns, published({"paper": {"a": (12.34, 0.06), "b": 0.5}}), ["Said."])
    table.put("ours", columns[0], Cell(10.0, note="tuned"))
    table.put("others", columns[0], Cell(11.0, note="tuned"))
    assert markdown(table).splitlines() == [
        "# T",
        "",
        "|  | A<br>top-1, % | B<br>RMSE, m |",
        "| --- | ---: | ---: |",
        "| published: paper | 12.3 ± 0.1 | 0.500 |",
        "| **ours** | **10.0** [1] | – |",
        "| **others** | **11.0** [1] | – |",
        "",
        "[1] tuned",
        "",
        "Said.",
    ]


VOC = """<annotation><filename>{name}</filename><size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><truncated>0</truncated>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object></annotation>"""


def test_published_boxes_are_scored_on_a_voc_tree(script, tmp_path):
    from regvit_jax.data.sources import open_source

    table3 = script("table3/run")
    # Published of these two: (96, 144, 480, 368) and (128, 48, 500, 240). VOC counts from 1, and its ends are inside.
    truth = {"000005": (97, 145, 480, 368), "000007": (1, 1, 60, 60)}
    root = tmp_path / "VOCdevkit/VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for stem, box in truth.items():
        (root / f"Annotations/{stem}.xml").write_text(VOC.format(*box, name=f"{stem}.jpg"))
        Image.new("RGB", (500, 375)).save(root / f"JPEGImages/{stem}.jpg")
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(truth))
    source = open_source(f"voc:{root}#trainval")
    assert table3.corloc_of(source, table3.BOXES) == (0.5, 2)
    with np.load(table3.BOXES) as archive:
        assert len(archive["image_id"]) == 5011
    np.savez(tmp_path / "few.npz", image_id=[5], box_x1y1x2y2=[[0, 0, 9, 9]])
    with pytest.raises(ValueError, match=r"no box for 1 images, such as 000007\.jpg"):
        table3.corloc_of(source, tmp_path / "few.npz")
