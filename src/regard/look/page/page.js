/* The page: what is chosen, the weights as they are asked for, words and theme. */

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
