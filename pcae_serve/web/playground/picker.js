// Ways to bring an image: file, camera, drop, paste, samples.
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { Problem } from "./api.js";

/** Offer the ways, and call onChoose with a blob and its name. */
export function Picker({ onChoose, onError }) {
  const [over, setOver] = useState(false);
  const take = (files) => {
    const file = [...(files ?? [])].find((each) => each.type.startsWith("image/")) ?? files?.[0];
    if (file) onChoose(file, file.name || "the pasted image");
  };
  useEffect(() => {
    const paste = (event) => take(event.clipboardData?.files);
    document.addEventListener("paste", paste);
    return () => document.removeEventListener("paste", paste);
  }, [onChoose]);

  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer?.files);
  };
  const sample = async (name) => {
    const response = await fetch(sampleUrl(name)).catch(() => null);
    if (response?.ok) onChoose(await response.blob(), name);
    else onError(new Problem("No answer", "the server cannot be reached; is it running?", 0, ""));
  };
  const samples = document.body.dataset.samples.split(",").filter(Boolean);
  const choose = (event) => {
    take(event.target.files);
    event.target.value = ""; // the same file can be chosen again
  };

  return html`
    <div class=${over ? "drop over" : "drop"} onDragOver=${(event) => (event.preventDefault(), setOver(true))}
      onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <label>Choose an image <input type="file" accept="image/*" onChange=${choose} /></label>
      <label class="camera">Take a photograph
        <input type="file" accept="image/*" capture="environment" onChange=${choose} />
      </label>
      <p>or drop one here, or paste one</p>
    </div>
    ${samples.length > 0 && html`<div class="samples" role="group" aria-label="Samples">
      ${samples.map((name) => html`<button onClick=${() => sample(name)}>
        <img src=${sampleUrl(name)} alt=${name.replace("-", " ")} width="56" height="56" />
      </button>`)}
    </div>`}
  `;
}

function sampleUrl(name) {
  return `${document.body.dataset.prefix}/assets/samples/${name}.png`;
}
