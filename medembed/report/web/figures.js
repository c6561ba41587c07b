// Figures that answer: all of them follow the chosen head, the heads shown, and one threshold.

import { createPlot } from "./plot.js";
import { count, h, share, threshold } from "./text.js";

const BINS = 40;

/** The four cells at a threshold, and what follows from them at a prevalence. */
export const decide = (page, head, k, prevalence) => {
  const { n, n_abnormal: nAbnormal } = page.test;
  const nNormal = n - nAbnormal;
  const tp = head.truePositives[k];
  const fp = head.falsePositives[k];
  const sensitivity = tp / nAbnormal;
  const specificity = (nNormal - fp) / nNormal;
  const called = sensitivity * prevalence + (1 - specificity) * (1 - prevalence);
  const passed = (1 - sensitivity) * prevalence + specificity * (1 - prevalence);
  return {
    tp, fp, fn: nAbnormal - tp, tn: nNormal - fp, sensitivity, specificity,
    ppv: (sensitivity * prevalence) / called,
    npv: (specificity * (1 - prevalence)) / passed,
  }; // prettier-ignore
};

const shown = (page, state) => page.heads.map((head, i) => ({ head, i })).filter(({ i }) => state.shown[i]);

/** The heads that are drawn, the chosen one last and so on top. */
const inOrder = (page, state) => {
  const others = shown(page, state).filter(({ i }) => i !== state.head);
  return [{ head: page.heads[state.head], i: state.head }, ...others];
};

const curve = (page, state, store, rates, tellPoint, more) =>
  inOrder(page, state).map(({ head, i }) => {
    const points = [];
    const at = [];
    for (let k = page.thresholds.length - 1; k >= 0; k -= 1) {
      const [x, y] = rates(head.truePositives[k], head.falsePositives[k]);
      const last = points.at(-1);
      if (Number.isFinite(x) && Number.isFinite(y) && !(last && last[0] === x && last[1] === y)) {
        points.push([x, y]);
        at.push(k);
      } else if (last && last[0] === x && last[1] === y) at[at.length - 1] = k;
    }
    return {
      points,
      className: `s${i}`,
      tell: (j) => `${head.name}, threshold ${threshold(page.thresholds[at[j]])}: ${tellPoint(points[j])}`,
      choose: (j) => store.set({ head: i, threshold: at[j] }),
      ...more(i, points),
    };
  });

const addRoc = (page, store, host) => {
  const plot = createPlot(host);
  const { n, n_abnormal: nAbnormal } = page.test;
  const rates = (tp, fp) => [fp / (n - nAbnormal), tp / nAbnormal];
  const redraw = (state) => {
    const series = curve(page, state, store, rates,
      ([x, y]) => `sensitivity ${share(y)}, specificity ${share(1 - x)}`,
      (i) => ({ band: i === 0 ? page.roc_band && { ...page.roc_band } : null }));
    for (const own of series) { // from no row to all rows
      own.points = [[0, 0], ...own.points, [1, 1]];
      const { tell, choose } = own;
      const last = own.points.length - 1;
      own.tell = (j) => (j === 0 || j === last ? `all called ${page.classes[Number(j > 0)]}` : tell(j - 1));
      own.choose = (j) => j !== 0 && j !== last && choose(j - 1);
    }
    plot.draw({
      x: { label: "1 − specificity", domain: [0, 1] },
      y: { label: "Sensitivity", domain: [0, 1] },
      series,
      references: [{ points: [[0, 0], [1, 1]], label: "chance" }],
    });
    remark(state);
  };
  const remark = (state) => {
    const k = state.threshold;
    plot.mark({
      points: inOrder(page, state).map(({ head, i }) => {
        const [x, y] = rates(head.truePositives[k], head.falsePositives[k]);
        return { x, y, className: `s${i}` };
      }),
      said: "Point at a curve; a click moves the threshold there.",
    });
  };
  return { redraw, remark };
};

const addPrecisionRecall = (page, store, host) => {
  const plot = createPlot(host);
  const { n, n_abnormal: nAbnormal } = page.test;
  const rates = (tp, fp) => [tp / nAbnormal, tp / (tp + fp)];
  const redraw = (state) => {
    const band = page.precision_recall_band;
    plot.draw({
      x: { label: "Recall (sensitivity)", domain: [0, 1] },
      y: { label: "Precision (PPV on test)", domain: [0, 1] },
      series: curve(page, state, store, rates,
        ([x, y]) => `recall ${share(x)}, precision ${share(y)}`,
        (i) => ({ step: true, band: i === 0 ? band : null })),
      references: [{ points: [[0, nAbnormal / n], [1, nAbnormal / n]], label: "chance" }],
    });
    remark(state);
  };
  const remark = (state) => {
    const k = state.threshold;
    plot.mark({
      points: inOrder(page, state)
        .map(({ head, i }) => [...rates(head.truePositives[k], head.falsePositives[k]), i])
        .filter(([, y]) => Number.isFinite(y))
        .map(([x, y, i]) => ({ x, y, className: `s${i}` })),
      said: "The average precision is the area below the steps.",
    });
  };
  return { redraw, remark };
};

const addCalibration = (page, store, host) => {
  const plot = createPlot(host);
  const redraw = (state) => {
    plot.draw({
      x: { label: "Calibrated probability", domain: [0, 1] },
      y: { label: `Share ${page.classes[1]}`, domain: [0, 1] },
      series: inOrder(page, state).map(({ head, i }) => {
        const { probability, share: shares, low, high } = head.calibration;
        const known = probability.map((_, j) => j).filter((j) => low[j] !== null && high[j] !== null);
        const pick = (values) => known.map((j) => values[j]);
        const bins = head.bins.filter((bin) => bin.n && bin.share_abnormal !== null);
        return {
          points: probability.map((p, j) => [p, shares[j]]),
          className: `s${i}`,
          band: i === state.head && known.length ? { x: pick(probability), low: pick(low), high: pick(high) } : null,
          dots: i === state.head
            ? bins.map((bin) => ({
              x: bin.mean_probability, y: bin.share_abnormal,
              low: bin.share_low ?? bin.share_abnormal, high: bin.share_high ?? bin.share_abnormal,
            }))
            : null,
          tell: (j) => `${head.name}: of studies at ${share(probability[j])}, ${share(shares[j])} are ${page.classes[1]}`,
          choose: (j) => store.set({ threshold: nearestThreshold(page, probability[j]) }),
        };
      }),
      references: [{ points: [[0, 0], [1, 1]], label: "perfect calibration" }],
    });
    remark(state);
  };
  const remark = (state) =>
    plot.mark({ lines: [page.thresholds[state.threshold]], said: "Points: bins of the chosen head, with intervals." });
  return { redraw, remark };
};

export const nearestThreshold = (page, value) => {
  let best = 0;
  page.thresholds.forEach((own, k) => {
    if (Math.abs(own - value) < Math.abs(page.thresholds[best] - value)) best = k;
  });
  return best;
};

const addDecisionCurve = (page, store, host) => {
  const plot = createPlot(host);
  const redraw = (state) => {
    const heads = inOrder(page, state);
    const chosen = page.heads[state.head].benefit;
    const values = [...heads.flatMap(({ head }) => head.benefit.value), 0];
    const top = Math.max(...values);
    const bottom = Math.max(Math.min(...values), -0.25 * Math.max(top, 0.05));
    const clip = (value) => Math.max(value, bottom);
    const known = chosen.thresholds.map((_, j) => j).filter((j) => chosen.low[j] !== null && chosen.high[j] !== null);
    plot.draw({
      x: { label: "Threshold", domain: [0, 1] },
      y: { label: "Net benefit", domain: [bottom, top * 1.05 || 0.1] },
      series: heads.map(({ head, i }) => ({
        points: head.benefit.thresholds.map((t, j) => [t, clip(head.benefit.value[j])]),
        className: `s${i}`,
        band: i === state.head && known.length
          ? {
            x: known.map((j) => chosen.thresholds[j]),
            low: known.map((j) => clip(chosen.low[j])),
            high: known.map((j) => Math.min(chosen.high[j], top * 1.05)),
          }
          : null,
        tell: (j) => `${head.name}, threshold ${threshold(head.benefit.thresholds[j])}: net benefit ${share(head.benefit.value[j])}`,
        choose: (j) => store.set({ head: i, threshold: nearestThreshold(page, head.benefit.thresholds[j]) }),
      })),
      references: [
        { points: [[0, 0], [1, 0]], label: "nobody is treated" },
        {
          points: chosen.thresholds.map((t, j) => [t, chosen.treat_all[j]]).filter(([, v]) => v >= bottom),
          label: "all are treated",
        },
      ],
    });
    remark(state);
  };
  const remark = (state) =>
    plot.mark({ lines: [page.thresholds[state.threshold]], said: "Dotted: all are treated, and nobody is." });
  return { redraw, remark };
};

const addDistribution = (page, store, host) => {
  const plot = createPlot(host);
  const [negative, positive] = page.classes;
  const region = h("select", { id: "distribution-region" },
    h("option", { value: "-1" }, "all regions"),
    page.regions.map((name, code) => h("option", { value: code }, name)));
  region.addEventListener("change", () => redraw(store.state));
  if (page.regions.length > 1) {
    host.append(h("p", { class: "control" }, h("label", { for: "distribution-region" }, "Region"), region));
  }
  const redraw = (state) => {
    const head = page.heads[state.head];
    const wanted = Number(region.value || -1);
    const counts = [new Array(BINS).fill(0), new Array(BINS).fill(0)];
    page.regions.forEach((_, code) => {
      if (wanted >= 0 && code !== wanted) return;
      for (const label of [0, 1]) {
        for (let b = 0; b < BINS; b += 1) counts[label][b] += head.distribution[(code * 2 + label) * BINS + b];
      }
    });
    const totals = counts.map((own) => own.reduce((a, b) => a + b, 0));
    const shares = counts.map((own, label) => own.map((v) => (totals[label] ? v / totals[label] : 0)));
    const top = Math.max(0.02, ...shares.flat());
    plot.draw({
      x: { label: `Calibrated probability of ${page.classes[1]}`, domain: [0, 1] },
      y: { label: "Share of the class", domain: [0, top * 1.08] },
      series: shares.map((own, label) => ({
        points: own.flatMap((v, b) => [[b / BINS, v], [(b + 1) / BINS, v]]),
        step: true,
        area: true,
        className: label ? "abnormal" : "normal",
        tell: (j) => {
          const b = Math.floor(j / 2);
          const name = page.classes[label];
          return `${count(counts[label][b])} of ${count(totals[label])} ${name} between ${share(b / BINS)} and ${share((b + 1) / BINS)}`;
        },
      })),
    });
    remark(state);
  };
  const remark = (state) =>
    plot.mark({ lines: [page.thresholds[state.threshold]], said: `Dashed: ${negative}. Solid: ${positive}.` });
  return { redraw, remark };
};

const addConfusion = (page, store, host) => {
  const [negative, positive] = page.classes;
  const remark = (state) => {
    const head = page.heads[state.head];
    const found = decide(page, head, state.threshold, state.prevalence);
    const cell = (name, value, of, kind) =>
      h("td", { class: `cell ${kind}`, style: { "--fill": of ? value / of : 0 } },
        h("b", {}, count(value)), h("small", {}, `${name}, ${share((100 * value) / of, 0)} %`));
    const { tp, fp, fn, tn } = found;
    const plural = page.test.level === "study" ? "studies" : "images";
    host.replaceChildren(
      h("table", { class: "matrix" },
        h("caption", {}, `${head.name} at threshold ${threshold(page.thresholds[state.threshold])}, ${count(page.test.n)} ${plural}`),
        h("thead", {}, h("tr", {}, h("td", {}), page.classes.map((name) => h("th", { scope: "col" }, `called ${name}`)))),
        h("tbody", {},
          h("tr", {}, h("th", { scope: "row" }, negative), cell("true negative", tn, tn + fp, "right"), cell("false positive", fp, tn + fp, "wrong")),
          h("tr", {}, h("th", { scope: "row" }, positive), cell("false negative", fn, tp + fn, "wrong"), cell("true positive", tp, tp + fn, "right")))),
    );
  };
  return { redraw: remark, remark };
};

const KINDS = {
  roc: addRoc,
  precision_recall: addPrecisionRecall,
  distribution: addDistribution,
  calibration: addCalibration,
  decision_curve: addDecisionCurve,
  confusion: addConfusion,
};

export const addFigures = (page, store) => {
  for (const host of document.querySelectorAll("[data-plot]")) {
    const figure = KINDS[host.dataset.plot](page, store, host);
    figure.redraw(store.state);
    store.on(["head", "shown"], figure.redraw);
    store.on(["threshold"], figure.remark);
  }
};
