// The answer to one image: classes, tier and reason, times, and the patches that remain.
import { html, useState } from "../vendor/htm-preact.js";
import { Picture } from "./picture.js";

/** Show an answer. */
export function Answer({ answer, picture, patches }) {
  const stages = answer.kept?.length ?? 0;
  const [chosen, setChosen] = useState(null);
  const stage = Math.min(chosen ?? stages, stages);
  const count = answer.tokens[stage - 1];
  const remaining = stage === 0 ? "all patches" : `${count} ${count === 1 ? "patch" : "patches"}`;
  return html`<div class="answer">
    <figure>
      <${Picture} picture=${picture} patches=${patches} kept=${stage === 0 ? null : answer.kept[stage - 1]}
        label="${picture.name}: ${remaining} after ${stage} of ${stages} reductions" />
      <figcaption>
        <label>After reduction <span class="value">${stage} of ${stages}: ${remaining}</span>
          <input type="range" min="0" max=${stages} value=${stage} aria-valuetext="${stage}: ${remaining}"
            onInput=${(event) => setChosen(Number(event.target.value))} />
        </label>
      </figcaption>
    </figure>
    <div>
      <p class="result"><strong>${answer.tier}</strong>, keep ratio ${answer.keep_ratio}
        ${answer.met_budget ? "" : html`, <em>late</em>`}</p>
      <p>${answer.reason}</p>
      ${answer.predictions && html`<${Bars} predictions=${answer.predictions} />`}
      ${answer.features && html`<p>${answer.features.length} features</p>`}
      <${Times} times=${answer.timings_ms} budget=${answer.budget_ms} />
    </div>
  </div>`;
}

function Bars({ predictions }) {
  return html`<table class="bars">
    <caption>Most probable classes</caption>
    <tbody>${predictions.map(({ label, probability }) => html`<tr>
      <th scope="row">${label}</th>
      <td><meter min="0" max="1" value=${probability} aria-label="probability of ${label}"></meter></td>
      <td>${(100 * probability).toFixed(1)} %</td>
    </tr>`)}</tbody>
  </table>`;
}

/** Show the time of each stage as a part of a bar, and as text. */
function Times({ times, budget }) {
  const stages = ["decode", "queue", "compute"];
  const scale = 100 / Math.max(times.total, budget);
  let start = 0;
  return html`<figure class="times">
    <svg viewBox="0 0 100 6" preserveAspectRatio="none" role="img"
      aria-label="time: ${times.total} ms of a budget of ${budget} ms">
      <rect class="budget-bar" width=${budget * scale} height="6" />
      ${stages.map((name) => {
        const part = html`<rect class=${name} x=${start} width=${times[name] * scale} height="6" />`;
        start += times[name] * scale;
        return part;
      })}
    </svg>
    <figcaption>${stages.map((name) => html`<span class="key-${name}">${name} ${times[name]} ms</span> `)}
      total ${times.total} ms of ${budget} ms</figcaption>
  </figure>`;
}
