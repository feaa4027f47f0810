// Requests to the server, and its errors.

/** An error as a problem document states it (RFC 9457). */
export class Problem extends Error {
  constructor(title, detail, status, type) {
    super(detail);
    this.title = title;
    this.status = status;
    this.type = type;
  }
}

/** Send a request under the server's prefix. Throw a Problem unless it is answered with 2xx. */
async function send(path, options, key) {
  const headers = key ? { "X-API-Key": key } : {};
  let response;
  try {
    response = await fetch(`${document.body.dataset.prefix}${path}`, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("No answer", "the server cannot be reached; is it running?", 0, "");
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  const detail = problem.detail ?? `the server answered with status ${response.status}`;
  throw new Problem(problem.title ?? "Error", detail, response.status, problem.type ?? "");
}

/** Return the bundle, the device and the tiers. */
export function fetchTiers(key) {
  return send("/tiers", {}, key);
}

/** Return the answer to an image. parameters: of the query. */
export function infer(server, blob, parameters, key, signal) {
  const route = server.answers === "features" ? "/embed" : "/classify";
  const query = new URLSearchParams(parameters);
  return send(`${route}?${query}`, { method: "POST", body: blob, signal }, key);
}

/** Return the outcome of each of `count` copies of an image, sent as one request. */
export async function inferBatch(blob, count, parameters, key) {
  const form = new FormData();
  for (let i = 0; i < count; i += 1) form.append("image", blob, "image");
  const query = new URLSearchParams(parameters);
  return (await send(`/classify/batch?${query}`, { method: "POST", body: form }, key)).results;
}
