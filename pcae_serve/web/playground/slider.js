// The latency budget, on a logarithmic scale, and whether an unsure image may run again.
import { html } from "../vendor/htm-preact.js";

const SMALLEST_MS = 1;
const LARGEST_MS = 5000;
const STEPS = 200;

/** Return the budget in milliseconds at a position of the slider, with two digits. */
export function budgetOf(position) {
  const budget = SMALLEST_MS * (LARGEST_MS / SMALLEST_MS) ** (position / STEPS);
  return Number(budget.toPrecision(2));
}

/** Return the position of a budget in milliseconds. */
export function positionOf(budget) {
  const share = Math.log(budget / SMALLEST_MS) / Math.log(LARGEST_MS / SMALLEST_MS);
  return Math.round(Math.min(1, Math.max(0, share)) * STEPS);
}

/** Show the slider and the tier that the budget buys at this moment. */
export function Slider({ position, onChange, server, answer, looks, onLooks }) {
  const budget = budgetOf(position ?? STEPS);
  return html`<div class="budget">
    <label>Latency budget: <span class="value">${budget} ms</span>
      <input type="range" min="0" max=${STEPS} value=${position} aria-valuetext="${budget} ms"
        onInput=${(event) => onChange(Number(event.target.value))} />
    </label>
    <div class="ends" aria-hidden="true"><span>${SMALLEST_MS} ms</span><span>${LARGEST_MS} ms</span></div>
    <div class="buys">
      <p class="tiers">Tiers: ${server.tiers.map((tier) => html`
        <span class=${tierClass(tier, answer)}
          aria-current=${answer?.tier === tier.name ? "true" : undefined}>${tier.name}</span> `)}</p>
      ${server.max_looks > 1 && html`<label class="check"><input type="checkbox" checked=${looks}
        onChange=${(event) => onLooks(event.target.checked)} /> A second look if the first is unsure</label>`}
    </div>
  </div>`;
}

function tierClass({ name }, answer) {
  if (answer?.tier === name) return "tier chosen";
  return answer?.first_tier === name ? "tier first" : "tier";
}
