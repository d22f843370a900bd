"use strict";
// Two conveniences; without them the page still says everything but the map.

// Tables: a click on a column's head sorts by it, the best first; another click turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const numeric = [...table.tBodies[0].rows].every((row) => !isNaN(parseFloat(key(row))));
      const now = head.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : numeric;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const order = (a, b) => numeric ? parseFloat(key(a)) - parseFloat(key(b)) : key(a).localeCompare(key(b));
      const rows = [...table.tBodies[0].rows].sort((a, b) => (descending ? -1 : 1) * order(a, b));
      table.tBodies[0].append(...rows);
    });
  });
}

// Map: every picture from one sheet onto one canvas; the pointer shows the nearest one larger.
for (const figure of document.querySelectorAll("figure.map")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const sheet = figure.querySelector("img");
  const stage = figure.querySelector(".stage");
  const canvas = stage.querySelector("canvas");
  const look = figure.querySelector(".look");
  const closer = look.querySelector("canvas");
  const finder = figure.querySelector("input");
  const lower = data.names.map((name) => name.toLowerCase());
  let width = 0, height = 0, side = 0, found = null, chosen = -1;

  const x = (point) => side + (data.x[point] / 9999) * (width - 2 * side);
  const y = (point) => side + (1 - data.y[point] / 9999) * (height - 2 * side);
  const stamp = (context, point, left, top, size) => context.drawImage(
    sheet, (point % data.columns) * data.cell, Math.floor(point / data.columns) * data.cell,
    data.cell, data.cell, left, top, size, size);

  function put(context, point, size, ring) {
    const left = x(point) - size / 2, top = y(point) - size / 2, edge = size * 0.14;
    context.beginPath();
    context.roundRect(left - edge, top - edge, size + 2 * edge, size + 2 * edge, size * 0.25);
    if (matchMedia("screen and (prefers-color-scheme: dark)").matches || ring) {
      context.fillStyle = getComputedStyle(stage).getPropertyValue("--tile");
      context.fill();
    }
    if (ring) {
      context.strokeStyle = getComputedStyle(stage).getPropertyValue("--accent");
      context.lineWidth = 2;
      context.stroke();
    }
    stamp(context, point, left, top, size);
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    width = stage.clientWidth;
    height = stage.clientHeight;
    side = Math.max(11, Math.min(44, Math.sqrt((width * height * 0.42) / data.x.length)));
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingQuality = "high";
    for (let point = 0; point < data.x.length; point++) {
      context.globalAlpha = !found || found.has(point) ? 1 : 0.08;
      put(context, point, side, false);
    }
    context.globalAlpha = 1;
    if (found) found.forEach((point) => put(context, point, side * 1.25, false));
    if (chosen >= 0) put(context, chosen, side * 1.35, true);
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect();
    let best = -1, least = (side * 1.2) ** 2;
    for (let point = 0; point < data.x.length; point++) {
      if (found && !found.has(point)) continue;
      const away = (x(point) - event.clientX + box.left) ** 2 + (y(point) - event.clientY + box.top) ** 2;
      if (away < least) { least = away; best = point; }
    }
    return best;
  }

  function choose(point) {
    if (point === chosen) return;
    chosen = point;
    look.hidden = point < 0;
    if (point >= 0) {
      closer.width = closer.height = 232;
      const context = closer.getContext("2d");
      context.imageSmoothingQuality = "high";
      stamp(context, point, 0, 0, 232);
      look.querySelector("p").textContent = data.names[point];
      const aside = x(point) + side + look.offsetWidth < width ? side : -side - look.offsetWidth;
      const left = Math.max(0, Math.min(width - look.offsetWidth, x(point) + aside));
      const top = Math.max(0, Math.min(height - look.offsetHeight, y(point) - look.offsetHeight / 2));
      look.style.transform = `translate(${left}px, ${top}px)`;
    }
    draw();
  }

  canvas.addEventListener("pointermove", (event) => choose(nearest(event)));
  canvas.addEventListener("pointerdown", (event) => choose(nearest(event)));
  canvas.addEventListener("pointerleave", () => choose(-1));
  finder.addEventListener("input", () => {
    const words = finder.value.trim().toLowerCase();
    found = words ? new Set(lower.flatMap((name, point) => (name.includes(words) ? [point] : []))) : null;
    figure.querySelector("output").textContent = found ? `${found.size} of ${data.x.length}` : "";
    chosen = -1;
    look.hidden = true;
    draw();
  });
  function start() {
    draw();
    new ResizeObserver(draw).observe(stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }
  if (sheet.complete) start();
  else sheet.addEventListener("load", start);
}
