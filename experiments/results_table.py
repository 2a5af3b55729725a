"""Tables with published numbers beside ours: Markdown, JSON and a picture of bars.

A column belongs to one data set. What was measured on anything else stands in a column of its own, which says on what.
"""

import dataclasses
import json
import os
import pathlib

MISSING = "–"
_PER_LINE = 5  # panels of the picture


@dataclasses.dataclass(frozen=True)
class Column:
    """What stands in one column.

    Attributes:
      key: its name in the JSON file.
      title: its heading.
      measure: of what, such as "top-1, %".
      scale, digits: what a metric is multiplied by, and its decimals.
    """

    key: str
    title: str
    measure: str
    scale: float = 100.0
    digits: int = 1


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number in the unit of its column; `note` becomes a footnote, `results` names the file with all about it."""

    value: float
    std: float | None = None
    note: str = ""
    results: str = ""


@dataclasses.dataclass
class Row:
    """One line: of the paper, or measured."""

    label: str
    published: bool = False
    cells: dict[str, Cell] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Table:
    """Columns in their order, rows in theirs."""

    title: str
    columns: list[Column]
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)

    def put(self, label: str, column: Column, cell: Cell) -> None:
        """A measured number; its row and column are made where they are not there."""
        if column.key not in {known.key for known in self.columns}:
            self.columns.append(column)
        row = next((row for row in self.rows if row.label == label and not row.published), None)
        if row is None:
            row = Row(label)
            self.rows.append(row)
        row.cells[column.key] = cell

    def write(self, stem: str | os.PathLike) -> list[pathlib.Path]:
        """Writes STEM.md, STEM.json and STEM.png; returns their paths."""
        stem = pathlib.Path(stem)
        stem.parent.mkdir(parents=True, exist_ok=True)
        texts = {".md": markdown(self), ".json": json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)}
        for ending, text in texts.items():
            unfinished = stem.with_name(f".{stem.name}{ending}")
            unfinished.write_text(text + "\n", encoding="utf-8")
            os.replace(unfinished, stem.with_name(stem.name + ending))
        draw(self, stem.with_name(f"{stem.name}.png"))
        return [stem.with_name(stem.name + ending) for ending in (*texts, ".png")]


def published(rows: dict[str, dict[str, float | tuple[float, float]]]) -> list[Row]:
    """Rows of the paper: {label: {column: value or (value, standard deviation)}}."""
    return [
        Row(label, True, {key: Cell(*value) if isinstance(value, tuple) else Cell(value) for key, value in row.items()})
        for label, row in rows.items()
    ]


def markdown(table: Table) -> str:
    """The table as GitHub and people read it; what was measured stands in bold."""
    numbers: dict[str, int] = {}
    heading = ["", *(f"{column.title}<br>{column.measure}" for column in table.columns)]
    lines = [heading, ["---"] + ["---:"] * len(table.columns)]
    for row in table.rows:
        label = f"published: {row.label}" if row.published else f"**{row.label}**"
        lines.append([label, *(_text(row, column, numbers) for column in table.columns)])
    body = [f"# {table.title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""]
    body += [f"[{number}] {note}\n" for note, number in numbers.items()]
    return "\n".join([*body, *(f"{note}\n" for note in table.notes)]).rstrip()


def draw(table: Table, path: pathlib.Path) -> None:
    """Bars, a panel a column: published ones grey, measured ones blue."""
    # The object interface: no window system, and no state shared with other pictures of the program.
    from matplotlib.figure import Figure

    columns = [column for column in table.columns if any(column.key in row.cells for row in table.rows)]
    if not columns:
        return
    wide = min(_PER_LINE, len(columns))
    high = -(-len(columns) // wide)
    height = 0.9 + 0.2 * len(table.rows)
    figure = Figure(figsize=(2.2 + 2.1 * wide, high * height), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).reshape(-1)
    labels = [f"{row.label}, published" if row.published else row.label for row in table.rows]
    for place, (axis, column) in enumerate(zip(axes, columns, strict=False)):
        for y, row in enumerate(table.rows):
            if cell := row.cells.get(column.key):
                axis.barh(y, cell.value, xerr=cell.std, color="0.7" if row.published else "C0", height=0.75)
                axis.text(0, y, f" {cell.value:.{column.digits}f}", va="center", fontsize=6)
        axis.set_yticks(range(len(labels)), labels if place % wide == 0 else [""] * len(labels), fontsize=6)
        axis.set(ylim=(len(labels) - 0.5, -0.5), xlim=(0, None))
        axis.set_title(f"{_wrapped(column.title)}\n{column.measure}", fontsize=7, parse_math=False)
        axis.tick_params(axis="x", labelsize=6)
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    save(figure, path)


def save(figure, path: pathlib.Path) -> None:
    """Writes a matplotlib Figure as a PNG file, whole or not at all."""
    from regvit_jax.evals import pictures

    pictures.save(path, figure)


def _text(row, column, numbers):
    cell = row.cells.get(column.key)
    if cell is None:
        return MISSING
    text = f"{cell.value:.{column.digits}f}" + (f" ± {cell.std:.{column.digits}f}" if cell.std is not None else "")
    mark = f" [{numbers.setdefault(cell.note, len(numbers) + 1)}]" if cell.note else ""
    return (text if row.published else f"**{text}**") + mark


def _wrapped(text, width=26):
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1] + word) < width else [*lines, word]
    return "\n".join(lines)
