"""`medembed audit labels`."""

from pathlib import Path

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json, say, suggest
from medembed.cli.options import LOCATION, MANY, PATH, json_option, output_option
from medembed.core.locations import Location

__all__ = ["labels_command"]


@click.command(
    "labels",
    cls=Command,
    starting="Reading the run",
    examples=[
        "medembed audit labels runs/sweep --manifest mura.csv -o review",
        "medembed audit labels runs/sweep --manifest mura.csv --image-root MURA-v1.1 -o review",
    ],
)
@click.argument("run_path", metavar="RUN", type=PATH)
@click.option(
    "--manifest",
    "manifest_path",
    type=PATH,
    required=True,
    help="The manifest that the run was made from.",
)
@click.option(
    "--image-root",
    type=LOCATION,
    help="Directory or bucket that the manifest's paths are relative to; the page then shows the "
    "films.",
)
@click.option(
    "-n",
    "--suspects",
    "n_shown",
    type=click.IntRange(0, MANY),
    default=100,
    show_default=True,
    help="Suspects on the page; the table has all.",
)
@click.option(
    "--names",
    is_flag=True,
    help="Also write the names of images and studies, which may identify patients.",
)
@output_option(
    "Directory for index.html, audit.json and review.csv; an existing review is never overwritten.",
    "output",
)
@json_option
def labels_command(
    run_path: Path,
    manifest_path: Path,
    image_root: Location | None,
    n_shown: int,
    names: bool,
    output: Path,
    as_json: bool,
) -> None:
    """List the studies whose label the heads of RUN contradict, for somebody to read again.

    Labels of train are judged by out-of-fold scores, labels of test by the final models, so that no
    score knows the label or the patient. The page says how many studies would be contradicted if
    all labels were right, and estimates how many labels are wrong.

    Fill in the column new_label of review.csv (0 normal, 1 abnormal, empty: not read), and apply it
    with `medembed manifest relabel`. Nothing is embedded again.
    """
    from medembed.dataset.manifest import existing_images
    from medembed.report.label_audit import check_audit_target, write_label_audit
    from medembed.results.label_audit import audit_labels

    check_audit_target(output)
    if image_root is not None:
        existing_images(image_root)
    found = audit_labels(run_path, manifest_path)
    document = write_label_audit(found, output, image_root=image_root, names=names, n_shown=n_shown)
    say(str(found))
    if as_json:
        print_json(document.model_dump(exclude_unset=True))
    say(f"Page: {output / 'index.html'}")
    suggest("manifest", "relabel", manifest_path, output / "review.csv", "-o",
            manifest_path.with_stem(f"{manifest_path.stem}-2"))  # fmt: skip
