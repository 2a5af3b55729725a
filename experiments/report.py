"""What the scripts of all tables share: networks and data from the command line, and the table with published numbers
beside ours.

    sys.exit(report.main(Experiment(…)))

OUT/TABLE.md, .json and .png hold the table, OUT/NAME/ what was measured of the network NAME. What is there is not
measured again, and scripts that measure the same share it where they share OUT.
"""

import argparse
import dataclasses
import logging
import pathlib
import re
import sys
from collections.abc import Callable

import measurements
import stand_ins
from measurements import Measurement, opened
from results_table import Column, Table, published

from regvit_jax import hub, sharding, xla_flags
from regvit_jax.evaluate import data_pair
from regvit_jax.main import set_up_logging
from regvit_jax.stopping import Stop, Stopped

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
      name: of its files.
      title: of the table.
      help: text of --help: the docstring of the script.
      columns: those of the published data sets.
      published: rows of the paper, {label: {column: value, or (value, standard deviation)}}.
      measure: arguments -> the measurements on published data sets.
      stand_in: arguments -> those on data that is always there.
      notes: below the table: where published numbers come from, what is not published.
      arguments: adds options to the parser.
      finish: (table, arguments), before the table is written.
      draw: (table, path of the picture), instead of the bars.
    """

    name: str
    title: str
    help: str
    columns: tuple[Column, ...]
    published: dict
    measure: Callable[[argparse.Namespace], list[Measurement]]
    stand_in: Callable[[argparse.Namespace], list[Measurement]]
    notes: tuple[str, ...] = ()
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    finish: Callable[[Table, argparse.Namespace], None] | None = None
    draw: Callable[[Table, pathlib.Path], None] | None = None


def main(experiment: Experiment, argv: list[str] | None = None, *, mesh=None) -> int:
    """Runs a script, on all devices or on `mesh`. Returns the exit code: 0 done, 1 stopped, 2 refused."""
    parser = _parser(experiment)
    args = parser.parse_args(argv)
    set_up_logging()
    try:
        xla_flags.append()
        with Stop() as stop, stop.breaking():
            table = _run(experiment, args, mesh)
        table.write(args.out / experiment.name)
        if experiment.draw:
            experiment.draw(table, args.out / f"{experiment.name}.png")
    except Stopped:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        logging.debug("refused", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.out / f"{experiment.name}.md").read_text(encoding="utf-8"))
    print(f"wrote {args.out / experiment.name}.md, .json and .png")
    return 0


def _parser(experiment):
    parser = argparse.ArgumentParser(
        description=experiment.help, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    several = dict(action="append", default=[])
    parser.add_argument("--model", **several, metavar="NAME=PATH", help="a row: its name, and what rv.load_model takes")
    parser.add_argument("--data_root", default="data", help="folder of the data sets (default: data)")
    parser.add_argument("--data", **several, metavar="KEY=SOURCE", help="of one data set, the source to learn from")
    parser.add_argument("--eval_data", **several, metavar="KEY=SOURCE", help="the one to measure on")
    parser.add_argument("--val_data", **several, metavar="KEY=SOURCE", help="the one to choose on, where there is one")
    parser.add_argument("--only", default="", metavar="KEY,KEY", help="these data sets alone")
    parser.add_argument("--skip_missing", action="store_true", help="leave out data sets that are not there")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs", experiment.name),
        help=f"default: runs/{experiment.name}",
    )
    parser.add_argument("--set", **several, metavar="KEY=VALUE", help="option of all evaluators; TYPE.KEY=VALUE of one")
    parser.add_argument("--image_size", type=int, help="side in pixels, where the protocol prescribes another")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--stand_in", action="store_true", help="on rendered scenes, and small networks without --model"
    )
    if experiment.arguments:
        experiment.arguments(parser)
    return parser


def _run(experiment, args, mesh):
    models = _pairs("model", args.model)
    for name in models:
        if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name):
            raise ValueError(f"--model {name}=…: the name becomes a folder: use letters, digits and any of _ - + .")
    if args.stand_in:
        models = models or stand_ins.models(args.out / "stand_ins")
        wanted = experiment.stand_in(args)
    elif models:
        wanted = _there(_chosen(experiment.measure(args), args), args.skip_missing)
    else:
        raise ValueError("no network is named: --model NAME=PATH, or --stand_in to see what this does")
    table = Table(experiment.title, list(experiment.columns), published(experiment.published), list(experiment.notes))
    mesh = sharding.make_mesh() if mesh is None else mesh
    for name, path in models.items():
        model = hub.load_model(path, dtype=args.dtype)
        _log.info("%s: %s", name, model)
        for one in wanted:
            folder, changes = measurements.measure(
                one, name, model, args.out, settings=args.set, image_size=args.image_size, mesh=mesh
            )
            measurements.fill(table, one, name, folder, changes)
    if experiment.finish:
        experiment.finish(table, args)
    return table


def _pairs(option, texts):
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and value) or key in pairs:
            raise ValueError(
                f"--{option} {text}: write {'NAME=PATH' if option == 'model' else 'KEY=SOURCE'}, each once"
            )
        pairs[key] = value
    return pairs


def _chosen(wanted, args):
    """The measurements of --only, on the sources that --data and the like name."""
    named = {part: _pairs(part, getattr(args, part)) for part in ("data", "eval_data", "val_data")}
    known = dict.fromkeys(one.dataset.key for one in wanted)
    only = [key for key in args.only.split(",") if key] or list(known)
    for key in (*only, *(key for pairs in named.values() for key in pairs)):
        if key not in known:
            raise ValueError(f"no data set is called {key!r} here: there are {', '.join(known)}")
    return [
        dataclasses.replace(one, dataset=_placed(one.dataset.below(args.data_root), named))
        for one in wanted
        if one.dataset.key in only
    ]


def _placed(dataset, named):
    train, test, val = (named[part].get(dataset.key, "") for part in ("data", "eval_data", "val_data"))
    if not (train or test or val):
        return dataset
    if not dataset.train:  # nothing is learnt
        return dataclasses.replace(dataset, test=test or train)
    if not train:
        raise ValueError(f"--data {dataset.key}=SOURCE is missing: name all sources of a data set, or none")
    train, test = data_pair(train, test)
    return dataclasses.replace(dataset, train=train, test=test, val=val)


def _there(wanted, skip):
    """The measurements whose data can be opened. All that is missing is told at once, before anything is computed."""
    kept, missing = [], {}
    for one in wanted:
        dataset = one.dataset
        try:
            for spec in filter(None, (dataset.train, dataset.val, dataset.test)):
                opened(spec)
            kept.append(one)
        except (ValueError, OSError) as error:
            missing[dataset.key] = f"{dataset.key}: {error}\n    {dataset.get}"
    if missing and not skip:
        raise FileNotFoundError(
            "\n  ".join(["these data sets are not there", *missing.values()])
            + "\n--data KEY=SOURCE names another place, --only KEY,KEY those to take, --skip_missing leaves these out"
        )
    for text in missing.values():
        _log.warning("left out: %s", text.replace("\n   ", ";"))
    return kept
