// Making elements without markup in strings: nothing that the server says is ever read as HTML.

/** An element with properties (`on...` are listeners, names with a dash are attributes) and children. */
export function make(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "for") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const SHAPES = {
  cross: "m6 6 12 12M18 6 6 18",
  back: "M15 5 8 12l7 7",
  on: "m9 5 7 7-7 7",
};

/** A small line drawing. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", SHAPES[name]);
  drawing.append(path);
  return drawing;
}

/** 12,345 */
export const grouped = (count) => Number(count).toLocaleString("en");

/** Call `act` when nothing called for `rest` milliseconds; `.now()` does not wait, `.drop()` forgets. */
export function settled(act, rest) {
  let timer = 0;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(act, rest);
  };
  later.drop = () => clearTimeout(timer);
  later.now = () => {
    clearTimeout(timer);
    act();
  };
  return later;
}
