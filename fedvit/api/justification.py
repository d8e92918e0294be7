"""Check of justifications: the text has to explain the decision to a later reader."""

from __future__ import annotations

import re

LEAST_CHARACTERS = 20
LEAST_WORDS = 3
MOST_CHARACTERS = 2000
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# What documentation writes where a text belongs.
_PLACEHOLDER = re.compile(r"<.*>|\{.*\}|\[.*\]", re.DOTALL)


def checked_justification(text: str) -> str:
    """The text without white space around it.

    Raises:
        ValueError: it is too short, too long, a placeholder or not text; one sentence that names what would be right.
    """
    text = text.strip()
    words = [word for word in text.split() if any(character.isalpha() for character in word)]
    if len(text) < LEAST_CHARACTERS or len(words) < LEAST_WORDS or _PLACEHOLDER.fullmatch(text):
        raise ValueError(
            f"say why, in at least {LEAST_CHARACTERS} characters and {LEAST_WORDS} words: who decided it and what for"
        )
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"say why in at most {MOST_CHARACTERS} characters")
    if _UNPRINTABLE.search(text):
        raise ValueError("say why in printable characters")
    return text
