// The contents mark the section in sight; panels of groups become tabs.

import { h } from "./text.js";

export const addContents = () => {
  const links = [...document.querySelectorAll(".contents a")];
  const targets = links.map((link) => document.getElementById(link.hash.slice(1)));
  let waiting = false;
  const update = () => {
    waiting = false;
    const line = window.innerHeight / 3;
    let current = 0;
    targets.forEach((target, i) => {
      if (target.getBoundingClientRect().top < line) current = i;
    });
    links.forEach((link, i) => {
      if (i === current) link.setAttribute("aria-current", "location");
      else link.removeAttribute("aria-current");
    });
  };
  window.addEventListener("scroll", () => {
    if (!waiting) requestAnimationFrame(update);
    waiting = true;
  }, { passive: true });
  update();
};

export const addTabs = (host) => {
  const panels = [...host.querySelectorAll(":scope > .panel")];
  if (panels.length < 2) return;
  const tabs = panels.map((panel, i) => {
    const heading = panel.querySelector("h3");
    panel.setAttribute("role", "tabpanel");
    panel.id = `panel-${heading.id}`;
    return h("button", {
      type: "button", role: "tab", id: `tab-${heading.id}`, "aria-controls": panel.id,
      onclick: () => choose(i),
    }, heading.textContent);
  });
  panels.forEach((panel, i) => panel.setAttribute("aria-labelledby", tabs[i].id));
  const choose = (chosen) => {
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === chosen));
      tab.tabIndex = i === chosen ? 0 : -1;
      panels[i].classList.toggle("closed", i !== chosen);
    });
  };
  const list = h("div", { class: "tablist", role: "tablist", "aria-label": host.dataset.tabs }, tabs);
  list.addEventListener("keydown", (event) => {
    const i = tabs.indexOf(document.activeElement);
    const next = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (next === undefined) return;
    const place = (next + tabs.length) % tabs.length;
    choose(place);
    tabs[place].focus();
    event.preventDefault();
  });
  host.prepend(list);
  choose(0);
  const follow = () => {
    const wanted = panels.findIndex((panel) => location.hash && panel.querySelector(`[id="${CSS.escape(location.hash.slice(1))}"]`));
    if (wanted >= 0) choose(wanted);
  };
  window.addEventListener("hashchange", follow);
  follow();
};
