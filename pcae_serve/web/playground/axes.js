// Scales and round values of drawings, and the width that a drawing has.
import { useEffect, useRef, useState } from "../vendor/htm-preact.js";

/** Return a linear scale from values to places. */
export function scale(least, most, first, last) {
  return { least, most, at: (value) => first + ((value - least) / (most - least)) * (last - first) };
}

/** Return about `count` round values of a scale. */
export function ticks({ least, most }, count = 5) {
  const rough = (most - least) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(least / step); i * step <= most; i += 1) found.push(Number((i * step).toPrecision(6)));
  return found;
}

/** Return a reference for an element, and its width in pixels: text keeps its size in a drawing. */
export function useWidth(initial) {
  const element = useRef(null);
  const [width, setWidth] = useState(initial);
  useEffect(() => {
    const observer = new ResizeObserver(([{ contentRect }]) => setWidth(Math.round(contentRect.width)));
    observer.observe(element.current);
    return () => observer.disconnect();
  }, []);
  return [element, Math.max(200, width)];
}
