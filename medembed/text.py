"""Text of others, made fit for a terminal."""

import unicodedata

__all__ = ["mask_controls"]


def mask_controls(text: str) -> str:
    """Put � for each character that a terminal would obey instead of showing.

    Those are Unicode's category C: controls, such as a newline or an escape, and what is hidden
    or unassigned.
    """
    return "".join("�" if unicodedata.category(c).startswith("C") else c for c in text)
