"""The house rules that can be read from the source text: floors, banned packages, light data workers, size of files.

Each rule is a function of {path: source} that returns its violations, so that its own tests can show it a bad file.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "regvit_jax"
TREES = ("regvit_jax", "configs", "experiments", "tests")

# Who lives on which floor. A room, a file or folder of the package, imports itself and lower floors, no neighbours.
FLOOR = {
    room: floor
    for floor, rooms in enumerate(
        (
            "trees sharding xla_flags provenance data/decode data/transforms",
            "flops ops losses config",
            "models optim",
            "state checkpoint metrics data convert workdir stopping",
            "recipes evals hub",
            "analysis",
            "evaluate loop train",
            "plan main cli __init__",
        )
    )
    for room in rooms.split()
}
ALSO = {
    ("sharding", "trees"),
    ("data/transforms", "data/decode"),
    ("loop", "evaluate"),
    ("train", "evaluate"),
    ("train", "loop"),
}  # neighbours that may look one way
NEVER = {("analysis", "recipes")}
TOP = FLOOR["main"]  # imports everything, its neighbours too

BANNED = {"torch", "torchvision", "tensorflow", "tensorflow_text", "timm", "transformers", "open_clip", "jax2tf"}
TORCH_DOOR = "regvit_jax/convert/verify.py"  # one function of it runs in a child process, beside the original

# What a data worker imports: the program's main module again (as multiprocessing does), then what its dataset names.
WORKER = ("main", *(f"data/{name}" for name in "__init__ loader workers decode transforms tokenizer sources/".split()))
SLOW_TO_START = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}


class Import(NamedTuple):
    module: str  # absolute, the deepest module that the statement names
    line: int
    function: str | None  # outermost function whose body holds the statement
    typing: bool  # below `if TYPE_CHECKING`: read by people and checkers, never run


def imports_of(path: str, sources: dict[str, str]) -> Iterator[Import]:
    """Every import statement of a file, inside functions too. `from a import b` is `a.b` where that is a module."""
    module = path.removesuffix(".py").replace("/", ".")
    package = module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]

    def walk(node: ast.AST, function: str | None, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, function, typing)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for name in node.names:
                deeper = f"{base}.{name.name}"
                # Of other people's packages it is unknown which names are modules: rules look at every part of them.
                only_a_name = base.split(".")[0] in TREES and file_of(deeper, sources) is None
                yield Import(base if only_a_name else deeper, node.lineno, function, typing)
        if function is None and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            function = getattr(node, "name", "lambda")
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, typing or (only_types and child in node.body))

    yield from walk(ast.parse(sources[path], path), None, False)


def file_of(module: str, sources: dict[str, str]) -> str | None:
    """The path of a module of the repository, None for a name that is none."""
    stem = module.replace(".", "/")
    return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in sources), None)


def room_of(path: str) -> str:
    inside = path.removeprefix(f"{PACKAGE}/").removesuffix(".py")
    return inside if inside in FLOOR else inside.split("/")[0]


def in_package(sources: dict[str, str]) -> list[str]:
    return [path for path in sources if path.startswith(f"{PACKAGE}/")]


def floors(sources: dict[str, str]) -> list[str]:
    """Imports between rooms that the table of floors does not allow, and rooms that it does not know."""
    bad = []
    for path in in_package(sources):
        room = room_of(path)
        if room not in FLOOR:
            bad.append(f"{path}: {room!r} stands on no floor: put it into an existing room, or change the design first")
            continue
        for found in imports_of(path, sources):
            if found.module.split(".")[0] != PACKAGE:
                continue
            target_path = file_of(found.module, sources)
            if target_path is None:
                bad.append(f"{path}:{found.line}: {found.module} does not exist")
                continue
            target = room_of(target_path)
            here, there = FLOOR[room], FLOOR.get(target, TOP + 1)
            lower = there < here and (room, target) not in NEVER
            if not (lower or target == room or (room, target) in ALSO or here == TOP):
                bad.append(f"{path}:{found.line}: {room} (floor {here}) imports {target} (floor {there})")
    return bad


def outsiders(sources: dict[str, str]) -> list[str]:
    """configs import regvit_jax.config alone of ours; nothing imports configs, experiments or tests."""
    bad = []
    for path in sources:
        for found in imports_of(path, sources):
            top = found.module.split(".")[0]
            if top in TREES and top != PACKAGE:
                bad.append(f"{path}:{found.line}: imports {found.module}; {top}/ is run and read, not imported")
            if path.startswith("configs/") and top == PACKAGE and found.module != f"{PACKAGE}.config":
                bad.append(f"{path}:{found.line}: a config imports {PACKAGE}.config only, not {found.module}")
    return bad


def banned(sources: dict[str, str]) -> list[str]:
    """PyTorch, TensorFlow and what drags them in, as statements or through importlib; safetensors.torch is torch."""
    bad, doors = [], set()
    for path in sources:
        if path.startswith("tests/"):  # a test may compare with the original where the extra [parity] is installed
            continue
        loaded = [(found.module, found.line, found.function) for found in imports_of(path, sources)]
        for module, line, function in [*loaded, *imported_by_name(sources[path], path)]:
            if not BANNED & set(module.split(".")) or module.split(".")[0] == PACKAGE:
                continue
            if path == TORCH_DOOR and function is not None:
                doors.add(function)
                continue
            bad.append(f"{path}:{line}: imports {module}; the one place for it is a function of {TORCH_DOOR}")
    if len(doors) > 1:
        bad.append(f"{TORCH_DOOR}: one function may import PyTorch, not {len(doors)}: {', '.join(sorted(doors))}")
    return bad


def imported_by_name(source: str, path: str) -> Iterator[tuple[str, int, str | None]]:
    """(module, line, outermost function) of import_module("…") and __import__("…") calls with a literal name."""
    tree = ast.parse(source, path)
    for top in tree.body:
        function = top.name if isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef) else None
        for node in ast.walk(top):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                    yield node.args[0].value, node.lineno, function


def heavy_workers(sources: dict[str, str]) -> list[str]:
    """Chains of imports outside functions by which a data worker, or `import regvit_jax`, would load JAX."""
    bad, seen = [], set()
    starts = [f"{PACKAGE}/__init__.py"]
    starts += [path for path in in_package(sources) if path.removeprefix(f"{PACKAGE}/").startswith(WORKER)]
    todo = [(path, path) for path in starts]
    while todo:
        path, chain = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for found in imports_of(path, sources):
            if found.function is not None or found.typing:
                continue
            if found.module.split(".")[0] in SLOW_TO_START:
                bad.append(f"{chain}:{found.line}: imports {found.module} outside functions: data workers wait for it")
            parts = found.module.split(".")
            if parts[0] == PACKAGE:  # a module runs the __init__ of every package above it first
                reached = [file_of(".".join(parts[: n + 1]), sources) for n in range(len(parts))]
                todo += [(file, f"{chain} -> {file}") for file in reached if file is not None]
    return bad


def size_and_names(sources: dict[str, str]) -> list[str]:
    """No file over 500 lines, no drawer called utils."""
    lines = {path: len(source.splitlines()) for path, source in sources.items()}
    bad = [f"{path}: {n} lines; over 500 it is more than one idea" for path, n in lines.items() if n > 500]
    bad += [f"{path}: name it by what it does" for path in sources if {"utils", "util"} & set(path[:-3].split("/"))]
    return bad


@pytest.fixture(scope="module")
def repository() -> dict[str, str]:
    files = [ROOT / "setup.py", *(path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py")))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize("rule", [floors, outsiders, banned, heavy_workers, size_and_names])
def test_the_house_keeps(rule, repository):
    assert rule(repository) == []


# Each rule is shown a house with one fault. EMPTY has the rooms that the faults look at.
ROOMS = (
    f"regvit_jax/{path}.py"
    for path in (
        "__init__ trees sharding flops config models/__init__ models/vit optim/__init__ state checkpoint metrics "
        "data/__init__ data/transforms data/loader data/augment data/sources/__init__ data/sources/folder "
        "convert/__init__ convert/verify recipes/__init__ recipes/clip evals/__init__ evals/knn hub "
        "analysis/__init__ evaluate train plan main cli"
    ).split()
)
EMPTY = dict.fromkeys(ROOMS, "")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trees", "import regvit_jax.sharding"),  # floor 0 looks one way
        ("data/transforms", "from regvit_jax import trees"),  # imports nothing of the package
        ("data/transforms", "from ..trees import named"),
        ("flops", "from regvit_jax.config import defaults"),  # neighbours
        ("optim/__init__", "from regvit_jax.models import vit"),
        ("models/vit", "from regvit_jax.data import transforms, loader"),  # the second name is the fault
        ("models/vit", "from regvit_jax.data import Preprocess"),  # the package, not its floor-0 file
        ("models/vit", "def f():\n    from regvit_jax import hub"),  # inside a function
        ("models/vit", "class A:\n    def f(self):\n        import regvit_jax.train as t"),
        ("state", "from regvit_jax.checkpoint import Checkpoints"),
        ("convert/verify", "from ..data.loader import x"),
        ("recipes/clip", "from regvit_jax.evals.knn import knn"),
        ("evals/knn", "from .. import hub"),
        ("hub", "import regvit_jax.recipes"),
        ("analysis/__init__", "from regvit_jax.recipes import clip"),
        ("evaluate", "from regvit_jax.train import run"),
        ("train", "from regvit_jax.plan import cost"),
        ("evals/knn", "import regvit_jax as rv\nrv.load_model"),  # the public face is the top floor
        ("evals/knn", "if TYPE_CHECKING:\n    from regvit_jax.train import State"),
        ("cli", "from regvit_jax.nowhere import x"),
        ("helpers", ""),  # a room without a floor
    ],
)
def test_a_forbidden_import_is_seen(path, source):
    assert len(floors(EMPTY | {f"regvit_jax/{path}.py": source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sharding", "from regvit_jax.trees import named"),
        ("models/vit", "from regvit_jax.data.transforms import Preprocess\nfrom regvit_jax import trees, sharding"),
        ("data/loader", "from regvit_jax.data.transforms import Preprocess\nfrom .sources import folder"),
        ("data/sources/folder", "from .. import transforms\nfrom regvit_jax.data import sources, loader"),
        ("analysis/__init__", "from regvit_jax.evals import knn\nfrom regvit_jax import hub"),
        ("evaluate", "from regvit_jax import hub\nfrom regvit_jax.recipes import clip"),
        ("train", "from regvit_jax.evaluate import run\nfrom regvit_jax.recipes import clip"),
        ("cli", "from regvit_jax import plan, main, train, __version__"),
        ("config", 'import importlib\nimportlib.import_module("regvit_jax.recipes.clip")'),  # the one upward door
    ],
)
def test_an_allowed_import_passes(path, source):
    assert floors(EMPTY | {f"regvit_jax/{path}.py": source}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("configs/a.py", "from regvit_jax import config, optim"),
        ("configs/a.py", "import regvit_jax as rv"),
        ("configs/a.py", "from configs.base import get_config"),
        ("regvit_jax/train.py", "from configs import quickstart"),
        ("tests/test_a.py", "def test():\n    import experiments.norms.plot"),
    ],
)
def test_configs_and_experiments_stand_apart(path, source):
    assert len(outsiders(EMPTY | {path: source})) == 1


def test_a_config_reads_defaults_and_whatever_else_is_installed():
    assert outsiders(EMPTY | {"configs/a.py": "import ml_collections\nfrom regvit_jax.config import defaults"}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("regvit_jax/hub.py", "import torch"),
        ("regvit_jax/hub.py", "def f():\n    import tensorflow as tf"),
        ("regvit_jax/hub.py", "from torch.nn import functional"),
        ("regvit_jax/hub.py", "from safetensors.torch import load_file"),
        ("regvit_jax/hub.py", "from safetensors import torch"),
        ("regvit_jax/hub.py", "from jax.experimental import jax2tf"),
        ("regvit_jax/hub.py", 'import importlib\ndef f():\n    return importlib.import_module("torch")'),
        ("experiments/norms/plot.py", "import timm"),
        ("regvit_jax/convert/verify.py", "import torch"),  # outside the function
        ("regvit_jax/convert/verify.py", "def a():\n    import torch\ndef b():\n    import timm"),  # a second function
    ],
)
def test_pytorch_and_tensorflow_are_seen(path, source):
    assert len(banned(EMPTY | {path: source})) == 1


def test_the_one_door_for_pytorch_and_tfds_without_tensorflow():
    door = "def outputs():\n    import torch\n    import timm\n    from transformers import Dinov2Model"
    tfds = "import tensorflow_datasets as tfds"
    assert banned(EMPTY | {TORCH_DOOR: door, "regvit_jax/data/sources/folder.py": tfds}) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__", "import jax"),
        ("main", "from regvit_jax import train"),  # train imports jax below
        ("data/__init__", "from regvit_jax.data.augment import flip"),
        ("data/transforms", "try:\n    import jax.numpy as jnp\nexcept ImportError:\n    pass"),
        ("data/sources/folder", "from flax import nnx"),
        ("models/__init__", "import jax"),  # reached because loader names a module below it
    ],
)
def test_a_worker_that_would_wait_for_jax_is_seen(path, source):
    house = EMPTY | {
        "regvit_jax/data/augment.py": "import jax",
        "regvit_jax/train.py": "import jax",
        "regvit_jax/data/loader.py": "from regvit_jax.models.vit import ViT",
    }
    assert len(heavy_workers(house | {f"regvit_jax/{path}.py": source})) == 1


def test_a_worker_may_name_jax_where_it_does_not_run():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef put(x):\n    import jax"
    assert heavy_workers(EMPTY | {"regvit_jax/main.py": source, "regvit_jax/data/augment.py": "import jax"}) == []


def test_long_files_and_drawers_are_seen():
    assert size_and_names({"regvit_jax/a.py": "x\n" * 500}) == []
    assert len(size_and_names({"tests/a.py": "x\n" * 501})) == 1
    assert len(size_and_names({"regvit_jax/evals/utils.py": ""})) == 1
    assert len(size_and_names({"regvit_jax/utils/a.py": ""})) == 1
