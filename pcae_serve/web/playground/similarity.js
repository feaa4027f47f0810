// For models without classes: how similar images are, by the cosine of their features.
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { infer } from "./api.js";
import { cosine } from "./comparison.js";

/** Images that are compared. */
const MOST = 6;

/** Show the cosine between the images that were chosen last. */
export function Similarity({ server, picture, apiKey, onError }) {
  const [images, setImages] = useState([]);
  useEffect(() => {
    let gone = false;
    infer(server, picture.blob, {}, apiKey)
      .then(({ features }) => {
        if (!gone) setImages((before) => [...before, { name: picture.name, features }].slice(-MOST));
      })
      .catch(onError);
    return () => void (gone = true);
  }, [picture]);
  return html`<section aria-labelledby="similar">
    <h2 id="similar">Similarity of images</h2>
    ${images.length < 2 ? html`<p class="hint">Choose a second image to compare it.</p>` : html`
      <div class="scroll" tabindex="0" role="region" aria-label="table of cosines"><table>
        <thead><tr><td></td>${images.map(({ name }) => html`<th scope="col" class="name">${name}</th>`)}</tr></thead>
        <tbody>${images.map((row) => html`<tr><th scope="row" class="name">${row.name}</th>
          ${images.map((column) => html`<td>${cosine(row.features, column.features).toFixed(3)}</td>`)}</tr>`)}</tbody>
      </table></div>`}
  </section>`;
}
