// Ways to bring an image: file, camera, drop, paste, samples.
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { unreachable } from "./api.js";

/** Offer the ways, and call onChoose with a blob, its name and the number of files that came. */
export function Picker({ onChoose, onError, picture }) {
  const [over, setOver] = useState(false);
  const take = (files) => {
    const found = [...(files ?? [])];
    const file = found.find((each) => each.type.startsWith("image/")) ?? found[0];
    if (file) onChoose(file, file.name || "the pasted image", found.length);
  };
  // anywhere on the page: a browser would open a file that misses its place, and leave the page
  useEffect(() => {
    const listeners = {
      paste: (event) => take(event.clipboardData?.files),
      dragover: (event) => {
        if (!event.dataTransfer?.types.includes("Files")) return;
        event.preventDefault();
        setOver(true);
      },
      dragleave: (event) => event.relatedTarget === null && setOver(false),
      drop: (event) => {
        if (!event.dataTransfer?.files.length) return;
        event.preventDefault();
        setOver(false);
        take(event.dataTransfer?.files);
      },
    };
    for (const [name, listener] of Object.entries(listeners)) document.addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) document.removeEventListener(name, listener);
    };
  }, [onChoose]);

  const sample = async (name) => {
    const response = await fetch(sampleUrl(name)).catch(() => null);
    if (response?.ok) onChoose(await response.blob(), name, 1);
    else onError(unreachable());
  };
  const samples = document.body.dataset.samples.split(",").filter(Boolean);
  const choose = (event) => {
    take(event.target.files);
    event.target.value = ""; // the same file can be chosen again
  };

  return html`
    <div class=${over ? "drop over" : "drop"}>
      <${FileButton} label="Choose an image" onChange=${choose} />
      <${FileButton} label="Take a photograph" onChange=${choose} camera />
      <p>or drop one on this page, or paste one</p>
    </div>
    ${samples.length > 0 && html`<div class="samples" role="group" aria-label="Samples">
      ${samples.map((name) => html`<button onClick=${() => sample(name)} aria-pressed=${picture?.name === name}>
        <img src=${sampleUrl(name)} alt=${name.replace("-", " ")} width="56" height="56" />
      </button>`)}
    </div>`}
  `;
}

/** Show a file input as a button. */
export function FileButton({ label, onChange, camera = false }) {
  return html`<label class=${camera ? "button camera" : "button"}>${label}
    <input type="file" accept="image/*" capture=${camera ? "environment" : undefined} onChange=${onChange} />
  </label>`;
}

function sampleUrl(name) {
  return `${document.body.dataset.prefix}/assets/samples/${name}.png`;
}
