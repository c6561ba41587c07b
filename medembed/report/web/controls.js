// The bar that all figures and cases follow: heads, threshold, prevalence, and what comes of them.

import { decide, nearestThreshold } from "./figures.js";
import { count, h, share, svg, threshold, withInterval } from "./text.js";

const POINT_NAMES = { youden: "Youden" };

const swatch = (i) =>
  svg("svg", { class: "swatch", viewBox: "0 0 28 8", "aria-hidden": "true" },
    svg("path", { class: `line s${i}`, d: "M0 4H28" }));

const copyText = async (field, said) => {
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
  } catch {
    document.execCommand("copy"); // where a page from a disk has no clipboard
  }
  said.textContent = "Copied.";
};

export const addControls = (page, store, host) => {
  const { state } = store;
  const top = page.thresholds.length - 1;
  const heads = h("select", { id: "head" }, page.heads.map((head, i) => h("option", { value: i }, head.name)));
  const slider = h("input", { id: "slider", type: "range", min: 0, max: top, step: 1, value: state.threshold });
  const typed = h("input", { id: "typed", type: "number", min: 0, max: 1, step: "any", inputmode: "decimal" });
  const prevalence = h("input", { id: "prevalence", type: "number", min: 0.1, max: 99.9, step: "any", inputmode: "decimal", value: Number((100 * state.prevalence).toFixed(2)) });
  const points = h("span", { class: "chips", role: "group", "aria-label": "Operating points" });
  const results = h("dl", { class: "results" });
  const option = h("input", { id: "option", readonly: true, size: 36, "aria-label": "Option for medembed report" });
  const copied = h("span", { role: "status", class: "said" });
  const copy = h("button", { type: "button", onclick: () => copyText(option, copied) }, "Copy");

  heads.addEventListener("change", () => {
    const head = Number(heads.value);
    store.set({ head, threshold: nearestThreshold(page, page.heads[head].threshold) });
  });
  slider.addEventListener("input", () => store.set({ threshold: Number(slider.value) }));
  typed.addEventListener("change", () => {
    const value = Number(typed.value);
    if (value > 0 && value < 1) store.set({ threshold: nearestThreshold(page, value) });
    show(state);
  });
  prevalence.addEventListener("input", () => {
    const value = Number(prevalence.value) / 100;
    const isGiven = value > 0 && value < 1;
    prevalence.setAttribute("aria-invalid", String(!isGiven));
    if (isGiven) store.set({ prevalence: value });
  });

  const legend = h("fieldset", { class: "legend-heads" }, h("legend", {}, "Heads"),
    page.heads.map((head, i) => {
      const box = h("input", { type: "checkbox", id: `show-${i}`, checked: state.shown[i] });
      box.addEventListener("change", () => {
        const now = [...state.shown];
        now[i] = box.checked;
        store.set({ shown: now });
      });
      return h("label", { for: `show-${i}` }, box, swatch(i), h("span", {}, head.name), h("small", {}, withInterval(head.auroc)));
    }));

  const pointOf = () => {
    const value = page.thresholds[state.threshold];
    const here = page.heads[state.head].points.filter((point) => point.threshold === value);
    return here.find((point) => point.name === state.point) ?? here[0];
  };

  const show = () => {
    const value = page.thresholds[state.threshold];
    const head = page.heads[state.head];
    const point = pointOf();
    heads.value = String(state.head);
    slider.value = String(state.threshold);
    slider.setAttribute("aria-valuetext", `${threshold(value)}${point ? `, ${point.name}` : ""}`);
    typed.value = threshold(value);
    points.replaceChildren(...head.points.map((own) =>
      h("button", {
        type: "button",
        "aria-pressed": String(own === point),
        onclick: () => store.set({ threshold: page.thresholds.indexOf(own.threshold), point: own.name }),
      }, POINT_NAMES[own.name] ?? own.name)));
    const found = decide(page, head, state.threshold, state.prevalence);
    const interval = (name) => {
      const score = point?.scores[name];
      return score && score.low !== null ? `[${share(score.low)}, ${share(score.high)}]` : "";
    };
    const tell = (name, number, about, between = "") =>
      h("div", {}, h("dt", {}, name), h("dd", {}, h("b", {}, share(number)), h("span", {}, ` ${between}`), h("small", {}, about)));
    const assumed = `at ${Number((100 * state.prevalence).toFixed(2))} % ${page.classes[1]}`;
    results.replaceChildren(
      tell("Sensitivity", found.sensitivity, `${count(found.tp)} of ${count(found.tp + found.fn)}`, interval("sensitivity")),
      tell("Specificity", found.specificity, `${count(found.tn)} of ${count(found.tn + found.fp)}`, interval("specificity")),
      tell("PPV", found.ppv, assumed),
      tell("NPV", found.npv, assumed),
    );
    const name = point?.name ?? `threshold=${Number(value.toFixed(6))}`;
    option.value = `--operating-point ${name}`;
    copied.textContent = "";
  };

  host.append(
    h("div", { class: "bar" },
      h("p", { class: "control" }, h("label", { for: "head" }, "Decisions of"), heads),
      h("p", { class: "control stretch" }, h("label", { for: "slider" }, "Threshold"), slider,
        h("label", { for: "typed", class: "hidden" }, "Threshold as a number"), typed),
      h("p", { class: "control" }, points),
      h("p", { class: "control" }, h("label", { for: "prevalence" }, "Prevalence, %"), prevalence)),
    results);
  host.after(
    h("div", { class: "beside" }, legend,
      h("div", { class: "copying" },
        h("p", { class: "control" }, option, copy, copied),
        h("p", { class: "legend" }, "Intervals stand at named operating points. A threshold that is chosen by looking at test looks better than it is: add it to the next report, and confirm it on other patients."))));
  store.on(["head", "threshold", "prevalence", "point"], show);
  show();
};
