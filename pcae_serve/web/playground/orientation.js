// The EXIF orientation of a WebP file: the server turns such images upright, not every browser does.

/** Canvas transformations by orientation, for an image of width w and height h as stored. */
const TURNS = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};
const ORIENTATION = 0x112; // EXIF tag

/** Decode an image to an upright bitmap. Reject if the browser cannot. */
export async function decodeUpright(blob) {
  const options = { colorSpaceConversion: "none" };
  const turn = TURNS[orientationOfWebp(new DataView(await blob.arrayBuffer()))];
  if (!turn) return createImageBitmap(blob, options);
  const stored = await createImageBitmap(blob, { ...options, imageOrientation: "none" });
  const { width, height } = stored;
  const canvas = document.createElement("canvas");
  const matrix = turn(width, height);
  [canvas.width, canvas.height] = matrix[0] === 0 ? [height, width] : [width, height];
  const context = canvas.getContext("2d");
  context.setTransform(...matrix);
  context.drawImage(stored, 0, 0);
  stored.close();
  return createImageBitmap(canvas);
}

/** Return the orientation that a WebP file states, or 1: for other files, too. */
function orientationOfWebp(view) {
  try {
    if (word(view, 0) !== "RIFF" || word(view, 8) !== "WEBP") return 1;
    for (let at = 12; at + 8 <= view.byteLength; ) {
      const bytes = view.getUint32(at + 4, true);
      if (word(view, at) === "EXIF") return orientationOfExif(view, at + 8);
      at += 8 + bytes + (bytes % 2);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the file ends too early
  }
  return 1;
}

/** Return the orientation of EXIF data at a place. Throw RangeError if they end too early. */
function orientationOfExif(view, start) {
  const tiff = word(view, start) === "Exif" ? start + 6 : start;
  const little = view.getUint16(tiff) === 0x4949;
  const list = tiff + view.getUint32(tiff + 4, little);
  for (let i = 0; i < view.getUint16(list, little); i += 1) {
    const entry = list + 2 + 12 * i;
    if (view.getUint16(entry, little) === ORIENTATION) return view.getUint16(entry + 8, little);
  }
  return 1;
}

function word(view, at) {
  return String.fromCharCode(...[0, 1, 2, 3].map((i) => view.getUint8(at + i)));
}
