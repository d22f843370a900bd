// Conditions on the metadata, made from the columns that the index says it has.

import { grouped, icon, make } from "./elements.js";

/** Columns that name a row and do not describe it. */
const NAMES = new Set(["id", "key", "shard", "caption"]);
const SHOWN = 8;
const OPEN = 3;

export class Filters {
  /** @param {HTMLElement} place @param {(patch: object) => void} change @param {() => void} close */
  constructor(place, change, close) {
    this.place = place;
    this.change = change;
    this.close = close;
  }

  /** Build the controls of an index anew, set as a search has them. */
  show(index, search) {
    const fields = index.fields.filter((field) => !NAMES.has(field.name));
    const told = fields.filter((field) => field.values.length || field.kind === "number");
    told.sort((one, other) => (one.values.length || SHOWN) - (other.values.length || SHOWN)); // the short lists first
    const rest = fields.filter((field) => !told.includes(field));
    const shown = [...told, ...rest].map((field) => this.#field(field, search.fields[field.name])).filter(Boolean);
    shown.slice(0, Math.min(OPEN, told.length)).forEach((part) => { part.open = true; });
    this.place.replaceChildren(
      make("div.sheet-head", {}, make("h2", {}, "Filters"),
        make("button.link.reset", { type: "button", onclick: () => this.change({ fields: {}, where: "", least: 0, collapse: 0, diversity: 0 }, true) }, "Reset"),
        make("button.round.shut", { type: "button", "aria-label": "Close the filters", onclick: this.close }, icon("cross"))),
      ...shown,
      this.#order(search),
      this.#sql(index, search),
    );
    this.#count(search);
  }

  #field(field, condition) {
    const ranged = field.kind === "number" && field.low !== null && field.values.length > SHOWN;
    const inside = field.values.length && !ranged ? this.#choices(field, condition)
      : field.kind === "number" ? this.#range(field, condition)
      : field.kind === "text" ? this.#contains(field, condition) : null;
    return inside && make("details.field", { open: condition !== undefined, "data-field": field.name },
      make("summary", {}, make("span", { textContent: field.name.replaceAll("_", " ") })), inside);
  }

  /** Take a condition over, or away where it is undefined. */
  #set(name, condition) {
    this.change((search) => {
      const fields = { ...search.fields };
      if (condition === undefined) delete fields[name];
      else fields[name] = condition;
      this.#count({ ...search, fields });
      return { fields };
    });
  }

  #choices(field, condition) {
    const chosen = new Set(Array.isArray(condition) ? condition.map(String) : []);
    const boxes = field.values.map(([value]) => make("input", { type: "checkbox", checked: chosen.has(String(value)) }));
    const taken = () => {
      const values = field.values.filter((_, n) => boxes[n].checked).map(([value]) => value);
      this.#set(field.name, values.length ? values : undefined);
    };
    const rows = field.values.map(([value, count], n) => make("label.choice", { hidden: n >= SHOWN && !boxes[n].checked },
      boxes[n], make("span.value", { dir: "auto", textContent: value === "" || value === null ? "none" : String(value) }),
      make("span.count", {}, grouped(count))));
    const rest = rows.filter((row) => row.hidden);
    const all = rest.length ? make("button.link.all", { type: "button", onclick: () => {
      for (const row of rest) row.hidden = false;
      all.remove();
      rest[0].querySelector("input").focus();
    } }, `${rest.length} more`) : null;
    return make("div.choices", { role: "group", "aria-label": field.name, onchange: taken }, ...rows, all);
  }

  #range(field, condition) {
    const box = (side, plain) => make("input", {
      type: "number", step: "any", placeholder: plain ?? "", value: condition?.[side] ?? "",
      "aria-label": `${field.name} ${side === "min" ? "from" : "to"}`,
    });
    const low = box("min", field.low), high = box("max", field.high);
    const taken = () => {
      const range = {};
      if (low.value !== "") range.min = low.valueAsNumber;
      if (high.value !== "") range.max = high.valueAsNumber;
      this.#set(field.name, Object.keys(range).length ? range : undefined);
    };
    return make("div.range", { onchange: taken }, low, make("span", {}, "to"), high);
  }

  #contains(field, condition) {
    const box = make("input", { type: "text", placeholder: "contains …", value: condition?.contains ?? "", "aria-label": `${field.name} contains`, spellcheck: false });
    box.addEventListener("change", () => this.#set(field.name, box.value.trim() ? { contains: box.value.trim() } : undefined));
    return box;
  }

  /** How the list is made, whatever the metadata says. */
  #order(search) {
    const slide = (name, title, said, { min = 0, max, step, off, from = (x) => x, to = (x) => x }) => {
      const word = make("output", { textContent: said(search[name]) });
      const bar = make("input", { type: "range", min, max, step, value: search[name] ? to(search[name]) : off, "aria-label": title });
      const value = () => (Number(bar.value) === off ? 0 : from(Number(bar.value)));
      bar.addEventListener("input", () => { word.textContent = said(value()); });
      bar.addEventListener("change", () => this.change((now) => {
        this.#count({ ...now, [name]: value() });
        return { [name]: value() };
      }));
      return make("label.slide", {}, make("span", {}, title), word, bar);
    };
    const hundredth = (x) => Math.round(x * 100) / 100;
    return make("details.field", { open: true, "data-field": "order" }, make("summary", {}, make("span", {}, "The list")), make("div.slides", {},
      slide("collapse", "Fold near-duplicates", (x) => (x ? `above ${x.toFixed(2)}` : "off"),
        { max: 30, step: 1, off: 0, from: (x) => hundredth(1 - x / 100), to: (x) => Math.round((1 - x) * 100) }),
      slide("diversity", "Variety", (x) => (x ? `${Math.round(x * 100)} %` : "off"), { max: 1, step: 0.05, off: 0, from: hundredth }),
      slide("least", "Score at least", (x) => (x ? x.toFixed(2) : "any"), { max: 0.95, step: 0.01, off: 0, from: hundredth })));
  }

  #sql(index, search) {
    const box = make("textarea", { rows: 2, value: search.where, spellcheck: false, placeholder: "year > 2010 AND vendor <> 'noto'", "aria-label": "A condition in SQL over the columns" });
    const take = () => this.change((now) => {
      this.#count({ ...now, where: box.value });
      return { where: box.value.trim() };
    });
    box.addEventListener("change", take);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        take();
      }
    });
    const first = index.fields.find((field) => field.kind === "number") ?? index.fields[0];
    if (first) box.placeholder = first.kind === "number" ? `${first.name} > ${first.low}` : `${first.name} LIKE '%…%'`;
    return make("details.field", { open: Boolean(search.where), "data-field": "where" }, make("summary", {}, make("span", {}, "SQL")), box,
      make("p.note", { textContent: `Columns: ${index.fields.map((field) => field.name).join(", ") || "none"}` }));
  }

  /** Mark the fields that hold something back. */
  #count(search) {
    const busy = new Set(Object.keys(search.fields));
    if (search.where) busy.add("where");
    if (search.least || search.collapse || search.diversity) busy.add("order");
    for (const part of this.place.querySelectorAll(".field")) part.classList.toggle("busy", busy.has(part.dataset.field));
  }
}
