/* The page: what is chosen, what happens on keys and pointers, and what of it the document shows. */

const described = JSON.parse(document.getElementById("described").textContent);
const maps = described.compared ? described.maps.slice(0, described.maps.length / 2) : described.maps;
const heads = maps.flatMap((map, m) => map.heads.map((_, h) => [m, h]));
const MOST_THUMBNAILS = 600;
const MOST_PAIRS = 20;
const MOST_CELLS_HELD = 2 ** 28;
const SCALES = ["unit", "own", "log", "uniform", "expected"];
const VIEWS = { map: drawMap, links: drawLinks, text: drawText };

const state = {
  language: described.language ?? ((navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en"),
  theme: "auto",
  colours: "viridis",
  sort: "layer",
  thumbnailScale: "own",
  thumbnails: MOST_THUMBNAILS,
  head: null, // [map, head], or null in the overview
  view: "map",
  scale: "own",
  sinks: false,
  share: 1,
  compare: "", // "other", or "map:head"
  search: "",
  match: -1,
  cursor: { row: 0, key: 0 },
};
let open = null; // what is made of the open head: cells, against, made, view, …
let words = WORDS[state.language];
let order = heads; // as the overview has it

const $ = (id) => document.getElementById(id);
const parsed = new Promise((done) => {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", done, { once: true });
  else done();
});

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// --- Weights, read when they are asked for.

const held = new Map();

/** The cells of a head of `described.maps`. */
async function cellsOf(m, h) {
  const name = `${m}:${h}`;
  if (!held.has(name)) {
    await parsed;
    const map = described.maps[m];
    const codes = await inflated($(`data-${m}`).textContent.split("\n")[h]);
    held.set(name, new Cells(map, map.heads[h], codes));
  }
  const cells = held.get(name);
  held.delete(name);
  held.set(name, cells); // the last used stand last
  let sum = 0;
  for (const [each, { codes }] of [...held].reverse()) {
    sum += codes.length;
    if (sum > MOST_CELLS_HELD && each !== name) held.delete(each);
  }
  return cells;
}

/** [map, head] that is compared with. */
function comparedHead() {
  const [m, h] = state.head;
  if (!state.compare) return null;
  return state.compare === "other" ? [m + maps.length, h] : state.compare.split(":").map(Number);
}

// --- Words, theme.

function say() {
  words = WORDS[state.language];
  document.documentElement.lang = state.language === "zh" ? "zh-CN" : "en";
  for (const each of document.querySelectorAll("[data-say]")) each.textContent = words[each.dataset.say];
  for (const each of document.querySelectorAll("[data-label]")) {
    each.ariaLabel = words[each.dataset.label];
    if (each.tagName === "BUTTON") each.title = words[each.dataset.label];
  }
  for (const each of document.querySelectorAll("[data-hint]")) each.title = words[each.dataset.hint];
  for (const each of document.querySelectorAll("[data-placeholder]")) each.placeholder = words[each.dataset.placeholder];
  $("language").textContent = words.languageName;
  $("help-keys").replaceChildren(...words.help.flatMap(([keys, what]) => [element("dt", {}, element("kbd", { textContent: keys })), element("dd", { textContent: what })]));
  const sizes = [...new Set(maps.map((map) => `${map.queries} × ${map.keys}`))];
  $("contents").textContent = words.summary(maps.length, heads.length, sizes.length > 2 ? sizes[0] + words.and : sizes.join(", "));
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return state.theme === "dark" || (state.theme === "auto" && prefersDark.matches);
}

function paint() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  $("theme").value = state.theme;
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "muted", "line", "paper", "accent", "masked", "hatch", "absent", "nan", "cross"];
  palette = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

let palette; // the theme's colours, as page.css has them

function colours(diverging = false) {
  if (diverging) return ramp(isDark() ? "differencesDark" : "differences");
  return ramp(state.colours === "greys" && isDark() ? "greysDark" : state.colours);
}

// --- The overview.

let thumbnailCodes = null;

async function readThumbnails() {
  const bytes = await inflated($("thumbnails").textContent);
  let start = 0;
  thumbnailCodes = described.maps.map((map) => {
    const size = map.thumbnail[0] * map.thumbnail[1];
    return map.heads.map(() => bytes.subarray(start, (start += size)));
  });
}

function headName(m, h) {
  return `${maps[m].name} · ${words.head} ${h}`;
}

function sorted() {
  if (state.sort === "layer") return heads;
  const value = ([m, h]) => maps[m].heads[h][state.sort] ?? -Infinity;
  return [...heads].sort((a, b) => value(b) - value(a));
}

function drawThumbnail(canvas, m, h, table) {
  const [rows, keys] = maps[m].thumbnail;
  canvas.width = keys;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(keys, rows);
  const out = new Uint32Array(image.data.buffer);
  thumbnailCodes[m][h].forEach((code, n) => (out[n] = table[code]));
  context.putImageData(image, 0, 0);
}

function thumbnailTable(m, h, colour) {
  const weights = weightsOfCodes(maps[m].heads[h].tolerance);
  let largest = ZERO;
  for (const code of thumbnailCodes[m][h]) if (code > largest && code < NAN) largest = code;
  const { places } = plain(weights, state.thumbnailScale, state.thumbnailScale === "own" ? weights[largest] : 1);
  return pixels({ places }, colour, palette);
}

function showOverview() {
  order = sorted();
  $("sort").value = state.sort;
  $("thumbnail-scale").value = state.thumbnailScale;
  $("sort").querySelector("[value=difference]").hidden = !described.compared;
  const colour = colours();
  const button = ([m, h]) => {
    const head = maps[m].heads[h];
    const canvas = element("canvas");
    drawThumbnail(canvas, m, h, thumbnailTable(m, h, colour));
    const value = state.sort === "layer" ? "" : written(head[state.sort]);
    const name = state.sort === "layer" ? String(h) : `${m}.${h}`;
    const made = element("button", { type: "button", className: "head", title: headName(m, h), tabIndex: -1 }, canvas,
      element("span", { textContent: name }), element("span", { className: "value", textContent: value || { exact: "", top: "≥", pooled: "▦" }[head.kind] }));
    made.ariaLabel = `${headName(m, h)}, ${words.entropy} ${written(head.normalized_entropy)}, ${words.sinkShare} ${written(head.sink_share)}, ${words.distance} ${written(head.distance)}`;
    made.dataset.head = `${m}:${h}`;
    return made;
  };
  const drawn = order.slice(0, state.thumbnails);
  const room = ($("heads").clientWidth - 190) / Math.max(...maps.map((map) => map.heads.length)) - 14;
  $("heads").style.setProperty("--side", `${Math.round(clamp(room, 56, 96))}px`);
  if (state.sort === "layer") {
    const layers = new Map();
    for (const [m, h] of drawn) layers.set(m, [...(layers.get(m) ?? []), button([m, h])]);
    $("heads").replaceChildren(...[...layers].map(([m, buttons]) => {
      const map = maps[m];
      const of = element("small", { textContent: `${words[map.kind === "self" ? "kindSelf" : "kindCross"]} · ${map.queries} × ${map.keys}` });
      const title = element("h2", { dir: "auto", textContent: label(map.name) });
      const row = element("section", { className: "layer" }, element("div", {}, title, of), element("div", { className: "row" }, ...buttons));
      row.ariaLabel = label(map.name);
      return row;
    }));
  } else {
    $("heads").replaceChildren(element("div", { className: "row" }, ...drawn.map(button)));
  }
  $("more").hidden = drawn.length === order.length;
  $("more").textContent = words.more(Math.min(MOST_THUMBNAILS, order.length - drawn.length));
  const last = state.lastHead && $("heads").querySelector(`[data-head="${state.lastHead.join(":")}"]`);
  (last || $("heads").querySelector("button")).tabIndex = 0;
}

/** The button next to this one in a direction, by where they stand. */
function neighbour(button, key) {
  const all = [...$("heads").querySelectorAll("button")];
  const n = all.indexOf(button);
  if (key === "ArrowLeft") return all[n - 1];
  if (key === "ArrowRight") return all[n + 1];
  if (key === "Home") return all[0];
  if (key === "End") return all.at(-1);
  const own = button.getBoundingClientRect();
  const placed = all.map((each) => [each, each.getBoundingClientRect()]);
  const beyond = placed.filter(([, r]) => (key === "ArrowDown" ? r.top > own.top + 1 : r.top < own.top - 1));
  const away = ([, r]) => Math.abs(r.top - own.top) * 1000 + Math.abs(r.left - own.left);
  return beyond.sort((a, b) => away(a) - away(b))[0]?.[0];
}

// --- One head.

async function openHead(m, h) {
  const first = state.head === null;
  state.head = state.lastHead = [m, h];
  if (state.compare && state.compare !== "other") state.compare = "";
  $("overview").hidden = true;
  $("one").hidden = false;
  if (first) scrollTo(0, 0);
  const same = open && open.cells.rows === Math.ceil(maps[m].queries / maps[m].heads[h].block[0]) && open.cells.keys === Math.ceil(maps[m].keys / maps[m].heads[h].block[1]);
  await load({ keep: !first && same });
  if (first) $("canvas").focus({ preventScroll: true });
}

let loading = 0;

/** Read what is chosen, and show it; `keep` what is in sight. */
async function load({ keep }) {
  const turn = ++loading;
  const [m, h] = state.head;
  showControls();
  const slow = setTimeout(() => {
    $("wait").hidden = false;
    $("wait").textContent = words.loading;
  }, 80);
  try {
    const cells = await cellsOf(m, h);
    const other = comparedHead();
    const against = other && (await cellsOf(...other));
    if (turn !== loading || !state.head) return;
    const numbered = (count, block, tokens) => Array.from({ length: count }, (_, n) => {
      const [from, to] = [n * block, (n + 1) * block - 1];
      return block > 1 ? `${from}–${to}` : tokens === null ? String(n) : label(described.tokens[tokens][n]);
    });
    const kept = keep && open;
    open = {
      cells,
      against,
      queries: numbered(cells.rows, cells.block[0], cells.map.queryTokens),
      keys: numbered(cells.keys, cells.block[1], cells.map.keyTokens),
      view: kept ? open.view : null,
      scroll: kept ? open.scroll : { links: 0, text: 0 },
      memory: {}, // of the drawing functions
      foundRows: [],
      foundKeys: [],
    };
    make();
    if (!kept) {
      const [row, key] = open.made.strongest(1)[0] ?? [0, 0];
      state.cursor = { row, key };
      reveal();
    }
    find();
    showHead();
  } finally {
    clearTimeout(slow);
    if (turn === loading) $("wait").hidden = true;
  }
}

/** What is shown of the cells, for the choices that were made. */
function make() {
  const { cells, against } = open;
  open.made = shown(cells, { scale: state.scale, share: state.share, sinks: state.sinks, against });
  open.counts = open.made.counts();
  open.strongest = open.made.strongest(200);
  open.step = 0;
}

function canvasSize() {
  const { clientWidth, clientHeight } = $("canvas");
  return [Math.max(200, clientWidth), Math.max(200, clientHeight)];
}

/** All that the drawing functions need. */
function scene(size = canvasSize()) {
  const { cells, made, against } = open;
  const colour = colours(made.diverging);
  const hidden = state.share < 1 || made.sinks.length > 0;
  const legend = [];
  if (open.counts[MASKED]) legend.push(["masked", palette.masked]);
  if (open.counts[ABSENT]) legend.push([hidden ? "absentHidden" : "absent", palette.absent]);
  if (open.counts[NAN]) legend.push(["nan", palette.nan]);
  const of = {
    size, cells, made, against, words, legend, palette,
    colours: colour,
    table: pixels(made, colour, palette),
    queries: open.queries,
    keys: open.keys,
    cursor: state.cursor,
    foundRows: open.foundRows,
    foundKeys: open.foundKeys,
    notes: notes(),
    scroll: open.scroll[state.view] ?? 0,
    memory: open.memory,
  };
  open.view ??= fitting(of);
  of.view = open.view;
  return of;
}

function notes() {
  const { cells, made, against } = open;
  const { totals } = cells.head;
  const sums = totals && totals.filter((x) => x !== null);
  return [
    against ? `${words.firstMinus}: ${state.compare === "other" ? words.otherRecording : headName(...comparedHead())}` : "",
    state.sinks ? (made.sinks.length ? words.sinksHidden(made.sinks.length) : words.noSinks) : "",
    totals && sums.length ? words.rowsSum(written(Math.min(...sums)), written(Math.max(...sums))) : "",
    cells.head.kind === "pooled" ? words.pooled(...cells.block) : "",
  ];
}

/** The view that holds the whole map; a long and narrow one is stretched up to eight times. */
function fitting(of) {
  const plot = mapPlot(of);
  const [wide, high] = [plot.width / of.cells.keys, plot.height / of.cells.rows].map((each) => Math.min(each, 64));
  return { row: 0, key: 0, wide: Math.min(wide, 8 * high), high: Math.min(high, 8 * wide), ...square(wide, high) };
}

function square(wide, high) {
  const least = Math.min(wide, high);
  return Math.max(wide, high) > 8 * least ? {} : { wide: least, high: least };
}

let frame = 0;

function draw() {
  if (!frame) frame = requestAnimationFrame(drawNow);
}

function drawNow() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!state.head || !open) return;
  const of = scene();
  const ratio = devicePixelRatio || 1;
  const surface = new CanvasSurface($("canvas"), ...of.size, ratio);
  surface.rect(0, 0, ...of.size, of.palette.paper);
  VIEWS[state.view](surface, of);
}

/** Keep the map in sight. */
function settle() {
  const of = scene();
  const plot = mapPlot(of);
  const whole = fitting(of);
  const { view } = open;
  const least = Math.min(1, whole.wide / view.wide);
  const most = Math.max(64 / Math.max(view.wide, view.high), least);
  const by = clamp(1, least, most);
  view.wide *= by;
  view.high *= by;
  view.key = clamp(view.key, 0, Math.max(0, of.cells.keys - plot.width / view.wide));
  view.row = clamp(view.row, 0, Math.max(0, of.cells.rows - plot.height / view.high));
}

/** Zoom about a place on the canvas, or the cursor. */
function zoom(by, at = null) {
  const of = scene();
  const plot = mapPlot(of);
  const { view } = open;
  const [x, y] = at
    ? [at[0] - plot.left, at[1] - plot.top]
    : [(state.cursor.key + 0.5 - view.key) * view.wide, (state.cursor.row + 0.5 - view.row) * view.high];
  const whole = fitting(of);
  const factor = clamp(by, whole.wide / view.wide, Math.max(whole.wide / view.wide, 64 / Math.max(view.wide, view.high)));
  view.key += (x / view.wide) * (1 - 1 / factor);
  view.row += (y / view.high) * (1 - 1 / factor);
  view.wide *= factor;
  view.high *= factor;
  if (at) settle();
  else reveal();
  draw();
}

/** Bring the cursor in sight. */
function reveal() {
  const of = scene();
  if (state.view === "map") {
    const plot = mapPlot(of);
    const { view } = open;
    const across = plot.width / view.wide;
    const down = plot.height / view.high;
    if (state.cursor.key < view.key || state.cursor.key + 1 > view.key + across) view.key = state.cursor.key + 0.5 - across / 2;
    if (state.cursor.row < view.row || state.cursor.row + 1 > view.row + down) view.row = state.cursor.row + 0.5 - down / 2;
    settle();
  } else if (state.view === "links") {
    const plot = linksPlot(of);
    const y = state.cursor.row * LINE - open.scroll.links;
    if (y < 0 || y + LINE > plot.height) open.scroll.links = state.cursor.row * LINE - plot.height / 2;
    scrollOn(0);
  } else {
    const y = textPlaces(of)[state.cursor.key][1] * TEXT_LINE - open.scroll.text;
    const plot = textPlot(of);
    if (y < 0 || y + TEXT_LINE > plot.height) open.scroll.text += y - plot.height / 2;
    scrollOn(0);
  }
}

function scrollOn(amount) {
  const of = scene();
  const [total, plot] = state.view === "links"
    ? [Math.max(of.queries.length, of.keys.length) * LINE, linksPlot(of)]
    : [(textPlaces(of).at(-1)[1] + 1) * TEXT_LINE, textPlot(of)];
  open.scroll[state.view] = clamp(open.scroll[state.view] + amount, 0, Math.max(0, total - plot.height));
}

function moveTo(row, key) {
  const { cells } = open;
  state.cursor = { row: clamp(row, 0, cells.rows - 1), key: clamp(key, 0, cells.keys - 1) };
  reveal();
  showCell();
  draw();
}

// --- What the document says of the open head.

function showControls() {
  const [m, h] = state.head;
  const map = maps[m];
  const head = map.heads[h];
  $("name").textContent = `${label(map.name)} · ${words.head} ${h}`;
  const kinds = { exact: () => words.exact(written(head.tolerance)), top: () => words.top(head.kept, written(head.tolerance)), pooled: () => words.pooled(...head.block) };
  $("kind").textContent = `${words[map.kind === "self" ? "kindSelf" : "kindCross"]} · ${map.queries} × ${map.keys} · ${kinds[head.kind]()}`;
  const pooled = head.kind === "pooled";
  for (const option of $("scale").options) {
    option.disabled = pooled && ["uniform", "expected"].includes(option.value);
    option.title = option.disabled ? words.unavailable : "";
  }
  if (pooled && ["uniform", "expected"].includes(state.scale)) state.scale = "own";
  $("scale").value = state.scale;
  $("scale").disabled = Boolean(state.compare);
  $("sinks").checked = state.sinks;
  $("share").value = String(Math.round(state.share * 100));
  $("share").disabled = pooled || Boolean(state.compare);
  $("share-value").textContent = `${Math.round(state.share * 100)} %`;
  for (const each of $("views").children) {
    const chosen = each.dataset.view === state.view;
    each.ariaChecked = String(chosen);
    each.tabIndex = chosen ? 0 : -1;
  }
  const options = [["", words.nothing]];
  const alike = (a, b) => {
    const [one, two] = [described.maps[a[0]], described.maps[b[0]]];
    return one.queries === two.queries && one.keys === two.keys && String(one.heads[a[1]].block) === String(two.heads[b[1]].block);
  };
  if (described.compared && alike(state.head, [m + maps.length, h])) options.push(["other", words.otherRecording]);
  for (const other of heads) {
    if ((other[0] === m) !== (other[1] === h) && alike(state.head, other)) options.push([other.join(":"), headName(...other)]);
  }
  $("compare").replaceChildren(...options.map(([value, text]) => element("option", { value, textContent: text })));
  $("compare").value = state.compare;
  if ($("compare").selectedIndex < 0) $("compare").value = state.compare = "";
}

function showHead() {
  showControls();
  showCell();
  showPairs();
  showStatistics();
  drawNow();
}

function define(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value, dir: "auto" })]));
}

function showCell() {
  const { cells, against } = open;
  const { row, key } = state.cursor;
  const code = cells.code(row, key);
  const special = { [MASKED]: words.masked, [ABSENT]: words.absent, [NAN]: "NaN" }[code];
  const p = cells.weight(row, key);
  const weight = special ?? written(p);
  const [query, token] = [open.queries[row], open.keys[key]];
  const facts = [[words.query, placed(row, query)], [words.key, placed(key, token)]];
  const pooled = cells.head.kind === "pooled";
  if (special === undefined && !pooled) {
    const visible = cells.visible(row);
    facts.push([words.rank, words.rankOf(cells.rank(row, key), visible)], [words.timesUniform, written(p * visible)]);
  }
  const total = cells.total(row);
  if (!pooled && total !== 1) facts.push([words.rowSums, written(total)]);
  let shownWeight = weight;
  if (against) {
    const other = against.weight(row, key);
    facts.push([words.thisOne, weight], [words.otherOne, { [MASKED]: words.masked, [ABSENT]: words.absent }[against.code(row, key)] ?? written(other)]);
    shownWeight = written(p - other);
  }
  $("cell-weight").textContent = shownWeight;
  define($("cell"), facts);
  const rank = special === undefined && !pooled ? `, ${words.rank} ${cells.rank(row, key)}` : "";
  const said = { [MASKED]: words.maskedSay, [ABSENT]: words.absentSay }[code] ?? shownWeight;
  $("live").textContent = `${words.query} ${placed(row, query)}, ${words.key} ${placed(key, token)}: ${said}${rank}`;
  $("canvas").ariaLabel = `${headName(...state.head)}, ${words[{ map: "viewMap", links: "viewLinks", text: "viewText" }[state.view]]}. ${$("live").textContent}`;
}

/** A place and its token, or the place alone. */
function placed(n, text) {
  return text === String(n) ? text : `${n}  ${text}`;
}

function showPairs() {
  const { cells, against } = open;
  $("pairs-weight").textContent = against ? words.firstMinus : words.weight;
  $("pairs").replaceChildren(...open.strongest.slice(0, MOST_PAIRS).map(([row, key]) => {
    const p = cells.weight(row, key) - (against ? against.weight(row, key) : 0);
    const go = element("button", { type: "button", dir: "auto", textContent: open.queries[row] });
    go.dataset.cell = `${row}:${key}`;
    const place = (n, text) => (text === String(n) ? [] : [element("small", { textContent: String(n) })]);
    return element("tr", {}, element("td", {}, go, ...place(row, open.queries[row])),
      element("td", {}, element("bdi", { textContent: open.keys[key] }), ...place(key, open.keys[key])), element("td", { textContent: written(p) }));
  }));
}

function showStatistics() {
  const { cells } = open;
  const { head, map } = cells;
  const percent = (x) => (x === null ? "NaN" : `${written(100 * x)} %`);
  const name = (key) => (map.keyTokens === null ? String(key) : `${label(described.tokens[map.keyTokens][key])} (${key})`);
  const facts = [
    [words.entropyLong, percent(head.normalized_entropy)],
    [words.entropyNats, written(head.entropy)],
    [words.largest, written(head.largest)],
    [words.sinksLong, percent(head.sink_share)],
    [words.sinkKeys, head.sinks.length ? head.sinks.slice(0, 4).map(([key]) => name(key)).join(", ") + (head.sinks.length > 4 ? " …" : "") : "–"],
    [words.distanceLong, written(head.distance)],
    [words.diagonal, percent(head.diagonal)],
    [words.previous, percent(head.previous)],
    [words.local, percent(head.local)],
    [words.coverage, percent(head.coverage)],
  ];
  if (head.difference !== undefined) facts.push([words.differenceLong, percent(head.difference)]);
  if (open.counts[NAN]) facts.push(["NaN", `${percent(open.counts[NAN] / cells.codes.length)} ${words.nanCells}`]);
  if (map.error !== null) facts.push([words.errorLong, written(map.error)]);
  define($("statistics"), facts);
}

// --- Finding tokens.

function find() {
  const wanted = state.search.toLowerCase();
  const places = (labels) => (wanted ? labels.flatMap((text, n) => (text.toLowerCase().includes(wanted) ? [n] : [])) : []);
  open.foundRows = places(open.queries);
  open.foundKeys = places(open.keys);
  state.match = -1;
  showFound();
}

function showFound() {
  const count = open.foundRows.length + open.foundKeys.length;
  $("found").textContent = state.search ? words.found(state.match + 1, count) : "";
}

/** To the next query or key that was found. */
function nextFound(step) {
  const count = open.foundRows.length + open.foundKeys.length;
  if (!count) return;
  state.match = (state.match + step + count) % count;
  const { row, key } = state.cursor;
  if (state.match < open.foundRows.length) moveTo(open.foundRows[state.match], key);
  else moveTo(row, open.foundKeys[state.match - open.foundRows.length]);
  showFound();
}

// --- Files.

const MARGIN = 16;
const TITLE = 52;

/** The view as it is, under its title: on a surface that is made by `surfaceOf`. */
function drawFile(surfaceOf) {
  const of = scene();
  const [across, down] = [of.size[0] + 2 * MARGIN, of.size[1] + TITLE + MARGIN];
  const surface = surfaceOf(across, down, [MARGIN, TITLE]);
  surface.rect(-MARGIN, -TITLE, across, down, of.palette.paper);
  surface.text(fit(`${described.title} — ${$("name").textContent}`, 14, of.size[0]), 0, 18 - TITLE, { size: 14, weight: 600, fill: of.palette.ink });
  surface.text(fit($("kind").textContent, 11, of.size[0]), 0, 36 - TITLE, { size: 11, fill: of.palette.muted });
  VIEWS[state.view](surface, of);
  return surface;
}

function pngFile() {
  const canvas = document.createElement("canvas");
  drawFile((width, height, origin) => new CanvasSurface(canvas, width, height, devicePixelRatio || 1, origin));
  return canvas;
}

function svgFile() {
  return String(drawFile((width, height, origin) => new SvgSurface(width, height, devicePixelRatio || 1, origin)));
}

function save(blob, ending) {
  const name = `${described.title} ${$("name").textContent} ${state.view}`.replace(/[^\p{L}\p{N}.-]+/gu, "-").slice(0, 120);
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// --- What happens on keys, pointers and choices.

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
