// Pictures of the person's own: made small enough to send, remembered by the vectors they became.

/** Larger files are drawn anew at this many pixels a side before they travel. */
const SIDE = 1024;
const BYTES = 1_500_000;
const PREVIEW = 96;

export class Pictures {
  #known = new Map(); // vector -> {file, preview}

  /** A file as part of a search. */
  async take(file) {
    const image = await createImageBitmap(file).catch(() => null); // the server says what is wrong
    if (!image) return { file, preview: "" };
    const preview = await drawn(image, PREVIEW).then(asAddress);
    const smaller = file.size > BYTES ? await drawn(image, SIDE) : file;
    image.close();
    return { file: smaller, preview };
  }

  /** Small picture of it, or "" where only its vector came with a link. */
  preview(one) {
    return one.preview ?? "";
  }

  /** Take over the vectors that the server made of the files of a request. */
  learn({ body, sent }, vectors = []) {
    body.terms.forEach((term, n) => {
      const one = sent[term.upload];
      if (!one || one.id !== undefined || !vectors[n]) return;
      one.vector = vectors[n];
      this.#known.set(one.vector, { file: one.file, preview: one.preview });
      keep(one.vector, one.preview);
    });
  }

  /** A picture of an address with what is known of it here. */
  recall(one) {
    if (!one.vector) return one;
    return { ...one, preview: kept(one.vector), ...this.#known.get(one.vector) };
  }

  /** The same picture for another index: where the file is here, its vector is made anew. */
  anew(one) {
    return one.file ? { file: one.file, preview: one.preview } : one;
  }
}

/** Over white, as the pictures of the index, at most `side` pixels wide and high. */
async function drawn(image, side) {
  const scale = Math.min(1, side / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", 0.92); });
}

const asAddress = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.readAsDataURL(blob);
});

/** Previews outlive a reload of the tab; where storage is full or forbidden, they do without. */
function keep(vector, preview) {
  try {
    if (preview) sessionStorage.setItem(`preview ${vector.slice(0, 64)}`, preview);
  } catch { /* no preview after a reload, then */ }
}

function kept(vector) {
  try {
    return sessionStorage.getItem(`preview ${vector.slice(0, 64)}`) ?? "";
  } catch {
    return "";
  }
}
