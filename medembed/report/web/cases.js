// Every test study as a card, of which only those in sight are elements.

import { ANSWERS, filmUrl, readCases, readFilms, regionName } from "./document.js";
import { createFilm } from "./films.js";
import { count, h, share, visible } from "./text.js";
import { createViewer } from "./viewer.js";

const GAP = 10;
const CARD = 190;
const DIGITS = 12;
const PRINTED = 24;
const KEPT = 60;
const FILM = 142; // pixels, as in page.css
const KINDS = {
  all: "all",
  mistakes: "mistakes",
  fp: "false positives",
  fn: "false negatives",
  tp: "true positives",
  tn: "true negatives",
  uncertain: "uncertain: set of both or neither",
};
const SORTS = {
  mistakes: "mistakes first",
  high: "highest probability",
  low: "lowest probability",
  close: "closest to the threshold",
  region: "region",
  far: "furthest from training",
};
const FEW = 3;
const setsOf = ({ classes }) => ["neither", ...classes, classes.join(" or ")];

const logit = (p) => {
  const clipped = Math.min(Math.max(p, 1e-7), 1 - 1e-7);
  return Math.log(clipped / (1 - clipped));
};

/** What is known of a case under the chosen head and threshold. */
export const describeCase = (page, state, i) => {
  const { cases } = page;
  const p = cases.probability.length ? cases.probability[state.head][i] : NaN;
  const called = p >= Math.fround(page.thresholds[state.threshold] ?? 2);
  const abnormal = cases.label[i] === 1;
  const kind = (called ? (abnormal ? "tp" : "fp") : abnormal ? "fn" : "tn");
  return {
    i, p, called, abnormal, kind,
    title: KINDS[kind].slice(0, -1),
    region: regionName(page.regions, cases.region[i]),
    films: cases.films[i].split(" "),
    names: cases.names?.[i] ?? null,
    set: cases.sets ? setsOf(page)[cases.sets[i]] : null,
    distance: cases.distance ? cases.distance[i] : NaN,
  }; // prettier-ignore
};

const isUncertain = (page, i) => page.cases.sets && page.cases.sets[i] % 3 === 0;

const select = (id, options, title) =>
  h("p", { class: "control" }, h("label", { for: id }, title),
    h("select", { id }, options.map(([value, text]) => h("option", { value }, text))));

/** A control for each further target: beside the others if few, else folded up below them. */
const addTargets = (page) => {
  const names = Object.keys(page.cases.targets);
  const options = [["", "any"], ...[1, 0, 2].map((code) => [code, ANSWERS[code]])];
  const controls = names.map((name, k) => select(`case-target-${k}`, options, `Target ${name}`));
  const wanted = () => controls.map((control, k) => [names[k], control.querySelector("select").value])
    .filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  if (names.length <= FEW) return { controls, wanted, within: controls, below: [] };
  const summary = h("summary", {}, "Further targets");
  const below = h("details", { class: "targets" }, summary, h("div", { class: "bar" }, controls));
  below.addEventListener("change", () => {
    const said = wanted().map(([name, code]) => `${name} ${ANSWERS[code]}`).join(", ");
    summary.replaceChildren(visible(`Further targets${said && `: ${said}`}`));
  });
  return { controls, wanted, within: [], below: [below] };
};

export const addCases = (page, store, host) => {
  const { state } = store;
  const plural = host.dataset.plural;
  const kinds = Object.entries(KINDS).filter(([kind]) => kind !== "uncertain" || page.cases.sets);
  const sorts = Object.entries(SORTS).filter(([sort]) =>
    (sort !== "far" || page.cases.distance) && (sort !== "region" || page.regions.length > 1));
  const regions = [["", "all"], ...page.regions.map((name, code) => [code, name])];
  const kind = select("case-kind", kinds, "Show");
  const region = select("case-region", regions, "Region");
  const sort = select("case-sort", sorts, "Sort");
  const targets = addTargets(page);
  const search = h("input", { id: "case-search", type: "search", autocomplete: "off", spellcheck: "false" });
  const said = h("p", { class: "said", role: "status" });
  const clear = h("button", { type: "button", hidden: true, onclick: () => store.set({ picked: null }) }, "Show all again");
  const space = h("div", { class: "space" });
  const list = h("div", { class: "cases", role: "listbox", tabindex: "0", "aria-label": `Test ${plural}` }, space);
  const none = h("p", { class: "none", hidden: true }, `No ${plural} are left: widen the filters.`);
  const printed = h("ul", { class: "gallery printed", "aria-hidden": "true" });
  const hasFilms = host.dataset.askedImages === "1" && page.cases.films.some((films) => films.split(" ").some(filmUrl));
  const height = hasFilms ? 232 : 96;
  let found = [];
  let texts = null;
  let current = 0;
  let columns = 1;
  const cards = new Map();
  const shown = new Map();

  const searchable = () => {
    if (texts) return texts;
    const { cases } = page;
    texts = cases.films.map((films, i) =>
      [films, regionName(page.regions, cases.region[i]), ...(cases.names?.[i] ?? []),
        ...Object.values(cases.covariates).map((values) => values[i])].join(" ").toLowerCase());
    return texts;
  };

  const filter = () => {
    const wanted = kind.querySelector("select").value;
    const place = region.querySelector("select").value;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const order = sort.querySelector("select").value;
    const { cases } = page;
    const p = cases.probability[state.head];
    const cut = Math.fround(page.thresholds[state.threshold] ?? 2);
    const known = words.length ? searchable() : null;
    const asked = targets.wanted();
    found = [];
    for (let i = 0; i < cases.films.length; i += 1) {
      if (state.picked && !state.picked.has(i)) continue;
      if (place !== "" && cases.region[i] !== Number(place)) continue;
      const called = p ? p[i] >= cut : false;
      const abnormal = cases.label[i] === 1;
      if (wanted === "mistakes" && called === abnormal) continue;
      if (wanted === "uncertain" && !isUncertain(page, i)) continue;
      if (wanted.length === 2 && (wanted[0] === "t") !== (called === abnormal)) continue;
      if (wanted.length === 2 && (wanted[1] === "p") !== called) continue;
      if (!asked.every(([name, answer]) => cases.targets[name][i] === answer)) continue;
      if (known && !words.every((word) => known[i].includes(word))) continue;
      found.push(i);
    }
    if (p) {
      const keys = new Float64Array(cases.films.length);
      const middle = logit(cut);
      for (const i of found) {
        const far = Math.abs(logit(p[i]) - middle);
        const isWrong = p[i] >= cut !== (cases.label[i] === 1);
        keys[i] = {
          mistakes: isWrong ? -1e3 - far : far, high: -p[i], low: p[i], close: far,
          region: cases.region[i], far: -(cases.distance?.[i] ?? 0),
        }[order]; // prettier-ignore
      }
      found.sort((a, b) => keys[a] - keys[b] || a - b);
    }
    current = Math.min(current, Math.max(found.length - 1, 0));
    clear.hidden = !state.picked;
    none.hidden = found.length > 0;
    list.hidden = found.length === 0;
    const all = cases.n > cases.films.length ? ` of the ${count(cases.films.length)} that this page holds (${count(cases.n)} in all)` : ` of ${count(cases.n)}`;
    said.textContent = `${count(found.length)}${all} ${plural}.`;
    render(true);
  };

  /** The films of a card, which stay loaded while the threshold moves around them. */
  const viewsOf = ({ i, films }) => {
    let views = shown.get(i);
    if (!views) {
      const pictures = films.slice(0, 3).map((code) => createFilm(code, "", FILM)).filter(Boolean);
      views = h("div", { class: "views" },
        pictures.length ? pictures : h("span", { class: "missing" }, "no picture"),
        films.length > 3 ? h("small", {}, `+${films.length - 3}`) : null);
      shown.set(i, views);
      if (shown.size > KEPT) shown.delete(shown.keys().next().value);
    }
    return views;
  };

  const build = (place) => {
    const own = describeCase(page, state, found[place]);
    const wrong = own.kind[0] === "f";
    return h("div", {
      role: "option", id: `case-${place}`, class: "case", "aria-selected": String(place === current),
      "aria-setsize": found.length, "aria-posinset": place + 1,
    },
    hasFilms ? viewsOf(own) : null,
    h("p", {}, h("strong", { class: wrong ? "wrong" : "right" }, own.title), ` ${share(own.p, 2)}`),
    h("p", {}, `${own.region}, ${page.classes[Number(own.abnormal)]}`),
    h("p", {}, own.names ? own.names[0] : own.films[0].slice(0, DIGITS)));
  };

  const render = (isNew = false) => {
    if (isNew) {
      cards.clear();
      space.replaceChildren();
    }
    const width = space.clientWidth;
    if (!width) return;
    columns = Math.max(1, Math.floor((width + GAP) / (CARD + GAP)));
    const side = (width - GAP * (columns - 1)) / columns;
    const rows = Math.ceil(found.length / columns);
    space.style.height = `${rows * (height + GAP)}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / (height + GAP)) - 1);
    const last = Math.ceil((list.scrollTop + list.clientHeight) / (height + GAP)) + 1;
    const from = first * columns;
    const to = Math.min(found.length, last * columns);
    for (const [place, card] of cards) {
      if (place < from || place >= to) {
        card.remove();
        cards.delete(place);
      }
    }
    for (let place = from; place < to; place += 1) {
      let card = cards.get(place);
      if (!card) {
        card = build(place);
        cards.set(place, card);
        space.append(card);
      }
      Object.assign(card.style, {
        width: `${side}px`, height: `${height}px`,
        transform: `translate(${(place % columns) * (side + GAP)}px, ${Math.floor(place / columns) * (height + GAP)}px)`,
      });
    }
    if (cards.has(current)) list.setAttribute("aria-activedescendant", `case-${current}`);
    else list.removeAttribute("aria-activedescendant");
  };

  const choose = (place) => {
    cards.get(current)?.setAttribute("aria-selected", "false");
    current = Math.min(Math.max(place, 0), found.length - 1);
    const top = Math.floor(current / columns) * (height + GAP);
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + height > list.scrollTop + list.clientHeight) list.scrollTop = top + height - list.clientHeight;
    render();
    cards.get(current)?.setAttribute("aria-selected", "true");
  };

  const viewer = createViewer(page, store, {
    step: (by) => {
      choose(current + by);
      return [found[current], current, found.length];
    },
    closed: () => list.focus(),
  });
  const open = (place) => {
    choose(place);
    viewer.open(found[current], current, found.length);
  };

  list.addEventListener("scroll", () => render(), { passive: true });
  list.addEventListener("click", (event) => {
    const card = event.target.closest(".case");
    if (card) open(Number(card.id.slice(5)));
  });
  list.addEventListener("keydown", (event) => {
    const page_ = Math.max(1, Math.floor(list.clientHeight / (height + GAP))) * columns;
    const to = {
      ArrowRight: current + 1, ArrowLeft: current - 1, ArrowDown: current + columns, ArrowUp: current - columns,
      PageDown: current + page_, PageUp: current - page_, Home: 0, End: found.length - 1,
    }[event.key]; // prettier-ignore
    if (to !== undefined) choose(to);
    else if (event.key === "Enter" && found.length) open(current);
    else if (event.key === "Escape" && state.picked) store.set({ picked: null });
    else return;
    event.preventDefault();
  });

  let waiting = null;
  const soon = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(filter);
  };
  const restart = () => {
    current = 0;
    list.scrollTop = 0;
    soon();
  };
  for (const control of [kind, region, sort, ...targets.controls]) control.querySelector("select").addEventListener("change", restart);
  search.addEventListener("input", restart);
  store.on(["picked"], restart);
  store.on(["head", "threshold"], soon);
  new ResizeObserver(() => render()).observe(list);

  const load = page.cases_file && h("button", { type: "button" }, `Load all ${count(page.cases.n)} ${plural}`);
  if (load) {
    window.medembedCases = (all) => {
      const before = page.cases;
      page.cases = readCases({ ...all, distance: null, training: null });
      page.cases.training = before.training;
      if (before.distance) {
        page.cases.distance = new Float32Array(page.cases.films.length).fill(NaN);
        page.cases.distance.set(before.distance);
      }
      texts = null;
      load.remove();
      store.set({ held: page.cases.films.length });
      filter();
    };
    load.addEventListener("click", () => {
      load.disabled = true;
      const script = h("script", { src: page.cases_file });
      script.addEventListener("error", () => {
        load.disabled = false;
        said.textContent = `${page.cases_file} is not beside this page.`;
      });
      document.body.append(script);
    });
  }

  const hints = [];
  if (host.dataset.askedImages !== "1") hints.push("Pictures: medembed report … --manifest MANIFEST --image-root DIR.");
  else if (page.cases_file) hints.push(`Films are there for the first ${count(page.cases.films.length)} ${plural}, mistakes first.`);
  if (!page.cases.training) hints.push("Nearest films of training: --cache CACHE.");
  if (!Object.keys(readFilms().heat).length) hints.push("Heat maps: --explanations DIR, from medembed predict --explain DIR.");
  host.append(
    h("div", { class: "bar" }, kind, page.regions.length > 1 ? region : null, targets.within, sort,
      h("p", { class: "control" }, h("label", { for: "case-search" }, "Search"), search), clear, load),
    ...targets.below, said, list, none, printed,
    h("p", { class: "legend" }, "Arrows move, Enter opens a case, Esc closes it. Decisions follow the head and threshold above. ", hints.join(" ")));

  const picture = (code) => {
    const url = filmUrl(code);
    return url ? h("img", { src: url, alt: "" }) : h("code", {}, code.slice(0, DIGITS));
  };
  const print = () => {
    printed.replaceChildren(...found.slice(0, PRINTED).map((_, place) => {
      const own = describeCase(page, state, found[place]);
      return h("li", {}, h("p", {}, h("strong", {}, own.title), ` ${share(own.p, 2)}, ${own.region}`),
        h("div", { class: "view-row" }, own.films.map(picture)));
    }));
  };
  window.addEventListener("beforeprint", print);
  matchMedia("print").addEventListener("change", (event) => event.matches && print());
  filter();
  return { open: (i) => {
    const place = found.indexOf(i);
    if (place >= 0) open(place);
    else viewer.open(i, 0, 1);
  } };
};
