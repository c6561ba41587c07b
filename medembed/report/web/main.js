// The page's script: each part of the page is a module of that name.

import { addCases } from "./cases.js";
import { addContents, addTabs } from "./contents.js";
import { addControls } from "./controls.js";
import { addCrossing } from "./crossing.js";
import { readDocument } from "./document.js";
import { addFigures, nearestThreshold } from "./figures.js";
import { addLeaderboard } from "./leaderboard.js";
import { addMap } from "./map.js";
import { createStore } from "./store.js";

const page = readDocument();
const { n, n_abnormal: nAbnormal, prevalence } = page.test;
const store = createStore({
  head: 0,
  shown: page.heads.map((_, i) => i < 4),
  threshold: page.heads.length ? nearestThreshold(page, page.heads[0].threshold) : 0,
  prevalence: prevalence ?? Math.min(Math.max(nAbnormal / n, 0.001), 0.999),
  point: null, // the operating point that was chosen by name
  held: page.cases.films.length, // cases that are loaded
  picked: null, // cases that the map or two heads chose, or null for all
});

const at = (id) => document.getElementById(id);

document.documentElement.classList.add("live");
addContents();
addLeaderboard();
for (const host of document.querySelectorAll("[data-tabs]")) addTabs(host);
if (at("controls")) {
  addControls(page, store, at("controls"));
  addFigures(page, store);
}
const cases = addCases(page, store, at("cases-app"));
if (at("map-app") && page.map) addMap(page, store, at("map-app"), cases);
if (at("crossing-app")) addCrossing(page, store, at("crossing-app"));
