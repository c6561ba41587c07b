// Two heads' decisions crossed, each at its own Youden threshold; a cell shows its cases.

import { count, h } from "./text.js";

export const addCrossing = (page, store, host) => {
  const select = (id, title, chosen) =>
    h("p", { class: "control" }, h("label", { for: id }, title),
      h("select", { id, onchange: () => show() },
        page.heads.map((head, i) => h("option", { value: i, selected: i === chosen }, head.name))));
  const first = select("head-a", "First head", 0);
  const second = select("head-b", "Second head", 1);
  const result = h("div");
  const valueOf = (control) => Number(control.querySelector("select").value);

  const show = () => {
    const heads = [valueOf(first), valueOf(second)];
    const { cases } = page;
    const cells = page.classes.map(() => [[], [], [], []]);
    const cuts = heads.map((i) => Math.fround(page.heads[i].threshold));
    for (let i = 0; i < cases.films.length; i += 1) {
      const label = cases.label[i];
      const [a, b] = heads.map((head, k) => (cases.probability[head][i] >= cuts[k]) === (label === 1));
      cells[label][a ? (b ? 0 : 1) : b ? 2 : 3].push(i);
    }
    const pick = (own) => {
      store.set({ picked: new Set(own) });
      document.getElementById("mistakes").scrollIntoView();
    };
    const [a, b] = heads.map((i) => page.heads[i].name);
    const differ = cells.flatMap((own) => [...own[1], ...own[2]]);
    const cell = (own, title) =>
      h("td", { class: "number" }, own.length ? h("button", { type: "button", "aria-label": `Show ${title}`, onclick: () => pick(own) }, count(own.length)) : "0");
    const titles = ["both right", `only ${a} right`, `only ${b} right`, "both wrong"];
    result.replaceChildren(
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Two heads crossed" },
        h("table", {}, h("caption", {}, "Decisions at each head’s Youden threshold; a number shows its cases"),
          h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Labelled"), titles.map((title) => h("th", { scope: "col", class: "number" }, title)))),
          h("tbody", {}, page.classes.map((label, k) =>
            h("tr", {}, h("th", { scope: "row" }, label), cells[k].map((own, j) => cell(own, `the ${label} cases with ${titles[j]}`))))))),
      h("p", {}, `The heads differ on ${count(differ.length)} of ${count(cases.films.length)}. `,
        differ.length ? h("button", { type: "button", onclick: () => pick(differ) }, "Show these cases") : null));
  };
  host.append(h("div", { class: "bar" }, first, second), result);
  show();
  return { show };
};
