// The answer to one image: classes, tier and reason, times, and the patches that remain.
import { html, useState } from "../vendor/htm-preact.js";
import { Picture } from "./picture.js";

/** Show an answer. patches: of the tier, before the first reduction. */
export function Answer({ answer, picture, patches, server }) {
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
        ${answer.tokens.at(-1) === patches && html`<p>
          This tier keeps every patch. A smaller budget buys a tier that drops some.</p>`}
        ${stage > 0 && answer.tokens.at(-1) < patches && html`<p>
          Veiled patches were dropped: the model averages them into one token.</p>`}
      </figcaption>
    </figure>
    <div>
      <p class="result"><strong><${Looks} answer=${answer} /></strong>, keep ratio ${answer.keep_ratio}
        ${answer.met_budget ? "" : html`, <em>late</em>`}</p>
      <p class="reason">${answer.reason}</p>
      ${answer.predictions && html`<${Bars} answer=${answer} server=${server} />`}
      ${answer.features && html`<p>${answer.features.length} features</p>`}
      <${Times} times=${answer.timings_ms} budget=${answer.budget_ms} />
    </div>
  </div>`;
}

/** Name the tier that answered, and that of the first look if there were two. */
function Looks({ answer }) {
  if (!answer.first_tier) return answer.tier;
  return html`${answer.first_tier} <span role="img" aria-label="then, as a second look,">→</span> ${answer.tier}`;
}

function Bars({ answer, server }) {
  const kind = server.answers === "labels" ? "labels" : "classes";
  const sure = html`<span class="value">${(100 * answer.confidence).toFixed(1)} %</span>`;
  return html`<table class="bars">
    <caption>Most probable ${kind}; confidence ${sure}, ${answer.looks === 1 ? "one look" : "two looks"}</caption>
    <tbody>${answer.predictions.map(({ label, probability }) => html`<tr>
      <th scope="row">${label}</th>
      <td><svg viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">
        <rect class="budget-bar" width="100" height="6" />
        <rect class="compute" width=${100 * probability} height="6" /></svg></td>
      <td>${(100 * probability).toFixed(1)} %</td>
    </tr>`)}</tbody>
  </table>`;
}

/** Return a time in milliseconds with as many digits as one reads; a dash if there is none. */
export function inMs(value) {
  if (value === undefined) return "–";
  return `${value.toFixed(value < 100 ? 1 : 0)} ms`;
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
    <figcaption>${stages.map((name) => html`<span class="legend key-${name}">${name} ${inMs(times[name])}</span> `)}
      <span>total ${inMs(times.total)} of ${budget} ms</span></figcaption>
  </figure>`;
}
