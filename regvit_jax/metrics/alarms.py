"""Alarms: what a recipe finds wrong with a run is told when it lasts, and told once."""

from collections.abc import Mapping

PATIENCE = 5  # progress lines in a row: one bad batch is no alarm, and neither is a start that passes


class Alarms:
    """Counts how long each kind of trouble has lasted; holds what was told for as long as the process lives."""

    def __init__(self, patience: int = PATIENCE):
        self._patience = patience
        self._lasted: dict[str, int] = {}
        self._told: set[str] = set()

    def hear(self, found: Mapping[str, str]) -> list[str]:
        """The messages that are due.

        Args:
          found: {kind: message} of what is wrong now; a kind that is missing starts anew when it comes back.
        """
        self._lasted = {kind: self._lasted.get(kind, 0) + 1 for kind in found}
        due = [kind for kind, times in self._lasted.items() if times >= self._patience and kind not in self._told]
        self._told.update(due)
        return [found[kind] for kind in due]
