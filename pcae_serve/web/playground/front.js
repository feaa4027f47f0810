// Accuracy against latency of every tier, as measured on this machine.
import { html } from "../vendor/htm-preact.js";
import { inMs } from "./answer.js";
import { scale, ticks, useWidth } from "./axes.js";

const HEIGHT = 280;
const LEFT = 56;
const BOTTOM = 40;

/** Return value, bounds and name of a tier's quality, or null if it is not measured. */
function quality(tier) {
  if (tier.accuracy) {
    const [low, high] = tier.accuracy.interval ?? [tier.accuracy.top1, tier.accuracy.top1];
    return { value: tier.accuracy.top1, low, high, name: "top-1" };
  }
  const found = tier.agreement?.share ?? tier.fidelity?.cosine;
  const name = tier.agreement ? "agreement with keep ratio 1" : "cosine to keep ratio 1";
  return found === undefined ? null : { value: found, low: found, high: found, name };
}

/** Show the front. chosen: name of the tier that answered last. */
export function Front({ server, chosen }) {
  const points = server.tiers
    .map((tier) => ({ tier, latency: tier.latency_ms?.[1], quality: quality(tier) }))
    .filter((point) => point.latency && point.quality);
  if (points.length < 2) return null;
  const name = points[0].quality.name;
  return html`<section aria-labelledby="front">
    <h2 id="front">Accuracy against latency</h2>
    <${Drawing} points=${points} name=${name} chosen=${chosen} />
    <div class="scroll" tabindex="0" role="region" aria-label="table of the tiers"><table>
      <thead><tr><th scope="col">tier</th><th scope="col">keep ratio</th><th scope="col">${name}</th>
        <th scope="col">latency, one image</th><th scope="col">eight images</th></tr></thead>
      <tbody>${server.tiers.map((tier) => html`<tr class=${tier.name === chosen ? "chosen" : ""}>
        <th scope="row">${tier.name}${tier.name === chosen ? " (answered)" : ""}</th>
        <td>${tier.keep_ratio}</td><td>${percent(quality(tier))}</td>
        <td>${inMs(tier.latency_ms?.[1])}</td><td>${inMs(tier.latency_ms?.[8])}</td></tr>`)}</tbody>
    </table></div>
  </section>`;
}

/** Draw the points, the chosen one marked, with the intervals of their quality. */
function Drawing({ points, name, chosen }) {
  const [element, width] = useWidth(600);
  const x = scale(0, 1.1 * Math.max(...points.map((point) => point.latency)), LEFT, width - 60);
  const least = Math.min(...points.map((point) => point.quality.low));
  const most = Math.max(...points.map((point) => point.quality.high));
  const margin = Math.max(0.002, 0.15 * (most - least));
  const y = scale(least - margin, Math.min(1, most + margin), HEIGHT - BOTTOM, 12);
  return html`<div ref=${element}><svg class="front" viewBox="0 0 ${width} ${HEIGHT}" role="img"
      aria-label="Each tier's ${name} against its latency; the table below has the numbers">
      <path class="axis" d="M${LEFT} 12V${HEIGHT - BOTTOM}H${width - 12}" />
      <text x=${(LEFT + width) / 2} y=${HEIGHT - 6} text-anchor="middle">latency of one image, ms</text>
      <text x="14" y=${HEIGHT / 2 - 14} text-anchor="middle" transform="rotate(-90 14 ${HEIGHT / 2 - 14})">${name}, %</text>
      ${ticks(x).map((value) => html`<text x=${x.at(value)} y=${HEIGHT - BOTTOM + 16} text-anchor="middle">${value}</text>`)}
      ${ticks(y).map((value) => html`<text x=${LEFT - 6} y=${y.at(value) + 4} text-anchor="end">${(100 * value).toFixed(1)}</text>`)}
      ${points.map(({ tier, latency, quality: { value, low, high } }, i) => html`
        <g class=${tier.name === chosen ? "point chosen" : "point"}>
          <title>${tier.name}: ${(100 * value).toFixed(2)} %, ${latency} ms</title>
          <path d="M${x.at(latency)} ${y.at(low)}V${y.at(high)}" />
          <circle cx=${x.at(latency)} cy=${y.at(value)} r=${tier.name === chosen ? 7 : 4.5} />
          <text x=${x.at(latency) + (i % 2 ? -9 : 9)} y=${y.at(value) + (i % 2 ? -9 : 17)}
            text-anchor=${i % 2 ? "end" : "start"}>${tier.name}</text>
        </g>`)}
    </svg></div>`;
}

function percent(found) {
  if (!found) return "–";
  const bounds = found.low < found.high ? ` (${(100 * found.low).toFixed(2)}–${(100 * found.high).toFixed(2)})` : "";
  return `${(100 * found.value).toFixed(2)} %${bounds}`;
}
