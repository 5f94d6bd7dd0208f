/* What happens on keys, pointers and choices; and the start. */

const remake = () => {
  make();
  showHead();
};

const acts = {
  back() {
    state.head = null;
    open = null;
    $("one").hidden = true;
    $("overview").hidden = false;
    showOverview();
    const last = $("heads").querySelector("[tabindex='0']");
    last.focus();
  },
  step(by) {
    const at = order.findIndex(([m, h]) => m === state.head[0] && h === state.head[1]);
    const [m, h] = order[(at + by + order.length) % order.length];
    return openHead(m, h);
  },
  view(name) {
    state.view = name;
    showControls();
    reveal();
    showCell();
    drawNow();
  },
  fit() {
    open.view = null;
    draw();
  },
  strongest(n = 0) {
    if (!open.strongest.length) return;
    open.step = n % open.strongest.length;
    moveTo(...open.strongest[open.step]);
  },
  strongestKey() {
    const [found] = open.made.strongest(1, state.cursor.row);
    if (found) moveTo(...found);
  },
  scale(name) {
    state.scale = name;
    remake();
  },
  sinks(on) {
    state.sinks = on;
    remake();
  },
  share(value) {
    state.share = clamp(value, 0.05, 1);
    remake();
  },
  compare(value) {
    state.compare = value;
    return load({ keep: true });
  },
  png: () => pngFile().toBlob((blob) => save(blob, "png")),
  svg: () => save(new Blob([svgFile()], { type: "image/svg+xml" }), "svg"),
  theme(name) {
    state.theme = name;
    redraw();
  },
  help: () => $("help").showModal(),
};

function redraw() {
  paint();
  say();
  if (state.head && open) showHead();
  else if (!state.head) showOverview();
}

function onHeadKey(event) {
  const { row, key } = state.cursor;
  const far = event.shiftKey ? 10 : 1;
  const page = Math.max(1, Math.floor(state.view === "map" ? mapPlot(scene()).height / open.view.high : 20));
  const enabledScales = SCALES.filter((name) => !$("scale").querySelector(`[value=${name}]`).disabled);
  const moves = {
    ArrowUp: [row - far, key], ArrowDown: [row + far, key], ArrowLeft: [row, key - far], ArrowRight: [row, key + far],
    PageUp: [row - page, key], PageDown: [row + page, key], Home: [row, 0], End: [row, Infinity],
  };
  if (event.key in moves) {
    if (event.target !== $("canvas")) return false;
    moveTo(...moves[event.key]);
    return true;
  }
  const does = {
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": () => acts.fit(),
    s: () => acts.strongestKey(), m: () => acts.strongest(), n: () => acts.strongest(open.step + 1),
    1: () => acts.view("map"), 2: () => acts.view("links"), 3: () => acts.view("text"),
    "[": () => acts.step(-1), "]": () => acts.step(1),
    l: () => !$("scale").disabled && acts.scale(enabledScales[(enabledScales.indexOf(state.scale) + 1) % enabledScales.length]),
    h: () => acts.sinks(!state.sinks),
    "<": () => !$("share").disabled && acts.share(state.share - 0.05),
    ">": () => !$("share").disabled && acts.share(state.share + 0.05),
    "/": () => $("search").focus(), c: () => $("compare").focus(), p: () => acts.png(), g: () => acts.svg(),
    Escape: () => acts.back(),
  }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!does) return false;
  does();
  return true;
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const typing = event.target === $("search");
  if (typing) {
    if (event.key === "Enter") nextFound(event.shiftKey ? -1 : 1);
    else if (event.key === "Escape") $("canvas").focus();
    else return;
    event.preventDefault();
    return;
  }
  if (event.target.tagName === "SELECT" && event.key !== "Escape") return;
  if (event.target.type === "range" && event.key.startsWith("Arrow")) return;
  let done = true;
  if (event.key === "?") acts.help();
  else if (event.key.toLowerCase() === "t") acts.theme(isDark() ? "light" : "dark");
  else if (state.head && open) done = onHeadKey(event);
  else if (event.target.classList?.contains("head") && /^(Arrow|Home|End)/.test(event.key)) neighbour(event.target, event.key)?.focus();
  else done = false;
  if (done) event.preventDefault();
});

$("heads").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) openHead(...button.dataset.head.split(":").map(Number));
});
$("heads").addEventListener("focusin", (event) => {
  for (const each of $("heads").querySelectorAll("[tabindex='0']")) each.tabIndex = -1;
  event.target.tabIndex = 0;
});
$("views").addEventListener("click", (event) => event.target.dataset.view && acts.view(event.target.dataset.view));
$("views").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!by) return;
  const all = [...$("views").children];
  const next = all[(all.indexOf(event.target) + by + all.length) % all.length];
  acts.view(next.dataset.view);
  next.focus();
  event.preventDefault();
});
$("pairs").addEventListener("click", (event) => {
  const cell = event.target.closest("tr")?.querySelector("button").dataset.cell;
  if (cell) moveTo(...cell.split(":").map(Number));
});

const clicks = {
  back: acts.back, previous: () => acts.step(-1), next: () => acts.step(1), fit: acts.fit, png: acts.png, svg: acts.svg,
  "zoom-in": () => zoom(1.5), "zoom-out": () => zoom(1 / 1.5), strongest: () => acts.strongest(), "strongest-key": acts.strongestKey,
  "help-button": acts.help, "help-close": () => $("help").close(),
  more: () => {
    state.thumbnails += MOST_THUMBNAILS;
    showOverview();
  },
  language: () => {
    state.language = state.language === "en" ? "zh" : "en";
    redraw();
  },
};
for (const [id, act] of Object.entries(clicks)) $(id).addEventListener("click", () => act());
const choices = {
  theme: acts.theme, scale: acts.scale, compare: acts.compare,
  colours: (value) => {
    state.colours = value;
    redraw();
  },
  sort: (value) => {
    state.sort = value;
    showOverview();
  },
  "thumbnail-scale": (value) => {
    state.thumbnailScale = value;
    showOverview();
  },
};
for (const [id, act] of Object.entries(choices)) $(id).addEventListener("change", (event) => act(event.target.value));
$("sinks").addEventListener("change", (event) => acts.sinks(event.target.checked));
$("share").addEventListener("input", (event) => {
  $("share-value").textContent = `${event.target.value} %`;
});
$("share").addEventListener("change", (event) => acts.share(event.target.value / 100));
$("search").addEventListener("input", (event) => {
  state.search = event.target.value;
  find();
  draw();
});

const pointers = new Map();
const canvas = $("canvas");
const at = (event) => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

/** The row and key under a place on the canvas, as the view has it; null where there is none. */
function cellAt([x, y]) {
  const of = scene();
  const { rows, keys } = of.cells;
  const inside = (row, key) => (row >= 0 && row < rows && key >= 0 && key < keys ? { row, key } : null);
  if (state.view === "map") {
    const plot = mapPlot(of);
    if (x < plot.left || y < plot.top) return null;
    return inside(Math.floor(of.view.row + (y - plot.top) / of.view.high), Math.floor(of.view.key + (x - plot.left) / of.view.wide));
  }
  if (state.view === "links") {
    const plot = linksPlot(of);
    const n = Math.floor((y - plot.top + of.scroll) / LINE);
    return x < of.size[0] / 2 ? inside(n, state.cursor.key) : inside(state.cursor.row, n);
  }
  const plot = textPlot(of);
  const line = Math.floor((y - plot.top + of.scroll) / TEXT_LINE);
  const key = textPlaces(of).findIndex(([left, l, wide]) => l === line && x >= left && x <= left + wide);
  return inside(state.cursor.row, key);
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, at(event));
});
canvas.addEventListener("pointermove", (event) => {
  if (!open) return;
  const here = at(event);
  const before = pointers.get(event.pointerId);
  if (!before) {
    const cell = cellAt(here);
    if (cell && (cell.row !== state.cursor.row || cell.key !== state.cursor.key)) {
      state.cursor = cell;
      showCell();
      draw();
    }
    return;
  }
  pointers.set(event.pointerId, here);
  if (state.view !== "map") {
    scrollOn(before[1] - here[1]);
  } else if (pointers.size === 1) {
    open.view.key -= (here[0] - before[0]) / open.view.wide;
    open.view.row -= (here[1] - before[1]) / open.view.high;
    settle();
  } else {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]) || 1;
    zoom(apart(here) / apart(before), other);
  }
  draw();
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
canvas.addEventListener("wheel", (event) => {
  if (!open) return;
  event.preventDefault();
  if (state.view === "map") zoom(Math.exp(-clamp(event.deltaY, -200, 200) / 300), at(event));
  else scrollOn(event.deltaY);
  draw();
}, { passive: false });

new ResizeObserver(() => {
  if (!open) return;
  open.view = null;
  draw();
}).observe(canvas);
prefersDark.addEventListener("change", redraw);

/**
 * For tests and for the curious: `state`, the choices; `cells(map, head)`, a promise of the weights of a head, whose
 * `array()` is query by query; `scene()`, all that is drawn; `plot()`, where the map stands on the canvas; `png()` a
 * canvas and `svg()` a text of the file that the page would save; `draw()` draws at once; `ready`, a promise of the
 * first picture.
 */
window.regard = { described, state, cells: cellsOf, scene, plot: () => mapPlot(scene()), open: openHead, png: pngFile, svg: svgFile, draw: drawNow };

window.regard.ready = (async () => {
  paint();
  say();
  $("title").textContent = described.title;
  await readThumbnails();
  if (heads.length === 1) await openHead(0, 0);
  else showOverview();
  document.documentElement.dataset.ready = "";
})();
