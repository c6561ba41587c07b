// The embeddings in two dimensions on a canvas: hover shows a film, a lasso picks cases.

import { describeCase } from "./cases.js";
import { ANSWERS, labelName, labelsOf, regionName } from "./document.js";
import { createFilm } from "./films.js";
import { count, h } from "./text.js";

const SCALE = 65535;
const CELLS = 128;
const METHODS = { pca: "principal components", tsne: "t-SNE" };
const MARGIN = 12;
const MANY = 10000;
const FILM = 190;

const colourings = (page) => {
  const { map } = page;
  const own = (k) => map.case[k];
  const isHere = (k) => own(k) >= 0 && own(k) < page.cases.films.length;
  const decision = (state, k) => {
    const i = own(k);
    const called = page.cases.probability[state.head][i] >= Math.fround(page.thresholds[state.threshold]);
    return [called, called === (page.cases.label[i] === 1)];
  };
  const rest = page.cases_file ? "train, or a case that is not loaded" : "train";
  return {
    label: { title: labelName(page), names: labelsOf(page), grey: 2, of: (state, k) => map.label[k] },
    region: { title: "region", names: [...page.regions, "another region"], of: (state, k) => Math.min(map.region[k], page.regions.length) },
    split: { title: "split", names: ["train", "test"], of: (state, k) => map.split[k] },
    prediction: {
      title: "prediction", names: [...page.classes.map((name) => `called ${name}`), rest], grey: 2,
      of: (state, k) => (isHere(k) ? Number(decision(state, k)[0]) : 2),
    },
    error: {
      title: "error", names: ["right", "wrong", rest], grey: 2,
      of: (state, k) => (isHere(k) ? Number(!decision(state, k)[1]) : 2),
    },
    ...Object.fromEntries(Object.entries(map.targets).map(([name, answers]) =>
      [`target-${name}`, { title: `target ${name}`, names: ANSWERS, grey: 2, of: (state, k) => answers[k] }])),
  };
};

const inside = (shape, x, y) => {
  let is = false;
  for (let i = 0, j = shape.length - 1; i < shape.length; j = i, i += 1) {
    const [ax, ay] = shape[i];
    const [bx, by] = shape[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) is = !is;
  }
  return is;
};

export const addMap = (page, store, host, cases) => {
  const { map } = page;
  const n = map.x.length;
  const ways = colourings(page);
  const chosen = h("select", { id: "map-colour" }, Object.entries(ways).map(([value, way]) => h("option", { value }, way.title)));
  const points = h("canvas", { "aria-hidden": "true" });
  const over = h("canvas", {
    tabindex: "0", role: "application",
    "aria-label": "Map of the embeddings. Arrows move a cross, Shift and arrows draw a frame around cases, Enter opens the nearest case, Esc lets go.",
  });
  const legend = h("p", { class: "map-legend" });
  const said = h("output", { class: "readout" });
  const film = h("div", { class: "map-film", hidden: true });
  const stage = h("div", { class: "stage" }, points, over, film);
  const width = Math.max(...map.x) || 1;
  const height = Math.max(...map.y) || 1;
  let size = [1, 1, 1, MARGIN]; // width and height, pixels a unit, left edge of the points
  let lasso = null;
  let cross = null;
  let corner = null;
  let hit = -1;

  const grid = new Map();
  for (let k = 0; k < n; k += 1) {
    const cell = Math.floor((map.x[k] / (SCALE + 1)) * CELLS) * CELLS + Math.floor((map.y[k] / (SCALE + 1)) * CELLS);
    if (grid.has(cell)) grid.get(cell).push(k);
    else grid.set(cell, [k]);
  }

  const toScreen = (k) => [size[3] + map.x[k] * size[2], size[1] - MARGIN - map.y[k] * size[2]];
  const toData = (x, y) => [(x - size[3]) / size[2], (size[1] - MARGIN - y) / size[2]];

  const colours = () => {
    const style = getComputedStyle(host);
    return ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"].map((name) => style.getPropertyValue(name).trim());
  };

  const draw = () => {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const across = stage.clientWidth;
    if (!across) return;
    const scale = Math.min((across - 2 * MARGIN) / width, (560 - 2 * MARGIN) / height);
    const tall = Math.round(Math.max(220, Math.min(560, height * scale + 2 * MARGIN)));
    size = [across, tall, scale, (across - width * scale) / 2];
    stage.style.height = `${tall}px`;
    for (const canvas of [points, over]) {
      canvas.width = across * ratio;
      canvas.height = tall * ratio;
      canvas.getContext("2d").scale(ratio, ratio);
    }
    paint();
    sketch();
  };

  /** Many points: squares of four pixels, written at once, the last one on top. */
  const fill = (context, groups, order, colourOf) => {
    const { width: across, height: tall } = points;
    const ratio = across / size[0];
    const image = context.createImageData(across, tall);
    const pixels = new Uint32Array(image.data.buffer);
    const { picked } = store.state;
    for (const g of order) {
      const [colour, alpha] = colourOf(g);
      const rgb = Number.parseInt(colour.slice(1), 16);
      const swapped = ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16);
      for (const k of groups[g]) {
        const dim = picked && !(map.case[k] >= 0 && picked.has(map.case[k]));
        const [x, y] = toScreen(k);
        const from = Math.round(y * ratio) * across + Math.round(x * ratio);
        const pixel = (((dim ? 0.12 : alpha) * 255) << 24) | swapped;
        pixels[from] = pixel;
        pixels[from + 1] = pixel;
        pixels[from + across] = pixel;
        pixels[from + across + 1] = pixel;
      }
    }
    context.putImageData(image, 0, 0);
  };

  const paint = () => {
    const way = ways[chosen.value];
    const context = points.getContext("2d");
    const palette = colours();
    context.clearRect(0, 0, size[0], size[1]);
    const side = n > 3000 ? 3 : 5;
    const groups = way.names.map(() => []);
    for (let k = 0; k < n; k += 1) groups[way.of(store.state, k)].push(k);
    const ink = getComputedStyle(host).getPropertyValue("--soft").trim();
    const order = groups.map((_, g) => g).sort((a, b) => groups[b].length - groups[a].length);
    const colourOf = (g) => (g === way.grey ? [ink, 0.3] : [palette[g % palette.length], 0.7]);
    if (n > MANY) fill(context, groups, order, colourOf);
    for (const g of n > MANY ? [] : order) {
      const [colour, alpha] = colourOf(g);
      context.fillStyle = colour;
      context.globalAlpha = alpha;
      for (const k of groups[g]) {
        const dim = store.state.picked && !(map.case[k] >= 0 && store.state.picked.has(map.case[k]));
        if (dim) context.globalAlpha = 0.12;
        const [x, y] = toScreen(k);
        context.fillRect(x - side / 2, y - side / 2, side, side);
        if (dim) context.globalAlpha = alpha;
      }
    }
    context.globalAlpha = 1;
    legend.replaceChildren(...way.names.map((name, g) => [name, g]).filter(([, g]) => groups[g].length).map(([name, g]) => {
      return h("span", {}, h("i", { style: { background: colourOf(g)[0] } }), ` ${name} ${count(groups[g].length)}`);
    }));
  };

  const sketch = () => {
    const context = over.getContext("2d");
    context.clearRect(0, 0, size[0], size[1]);
    const style = getComputedStyle(host);
    context.strokeStyle = style.getPropertyValue("--ink").trim();
    context.lineWidth = 1.5;
    if (lasso?.length > 1) {
      context.setLineDash([5, 4]);
      context.beginPath();
      lasso.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.stroke();
      context.setLineDash([]);
    }
    if (cross) {
      context.beginPath();
      context.moveTo(cross[0] - 9, cross[1]);
      context.lineTo(cross[0] + 9, cross[1]);
      context.moveTo(cross[0], cross[1] - 9);
      context.lineTo(cross[0], cross[1] + 9);
      context.stroke();
    }
    if (hit >= 0) {
      const [x, y] = toScreen(hit);
      context.beginPath();
      context.arc(x, y, 7, 0, 2 * Math.PI);
      context.stroke();
    }
  };

  const nearest = (sx, sy) => {
    const [dx, dy] = toData(sx, sy);
    const cx = Math.floor((dx / (SCALE + 1)) * CELLS);
    const cy = Math.floor((dy / (SCALE + 1)) * CELLS);
    const reach = Math.ceil((12 / size[2] / (SCALE + 1)) * CELLS);
    let best = -1;
    let least = 144;
    for (let a = cx - reach; a <= cx + reach; a += 1) {
      for (let b = cy - reach; b <= cy + reach; b += 1) {
        for (const k of grid.get(a * CELLS + b) ?? []) {
          const [x, y] = toScreen(k);
          const far = (x - sx) ** 2 + (y - sy) ** 2;
          if (far < least) [best, least] = [k, far];
        }
      }
    }
    return best;
  };

  const codeOf = (k) => {
    const i = map.case[k];
    if (i >= 0) return i < page.cases.films.length ? page.cases.films[i].split(" ")[0] : null;
    return i < -1 ? page.cases.training?.films[-2 - i] : null;
  };

  const show = (k) => {
    if (k === hit) return;
    hit = k;
    sketch();
    film.hidden = k < 0;
    if (k < 0) {
      said.textContent = rest();
      return;
    }
    const i = map.case[k];
    const words = [labelsOf(page)[map.label[k]], regionName(page.regions, map.region[k]), map.split[k] ? "test" : "train"];
    if (i >= 0 && i < page.cases.films.length) words.push(describeCase(page, store.state, i).title);
    const way = ways[chosen.value];
    if (way.names === ANSWERS) words.push(`${way.title} ${ANSWERS[way.of(store.state, k)]}`);
    said.textContent = words.join(", ");
    const code = codeOf(k);
    film.replaceChildren((code && createFilm(code, words.join(", "), FILM)) || words.join(", "));
    const [x, y] = toScreen(k);
    film.style.left = `${Math.min(Math.max(x + 14, 0), Math.max(size[0] - 160, 0))}px`;
    film.style.top = `${Math.max(0, Math.min(y + 14, size[1] - 170))}px`;
  };

  const rest = () => (store.state.picked
    ? `${count(store.state.picked.size)} cases picked; Esc lets go.`
    : "Drag around points to see their cases.");

  const pick = (shape) => {
    const picked = new Set();
    for (let k = 0; k < n; k += 1) {
      if (map.case[k] >= 0 && inside(shape, ...toScreen(k))) picked.add(map.case[k]);
    }
    store.set({ picked: picked.size ? picked : null });
  };

  const place = (event) => {
    const box = over.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  over.addEventListener("pointerdown", (event) => {
    over.setPointerCapture(event.pointerId);
    lasso = [place(event)];
    cross = null;
  });
  let asked = null;
  over.addEventListener("pointermove", (event) => {
    const at = place(event);
    if (lasso) lasso.push(at);
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = null;
      if (lasso) sketch();
      else show(nearest(...at));
    });
  });
  over.addEventListener("pointerup", (event) => {
    const drawn = lasso;
    lasso = null;
    sketch();
    if (!drawn) return;
    const [first, last] = [drawn[0], place(event)];
    const moved = drawn.some(([x, y]) => Math.hypot(x - first[0], y - first[1]) > 6);
    if (moved) {
      pick(drawn);
      return;
    }
    const k = nearest(...last);
    if (k >= 0 && map.case[k] >= 0 && map.case[k] < page.cases.films.length) cases.open(map.case[k]);
  });
  over.addEventListener("pointerleave", () => show(-1));
  over.addEventListener("blur", () => {
    cross = null;
    corner = null;
    show(-1);
    sketch();
  });
  over.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (by) {
      cross ??= [size[0] / 2, size[1] / 2];
      if (event.shiftKey) corner ??= [...cross];
      else corner = null;
      const reach = event.ctrlKey ? 2 : 16;
      cross = cross.map((v, axis) => Math.min(Math.max(v + reach * by[axis], 0), size[axis]));
      lasso = corner && [corner, [cross[0], corner[1]], cross, [corner[0], cross[1]]];
      if (lasso) pick(lasso);
      show(nearest(...cross));
      sketch();
    } else if (event.key === "Enter" && hit >= 0 && map.case[hit] >= 0) cases.open(map.case[hit]);
    else if (event.key === "Escape") {
      lasso = null;
      corner = null;
      store.set({ picked: null });
      sketch();
    } else return;
    event.preventDefault();
  });
  over.addEventListener("keyup", (event) => {
    if (event.key === "Shift") {
      lasso = null;
      corner = null;
      sketch();
    }
  });

  chosen.addEventListener("change", paint);
  store.on(["picked"], () => {
    paint();
    said.textContent = rest();
  });
  store.on(["head", "threshold", "held"], () => ["prediction", "error"].includes(chosen.value) && paint());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  const some = map.n > n ? `${count(n)} of ${count(map.n)} images, all of test first` : `${count(n)} images`;
  const axes = map.explained.length === 2 ? `; the axes hold ${map.explained.map((v) => Math.round(100 * v)).join(" and ")} % of the variance` : "";
  host.append(
    h("div", { class: "bar" }, h("p", { class: "control" }, h("label", { for: "map-colour" }, "Colour by"), chosen), legend),
    stage, said,
    h("p", { class: "legend" }, `Prediction and error are coloured for images of test${page.cases_file ? " whose cases this page has loaded" : ""}; the others are grey.`),
    h("p", { class: "legend" }, `${some} of ${map.run}, ${map.pooling}, by ${METHODS[map.method] ?? map.method}${axes}. Nearness is only a hint: most of what tells images apart is lost in two dimensions.`));
  said.textContent = rest();
  new ResizeObserver(draw).observe(stage);
  draw();
};
