"""Pickles read as data: a machine for the opcodes that tensors and plain containers need. It imports and calls nothing.

A name in the pickle ("collections OrderedDict") stays a name. The few that PyTorch writes around tensors are known
here and become `Tensor`, `Storage` and `Table`; an object of another class becomes an `Opaque` that remembers the class
and nothing else; a call of anything else, or a name that only an attack contains, is refused. Nested containers are
never walked or hashed, so a small pickle of ever-doubling lists stays small.
"""

import pickletools
from typing import Any, NamedTuple

from regvit_jax.convert.archive import WeightsError

# A training checkpoint of a ViT-g takes some 50,000 opcodes. Each makes at most one small object.
MAX_OPCODES = 2_000_000
MAX_LINE = 1024  # bytes of a module's or class's name

# Of the built-in names, those that plain data is made of. The first four come with their content and stand for it.
SEQUENCES = {"list", "tuple", "set", "frozenset"}
BUILTINS = SEQUENCES | set("dict int long float bool complex str unicode bytes bytearray object slice range".split())
# Called by pickles of plain data beside tensors: NumPy scalars and arrays, dates, paths. Their results stay opaque.
INERT_CALLS = {
    "_codecs.encode",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "datetime.datetime",
    "datetime.date",
    "datetime.timedelta",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    "torch.serialization._get_layout",
}
# Modules that no weights file has a reason to name. What they offer would not be called here in any case.
HOSTILE = set(
    "os posix nt posixpath ntpath sys subprocess shutil pty popen2 commands socket ssl http urllib ftplib smtplib "
    "telnetlib webbrowser requests runpy importlib imp pkgutil zipimport pickle _pickle cPickle shelve marshal dill "
    "cloudpickle joblib ctypes _ctypes cffi code codeop ast compileall py_compile timeit cProfile profile pdb bdb "
    "trace inspect types operator _operator functools _functools itertools multiprocessing concurrent threading "
    "_thread asyncio signal atexit gc site sysconfig tempfile io _io builtins __builtin__ pip setuptools".split()
)
HOSTILE_PARTS = ("torch.hub.", "torch.jit.", "torch.utils.cpp_extension.", "numpy.testing.", "numpy.f2py.")


class Global(NamedTuple):
    """A name. It is looked up nowhere."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Table(dict):
    """A dict or OrderedDict. `attributes`: what was set on the object itself, such as a state dict's `_metadata`."""

    def __init__(self):
        super().__init__()
        self.attributes: dict = {}


class Opaque:
    """What is left of an object of a class that is not read: the name of the class."""

    def __init__(self, of: str):
        self.of = of


class Storage(NamedTuple):
    """A run of numbers outside the pickle. dtype: PyTorch's name ("float32"), "bytes" where the tensor says it."""

    dtype: str
    key: str
    numel: int
    view: tuple[int, int] | None = None  # (first element, number of elements), where it is a part of the run


class Tensor(NamedTuple):
    """A window into a storage: `offset` and `stride` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "bytes",
    "_UntypedStorage": "bytes",
}
_UTILS = "torch._utils"
_MARK = object()


class Window:
    """The file object that `pickletools` wants, over bytes in memory: reads past the end are short, lines bounded."""

    def __init__(self, data: memoryview, at: int = 0):
        self._data, self._at = data, at

    def read(self, n: int) -> bytes:
        if n < 0:
            raise WeightsError("the pickle declares a negative length")
        chunk = bytes(self._data[self._at : self._at + n])
        self._at += len(chunk)
        return chunk

    def readline(self) -> bytes:
        line = bytes(self._data[self._at : self._at + MAX_LINE])
        line = line[: line.find(b"\n") + 1]
        if not line:
            raise WeightsError("the pickle has a name without an end")
        self._at += len(line)
        return line

    def tell(self) -> int:
        return self._at


def load(data: memoryview, at: int = 0) -> tuple[Any, int]:
    """The object that a pickle describes, and where the bytes after it begin.

    Returns:
      None, bool, int, float, str, bytes, tuple, list (sets too), Table, Tensor, Storage, Global or Opaque.

    Raises:
      WeightsError: for a damaged pickle, an opcode or a call outside the list, or one that is too long.
    """
    window = Window(data, at)
    try:
        return _Machine().run(window), window.tell()
    except WeightsError:
        raise
    # Whatever a damaged pickle runs into: the stack is empty, a number is no index, text is no UTF-8.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise WeightsError(f"the pickle is damaged ({type(error).__name__} near byte {window.tell()})") from error


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, window: Window) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(window)):
            if number >= MAX_OPCODES:
                raise WeightsError(f"the pickle has over {MAX_OPCODES:,} opcodes: it holds more than weights")
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name == "STOP":
                return self.pop()
            elif name not in ("PROTO", "FRAME"):
                raise WeightsError(f"the pickle uses the opcode {name}, which tensors and plain containers do not need")
        raise WeightsError("the pickle has no end")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise WeightsError("the pickle is damaged: a mark where a value should be")
        return value

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise WeightsError("the pickle is damaged: a mark where a value should be")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:  # below the bottom: IndexError, a damaged pickle
            at -= 1
            if at < 0:
                raise WeightsError("the pickle is damaged: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def tuple_of(self, n: int) -> None:
        values = [self.pop() for _ in range(n)]
        self.stack.append(tuple(reversed(values)))

    def global_(self, argument: str | None) -> None:
        if argument is None:  # STACK_GLOBAL
            name, module = self.pop(), self.pop()
        else:
            module, _, name = argument.partition(" ")
        if type(module) is not str or type(name) is not str:
            raise WeightsError("the pickle is damaged: a name that is no text")
        named = Global(module, name)
        hostile = module.split(".")[0] in HOSTILE or f"{module}.".startswith(HOSTILE_PARTS)
        if hostile and not (module in ("builtins", "__builtin__") and name in BUILTINS):
            raise WeightsError(
                f"the pickle names {_short(named)}, which weights have no use for. It may be an attack: load the file "
                "with no other program either, and take the weights from their authors"
            )
        self.stack.append(named)

    def items(self, values: list) -> None:
        target = self.top()
        if len(values) % 2:
            raise WeightsError("the pickle is damaged: a key without a value")
        if isinstance(target, Opaque):
            return
        if not isinstance(target, Table):
            raise WeightsError(f"the pickle sets keys of a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing goes through all of a tuple or a long integer, every time: a hostile pickle makes that very much.
            plain = type(key) in (str, float, bool, bytes) or (type(key) is int and key.bit_length() <= 64)
            target[key if plain else Opaque(f"a key of type {type(key).__name__}")] = value

    def extend(self, values: list) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Opaque):
            raise WeightsError(f"the pickle appends to a {type(target).__name__}")

    def reduce(self, new: bool) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise WeightsError("the pickle calls something that is no name")
        self.stack.append(_call(function, arguments, new))

    def new_with_keywords(self) -> None:
        self.pop()
        self.reduce(new=True)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Table):
            target.attributes = state if isinstance(state, Table) else target.attributes
        elif not isinstance(target, Opaque):
            raise WeightsError(f"the pickle sets attributes of a {type(target).__name__}")

    def persistent(self) -> None:
        pid = self.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise WeightsError("the pickle refers to something outside itself that is no tensor storage")
        _, kind, key, _, numel, *view = pid
        known = type(kind) is Global and kind.module in ("torch", "torch.cuda", "torch.storage")
        if not known or type(key) is not str or not _count(numel):
            raise WeightsError("the pickle has a storage without a type, key or size")
        dtype = _STORAGES.get(kind.name, kind.name)  # one that is not known is refused when its numbers are wanted
        if view and view[0] is not None:
            _, first, size = view[0]
            if not _count(first) or not _count(size) or first + size > numel:
                raise WeightsError("the pickle has a storage that is a part of another one and reaches past it")
            self.stack.append(Storage(dtype, key, numel, (first, size)))
        else:
            self.stack.append(Storage(dtype, key, numel))


def _call(function: Global, arguments: tuple, new: bool) -> Any:
    """What a call in a pickle means; nothing is called."""
    name = str(function)
    if name == "collections.defaultdict" or (name == "collections.OrderedDict" and not arguments):
        return Table()
    if name == "torch.Size":
        return arguments[0]
    if name in (f"{_UTILS}._rebuild_tensor_v2", f"{_UTILS}._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if name == f"{_UTILS}._rebuild_tensor_v3":
        dtype = arguments[6]
        if type(dtype) is not Global or dtype.module != "torch":
            raise WeightsError("the pickle has a tensor without a dtype")
        return _tensor(*arguments[:4], dtype=dtype.name)
    if name in (f"{_UTILS}._rebuild_parameter", f"{_UTILS}._rebuild_parameter_with_state"):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        inner, _, inner_arguments, _ = arguments
        if type(inner) is Global and inner.module == _UTILS and type(inner_arguments) is tuple:
            return _call(inner, inner_arguments, new=False)
    if function.module in ("builtins", "__builtin__"):  # one of BUILTINS, global_ has seen to that
        if function.name in SEQUENCES and arguments and isinstance(arguments[0], list | tuple):
            return arguments[0]  # not copied: ten thousand copies of a long list would be much memory
        return Table() if function.name == "dict" and not arguments else Opaque(name)
    last = function.name.rpartition(".")[2].lstrip("_")
    rebuilt = function.module.split(".")[0] == "torch" and last.startswith("rebuild_")  # quantised, sparse, …
    if new or rebuilt or name in INERT_CALLS or last[:1].isupper():  # classes are written with a capital
        return Opaque(name)
    raise WeightsError(
        f"the pickle calls the function {_short(function)}: only tensors, plain containers and objects of classes are "
        "read. In the program that wrote the file, save the state dict alone: torch.save(model.state_dict(), path)"
    )


def _tensor(storage, offset, shape, stride, *, dtype: str | None = None) -> Tensor:
    if len(shape) != len(stride) or len(shape) > 16:
        raise WeightsError(f"the pickle has a tensor of {len(shape)} sizes and {len(stride)} strides")
    if type(storage) is not Storage or not all(map(_count, (offset, *shape, *stride))):
        raise WeightsError("the pickle has a tensor whose storage, sizes or strides are none")
    return Tensor(storage, offset, tuple(shape), tuple(stride), dtype or storage.dtype)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _short(value: Global) -> str:
    return repr(str(value)[:100])


_LITERALS = set(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING "
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT".split()
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_ACTIONS = {
    "EMPTY_DICT": lambda m, _: m.stack.append(Table()),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "FROZENSET": lambda m, _: m.stack.append(m.pop_to_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_to_mark()),
    "SETITEM": lambda m, _: m.items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.items(m.pop_to_mark()),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(None),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, name: m.global_(name),
    "STACK_GLOBAL": lambda m, _: m.global_(None),
    "REDUCE": lambda m, _: m.reduce(new=False),
    "NEWOBJ": lambda m, _: m.reduce(new=True),
    "NEWOBJ_EX": lambda m, _: m.new_with_keywords(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
}
