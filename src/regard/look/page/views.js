/* The three views of a head, drawn from a scene on a surface. A scene is plain data; see `scene` in page.js. */

const LETTER = 11; // px
const LINE = 16; // of a list of tokens
const FOOT = 62; // under each view: colours, what they mean, notes
const GAP = 8;

/** Where the map of a scene stands: the plot, and the room for labels beside and above it. */
function mapPlot({ size, queries, keys, memory }) {
  memory.labels ??= [longest(queries), longest(keys)];
  const left = Math.ceil(Math.min(0.3 * size[0], Math.max(34, memory.labels[0]) + GAP));
  const top = Math.ceil(Math.min(0.3 * size[1], Math.max(22, memory.labels[1]) + GAP));
  return { left, top, width: Math.max(1, Math.floor(size[0] - left - 1)), height: Math.max(1, Math.floor(size[1] - top - FOOT)) };
}

/** How wide the widest label is; of very many, of some of them. */
function longest(labels) {
  const every = Math.ceil(labels.length / 2000);
  return labels.reduce((most, text, n) => (n % every ? most : Math.max(most, width(text.slice(0, 60), LETTER))), 0);
}

/** The pixels of a part of a map, each the largest of its cells; returns the canvas and the level it shows. */
function raster(canvas, scene, plot, ratio) {
  const { view, made, table, palette } = scene;
  const [across, down] = [Math.round(plot.width * ratio), Math.round(plot.height * ratio)];
  if (canvas.width !== across || canvas.height !== down || !canvas.image) {
    canvas.width = across;
    canvas.height = down;
    canvas.image = canvas.getContext("2d").createImageData(across, down);
  }
  const out = new Uint32Array(canvas.image.data.buffer);
  const [wide, high] = [1 / (view.wide * ratio), 1 / (view.high * ratio)]; // cells a pixel
  const level = made.pyramid.level(high - 1e-9, wide - 1e-9);
  const columns = new Int32Array(across);
  for (let x = 0; x < across; x++) {
    const key = Math.floor(view.key + (x + 0.5) * wide);
    columns[x] = key < 0 || key >= scene.cells.keys ? -1 : Math.floor(key / level.wide);
  }
  const paper = pixel(rgb(palette.paper.slice(1)));
  const hatch = pixel(rgb(palette.hatch.slice(1)));
  const stripe = Math.round(6 * ratio);
  const thick = Math.max(1, Math.round(ratio));
  for (let y = 0, n = 0; y < down; y++) {
    const row = Math.floor(view.row + (y + 0.5) * high);
    if (row < 0 || row >= scene.cells.rows) {
      out.fill(paper, n, (n += across));
      continue;
    }
    const start = Math.floor(row / level.high) * level.keys;
    for (let x = 0; x < across; x++, n++) {
      const column = columns[x];
      if (column < 0) {
        out[n] = paper;
        continue;
      }
      const code = level.codes[start + column];
      out[n] = code === MASKED && (x + y) % stripe < thick ? hatch : table[code];
    }
  }
  canvas.getContext("2d").putImageData(canvas.image, 0, 0);
  return level;
}

const rasterCanvas = document.createElement("canvas");

function drawMap(surface, scene) {
  const { palette, view, cells, made, cursor } = scene;
  const plot = mapPlot(scene);
  const level = raster(rasterCanvas, scene, plot, surface.ratio);
  surface.image(rasterCanvas, plot.left, plot.top, plot.width, plot.height);
  const x = (key) => plot.left + (key - view.key) * view.wide;
  const y = (row) => plot.top + (row - view.row) * view.high;
  const right = Math.min(plot.left + plot.width, x(cells.keys));
  const bottom = Math.min(plot.top + plot.height, y(cells.rows));
  const [l, t] = [Math.max(plot.left, x(0)), Math.max(plot.top, y(0))];

  surface.clip(plot.left, plot.top, plot.width, plot.height, () => {
    if (Math.min(view.wide, view.high) >= 36) writeWeights(surface, scene, plot, x, y);
    surface.rect(l, y(cursor.row), right - l, view.high, null, { stroke: palette.cross, alpha: 0.55 });
    surface.rect(x(cursor.key), t, view.wide, bottom - t, null, { stroke: palette.cross, alpha: 0.55 });
    const [w, h] = [Math.max(view.wide, 4), Math.max(view.high, 4)];
    const [cx, cy] = [x(cursor.key + 0.5) - w / 2, y(cursor.row + 0.5) - h / 2];
    surface.rect(cx - 1, cy - 1, w + 2, h + 2, null, { stroke: "#000000", line: 2 });
    surface.rect(cx - 1, cy - 1, w + 2, h + 2, null, { stroke: "#ffffff", line: 1 });
  });
  surface.rect(l - 0.5, t - 0.5, right - l + 1, bottom - t + 1, null, { stroke: palette.line });

  axis(scene.queries, scene.foundRows, cursor.row, view.row, view.high, plot.height, (text, row, style) => {
    surface.text(fit(text, LETTER, plot.left - GAP), plot.left - 5, y(row + 0.5), { align: "right", ...style });
  }, palette);
  axis(scene.keys, scene.foundKeys, cursor.key, view.key, view.wide, plot.width, (text, key, style) => {
    surface.text(fit(text, LETTER, plot.top - GAP), x(key + 0.5), plot.top - 5, { turned: true, ...style });
  }, palette);
  for (const key of made.sinks) {
    const at = x(key + 0.5);
    if (at >= plot.left && at <= plot.left + plot.width) surface.text("▾", at, bottom + 4, { align: "center", size: 10, fill: palette.accent });
  }
  const pooled = level.high * level.wide > 1 ? scene.words.pixels(level.high, level.wide) : "";
  foot(surface, scene, [pooled, ...scene.notes]);
}

/** Labels of an axis: as many as there is room for, those found, and the cursor's, which no other overlaps. */
function axis(labels, found, at, from, each, room, draw, palette) {
  const closest = Math.max(1, Math.ceil((LETTER + 2) / each));
  const every = closest > 1 && labels[1] === "1" ? roundStep(40 / each) : closest; // numbers in round steps
  const [first, last] = [Math.max(0, Math.ceil(from - 0.5)), Math.min(labels.length - 1, Math.floor(from + room / each - 0.5))];
  const near = (n, m) => Math.abs(n - m) * each < LETTER + 2;
  let drawn = -Infinity;
  const marked = [];
  for (const n of found) {
    if (n < first || n > last || n === at || near(n, at) || near(n, drawn)) continue;
    draw(labels[n], n, { size: LETTER, fill: palette.accent, weight: 600 });
    marked.push((drawn = n));
  }
  for (let n = Math.ceil(first / every) * every; n <= last; n += every) {
    if (n !== at && !near(n, at) && !marked.some((m) => near(n, m))) draw(labels[n], n, { size: LETTER, fill: palette.muted });
  }
  if (at >= first && at <= last) draw(labels[at], at, { size: LETTER, fill: palette.ink, weight: 700 });
}

/** The least of 1, 2, 5, 10, 20 … that is as large as this. */
function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((n) => n * power >= least);
}

function writeWeights(surface, { view, cells, made, table, against }, plot, x, y) {
  const size = Math.min(13, view.wide / 3.4);
  for (let row = Math.max(0, Math.floor(view.row)); row < cells.rows && y(row) < plot.top + plot.height; row++) {
    for (let key = Math.max(0, Math.floor(view.key)); key < cells.keys && x(key) < plot.left + plot.width; key++) {
      const shownCode = made.codes[row * cells.keys + key];
      if (shownCode < ZERO) continue;
      const p = cells.weight(row, key) - (against ? against.weight(row, key) : 0);
      const text = Number.isNaN(p) ? "NaN" : Math.abs(p) >= 0.005 || p === 0 ? p.toFixed(2).replace("-", "−") : p > 0 ? "<.01" : ">−.01";
      surface.text(text, x(key + 0.5), y(row + 0.5), { size, align: "center", fill: bright(table[shownCode]) ? "#000000" : "#ffffff" });
    }
  }
}

/** Whether black is read better than white on a pixel. */
function bright(colour) {
  const linear = [0, 8, 16].map((shift) => (((colour >> shift) & 255) / 255) ** 2.2);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18;
}

/** The colour bar, what other colours mean, and notes. */
function foot(surface, scene, notes) {
  const { size, palette, made, colours, words } = scene;
  const top = size[1] - FOOT + 14;
  const bar = Math.min(220, 0.4 * size[0]);
  const canvas = document.createElement("canvas");
  canvas.width = 256;
  canvas.height = 1;
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  new Uint32Array(image.data.buffer).set(colours.map(pixel));
  context.putImageData(image, 0, 0);
  surface.image(canvas, 1, top, bar, 9);
  surface.rect(0.5, top - 0.5, bar + 1, 10, null, { stroke: palette.line });
  for (const [t, text] of made.ticks) {
    const at = 1 + bar * (made.diverging ? (t + 1) / 2 : t);
    const align = at < 12 ? "left" : at > bar - 12 ? "right" : "center";
    surface.text(text, at, top + 17, { size: 10, fill: palette.muted, align });
  }
  let at = bar + 18;
  for (const [name, colour] of scene.legend) {
    surface.rect(at + 0.5, top - 0.5, 10, 10, colour, { stroke: palette.line });
    if (name === "masked") surface.line(at + 1, top + 9, at + 10, top, palette.hatch, { line: 1.5 });
    const text = words[name];
    surface.text(text, at + 15, top + 5, { size: 11, fill: palette.muted });
    at += width(text, 11) + 30;
  }
  const said = notes.filter(Boolean).join(" · ");
  if (said) surface.text(fit(said, 11, size[0] - 2), 1, top + 36, { size: 11, fill: palette.muted });
}

// --- Links.

const MOST_LINKS = 400;

function linkAlpha(t) {
  return 0.06 + 0.74 * t;
}

function linksPlot({ size }) {
  const column = Math.floor(Math.min(0.32 * size[0], 240));
  return { top: 26, height: size[1] - FOOT - 30, left: column, right: size[0] - column };
}

function drawLinks(surface, scene) {
  const { palette, cells, made, cursor, table, words } = scene;
  const plot = linksPlot(scene);
  const y = (n) => plot.top + (n + 0.5) * LINE - scene.scroll;
  const inSight = (n) => y(n) > plot.top - LINE / 2 && y(n) < plot.top + plot.height + LINE / 2;
  const first = Math.max(0, Math.floor(scene.scroll / LINE) - 1);
  const last = Math.ceil((scene.scroll + plot.height) / LINE);
  const links = [];
  for (let row = 0; row < cells.rows; row++) {
    const whole = row >= first && row <= last; // of other rows, only what ends at a key in sight
    if (!whole && cells.rows > 2000) continue;
    const start = row * cells.keys;
    const [from, to] = whole ? [0, cells.keys] : [first, Math.min(cells.keys, last + 1)];
    for (let key = from; key < to; key++) {
      const code = made.codes[start + key];
      if (code > ZERO && code < NAN) links.push(((code * cells.rows + row) * cells.keys) + key);
    }
  }
  const count = links.length;
  const drawn = strongestNumbers(links, MOST_LINKS).map((n) => {
    const key = n % cells.keys;
    const row = Math.floor(n / cells.keys) % cells.rows;
    return [row, key, made.codes[row * cells.keys + key]];
  });
  const own = made.strongest(64, cursor.row).map(([row, key]) => [row, key, made.codes[row * cells.keys + key]]);
  surface.text(words.queries, plot.left - 8, 10, { size: 11, align: "right", fill: palette.muted, weight: 600 });
  surface.text(words.keysAxis, plot.right + 8, 10, { size: 11, fill: palette.muted, weight: 600 });
  surface.clip(0, plot.top - 2, scene.size[0], plot.height + 4, () => {
    const link = (row, key, code, colour, strong) => {
      const t = Math.abs(made.places[code]);
      surface.line(plot.left, y(row), plot.right, y(key), colour, { line: strong ? 1 + 3 * t : 1 + 2 * t, alpha: strong ? 0.25 + 0.75 * t : linkAlpha(t) });
    };
    for (const [row, key, code] of drawn.reverse()) {
      if (row === cursor.row) continue;
      link(row, key, code, made.diverging ? css(table[code]) : palette.muted, false);
    }
    for (const [row, key, code] of own.reverse()) link(row, key, code, made.diverging ? css(table[code]) : palette.accent, true);
    const column = (labels, found, at, x, align, room) => {
      for (let n = first; n <= Math.min(labels.length - 1, last); n++) {
        if (!inSight(n)) continue;
        if (n === at) surface.rect(align === "right" ? 0 : plot.right + 2, y(n) - LINE / 2, room + 6, LINE, palette.accent, { alpha: 0.16 });
        const marked = found.includes(n);
        surface.text(fit(labels[n], 12, room), x, y(n), { size: 12, align, fill: marked ? palette.accent : palette.ink, weight: n === at || marked ? 700 : 400 });
      }
    };
    column(scene.queries, scene.foundRows, cursor.row, plot.left - 8, "right", plot.left - 12);
    column(scene.keys, scene.foundKeys, cursor.key, plot.right + 8, "left", scene.size[0] - plot.right - 12);
  });
  const [paper, grey] = [palette.paper, palette.muted].map((hex) => rgb(hex.slice(1)));
  const faded = Array.from({ length: 256 }, (_, n) => paper.map((c, i) => Math.round(c + linkAlpha(n / 255) * (grey[i] - c))));
  foot(surface, made.diverging ? scene : { ...scene, colours: faded }, [words.linksNote(drawn.length, count), ...scene.notes]);
}

/** The `count` largest numbers, largest first. */
function strongestNumbers(numbers, count) {
  return [...Float64Array.from(numbers).sort().slice(-count).reverse()];
}

function css(colour) {
  return `#${[0, 8, 16].map((shift) => ((colour >>> shift) & 255).toString(16).padStart(2, "0")).join("")}`;
}

// --- Text.

const TEXT_LINE = 26;

/** Where each token stands, as [x, line, width]; kept while tokens and width stay. */
function textPlaces(scene) {
  const known = scene.memory;
  if (known.keys === scene.keys && known.width === scene.size[0]) return known.places;
  let x = 0;
  let line = 0;
  const places = scene.keys.map((text) => {
    const wide = Math.min(width(fit(text, 14, scene.size[0] - 20), 14) + 10, scene.size[0]);
    if (x && x + wide > scene.size[0]) {
      x = 0;
      line++;
    }
    const place = [x, line, wide];
    x += wide + 2;
    return place;
  });
  Object.assign(known, { keys: scene.keys, width: scene.size[0], places });
  return places;
}

function textPlot({ size }) {
  return { top: 34, height: size[1] - FOOT - 36 };
}

function drawText(surface, scene) {
  const { palette, cells, made, cursor, table, words } = scene;
  const plot = textPlot(scene);
  surface.text(fit(words.textNote(placed(cursor.row, scene.queries[cursor.row])), 13, scene.size[0]), 0, 12, { size: 13, fill: palette.ink, weight: 600 });
  surface.clip(0, plot.top - 2, scene.size[0], plot.height + 4, () => {
    textPlaces(scene).forEach(([x, line, wide], key) => {
      const y = plot.top + line * TEXT_LINE - scene.scroll;
      if (y < plot.top - TEXT_LINE || y > plot.top + plot.height) return;
      const code = made.codes[cursor.row * cells.keys + key];
      const colour = table[code];
      surface.rect(x, y, wide, TEXT_LINE - 3, css(colour));
      if (code === MASKED) for (let n = 4; n < wide; n += 7) surface.line(x + n - 4, y + TEXT_LINE - 3, x + n + 4 > x + wide ? x + wide : x + n + 4, y, palette.hatch);
      const faint = code === MASKED || code === ABSENT;
      surface.text(fit(scene.keys[key], 14, wide), x + 5, y + TEXT_LINE / 2 - 1.5, { size: 14, fill: faint ? palette.muted : bright(colour) ? "#000000" : "#ffffff" });
      if (scene.foundKeys.includes(key)) surface.rect(x + 1, y + 1, wide - 2, TEXT_LINE - 5, null, { stroke: palette.accent, line: 2 });
      if (key === cursor.key) surface.rect(x + 1, y + 1, wide - 2, TEXT_LINE - 5, null, { stroke: palette.ink, line: 2 });
    });
  });
  foot(surface, scene, scene.notes);
}
