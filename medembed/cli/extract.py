"""`medembed extract`."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import (
    LOCATION,
    MAX_BATCH,
    PATH,
    device_option,
    encoder_option,
    fit_option,
    json_option,
    limit_options,
    pool_option,
    precision_option,
    stream_root_option,
)
from medembed.cli.progress import showing_progress
from medembed.core.locations import Location

if TYPE_CHECKING:
    from medembed.cache.pending import Worker
    from medembed.extraction import ExtractionReport
    from medembed.images.streams import StreamRoot

__all__ = ["extract_command"]


def _choose_worker(
    context: click.Context, option: click.Parameter, text: str | None
) -> "Worker | None":
    from medembed.cache.pending import find_worker, parse_worker

    if text is not None:
        try:
            return parse_worker(text)
        except ValueError as error:
            raise click.BadParameter(str(error), context, option) from error
    if context.params.get("engine") == "ray":
        return None
    found = find_worker(os.environ)
    if not found:
        return None
    worker, variable = found
    say(f"Worker {worker.index} of {worker.count}, from 0, as {variable} says.")
    return worker


def _choose_layers(
    context: click.Context, option: click.Parameter, text: str | None
) -> tuple[str, ...]:
    """Return the poolings `mean@K` that `--layers 6,12` or `all` asks for."""
    from medembed.core.poolings import block_of

    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if words == ["all"]:
        return ("mean@all",)
    names = tuple(f"mean@{word}" for word in words)
    wrong = next(
        (word for word, name in zip(words, names, strict=True) if not block_of(name)), None
    )
    if wrong is not None:
        raise click.BadParameter(
            f"{wrong!r} is no block; give numbers from 1, such as 6,12,18,24, or all.",
            context,
            option,
        )
    return names


@click.command(
    "extract",
    cls=Command,
    starting="Loading the encoder",
    examples=[
        "medembed extract mura.csv --image-root MURA-v1.1 --encoder google/medgemma-4b-pt "
        "--cache cache",
        "medembed extract mura.csv --image-root MURA-v1.1 --encoder google/medgemma-4b-pt "
        "--cache layers --layers all",
        "medembed extract mura.csv --image-root MURA-v1.1 --encoder demo --cache cache --dry-run",
    ],
    sections={
        "Encoder": ["encoder", "pool", "layers", "device", "precision", "dtype"],
        "Images": ["fit", "window", "max-bytes", "max-seconds", "retry-failed", "strict"],
        "Speed and workers": ["batch-size", "decoders", "worker", "backend"],
    },
)
@click.argument("manifest_path", metavar="MANIFEST", type=PATH)
@stream_root_option
@encoder_option
@click.option(
    "--cache",
    "cache_path",
    type=LOCATION,
    required=True,
    help="The cache: a directory, or s3://bucket/prefix.",
)
@pool_option
@click.option(
    "--layers",
    callback=_choose_layers,
    metavar="K,…|all",
    help="Also store mean@K, the mean over patch tokens after block K, of these blocks.",
)
@device_option
@precision_option
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Type of the stored values.",
)
@fit_option
@click.option(
    "--window",
    default="first",
    show_default=True,
    help="Window of DICOM images: first, the name of a window, or none.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, MAX_BATCH),
    help="Images per forward pass; measured by default.",
)
@click.option(
    "--decoders", type=click.IntRange(min=1), help="Processes that read and decode images."
)
@limit_options
@click.option(
    "--worker",
    callback=_choose_worker,
    metavar="I/N",
    help="Embed the I-th of N shares, counted from 0; set by torchrun and SLURM.",
)
@click.option(
    "--backend",
    "--engine",
    "engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    is_eager=True,
    help="Where workers run: this process, or the Ray cluster at RAY_ADDRESS.",
)
@click.option("--retry-failed", is_flag=True, help="Try images that failed before again.")
@click.option("--strict", is_flag=True, help="Exit with 1 if any image failed.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and stop.")
@json_option
def extract_command(
    manifest_path: Path,
    image_root: "Location | StreamRoot",
    reference: str,
    cache_path: Location,
    poolings: tuple[str, ...],
    layers: tuple[str, ...],
    device: str,
    precision: str,
    dtype: str,
    fit: str,
    window: str,
    batch_size: int | None,
    decoders: int | None,
    max_bytes: int,
    max_seconds: float,
    worker: "Worker | None",
    engine: str,
    retry_failed: bool,
    strict: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run an encoder over MANIFEST's images and cache the embeddings.

    Images that the cache already holds are skipped, so an interrupted run continues.
    """
    from medembed.dataset.build_record import follow_build
    from medembed.dataset.manifest import read_manifest
    from medembed.images.intensity import Intensity
    from medembed.images.load import Limits

    if engine == "ray" and worker:
        raise click.UsageError(
            "--worker is for --backend local; with --backend ray Ray divides the work"
        )
    poolings = tuple(dict.fromkeys([*poolings, *layers]))
    rows, limits = read_manifest(manifest_path), Limits(max_bytes, max_seconds)
    image_root = follow_build(image_root, manifest_path, rows, lambda words: say(f"Note: {words}"))
    if engine == "ray" and Path(reference).is_dir():  # Ray's processes are in other directories
        reference = str(Path(reference).absolute())
    if engine == "local":
        from medembed.cache.metadata import is_free
        from medembed.extraction.settled import report_if_settled

        settled = report_if_settled(
            rows,
            image_root,
            reference,
            cache_path,
            poolings=poolings,
            dtype=dtype,
            fit=fit,
            intensity=Intensity(window),
            retry_failed=retry_failed,
            worker=worker,
            dry_run=dry_run,
        )
        if settled is not None:
            _conclude(settled, manifest_path, cache_path, strict, dry_run, as_json)
            if dry_run and is_free(cache_path):
                say(f"{reference} was not loaded: medembed doctor --encoder {reference} checks it.")
            return
    from medembed import extraction  # torch
    from medembed.encoders.loading import load_encoder

    load = partial(
        load_encoder,
        reference,
        device=device,
        precision=precision,
        fit=fit,
        poolings=poolings,
        worker=worker.index if worker else None,
    )
    if engine == "ray":
        from medembed.extraction.ray_engine import Job, extract_on_ray

        job = Job(
            load,
            _absolute(_refuse_stream(image_root)),
            _absolute(cache_path),
            poolings=poolings,
            dtype=dtype,
            intensity=Intensity(window),
            batch_size=batch_size,
            decoders=decoders,
            limits=limits,
            retry_failed=retry_failed,
        )
        with showing_progress("Embedding", "images") as progress:
            report = extract_on_ray(
                rows,
                job,
                device=device,
                dry_run=dry_run,
                progress=progress,
                on_status=progress.show_status,
            )
    else:
        with showing_progress("Fetching", "bytes") as progress:
            encoder = load(progress=progress)
        with showing_progress("Embedding", "images") as progress:
            report = extraction.extract(
                rows,
                image_root,
                encoder,
                cache_path,
                poolings=poolings,
                dtype=dtype,
                intensity=Intensity(window),
                batch_size=batch_size,
                decoders=decoders,
                limits=limits,
                retry_failed=retry_failed,
                worker=worker,
                dry_run=dry_run,
                progress=progress,
                on_status=progress.show_status,
                announce=say,
            )
    _conclude(report, manifest_path, cache_path, strict, dry_run, as_json)


def _refuse_stream(image_root: "Location | StreamRoot") -> Location:
    from medembed.images.streams import is_stream

    if is_stream(image_root):
        raise click.UsageError(
            f"{image_root} is read from front to back, and Ray's tasks would each read all of it. "
            "Use --backend local, with --worker I/N where there are several."
        )
    return image_root


def _absolute(location: Location) -> Location:
    return location.absolute() if isinstance(location, Path) else location


def _conclude(
    report: "ExtractionReport",
    manifest_path: Path,
    cache_path: Location,
    strict: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Print what was done; exit with 1 if images failed and --strict was given."""
    _say_extraction(report, cache_path, dry_run)
    if as_json:
        print_json(report.as_dict())
    elif not dry_run:
        suggest("sweep", cache_path, manifest_path, "-o", "runs/sweep")
    if strict and report.failed:
        raise click.ClickException(
            f"{report.failed} images failed and --strict was given. They are listed above; fix "
            "them and run the same command with --retry-failed, or drop --strict."
        )


def _say_extraction(report: "ExtractionReport", cache_path: Location, dry_run: bool) -> None:
    for failure in report.failures:
        say(f"Failed ({failure['stage']}): {failure['image']}: {failure['reason']}")
    for note, n_images in report.notes.items():
        say(f"In {n_images} image{'s' * (n_images != 1)}: {note}")
    verb = "would be embedded" if dry_run else "embedded"
    pace = f"; {report.seconds:.1f} s, {report.images_per_second:.1f} images/s"
    say(
        f"{cache_path}: {report.embedded} {verb}, {report.already} already there, "
        f"{report.failed} failed, {report.duplicates} with equal bytes under another name, "
        f"of {report.requested} images{pace if report.embedded and not dry_run else ''}"
    )
    if report.decoders:
        from medembed.extraction.report import describe_times

        say(f"Time: {describe_times(report)}")
