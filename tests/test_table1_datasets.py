"""Table 1's datasets: fourteen rows that the evaluator takes, with the numbers that make the paper's point."""

import importlib.util
import pathlib

import pytest
from PIL import Image

from regvit_jax.data.sources import SOURCES, open_source, parse
from regvit_jax.evals.single_token import SingleToken

PATH = pathlib.Path(__file__).parents[1] / "experiments/table1/datasets.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("table1_datasets", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_is_a_run_of_the_evaluator(table):
    assert len({row.key for row in table.DATASETS}) == len({row.name for row in table.DATASETS}) == 14
    for row in table.DATASETS:
        options = row.options("/data")
        SingleToken(**options)
        given = [options[name] for name in ("data", "eval_data", "val_data") if options[name]]
        for text in given:
            assert parse(text).kind in SOURCES and parse(text).split and "/data" in parse(text).path
            assert "{" not in text
        assert len(set(given)) == len(given) and "{root}" in row.layout
        assert row.classes > 1 and row.test > 1000 and row.train > 1000


def test_the_published_numbers_make_the_point(table):
    """An outlier beats a normal patch everywhere, by 60 points and more where small differences decide."""
    gaps = {row.key: row.outlier[0] - row.normal[0] for row in table.DATASETS}
    assert min(gaps.values()) == pytest.approx(2.0) and gaps["imagenet"] == pytest.approx(3.2)
    assert {key for key, gap in gaps.items() if gap > 60} == {"aircraft", "cub", "cars"} < set(table.QUICK)
    assert sum(row.cls for row in table.DATASETS) == pytest.approx(1257.5)
    metrics = {row.key: row.metric for row in table.DATASETS}
    assert [key for key, metric in metrics.items() if metric == "map11"] == ["voc07"]
    several = {"aircraft", "caltech101", "flowers", "pets"}
    assert {key for key, metric in metrics.items() if metric == "mean_per_class"} == several


def test_lists_are_read_where_their_archives_put_them(table, tmp_path):
    aircraft, places = table.chosen(("aircraft", "places205"))[::-1]
    images = tmp_path / "fgvc-aircraft-2013b/data/images"
    images.mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        Image.new("RGB", (4, 4)).save(images / f"000000{number}.jpg")
        (images.parent / f"images_variant_{split}.txt").write_text(f"000000{number} F-16A/B\n")
    for text in list(aircraft.options(str(tmp_path)).values())[:3]:
        assert open_source(text).class_names == ("F-16A/B",) and len(open_source(text)) == 1

    folder = tmp_path / "places205/data/vision/torralba/deeplearning/images256/a/abbey"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "gsun_0.jpg")
    (tmp_path / "places205/trainvalsplit_places205").mkdir()
    for split in ("train", "val"):
        lists = tmp_path / f"places205/trainvalsplit_places205/{split}_places205.csv"
        lists.write_text("a/abbey/gsun_0.jpg,0\n")
    assert open_source(places.options(str(tmp_path))["eval_data"])[0]["image"] == str(folder / "gsun_0.jpg")


def test_rows_are_chosen_by_key(table):
    assert [row.name for row in table.chosen(table.QUICK)] == ["Airc", "CF10", "CF100", "CUB", "Cars"]
    assert table.chosen(()) == list(table.DATASETS)
    with pytest.raises(ValueError, match="called birdsnap; imagenet, places205"):
        table.chosen(("cub", "birdsnap"))
