"""A family of weights: its key table applied strictly in both directions, nothing skipped and nothing invented."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from regvit_jax.convert import complaints
from regvit_jax.convert import shapes as from_shapes
from regvit_jax.convert.fit import Fitted, Flat, Holds, fit
from regvit_jax.convert.origin import Origin
from regvit_jax.convert.rows import FORMS, Row
from regvit_jax.data.transforms import Preprocess
from regvit_jax.models.config import ViTConfig

StateDict = Mapping[str, np.ndarray]
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a state dict holds: architecture, {our name: float32 array}, preprocessing, and the record of it."""

    config: ViTConfig
    flat: Flat
    preprocessing: Preprocess
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Family:
    """A naming scheme of released weights.

    Attributes:
      name: as users give it.
      rows: the key table. Rows whose keys are all absent are parts that this model does not have.
      configure: {our name: shape} -> fields of ViTConfig that follow from the family, not from a shape.
      holds: what it can express.
      signs: our names of which one must be there for the family to be recognised by keys alone.
      rename: (pattern, replacement) regular expressions applied to keys first: chunked block names, wrapper prefixes.
      dropped: (pattern, reason) of keys that are knowingly left behind.
      refused: (pattern, what it is) of keys that belong to a relative which this table does not describe.
      widths: {width: head count} of its sizes beside the usual ones.
      from_files: ({file name: JSON}, shapes) -> (fields of ViTConfig, Preprocess or None) of the files beside weights.
      to_files: (config, preprocessing, the origin's files) -> {file name: JSON} to lie beside them.
      prefix: (config, key) -> what is written before a key of the table.
      kind: "pth" or "safetensors", the weights file that its users expect.
      crop_ratio: of the evaluation crop these weights were made for.
      means: what choosing this family implies, for the message that asks to choose.
    """

    name: str
    rows: tuple[Row, ...]
    configure: Callable[[from_shapes.Shapes], dict]
    holds: Holds
    signs: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    widths: Mapping[int, int] = dataclasses.field(default_factory=dict)
    from_files: Callable[[dict, from_shapes.Shapes], tuple[dict, Preprocess | None]] | None = None
    to_files: Callable[[ViTConfig, Preprocess, dict], dict] | None = None
    prefix: Callable[[ViTConfig, str], str] = lambda config, key: ""
    kind: str = "pth"
    crop_ratio: float = 0.875
    means: str = ""

    def keys(self, state: Mapping) -> dict[str, str]:
        """{key of the table: the source's own key}, without those that are dropped."""
        out: dict[str, str] = {}
        for key in state:
            if self.reason(key):
                continue
            new = key
            for pattern, replacement in self.rename:
                new = re.sub(pattern, replacement, new)
            if new in out:
                raise ValueError(f"{self.name}: keys {out[new]!r} and {key!r} both mean {new!r}")
            out[new] = key
        return out

    def reason(self, key: str) -> str | None:
        """Why a key is knowingly left behind; None for one that is not."""
        return next((why for pattern, why in self.dropped if re.search(pattern, key)), None)

    def known(self, depth: int) -> set[str]:
        """Every key of the table for a network of so many blocks."""
        return {key for row in self.rows for i in range(depth if row.stacked else 1) for key in row.keys(i)}

    def unexplained(self, state: Mapping) -> list[str]:
        """Keys that no row of the table consumes and no pattern drops."""
        keys = self.keys(state)
        known = self.known(_depth(keys))
        return [keys[key] for key in keys if key not in known]

    def objections(self, state: StateDict, grid_known: bool = False) -> list[str]:
        """Why these keys cannot be of this family; empty if they can. Position rows tell where grids are squares."""
        out = [f"it does not know {key}" for key in self.unexplained(state)[:3]]
        keys = self.keys(state)
        found = {row.target: np.shape(state[keys[row.keys(0)[0]]]) for row in self.rows if row.keys(0)[0] in keys}
        if self.signs and not found.keys() & set(self.signs):
            out.append(f"there is no {' or '.join(self.signs)}")
        if not out and not grid_known and "pos_embed" in found:
            registers = found["register_tokens"][1] if "register_tokens" in found else 0
            rows = found["pos_embed"][1] if len(found["pos_embed"]) == 3 else 0
            if not from_shapes.readings(rows, "cls_token" in found, registers, self.holds.position):
                out.append(f"its position rows are for {' or '.join(self.holds.position)}, which {rows} rows are not")
        return out

    def read(
        self, state: StateDict, *, files: Mapping[str, dict] | None = None, why: str = "it was given", **given
    ) -> Reading:
        """Architecture, parameters and preprocessing of a state dict.

        Args:
          state: {name: array} with torch shapes.
          files: JSON files beside the weights, by name.
          why: how the family was known, for the record.
          **given: fields of ViTConfig that keys cannot tell (num_heads of an unusual width) or that differ
            (resampler).

        Raises:
          ValueError: if a key is not consumed, a parameter not filled, or a shape not right; names them and the nearest
            keys.
        """
        keys = self.keys(state)
        if leftover := self.unexplained(state):
            known = self.known(max(1, _depth(keys)))
            raise ValueError(f"{self.name}: {complaints.unknown_keys(leftover, known, self.refused)}")
        flat = dict(self.arrays(state))
        shapes = {name: array.shape for name, array in flat.items()}
        look = None
        fields = self.configure(shapes)
        if files and self.from_files is not None:
            said, look = self.from_files(dict(files), shapes)
            fields = fields | said
        config = self._config(shapes, fields | given)
        if problems := complaints.misfits(config, shapes, self.rows, keys):
            raise ValueError(f"{self.name}: the state dict does not fit the architecture: {'; '.join(problems[:8])}")
        look = look or Preprocess(size=min(config.image_size), crop_ratio=self.crop_ratio)
        origin = Origin(
            family=self.name,
            why=why,
            keys={new: (old, str(state[old].dtype)) for new, old in keys.items()},
            dropped={key: reason for key in state if (reason := self.reason(key))},
            files=dict(files or {}),
            notes=("float64 arrays were rounded to float32",)
            * any(array.dtype == np.float64 for array in state.values()),
        )
        return Reading(config, flat, look, origin)

    def arrays(self, state: StateDict) -> Iterator[tuple[str, np.ndarray]]:
        """(our name, float32 array) of every row that has its keys, one at a time.

        Raises:
          ValueError: for a row with some of its keys only, arrays that do not fit their form, or two rows of one name.
        """
        keys = self.keys(state)
        depth, done = _depth(keys), set()
        for row in self.rows:
            wanted = [row.keys(i) for i in range(depth if row.stacked else 1)]
            absent = [key for names in wanted for key in names if key not in keys]
            if len(absent) == sum(map(len, wanted)):
                continue
            if absent:
                raise ValueError(
                    f"{self.name}: {row.target} is incomplete, the state dict has no {', '.join(absent[:8])}"
                )
            if row.target in done:
                raise ValueError(f"{self.name}: two sources fill {row.target}")
            done.add(row.target)
            yield row.target, self._array(row, [[(key, state[keys[key]]) for key in names] for names in wanted])

    def _array(self, row: Row, blocks: list[list[tuple[str, np.ndarray]]]) -> np.ndarray:
        out = None
        for i, sources in enumerate(blocks):
            for key, array in sources:
                if str(array.dtype) not in FLOATS:
                    raise ValueError(f"{self.name}: {key} is {array.dtype}; weights are {', '.join(FLOATS)}")
            try:
                ours = FORMS[row.form].ours(*(np.asarray(array) for _, array in sources))
                if not row.stacked:
                    return np.ascontiguousarray(ours, dtype=np.float32)
                out = np.empty((len(blocks), *ours.shape), np.float32) if out is None else out
                if ours.shape != out.shape[1:]:
                    raise ValueError(f"block {i} has shape {ours.shape}, the others {out.shape[1:]}")
                out[i] = ours
            except (ValueError, IndexError) as error:
                shapes = {key: np.shape(array) for key, array in sources}
                raise ValueError(f"{self.name}: {row.target} cannot be made from {shapes}: {error}") from error
        return out

    def fitted(self, config: ViTConfig, flat: Flat) -> Fitted:
        """The network as this family holds it; see `fit`."""
        fitted = fit(self.name, self.holds, config, flat)
        theirs = self.configure({name: array.shape for name, array in fitted.flat.items()})["resampler"]
        if theirs == config.resampler or config.position == "none":
            return fitted
        note = f"at other sizes than the native one positions are resampled as {theirs} there, {config.resampler} here"
        return dataclasses.replace(fitted, resampler=theirs, notes=(*fitted.notes, note))

    def write(self, fitted: Fitted, origin: Origin | None = None) -> dict[str, np.ndarray]:
        """The state dict of a network, contiguous arrays with torch shapes.

        Args:
          fitted: from `fitted`.
          origin: of the model. Weights that came from this family get the names, order and number formats that they
            had; a number format is kept only where it holds the values exactly.

        Raises:
          ValueError: if a parameter has no row.
        """
        own = origin if origin is not None and origin.family == self.name else None
        uniform = origin.dtype if origin is not None else "mixed"
        out, left = {}, dict(fitted.flat)
        for row in self._rows_for(fitted, own):
            array = left.pop(row.target)
            for i, ours in enumerate(array if row.stacked else [array]):
                for key, theirs in zip(row.keys(i), FORMS[row.form].theirs(ours), strict=True):
                    if own is not None and key in own.keys:
                        name, dtype = own.keys[key]
                    elif own is not None and row.target in fitted.added:
                        continue  # The source did without it.
                    else:
                        name, dtype = self._name(fitted.config, key, own), uniform
                    out[name] = _as_it_was(theirs, dtype)
        if left:
            raise ValueError(f"{self.name}: no row for {', '.join(sorted(left))}")
        if own is not None:
            order = {name: i for i, (name, _) in enumerate(own.keys.values())}
            out = dict(sorted(out.items(), key=lambda item: order[item[0]] if item[0] in order else len(order)))
        return out

    def _name(self, config: ViTConfig, key: str, own: Origin | None) -> str:
        return (own.prefix if own is not None else self.prefix(config, key)) + key

    def _rows_for(self, fitted: Fitted, own: Origin | None) -> list[Row]:
        """The one row by which each parameter is written."""
        chosen: dict[str, Row] = {}
        for row in self.rows:
            if row.target not in fitted.flat or not row.fits(fitted.config.activation):
                continue
            theirs = own is not None and set(row.keys(0)) <= own.keys.keys()
            if row.target not in chosen or theirs:
                chosen[row.target] = row
        return list(chosen.values())

    def _config(self, shapes: from_shapes.Shapes, fields: dict) -> ViTConfig:
        heads = dict(self.widths) | from_shapes.HEADS
        found = from_shapes.config_fields(self.name, shapes, self.holds.position, heads, fields)
        return ViTConfig(**(found | fields))


def _depth(keys) -> int:
    """Number of blocks: one more than the highest index behind blocks. / layer. ."""
    numbers = [int(m[1]) for key in keys if (m := re.search(r"(?:blocks|layer)\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _as_it_was(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array, contiguous, in another number format if that holds every value."""
    array = np.ascontiguousarray(array)
    if dtype == "mixed" or str(array.dtype) == dtype:
        return array
    wanted = np.dtype(dtype) if dtype != "bfloat16" else _bfloat16()
    cast = array.astype(wanted)
    return cast if np.array_equal(cast.astype(array.dtype), array, equal_nan=True) else array


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
