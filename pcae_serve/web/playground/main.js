// The playground: one image, one budget, the answer; then all tiers, the front and load.
import { html, render, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { Answer } from "./answer.js";
import { Burst } from "./burst.js";
import { Comparison } from "./comparison.js";
import { Front } from "./front.js";
import { PatchMap } from "./patches.js";
import { Similarity } from "./similarity.js";
import { fetchTiers, infer } from "./api.js";
import { openPicture } from "./picture.js";
import { Picker } from "./picker.js";
import { Slider, budgetOf, positionOf } from "./slider.js";

/** Show the whole page. */
function Playground() {
  const [key, setKey] = useState("");
  const [server, setServer] = useState(null);
  const [pictures, setPictures] = useState([]); // the last one is shown; before it, the one before
  const [note, setNote] = useState(""); // about the image
  const [position, setPosition] = useState(null); // of the slider
  const [looks, setLooks] = useState(true); // whether a second look is allowed
  const [turn, setTurn] = useState(0); // grows when the same question is asked again
  const [answer, setAnswer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const running = useRef(null); // the request whose answer is shown next
  const picture = pictures.at(-1) ?? null;

  const report = (error) => {
    if (error.name !== "AbortError") setProblem(error);
  };

  const load = async () => {
    try {
      const found = await fetchTiers(key);
      setServer(found);
      setPosition((now) => now ?? positionOf(found.budget_ms));
      setProblem(null);
      setTurn((now) => now + 1);
    } catch (error) {
      report(error);
    }
  };
  useEffect(() => void load(), []);

  const choose = async (blob, name, count) => {
    if (!server) return;
    const opened = await openPicture(blob, name, server);
    setPictures((before) => [...before.slice(-1), opened]);
    setNote(describe(opened, count));
    setAnswer(null);
    setProblem(null);
  };

  // Ask again whenever image, budget or looks have changed and stay the same for a moment.
  useEffect(() => {
    if (!picture || position === null) return undefined;
    const control = new AbortController();
    const timer = setTimeout(async () => {
      running.current?.abort();
      running.current = control;
      setBusy(true);
      try {
        const parameters = { budget_ms: budgetOf(position), explain: true };
        if (server.answers !== "features" && !looks) parameters.max_looks = 1;
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
  }, [picture, position, looks, turn]);

  return html`
    <header>
      <h1>pcae-serve</h1>
      ${server && html`<p class="name">${server.bundle} on ${server.device} (${server.backend})</p>`}
      <form class="key" onSubmit=${(event) => (event.preventDefault(), load())}>
        <label>API key
          <input type="password" autocomplete="off" value=${key}
            onInput=${(event) => setKey(event.target.value)} />
        </label>
        <button>Use key</button>
      </form>
    </header>
    <main>
      <${Problem} problem=${problem} onRetry=${load} />
      ${server && html`
        <section aria-labelledby="ask">
          <h2 id="ask">An image and a budget</h2>
          <${Picker} onChoose=${choose} onError=${report} picture=${picture} />
          ${note && html`<p class="note name">${note}</p>`}
          <${Slider} position=${position} onChange=${setPosition} server=${server} answer=${answer}
            looks=${looks} onLooks=${setLooks} />
          <div aria-live="polite" aria-busy=${busy}>
            ${answer && picture && html`<${Answer} answer=${answer} picture=${picture} server=${server}
              patches=${patchesOf(server, answer)} />`}
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
            html`<${Similarity} server=${server} picture=${picture} apiKey=${key} onError=${report} />`}
          ${server.patch_grid && html`<${PatchMap} server=${server} picture=${picture}
            before=${pictures.at(-2) ?? null} apiKey=${key} onError=${report} />`}`}
        <${Front} server=${server} chosen=${answer?.tier} />
        ${picture && html`<${Burst} server=${server} picture=${picture} apiKey=${key} budget=${budgetOf(position)} />`}
      `}
    </main>
    <footer>
      <a href="${document.body.dataset.prefix}/docs">REST API</a>
    </footer>
  `;
}

/** Return name and size of an image, and what a visitor may wonder about. count: files that came. */
function describe({ blob, name, size, transparent }, count) {
  const parts = [name];
  if (count > 1) parts[0] += ` (of ${count} files, only this one)`;
  if (size) parts.push(`${size[0]} × ${size[1]} pixels`);
  parts.push(blob.size < 1e6 ? `${Math.max(1, Math.round(blob.size / 1e3))} kB` : `${(blob.size / 1e6).toFixed(1)} MB`);
  if (!size) parts.push("this browser cannot show it");
  if (transparent) parts.push("partly transparent: the model sees the colours that are stored there");
  return parts.join(", ");
}

/** Return the number of patches of the tier that answered. */
function patchesOf(server, answer) {
  return server.tiers.find((tier) => tier.name === answer.tier)?.patches ?? answer.tokens[0];
}

/** Show an error as the server's problem document states it. */
function Problem({ problem, onRetry }) {
  return html`<div role="alert">
    ${problem && html`<p class="problem"><span><strong>${problem.title}</strong>: ${problem.message}</span>
      ${problem.passing && html` <button onClick=${onRetry}>Try again</button>`}</p>`}
  </div>`;
}

render(html`<${Playground} />`, document.getElementById("app"));
