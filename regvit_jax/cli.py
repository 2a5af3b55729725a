"""The `regvit` command: thin doors to the package.

regvit train --config=C --workdir=W …      python -m regvit_jax.main
regvit eval --model=M --task=knn --data=S  measures a saved model or a workdir
regvit models                              names of architectures
"""

import argparse
import json
import logging
import pathlib
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit code: 0 done, 2 refused."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        return _train(argv[1:])
    args = _parser().parse_args(argv)
    from regvit_jax.main import set_up_logging

    set_up_logging()
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        logging.debug("refused", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regvit", description="Vision Transformers with registers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train, evaluate, resume: the options of python -m regvit_jax.main")

    models = commands.add_parser("models", help="list the names of architectures")
    models.set_defaults(run=_models)

    evaluate = commands.add_parser(
        "eval",
        help="measure a model",
        description="Measures a model on frozen features and prints a table.",
        epilog="example: regvit eval --model=runs/quickstart --task=knn --data=folder:/my/images --out=results.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--model", required=True, help="workdir of a run, or folder of rv.save_model")
    evaluate.add_argument(
        "--task", required=True, action="append", help="accuracy, knn, linear or maps; may be given several times"
    )
    evaluate.add_argument("--data", required=True, help="source the probe learns from, such as folder:/my/images#train")
    evaluate.add_argument(
        "--eval_data", default="", help="source it is measured on; default: the evaluation split of --data"
    )
    evaluate.add_argument("--out", default="", help="JSON file for the numbers; default: only printed")
    evaluate.add_argument(
        "--pictures", default=".", help="results and pictures go to its eval/TASK/ (default: the current folder)"
    )
    evaluate.add_argument(
        "--image_size", type=int, default=None, help="side of the images in pixels; default: the model's own"
    )
    evaluate.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the task, such as --set k=10,20"
    )
    evaluate.set_defaults(run=_eval)
    return parser


def _train(argv: list[str]) -> int:
    from absl import app

    from regvit_jax import main as trainer

    app.run(lambda rest: sys.exit(trainer.main(rest)), argv=["regvit train", *argv], flags_parser=trainer.parse_flags)
    return 0


def _models(args: argparse.Namespace) -> int:
    import regvit_jax as rv

    print("\n".join(rv.list_models()))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from regvit_jax import evaluate, hub, sharding
    from regvit_jax.config import evaluator
    from regvit_jax.data.sources import eval_split, holdout

    data, held_out = args.data, args.eval_data or eval_split(args.data)
    if held_out is None:
        data, held_out = holdout(args.data)
        logging.info("%s has no evaluation split: a fixed tenth of it is held out", args.data)
    tasks = {task: evaluator(task, **_options(task, args.set)) for task in args.task}
    evals = evaluate.build(tasks, data_train=data, data_eval=held_out)
    model = hub.load_model(args.model, image_size=args.image_size, dtype=args.dtype)
    logging.info("%s", model)
    found = evaluate.run(evals, model, mesh=sharding.make_mesh(), workdir=pathlib.Path(args.pictures))
    print(evaluate.table({pathlib.Path(args.model).name: found}))
    if args.out:
        record = {"model": args.model, "data": data, "eval_data": held_out, "metrics": found}
        pathlib.Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(args.out).write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _options(task: str, settings: list[str]) -> dict:
    """{key: value} of KEY=VALUE texts, typed as the task's own defaults are."""
    from regvit_jax.config import evaluator

    known = evaluator(task)
    out = {}
    for text in settings:
        name, equals, value = text.partition("=")
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
