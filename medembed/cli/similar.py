"""`medembed similar`: the films that most resemble a film."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, printable, say
from medembed.cli.options import LOCATION, PATH, device_option, json_option, precision_option
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

if TYPE_CHECKING:
    from medembed.cache.neighbours import SimilarFilms
    from medembed.dataset.manifest import Manifest
    from medembed.prediction.similar import Film

__all__ = ["similar_command"]

MOST = 1000
CODE_DIGITS = 12


@click.command(
    "similar",
    cls=Command,
    starting="Opening the cache",
    examples=[
        "medembed similar cache mura.csv --image film.png",
        "medembed similar cache mura.csv --image 17 -k 20 -o sheet.html --image-root MURA-v1.1",
    ],
    sections={
        "Contact sheet": ["output", "image-root", "names"],
        "Encoder": ["encoder", "device", "precision"],
    },
)
@click.argument("cache_path", metavar="CACHE", type=LOCATION)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@click.option(
    "--image",
    "asked",
    required=True,
    metavar="FILE|SHA256|ROW",
    help="The film: a file, the SHA-256 of one (64 hexadecimal digits), or a row of the manifest, "
    "from 1.",
)
@click.option(
    "-k",
    "--neighbours",
    "k",
    type=click.IntRange(1, MOST),
    default=10,
    show_default=True,
    help="Number of films to find.",
)
@click.option(
    "--pool",
    metavar="NAMES",
    help="Poolings to compare, joined by +; by default all with one vector per image.",
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="FILE",
    help="Also write a contact sheet, FILE.png or FILE.html; needs --image-root.",
)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to.",
)
@click.option(
    "--names",
    "with_names",
    is_flag=True,
    help="Show names of images and studies, which may identify patients, instead of hashes.",
)
@click.option(
    "--encoder", "reference", help="The cache's encoder, if not found where the cache says."
)
@device_option
@precision_option
@json_option
def similar_command(
    cache_path: Location,
    manifest_path: Path,
    asked: str,
    k: int,
    pool: str | None,
    output: Path | None,
    image_root: Location | None,
    with_names: bool,
    reference: str | None,
    device: str,
    precision: str,
    as_json: bool,
) -> None:
    """Find the films of other patients in MANIFEST that most resemble a film.

    Films are compared by the cosine of their embeddings in CACHE, exactly. All films of the
    query's own patient are left out. A film that is not in the cache is embedded with the cache's
    encoder; if it is not in the manifest either, its patient is unknown and nobody is left out.
    """
    _check_usage(output, image_root)
    from medembed.cache.neighbours import find_similar
    from medembed.cache.store import open_cache
    from medembed.dataset.manifest import read_manifest, require_hashes
    from medembed.prediction.similar import embed_film, find_film

    cache, manifest = open_cache(cache_path), read_manifest(manifest_path)
    require_hashes(manifest)
    film = find_film(asked, cache, manifest)
    query: Any = film.sha256
    if not film.in_cache:
        with showing_progress("Fetching", "bytes") as fetching:
            query = embed_film(
                film,
                cache,
                pool=pool,
                encoder=reference,
                device=device,
                precision=precision,
                progress=fetching,
            )
    with showing_progress("Comparing", "films") as progress:
        found = find_similar(
            cache, manifest, query, k=k, pool=pool, sha256=film.sha256, progress=progress
        )
    document = _describe(film, found, manifest, with_names)
    if output is not None:
        _write_sheet(output, document, film, manifest, image_root, with_names)
    if as_json:
        print_json(document)
    else:
        for line in _lines(document, with_names):
            click.echo(printable(line))
    _explain(film, found)
    if output is not None:
        say(f"Contact sheet: {output}")


def _check_usage(output: Path | None, image_root: Location | None) -> None:
    if output is not None and output.suffix not in (".html", ".png"):
        raise click.BadParameter(f"{output} ends in neither .png nor .html")
    if (output is None) != (image_root is None):
        raise click.UsageError("-o and --image-root go together: a contact sheet shows images.")


def _describe(
    film: "Film", found: "SimilarFilms", manifest: "Manifest", with_names: bool
) -> dict[str, Any]:
    """Return the JSON document."""
    own = None if film.row is None else manifest.rows.iloc[film.row - 1]
    nothing = dict.fromkeys(("image", "study", "region", "label"))
    return {
        "query": {
            "sha256": film.sha256,
            "row": film.row,
            **(nothing if own is None else _facts(own, with_names)),
            "in_cache": film.in_cache,
        },
        "poolings": found.pooling.split("+"),
        "compared": found.n_compared,
        "own": found.n_own,
        "failed": found.n_failed,
        "neighbours": [
            {
                "sha256": row["sha256"],
                **_facts(row, with_names),
                "split": row["split"],
                "similarity": float(row["similarity"]),
            }
            for _, row in found.rows.iterrows()
        ],
    }


def _facts(row: Any, with_names: bool) -> dict[str, Any]:
    import pandas as pd

    label = None if pd.isna(row["label"]) else int(row["label"])
    names = {name: row[name] if with_names else None for name in ("image", "study")}
    return {**names, "region": row["region"], "label": label}


def _lines(document: dict[str, Any], with_names: bool) -> list[str]:
    heading = "image" if with_names else "sha256"
    lines = [f"{'':>4} {'similarity':>10}  {'label':<10} {'region':<16} {'split':<6} {heading}"]
    for rank, row in enumerate(document["neighbours"], start=1):
        name = row["image"] if with_names else row["sha256"][:CODE_DIGITS]
        lines.append(
            f"{rank:>4} {row['similarity']:>10.4f}  {_word(row['label']):<10} "
            f"{row['region']:<16} {row['split']:<6} {name}"
        )
    return lines


def _word(label: int | None) -> str:
    return "unlabelled" if label is None else ("normal", "abnormal")[label]


def _explain(film: "Film", found: "SimilarFilms") -> None:
    whose = (
        f"{found.n_own:,} of the same patient, itself among them, left out"
        if film.row is not None
        else "the film is not in the manifest, so no patient was left out"
    )
    failed = f"; {found.n_failed:,} that failed to be embedded left out" if found.n_failed else ""
    compared = f"Compared with {found.n_compared:,} films by the cosine of {found.pooling}"
    say(f"{compared}; {whose}{failed}.")
    if not len(found.rows):
        say("There is no film of another patient.")


def _write_sheet(
    output: Path,
    document: dict[str, Any],
    film: "Film",
    manifest: "Manifest",
    image_root: Location | None,
    with_names: bool,
) -> None:
    from medembed.report.contact_sheet import Frame, write_contact_sheet
    from medembed.report.gallery import make_thumbnail, make_thumbnails

    assert image_root is not None
    own = document["query"]
    about = (
        "not in the manifest" if own["row"] is None else f"{_word(own['label'])}, {own['region']}"
    )
    frames = [Frame(film.sha256, "The film asked about", about)]
    for rank, row in enumerate(document["neighbours"], start=1):
        title = f"{rank}. {_word(row['label'])}, {row['region']}"
        frames.append(Frame(row["sha256"], title, f"similarity {row['similarity']:.4f}"))
    wanted = [frame.sha256 for frame in frames]
    thumbnails = make_thumbnails(manifest, image_root, wanted, with_names=with_names)
    if film.path is not None and film.sha256 not in thumbnails:
        shown = make_thumbnail(film.path, film.sha256)
        thumbnails |= {} if shown is None else {film.sha256: shown}
    title = f"{len(frames) - 1} most similar films of other patients"
    write_contact_sheet(output, title, frames, thumbnails)
    if lacking := len(frames) - len(thumbnails):
        say(f"{lacking} of {len(frames)} films were not found unchanged below {image_root}.")
