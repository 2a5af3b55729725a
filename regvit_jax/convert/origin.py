"""Where a model's weights came from: enough to write them back under the same names, in the same number formats."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The record of one conversion into a Model.

    Attributes:
      family: whose key table was used.
      why: how that was known.
      keys: {the table's key: (the source's own key, its dtype)}, in the source's order.
      dropped: {the source's key: why it is not part of the network}.
      files: JSON files of its folder that describe it, by name ({} for a bare state dict).
      source: {"name", "sha256", "container"} of the file; {} for arrays in memory.
      notes: what was done to the weights since (registers added, positions resampled), for people.
    """

    family: str
    why: str
    keys: dict[str, tuple[str, str]]
    dropped: dict[str, str]
    files: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What stands before every one of the table's keys; "" if not the same before all."""
        found = {own[: len(own) - len(key)] for key, (own, _) in self.keys.items() if own.endswith(key)}
        return found.pop() if len(found) == 1 else ""

    @property
    def dtype(self) -> str:
        """The one number format of all arrays, or "mixed"."""
        found = {dtype for _, dtype in self.keys.values()}
        return found.pop() if len(found) == 1 else "mixed"

    def noted(self, *notes: str) -> "Origin":
        return dataclasses.replace(self, notes=self.notes + notes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Origin":
        keys = {key: tuple(value) for key, value in fields["keys"].items()}
        return cls(**(fields | {"keys": keys, "notes": tuple(fields["notes"])}))
