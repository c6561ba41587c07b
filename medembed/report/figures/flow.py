"""The flow of images, studies and patients, in the style of CONSORT and STARD."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medembed.core.text import counted
from medembed.dataset.targets import ClassNames
from medembed.report.figures.captions import LEGEND, SMALL, elide, wrap, write_csv
from medembed.report.figures.plotting import WIDTH, Plot, Theme, make_plot, start_figure
from medembed.results.comparison_schema import ComparisonResult, Flow
from medembed.results.flow import CLASSES, NOT_RECORDED
from medembed.results.methods import name_compared_classes

__all__ = ["plot_flow"]

TITLE = "Flow of images, studies and patients"
MAX_FLOWS = 3
MAX_REASONS = 6
"""Reasons in one box; all are in the CSV."""
WHOLE = (WIDTH - 0.35) * 72
"""Points available for boxes placed side by side."""
MAIN, SIDE, GAP = 0.46, 0.46, 14.0
"""Shares of the width, and points between boxes."""
LINE, PAD = 11.5, 6.0
"""Points from line to line, and between a box and its text."""
BOLD = 1.2 * LEGEND
"""The regular font size whose letters are as wide as bold ones."""
UNITS = ("images", "studies", "patients")


@dataclass(frozen=True)
class _Box:
    """Lines of text, the first in bold, with left edge, top and width in points."""

    lines: tuple[str, ...]
    left: float
    top: float
    width: float

    @property
    def bottom(self) -> float:
        return self.top + LINE * len(self.lines) + 2 * PAD

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def plot_flow(result: ComparisonResult) -> Plot | None:
    """Draw what each run found, left out and used; runs with equal flows are drawn once.

    Returns None if no run records which images it used.
    """
    flows = [own for own in result.get("flow") or [] if own["used"]["images"]]
    groups: list[tuple[list[str], Flow]] = []
    for own in flows:
        same = next((names for names, first in groups if _is_same(own, first)), None)
        if same is None:
            groups.append(([own["run"]], own))
        else:
            same.append(own["run"])
    if not groups:
        return None
    shown = groups[:MAX_FLOWS]

    def draw(theme: Theme) -> Figure:
        return _draw_flows(theme, about, shown, classes, titled=len(result["runs"]) > 1)

    more, classes = len(groups) - len(shown), name_compared_classes(result)
    verb = "is" if more == 1 else "are"
    cut = f" {counted(more, 'more flow')} {verb} in the CSV alone." if more > 0 else ""
    why = "" if all(own["found"] is not None for own in flows) else _why_not_recorded()
    about = (
        f"A study is {classes.positive} where one of its images is; a patient with studies of both "
        f"classes counts in each.{why}{cut}{' Synthetic images.' if result['synthetic'] else ''}"
    )
    return make_plot(
        "flow",
        TITLE,
        draw,
        caption=about,
        alt=f"{TITLE}. " + " ".join(_describe_flow(names, own, classes) for names, own in shown),
        csv=write_csv([row for own in flows for row in _rows(own)]),
    )


def _why_not_recorded() -> str:
    return (
        f" {NOT_RECORDED.capitalize()}: the build of the manifest was not beside it when the run "
        "was made (MANIFEST.build.json)."
    )


def _is_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return {**a, "run": ""} == {**b, "run": ""}


def _draw_flows(
    theme: Theme,
    about: str,
    groups: Sequence[tuple[list[str], Flow]],
    classes: ClassNames,
    *,
    titled: bool,
) -> Figure:
    boxes, arrows, top = [], [], 0.0
    for names, own in groups:
        if titled:
            title = elide(", ".join(names), WHOLE - 2 * PAD, BOLD)
            boxes.append(_Box((title,), 0, top, WHOLE))
            top = boxes[-1].bottom + GAP
        found, lines = _place(own, top, classes)
        boxes += found
        arrows += lines
        top = max(box.bottom for box in found) + 2 * GAP
    height = top - GAP
    figure = start_figure(TITLE, about, body=height / 72)
    axes = figure.add_subplot()
    axes.set(xlim=(-2, WHOLE + 2), ylim=(height, -2))
    axes.axis("off")
    for box in boxes:
        _draw_box(axes, theme, box)
    for start, end, has_head in arrows:
        style = {"arrowstyle": "-|>" if has_head else "-", "color": theme.ink, "lw": 0.9}
        arrow = {**style, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", xy=end, xytext=start, arrowprops=arrow)
    return figure


_Arrow = tuple[tuple[float, float], tuple[float, float], bool]
"""Start and end points, and whether the end has an arrowhead."""


def _place(own: Flow, top: float, classes: ClassNames) -> tuple[list[_Box], list[_Arrow]]:
    """Return the boxes of one flow from top to bottom, with losses beside their source."""
    width, aside = MAIN * WHOLE, (1 - SIDE) * WHOLE
    boxes: list[_Box] = []
    arrows: list[_Arrow] = []
    above: _Box | None = None
    for main, side in _steps(own):
        box = _Box(_fit(main, width), 0, top, width)
        if above is not None:
            arrows.append(((above.middle, above.bottom), (box.middle, box.top), True))
        boxes.append(box)
        top, above = box.bottom + GAP, box
        if side:
            lost = _Box(_fit(side, SIDE * WHOLE), aside, top, SIDE * WHOLE)
            level = (lost.top + lost.bottom) / 2
            arrows.append(((box.middle, level), (lost.left, level), True))
            boxes.append(lost)
            top = lost.bottom + GAP
    places = (0.0, aside) if len(own["splits"]) > 1 else (0.0,)
    for left, part in zip(places, own["splits"], strict=False):
        box = _Box(_fit(_split_lines(part, classes), width), left, top, width)
        if above is not None:
            arrows += _branch(above, box)
        boxes.append(box)
    return boxes, arrows


def _branch(above: _Box, box: _Box) -> Iterator[_Arrow]:
    """Yield arrows from one box down to another, around a corner if it is placed aside."""
    if box.left == above.left:
        yield (above.middle, above.bottom), (box.middle, box.top), True
        return
    level = (above.top + above.bottom) / 2
    yield (above.left + above.width, level), (box.middle, level), False
    yield (box.middle, level), (box.middle, box.top), True


def _draw_box(axes: Any, theme: Theme, box: _Box) -> None:
    frame: dict[str, Any] = {"facecolor": "none", "edgecolor": theme.ink, "lw": 0.9}
    axes.add_patch(Rectangle((box.left, box.top), box.width, box.bottom - box.top, **frame))
    for i, line in enumerate(box.lines):
        axes.text(
            box.left + PAD,
            box.top + PAD + LINE * (i + 0.5),
            line,
            fontsize=LEGEND if i == 0 else SMALL,
            fontweight="bold" if i == 0 else "normal",
            va="center",
        )


def _fit(lines: Sequence[str], width: float) -> tuple[str, ...]:
    """Return lines broken to fit a box, the first in its larger bold font."""
    room = 0.96 * width - 2 * PAD
    sizes = [BOLD, *[SMALL] * (len(lines) - 1)]
    broken = [
        elide(part, room, size)
        for line, size in zip(lines, sizes, strict=True)
        for part in wrap(line, room, size)
    ]
    return tuple(broken)


def _steps(own: Flow) -> Iterator[tuple[list[str], list[str]]]:
    """Yield each main box, and the losses after it."""
    found = own["found"]
    title = "Found: " + (NOT_RECORDED if found is None else f"{counted(found, 'image')}")
    yield [title], [] if found is None else _excluded(own)
    yield ["Manifest", *_units(own["manifest"])], _lost(own)
    yield ["Used", *_units(own["used"])], []


def _excluded(own: Flow) -> list[str]:
    reasons = [(entry["reason"], entry["images"]) for entry in own["excluded"] or ()]
    if own["not_listed"]:
        reasons.append(("not listed", own["not_listed"]))
    total = sum(n for _, n in reasons)
    return [f"Excluded: {counted(total, 'image') if total else 'none'}", *_reasons(reasons)]


def _lost(own: Flow) -> list[str]:
    failed, reasons = own["failed"], [(own["reason"], own["images"]) for own in own["failures"]]
    told = "not known" if failed is None else counted(failed, "image") if failed else "none"
    lines = [f"Not embedded: {told}", *_reasons(reasons)]
    unlabelled = own["unlabelled"]
    lines.append(f"Without a label: {'not known' if unlabelled is None else f'{unlabelled:,}'}")
    if own["not_asked"]:
        lines.append(f"Of a split not asked for: {own['not_asked']:,}")
    if own["not_given"]:
        lines.append(f"Beyond the share of training patients: {own['not_given']:,}")
    return lines


def _reasons(reasons: Sequence[tuple[str, int]]) -> list[str]:
    shown = [f"{n:,}: {reason}" for reason, n in reasons[:MAX_REASONS]]
    rest = sum(n for _, n in reasons[MAX_REASONS:])
    return [*shown, *([f"{rest:,}: other reasons"] if rest else [])]


def _units(counts: Mapping[str, Any]) -> list[str]:
    return [f"{counts[unit]:,} {unit}" for unit in UNITS if counts.get(unit) is not None]


def _split_lines(part: Mapping[str, Any], classes: ClassNames) -> list[str]:
    lines = [part["split"].capitalize(), *_units(part["used"])]
    for key, name in zip(CLASSES, classes, strict=True):
        own = part["classes"][key]
        lines.append(
            f"{name}: {counted(own['studies'], 'study')}, {counted(own['patients'], 'patient')}"
        )
    return lines


def _describe_flow(names: Sequence[str], own: Flow, classes: ClassNames) -> str:
    parts = [*(line for main, side in _steps(own) for line in (*main, *side))]
    parts += [line for part in own["splits"] for line in _split_lines(part, classes)]
    return f"{', '.join(names)}: {'; '.join(parts)}."


def _cell(n: int | None) -> int | str:
    return "" if n is None else n


def _rows(own: Flow) -> Iterator[dict[str, Any]]:
    """Yield the lines of the CSV."""

    def line(step: str, counts: Any, **more: str) -> dict[str, Any]:
        counts = counts if isinstance(counts, Mapping) else {"images": counts}
        about = {"run": own["run"], "step": step} | dict.fromkeys(("split", "class", "reason"), "")
        return {**about, **more, **{unit: _cell(counts.get(unit)) for unit in UNITS}}

    yield line("found", own["found"])
    for entry in own["excluded"] or ():
        yield line("excluded", entry["images"], reason=entry["reason"])
    yield line("not listed", own["not_listed"])
    yield line("manifest", own["manifest"])
    yield line("not asked for", own["not_asked"])
    for entry in own["failures"]:
        yield line("not embedded", entry["images"], reason=entry["reason"])
    yield line("without a label", own["unlabelled"])
    yield line("beyond the share of training patients", own["not_given"])
    yield line("used", own["used"])
    for part in own["splits"]:
        yield line("used", part["used"], split=part["split"])
        for name in CLASSES:
            yield line("used", part["classes"][name], split=part["split"], **{"class": name})
