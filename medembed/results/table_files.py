"""A comparison's tables as files, for a paper and for other programs."""

from pathlib import Path
from typing import Any

from medembed.core.errors import RunError
from medembed.core.files import write_atomically
from medembed.results.group_tables import write_group_tables
from medembed.results.operating_tables import points_csv, tabulate_points
from medembed.results.tables import render, render_table

__all__ = ["TABLES", "write_tables"]

TABLES: dict[str, str | None] = {"heads": None, "regions": "region"}
"""Names of the tables, and what each has a block of rows for."""
_ENDINGS = {"csv": "csv", "latex": "tex"}


def write_tables(result: dict[str, Any], directory: str | Path) -> list[Path]:
    """Write ``heads``, ``regions`` and ``operating_points``, each as ``.csv`` and ``.tex``.

    Of a comparison by a column also ``groups`` and ``gaps``.

    Parameters
    ----------
    result : dict
        A comparison, as `comparison.compare` returns it.
    directory : str or Path
        Made where it is missing; tables of an earlier comparison are replaced.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    RunError
        `directory` is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file. Choose a directory for the tables.")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, by in TABLES.items():
        for table_format, ending in _ENDINGS.items():
            path = directory / f"{name}.{ending}"
            text = render(result, table_format=table_format, by=by)
            write_atomically(path, f"{text}\n".encode())
            written.append(path)
    latex = "\n\n".join(render_table(table, "latex") for table in tabulate_points(result))
    for ending, text in {"csv": points_csv(result), "tex": latex}.items():
        path = directory / f"operating_points.{ending}"
        write_atomically(path, f"{text}\n".encode())
        written.append(path)
    return written + (write_group_tables(result, directory) if "groups" in result else [])
