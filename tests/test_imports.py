"""What importing really loads, seen in a new interpreter: never PyTorch or TensorFlow, and JAX only where it computes.

test_architecture.py reads the import statements; here the other packages' imports count too.
"""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Importing a hidden package fails as if it were not installed, and `asked` keeps who was asked for.
HIDE = """
import sys

class Hide:
    def __init__(self, *names):
        self.names, self.asked = names, []

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}: hidden in this test", name=name)
"""


def run(program: str) -> str:
    """stdout of a program in a new interpreter that finds the package in this checkout."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HIDE + program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def modules_of(*parts: str) -> list[str]:
    """Names of all modules below a folder of the package, found without importing them."""
    folder = ROOT.joinpath("regvit_jax", *parts)
    prefix = ".".join(("regvit_jax", *parts, ""))
    return [prefix.rstrip("."), *(module.name for module in _below(folder, prefix))]


def _below(folder: Path, prefix: str):
    for module in pkgutil.iter_modules([str(folder)], prefix):
        yield module
        if module.ispkg:
            name = module.name.rpartition(".")[2]
            yield from _below(folder / name, f"{module.name}.")


def test_no_module_loads_pytorch_or_tensorflow():
    """Hidden, not only absent: a package that loads them where they are installed is seen on a machine without them."""
    names = modules_of()
    on_disk = {path.with_suffix("").as_posix() for path in ROOT.glob("regvit_jax/**/*.py")}
    assert len(names) == len(on_disk), "a folder without __init__.py hides its modules"
    asked = run(f"""
import importlib
sys.meta_path.insert(0, hide := Hide("torch", "tensorflow"))
for name in {names!r}:
    importlib.import_module(name)
print(hide.asked)
""")
    assert asked.strip() == "[]"


def test_import_regvit_jax_loads_nothing_heavy():
    loaded = run("""
before = set(sys.modules)
import regvit_jax
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
""")
    assert loaded.strip() == "['regvit_jax']"


def test_a_data_worker_starts_without_jax():
    """JAX is hidden: Grain imports it in its workers where it can (nothing of ours can help that), and does without."""
    names = ["regvit_jax.data.loader", "regvit_jax.data.transforms", *modules_of("data", "sources")]
    loaded = run(f"""
import importlib, runpy
sys.meta_path.insert(0, Hide("jax", "jaxlib"))
runpy.run_module("regvit_jax.main", run_name="__mp_main__", alter_sys=True)  # what a spawned process does first
for name in {names!r}:
    importlib.import_module(name)
print(len([name for name in sys.modules if name.startswith("regvit_jax.data.sources")]), "jax" in sys.modules)
""")
    assert loaded.split() == [str(len(modules_of("data", "sources"))), "False"]


def test_what_is_hidden_cannot_be_imported_and_is_noted():
    seen = run("""
sys.meta_path.insert(0, hide := Hide("jax"))
try:
    import jax.numpy
except ModuleNotFoundError:
    print(hide.asked)
""")
    assert seen.strip() == "['jax']"
