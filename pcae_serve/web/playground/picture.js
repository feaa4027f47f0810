// An image as the model sees it, and a canvas that veils the patches that were dropped.
import { html, useEffect, useRef } from "../vendor/htm-preact.js";
import { Problem } from "./api.js";

/** Side of the canvas, in pixels. */
export const SIDE = 392;

/** Decode an image. Throw a Problem if the browser cannot: it may still be sent. */
export async function openPicture(blob, name, server) {
  try {
    const bitmap = await createImageBitmap(blob);
    return { blob, name, bitmap, box: visibleBox(bitmap, server) };
  } catch {
    throw new Problem("Not an image", `this browser cannot show ${name}; choose another image`, 0, "");
  }
}

/** Return left, top, width and height of the part that the model sees, in pixels of the image. */
export function visibleBox({ width, height }, { image_size: size, resize, squash }) {
  const share = size / resize;
  const sides = squash ? [width, height] : [Math.min(width, height), Math.min(width, height)];
  const [w, h] = sides.map((side) => side * share);
  return [(width - w) / 2, (height - h) / 2, w, h];
}

/** Draw an image, with a veil on every patch that is not among `kept`. kept: null for no veil. */
export function draw(canvas, picture, patches, kept) {
  const context = canvas.getContext("2d");
  const cells = Math.round(Math.sqrt(patches));
  const cell = canvas.width / cells;
  context.imageSmoothingEnabled = picture.box[2] > canvas.width;
  context.drawImage(picture.bitmap, ...picture.box, 0, 0, canvas.width, canvas.height);
  if (!kept) return;
  const remaining = new Set(kept);
  context.fillStyle = "rgba(236, 72, 153, 0.72)";
  for (let patch = 0; patch < patches; patch += 1) {
    if (remaining.has(patch)) continue;
    context.fillRect((patch % cells) * cell, Math.floor(patch / cells) * cell, cell, cell);
  }
}

/** Show an image with veiled patches. */
export function Picture({ picture, patches, kept, label, side = SIDE }) {
  const canvas = useRef(null);
  useEffect(() => draw(canvas.current, picture, patches, kept), [picture, patches, kept]);
  return html`<canvas ref=${canvas} width=${side} height=${side} role="img" aria-label=${label} />`;
}
