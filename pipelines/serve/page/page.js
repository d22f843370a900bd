// The page: one search, what it found, and the address that holds it.

import { grouped, icon, make, settled } from "./elements.js";
import { Filters } from "./filters.js";
import { Detail, Grid, framed } from "./grid.js";
import { EMPTY, asks, conditionCount, decode, encode, fusable, mixed, parse, request } from "./search.js";
import * as server from "./server.js";
import { Pictures } from "./pictures.js";

const PAGE_SIZE = 48;
/** Results of searches that back and forward lead to. */
const REMEMBERED = 20;
const TYPING_PAUSE = 220;

const at = (id) => document.getElementById(id);
const words = at("words");
let indexes = [];
let index = null;
let search = EMPTY;
let asked = new AbortController();
let found = null; // {key, hits, answer, ended} of what the grid shows
let more = null; // the request for the next page
const remembered = new Map();
const chipped = new WeakMap();
let lastTyped = 0;

const pictures = new Pictures();
const grid = new Grid(at("hits"), (place) => detail.open(place));
const filters = new Filters(at("filters"), change, () => refine(false));
const detail = new Detail(at("detail"), {
  at: (place) => grid.hits[place],
  facts: (id, signal) => server.metadata(index.name, id, signal),
  like: (hit) => change({ text: "", pictures: [{ id: hit.id }], balance: EMPTY.balance, head: "" }),
  add: (hit) => add([{ id: hit.id }]),
  left: (place) => grid.focus(place),
});

/** Change the search by a patch (or a function of it), write the address, ask. */
function change(patch, rebuild = false, typed = false) {
  const next = typeof patch === "function" ? patch(search) : patch;
  if (["text", "pictures", "balance", "head", "index"].some((name) => name in next)) Object.assign(next, { fused: "", answered: "" });
  search = { ...search, ...next };
  address(typed && Date.now() - lastTyped < 4000);
  lastTyped = typed ? Date.now() : 0;
  draw(rebuild);
  return run();
}

/** Write the search into the address: a new step back, or instead of the last one. */
function address(instead) {
  const hash = `#${encode(search)}`;
  if (hash === (location.hash || "#")) return;
  if (found && !instead) found.scroll = scrollY;
  history[instead ? "replaceState" : "pushState"](null, "", hash === "#" ? location.pathname + location.search : hash);
}

/** The controls as the search has them. */
function draw(rebuild) {
  index = indexes.find((one) => one.name === search.index) ?? indexes[0];
  if (words.value.trim() !== search.text.trim()) words.value = search.text;
  at("index").value = index.name;
  const chips = search.pictures.map((one) => chipped.get(one) ?? chip(one));
  if (chips.length !== at("chips").children.length || chips.some((one, n) => one !== at("chips").children[n])) at("chips").replaceChildren(...chips);
  at("clear").hidden = !asks(search);
  at("mixing").hidden = !mixed(search);
  at("balance").value = search.balance;
  at("fusing").hidden = !index.heads.length;
  const head = at("head");
  head.replaceChildren(make("option", { value: "" }, "their sum"), ...index.heads.map((name) => make("option", { value: name }, name)));
  head.value = index.heads.includes(search.head) ? search.head : "";
  head.disabled = !fusable(search);
  head.title = head.disabled ? "A fusion head takes one picture, which is not in a link, and words" : "";
  const count = conditionCount(search);
  at("counted").textContent = count ? ` ${count}` : "";
  words.placeholder = search.pictures.length ? "and in words …" : "Describe a picture, or drop one";
  const { sought, avoided } = parse(search.text);
  at("parts").textContent = avoided.length ? `without ${avoided.map((one) => `“${one}”`).join(", ")}` : "";
  document.title = [sought, search.pictures.length ? "a picture" : ""].filter(Boolean).join(" + ") || "Search pictures";
  if (rebuild) filters.show(index, search);
}

/** A picture keeps its chip, so that nothing flickers while words are typed. */
function chip(one) {
  const source = one.id === undefined ? pictures.preview(one) : server.pictureAt(index.name, one.id, 128);
  const drop = () => {
    change({ pictures: search.pictures.filter((other) => other !== one) });
    words.focus();
  };
  const made = make("span.chip", { role: "listitem" }, framed(source, "picture", { lazy: false }),
    make("button", { type: "button", title: "Take this picture out", "aria-label": "Take this picture out of the search", onclick: drop }, icon("cross")));
  chipped.set(one, made);
  return made;
}

/** Ask for the first hits; whatever was asked before is given up. */
async function run() {
  asked.abort();
  asked = new AbortController();
  more = null;
  const { signal } = asked;
  trouble("");
  at("end").textContent = "";
  if (!asks(search)) return welcome();
  at("welcome").hidden = true;
  grid.wait();
  const wanted = search;
  try {
    await withFile(wanted);
    const question = request(wanted, { k: PAGE_SIZE, offset: 0 });
    const answer = await server.find(question, signal);
    if (signal.aborted) return;
    pictures.learn(question, answer.vectors);
    wanted.answered = answer.query ?? "";
    address(true);
    arrive(answer);
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    found = null;
    grid.show([]);
    at("status").textContent = "";
    trouble(error.message);
  }
}

/** A head wants the picture itself, also of a row. */
async function withFile(wanted) {
  const [one] = wanted.pictures;
  if (wanted.head && fusable(wanted) && !one.file) one.file = await server.pictureFile(index.name, one.id);
}

/** Hits of an index whose shards are gone have no pictures to ask for. */
const seen = (hits) => (index.pictures ? hits : hits.map((hit) => ({ ...hit, picture: null })));

const isLast = ({ hits, matching }, depth) => hits.length < PAGE_SIZE || depth >= matching;

function arrive(answer) {
  found = { key: encode(search), hits: seen(answer.hits), answer, depth: answer.hits.length };
  found.ended = isLast(answer, found.depth);
  scrollTo(0, 0);
  grid.show(found.hits);
  report();
  remember();
  observe();
}

/** One line about the answer: how many, how fast, how. */
function report() {
  const { answer, ended, hits } = found;
  const kind = index.modality === "image" ? "pictures" : "rows";
  const held = answer.matching < index.rows;
  const status = at("status");
  const time = answer.milliseconds.total;
  status.replaceChildren(
    make("b", {}, held ? `${grouped(answer.matching)} of ${grouped(index.rows)}` : grouped(index.rows)),
    held ? ` ${kind} match` : ` ${kind}`,
    make("span.soft", { title: `encoder ${answer.milliseconds.encode.toFixed(1)} ms, index ${answer.milliseconds.search.toFixed(1)} ms` },
      ` · ${time < 10 ? time.toFixed(1) : Math.round(time)} ms`),
    make("span.soft.plan", { title: answer.plan }, ` · ${answer.plan}`),
  );
  if (!hits.length) at("end").textContent = held ? "Nothing matches these filters." : "Nothing found.";
  else at("end").textContent = ended ? (hits.length > 12 ? "That is all." : "") : "";
}

/** The next hits, when the end of the grid comes near. */
async function grow() {
  if (!found || found.ended || more) return;
  const { signal } = asked;
  const here = found;
  more = server.find(request(search, { k: PAGE_SIZE, offset: here.depth }), signal);
  at("end").textContent = "More …";
  try {
    const answer = await more;
    if (here !== found) return;
    const hits = seen(answer.hits);
    here.depth += hits.length;
    here.ended = isLast(answer, here.depth);
    here.hits.push(...grid.add(hits));
    report();
    more = null;
    observe();
  } catch (error) {
    if (here !== found || error.name === "AbortError") return;
    here.ended = error.status === 400; // as deep as this server goes
    at("end").replaceChildren(`${error.message} `, here.ended ? "" : make("button.link", { type: "button", onclick: () => { more = null; grow(); } }, "Try again"));
  }
}

const watcher = new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && grow(), { rootMargin: "900px" });

/** Look again whether the end is near: an observer speaks only when that changes. */
function observe() {
  watcher.unobserve(at("sentinel"));
  watcher.observe(at("sentinel"));
}

function remember() {
  remembered.delete(found.key);
  remembered.set(found.key, found);
  if (remembered.size > REMEMBERED) remembered.delete(remembered.keys().next().value);
}

/** Before anything was asked: how to, and some of what there is. */
function welcome() {
  found = null;
  grid.show([]);
  const kind = index.modality === "image" ? "pictures" : "rows";
  at("status").replaceChildren(make("b", {}, grouped(index.rows)), ` ${kind}`);
  at("welcome").replaceChildren(
    make("h1", {}, "What are you looking for?"),
    make("p", {}, "Describe it, or drop, paste or choose a picture. Or both: a picture, and what should be different. ",
      "A minus avoids: ", make("q", {}, "red car -truck"), "."));
  at("welcome").hidden = false;
  const sample = index.sample ?? [];
  if (sample.length) grid.show(seen(sample.map((row) => ({ score: NaN, key: "", ...row }))));
  at("end").textContent = "";
}

function trouble(line) {
  at("trouble").hidden = !line;
  at("trouble").textContent = line;
}

/** More pictures into the query. */
function add(some) {
  if (some.length) change({ pictures: [...search.pictures, ...some] });
}

/** Files that were dropped, pasted or chosen. */
async function take(files) {
  const fitting = [...files].filter((file) => file.type.startsWith("image/") || !file.type);
  if (!fitting.length) return trouble("That is no picture. Drop a picture file here.");
  add(await Promise.all(fitting.map((file) => pictures.take(file))));
}

function refine(open) {
  document.body.classList.toggle("refining", open);
  at("refine").setAttribute("aria-expanded", String(open));
}

/** What the address says, as if nothing had been before. */
function restore() {
  const next = decode(location.hash);
  next.pictures = next.pictures.map((one) => pictures.recall(one));
  search = next;
  lastTyped = 0;
  const known = remembered.get(encode(next));
  draw(true);
  if (!known) return run();
  asked.abort();
  asked = new AbortController();
  more = null;
  trouble("");
  at("welcome").hidden = true;
  found = known;
  grid.show(found.hits);
  report();
  scrollTo(0, found.scroll ?? 0);
  observe();
}

function listen() {
  const typed = settled(() => words.value.trim() !== search.text.trim() && change({ text: words.value }, false, true), TYPING_PAUSE);
  words.addEventListener("input", typed);
  at("asking").addEventListener("submit", (event) => {
    event.preventDefault();
    typed.now();
    lastTyped = 0;
    if (matchMedia("(pointer: coarse)").matches) words.blur();
  });
  words.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") {
      event.preventDefault();
      grid.focus();
    } else if (event.key === "Backspace" && !words.value && search.pictures.length) {
      change({ pictures: search.pictures.slice(0, -1) });
    }
  });
  at("without").addEventListener("click", () => {
    words.value = `${words.value.trimEnd()} -`.trimStart();
    words.focus();
  });
  at("clear").addEventListener("click", () => {
    typed.drop();
    words.value = "";
    change({ text: "", pictures: [], head: "", balance: EMPTY.balance });
    words.focus();
  });
  const balanced = settled(() => change({ balance: Number(at("balance").value) }), 120);
  at("balance").addEventListener("input", balanced);
  at("head").addEventListener("change", () => change({ head: at("head").value }));
  at("index").addEventListener("change", () => change({
    index: at("index").value, pictures: search.pictures.filter((one) => one.id === undefined).map((one) => pictures.anew(one)),
    fields: {}, where: "", head: "",
  }, true));
  at("file").addEventListener("change", async () => {
    await take(at("file").files);
    at("file").value = "";
  });
  at("refine").addEventListener("click", () => refine(!document.body.classList.contains("refining")));
  at("copy").addEventListener("click", copy);
  addEventListener("popstate", restore);
  addEventListener("scroll", settled(() => { if (found) found.scroll = scrollY; }, 100), { passive: true });
  listenToKeys();
  listenToDrops();
}

function listenToKeys() {
  addEventListener("keydown", (event) => {
    const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "") || document.querySelector("dialog[open]");
    if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      words.focus();
      words.select();
    } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      if (document.body.classList.contains("refining") && matchMedia("(max-width: 60rem)").matches) refine(false);
      else if (document.activeElement?.closest?.(".hits")) words.focus();
    }
  });
}

function listenToDrops() {
  let depth = 0;
  const over = (event) => [...(event.dataTransfer?.types ?? [])].some((type) => type === "Files" || type === "application/x-row" || type === "text/uri-list");
  const show = (on) => at("drop").classList.toggle("on", on);
  addEventListener("dragenter", (event) => { if (over(event)) { depth += 1; show(true); } });
  addEventListener("dragleave", (event) => { if (over(event) && --depth <= 0) { depth = 0; show(false); } });
  addEventListener("dragover", (event) => { if (over(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!over(event)) return;
    event.preventDefault();
    depth = 0;
    show(false);
    const row = event.dataTransfer.getData("application/x-row");
    if (row) add([{ id: Number(row) }]);
    else if (event.dataTransfer.files.length) take(event.dataTransfer.files);
    else trouble("Only picture files can be dropped here; addresses are not fetched. Save the picture first, or copy and paste it.");
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
}

async function copy() {
  const button = at("copy");
  try {
    await navigator.clipboard.writeText(location.href);
    button.textContent = "Copied";
  } catch {
    button.textContent = "See the address bar";
  }
  setTimeout(() => { button.textContent = "Copy link"; }, 1600);
}

/** How high the head is, for what has to stay below it. */
const tall = new ResizeObserver(([{ target }]) => document.documentElement.style.setProperty("--head", `${target.offsetHeight}px`));

async function start() {
  tall.observe(document.querySelector(".top"));
  history.scrollRestoration = "manual";
  grid.wait();
  try {
    indexes = await server.indexes();
  } catch (error) {
    grid.show([]);
    return trouble(error.message);
  }
  if (!indexes.length) return trouble("The server has no index.");
  at("choosing").hidden = indexes.length < 2;
  at("index").replaceChildren(...indexes.map((one) => make("option", { value: one.name }, one.name)));
  listen();
  refine(matchMedia("(min-width: 60.01rem)").matches);
  if (matchMedia("(hover: hover)").matches) words.focus({ preventScroll: true });
  return restore();
}

start();
