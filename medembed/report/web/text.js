// Text and elements. All foreign text passes through `visible`, and only ever becomes a text node.

const OBEYED = /[\p{C}\p{Zl}\p{Zp}]/gu;

/** Text with � for controls, bidirectional marks and hidden characters, as the page's tables. */
export const visible = (text) => String(text).replace(OBEYED, "�");

// asked for, not written: the page holds no address at all
const SVG = document.createRange().createContextualFragment("<svg></svg>").firstChild.namespaceURI;

const build = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  const texts = children.flat().filter((child) => child !== null && child !== undefined);
  element.append(...texts.map((child) => (child instanceof Node ? child : visible(child))));
  return element;
};

/** An HTML element; children that are no elements become visible text. */
export const h = (tag, attributes = {}, ...children) =>
  build(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

export const count = (n) => n.toLocaleString("en-GB");
export const share = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

/** A share with its interval, if it has one. */
export const withInterval = (score) => {
  if (!score || score.value === null) return "–";
  const interval = score.low === null ? "" : ` [${share(score.low)}, ${share(score.high)}]`;
  return share(score.value) + interval;
};

/** A number between 0 and 1 as a label that tells neighbours apart. */
export const threshold = (value) => String(Number(value.toFixed(4)));
