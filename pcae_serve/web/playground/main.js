// The playground: one image, one budget, the answer; then all tiers, the front and load.
import { html, render, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { Answer } from "./answer.js";
import { Burst } from "./burst.js";
import { Comparison } from "./comparison.js";
import { Front } from "./front.js";
import { Similarity } from "./similarity.js";
import { fetchTiers, infer } from "./api.js";
import { openPicture } from "./picture.js";
import { Picker } from "./picker.js";
import { Slider, budgetOf, positionOf } from "./slider.js";

/** Show the whole page. */
function Playground() {
  const [key, setKey] = useState("");
  const [server, setServer] = useState(null);
  const [picture, setPicture] = useState(null);
  const [position, setPosition] = useState(null); // of the slider
  const [answer, setAnswer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const running = useRef(null); // the request whose answer is shown next

  const report = (error) => {
    if (error.name !== "AbortError") setProblem(error);
  };

  const load = async () => {
    try {
      const found = await fetchTiers(key);
      setServer(found);
      setPosition((now) => now ?? positionOf(found.budget_ms));
      setProblem(null);
    } catch (error) {
      report(error);
    }
  };
  useEffect(() => void load(), []);

  const choose = async (blob, name) => {
    try {
      setPicture(await openPicture(blob, name, server));
      setAnswer(null);
      setProblem(null);
    } catch (error) {
      report(error);
    }
  };

  // Ask again whenever image or budget have changed and stay the same for a moment.
  useEffect(() => {
    if (!picture || position === null) return undefined;
    const control = new AbortController();
    const timer = setTimeout(async () => {
      running.current?.abort();
      running.current = control;
      setBusy(true);
      try {
        const parameters = { budget_ms: budgetOf(position), explain: true };
        setAnswer(await infer(server, picture.blob, parameters, key, control.signal));
        setProblem(null);
        setServer(await fetchTiers(key));
      } catch (error) {
        if (error.name !== "AbortError") setAnswer(null);
        report(error);
      }
      setBusy(false);
    }, 150);
    return () => clearTimeout(timer);
  }, [picture, position]);

  return html`
    <header>
      <h1>pcae-serve</h1>
      ${server && html`<p>${server.bundle} on ${server.device} (${server.backend})</p>`}
      <form class="key" onSubmit=${(event) => (event.preventDefault(), load())}>
        <label>API key
          <input type="password" autocomplete="off" value=${key}
            onInput=${(event) => setKey(event.target.value)} />
        </label>
        <button>Use key</button>
      </form>
    </header>
    <main>
      <${Problem} problem=${problem} />
      ${server && html`
        <section aria-labelledby="ask">
          <h2 id="ask">An image and a budget</h2>
          <${Picker} onChoose=${choose} onError=${report} />
          <${Slider} position=${position} onChange=${setPosition} server=${server} answer=${answer} />
          <div aria-live="polite" aria-busy=${busy}>
            ${answer && picture && html`<${Answer} answer=${answer} picture=${picture} patches=${patchesOf(server, answer)} />`}
            ${!picture && html`<p class="hint">
              Choose an image to see which tier answers. A tier is the model at one keep ratio: the
              share of the image's patches that each reduction keeps. Fewer patches take less time
              and cost some accuracy.
            </p>`}
          </div>
        </section>
        ${picture && html`
          <${Comparison} server=${server} picture=${picture} apiKey=${key} onError=${report} />
          ${server.answers === "features" &&
            html`<${Similarity} server=${server} picture=${picture} apiKey=${key} onError=${report} />`}`}
        <${Front} server=${server} chosen=${answer?.tier} />
        ${picture && server.answers !== "features" &&
          html`<${Burst} server=${server} picture=${picture} apiKey=${key} budget=${budgetOf(position)} />`}
      `}
    </main>
    <footer>
      <a href="${document.body.dataset.prefix}/docs">REST API</a>
    </footer>
  `;
}

/** Return the number of patches of the tier that answered. */
function patchesOf(server, answer) {
  return server.tiers.find((tier) => tier.name === answer.tier)?.patches ?? answer.tokens[0];
}

/** Show an error as the server's problem document states it. */
function Problem({ problem }) {
  return html`<div role="alert">
    ${problem && html`<p class="problem"><strong>${problem.title}</strong>: ${problem.message}</p>`}
  </div>`;
}

render(html`<${Playground} />`, document.getElementById("app"));
