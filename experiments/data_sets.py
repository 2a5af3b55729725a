"""The data sets of the paper's tables: where each is expected, how large the published one is, where to get it.

Paths begin with {root}, the --data_root of a script. Most of table 1 (table1/datasets.py) comes through TFDS, which
needs TensorFlow to prepare it; what its own download, or table1/arrange.py, left below {root} is taken instead.
"""

import dataclasses
import pathlib

from table1.datasets import DATASETS

ARRANGE = "python experiments/table1/arrange.py"
TOLERANCE = 0.01  # of the numbers of images: some files of a copy are broken or gone


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set of a table.

    Attributes:
      key: what --data and --only call it.
      title: what the table calls it.
      train, val, test: sources; `val`, where there is one, chooses and then is learnt from too. `train` is empty where
        nothing is learnt.
      counts: images of the published data set, (train and val together, test); None for a stand-in, which never counts
        as published.
      classes: number of classes; None where it has none.
      metric: how table 1 measures it.
      get: what to download and how to lay it out.
      instead: (path, source without split, "#test", "" or "#val"): if there is such a path, the source to take.
    """

    key: str
    title: str
    train: str
    test: str
    val: str = ""
    counts: tuple[int, int] | None = None
    classes: int | None = None
    metric: str = "top1"
    get: str = ""
    instead: tuple[str, str, str, str] | None = None

    def below(self, root: str) -> "Dataset":
        """The same with {root} put in."""
        texts = {name: getattr(self, name) for name in ("train", "val", "test", "get")}
        if self.instead and pathlib.Path(self.instead[0].replace("{root}", root)).expanduser().exists():
            _, source, test, val = self.instead
            texts |= {"train": f"{source}#train", "test": source + test, "val": source + val if val else ""}
        return dataclasses.replace(self, **{name: text.replace("{root}", root) for name, text in texts.items()})

    def is_published(self, images: tuple[int, int], classes: int | None) -> bool:
        """Whether sources of so many images and classes are this data set, and not a part of it or another one."""
        if self.counts is None or classes != self.classes:
            return False
        return all(abs(n - known) <= TOLERANCE * known for n, known in zip(images, self.counts, strict=True))


def _transfer(row) -> Dataset:
    """One row of table 1."""
    get, instead = row.layout, None
    if row.key in _DOWNLOADS:
        page, path, source, val = _DOWNLOADS[row.key]
        make = f"; {ARRANGE} {row.key} DOWNLOAD {path}" if source is None else f" and unpack it as {path}/"
        get += f"; or, without TensorFlow, download {page}{make}"
        kind = "npz" if path.endswith(".npz") else "folder"
        instead = (path, source or f"{kind}:{path}", "#test", val)
    sources = (row.data, row.eval_data, row.val_data)
    size = ((row.train, row.test), row.classes, row.metric)
    return Dataset(row.key, row.name, *sources, *size, get, instead)


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
# Page, place below {root}, source (None: what arrange.py makes there), "#val" where it has one.
_DOWNLOADS = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "{root}/cifar10.npz", None, ""),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "{root}/cifar100.npz", None, ""),
    "cub": ("https://www.vision.caltech.edu/datasets/cub_200_2011/", "{root}/cub", None, ""),
    "caltech101": ("https://data.caltech.edu/records/mzrjq-6wc02", "{root}/caltech101", None, ""),
    "cars": ("Stanford Cars (its own page is gone, mirrors hold the files)", "{root}/cars", None, ""),
    "flowers": (f"{_OXFORD}/flowers/102/", "{root}/flowers", None, "#val"),
    "dtd": (
        f"{_OXFORD}/dtd/",
        "{root}/dtd",
        "list:{root}/dtd?images=images&train=labels/train1.txt&val=labels/val1.txt&test=labels/test1.txt",
        "#val",
    ),
    "food": (
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        "{root}/food-101",
        "list:{root}/food-101?images=images&train=meta/train.txt&test=meta/test.txt",
        "",
    ),
    "pets": (
        f"{_OXFORD}/pets/",
        "{root}/pets",
        "list:{root}/pets?images=images&train=annotations/trainval.txt&test=annotations/test.txt",
        "",
    ),
}

TRANSFER = tuple(map(_transfer, DATASETS))
(IMAGENET,) = (dataset for dataset in TRANSFER if dataset.key == "imagenet")

ADE20K = Dataset(
    "ade20k",
    "ADE20k",
    "ade20k:{root}/ADEChallengeData2016#train",
    "ade20k:{root}/ADEChallengeData2016#val",
    "",
    (20_210, 2000),
    150,
    get="download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack it below {root}",
)
NYUD = Dataset(
    "nyud",
    "NYUd",
    "nyud:{root}/nyu#train",
    "nyud:{root}/nyu#test",
    "",
    (24_231, 654),
    get="download the NYU Depth v2 pairs and lists that https://github.com/cleinc/bts names (sync.zip and the official "
    "test split): {root}/nyu/nyudepthv2_{train,test}_files_with_gt.txt, sync/ and official_splits/test/",
)


_VOC = (
    "download VOC{year} trainval of http://host.robots.ox.ac.uk/pascal/VOC/ and unpack it below {{root}}: "
    "{{root}}/VOCdevkit/VOC{year}/JPEGImages/, Annotations/ and ImageSets/Main/"
)


def _discovery(key, title, source, images, classes, get):
    return Dataset(key, title, "", source, "", (0, images), classes, "corloc", get)


DISCOVERY = (
    *(
        _discovery(
            f"voc{year % 100:02}",
            f"VOC{year}",
            f"voc:{{root}}/VOCdevkit?year={year}#trainval",
            images,
            20,
            _VOC.format(year=year),
        )
        for year, images in ((2007, 5011), (2012, 11_540))
    ),
    _discovery(
        "coco20k",
        "COCO 20k",
        "coco:{root}/coco?list=coco_20k_filenames.txt",
        19_817,
        80,
        "download train2014 and the 2014 annotations from https://cocodataset.org: {root}/coco/train2014/ and "
        "annotations/instances_train2014.json; and the list datasets/coco_20k_filenames.txt of "
        "https://github.com/valeoai/LOST into {root}/coco/",
    ),
)


def scenes(what: str, *, size: int = 32, train: int = 48, test: int = 24) -> Dataset:
    """The stand-in: rendered scenes, with whatever can be measured of them."""
    name = f"scenes:?size={size}&n={train}&n_test={test}"
    return Dataset("scenes", f"scenes, a stand-in ({what})", f"{name}#train", f"{name}#test")
