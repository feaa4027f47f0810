// The same image on every tier: time, answer, agreement, and the patches that remain.
import { html, useState } from "../vendor/htm-preact.js";
import { infer } from "./api.js";
import { inMs } from "./answer.js";
import { Picture } from "./picture.js";

/** Budget of a request that names its tier, in milliseconds: enough for any of them. */
const BUDGET_MS = 60000;

/** Offer the comparison, and show it. */
export function Comparison({ server, picture, apiKey, onError }) {
  const [rows, setRows] = useState([]);
  const [of, setOf] = useState(null); // the image that the rows are of
  const [busy, setBusy] = useState(false);

  const compare = async () => {
    setBusy(true);
    setRows([]);
    setOf(picture);
    try {
      for (const tier of server.tiers.filter((each) => each.in_service)) {
        const parameters = { tier: tier.name, budget_ms: BUDGET_MS, explain: true };
        const answer = await infer(server, picture.blob, parameters, apiKey);
        setRows((before) => [...before, { tier, answer }]);
      }
    } catch (error) {
      onError(error);
    }
    setBusy(false);
  };

  const shown = of === picture ? rows : [];
  const best = shown.at(-1)?.answer;
  return html`<section aria-labelledby="compare">
    <h2 id="compare">All tiers on this image</h2>
    <p class="controls"><button onClick=${compare} disabled=${busy}>Compare all tiers</button>
      <span class="hint">The same image on each tier, one after the other.</span></p>
    ${shown.length > 0 && html`<div class="scroll" tabindex="0" role="region" aria-label="table of the answers"><table>
      <thead><tr>${["tier", "patches that remain", "compute", ...(best.predictions ? ["answer", "confidence"] : ["cosine to the last"]), "kept"]
        .map((title) => html`<th scope="col">${title}</th>`)}</tr></thead>
      <tbody>${shown.map(({ tier, answer }) => html`<tr>
        <th scope="row">${tier.name}</th>
        <td>${answer.tokens.join(", ")} of ${tier.patches}</td>
        <td>${inMs(answer.timings_ms.compute)}</td>
        ${answer.predictions ? html`
          <td>${answer.predictions[0].label}${differs(answer, best) ? " (differs from the last)" : ""}</td>
          <td>${(100 * answer.predictions[0].probability).toFixed(1)} %</td>` : html`
          <td>${cosine(answer.features, best.features).toFixed(3)}</td>`}
        <td><${Picture} picture=${picture} patches=${tier.patches} kept=${answer.kept.at(-1)} side=${224}
          label="patches that ${tier.name} keeps: ${answer.tokens.at(-1)} of ${tier.patches}" /></td>
      </tr>`)}</tbody>
    </table></div>`}
  </section>`;
}

function differs(answer, other) {
  return answer.predictions[0].index !== other.predictions[0].index;
}

/** Return the cosine of the angle between two vectors. */
export function cosine(one, other) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  return dot(one, other) / Math.sqrt(dot(one, one) * dot(other, other));
}
