// A bounded burst of requests: which tiers answer, how long it takes, and how the server recovers.
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { inMs } from "./answer.js";
import { infer, inferBatch } from "./api.js";
import { scale, ticks, useWidth } from "./axes.js";
import { scaledCopy } from "./picture.js";

const SECONDS = 6; // of the burst
const AFTER_S = 3; // of single requests after it, which show the recovery
const TICK_MS = 250;
const IMAGES = 8; // of a request
const REQUESTS = 6; // at once: what a browser allows for one host
/** A larger file is scaled down first: the burst loads the model, not the network. */
const LARGE_BYTES = 100_000;

/** Offer a burst, and draw it as it runs. */
export function Burst({ server, picture, apiKey, budget }) {
  const [ticksSeen, setTicks] = useState([]);
  const [end, setEnd] = useState(null); // of the burst, in seconds
  const [summary, setSummary] = useState("");
  const [running, setRunning] = useState(false);
  const [requests, setRequests] = useState(4);
  const stop = useRef(false);
  useEffect(() => () => void (stop.current = true), []);
  const large = picture.blob.size > LARGE_BYTES && picture.bitmap !== null;

  const run = async () => {
    stop.current = false;
    setRunning(true);
    setSummary("");
    setEnd(null);
    const blob = large ? await scaledCopy(picture, server.resize) : picture.blob;
    const start = performance.now();
    const answers = []; // {at_s, tier or null, ms}
    const elapsed = () => (performance.now() - start) / 1000;
    const note = (tier, ms) => answers.push({ at: elapsed(), tier, ms });
    const drawing = setInterval(() => setTicks(collect(answers, elapsed())), TICK_MS);

    const worker = async () => {
      while (elapsed() < SECONDS && !stop.current) {
        const results = await inferBatch(server, blob, IMAGES, { budget_ms: budget }, apiKey).catch(refused);
        for (const { answer } of results) note(answer?.tier ?? null, answer?.timings_ms.total);
      }
    };
    await Promise.all(Array.from({ length: requests }, worker));
    const ended = elapsed();
    setEnd(ended);
    let recovered = null;
    while (elapsed() < ended + AFTER_S && !stop.current) {
      const answer = await infer(server, blob, { budget_ms: budget }, apiKey).catch(() => null);
      note(answer?.tier ?? null, answer?.timings_ms.total);
      if (answer && recovered === null) recovered = elapsed() - ended;
      await new Promise((done) => setTimeout(done, TICK_MS / 2));
    }
    clearInterval(drawing);
    setTicks(collect(answers, elapsed()));
    setSummary(describe(answers.filter(({ at }) => at <= ended), ended, recovered));
    setRunning(false);
  };

  /** Return what became of a request that was refused as a whole, and do not ask again at once. */
  const refused = async () => {
    await new Promise((done) => setTimeout(done, 100));
    return Array.from({ length: IMAGES }, () => ({ answer: null }));
  };

  const names = server.tiers.map(({ name }) => name);
  const needed = requests * (server.tiers[0].latency_ms?.[IMAGES] ?? 0);
  return html`<section aria-labelledby="burst">
    <h2 id="burst">Under load</h2>
    <p class="hint">Sends copies of this image${large ? ` (${server.resize} pixels wide)` : ""} for ${SECONDS} s
      with a budget of ${budget} ms, then single requests.
      ${needed > budget && html` On tier ${server.tiers[0].name}, this many at once take about ${inMs(needed)}:
        with this budget, most are refused.`}</p>
    <div class="budget"><label>Images at once: <span class="value">${requests * IMAGES}</span>
      <input type="range" min="1" max=${REQUESTS} value=${requests} disabled=${running}
        onInput=${(event) => setRequests(Number(event.target.value))} />
    </label></div>
    <p class="controls">${running ? html`<button onClick=${() => (stop.current = true)}>Stop</button>`
      : html`<button onClick=${run}>Send a burst</button>`}</p>
    ${ticksSeen.length > 0 && html`<${Chart} ticksSeen=${ticksSeen} names=${names} end=${end} />`}
    <p aria-live="polite">${summary}</p>
  </section>`;
}

/** Return the answers of each quarter of a second. */
function collect(answers, until) {
  const count = Math.ceil((until * 1000) / TICK_MS);
  const found = Array.from({ length: count }, () => ({ tiers: {}, refused: 0, times: [] }));
  for (const { at, tier, ms } of answers) {
    const tick = found[Math.min(count - 1, Math.floor((at * 1000) / TICK_MS))];
    if (tier === null) tick.refused += 1;
    else {
      tick.tiers[tier] = (tick.tiers[tier] ?? 0) + 1;
      tick.times.push(ms);
    }
  }
  return found;
}

function describe(answers, seconds, recovered) {
  const done = answers.filter(({ tier }) => tier !== null);
  const times = done.map(({ ms }) => ms).sort((a, b) => a - b);
  const at = (share) => (times.length ? times[Math.floor(share * (times.length - 1))].toFixed(0) : "–");
  const back = recovered === null ? "no single request was answered after it"
    : `the first single request after it was answered within ${(1000 * recovered).toFixed(0)} ms`;
  return `${done.length} of ${answers.length} images answered in ${seconds.toFixed(1)} s`
    + ` (${(done.length / seconds).toFixed(0)} a second), ${answers.length - done.length} refused or late;`
    + ` ${at(0.5)} ms in the middle, ${at(0.99)} ms at the 99th percentile; ${back}.`;
}

const LEFT = 44;
const RIGHT = 8;
/** Top and bottom of the bars and of the line below them, and the height of all. */
const BARS = [10, 150];
const TIMES = [186, 246];
const HEIGHT = 284;

function median(times) {
  return times.length ? [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)] : null;
}

/** Draw the answers of each tier as stacked bars, refusals on top, and median times below. */
function Chart({ ticksSeen, names, end }) {
  const [element, width] = useWidth(600);
  const perSecond = 1000 / TICK_MS;
  const total = (tick) => tick.refused + Object.values(tick.tiers).reduce((sum, n) => sum + n, 0);
  const slots = Math.max(ticksSeen.length, ((SECONDS + AFTER_S) * 1000) / TICK_MS);
  const x = scale(0, slots / perSecond, LEFT, width - RIGHT);
  const rate = scale(0, perSecond * Math.max(1, ...ticksSeen.map(total)), BARS[1], BARS[0]);
  const medians = ticksSeen.map(({ times }) => median(times));
  const time = scale(0, Math.max(1, ...medians), TIMES[1], TIMES[0]);
  const line = medians
    .map((value, i) => (value === null ? "" : `${x.at((i + 0.5) / perSecond)},${time.at(value)}`))
    .filter(Boolean).join(" ");
  const series = [...names, null];
  const slot = x.at(1 / perSecond) - x.at(0);
  return html`<figure>
    <div ref=${element}><svg class="chart" viewBox="0 0 ${width} ${HEIGHT}" role="img"
      aria-label="Images answered by each tier and refused, and median time, in each quarter of a second">
      <path class="axis" d="M${LEFT} ${BARS[0]}V${BARS[1]}H${width - RIGHT}M${LEFT} ${TIMES[0]}V${TIMES[1]}H${width - RIGHT}" />
      <text x="0" y=${BARS[1] + 22}>median time, ms</text>
      ${[[rate, 4], [time, 2]].map(([axis, count]) => ticks(axis, count).map((value) => html`
        <path class="axis" d="M${LEFT - 4} ${axis.at(value)}h4" />
        <text x=${LEFT - 7} y=${axis.at(value) + 4} text-anchor="end">${value}</text>`))}
      ${ticks(x, 9).map((value) => html`<text x=${x.at(value)} y=${TIMES[1] + 16} text-anchor="middle">${value}</text>`)}
      <text x=${(LEFT + width) / 2} y=${HEIGHT - 6} text-anchor="middle">seconds</text>
      ${ticksSeen.map((tick, i) => {
        let sum = 0;
        return series.map((name, number) => {
          const count = perSecond * (name === null ? tick.refused : (tick.tiers[name] ?? 0));
          sum += count;
          return count > 0 && html`<rect class=${name === null ? "refused" : `series-${number % 6}`}
            x=${x.at(i / perSecond)} y=${rate.at(sum)} width=${Math.max(0.5, slot - 1)}
            height=${rate.at(0) - rate.at(count)} />`;
        });
      })}
      ${end !== null && html`<path class="end" d="M${x.at(end)} ${BARS[0]}V${TIMES[1]}" />
        <text x=${x.at(end) + 4} y=${BARS[0] + 8}>end of the burst</text>`}
      <polyline class="median" points=${line} />
    </svg></div>
    <figcaption>Images a second: ${names.map((name, number) => html`<span class="legend series-${number % 6}">${name}</span> `)}
      <span class="legend refused">refused or late</span></figcaption>
  </figure>`;
}
