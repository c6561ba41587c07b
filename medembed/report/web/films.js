// Films as pictures of just the size that is shown. Browsers keep what they decode for an <img> at its
// full size, by the hundred; a canvas holds its own pixels, which go with it.

import { filmUrl } from "./document.js";
import { h, visible } from "./text.js";

const SHARPEST = 2; // pixels of a picture for one of the page

/** What `createImageBitmap` reads: bytes that the page holds, or the file beside it. */
const sourceOf = (url) => {
  if (url.startsWith("data:")) {
    const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (character) => character.charCodeAt(0));
    return new Blob([bytes], { type: "image/jpeg" });
  }
  return new Promise((done, failed) => {
    const image = new Image();
    image.addEventListener("load", () => done(image));
    image.addEventListener("error", () => failed(new Error(`${url} is not beside this page`)));
    image.src = url;
  });
};

const waiting = new WeakMap();

const draw = async (canvas, { url, options }) => {
  try {
    const bitmap = await createImageBitmap(await sourceOf(url), options);
    Object.assign(canvas, { width: bitmap.width, height: bitmap.height });
    canvas.getContext("bitmaprenderer").transferFromImageBitmap(bitmap);
  } catch {
    canvas.replaceWith(h("span", { class: "missing" }, "no picture"));
  }
};

const inSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    inSight.unobserve(target);
    draw(target, waiting.get(target));
  }
});

/**
 * A film that is drawn once it is in sight; null where there is no picture of it.
 *
 * `height`, in pixels of the page, is how tall it is shown; by default it has all of its pixels.
 */
export const createFilm = (code, alt, height = 0) => {
  const url = filmUrl(code);
  if (!url) return null;
  const named = alt ? { role: "img", "aria-label": visible(alt) } : { "aria-hidden": "true" };
  const canvas = h("canvas", { class: "film", width: 1, height: 1, ...named });
  const ratio = Math.min(window.devicePixelRatio || 1, SHARPEST);
  const options = height ? { resizeHeight: Math.round(height * ratio), resizeQuality: "medium" } : {};
  waiting.set(canvas, { url, options });
  inSight.observe(canvas);
  return canvas;
};
