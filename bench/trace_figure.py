"""Draw the busy periods of each stage of a pipeline."""

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from medembed.extraction.writer import Span

STAGES = {
    "read": "#9aa5b1",
    "decode": "#3e7cb1",
    "transfer": "#81a4cd",
    "forward": "#1f8a70",
    "write": "#bd6b09",
}
SHOWN_SECONDS = 4.0


def draw_trace(spans: Sequence[Span], path: Path) -> None:
    """Write `path`.png, the first seconds as bars, and `path`.csv with every span."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = min(span.start for span in spans)
    kept = sorted((span for span in spans if span.stage in STAGES), key=lambda span: span.start)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "start", "end"])
        for span in kept:
            times = (f"{span.start - first:.4f}", f"{span.end - first:.4f}")
            writer.writerow([span.stage, *times])
    begin = min(span.start for span in kept if span.stage == "forward") - 0.5
    figure, axes = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    for place, (stage, colour) in enumerate(reversed(STAGES.items())):
        bars = [(s.start - begin, s.end - s.start) for s in kept if s.stage == stage]
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=colour)
    axes.set_yticks(range(len(STAGES)), list(reversed(STAGES)))
    axes.set_xlim(0, SHOWN_SECONDS)
    axes.set_xlabel("seconds")
    axes.set_title("Extraction into a stand-in device that sleeps 0.2 s per batch of 8")
    figure.savefig(path.with_suffix(".png"), dpi=110)
