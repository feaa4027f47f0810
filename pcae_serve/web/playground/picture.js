// An image as the model sees it, and a canvas that veils the patches that were dropped.
import { html, useEffect, useRef } from "../vendor/htm-preact.js";
import { decodeUpright } from "./orientation.js";

/** Side of the canvas, in pixels: twice of what it takes on the page, for dense screens. */
export const SIDE = 784;

/**
 * Decode an image. If the browser cannot, the bitmap is null: the server may know the type.
 * transparent: part of it is; the model sees the colours that are stored there.
 */
export async function openPicture(blob, name, server) {
  const found = await decodeUpright(blob).catch(() => null);
  if (found === null) return { blob, name, bitmap: null, box: null, size: null, transparent: false };
  const { width, height } = found;
  const [bitmap, box] = await scaledDown(found, visibleBox(found, server));
  return { blob, name, bitmap, box, size: [width, height], transparent: isTransparent(bitmap, box) };
}

/** Return left, top, width and height of the part that the model sees, in pixels of the image. */
export function visibleBox({ width, height }, { image_size: size, resize, squash }) {
  const share = size / resize;
  const sides = squash ? [width, height] : [Math.min(width, height), Math.min(width, height)];
  const [w, h] = sides.map((side) => side * share);
  return [(width - w) / 2, (height - h) / 2, w, h];
}

/** Return a bitmap and its visible box, scaled down if it is larger than the canvas. */
async function scaledDown(bitmap, box) {
  if (Math.min(box[2], box[3]) <= SIDE) return [bitmap, box];
  const options = { resizeWidth: SIDE, resizeHeight: SIDE, resizeQuality: "high" };
  const smaller = await createImageBitmap(bitmap, ...box.map(Math.round), options);
  bitmap.close();
  return [smaller, [0, 0, SIDE, SIDE]];
}

function isTransparent(bitmap, box) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, ...box, 0, 0, 64, 64);
  return context.getImageData(0, 0, 64, 64).data.some((value, i) => i % 4 === 3 && value < 250);
}

/** Return the part of a picture that the model sees as a file, `side` pixels wide and high. */
export function scaledCopy(picture, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  canvas.getContext("2d").drawImage(picture.bitmap, ...picture.box, 0, 0, side, side);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9));
}

/**
 * Draw an image, and over each patch what `paint(patch)` returns: a colour, or null for none.
 * An image that the browser cannot show is grey.
 */
export function draw(canvas, picture, patches, paint) {
  const context = canvas.getContext("2d");
  const cells = Math.round(Math.sqrt(patches));
  const edge = (index) => Math.round((index * canvas.width) / cells); // whole pixels: no seams
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#8b93a1";
  if (picture.bitmap === null) context.fillRect(0, 0, canvas.width, canvas.height);
  else {
    context.imageSmoothingEnabled = picture.box[2] > canvas.width;
    context.drawImage(picture.bitmap, ...picture.box, 0, 0, canvas.width, canvas.height);
  }
  for (let patch = 0; patch < patches; patch += 1) {
    const colour = paint(patch);
    if (colour === null) continue;
    context.fillStyle = colour;
    const [column, row] = [patch % cells, Math.floor(patch / cells)];
    const [left, top] = [edge(column), edge(row)];
    context.fillRect(left, top, edge(column + 1) - left, edge(row + 1) - top);
  }
}

/** Return a painter that veils every patch that is not among `kept`. kept: null for no veil. */
function veil(kept) {
  const remaining = new Set(kept);
  return (patch) => (kept === null || remaining.has(patch) ? null : "rgba(236, 72, 153, 0.72)");
}

/** Show an image with veiled patches. */
export function Picture({ picture, patches, kept, label, side = SIDE }) {
  const canvas = useRef(null);
  useEffect(() => draw(canvas.current, picture, patches, veil(kept)), [picture, patches, kept]);
  return html`<canvas ref=${canvas} width=${side} height=${side} role="img" aria-label=${label} />`;
}
