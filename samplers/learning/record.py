"""Records: what was learned of a model, as arrays and what is said of them, and their files.

A kind of record is a dataclass whose fields are declared by `array`, `group` and `said`; they are checked
when one is made, so also when a file is read. A new kind is one such class.
"""
from __future__ import annotations

import os
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, ClassVar, Iterator, Mapping

import numpy as np

from .storage import GREATEST, CalibrationError, read_checked, write_checked

KINDS: dict[str, type[Record]] = {}
"""By the format of their files."""
Shape = Callable[[int], tuple]
"""shape(n) of an array: n is the length of lam; a text stands for any number, ... at the end for any more
axes."""


def array(shape: Shape, optional: bool = False, infinite: bool = False) -> Any:
    """An array [shape(n)], kept as float64. optional: or None. infinite: it may hold infinities."""
    return field(default=None if optional else MISSING, metadata={"shape": shape, "infinite": infinite})


def group(prefix: str, write: Callable[[Any], Mapping[str, np.ndarray]],
          read: Callable[[dict[str, np.ndarray]], Any], default: Callable[[], Any]) -> Any:
    """What is kept as arrays of its own: those of write(it) as prefix.name, of which read makes it; or the
    default."""
    return field(default_factory=default, metadata={"group": (prefix, write, read)})


def said(default: str | None) -> Any:
    """A text that a file says in about."""
    return field(default=default, metadata={"said": True})


@dataclass(frozen=True, eq=False)
class Record:
    """Arrays over lam, an increasing grid or schedule. about: what they are of, as storage.ABOUT allows."""

    format: ClassVar[str]
    about: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __init_subclass__(cls, format: str | None = None) -> None:
        if format:
            cls.format = format
            KINDS[format] = cls

    def __post_init__(self) -> None:
        """CalibrationError for arrays that do not fit together, that are not finite or of no possible size,
        or where lam does not increase."""
        n = len(self.lam) if self.lam.ndim else 0
        if self.lam.ndim != 1 or n < 2:
            raise CalibrationError(
                f"lam has shape {list(self.lam.shape)}: it must be a list of at least two numbers")
        for of in _having(self, "shape"):
            value = getattr(self, of.name)
            if value is not None:
                _check_shape(of.name, value, of.metadata["shape"](n))
                if not of.metadata["infinite"]:
                    _check_finite(of.name, value)
        falls = np.flatnonzero(~(np.diff(self.lam) > 0))
        if len(falls):
            i = int(falls[0])
            raise CalibrationError(f"lam must increase, but lam[{i + 1}] = {self.lam[i + 1]:.6g} after "
                                   f"lam[{i}] = {self.lam[i]:.6g}")
        for name, value in self._groups():
            _check_finite(name, value)

    def _groups(self) -> Iterator[tuple[str, np.ndarray]]:
        for of in _having(self, "group"):
            prefix, write, _ = of.metadata["group"]
            if (value := getattr(self, of.name)) is not None:
                yield from ((f"{prefix}.{name}", part) for name, part in write(value).items())

    def arrays(self) -> dict[str, np.ndarray]:
        """All that a file of it holds."""
        own = {of.name: getattr(self, of.name) for of in _having(self, "shape")}
        return {**{name: value for name, value in own.items() if value is not None}, **dict(self._groups())}

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Write the file whole or not at all; FileExistsError if it exists, unless told to overwrite."""
        about = {**self.about, **{of.name: getattr(self, of.name) for of in _having(self, "said")}}
        write_checked(Path(path), self.format, self.arrays(), about, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Record:
        """Read and check a file of this kind; CalibrationError says what is wrong with it."""
        return _loaded(Path(path), {cls.format: cls})


def load_calibration(path: str | os.PathLike) -> Record:
    """Read and check a file of whatever kind; CalibrationError says what is wrong with it."""
    return _loaded(Path(path), KINDS)


def _loaded(path: Path, kinds: Mapping[str, type[Record]]) -> Record:
    found, tensors, about = read_checked(path, tuple(kinds))
    kind, values = kinds[found], {}
    for of in _having(kind, "shape"):
        if of.name in tensors:
            values[of.name] = tensors[of.name].astype(np.float64)
        elif of.default is MISSING:
            raise CalibrationError(f"{path}: the tensor {of.name!r} is missing; it has "
                                   f"{', '.join(sorted(tensors)) or 'none'}")
    try:
        for of in _having(kind, "group"):
            prefix, _, read = of.metadata["group"]
            own = {
                name[len(prefix) + 1:]: value for name, value in tensors.items()
                if name.startswith(f"{prefix}.")
            }
            values |= {of.name: read(own)} if own else {}
        return kind(**values, **{of.name: about.get(of.name, "") for of in _having(kind, "said")},
                    about=about)
    except CalibrationError as fault:
        raise CalibrationError(f"{path}: {fault}") from None


def _having(record: Any, what: str) -> list[Field]:
    return [of for of in fields(record) if what in of.metadata]


def _check_shape(name: str, value: np.ndarray, wanted: tuple) -> None:
    more = wanted[-1] is ...
    sizes = wanted[:-1] if more else wanted
    fits = value.size and (value.ndim == len(sizes) or more and value.ndim > len(sizes))
    if not fits or any(isinstance(size, int) and size != own for size, own in zip(sizes, value.shape)):
        shown = ", ".join("..." if size is ... else str(size) for size in wanted)
        raise CalibrationError(f"{name} has shape {list(value.shape)}: it must be [{shown}]")


def _check_finite(name: str, value: np.ndarray) -> None:
    wrong = ~(np.abs(value, dtype=np.float64) <= GREATEST)  # float16 takes it for infinite
    if wrong.any():
        raise CalibrationError(f"{name} has {int(wrong.sum())} values that are not finite, or beyond "
                               f"{GREATEST:.0e}")
