/* Cells: weights as one byte each, what they become for each scale, and the largest of each block for every zoom. */

const MASKED = 0; // may not be attended
const ABSENT = 1; // not kept in the file, or hidden in the page
const ZERO = 2;
const NAN = 255;
const LEVELS = NAN - 1 - ZERO;
const SMALLEST_SIDE = 16; // of a level of the pyramid

/** The weight of each code, as pages.py says it; 0 where there is none. */
function weightsOfCodes(tolerance) {
  return Float64Array.from({ length: 256 }, (_, code) => {
    const n = code - ZERO;
    if (code === NAN) return NaN;
    return n <= 0 ? 0 : n <= 25 ? 2 * tolerance * n : 50 * tolerance * 1.04 ** (n - 25);
  });
}

/** The bytes of deflated base64. */
async function inflated(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let n = 0; n < bytes.length; n++) bytes[n] = binary.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The weights of one head. A cell of a pooled head is a block of weights. */
class Cells {
  constructor(map, head, codes) {
    this.map = map;
    this.head = head;
    this.block = head.block;
    this.rows = Math.ceil(map.queries / head.block[0]);
    this.keys = Math.ceil(map.keys / head.block[1]);
    if (codes.length !== this.rows * this.keys) throw new Error(`${codes.length} cells for ${this.rows} × ${this.keys}`);
    this.codes = codes;
    this.weights = weightsOfCodes(head.tolerance);
  }

  code(row, key) {
    return this.codes[row * this.keys + key];
  }

  weight(row, key) {
    return this.weights[this.code(row, key)];
  }

  row(row) {
    return this.codes.subarray(row * this.keys, (row + 1) * this.keys);
  }

  /** How many keys a row may attend. */
  visible(row) {
    let count = 0;
    for (let n = row * this.keys, end = n + this.keys; n < end; n++) if (this.codes[n] !== MASKED) count++;
    return count;
  }

  /** 1 for the largest of its row; equal codes share a rank. */
  rank(row, key) {
    const own = this.code(row, key);
    let larger = 1;
    for (const code of this.row(row)) if (code > own && code !== NAN) larger++;
    return larger;
  }

  /** What a row sums to, as it was before it was rounded. */
  total(row) {
    return this.head.totals ? this.head.totals[row] : 1;
  }

  /** The key where a query stands, as stats.py's `places` says it. */
  place(row) {
    const { queries, keys, kind } = this.map;
    const among = kind === "self" && queries <= keys ? row + keys - queries : (row * (keys - 1)) / Math.max(1, queries - 1);
    return Math.floor(among + 0.5);
  }

  /** Weights as an array, NaN where masked, not kept or NaN. */
  array() {
    return Float32Array.from(this.codes, (code) => (code < ZERO ? NaN : this.weights[code]));
  }
}

/** The largest code of each block, level by level; each level halves the sides of the one before. */
class Pyramid {
  constructor(codes, rows, keys) {
    this.levels = [{ codes, rows, keys, high: 1, wide: 1 }];
  }

  /** The finest level whose blocks are at least so many cells a side, or the last. */
  level(high, wide) {
    for (let n = 0; ; n++) {
      const level = this.levels[n];
      const enough = (each, wanted, side) => each >= wanted || side <= SMALLEST_SIDE;
      if (enough(level.high, high, level.rows) && enough(level.wide, wide, level.keys)) return level;
      if (n + 1 === this.levels.length) this.levels.push(halved(level));
    }
  }

  largest() {
    const { codes } = this.level(Infinity, Infinity);
    let top = ZERO;
    for (const code of codes) if (code > top && code < NAN) top = code;
    return top;
  }
}

function halved({ codes, rows, keys, high, wide }) {
  const down = rows > SMALLEST_SIDE ? 1 : 0;
  const across = keys > SMALLEST_SIDE ? 1 : 0;
  const width = (keys + across) >> across;
  const out = new Uint8Array(((rows + down) >> down) * width);
  for (let row = 0, from = 0; row < rows; row++) {
    const start = (row >> down) * width;
    for (let key = 0; key < keys; key++, from++) {
      const to = start + (key >> across);
      if (codes[from] > out[to]) out[to] = codes[from];
    }
  }
  return { codes: out, rows: (rows + down) >> down, keys: width, high: high << down, wide: wide << across };
}

/**
 * What is drawn: codes in their order of strength, and for each its place in the colours, 0 to 1, or −1 to 1 where
 * `diverging`. `ticks` are places in the colours and what stands there.
 */
class Shown {
  constructor(cells, codes, { places, ticks, diverging = false, sinks = [] }) {
    this.cells = cells;
    this.codes = codes;
    this.pyramid = new Pyramid(codes, cells.rows, cells.keys);
    this.places = places ?? null;
    this.ticks = ticks ?? null;
    this.diverging = diverging;
    this.sinks = sinks;
  }

  /** How many cells hold each code, in the cells from one on to before another. */
  counts(from = 0, to = this.codes.length) {
    const counts = new Uint32Array(256);
    for (let n = from; n < to; n++) counts[this.codes[n]]++;
    return counts;
  }

  /** [row, key] of the `count` strongest, of one row or of all, the strongest first. */
  strongest(count, row = null) {
    const { keys } = this.cells;
    const from = row === null ? 0 : row * keys;
    const to = row === null ? this.codes.length : from + keys;
    const counts = this.counts(from, to);
    let least = NAN - 1;
    for (let held = counts[least]; held < count && least > ZERO + 1; ) held += counts[--least];
    const found = [];
    let ties = count;
    for (let code = least + 1; code < NAN; code++) ties -= counts[code];
    for (let n = from; n < to; n++) {
      const code = this.codes[n];
      if (code === NAN || code < least || (code === least && ties-- <= 0)) continue;
      found.push(n);
    }
    found.sort((a, b) => this.codes[b] - this.codes[a] || a - b);
    return found.slice(0, count).map((n) => [Math.floor(n / keys), n % keys]);
  }
}

/** Cells as the choice says: `scale`, `share` of each row's weight, `sinks` to hide, and cells to be `against`. */
function shown(cells, choice) {
  const pooled = cells.block[0] * cells.block[1] > 1;
  const sinks = choice.sinks ? cells.head.sinks.map(([key]) => Math.floor(key / cells.block[1])) : [];
  const share = pooled || choice.against ? 1 : choice.share;
  let scaled;
  if (choice.against) scaled = differences(cells, choice.against);
  else if (choice.scale === "uniform" && !pooled) scaled = timesUniform(cells);
  else if (choice.scale === "expected" && !pooled) scaled = overExpected(cells);
  let codes = scaled ? scaled.codes : cells.codes;
  if (sinks.length || share < 1) {
    codes = scaled ? codes : codes.slice();
    hide(cells, codes, sinks, share);
  }
  const made = new Shown(cells, codes, { ...scaled, sinks });
  if (!scaled) Object.assign(made, plain(cells.weights, choice.scale, cells.weights[made.pyramid.largest()]));
  return made;
}

/** Places in the colours of weights as they are. */
function plain(weights, scale, largest) {
  if (scale === "log") {
    const top = Math.log10(largest || 1);
    const ticks = [0, 1, 2, 3, 4].map((n) => [n / 4, written(10 ** (top - 4 + n))]);
    return { places: weights.map((p) => clamp((Math.log10(p) - top) / 4 + 1, 0, 1)), ticks };
  }
  const top = scale === "unit" ? 1 : largest || 1;
  return { places: weights.map((p) => clamp(p / top, 0, 1)), ticks: [0, 0.5, 1].map((t) => [t, written(t * top)]) };
}

/** Codes over a log scale from 1 / top to top, 1 in its middle: `at(log10 x)`, to be cut to ZERO + 1 .. NAN − 1. */
function around1(top) {
  const half = Math.log10(top);
  const decade = Math.floor(half + 1e-9);
  const marks = decade >= 3 ? [-decade, 0, decade] : Array.from({ length: 2 * decade + 1 }, (_, n) => n - decade);
  return {
    at: (logarithm) => ZERO + 1.5 + ((LEVELS - 1) * (logarithm / half + 1)) / 2,
    places: Float64Array.from({ length: 256 }, (_, code) => clamp((code - ZERO - 1) / (LEVELS - 1), 0, 1)),
    ticks: marks.map((n) => [(n / half + 1) / 2, written(10 ** n)]),
  };
}

function timesUniform(cells) {
  const { rows, keys, weights } = cells;
  const counts = new Float64Array(rows);
  let top = 10;
  for (let row = 0, n = 0; row < rows; row++) {
    let largest = 0;
    counts[row] = cells.visible(row);
    for (const end = n + keys; n < end; n++) if (cells.codes[n] > largest && cells.codes[n] < NAN) largest = cells.codes[n];
    top = Math.max(top, counts[row] * weights[largest]);
  }
  const { at, places, ticks } = around1(top);
  const codes = new Uint8Array(cells.codes.length);
  const of = Uint8Array.from({ length: 256 }, (_, code) => code);
  for (let row = 0, n = 0; row < rows; row++) {
    for (let code = ZERO + 1; code < NAN; code++) of[code] = clamp(at(Math.log10(counts[row] * weights[code])), ZERO + 1, NAN - 1);
    for (const end = n + keys; n < end; n++) codes[n] = of[cells.codes[n]];
  }
  return { codes, places, ticks };
}

/** Each weight over the mean of all at its distance, as contact maps of chromosomes are drawn. */
function overExpected(cells) {
  const { rows, keys, weights } = cells;
  const sums = new Float64Array(rows + 2 * keys);
  const counts = new Float64Array(rows + 2 * keys);
  const zero = rows + keys; // distance 0
  for (let row = 0, n = 0; row < rows; row++) {
    for (let key = 0, d = zero - cells.place(row); key < keys; key++, n++, d++) {
      const code = cells.codes[n];
      if (code < ZERO || code === NAN) continue;
      sums[d] += weights[code];
      counts[d]++;
    }
  }
  const { at, places, ticks } = around1(100);
  const observed = weights.map((p) => at(Math.log10(p)));
  const expected = sums.map((sum, n) => at(Math.log10(sum / counts[n])) - at(0));
  const codes = new Uint8Array(cells.codes.length);
  for (let row = 0, n = 0; row < rows; row++) {
    for (let key = 0, d = zero - cells.place(row); key < keys; key++, n++, d++) {
      const code = cells.codes[n];
      const over = observed[code] - expected[d];
      codes[n] = code <= ZERO || code === NAN ? code : over < ZERO + 1 ? ZERO + 1 : over >= NAN ? NAN - 1 : over;
    }
  }
  return { codes, places, ticks };
}

/** Cells − other cells: even codes for less, odd ones for more, so that the larger difference is the larger code. */
function differences(cells, other) {
  const both = (a, b) => a >= ZERO && b >= ZERO && a !== NAN && b !== NAN;
  let most = 0;
  for (let n = 0; n < cells.codes.length; n++) {
    const [a, b] = [cells.codes[n], other.codes[n]];
    if (both(a, b)) most = Math.max(most, Math.abs(cells.weights[a] - other.weights[b]));
  }
  most ||= 1;
  const steps = LEVELS / 2;
  const codes = new Uint8Array(cells.codes.length);
  for (let n = 0; n < codes.length; n++) {
    const [a, b] = [cells.codes[n], other.codes[n]];
    if (!both(a, b)) codes[n] = a === NAN || b === NAN ? NAN : Math.min(a, b);
    else {
      const apart = cells.weights[a] - other.weights[b];
      const step = Math.round((steps - 1) * Math.sqrt(Math.abs(apart) / most)); // finer near 0
      codes[n] = step ? ZERO + 2 * step + (apart > 0 ? 1 : 0) : ZERO;
    }
  }
  const places = Float64Array.from({ length: 256 }, (_, code) => {
    const step = (code - ZERO) >> 1;
    return clamp((code & 1 ? 1 : -1) * (step / (steps - 1)) ** 2, -1, 1);
  });
  places[ZERO] = 0;
  return { codes, places, diverging: true, ticks: [-1, 0, 1].map((t) => [t, written(t * most)]) };
}

/** Call absent what is on sinks, and what is not among the strongest that make up a share of its row's weight. */
function hide(cells, codes, sinks, share) {
  const { rows, keys } = cells;
  const counts = new Uint32Array(256);
  for (let row = 0; row < rows; row++) {
    const start = row * keys;
    if (share < 1) {
      counts.fill(0);
      for (let n = start; n < start + keys; n++) counts[cells.codes[n]]++;
      const enough = share * (cells.total(row) ?? 1);
      let least = NAN - 1;
      for (let sum = 0; least > ZERO; least--) if ((sum += counts[least] * cells.weights[least]) >= enough) break;
      for (let n = start; n < start + keys; n++) if (cells.codes[n] < least && cells.codes[n] !== MASKED) codes[n] = ABSENT;
    }
    for (const key of sinks) if (codes[start + key] !== MASKED && codes[start + key] !== NAN) codes[start + key] = ABSENT;
  }
}

function clamp(x, low, high) {
  return x >= low ? (x <= high ? x : high) : low; // NaN is low
}

/** A number of three digits, short. */
function written(x) {
  if (x === null || Number.isNaN(x)) return "NaN";
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e5) {
    const [digits, power] = x.toExponential(2).split("e");
    const raised = [...String(Number(power))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)])).join("");
    const short = String(Number(digits));
    return short === "1" ? `10${raised}` : `${short.replace("-", "−")} × 10${raised}`;
  }
  return String(Number(x.toPrecision(3))).replace("-", "−");
}
