"""Whether a client is validated, as it follows from what was seen of its data: slow to change, so that noise changes
nothing. An operator's decision is not touched by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BELOW, ABOVE = 0.5, 0.8
"""A score under the one counts against a client, one above the other for it, and one in between for neither."""
ROUNDS_AGAINST, ROUNDS_FOR = 2, 5
"""How many rounds in a row it takes to lose, and to win back, what one has."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How many of a client's last rounds, in a row, spoke against it, or for it."""

    against: int = 0
    speaking_for: int = 0

    def after(self, score: float) -> Standing:
        """With one round more."""
        if score < BELOW:
            return Standing(self.against + 1, 0)
        return Standing(0, self.speaking_for + 1) if score > ABOVE else Standing()

    def verdict(self, validated: bool) -> bool | None:
        """What a client is to be, that is ``validated`` now or not; None: what it is."""
        if validated and self.against >= ROUNDS_AGAINST:
            return False
        return True if not validated and self.speaking_for >= ROUNDS_FOR else None

    @classmethod
    def from_json(cls, found: Mapping[str, int] | None) -> Standing:
        """As the store keeps it; a client that it does not know has none."""
        return cls(**found) if found else cls()
