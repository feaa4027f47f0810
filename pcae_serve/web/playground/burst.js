// A bounded burst of requests: which tiers answer, how long it takes, and how the server recovers.
import { html, useRef, useState } from "../vendor/htm-preact.js";
import { infer, inferBatch } from "./api.js";

const SECONDS = 6; // of the burst
const AFTER_S = 3; // of single requests after it, which show the recovery
const TICK_MS = 250;
const IMAGES = 8; // of a request
const REQUESTS = 6; // at once: what a browser allows for one host
const WIDTH = 480;
const HEIGHT = 160;

/** Offer a burst, and draw it as it runs. */
export function Burst({ server, picture, apiKey, budget }) {
  const [ticks, setTicks] = useState([]);
  const [summary, setSummary] = useState("");
  const [running, setRunning] = useState(false);
  const [requests, setRequests] = useState(4);
  const stop = useRef(false);

  const run = async () => {
    const start = performance.now();
    const answers = []; // {at_s, tier or null, ms}
    const elapsed = () => (performance.now() - start) / 1000;
    const note = (tier, ms) => answers.push({ at: elapsed(), tier, ms });
    stop.current = false;
    setRunning(true);
    setSummary("");
    const drawing = setInterval(() => setTicks(collect(answers, elapsed())), TICK_MS);

    const worker = async () => {
      while (elapsed() < SECONDS && !stop.current) {
        const results = await inferBatch(picture.blob, IMAGES, { budget_ms: budget }, apiKey).catch(refused);
        for (const { answer } of results) note(answer?.tier ?? null, answer?.timings_ms.total);
      }
    };
    await Promise.all(Array.from({ length: requests }, worker));
    const end = elapsed();
    let recovered = null;
    while (elapsed() < end + AFTER_S && !stop.current) {
      const answer = await infer(server, picture.blob, { budget_ms: budget }, apiKey).catch(() => null);
      note(answer?.tier ?? null, answer?.timings_ms.total);
      if (answer && recovered === null) recovered = elapsed() - end;
      await new Promise((done) => setTimeout(done, TICK_MS / 2));
    }
    clearInterval(drawing);
    setTicks(collect(answers, elapsed()));
    setSummary(describe(answers.filter(({ at }) => at <= end), end, recovered));
    setRunning(false);
  };

  /** Return what became of a request that was refused as a whole, and do not ask again at once. */
  const refused = async () => {
    await new Promise((done) => setTimeout(done, 100));
    return Array.from({ length: IMAGES }, () => ({ answer: null }));
  };

  const names = server.tiers.map(({ name }) => name);
  return html`<section aria-labelledby="burst">
    <h2 id="burst">Under load</h2>
    <p>Sends copies of this image for ${SECONDS} s with a budget of ${budget} ms, then single requests.</p>
    <label>Images at once: <span class="value">${requests * IMAGES}</span>
      <input type="range" min="1" max=${REQUESTS} value=${requests} disabled=${running}
        onInput=${(event) => setRequests(Number(event.target.value))} />
    </label>
    ${running ? html`<button onClick=${() => (stop.current = true)}>Stop</button>`
      : html`<button onClick=${run}>Send a burst</button>`}
    ${ticks.length > 0 && html`<${Chart} ticks=${ticks} names=${names} />`}
    <p aria-live="polite">${summary}</p>
  </section>`;
}

/** Return the answers of each quarter of a second. */
function collect(answers, until) {
  const count = Math.ceil((until * 1000) / TICK_MS);
  const ticks = Array.from({ length: count }, () => ({ tiers: {}, refused: 0, times: [] }));
  for (const { at, tier, ms } of answers) {
    const tick = ticks[Math.min(count - 1, Math.floor((at * 1000) / TICK_MS))];
    if (tier === null) tick.refused += 1;
    else {
      tick.tiers[tier] = (tick.tiers[tier] ?? 0) + 1;
      tick.times.push(ms);
    }
  }
  return ticks;
}

function describe(answers, seconds, recovered) {
  const done = answers.filter(({ tier }) => tier !== null);
  const times = done.map(({ ms }) => ms).sort((a, b) => a - b);
  const at = (share) => (times.length ? times[Math.floor(share * (times.length - 1))].toFixed(0) : "–");
  const back = recovered === null ? "no single request was answered after it"
    : `the first single request after it was answered within ${(1000 * recovered).toFixed(0)} ms`;
  return `${done.length} of ${answers.length} images answered in ${seconds.toFixed(1)} s`
    + ` (${(done.length / seconds).toFixed(0)} a second), ${answers.length - done.length} refused or late;`
    + ` ${at(0.5)} ms in the middle, ${at(0.99)} ms at the 99th percentile; ${back}`;
}

/** Draw the answers of each tier as stacked bars, refusals on top, and the median time as a line. */
function Chart({ ticks, names }) {
  const total = (tick) => tick.refused + Object.values(tick.tiers).reduce((sum, n) => sum + n, 0);
  const most = Math.max(1, ...ticks.map(total));
  const slots = Math.max(ticks.length, ((SECONDS + AFTER_S) * 1000) / TICK_MS);
  const width = WIDTH / slots;
  const median = (times) => [...times].sort((a, b) => a - b)[Math.floor(times.length / 2)];
  const medians = ticks.map(({ times }) => (times.length ? median(times) : null));
  const slowest = Math.max(1, ...medians.filter((each) => each !== null));
  const line = medians
    .map((value, i) => (value === null ? "" : `${(i + 0.5) * width},${HEIGHT - (value / slowest) * (HEIGHT - 8)}`))
    .filter(Boolean).join(" ");
  const series = [...names, null];
  return html`<figure>
    <svg class="chart" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img"
      aria-label="Images answered by each tier, refusals and median time, in each quarter of a second">
      ${ticks.map((tick, i) => {
        let top = HEIGHT;
        return series.map((name, number) => {
          const count = name === null ? tick.refused : (tick.tiers[name] ?? 0);
          const height = (count / most) * (HEIGHT - 8);
          top -= height;
          return count > 0 && html`<rect class=${name === null ? "refused" : `series-${number % 6}`}
            x=${i * width} y=${top} width=${Math.max(0.5, width - 1)} height=${height} />`;
        });
      })}
      <polyline class="median" points=${line} />
    </svg>
    <figcaption>${names.map((name, number) => html`<span class="legend series-${number % 6}">${name}</span> `)}
      <span class="legend refused">refused</span>; line: median time, at most ${slowest.toFixed(0)} ms;
      a bar is ${TICK_MS} ms, the highest ${most} images</figcaption>
  </figure>`;
}
