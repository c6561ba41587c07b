// The page's data, see docs/schemas/page.json: columns of numbers become typed arrays.

const TYPES = { f4: Float32Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array };

export const unpack = (packed) => {
  if (!packed) return null;
  const bytes = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  return new TYPES[packed.type](bytes.buffer);
};

const unpackAll = (columns) =>
  Object.fromEntries(Object.entries(columns).map(([name, packed]) => [name, unpack(packed)]));

const read = (id) => JSON.parse(document.getElementById(id).textContent);

export const readCases = (found) => ({
  ...found,
  label: unpack(found.label),
  region: unpack(found.region),
  probability: found.probability.map(unpack),
  sets: unpack(found.sets),
  distance: unpack(found.distance),
  targets: unpackAll(found.targets),
  training: found.training && {
    ...found.training,
    label: unpack(found.training.label),
    region: unpack(found.training.region),
    neighbours: unpack(found.training.neighbours),
    similarity: unpack(found.training.similarity),
  },
});

export const readDocument = () => {
  const found = read("page-data");
  const heads = found.heads.map((head) => ({
    ...head,
    truePositives: unpack(head.true_positives),
    falsePositives: unpack(head.false_positives),
    distribution: unpack(head.distribution),
  }));
  const map = found.map && {
    ...found.map,
    ...Object.fromEntries(
      ["x", "y", "label", "region", "split", "case"].map((name) => [name, unpack(found.map[name])]),
    ),
    targets: unpackAll(found.map.targets),
  };
  return { ...found, heads, map, cases: readCases(found.cases) };
};

let films = null;

/** Pictures and heat maps, which are read when the first is asked for. */
export const readFilms = () => {
  if (!films) {
    films = read("film-data");
    films.beside = new Set(films.beside);
  }
  return films;
};

/** Where a film's picture is, or null if there is none. */
export const filmUrl = (code) => {
  const known = readFilms();
  if (Object.hasOwn(known.inlined, code)) return known.inlined[code];
  return known.beside.has(code) ? `${known.folder}/${code}.jpg` : null;
};

/** What an answer to a target is called, by its code. */
export const ANSWERS = ["negative", "positive", "unknown"];

/** What the labels of a page are called: answers to the target that its heads predict. */
export const labelName = ({ target }) => (target === "label" ? "label" : `target ${target}`);

/** What a label is called, by its code. */
export const labelsOf = ({ classes }) => [...classes, "unlabelled"];

export const regionName = (regions, code) => regions[code] ?? "another region";
