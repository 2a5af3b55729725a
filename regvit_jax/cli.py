"""The `regvit` command: thin doors to the package.

regvit train --config=C --workdir=W …      python -m regvit_jax.main
regvit eval --model=M --task=knn --data=S  measures a saved model or a workdir
regvit convert SRC DST --to=huggingface    weights to and from PyTorch libraries
regvit export MODEL DST                    a StableHLO program that runs without this package
regvit data check SOURCE                   what is in a dataset, and what is wrong with it
regvit data prepare SOURCE FOLDER          the same images, smaller, in shards that load fast
regvit models                              names of architectures
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit code: 0 done, 1 problems found or unfinished, 2 refused."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    args = _parser().parse_args(argv)
    args.command = shlex.join(["regvit", *argv])
    from regvit_jax import xla_flags
    from regvit_jax.main import set_up_logging

    set_up_logging()
    try:
        xla_flags.append()
        return args.run(args)
    except (ValueError, OSError) as error:
        logging.debug("refused", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2


_EVAL = """examples:
  regvit eval --model=runs/quickstart --task=knn --data=folder:/my/images --out=results.json
  regvit eval --model=runs/quickstart --task=segmentation --data=pairs:/my/photos,/my/masks?ignore=255 --untrained
  regvit eval --model=dinov2_vits14_reg4 --task=depth --data=nyud:/data/nyu --set layers=4
  regvit eval --model=dinov2_vits14_reg4 --config=configs/protocols/nyud_lin4.py --data=nyud:/data/nyu --out=nyud.json
--set KEY=VALUE changes an option of every task, --set TASK.KEY=VALUE of one; a wrong KEY lists those there are.
Stopped by Ctrl-C or killed, the same command goes on with heads that were being trained."""


def _parser() -> argparse.ArgumentParser:
    from regvit_jax.data import commands as data

    parser = argparse.ArgumentParser(prog="regvit", description="Vision Transformers with registers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train, evaluate, resume: the options of python -m regvit_jax.main")

    models = commands.add_parser("models", help="list the names of architectures")
    models.set_defaults(run=_models)

    _add_convert(commands)
    _add_export(commands)
    data.add(commands)
    evaluate = commands.add_parser(
        "eval",
        help="measure a model",
        description="Measures a model on frozen features and prints a table. Pictures go to PICTURES/eval/TASK/.",
        epilog=_EVAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--model", required=True, help="workdir of a run, or folder of rv.save_model")
    evaluate.add_argument(
        "--task",
        action="append",
        default=[],
        help="knn, linear, accuracy (of its own head), segmentation, depth, maps …; may be given several times",
    )
    evaluate.add_argument(
        "--config",
        default="",
        help="Python file with the tasks and their options: a published protocol of configs/protocols/, or the config "
        "of a run; --task then chooses among its tasks (default: all)",
    )
    evaluate.add_argument("--data", required=True, help="source the probe learns from, such as folder:/my/images#train")
    evaluate.add_argument(
        "--eval_data", default="", help="source it is measured on; default: the evaluation split of --data"
    )
    evaluate.add_argument(
        "--out", default="", help="JSON file for the numbers and how they were measured; default: only printed"
    )
    evaluate.add_argument(
        "--pictures", default=".", help="results and pictures go to its eval/TASK/ (default: the current folder)"
    )
    evaluate.add_argument(
        "--untrained", action="store_true", help="also measure the same network freshly initialised: a second column"
    )
    evaluate.add_argument(
        "--image_size", type=int, default=None, help="side of the images in pixels; default: the model's own"
    )
    evaluate.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option, such as --set k=10,20 or knn.k=10",
    )
    evaluate.set_defaults(run=_eval)
    return parser


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="weights to and from PyTorch libraries",
        description="Writes weights in another library's format into a folder, with a certificate of what was done.",
        epilog="example: regvit convert dinov2_vits14_reg4_pretrain.pth out/ --to=huggingface",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("src", help="file, folder, workdir, or a name such as dinov2_vits14_reg4")
    convert.add_argument("dst", help="folder to write; new, or of an earlier conversion of the same weights")
    convert.add_argument("--to", required=True, help="regvit, dinov2, timm, huggingface, deit3 or dino")
    convert.add_argument("--family", help="of SRC, where its keys cannot tell")
    convert.add_argument("--format", choices=("safetensors", "pth", "npz"), help="default: what users of --to expect")
    convert.add_argument("--container", help="which state dict of a training checkpoint, such as teacher")
    convert.add_argument("--head", help="file of a one-layer linear classifier that belongs to SRC")
    convert.add_argument("--registers", type=int, help="add so many fresh registers to weights that have none")
    convert.add_argument("--image_size", type=int, help="resample positions to this native side in pixels")
    convert.add_argument("--num_heads", type=int, help="of an unusual width, which keys do not tell")
    convert.add_argument(
        "--verify", choices=("torch",), help="also run the original in PyTorch and certify how far its outputs are"
    )
    convert.set_defaults(run=_convert)


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="a program that runs without this package",
        description="Writes a model as a StableHLO program (jax.export) that JAX runs without this package, with a\n"
        "manifest, DST.json, of inputs, outputs and preprocessing; prints code that uses it.",
        epilog="example: regvit export runs/quickstart vit.stablehlo --what=classifier --input=uint8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("model", help="file, folder, workdir, or a name such as dinov2_vits14_reg4")
    export.add_argument("dst", help="file to write, such as vit.stablehlo, or a folder for model.stablehlo")
    export.add_argument("--format", default="stablehlo", choices=("stablehlo",))
    export.add_argument(
        "--what",
        default="features",
        choices=("features", "classifier"),
        help="features (default): cls, registers, patches; classifier: logits",
    )
    export.add_argument("--platforms", default="cpu,cuda,tpu", help="of cpu, cuda, rocm, tpu (default: cpu,cuda,tpu)")
    export.add_argument("--batch", default="symbolic", help="symbolic (any size), or the one size it takes")
    export.add_argument("--image_size", help="side, or HEIGHT,WIDTH, in pixels; default: as the model preprocesses")
    export.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    export.add_argument(
        "--input", default="normalized", choices=("normalized", "uint8"), help="uint8: the program normalises"
    )
    export.add_argument(
        "--weights",
        default="auto",
        choices=("auto", "inside", "beside"),
        help="in the program, or in a file beside it (auto: inside up to 512 MiB)",
    )
    export.add_argument("--family", help="of MODEL, where its keys cannot tell")
    export.add_argument("--head", help="file of a one-layer linear classifier that belongs to MODEL")
    export.add_argument("--overwrite", action="store_true", help="also files that are not an earlier export")
    export.set_defaults(run=_export)


def _train(argv: list[str]) -> int:
    from absl import app

    from regvit_jax import main as trainer

    app.run(lambda rest: sys.exit(trainer.main(rest)), argv=["regvit train", *argv], flags_parser=trainer.parse_flags)
    return 0


def _models(args: argparse.Namespace) -> int:
    import regvit_jax as rv

    print("\n".join(rv.list_models()))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from regvit_jax import hub
    from regvit_jax.convert import certificate

    names = ("family", "container", "head", "registers", "image_size", "num_heads")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    made = hub.convert(args.src, args.dst, args.to, kind=args.format, with_torch=args.verify == "torch", **options)
    print(certificate.table(made))
    return 1 if made["verify"] and not made["verify"]["agrees"] else 0


def _export(args: argparse.Namespace) -> int:
    from regvit_jax import hub
    from regvit_jax.convert import export, export_manifest

    size = None if args.image_size is None else _integers("image_size", args.image_size, most=2)
    batch = None if args.batch == "symbolic" else _integers("batch", args.batch, most=1)[0]
    model = hub.load_model(args.model, family=args.family, head=args.head, dtype=args.dtype)
    try:
        said = export.export_model(
            model,
            args.dst,
            args.format,
            what=args.what,
            platforms=tuple(args.platforms.split(",")),
            batch=batch,
            image_size=size if size is None or len(size) == 2 else size[0],
            input=args.input,
            weights=args.weights,
            overwrite=args.overwrite,
        )
    except OSError as error:
        raise ValueError(f"{error}") from error
    place = pathlib.Path(args.dst)
    print(export_manifest.table(said, place if place.is_dir() else place.parent), end="")
    return 0


def _integers(name: str, text: str, *, most: int) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(parts) > most:
        raise ValueError(f"--{name} {text}: write {'a number' if most == 1 else 'one number, or two with a comma'}")
    return tuple(int(part) for part in parts)


def _eval(args: argparse.Namespace) -> int:
    from regvit_jax import evaluate, hub, sharding
    from regvit_jax.config import load
    from regvit_jax.data.sources import eval_split, holdout
    from regvit_jax.stopping import Stop, Stopped

    config = load(args.config) if args.config else None
    tasks = _tasks(config, args.task, args.set)
    data, held_out = args.data, args.eval_data or eval_split(args.data)
    if held_out is None:
        data, held_out = holdout(args.data)
        logging.info("%s has no evaluation split: a fixed tenth of it is held out", args.data)
    evals = evaluate.build(tasks, data_train=data, data_eval=held_out)
    model = _prepared(config, hub.load_model(args.model, image_size=_image_size(config, args), dtype=args.dtype))
    logging.info("%s", model)
    mesh, place = sharding.make_mesh(), pathlib.Path(args.pictures)
    rounds = {"untrained": (hub.untrained(model), place / "untrained")} if args.untrained else {}
    rounds[pathlib.Path(args.model).name] = model, place
    columns = {}
    try:
        with Stop() as stop, stop.breaking():
            for name, (network, folder) in rounds.items():
                columns[name] = evaluate.run(evals, network, mesh=mesh, workdir=folder)
    except Stopped:
        print(
            f"stopped: what was being trained is kept below {place / 'eval'}, the same command goes on", file=sys.stderr
        )
        return 1
    print(evaluate.table(columns))
    if args.out:
        record = {"command": args.command, "model": args.model, "data": data, "eval_data": held_out}
        record |= {"metrics": columns[pathlib.Path(args.model).name], "tasks": _records(place, evals)}
        if args.untrained:
            record |= {"untrained": columns["untrained"], "untrained_tasks": _records(place / "untrained", evals)}
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _tasks(config, chosen: list[str], settings: list[str]) -> dict:
    """{name: section of evaluator options}, of a config or of the defaults, with --set in them."""
    from regvit_jax.config import evaluator

    if config is None and not chosen:
        raise ValueError("nothing to measure: give --task, such as --task=knn, or --config")
    unknown = [] if config is None else [task for task in chosen if task not in config.evals]
    if unknown:
        raise ValueError(f"--task={unknown[0]} is not in the config: it has {', '.join(config.evals)}")
    names = chosen or list(config.evals)
    tasks = {name: evaluator(name) if config is None else config.evals[name] for name in names}
    for name, section in tasks.items():
        section.update(_options(name, section, settings, names))
    return tasks


def _image_size(config, args):
    """Side of the images: of the command, else of a protocol, else None, the model's own."""
    of_protocol = config.image_size if config is not None and "image_size" in config else None
    return of_protocol if args.image_size is None else args.image_size


def _prepared(config, model):
    """The model with the crop of a protocol, where that has one."""
    if config is None or "crop_ratio" not in config or config.crop_ratio is None:
        return model
    spec = dataclasses.replace(model.preprocessing, crop_ratio=config.crop_ratio)
    return dataclasses.replace(model, preprocessing=spec)


def _records(place: pathlib.Path, names) -> dict:
    """{task: what evaluate.run wrote of it}."""
    return {name: json.loads((place / "eval" / name / "results.json").read_text()) for name in names}


def _options(task: str, known: Mapping, settings: list[str], others: Sequence[str] = ()) -> dict:
    """{key: value} of KEY=VALUE and TASK.KEY=VALUE texts, typed as the values in `known` are; those of `others` are
    left to them."""
    out = {}
    for text in settings:
        name, equals, value = text.partition("=")
        owner, dot, rest = name.partition(".")
        if dot and owner != task and owner in others:
            continue
        name = rest if dot and owner == task else name
        if not equals or name not in known:
            raise ValueError(f"--set {text}: write KEY=VALUE with KEY one of {', '.join(known)}")
        out[name] = _typed(known[name], value)
    return out


def _typed(default, text: str):
    if isinstance(default, bool):
        return text.lower() in ("1", "true", "yes")
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        return tuple(kind(part) for part in text.split(",") if part)
    return type(default)(text)


if __name__ == "__main__":
    sys.exit(main())
