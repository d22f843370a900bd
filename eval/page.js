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
      const descending = now ? now === "ascending" : numeric && !("lowerIsBetter" in head.dataset);
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
  const lower = data.names.map((name) => " " + name.toLowerCase());
  const count = data.names.length;
  const x = new Float64Array(count), y = new Float64Array(count);
  let width = 0, height = 0, side = 0, found = null, chosen = -1;

  // Places on this stage; pictures that would hide one another are moved apart, as little as needed.
  function arrange() {
    width = stage.clientWidth;
    height = stage.clientHeight;
    side = Math.max(9, Math.min(44, Math.sqrt((width * height * 0.5) / count)));
    for (let point = 0; point < count; point++) {
      x[point] = side + (data.x[point] / 9999) * (width - 2 * side);
      y[point] = side + (1 - data.y[point] / 9999) * (height - 2 * side);
    }
    const move = (point, right, down) => {
      x[point] = Math.max(side / 2, Math.min(width - side / 2, x[point] + right));
      y[point] = Math.max(side / 2, Math.min(height - side / 2, y[point] + down));
    };
    const apart = side * 1.12, columns = Math.ceil(width / apart) + 1;
    const cellOf = (point) => Math.floor(y[point] / apart) * columns + Math.floor(x[point] / apart);
    for (let round = 0; round < 60; round++) {
      const cells = new Map();
      for (let point = 0; point < count; point++) {
        const cell = cellOf(point);
        if (cells.has(cell)) cells.get(cell).push(point); else cells.set(cell, [point]);
      }
      let moved = false;
      for (let point = 0; point < count; point++) {
        const cell = cellOf(point);
        for (const step of [-columns - 1, -columns, 1 - columns, -1, 0, 1, columns - 1, columns, columns + 1])
          for (const other of cells.get(cell + step) ?? []) {
            if (other <= point) continue;
            const right = x[other] - x[point], down = y[other] - y[point];
            const away = Math.hypot(right, down);
            if (away >= apart) continue;
            moved = true;
            // On one spot there is no direction to take: each pair gets its own.
            const angle = away > 0.01 ? Math.atan2(down, right) : other * 2.4;
            const push = (apart - away) * 0.3;
            move(point, -push * Math.cos(angle), -push * Math.sin(angle));
            move(other, push * Math.cos(angle), push * Math.sin(angle));
          }
      }
      if (!moved) break;
    }
  }

  const stamp = (context, point, left, top, size) => context.drawImage(
    sheet, (point % data.columns) * data.cell, Math.floor(point / data.columns) * data.cell,
    data.cell, data.cell, left, top, size, size);

  function put(context, point, size, ring) {
    const left = x[point] - size / 2, top = y[point] - size / 2, edge = size * (ring ? 0.14 : 0.02);
    context.beginPath();
    context.roundRect(left - edge, top - edge, size + 2 * edge, size + 2 * edge, size * 0.2);
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
    if (width !== stage.clientWidth || height !== stage.clientHeight) arrange();
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.imageSmoothingQuality = "high";
    for (let point = 0; point < count; point++) {
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
    for (let point = 0; point < count; point++) {
      if (found && !found.has(point)) continue;
      const away = (x[point] - event.clientX + box.left) ** 2 + (y[point] - event.clientY + box.top) ** 2;
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
      const aside = x[point] + side + look.offsetWidth < width ? side : -side - look.offsetWidth;
      const left = Math.max(0, Math.min(width - look.offsetWidth, x[point] + aside));
      const top = Math.max(0, Math.min(height - look.offsetHeight, y[point] - look.offsetHeight / 2));
      look.style.transform = `translate(${left}px, ${top}px)`;
    }
    draw();
  }

  canvas.addEventListener("pointermove", (event) => choose(nearest(event)));
  canvas.addEventListener("pointerdown", (event) => choose(nearest(event)));
  canvas.addEventListener("pointerleave", () => choose(-1));
  finder.addEventListener("input", () => {
    const words = finder.value.trim().toLowerCase();
    found = words ? new Set(lower.flatMap((name, point) => (name.includes(" " + words) ? [point] : []))) : null;
    figure.querySelector("output").textContent = found ? `${found.size} of ${count}` : "";
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
