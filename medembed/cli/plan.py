"""`medembed plan`."""

from typing import Any

import click

from medembed.cli.commands import Command
from medembed.cli.console import print_json
from medembed.cli.options import json_option

__all__ = ["plan_command"]


@click.command(
    "plan",
    cls=Command,
    starting="Computing",
    examples=[
        "medembed plan --auroc 0.9 --prevalence 0.4 --width 0.05",
        "medembed plan --auroc 0.9 --prevalence 0.4 --difference 0.02 --correlation 0.6",
    ],
)
@click.option(
    "--auroc", type=float, help="Expected AUROC; with --difference that of the better head."
)
@click.option("--sensitivity", type=float, help="Expected sensitivity, instead of --auroc.")
@click.option("--specificity", type=float, help="Expected specificity, instead of --auroc.")
@click.option("--prevalence", type=float, required=True, help="Share of studies that are abnormal.")
@click.option(
    "--width",
    type=float,
    help="Full width of the 95 % interval; 0.05 is about ± 0.025.",
)
@click.option(
    "--difference",
    type=float,
    help="Difference in AUROC that a paired test of two heads should detect.",
)
@click.option(
    "--correlation",
    type=float,
    help="Correlation of the two heads' scores among studies of one label.",
)
@click.option("--power", type=float, help="Power of the test.  [default: 0.8]")
@click.option(
    "--studies-per-patient",
    type=float,
    default=1.0,
    show_default=True,
    help="Mean number of studies per patient.",
)
@click.option(
    "--icc",
    type=float,
    default=0.0,
    show_default=True,
    help="Intraclass correlation of the scores of a patient's studies of one label.",
)
@json_option
def plan_command(
    auroc: float | None,
    sensitivity: float | None,
    specificity: float | None,
    prevalence: float,
    width: float | None,
    difference: float | None,
    correlation: float | None,
    power: float | None,
    studies_per_patient: float,
    icc: float,
    as_json: bool,
) -> None:
    """Compute how many test patients an interval or a paired test needs.

    Use --width for the interval of one head's AUROC, sensitivity or specificity, or --difference
    for a paired test of the AUROC of two heads on the same studies. Both are at the 95 % level and
    use the methods of `medembed compare`.
    """
    given = {"auroc": auroc, "sensitivity": sensitivity, "specificity": specificity}
    expected = {name: value for name, value in given.items() if value is not None}
    _check_usage(list(expected), width, difference, correlation, power)
    from medembed.evaluation.sample_size import Sampling, plan_difference, plan_width

    sampling = Sampling(prevalence, studies_per_patient, icc)
    asked: dict[str, Any] = {**expected, "prevalence": prevalence}
    ((score, value),) = expected.items()
    if width is not None:
        asked["width"] = width
        found = plan_width(score, value, width, sampling)
        gives = (
            f"With these, the 95 % interval of {_named(score, value)} is at most {width:g} wide on "
            "average."
        )
    else:
        assert difference is not None
        assert correlation is not None
        power = 0.8 if power is None else power
        asked |= {"difference": difference, "correlation": correlation, "power": power}
        found = plan_difference(value, difference, correlation, power, sampling)
        gives = (
            f"With these, a paired test at the 5 % level tells {_named(score, value)} from one of "
            f"{value - difference:g} with a power of {power:g}."
        )
    asked |= {"studies_per_patient": studies_per_patient, "icc": icc}
    if as_json:
        print_json(
            {
                "patients": found.patients,
                "studies": found.studies,
                "abnormal_studies": found.abnormal_studies,
                "method": found.method,
                "design_effect": sampling.design_effect,
                "asked": asked,
            }
        )
        return
    click.echo(
        f"Test patients: {found.patients:,}, with {found.studies:,} studies, of which "
        f"{found.abnormal_studies:,} abnormal."
    )
    click.echo(gives)
    click.echo(f"Method: {found.method}; a design effect of {sampling.design_effect:g}.")


def _check_usage(
    expected: list[str],
    width: float | None,
    difference: float | None,
    correlation: float | None,
    power: float | None,
) -> None:
    if (width is None) == (difference is None):
        raise click.UsageError("give either --width or --difference.")
    if len(expected) != 1:
        raise click.UsageError("give one of --auroc, --sensitivity and --specificity.")
    if difference is None and (correlation is not None or power is not None):
        raise click.UsageError("--correlation and --power go with --difference.")
    if difference is not None and (expected != ["auroc"] or correlation is None):
        raise click.UsageError("--difference requires --auroc and --correlation.")


def _named(score: str, value: float) -> str:
    return f"{'an AUROC' if score == 'auroc' else f'a {score}'} of {value:g}"
