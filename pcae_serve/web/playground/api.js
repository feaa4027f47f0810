// Requests to the server, and its errors.

/** An error as a problem document states it (RFC 9457). */
export class Problem extends Error {
  constructor(title, detail, status, type) {
    super(detail);
    this.title = title;
    this.status = status;
    this.type = type;
  }

  /** Whether the same request may be answered later. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

/** Return the error of a server that does not answer. */
export function unreachable() {
  return new Problem("No answer", "the server cannot be reached; is it running?", 0, "");
}

/** Send a request under the server's prefix. Throw a Problem unless it is answered with 2xx. */
async function send(path, options, key, accept = "application/json") {
  const headers = { Accept: accept, ...(key ? { "X-API-Key": key } : {}) };
  let response;
  try {
    response = await fetch(`${document.body.dataset.prefix}${path}`, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail ?? `the server answered with status ${response.status}`;
  throw new Problem(problem.title ?? "Error", detail, response.status, problem.type ?? "");
}

/** Return the bundle, the device and the tiers. */
export async function fetchTiers(key) {
  return (await send("/tiers", {}, key)).json();
}

/** Return the answer to an image. parameters: of the query. */
export async function infer(server, blob, parameters, key, signal) {
  const query = new URLSearchParams(parameters);
  return (await send(`${route(server)}?${query}`, { method: "POST", body: blob, signal }, key)).json();
}

/** Return the outcome of each of `count` copies of an image, sent as one request. */
export async function inferBatch(server, blob, count, parameters, key) {
  const form = new FormData();
  for (let i = 0; i < count; i += 1) form.append("image", blob, "image");
  const query = new URLSearchParams(parameters);
  const response = await send(`${route(server)}/batch?${query}`, { method: "POST", body: form }, key);
  return (await response.json()).results;
}

/** Return the state of every patch of an image on a tier, each a vector of length 1. */
export async function fetchPatches(blob, parameters, key, signal) {
  const query = new URLSearchParams({ ...parameters, patches: true, normalize: true });
  const options = { method: "POST", body: blob, signal };
  const response = await send(`/embed?${query}`, options, key, "application/octet-stream");
  const [first, shape] = ["X-Shape", "X-Patches-Shape"]
    .map((name) => response.headers.get(name).split(",").map(Number));
  const [rows, columns, width] = shape;
  const values = new Float32Array(await response.arrayBuffer()).subarray(first[0]); // after the features
  return Array.from({ length: rows * columns }, (_, i) => values.subarray(i * width, (i + 1) * width));
}

function route(server) {
  return server.answers === "features" ? "/embed" : "/classify";
}
