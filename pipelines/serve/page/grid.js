// The hits as a grid that grows: tiles of one shape, so that nothing moves when a picture arrives.

import { grouped, icon, make } from "./elements.js";

/** A picture in its frame; where there is none, the caption stands in its place. */
export function framed(source, caption, { lazy = true } = {}) {
  const frame = make("span.frame");
  const wordsInstead = () => frame.replaceChildren(make("span.instead", { textContent: caption || "no picture", dir: "auto" }));
  if (!source) {
    wordsInstead();
    return frame;
  }
  const image = make("img", { alt: "", draggable: false, decoding: "async", loading: lazy ? "lazy" : "eager" });
  image.addEventListener("error", wordsInstead);
  image.addEventListener("load", () => {
    frame.classList.add(!onWhite(image) ? "photo" : Math.max(image.naturalWidth, image.naturalHeight) > 128 ? "cutout" : "icon");
    image.classList.add("there");
  });
  image.src = source;
  frame.append(image);
  return frame;
}

const glance = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

/** Whether a picture has a white ground, by its border: it is shown whole, others fill their frame. */
function onWhite(image) {
  const side = 16;
  glance.fillStyle = "#fff";
  glance.fillRect(0, 0, side, side);
  glance.drawImage(image, 0, 0, side, side);
  const { data } = glance.getImageData(0, 0, side, side);
  let border = 0, white = 0;
  for (let n = 0; n < side * side; n += 1) {
    const [x, y] = [n % side, Math.floor(n / side)];
    if (x % (side - 1) && y % (side - 1)) continue;
    border += 1;
    white += Math.min(data[4 * n], data[4 * n + 1], data[4 * n + 2]) > 235;
  }
  return white > border / 4;
}

/** Score as people read it. */
export const scored = (score) => (Number.isFinite(score) ? score.toFixed(3).replace("-", "−") : "");

export class Grid {
  /** @param {HTMLElement} list where the tiles go. @param {(place: number) => void} open on a click. */
  constructor(list, open) {
    this.list = list;
    this.open = open;
    this.hits = [];
    list.addEventListener("keydown", (event) => this.#steer(event));
    list.addEventListener("focusin", (event) => this.#rove(event.target.closest(".tile")));
    list.addEventListener("click", (event) => {
      const tile = event.target.closest(".tile");
      if (tile) this.open(this.tiles().indexOf(tile));
    });
    list.addEventListener("dragstart", (event) => {
      const tile = event.target.closest(".tile");
      if (tile) event.dataTransfer.setData("application/x-row", tile.dataset.id);
    });
  }

  tiles() {
    return [...this.list.querySelectorAll(".tile")];
  }

  /** These hits instead of the ones before. */
  show(hits) {
    this.hits = [...hits];
    this.list.classList.remove("waiting", "empty");
    this.list.replaceChildren(...hits.map((hit) => tile(hit)));
    this.#rove(this.tiles()[0]);
  }

  /** These hits below the others; gives those that were not there yet. */
  add(hits) {
    const before = new Set(this.hits.map((hit) => hit.id));
    const fresh = hits.filter((hit) => !before.has(hit.id));
    this.hits.push(...fresh);
    this.list.append(...fresh.map((hit) => tile(hit)));
    return fresh;
  }

  /** New hits are on their way: the old ones step back, or blank tiles stand in. */
  wait() {
    if (!this.hits.length) {
      const blank = () => make("li.blank", { "aria-hidden": "true" }, make("span.frame"), make("span.said"));
      this.list.replaceChildren(...Array.from({ length: 24 }, blank));
    }
    this.list.classList.add("waiting");
  }

  focus(place = 0) {
    const tiles = this.tiles();
    tiles[Math.min(tiles.length - 1, Math.max(0, place))]?.focus();
  }

  /** Tab reaches one tile; arrows the others. */
  #rove(tile) {
    if (!tile) return;
    this.list.querySelector('.tile[tabindex="0"]')?.setAttribute("tabindex", "-1");
    tile.setAttribute("tabindex", "0");
  }

  #steer(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const tiles = this.tiles();
    const here = tiles.indexOf(document.activeElement);
    if (here < 0) return;
    const top = (one) => one.parentElement.offsetTop; // an item is the frame of reference of its tile
    const next = tiles.findIndex((one) => top(one) > top(tiles[0]));
    const columns = next < 0 ? tiles.length : next;
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -here, End: tiles.length };
    const move = moves[event.key];
    if (move === undefined) return;
    event.preventDefault();
    if (event.key === "ArrowUp" && here < columns) document.getElementById("words").focus();
    else if (event.key !== "ArrowDown" || here + columns < tiles.length || here < tiles.length - 1) this.focus(here + move);
  }
}

function tile(hit) {
  const copies = hit.copies ? `, ${hit.copies} near-duplicates folded` : "";
  return make("li", {},
    make("button.tile", {
      type: "button", tabIndex: -1, draggable: true, title: hit.caption,
      "data-id": String(hit.id),
      "aria-label": `${hit.caption || hit.key}${scored(hit.score) && `, score ${scored(hit.score)}`}${copies}`,
    },
    framed(hit.picture && `${hit.picture}?side=256`, hit.caption),
    hit.copies ? make("span.copies", { title: "near-duplicates folded" }, `+${grouped(hit.copies)}`) : null,
    make("span.said", {},
      make("span.caption", { dir: "auto", textContent: hit.caption || hit.key }),
      scored(hit.score) ? make("span.score", { textContent: scored(hit.score) }) : null)));
}

/** The close-up of a hit: a large picture, all that is known, and where to go from here. */
export class Detail {
  /** `at(place)` gives the hit there or undefined; `facts(id)` its metadata; `like`, `add` search. */
  constructor(dialog, { at, facts, like, add, left }) {
    Object.assign(this, { dialog, at, facts, like, add, left, place: -1 });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => {
      this.asked?.abort();
      this.left(this.place);
    });
    dialog.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) {
        event.preventDefault();
        this.open(this.place + step);
      }
    });
  }

  async open(place) {
    const hit = this.at(place);
    if (!hit) return;
    this.place = place;
    this.asked?.abort();
    this.asked = new AbortController();
    const { signal } = this.asked;
    const facts = make("dl.facts");
    const step = ["back", "on"].find((name) => document.activeElement?.classList.contains(name));
    this.#draw(hit, facts);
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.querySelector(`.${step}:enabled, .solid`).focus(); // the one before went with its parents
    write(facts, { score: scored(hit.score), ...hit.fields, key: hit.key, shard: hit.shard, id: hit.id });
    try {
      const { fields, picture, ...own } = await this.facts(hit.id, signal);
      write(facts, { score: scored(hit.score), "near-duplicates": hit.copies || undefined, ...fields, ...own });
    } catch (error) {
      if (error.name !== "AbortError") facts.append(make("dd.refused", { textContent: error.message }));
    }
  }

  #draw(hit, facts) {
    const go = (step, name, label) =>
      make(`button.round.${name}`, { type: "button", "aria-label": label, disabled: !this.at(this.place + step), onclick: () => this.open(this.place + step) }, icon(name));
    const then = (act) => () => {
      this.dialog.close();
      act(hit);
    };
    this.dialog.replaceChildren(
      make("div.large", {}, framed(hit.picture && `${hit.picture}?side=1024`, hit.caption, { lazy: false }), go(-1, "back", "The one before"), go(1, "on", "The next one")),
      make("div.about", {},
        make(hit.caption?.length > 90 ? "h2.long" : "h2", { dir: "auto", textContent: hit.caption || hit.key }),
        make("div.acts", {},
          make("button.solid", { type: "button", onclick: then(this.like) }, "More like this"),
          make("button.hollow", { type: "button", onclick: then(this.add) }, "Add to query")),
        facts),
      make("button.round.shut", { type: "button", "aria-label": "Close", onclick: () => this.dialog.close() }, icon("cross")),
    );
  }
}

/** What is known of a row, without what is empty or said already. */
function write(list, known) {
  const shown = Object.entries(known).filter(([name, value]) =>
    name !== "caption" && value !== null && value !== undefined && value !== "" && !(Array.isArray(value) && !value.length));
  list.replaceChildren(...shown.flatMap(([name, value]) => [
    make("dt", { textContent: name.replaceAll("_", " ") }),
    make("dd", { dir: "auto", textContent: told(value) }),
  ]));
}

function told(value) {
  if (Array.isArray(value)) return value.map(told).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
