"""Read CSV tables as text, nothing guessed."""

from pathlib import Path

import pandas as pd

from medembed.errors import MedembedError

__all__ = ["read_text_table"]


def read_text_table(
    path: Path, error: type[MedembedError], *, columns: list[str] | None = None
) -> pd.DataFrame:
    """Read a comma-separated file in UTF-8, with or without a byte-order mark, as strings.

    Parameters
    ----------
    path : pathlib.Path
    error : type
        What to raise.
    columns : list of str, optional
        Names of the columns of a table without a header; otherwise the first row names them.

    Returns
    -------
    pandas.DataFrame
        Strings only; an empty field is "".

    Raises
    ------
    MedembedError
        As `error`: the file cannot be read, names two columns alike, or has short or long rows.
    """
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", header=None
        )
    except (OSError, ValueError) as cause:  # pandas' parser errors are ValueErrors
        raise error(f"{path} cannot be read as CSV in UTF-8: {str(cause).strip()}") from cause
    header = columns or table.iloc[0].fillna("").tolist()
    if len(header) != table.shape[1]:
        raise error(f"{path} has {table.shape[1]} columns; {len(header)} were expected.")
    twice = sorted({repr(name) for name in header if header.count(name) > 1})
    if twice:
        raise error(f"{path} has two columns of one name: {', '.join(twice)}. Rename one.")
    body = table if columns else table.iloc[1:].reset_index(drop=True)
    body.columns = pd.Index(header)
    short = body.isna().any(axis=1)
    if short.any():
        first = int(short.to_numpy().argmax()) + (1 if columns else 2)
        raise error(
            f"{path}: {int(short.sum())} rows have fewer fields than the {len(header)} columns, "
            f"the first is row {first}. The file may be cut off; fetch or build it again."
        )
    return body
