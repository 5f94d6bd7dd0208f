/* Colours, tokens as labels, and the two surfaces that views are drawn on: a canvas and an SVG file. */

/* Every sixteenth colour of viridis and cividis, and blue to red for differences. */
const COLOURS = {
  viridis: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
  cividis: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
  greys: "ffffff 000000",
  greysDark: "16181d ffffff",
  differences: "053061 15508d 2870b1 3e8cbf 68abd0 98c8e0 c0dceb deebf2 f6f7f7 fbe6da fbceb7 f5ac8b e58368 d25849 bb2a34 960f27 67001f",
  differencesDark: "9fd4ff 7fc0f5 5ba6e3 3f8ac6 2f6d9f 275377 213c52 1d2832 1b1d22 33211f 56291f 7d3421 a74427 cb5a35 e6794f f49e78 ffc4a8",
};

/** 256 colours as [r, g, b], the anchors in even steps and what is between them on a line. */
function ramp(name) {
  const anchors = COLOURS[name].split(" ").map(rgb);
  return Array.from({ length: 256 }, (_, n) => {
    const at = (n / 255) * (anchors.length - 1);
    const low = Math.min(Math.floor(at), anchors.length - 2);
    return anchors[low].map((c, i) => Math.round(c + (at - low) * (anchors[low + 1][i] - c)));
  });
}

function rgb(hex) {
  return [0, 2, 4].map((n) => parseInt(hex.slice(n, n + 2), 16));
}

/** As a pixel of ImageData seen as Uint32Array; browsers run on little-endian machines alone. */
function pixel([r, g, b]) {
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}

/** The pixel of each code of what is shown. */
function pixels(made, colours, palette) {
  const table = new Uint32Array(256);
  for (let code = 0; code < 256; code++) {
    const t = made.places[code];
    table[code] = pixel(colours[Math.round(255 * (made.diverging ? (t + 1) / 2 : t))]);
  }
  table[MASKED] = pixel(rgb(palette.masked.slice(1)));
  table[ABSENT] = pixel(rgb(palette.absent.slice(1)));
  table[NAN] = pixel(rgb(palette.nan.slice(1)));
  return table;
}

const LONGEST_LABEL = 400; // characters; a longer token is cut where it is drawn
const UNSEEN = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]/gu;

/** A token with what cannot be seen made visible: control and direction marks as escapes, lone spaces as ␣. */
function label(token) {
  const cut = token.length > LONGEST_LABEL ? `${token.slice(0, LONGEST_LABEL)}…` : token;
  const said = cut.replace(UNSEEN, (c) => {
    const named = { "\n": "\\n", "\t": "\\t", "\r": "\\r" }[c];
    return named ?? (c < "\u0100" ? `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}` : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  });
  return said.trim() ? said : said.replaceAll(" ", "␣") || "∅";
}

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif';
const measuring = document.createElement("canvas").getContext("2d");

function width(text, size, weight = 400) {
  measuring.font = `${weight} ${size}px ${FONT}`;
  return measuring.measureText(text).width;
}

const fitted = new Map();

/** The text, cut to fit a width. */
function fit(text, size, room) {
  if (text.length * size * 0.3 < room && width(text, size) <= room) return text;
  const known = `${size} ${Math.round(room)} ${text}`;
  if (!fitted.has(known)) {
    const letters = [...text];
    let low = 0;
    let high = letters.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (width(letters.slice(0, middle).join("") + "…", size) <= room) low = middle;
      else high = middle - 1;
    }
    if (fitted.size > 20000) fitted.clear();
    fitted.set(known, low === letters.length ? text : `${letters.slice(0, low).join("")}…`);
  }
  return fitted.get(known);
}

/** Draws on a canvas of width × height units, `ratio` pixels to each, from the origin on. */
class CanvasSurface {
  constructor(canvas, width, height, ratio, origin = [0, 0]) {
    this.ratio = ratio;
    const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== across) canvas.width = across;
    if (canvas.height !== down) canvas.height = down;
    this.context = canvas.getContext("2d");
    this.context.setTransform(ratio, 0, 0, ratio, ratio * origin[0], ratio * origin[1]);
  }

  rect(x, y, width, height, fill, { stroke, line = 1, alpha = 1 } = {}) {
    this.context.globalAlpha = alpha;
    if (fill) {
      this.context.fillStyle = fill;
      this.context.fillRect(x, y, width, height);
    }
    if (stroke) {
      this.context.strokeStyle = stroke;
      this.context.lineWidth = line;
      this.context.strokeRect(x, y, width, height);
    }
    this.context.globalAlpha = 1;
  }

  line(x1, y1, x2, y2, stroke, { line = 1, alpha = 1 } = {}) {
    this.context.globalAlpha = alpha;
    this.context.strokeStyle = stroke;
    this.context.lineWidth = line;
    this.context.beginPath();
    this.context.moveTo(x1, y1);
    this.context.lineTo(x2, y2);
    this.context.stroke();
    this.context.globalAlpha = 1;
  }

  text(text, x, y, { size = 11, fill, align = "left", weight = 400, turned = false }) {
    const { context } = this;
    context.save();
    context.translate(x, y);
    if (turned) context.rotate(-Math.PI / 2);
    context.font = `${weight} ${size}px ${FONT}`;
    context.fillStyle = fill;
    context.textAlign = align;
    context.textBaseline = "alphabetic";
    context.direction = "ltr";
    context.fillText(text, 0, 0.35 * size);
    context.restore();
  }

  /** A picture of whole pixels, put where it fills width × height. */
  image(canvas, x, y, width, height) {
    this.context.imageSmoothingEnabled = false;
    this.context.drawImage(canvas, x, y, width, height);
  }

  clip(x, y, width, height, draw) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(x, y, width, height);
    this.context.clip();
    draw();
    this.context.restore();
  }
}

/** Draws the same as SVG text. */
class SvgSurface {
  constructor(width, height, ratio, origin = [0, 0]) {
    this.size = [width, height];
    this.origin = origin;
    this.ratio = ratio;
    this.parts = [];
    this.clips = 0;
  }

  rect(x, y, width, height, fill, { stroke, line = 1, alpha = 1 } = {}) {
    this.parts.push(`<rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" fill="${fill ?? "none"}"` +
      `${stroke ? ` stroke="${stroke}" stroke-width="${line}"` : ""}${alpha < 1 ? ` opacity="${short(alpha)}"` : ""}/>`);
  }

  line(x1, y1, x2, y2, stroke, { line = 1, alpha = 1 } = {}) {
    this.parts.push(`<line x1="${short(x1)}" y1="${short(y1)}" x2="${short(x2)}" y2="${short(y2)}" stroke="${stroke}"` +
      ` stroke-width="${short(line)}"${alpha < 1 ? ` opacity="${short(alpha)}"` : ""}/>`);
  }

  text(text, x, y, { size = 11, fill, align = "left", weight = 400, turned = false }) {
    const anchor = { left: "start", center: "middle", right: "end" }[align];
    const moved = `translate(${short(x)} ${short(y)})${turned ? " rotate(-90)" : ""}`;
    this.parts.push(`<text transform="${moved}" y="${short(0.35 * size)}" font-size="${short(size)}" fill="${fill}" text-anchor="${anchor}"` +
      `${weight === 400 ? "" : ` font-weight="${weight}"`} xml:space="preserve">${escaped(text)}</text>`);
  }

  image(canvas, x, y, width, height) {
    this.parts.push(`<image x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" preserveAspectRatio="none"` +
      ` style="image-rendering:pixelated" href="${canvas.toDataURL()}"/>`);
  }

  clip(x, y, width, height, draw) {
    const name = `clip${this.clips++}`;
    this.parts.push(`<clipPath id="${name}"><rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}"/></clipPath><g clip-path="url(#${name})">`);
    draw();
    this.parts.push("</g>");
  }

  toString() {
    const [width, height] = this.size;
    return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${escaped(FONT)}">\n<g transform="translate(${this.origin.join(" ")})">\n${this.parts.join("\n")}\n</g>\n</svg>\n`;
  }
}

function short(x) {
  return String(Math.round(x * 100) / 100);
}

function escaped(text) {
  return text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
}
