/* The overview: a thumbnail of every head, sorted. */

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
