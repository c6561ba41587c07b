// A small chart in SVG: axes, lines with bands, marks, and the nearest point by pointer or keys.

import { h, svg, visible } from "./text.js";

const WIDTH = 480;
const LEFT = 52;
const RIGHT = 12;
const TOP = 8;
const BOTTOM = 42;

const ticksOf = ([low, high]) => {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1].find((s) => (high - low) / s <= 6) ?? 1;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(4)));
};

const pathOf = (points, step) => {
  let path = "";
  let before = null;
  for (const [x, y] of points) {
    if (before && step) path += `L${before[0].toFixed(1)} ${y.toFixed(1)}`;
    path += `${before ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    before = [x, y];
  }
  return path;
};

/**
 * A chart within `host`.
 *
 * `draw({x, y, series, references})` draws anew: `x` and `y` are {label, domain}; a series is
 * {points: [[x, y], …], className, step, band: {x, low, high}, dots, bars, tell(i), choose(i)}.
 * `mark({points, lines, said})` moves what belongs to the threshold.
 */
export const createPlot = (host, { height = 400 } = {}) => {
  const title = host.dataset.title;
  const said = h("output", { class: "readout" });
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, "aria-hidden": "true" });
  const marks = svg("g", { class: "marks" });
  const pointer = svg("g", { class: "pointer" });
  const frame = h("div", { class: "chart", role: "group", tabindex: "0", "aria-label": title }, chart);
  host.replaceChildren(frame, said);
  let series = [];
  let scaleX, scaleY, rest = "";
  let at = null;

  const draw = ({ x, y, series: given, references = [] }) => {
    series = given;
    at = null;
    scaleX = (v) => LEFT + ((v - x.domain[0]) / (x.domain[1] - x.domain[0])) * (WIDTH - LEFT - RIGHT);
    scaleY = (v) => height - BOTTOM - ((v - y.domain[0]) / (y.domain[1] - y.domain[0])) * (height - TOP - BOTTOM);
    const grid = svg("g", { class: "axis" });
    for (const tick of ticksOf(x.domain)) {
      grid.append(
        svg("path", { class: "gridline", d: `M${scaleX(tick)} ${TOP}V${height - BOTTOM}` }),
        svg("text", { x: scaleX(tick), y: height - BOTTOM + 16, "text-anchor": "middle" }, tick),
      );
    }
    for (const tick of ticksOf(y.domain)) {
      grid.append(
        svg("path", { class: "gridline", d: `M${LEFT} ${scaleY(tick)}H${WIDTH - RIGHT}` }),
        svg("text", { x: LEFT - 6, y: scaleY(tick) + 4, "text-anchor": "end" }, tick),
      );
    }
    const middle = (TOP + height - BOTTOM) / 2;
    grid.append(
      svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: height - 8, "text-anchor": "middle" }, x.label),
      svg("text", { x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, y.label),
    );
    const place = (points) => points.map(([a, b]) => [scaleX(a), scaleY(b)]);
    const parts = references.map(({ points, label }) =>
      svg("path", { class: "reference", d: pathOf(place(points)) }, svg("title", {}, label)),
    );
    for (const own of series) {
      if (own.band) {
        const { x: across, low, high } = own.band;
        const upper = place(across.map((v, i) => [v, high[i]]));
        const lower = place(across.map((v, i) => [v, low[i]])).reverse();
        parts.push(svg("path", { class: `band ${own.className}`, d: `${pathOf([...upper, ...lower])}Z` }));
      }
      if (own.area) {
        const ends = place([[x.domain[0], 0], [x.domain[1], 0]]);
        parts.push(svg("path", { class: `band ${own.className}`, d: `${pathOf([ends[0], ...place(own.points), ends[1]], own.step)}Z` }));
      }
      if (own.dots) {
        for (const dot of own.dots) {
          parts.push(
            svg("path", { class: `line ${own.className} solid`, d: `M${scaleX(dot.x)} ${scaleY(dot.low)}V${scaleY(dot.high)}` }),
            svg("circle", { class: `dot ${own.className}`, cx: scaleX(dot.x), cy: scaleY(dot.y), r: 4 }),
          );
        }
      }
      parts.push(svg("path", { class: `line ${own.className}`, d: pathOf(place(own.points), own.step) }));
    }
    pointer.replaceChildren();
    chart.replaceChildren(grid, ...parts, marks, pointer);
  };

  const mark = ({ points = [], lines = [], said: text = "" }) => {
    marks.replaceChildren(
      ...lines.map((v) => svg("path", { class: "cut", d: `M${scaleX(v)} ${TOP}V${height - BOTTOM}` })),
      ...points.map(({ x, y, className }) =>
        svg("circle", { class: `mark ${className}`, cx: scaleX(x), cy: scaleY(y), r: 5.5 }),
      ),
    );
    rest = text;
    if (!at) said.textContent = rest;
  };

  const show = (found) => {
    at = found;
    if (!found) {
      pointer.replaceChildren();
      said.textContent = rest;
      return;
    }
    const [x, y] = found.own.points[found.i];
    pointer.replaceChildren(svg("circle", { class: "ring", cx: scaleX(x), cy: scaleY(y), r: 8 }));
    said.textContent = visible(found.own.tell(found.i));
  };

  const nearest = (event) => {
    const box = chart.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * WIDTH;
    const py = ((event.clientY - box.top) / box.height) * height;
    let best = null;
    for (const own of series) {
      for (let i = 0; i < own.points.length; i += 1) {
        const [x, y] = own.points[i];
        const far = (scaleX(x) - px) ** 2 + (scaleY(y) - py) ** 2;
        if (!best || far < best.far) best = { own, i, far };
      }
    }
    return best && best.far < 900 ? best : null;
  };

  chart.addEventListener("pointermove", (event) => show(nearest(event)));
  chart.addEventListener("pointerleave", () => show(null));
  chart.addEventListener("click", (event) => {
    const found = nearest(event);
    if (found?.own.choose) found.own.choose(found.i);
  });
  frame.addEventListener("blur", () => show(null));
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    const own = at?.own ?? series.find(({ points }) => points.length); // a line that none could fit has none
    if (move && own) {
      const from = at?.i ?? (move > 0 ? -1 : own.points.length);
      show({ own, i: Math.min(Math.max(from + move, 0), own.points.length - 1) });
    } else if (event.key === "Enter" && at?.own.choose) at.own.choose(at.i);
    else if (event.key === "Escape") show(null);
    else return;
    event.preventDefault();
  });
  return { draw, mark };
};
