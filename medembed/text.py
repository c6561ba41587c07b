"""Foreign text: one spelling to compare by, and a form that is fit for a terminal."""

import unicodedata

__all__ = ["mask_controls", "normalise"]

_INVISIBLE = "\u180e\u200b\u200c\u200d\u2060\ufeff"  # zero-width; `str.strip` leaves them


def normalise(text: str) -> str:
    """Return the spelling that two texts are compared by.

    The text is brought to Unicode NFC and loses the blanks at both ends: all that `str.isspace`
    names, among them U+00A0, and zero-width characters. What is left of nothing but blanks is "".
    """
    text = unicodedata.normalize("NFC", text)
    start, end = 0, len(text)
    while start < end and _is_blank(text[start]):
        start += 1
    while end > start and _is_blank(text[end - 1]):
        end -= 1
    return text[start:end]


def mask_controls(text: str) -> str:
    """Put � for each character that a terminal would obey instead of showing.

    Those are Unicode's category C: controls, such as a newline or an escape, and what is hidden
    or unassigned.
    """
    return "".join("�" if unicodedata.category(c).startswith("C") else c for c in text)


def _is_blank(character: str) -> bool:
    return character.isspace() or character in _INVISIBLE
