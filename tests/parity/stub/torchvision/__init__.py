"""Stands in for torchvision where it is not installed: timm imports it for what it does to images; no model uses it.

Every module below it exists and is like it; every name in one is a class of its own, whose attributes are classes too.
"""

import importlib.machinery
import sys
import types


class _Name(type):
    def __getattr__(cls, name):
        return _made(cls, name)


class _Module(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        return _made(self, name)


class _Finder:
    """Finds and makes any module below torchvision."""

    def find_spec(self, name, path=None, target=None):
        inside = name.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def _made(owner, name):
    if name.startswith("__"):
        raise AttributeError(name)
    setattr(owner, name, _Name(name, (), {}))
    return owner.__dict__[name]


sys.modules[__name__].__class__ = _Module
sys.meta_path.append(_Finder())
