"""Evaluators: what is measured of a frozen model. A new one is a file here and a line in EVALUATORS.

    knn = KNN(data="npz:cifar10.npz", eval_data="npz:cifar10.npz#test")
    knn.run(model, mesh=mesh, out_dir="out")                                # {"top1": 0.71, …}

A module of the table offers its class as `EVALUATOR`; `regvit_jax.evaluate` builds evaluators from a config and runs
them.
"""

import dataclasses
import difflib
import importlib
from typing import Any, ClassVar

EVALUATORS = {
    "accuracy": "regvit_jax.evals.accuracy",
    "depth": "regvit_jax.evals.depth",
    "discovery": "regvit_jax.evals.discovery",
    "knn": "regvit_jax.evals.knn",
    "linear": "regvit_jax.evals.linear",
    "linear_grid": "regvit_jax.evals.linear_grid",
    "local": "regvit_jax.evals.local_probes",
    "logreg": "regvit_jax.evals.logreg",
    "maps": "regvit_jax.evals.maps",
    "norms": "regvit_jax.evals.norms",
    "segmentation": "regvit_jax.evals.segmentation",
    "tokens": "regvit_jax.evals.single_token",
}


def option(default: Any, doc: str) -> Any:
    """A field of an evaluator: its default, which gives the type too, and its meaning in one line."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The options of every evaluator. A subclass is a frozen dataclass that adds its own by `option` and defines `run`.

    Options have the type of their default (a list is taken for a tuple, an int for a float), so that they survive JSON
    and command lines; `__post_init__` of a subclass calls this one first, then checks values.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("data", "eval_data")  # the sources without which it cannot run
    TRUTH: ClassVar[str] = ""  # what their samples must have beside an image: label | mask | depth | boxes

    data: str = option("", "source that it learns from; empty: data.train of the run")
    eval_data: str = option("", "source that it is measured on; empty: data.eval, or what belongs to `data`")
    batch_size: int = option(256, "images in one forward pass, over all devices; changes speed and memory only")
    workers: int = option(0, "processes that decode images; 0: threads of this one")
    cache_dir: str = option("", "folder that keeps features from one run to the next; empty: none is kept")
    max_bad: float = option(
        0.01, "share of a source's images that may be unreadable: left out, and counted as unreadable in results.json"
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _typed(type(self).__name__, field.name, getattr(self, field.name), field.default)
            object.__setattr__(self, field.name, value)
        self.check("batch_size", self.batch_size >= 1, "at least 1")
        self.check("workers", self.workers >= 0, "0 or more")
        self.check("max_bad", 0 <= self.max_bad <= 1, "a share, from 0 to 1")

    def check(self, name: str, good: bool, allowed: str) -> None:
        """Raises ValueError that names the option, what it may be and what it is, unless `good`."""
        if not good:
            raise ValueError(f"{type(self).__name__}: {name} must be {allowed}, got {getattr(self, name)!r}")

    def run(self, model, *, mesh, out_dir) -> dict[str, float]:
        """Measures a Model.

        Args:
          model: a Model, on any devices; evaluators change neither its weights nor its dtype.
          mesh: where to compute. Every process of the run makes the same call.
          out_dir: folder for what is not a number; made on demand, written by process 0 only.

        Returns:
          {metric: Python float}, the same on every process.
        """
        raise NotImplementedError


def get(kind: str) -> type[Evaluator]:
    """The evaluator class of a name in EVALUATORS.

    Raises:
      ValueError: for another name, with the nearest known one.
    """
    if kind not in EVALUATORS:
        raise ValueError(f"no evaluator is called {kind!r}; {suggest(kind, EVALUATORS)}")
    return importlib.import_module(EVALUATORS[kind]).EVALUATOR


def suggest(word: str, known) -> str:
    """The end of an error message about a misspelt name."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(sorted(known))}"


def _typed(owner: str, name: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`."""
    if isinstance(default, tuple):
        if isinstance(value, tuple | list):
            return tuple(_typed(owner, f"{name}[{i}]", item, default[0]) for i, item in enumerate(value))
    elif isinstance(default, float) and type(value) is int:
        return float(value)
    elif type(value) is type(default):
        return value
    raise ValueError(f"{owner}: {name} takes a {type(default).__name__} such as {default!r}, got {value!r}")
