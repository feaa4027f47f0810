// For models with patch grids: how similar every patch of two images is to one that is chosen.
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { fetchPatches } from "./api.js";
import { SIDE, draw, openPicture } from "./picture.js";
import { FileButton } from "./picker.js";

/** Budget of a request that names its tier, in milliseconds: enough for any of them. */
const BUDGET_MS = 60000;
/** Patches of each image in the table. */
const LISTED = 3;
/** Colours from the least to the most similar (viridis), as red, green and blue. */
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const OPACITY = 0.7;
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/** Show the map. picture: the first image; before: the one that was chosen before it, or null. */
export function PatchMap({ server, picture, before, apiKey, onError }) {
  const [rows, columns] = server.patch_grid;
  const [tier, setTier] = useState(server.tiers.at(-1).name);
  const [own, setOwn] = useState(null); // a second image that was chosen here
  const [chosen, setChosen] = useState([Math.floor(rows / 2), Math.floor(columns / 2)]);
  const second = own ?? before;
  const first = usePatches(picture, tier, apiKey, onError);
  const other = usePatches(second, tier, apiKey, onError);
  const choose = async (event) => {
    const [file] = event.target.files;
    if (file) setOwn(await openPicture(file, file.name, server));
    event.target.value = "";
  };

  const patch = chosen[0] * columns + chosen[1];
  const vector = first?.[patch];
  const maps = [[picture, first], [second, other]]
    .filter(([shown, vectors]) => shown && vectors && vector)
    .map(([shown, vectors]) => ({ shown, values: vectors.map((each) => product(vector, each)) }));
  const least = Math.min(...maps.map(({ values }) => Math.min(...values)));
  return html`<section aria-labelledby="patches">
    <h2 id="patches">Similarity of patches</h2>
    <p class="hint">Click a patch of the first image, or move with the arrow keys. Colours show how
      similar every other patch is: the cosine of their states after the last block.</p>
    <div class="controls">
      <label>Tier <select value=${tier} onChange=${(event) => setTier(event.target.value)}>
        ${server.tiers.map(({ name }) => html`<option value=${name}>${name}</option>`)}</select></label>
      <${FileButton} label="Choose a second image" onChange=${choose} />
    </div>
    ${maps.length > 0 && html`
      <div class="maps">${maps.map(({ shown, values }, i) => html`<figure>
        <${PatchCanvas} key=${i} picture=${shown} values=${values} least=${least} columns=${columns}
          chosen=${i === 0 ? chosen : null} rows=${rows} onChoose=${i === 0 ? setChosen : null} />
        <figcaption class="name">${i === 0 ? "first" : "second"} image: ${shown.name}</figcaption>
      </figure>`)}</div>
      <${Scale} least=${least} />
      <${Nearest} maps=${maps} patch=${patch} columns=${columns} chosen=${chosen} />`}
  </section>`;
}

/** Return the vectors of an image's patches on a tier, or null until they have arrived. */
function usePatches(picture, tier, apiKey, onError) {
  const [found, setFound] = useState({});
  useEffect(() => {
    if (!picture) return undefined;
    const control = new AbortController();
    fetchPatches(picture.blob, { tier, budget_ms: BUDGET_MS }, apiKey, control.signal)
      .then((vectors) => setFound({ picture, vectors }))
      .catch(onError);
    return () => control.abort();
  }, [picture, tier]);
  return found.picture === picture ? found.vectors : null; // those of the former tier until then
}

function product(one, other) {
  return one.reduce((sum, value, i) => sum + value * other[i], 0);
}

/** Return the colour of a share of the scale, from 0 to 1. */
function colour(share, opacity) {
  const place = Math.min(1, Math.max(0, share)) * (COLOURS.length - 1);
  const low = Math.min(COLOURS.length - 2, Math.floor(place));
  const mixed = COLOURS[low].map((value, i) => Math.round(value + (place - low) * (COLOURS[low + 1][i] - value)));
  return `rgba(${mixed.join(", ")}, ${opacity})`;
}

/** Show an image under the map; with onChoose, one can choose a patch. */
function PatchCanvas({ picture, values, least, rows, columns, chosen, onChoose }) {
  const canvas = useRef(null);
  useEffect(() => {
    draw(canvas.current, picture, values.length, (patch) => colour((values[patch] - least) / (1 - least), OPACITY));
    if (chosen) outline(canvas.current, chosen, columns);
  });
  if (!onChoose) {
    return html`<canvas ref=${canvas} width=${SIDE} height=${SIDE} role="img"
      aria-label="similarity of the patches of ${picture.name}; the table below has the highest" />`;
  }
  const move = (event) => {
    const by = MOVES[event.key];
    if (!by) return;
    event.preventDefault();
    onChoose([clamp(chosen[0] + by[0], rows), clamp(chosen[1] + by[1], columns)]);
  };
  const point = (event) => {
    const { left, top, width, height } = event.target.getBoundingClientRect();
    onChoose([clamp(Math.floor(((event.clientY - top) / height) * rows), rows),
      clamp(Math.floor(((event.clientX - left) / width) * columns), columns)]);
  };
  return html`<canvas ref=${canvas} width=${SIDE} height=${SIDE} class="choice" tabindex="0" role="application"
    aria-label="patches of ${picture.name}: choose one with the arrow keys" aria-describedby="nearest"
    onClick=${point} onKeyDown=${move} />`;
}

function clamp(index, count) {
  return Math.min(count - 1, Math.max(0, index));
}

/** Draw a frame around a patch. */
function outline(canvas, [row, column], columns) {
  const context = canvas.getContext("2d");
  const cell = canvas.width / columns;
  for (const [style, width] of [["#000", 10], ["#fff", 5]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.strokeRect(column * cell, row * cell, cell, cell);
  }
}

/** Show what the colours mean. */
function Scale({ least }) {
  const parts = 40;
  return html`<div class="ends scale"><span>${least.toFixed(2)}</span>
    <svg viewBox="0 0 ${parts} 1" preserveAspectRatio="none" role="img" aria-label="colours from the least to the most similar">
      ${Array.from({ length: parts }, (_, i) => html`<rect x=${i} width="1.05" height="1" fill=${colour(i / (parts - 1), 1)} />`)}
    </svg><span>1 (the same)</span></div>`;
}

/** List the patches that are most similar to the chosen one, in both images. */
function Nearest({ maps, patch, columns, chosen }) {
  const place = (index) => `row ${Math.floor(index / columns) + 1}, column ${(index % columns) + 1}`;
  const rows = maps.flatMap(({ shown, values }, i) => values
    .map((value, index) => ({ value, index }))
    .filter(({ index }) => i > 0 || index !== patch)
    .sort((a, b) => b.value - a.value)
    .slice(0, LISTED)
    .map((found) => ({ ...found, image: i === 0 ? "first" : "second", name: shown.name })));
  return html`<p aria-live="polite" id="nearest">Chosen: row ${chosen[0] + 1}, column ${chosen[1] + 1}.
      ${maps.map(({ values }, i) => html` ${i === 0 ? "First" : "Second"} image: mean ${mean(values).toFixed(3)}.`)}</p>
    <div class="scroll" tabindex="0" role="region" aria-label="table of the most similar patches"><table class="nearest">
      <caption>Most similar patches</caption>
      <thead><tr><th scope="col">image</th><th scope="col">patch</th><th scope="col">cosine</th></tr></thead>
      <tbody>${rows.map(({ image, index, value }) => html`<tr>
        <th scope="row">${image}</th><td>${place(index)}</td><td>${value.toFixed(3)}</td></tr>`)}</tbody>
    </table></div>`;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
