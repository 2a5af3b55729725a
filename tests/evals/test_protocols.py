"""The published protocols of configs/protocols/: what they set, what they say of themselves, and two steps of each."""

import json
import math
import pathlib

import numpy as np
import pytest
from PIL import Image

import regvit_jax as rv
from regvit_jax import cli, evaluate
from regvit_jax.config import load
from regvit_jax.evals.depth import NYUD

pytestmark = pytest.mark.usefixtures("quick_to_compile")

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "protocols"
SLIDING = dict(crop=512, stride=341, ratio=(0.5, 2.0), scales=(1.0,), flip=False, blocks=(-1,))
TRAINED = dict(steps=40_000, train_batch_size=16, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4, warmup=1500 / 40_000)
LARGER = dict(crop=640, ratio=(1.0, 3.0), scales=(1.0, 1.32, 1.73, 2.28, 3.0), flip=True, blocks=(-4, -3, -2, -1))
# name: (what it sets, a number to expect that its docstring has)
PUBLISHED = {
    "imagenet_linear": (dict(steps=12_500, train_batch_size=1024, blocks=(1, 4), avgpool=(0, 1), held_out=0.0), "86.7"),
    "imagenet_knn": (dict(k=(10, 20, 100, 200), temperature=0.07, feature="cls"), "83.8"),
    "imagenet_logreg": (dict(choose_on="held_out", crop_ratio=1.0, max_iter=1000), "86.0"),
    "ade20k_linear": (SLIDING | TRAINED, "47.9"),
    "ade20k_ms": (LARGER | TRAINED, "53.1"),
    "voc12_linear": (SLIDING | TRAINED, "82.1"),
    "nyud_lin1": (NYUD | dict(layers=1, flip=True, weight_decay=0.01, clip=35.0), ".366"),
    "nyud_lin4": (NYUD | dict(layers=4, flip=True, weight_decay=0.01, clip=35.0), ".333"),
}
FEW = ("steps=2", "train_batch_size=2", "batch_size=2")
SMALL = (*FEW, "crop=64", "stride=43", "pictures=0")
# name: (data below the folder, what --set makes small, a metric)
RUNS = {
    "imagenet_linear": ("imagenet:{}/imagenet", ("lr=0.1,0.01", *FEW), "linear/top1"),
    "imagenet_knn": ("imagenet:{}/imagenet", ("k=2,3",), "knn/top1_k3"),
    "imagenet_logreg": ("imagenet:{}/imagenet", ("C=0.1,1", "max_iter=5"), "logreg/top1"),
    "ade20k_linear": ("ade20k:{}/ADEChallengeData2016", SMALL, "ade20k/miou"),
    "ade20k_ms": ("ade20k:{}/ADEChallengeData2016", SMALL, "ade20k_ms/miou"),
    "voc12_linear": ("voc:{}/VOCdevkit?year=2012&set=segmentation#trainaug", SMALL, "voc12/miou"),
    "nyud_lin1": ("nyud:{}/nyu", (*FEW, "train_crop=64,96", "pictures=0"), "nyud_lin1/rmse"),
    "nyud_lin4": ("nyud:{}/nyu", (*FEW, "lr=0.001", "train_crop=64,96", "pictures=0"), "nyud_lin4/rmse"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    shape = dict(width=16, depth=4, num_heads=2, mlp_dim=16, image_size=64, patch_size=32)
    folder = tmp_path_factory.mktemp("model")
    rv.save_model(rv.create_model("vit_ti16_reg2", seed=1, **shape), folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A few files in the layouts of ImageNet, ADE20k, VOC and NYU Depth v2."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)

    def save(path, pixels):
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def photo(path, height=48, width=64):
        save(path, rng.integers(0, 256, (height, width, 3), np.uint8))

    for split, count in (("train", 4), ("val", 2)):
        for wnid in ("n01440764", "n01443537", "n01484850"):
            for number in range(count):
                photo(f"imagenet/{split}/{wnid}/{wnid}_{number}.JPEG")
    for split, short in (("training", "train"), ("validation", "val")):
        for number in range(2):
            name = f"{split}/ADE_{short}_0000000{number}"
            photo(f"ADEChallengeData2016/images/{name}.jpg")
            save(f"ADEChallengeData2016/annotations/{name}.png", rng.integers(0, 151, (48, 64)).astype(np.uint8))
    voc = "VOCdevkit/VOC2012"
    for split, masks, number in (("trainaug", "SegmentationClassAug", 0), ("val", "SegmentationClass", 1)):
        photo(f"{voc}/JPEGImages/2007_00000{number}.jpg")
        for folder in ("SegmentationClass", masks):
            save(f"{voc}/{folder}/2007_00000{number}.png", rng.integers(0, 21, (48, 64)).astype(np.uint8))
        (root / voc / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"2007_00000{number}\n")
    for split, folder in (("train", "sync"), ("test", "official_splits/test")):
        lines = []
        for number in range(2):
            names = f"cafe/rgb_0000{number}.jpg", f"cafe/sync_depth_0000{number}.png"
            photo(f"nyu/{folder}/{names[0]}", 480, 640)
            save(f"nyu/{folder}/{names[1]}", rng.integers(500, 9000, (480, 640)).astype(np.uint16))
            lines.append(" ".join((*names, "518.8579\n")))
        (root / "nyu" / f"nyudepthv2_{split}_files_with_gt.txt").write_text("".join(lines))
    return root


def test_all_of_them_are_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == PUBLISHED.keys() == RUNS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_sets_what_was_published_and_says_what_to_expect(name):
    path, (options, number) = FOLDER / f"{name}.py", PUBLISHED[name]
    config = load(path)
    (scheduled,) = evaluate.build(config.evals, data_train="a:", data_eval="b:").values()
    found = vars(scheduled.evaluator)
    assert {option: found[option] for option in options} == options
    imagenet = {"imagenet_logreg": (224, 1.0)}.get(name, (224, 0.875)) if "imagenet" in name else (None, None)
    assert (config.image_size, config.crop_ratio) == imagenet
    text = path.read_text()
    assert f"--config=configs/protocols/{name}.py" in text and f"--out={name}.json" in text and "Not" in text
    assert number in text.split('"""')[1] and "/data/" in text


@pytest.mark.parametrize("name", RUNS)
def test_two_steps_of_it(name, saved, root, mesh, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regvit_jax.main.set_up_logging", lambda: None)
    monkeypatch.setattr(
        "regvit_jax.sharding.make_mesh", lambda: mesh
    )  # Eight devices would want eight images each time.
    data, settings, metric = RUNS[name]
    command = ["eval", f"--config={FOLDER / name}.py", f"--model={saved}", f"--data={data.format(root)}"]
    command += [f"--out={tmp_path}/found.json", f"--pictures={tmp_path}", "--image_size=64"]
    assert cli.main(command + [part for text in settings for part in ("--set", text)]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "found.json").read_text())
    task, _, measured = metric.partition("/")
    assert math.isfinite(record["metrics"][metric]) and math.isfinite(record["tasks"][task]["metrics"][measured])
    options, published = record["tasks"][task]["options"], PUBLISHED[name][0]
    changed = {text.partition("=")[0] for text in settings}
    kept = {option: value for option, value in published.items() if option not in changed}
    assert json.loads(json.dumps(kept)) == {option: options[option] for option in kept}
    assert not list(tmp_path.glob("eval/*/unfinished.npz"))
