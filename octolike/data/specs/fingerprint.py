"""A digest of values and of the computation of functions, the same in every process.

The digest of a function covers its instructions, constants, defaults and closure, and, recursively,
the functions, classes, objects and plain values that it reaches through global names, in the
project and in the user's files. Functions of libraries count by their qualified name and the
version of their distribution. Line numbers, comments, docstrings, annotations, file names, module
names and the addresses of objects do not count.

Limits: the digest

- differs between minor versions of Python, which compile the same source to other instructions;
- does not see names that are computed (`getattr(module, name)`, `exec`), nor files, environment
  variables and other inputs that a function reads when it runs;
- covers an object of a library by its pickled state, or by its type alone if it cannot be pickled;
- changes with every constant, error messages included, and with the names of local variables;
- covers module-level state as it is now: a function should not change the globals that it reads.
"""

from __future__ import annotations

import bisect
import copyreg
import dis
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))
_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
_IGNORED_INSTRUCTIONS = {"NOP", "EXTENDED_ARG", "CACHE"}
# Entries of a class body that describe its source rather than its behaviour.
_CLASS_METADATA = {"__doc__", "__firstlineno__", "__static_attributes__"}
_MODULE_METADATA = {"__name__", "__file__", "__doc__", "__spec__", "__package__", "__builtins__"}
_STANDARD_LIBRARY = tuple(
    str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib")
)


def code_digest(*values: Any, without: tuple[Any, ...] = ()) -> str:
    """Return 16 hexadecimal digits for values and functions (see the module's docstring).

    without: objects that do not count wherever they are reached.
    """
    encoder = _Encoder(without)
    for value in values:
        encoder.add(value)
    return hashlib.sha256(json.dumps(encoder.tokens).encode()).hexdigest()[:16]


class _Encoder:
    """Writes values as a list of texts, each object once and then as a reference to its number."""

    def __init__(self, without: tuple[Any, ...]) -> None:
        self.tokens: list[str] = []
        self._without = without
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an object that is collected would free its id for another

    def add(self, value: Any) -> None:
        """Append a value of any type."""
        if any(value is x for x in self._without):
            self._write("left out")
        elif type(value) in _PLAIN:
            self._write(f"{type(value).__name__} {value!r}")
        elif type(value) is tuple:
            self._add_items("tuple", value)
        elif isinstance(value, (set, frozenset)):
            self._write("set", *sorted(code_digest(x, without=self._without) for x in value))
        elif isinstance(value, types.CodeType):
            self._add_code(value)
        elif isinstance(value, types.ModuleType):
            self._add_module(value, (), set())
        elif isinstance(value, np.generic) or type(value) is np.ndarray:
            self._add_array(np.asarray(value))
        elif id(value) in self._numbers:
            self._write(f"object {self._numbers[id(value)]}")
        else:
            self._numbers[id(value)] = len(self._numbers)
            self._alive.append(value)
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            self._add_items(_type_name(value), value)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._add_items(_type_name(value), [x for item in value.items() for x in item])
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_items("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._add_items("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, (classmethod, staticmethod)):
            self._add_items(_type_name(value), (value.__func__,))
        elif isinstance(value, property):
            self._add_items("property", (value.fget, value.fset, value.fdel))
        elif isinstance(value, types.BuiltinFunctionType):
            self._write(f"builtin {value.__qualname__}", *_version(value.__module__ or "builtins"))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, enum.Enum):
            self._add_items("enum", (type(value), value.name, value.value))
        elif hasattr(value, "__wrapped__"):  # functools.cache, jax.jit
            self._add_items(_type_name(value), (value.__wrapped__,))
        else:
            self._add_instance(value)

    def _add_items(self, kind: str, items: Any) -> None:
        self._write(f"{kind} of {len(items)}")
        for item in items:
            self.add(item)

    def _add_array(self, array: np.ndarray) -> None:
        if array.dtype.hasobject:
            self._add_items("array", (array.shape, array.tolist()))
        else:
            content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            self._write(f"array {array.dtype.str} {array.shape} {content}")

    def _add_function(self, function: types.FunctionType) -> None:
        code, scope = function.__code__, function.__globals__
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        closure = {name: _content(cell) for name, cell in cells.items()}
        module = scope.get("__name__", "")
        if _is_library(module, code.co_filename):
            self._write(f"function {function.__qualname__}", *_version(module))
            # A decorator of a library holds the user's function.
            callables = (types.FunctionType, types.MethodType, functools.partial)
            contents = [*closure.values(), getattr(function, "__wrapped__", None)]
            self._add_items("holds", [x for x in contents if isinstance(x, callables)])
            return
        self._write("function")
        self._add_code(code)
        attributes = {k: v for k, v in vars(function).items() if k != "__wrapped__"}
        self._add_items(
            "context", (function.__defaults__, function.__kwdefaults__, closure, attributes)
        )
        names = {name for x in _nested(code) for name in x.co_names}
        for name in sorted(_global_names(code) - _MODULE_METADATA):
            self._write(f"global {name}")
            if name in scope:
                self._add_global(scope[name], names)
            else:
                self._write("builtin" if name in _builtin_names() else "undefined")
        for name in sorted(_imported_names(code)):
            self._write(f"import {name}")
            self._add_global(_import(name), names)

    def _add_global(self, value: Any, names: set[str]) -> None:
        if isinstance(value, types.ModuleType):
            self._add_module(value, names, set())
        else:
            self.add(value)

    def _add_module(self, module: types.ModuleType, names: Any, visited: set[int]) -> None:
        """Append the attributes of a project's module that `names` lists."""
        if _is_library(module.__name__, getattr(module, "__file__", None)):
            self._write(f"module {module.__name__}", *_version(module.__name__))
            return
        visited.add(id(module))
        for name in sorted(set(names) & vars(module).keys() - _MODULE_METADATA):
            value = vars(module)[name]
            self._write(f"attribute {name}")
            if not isinstance(value, types.ModuleType):
                self.add(value)
            elif id(value) not in visited:
                self._add_module(value, names, visited)

    def _add_class(self, kind: type) -> None:
        module = sys.modules.get(kind.__module__)
        if _is_library(kind.__module__, getattr(module, "__file__", None)):
            self._write(f"class {kind.__qualname__}", *_version(kind.__module__))
            return
        self._add_items(f"class {kind.__qualname__}", kind.__bases__)
        for name, value in sorted(vars(kind).items()):
            code = getattr(value, "__code__", None)
            generated = code is not None and code.co_filename.startswith("<string>")
            methods = (types.FunctionType, classmethod, staticmethod, property)
            metadata = name.startswith("__") and not isinstance(value, methods)
            if not generated and not metadata:
                self._write(f"attribute {name}")
                self.add(value)
        for field in getattr(kind, "__dataclass_fields__", {}).values():
            self._add_items(f"field {field.name}", (field.default, field.default_factory))

    def _add_instance(self, value: Any) -> None:
        kind = type(value)
        module = sys.modules.get(kind.__module__)
        if not _is_library(kind.__module__, getattr(module, "__file__", None)):
            slots = [s for base in kind.__mro__ for s in base.__dict__.get("__slots__", ())]
            state = {s: getattr(value, s) for s in slots if hasattr(value, s)}
            self._add_items("instance", (kind, state | getattr(value, "__dict__", {})))
            return
        self._write(f"instance {kind.__qualname__}", *_version(kind.__module__))
        if isinstance(value, logging.Logger):
            return  # its name may be that of the module
        try:
            reduce = copyreg.dispatch_table.get(kind)  # numpy's ufuncs have an entry
            reduced: Any = reduce(value) if reduce else value.__reduce_ex__(2)
        except Exception:  # any library's: it cannot be pickled
            self._write("without state")
        else:
            parts = reduced if isinstance(reduced, str) else reduced[:3]
            more = [] if isinstance(reduced, str) else [list(x or ()) for x in reduced[3:5]]
            self._add_items("state", (parts, *more))

    def _add_code(self, code: types.CodeType) -> None:
        """Append the instructions of a code object; a jump by the number of its target."""
        instructions = list(_instructions(code))
        offsets = [i.offset for i in instructions]
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self._write(
            f"code {code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount} "
            f"{code.co_flags & _FLAGS} {arguments}"
        )
        for i in instructions:
            self._write(i.opname)
            if i.opcode in dis.hasconst:
                self.add(i.argval)
            elif i.opcode in {*dis.hasjrel, *dis.hasjabs}:
                self._write(str(bisect.bisect_left(offsets, i.argval)))
            elif i.opcode in {*dis.hasname, *dis.haslocal, *dis.hasfree}:
                self._write(str(i.argval))
            else:
                self._write(str(i.arg))
        for entry in getattr(dis.Bytecode(code), "exception_entries", ()):
            limits = (entry.start, entry.end, entry.target)
            bounds = [bisect.bisect_left(offsets, x) for x in limits]
            self._write(f"handler {bounds} {entry.depth} {entry.lasti}")

    def _write(self, *tokens: str) -> None:
        self.tokens += tokens


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions that do something, without the metadata that class bodies store."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _IGNORED_INSTRUCTIONS]
    metadata = {
        i
        for i, x in enumerate(instructions)
        if x.opname == "STORE_NAME" and x.argval in _CLASS_METADATA
    }
    skipped = metadata | {i - 1 for i in metadata}
    return (x for i, x in enumerate(instructions) if i not in skipped)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and those of the functions, classes and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _global_names(code: types.CodeType) -> set[str]:
    loads = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
    return {i.argval for x in _nested(code) for i in _instructions(x) if i.opname in loads}


def _imported_names(code: types.CodeType) -> set[str]:
    return {i.argval for x in _nested(code) for i in _instructions(x) if i.opname == "IMPORT_NAME"}


def _import(name: str) -> Any:
    """Return a module that a function imports when it runs; its name if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return name


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not assigned yet


def _type_name(value: Any) -> str:
    return type(value).__qualname__


@functools.cache
def _builtin_names() -> frozenset[str]:
    return frozenset(dir(importlib.import_module("builtins")))


def _is_library(module: str, file: str | None) -> bool:
    """Return whether a module belongs to a library rather than to octolike or to the user."""
    top = module.partition(".")[0]
    if top == "octolike":
        return False  # installed in site-packages, too
    if file and not file.startswith("<"):
        path = Path(file).resolve()
        installed = {"site-packages", "dist-packages"} & set(path.parts)
        return bool(installed) or str(path).startswith(_STANDARD_LIBRARY)
    return top in sys.stdlib_module_names or top in _distributions()


@functools.cache
def _version(module: str) -> tuple[str, ...]:
    """Return a module's name with the version of its distribution, or that of Python."""
    top = module.partition(".")[0]
    versions = [f"{d} {importlib.metadata.version(d)}" for d in _distributions().get(top, ())]
    if versions:
        return (module, *sorted(set(versions)))
    return (module, f"python {sys.version_info.major}.{sys.version_info.minor}")


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()
