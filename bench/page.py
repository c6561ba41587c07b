"""How quickly the report's page is there and answers, in headless Chromium, and its memory.

Synthetic runs and films: 1,200 test studies with a film each, a map of 50,000 images, and 100,000
test studies. For each page its size, the time to first contentful paint (median of five loads in
fresh contexts), the JavaScript heap and the memory of its process, loaded and while all cases were
scrolled through, and the median time of a frame while a pointer moves over the map, a slider is
dragged, or the cases scroll.

    .venv/bin/python bench/page.py --out bench/results/page.json
"""

import argparse
import hashlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from made_runs import make_run

from measuring import write_results
from medembed.report.gallery import Thumbnail
from medembed.report.page import write_report
from medembed.results.embedding_map import EmbeddingMap, MapInfo, write_map
from medembed.results.runs import Run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOADS = 5
FRAMES = """async (move) => {
  const times = [];
  let before = null;
  for (let i = 0; i < 60; i += 1) {
    await new Promise((done) => requestAnimationFrame((now) => {
      if (before !== null) times.push(now - before);
      before = now;
      eval_(move, i);
      done();
    }));
  }
  times.sort((a, b) => a - b);
  return times[Math.floor(times.length / 2)];
}"""
"""Median time from a frame to the next while something moves at each."""
MOVES = {
    "map": """const c = document.querySelectorAll('.stage canvas')[1];
      const b = c.getBoundingClientRect();
      c.dispatchEvent(new PointerEvent('pointermove', {bubbles: true,
        clientX: b.left + b.width * (0.2 + 0.01 * i), clientY: b.top + b.height / 2}))""",
    "map_repainted": """const s = document.getElementById('map-colour');
      s.selectedIndex = i % s.options.length; s.dispatchEvent(new Event('change'))""",
    "slider": """const s = document.getElementById('slider'); s.value = (i * 7) % Number(s.max);
      s.dispatchEvent(new Event('input'))""",
    "cases": "document.querySelector('.cases').scrollTop = i * 120",
}


SCREEN = """async (place) => {
  const list = document.querySelector(".cases");
  list.scrollTop = place * list.clientHeight;
  await new Promise((done) => setTimeout(done, 60));
  return list.scrollTop + list.clientHeight < list.scrollHeight - 1;
}"""
"""Shows a screen of cases for as long as their films take; returns whether another follows."""
MOST_SCREENS = 400


def make_rows(n_patients: int, share_test: float) -> pd.DataFrame:
    """Return images, a study of one film for each patient."""
    generator = np.random.default_rng(0)
    patients = np.arange(n_patients)
    names = [hashlib.sha256(str(patient).encode()).hexdigest() for patient in patients]
    table = pd.DataFrame({"sha256": names, "patient": patients, "study": patients})
    table["region"] = np.array(["elbow", "hand", "wrist"])[patients % 3]
    table["label"] = (generator.random(n_patients) < 0.4).astype(int)
    table["split"] = np.where(generator.random(n_patients) < share_test, "test", "train")
    table["fold"] = (patients % 3).astype(float)
    table.loc[table["split"] == "test", "fold"] = np.nan
    return table


def give_map(run: Run, rows: pd.DataFrame) -> None:
    """Keep a map of three clouds in a run."""
    generator = np.random.default_rng(1)
    points = generator.normal(size=(len(rows), 2)) + rows[["label", "patient"]].to_numpy() % 3 * 3
    table = rows.assign(pooling="mean", x=points[:, 0], y=points[:, 1]).astype({"label": "Int8"})
    info = MapInfo(method="pca", seed=0, manifest="0", explained={"mean": [0.4, 0.2]}, versions={})
    write_map(run, EmbeddingMap(table, info))


def find_films(wanted: Any) -> dict[str, Thumbnail]:
    """Return synthetic films of 512 x 420 pixels."""
    found = {}
    for sha256 in wanted:
        generator = np.random.default_rng(int(sha256[-8:], 16))
        small = generator.integers(0, 256, (26, 21), np.uint8)
        output = io.BytesIO()
        Image.fromarray(small).resize((420, 512), Image.Resampling.BICUBIC).save(output, "JPEG")
        found[sha256] = Thumbnail(output.getvalue(), 420, 512)
    return found


def measure_page(browser: Any, path: Path, moves: list[str]) -> dict[str, Any]:
    """Return what a page costs in a browser."""
    paints = []
    for _ in range(LOADS):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        page.goto(path.as_uri())
        ask = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        while (painted := page.evaluate(ask)) is None:  # the page's policy lets no function wait
            page.wait_for_timeout(5)
        paints.append(painted)
        if len(paints) < LOADS:
            context.close()
    private = _renderer_mib()
    frames = {}
    for name in moves:
        anchor = {"map": "map", "map_repainted": "map", "slider": "threshold"}.get(name, "mistakes")
        page.evaluate(f"document.getElementById('{anchor}').scrollIntoView()")
        code = FRAMES.replace("eval_(move, i)", MOVES[name])
        frames[name] = round(page.evaluate(code, ""), 1)
    moved = _renderer_mib()
    walked = {} if path.parent.joinpath("cases.js").exists() else _scroll_through(page)
    session = context.new_cdp_session(page)
    session.send("Performance.enable")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    found = {
        "html_bytes": path.stat().st_size,
        "first_paint_ms": [round(paint) for paint in sorted(paints)],
        "first_paint_ms_median": round(statistics.median(paints)),
        "heap_mib": round(metrics["JSHeapUsedSize"] / 2**20, 1),
        "renderer_private_mib": private,
        "renderer_private_mib_after_moves": moved,
        **walked,
        "frame_ms_median": frames,
    }
    context.close()
    return found


def _scroll_through(page: Any) -> dict[str, Any]:
    """Return what memory the page takes while all cases go by, and afterwards."""
    page.evaluate("document.getElementById('mistakes').scrollIntoView()")
    most, screens = 0.0, 0
    while screens < MOST_SCREENS and page.evaluate(SCREEN, screens):
        screens += 1
        most = max(most, _renderer_mib())
    return {
        "screens_of_cases": screens + 1,
        "renderer_private_mib_most_of_all_cases": most,
        "renderer_private_mib_after_all_cases": _renderer_mib(),
    }


def _renderer_mib() -> float:
    """Return the largest private memory of a renderer process, in MiB."""
    largest = 0
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if b"--type=renderer" in (place / "cmdline").read_bytes():
                lines = (place / "smaps_rollup").read_text().splitlines()
                own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
                largest = max(largest, own)
        except OSError:
            continue
    return round(largest / 1024, 1)


def write_pages(home: Path) -> dict[str, tuple[Path, list[str], float]]:
    """Write the pages; return each with what to move on it, and the seconds that it took."""
    made = {}
    for name, n_patients, share, n_heads, films, with_map in (
        ("studies_1200", 2400, 0.5, 4, find_films, False),
        ("map_50000", 50_000, 0.04, 3, None, True),
        ("studies_100000", 130_000, 0.77, 3, None, False),
    ):
        rows = make_rows(n_patients, share)
        heads = {f"head-{k}": 1.0 + k / 4 for k in range(n_heads)}
        run = make_run(home / name / "run", rows, heads, complete=False)
        run.write_scores({})
        moves = ["slider", "cases"]
        if with_map:
            give_map(run, rows)
            moves += ["map", "map_repainted"]
        start = time.perf_counter()
        written = write_report(run, home / name / "page", n_resamples=200, find_thumbnails=films)
        made[name] = (Path(written["page"]), moves, round(time.perf_counter() - start, 1))
    return made


def main() -> None:
    """Write the pages, measure them and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        pages = write_pages(Path(home))
        for name, (path, moves, seconds) in pages.items():
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            found[name] = {"report_seconds": seconds, **measure_page(browser, path, moves)}
            beside = path.parent / "cases.js"
            if beside.exists():
                found[name]["cases_js_bytes"] = beside.stat().st_size
            found[name]["chromium"] = browser.version
            browser.close()
    ratios = {"map_repainted_in_frames_of_60_hz": found["map_50000"]
              ["frame_ms_median"]["map_repainted"] * 60 / 1000}  # fmt: skip
    print(json.dumps(found, indent=2))
    if asked.out:
        write_results(asked.out, {"pages": found, "ratios": ratios})


if __name__ == "__main__":
    main()
