// What is looked for: one plain object, how it is written into the address, what the server is asked.

/** A search without words and pictures. `fields` are conditions by column, as the server takes them;
 * `fused` is the vector of a whole query whose picture was not at hand when its link was opened. */
export const EMPTY = Object.freeze({
  index: "", text: "", pictures: [], balance: 0.5, head: "", fused: "",
  fields: {}, where: "", least: 0, collapse: 0, diversity: 0,
});

/** How strongly words with a minus push away, against 1 for what is looked for. */
const AVOIDING = 0.5;

/** Words to look for and words to avoid: `red car -truck -"blue sky"`. */
export function parse(text) {
  const avoided = [];
  const sought = text.replace(/(^|\s)[-−](?:"([^"]*)"?|“([^”]*)”?|(\S+))/g, (_, before, ...found) => {
    const words = found.slice(0, 3).find((one) => one !== undefined).trim();
    if (words) avoided.push(words);
    return before;
  });
  return { sought: sought.replace(/(^|\s)[-−](?=\s|$)/g, "$1").replace(/\s+/g, " ").trim(), avoided };
}

/** Whether there is anything to look for. */
export function asks(search) {
  const { sought, avoided } = parse(search.text);
  return Boolean(sought || avoided.length || search.pictures.length);
}

/** Both a picture and words: there is a balance to choose. */
export const mixed = (search) => Boolean(search.pictures.length && parse(search.text).sought);

/** A head joins one picture and one text; the picture itself must be at hand, not only its vector. */
export const fusable = (search) =>
  mixed(search) && search.pictures.length === 1 &&
  Boolean(search.pictures[0].file || search.pictures[0].id !== undefined);

/** The search as the server takes it, the files that go with it, and the pictures they are of. */
export function request(search, { k, offset }) {
  const { sought, avoided } = parse(search.text);
  const { pictures } = search;
  const b = pictures.length === 0 ? 1 : sought ? search.balance : 0;
  const body = {
    terms: [], head: null, k, offset,
    where: search.where || null, fields: search.fields,
    min_score: search.least || null, collapse: search.collapse || null, diversity: search.diversity,
  };
  if (search.index) body.index = search.index;
  if (search.fused) {
    body.terms.push({ vector: search.fused });
    return { body, files: [], sent: [] };
  }
  const sent = [];
  const whole = search.head && fusable(search) && b > 0 && b < 1;
  for (const one of b < 1 ? pictures : []) {
    const weight = (1 - b) / pictures.length;
    if (!whole && one.id !== undefined) body.terms.push({ id: one.id, weight });
    else if (!whole && one.vector) body.terms.push({ vector: one.vector, weight });
    else body.terms.push({ upload: sent.push(one) - 1, weight });
  }
  if (sought && b > 0) body.terms.push({ text: sought, weight: b });
  for (const words of avoided) body.terms.push({ text: words, weight: -AVOIDING });
  if (whole) body.head = search.head;
  return { body, files: sent.map((one) => one.file), sent };
}

/** The search as the part of an address behind its `#`. Pictures are there as ids or vectors. */
export function encode(search) {
  const parts = new URLSearchParams();
  const put = (name, value, plain) => { if (value !== plain) parts.append(name, value); };
  put("index", search.index, "");
  put("q", search.text.trim(), "");
  for (const one of search.pictures) {
    if (one.id !== undefined) parts.append("like", one.id);
    else if (one.vector) parts.append("picture", one.vector);
  }
  if (mixed(search)) {
    put("balance", String(search.balance), "0.5");
    put("head", search.head, "");
    const gone = search.pictures.some((one) => one.id === undefined); // a link has only its vector
    if (search.head && gone) put("fused", search.fused || search.answered || "", "");
  }
  if (Object.keys(search.fields).length) parts.append("fields", JSON.stringify(search.fields));
  put("where", search.where.trim(), "");
  for (const name of ["least", "collapse", "diversity"]) put(name, String(search[name]), "0");
  return parts.toString();
}

/** The search of such an address; what cannot be read in it is left out. */
export function decode(text) {
  const parts = new URLSearchParams(text.replace(/^#/, ""));
  const number = (name, plain) => {
    const value = Number.parseFloat(parts.get(name) ?? "");
    return Number.isFinite(value) ? value : plain;
  };
  const pictures = [];
  for (const [name, value] of parts) {
    if (name === "like" && /^\d+$/.test(value)) pictures.push({ id: Number(value) });
    if (name === "picture" && /^[\w-]+=*$/.test(value)) pictures.push({ vector: value });
  }
  return {
    ...EMPTY, pictures, fields: conditions(parts.get("fields")),
    index: parts.get("index") ?? "", text: parts.get("q") ?? "", head: parts.get("head") ?? "",
    where: parts.get("where") ?? "", fused: parts.get("fused") ?? "",
    balance: Math.min(1, Math.max(0, number("balance", 0.5))),
    least: number("least", 0), collapse: number("collapse", 0), diversity: number("diversity", 0),
  };
}

function conditions(text) {
  try {
    const read = JSON.parse(text ?? "{}");
    return read && typeof read === "object" && !Array.isArray(read) ? read : {};
  } catch {
    return {};
  }
}

/** How many conditions a search has. */
export const conditionCount = (search) =>
  Object.keys(search.fields).length +
  [search.where.trim(), search.least, search.collapse, search.diversity].filter(Boolean).length;
