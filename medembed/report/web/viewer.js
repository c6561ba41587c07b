// One case, large: window and contrast, heat map, the original beside, nearest films of training.

import { describeCase } from "./cases.js";
import { ANSWERS, filmUrl, labelName, labelsOf, readFilms, regionName, unpack } from "./document.js";
import { createFilm } from "./films.js";
import { count, h, share, svg } from "./text.js";

const POSITIVE = [230, 159, 0];
const NEGATIVE = [86, 180, 233];
const NEAR = 240; // pixels of a near film

/** A filter that maps a window of grey levels to black and white. */
const createWindow = () => {
  const channels = ["R", "G", "B"].map((name) => svg(`feFunc${name}`, { type: "linear", slope: 1, intercept: 0 }));
  const filter = svg("svg", { width: 0, height: 0, "aria-hidden": "true", class: "hidden" },
    svg("filter", { id: "window", "color-interpolation-filters": "sRGB" },
      svg("feComponentTransfer", {}, channels)));
  const set = (level, width) => {
    const slope = 100 / width;
    for (const channel of channels) {
      channel.setAttribute("slope", slope);
      channel.setAttribute("intercept", 0.5 - slope * (level / 100));
    }
  };
  return { filter, set };
};

const drawHeat = (heat) => {
  const canvas = h("canvas", { width: heat.columns, height: heat.rows, class: "heat", "aria-hidden": "true" });
  const values = unpack(heat.values);
  const context = canvas.getContext("2d");
  const image = context.createImageData(heat.columns, heat.rows);
  values.forEach((value, k) => {
    const part = (value - 128) / 127;
    image.data.set([...(part > 0 ? POSITIVE : NEGATIVE), Math.abs(part) * 255], 4 * k);
  });
  context.putImageData(image, 0, 0);
  const [left, top, right, bottom] = heat.box;
  Object.assign(canvas.style, {
    left: `${100 * left}%`, top: `${100 * top}%`,
    width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%`,
  }); // prettier-ignore
  return canvas;
};

const slider = (id, title, value, change, { min = 1, max = 100 } = {}) => {
  const input = h("input", { id, type: "range", min, max, value });
  input.addEventListener("input", () => change(Number(input.value)));
  return { input, control: h("p", { class: "control" }, h("label", { for: id }, title), input) };
};

export const createViewer = (page, store, { step, closed }) => {
  const title = h("h3", { id: "viewer-title" });
  const films = h("div", { class: "films" });
  const facts = h("div", { class: "facts-of-case" });
  const near = h("div", { class: "near" });
  const { filter, set } = createWindow();
  const named = labelName(page).replace(/^./, (first) => first.toUpperCase());
  const window_ = { level: 50, width: 100, heat: false, opacity: 70 };
  const adjust = () => {
    set(window_.level, window_.width);
    dialog.style.setProperty("--heat", window_.opacity / 100);
    dialog.classList.toggle("with-heat", window_.heat);
  };
  const level = slider("level", "Window centre", 50, (v) => { window_.level = v; adjust(); }, { min: 0 });
  const width = slider("width", "Window width", 100, (v) => { window_.width = v; adjust(); });
  const opacity = slider("opacity", "Opacity", 70, (v) => { window_.opacity = v; adjust(); }, { min: 0 });
  const heat = h("input", { id: "heat", type: "checkbox" });
  heat.addEventListener("change", () => { window_.heat = heat.checked; adjust(); });
  const heatTools = h("span", { class: "heat-tools" },
    h("label", { for: "heat" }, heat, " Heat map"), opacity.control);
  const reset = h("button", { type: "button", onclick: () => {
    Object.assign(window_, { level: 50, width: 100 });
    level.input.value = 50;
    width.input.value = 100;
    adjust();
  } }, "Reset");
  const move = (by) => show(...step(by));
  const dialog = h("dialog", { class: "viewer", "aria-labelledby": "viewer-title" },
    h("div", { class: "viewer-head" }, title,
      h("button", { type: "button", "aria-label": "Previous case", onclick: () => move(-1) }, "←"),
      h("button", { type: "button", "aria-label": "Next case", onclick: () => move(1) }, "→"),
      h("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close")),
    h("div", { class: "bar film-tools" }, level.control, width.control, reset, heatTools),
    h("div", { class: "viewer-body" }, films, h("div", { class: "about" }, facts, near)),
    filter);
  document.body.append(dialog);
  dialog.addEventListener("close", closed);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select")) return;
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    move(by);
  });

  const film = (code, alt, own) => {
    if (!filmUrl(code)) return h("p", { class: "missing" }, `No picture of ${alt}.`);
    const picture = () => createFilm(code, alt, own ? 0 : NEAR);
    const known = own && Object.hasOwn(readFilms().heat, code) ? readFilms().heat[code] : null;
    const stack = h("div", { class: "stack" }, picture(), known ? drawHeat(known) : null);
    return known ? h("div", { class: "pair" }, stack, h("div", { class: "stack original" }, picture())) : stack;
  };

  const show = (i, place, n) => {
    const own = describeCase(page, store.state, i);
    const { cases } = page;
    title.textContent = "";
    title.append(h("span", { class: own.kind[0] === "f" ? "wrong" : "right" }, own.title), `, case ${count(place + 1)} of ${count(n)}`);
    films.replaceChildren(...own.films.map((code, k) => {
      const name = own.names ? own.names[k] : code.slice(0, 12);
      return h("figure", {}, film(code, `view ${k + 1} of ${own.films.length}, ${own.region}`, true), h("figcaption", {}, name));
    }));
    const some = own.films.some((code) => Object.hasOwn(readFilms().heat, code));
    heatTools.hidden = !some;
    const hasFilm = own.films.some(filmUrl);
    dialog.classList.toggle("without-films", !hasFilm);
    const rows = [
      [named, page.classes[Number(own.abnormal)]],
      ["Decision", page.classes[Number(own.called)]],
      ["Region", own.region],
      ...(own.set ? [[`Set at 90 % of ${page.heads[0].name}`, own.set]] : []),
      ...(Number.isFinite(own.distance) ? [["Distance from training", share(own.distance)]] : []),
      ...Object.entries(cases.targets).map(([name, answers]) => [`Target ${name}`, ANSWERS[answers[i]]]),
      ...Object.entries(cases.covariates).map(([name, values]) => [name, values[i] || "–"]),
    ];
    facts.replaceChildren(
      h("dl", {}, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Probabilities by head" }, h("table", {}, h("caption", {}, `Calibrated probability of ${page.classes[1]}`),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Head"), h("th", { scope: "col", class: "number" }, "Probability"), h("th", { scope: "col", class: "number" }, "Youden’s threshold"))),
        h("tbody", {}, page.heads.map((head, k) => h("tr", {}, h("th", { scope: "row" }, head.name),
          h("td", { class: "number" }, share(cases.probability[k][i])), h("td", { class: "number" }, share(head.threshold))))))));
    showNear(i);
    if (!dialog.open) dialog.showModal();
  };

  const showNear = (i) => {
    const { training } = page.cases;
    near.replaceChildren();
    if (!training || (i + 1) * training.k > training.neighbours.length) return;
    const cards = [];
    for (let k = 0; k < training.k; k += 1) {
      const row = training.neighbours[i * training.k + k];
      if (row < 0) continue;
      const label = labelsOf(page)[training.label[row]];
      const region = regionName(page.regions, training.region[row]);
      cards.push(h("figure", {}, film(training.films[row], `a training film, ${label}, ${region}`, false),
        h("figcaption", {}, h("strong", {}, label), `, ${region}, cosine ${share(training.similarity[i * training.k + k])}`)));
    }
    near.append(h("h4", {}, `Nearest films of training, by ${training.pooling}`), h("div", { class: "strip" }, cards));
  };
  adjust();
  return { open: show };
};
