/* One head: what is made of it, drawn, said beside it, found in it and saved of it. */

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
