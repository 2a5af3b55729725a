"""The fourteen datasets of table 1: where each lies below one folder, its splits, its metric, the published numbers.

    for row in DATASETS:
        evaluator("tokens", **row.options("/data"))

Numbers are of DINOv2-g without registers (Darcet et al. 2024, table 1; standard deviations from table 6): what logistic
regression on one token an image reaches, in percent. `train` and `test` are the numbers of images that the protocol
learns from, those on which C is chosen among them, and is measured on.
"""

import dataclasses

TFDS = "prepare it once as array_record, in an environment with TensorFlow: tfds build {} --file_format=array_record"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """One column of the table.

    Attributes:
      key: what it is called on command lines and in files. name: in tables.
      data, eval_data, val_data: source strings with {root}; val_data is where C is chosen, "" where a tenth of data is.
      metric: of the evaluator `tokens`: top1 | mean_per_class | map11.
      classes, train, test: how many there must be.
      cls, normal, outlier: published, percent; normal and outlier as (mean, standard deviation over draws).
      layout: how to come by it and lay it out.
    """

    key: str
    name: str
    data: str
    eval_data: str
    val_data: str = ""
    metric: str = "top1"
    classes: int
    train: int
    test: int
    cls: float
    normal: tuple[float, float]
    outlier: tuple[float, float]
    layout: str

    def options(self, root: str) -> dict[str, str]:
        """The fields of the evaluator that depend on the data, for data below `root`."""
        sources = {name: getattr(self, name).format(root=root) for name in ("data", "eval_data", "val_data")}
        return sources | {"metric": self.metric}


def _tfds(name, *, test="test", val=""):
    """Sources and layout of a dataset that TFDS prepares below {root}/tfds."""
    at = f"tfds:{name}@{{root}}/tfds"
    return {
        "data": f"{at}#train",
        "eval_data": f"{at}#{test}",
        "val_data": f"{at}#{val}" if val else "",
        "layout": f"{{root}}/tfds/{name}/VERSION/: " + TFDS.format(name) + " --data_dir={root}/tfds",
    }


_PLACES = (
    "list:{root}/places205?images=data/vision/torralba/deeplearning/images256"
    "&train=trainvalsplit_places205/train_places205.csv&val=trainvalsplit_places205/val_places205.csv"
)
_AIRCRAFT = (
    "list:{root}/fgvc-aircraft-2013b/data?images=images"
    "&train=images_variant_train.txt&val=images_variant_val.txt&test=images_variant_test.txt"
)

DATASETS = (
    DataSet(
        key="imagenet",
        name="IN1k",
        data="imagenet:{root}/imagenet#train",
        eval_data="imagenet:{root}/imagenet#val",
        classes=1000,
        train=1_281_167,
        test=50_000,
        cls=86.0,
        normal=(65.8, 0.1),
        outlier=(69.0, 0.7),
        layout="{root}/imagenet/train/n01440764/*.JPEG and {root}/imagenet/val/, from image-net.org",
    ),
    DataSet(
        key="places205",
        name="P205",
        data=f"{_PLACES}#train",
        eval_data=f"{_PLACES}#val",
        classes=205,
        train=2_448_873,
        test=20_500,
        cls=66.4,
        normal=(53.1, 0.3),
        outlier=(55.1, 1.0),
        layout="imagesPlaces205_resize.tar.gz and trainvalsplit_places205.tar.gz of places.csail.mit.edu, both "
        "unpacked in {root}/places205",
    ),
    DataSet(
        key="aircraft",
        name="Airc",
        data=f"{_AIRCRAFT}#train",
        eval_data=f"{_AIRCRAFT}#test",
        val_data=f"{_AIRCRAFT}#val",
        metric="mean_per_class",
        classes=100,
        train=6_667,
        test=3_333,
        cls=87.3,
        normal=(17.1, 0.5),
        outlier=(79.1, 0.5),
        layout="fgvc-aircraft-2013b.tar.gz of robots.ox.ac.uk/~vgg/data/fgvc-aircraft, unpacked in {root}",
    ),
    DataSet(
        key="cifar10",
        name="CF10",
        **_tfds("cifar10"),
        classes=10,
        train=50_000,
        test=10_000,
        cls=99.4,
        normal=(97.1, 0.1),
        outlier=(99.3, 0.0),
    ),
    DataSet(
        key="cifar100",
        name="CF100",
        **_tfds("cifar100"),
        classes=100,
        train=50_000,
        test=10_000,
        cls=94.5,
        normal=(81.3, 0.3),
        outlier=(93.7, 0.0),
    ),
    DataSet(
        key="cub",
        name="CUB",
        **_tfds("caltech_birds2011"),
        classes=200,
        train=5_994,
        test=5_794,
        cls=91.3,
        normal=(18.6, 0.6),
        outlier=(84.9, 2.1),
    ),
    DataSet(
        key="caltech101",
        name="Cal101",
        **_tfds("caltech101"),
        metric="mean_per_class",
        classes=102,
        train=3_060,
        test=6_084,
        cls=96.9,
        normal=(73.2, 1.3),
        outlier=(97.6, 0.7),
    ),
    DataSet(
        key="cars",
        name="Cars",
        **_tfds("cars196"),
        classes=196,
        train=8_144,
        test=8_041,
        cls=91.5,
        normal=(10.8, 0.3),
        outlier=(85.2, 0.9),
    ),
    DataSet(
        key="dtd",
        name="DTD",
        **_tfds("dtd", val="validation"),
        classes=47,
        train=3_760,
        test=1_880,
        cls=85.2,
        normal=(63.1, 0.8),
        outlier=(84.9, 0.9),
    ),
    DataSet(
        key="flowers",
        name="Flow",
        **_tfds("oxford_flowers102", val="validation"),
        metric="mean_per_class",
        classes=102,
        train=2_040,
        test=6_149,
        cls=99.7,
        normal=(59.5, 1.2),
        outlier=(99.6, 0.0),
    ),
    DataSet(
        key="food",
        name="Food",
        **_tfds("food101", test="validation"),
        classes=101,
        train=75_750,
        test=25_250,
        cls=94.7,
        normal=(74.2, 0.3),
        outlier=(93.5, 0.2),
    ),
    DataSet(
        key="pets",
        name="Pets",
        **_tfds("oxford_iiit_pet"),
        metric="mean_per_class",
        classes=37,
        train=3_680,
        test=3_669,
        cls=96.9,
        normal=(47.8, 0.5),
        outlier=(94.1, 0.2),
    ),
    DataSet(
        key="sun397",
        name="SUN",
        **_tfds("sun397/standard-part1-120k"),
        classes=397,
        train=19_850,
        test=19_850,
        cls=78.6,
        normal=(37.7, 0.3),
        outlier=(78.5, 0.2),
    ),
    DataSet(
        key="voc07",
        name="VOC",
        data="voc:{root}/VOCdevkit/VOC2007#train",
        eval_data="voc:{root}/VOCdevkit/VOC2007#test",
        val_data="voc:{root}/VOCdevkit/VOC2007#val",
        metric="map11",
        classes=20,
        train=5_011,
        test=4_952,
        cls=89.1,
        normal=(70.8, 0.5),
        outlier=(89.7, 0.1),
        layout="VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of host.robots.ox.ac.uk, unpacked in {root}",
    ),
)

# The effect at a glance, in an hour: normal at most 19, outlier at least 79, and two that are quick.
QUICK = ("aircraft", "cars", "cub", "cifar10", "cifar100")


def chosen(keys: tuple[str, ...]) -> list[DataSet]:
    """The datasets of these keys, in the order of the table; all of them without keys.

    Raises:
      ValueError: for a key that is none of them.
    """
    unknown = sorted(set(keys) - {row.key for row in DATASETS})
    if unknown:
        raise ValueError(
            f"no dataset of table 1 is called {', '.join(unknown)}; {', '.join(r.key for r in DATASETS)} are"
        )
    return [row for row in DATASETS if not keys or row.key in keys]
