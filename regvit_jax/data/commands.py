"""`regvit data check` and `regvit data prepare`: their options, what they print, their exit codes."""

import argparse
import json
import pathlib
import sys

_SOURCES = """sources:
  folder:PATH        any tree of images: classes are folders, train/ and val/ are splits
  npz:FILE           encoded images in one file
  imagenet:PATH      ImageNet-1k: train/WNID/*.JPEG, val/ flat with its list of classes or in class folders
  imagenet22k:PATH   ImageNet-22k: WNID.tar, read without unpacking, or class folders
  ade20k:PATH        ADEChallengeData2016: images/ and annotations/ with training/ and validation/
  nyud:PATH          NYU Depth v2 by the lists of BTS, or rgb_*.jpg beside sync_depth_*.png
  pairs:IMAGES,MAPS  any images with masks (?ignore=255) or depth (?depth=0.001): two folders, or paths with *
  voc:PATH           PASCAL VOC or a tree of its form: boxes, or masks (?set=segmentation)
  coco:PATH          COCO or what has its form: annotations/instances_val2017.json, val2017/; ?list=FILE for COCO20k
  boxes:PATH         images of your own with boxes: a boxes.json, or XML beside them
  tfds:NAME@DIR      what TFDS prepared as array_record; tfds:@FOLDER for one folder of it
  tfrecord:PATH      what TFDS prepared as TFRecord, read without TensorFlow; or files of tf.train.Example
  tar:PATH           WebDataset shards: a folder, FOLDER/train-*.tar or FOLDER/train-{000000..000146}.tar
  scenes:            the built-in renderer
#train, #val, #train[:80%] behind one choose a part.

regvit data check --help and regvit data prepare --help have the options."""

_CHECK = """exit code: 0 all is well, 1 problems were found (notes are none), 2 the source cannot be opened

examples:
  regvit data check folder:/my/images
  regvit data check imagenet:/data/imagenet#val --all          decode every file: about 100 a second and core
  regvit data check tfds:@/data/imagenet256 --json=found.json --picture="""

_PREPARE = """exit code: 0 complete, 1 stopped (run it again), 2 refused

examples:
  regvit data prepare imagenet:/data/imagenet /data/imagenet256 --workers=16
  regvit data prepare folder:/my/images /data/mine --format=raw    no decoding while training, 5 to 10 times the disk
  regvit data prepare "imagenet22k:/data/22k#[:90%]" /data/22k256
  python -m regvit_jax.main --config=C --workdir=W --config.data.train=tfds:@/data/mine#train"""


def add(commands) -> None:
    """Adds `data` to the subcommands of `regvit`."""
    raw = argparse.RawDescriptionHelpFormatter
    data = commands.add_parser(
        "data",
        help="look at a dataset, or make it fast to read",
        description="Looks at a dataset before a run spends a day on it, or writes it smaller, to be read fast.",
        epilog=_SOURCES,
        formatter_class=raw,
    )
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="count, decode a sample, say what is wrong, draw a contact sheet",
        description="Counts a dataset, decodes a sample of each split, says what is wrong, and draws a contact sheet.",
        epilog=_CHECK,
        formatter_class=raw,
    )
    check.add_argument("source", help="such as folder:/my/images; with #split only that one, else all splits")
    check.add_argument("--sample", type=int, default=1000, help="images of each split to decode (default: 1000)")
    check.add_argument("--all", action="store_true", help="decode all of them")
    check.add_argument(
        "--picture", default="contact_sheet.png", help="the contact sheet; empty: none (default: contact_sheet.png)"
    )
    check.add_argument("--json", default="", help="file for the report; default: only printed")
    check.set_defaults(run=_check)
    prepare = commands.add_parser(
        "prepare",
        help="write smaller images into shards that load fast",
        description="Writes a dataset anew as array_record shards, the short side of every image at --size (smaller\n"
        "ones stay). Unreadable files are left out and named in FOLDER/report.json. Killed at any time,\n"
        "the same command goes on. Order, labels and captions stay; masks, depth and boxes are not written.",
        epilog=_PREPARE,
        formatter_class=raw,
    )
    prepare.add_argument("source", help="such as imagenet:/data/imagenet; with #split only that one, else all splits")
    prepare.add_argument("folder", help="new or empty, or one that this command left unfinished")
    prepare.add_argument("--size", type=int, default=256, help="short side in pixels (default: 256)")
    prepare.add_argument("--format", default="jpeg", choices=("jpeg", "raw"), help="default: jpeg")
    prepare.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100 (default: 95)")
    prepare.add_argument("--shards", type=int, default=None, help="of the largest split (default: by its size)")
    prepare.add_argument("--splits", default="", help="such as train,val (default: all)")
    prepare.add_argument("--workers", type=int, default=2, help="processes (default: 2); 0 works in this one")
    prepare.add_argument(
        "--max_bad", type=float, default=0.01, help="share of unreadable images past which it stops (default: 0.01)"
    )
    prepare.set_defaults(run=_prepare)


def _check(args: argparse.Namespace) -> int:
    from regvit_jax.data.check import check
    from regvit_jax.data.check_report import as_text

    if args.sample < 1:
        raise ValueError(f"--sample is 1 or more, got {args.sample}; --all decodes all")
    report = check(args.source, sample=0 if args.all else args.sample, picture=args.picture)
    print(as_text(report))
    if args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["problems"] else 0


def _prepare(args: argparse.Namespace) -> int:
    from regvit_jax.data.prepare import Unfinished, prepare

    options = ("size", "format", "quality", "shards", "workers", "max_bad", "command")
    try:
        report = prepare(
            args.source,
            args.folder,
            splits=tuple(split for split in args.splits.split(",") if split),
            **{name: getattr(args, name) for name in options},
        )
    except Unfinished as error:
        print(f"unfinished: {error}", file=sys.stderr)
        return 1
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ValueError(str(error)) from error
    except OSError as error:  # the disk is full
        print(f"unfinished: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: finished shards are kept, the same command goes on", file=sys.stderr)
        return 1
    counts = ", ".join(f"{split} {count:,}" for split, count in report["images"].items())
    print(f"{args.folder}: {counts} images, {report['bytes'] / 1e6:,.0f} MB in {report['seconds']:.0f} s")
    for split, name, reason in report["left_out"][:20]:
        print(f"  left out: {split}: {name}: {reason}")
    if len(report["left_out"]) > 20:
        print(f"  and {len(report['left_out']) - 20} more: {args.folder}/report.json has them all")
    if report["not_written"]:
        print(f"  not written: {', '.join(report['not_written'])}; only images, labels and captions are")
    print(f"train on it: --config.data.train=tfds:@{args.folder}#{next(iter(report['images']))}")
    return 0
