// Small charts in SVG, drawn at the size of their box. All text is set as text.

const GAP_S = 5; // seconds without an answer that interrupt a curve
const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function drawn(name, attributes, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// An empty drawing in the box's own pixels, with a name for those who do not see it.
function canvas(box, label) {
  const width = Math.max(box.clientWidth, 80), height = Math.max(box.clientHeight, 40);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  box.replaceChildren(svg);
  return { svg, width, height };
}

// A round number that is at least as large.
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-6)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * power).find((top) => top >= value * 0.999);
}

export function shortNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (size >= 1e4) return `${(value / 1e3).toFixed(size >= 1e5 ? 0 : 1)}k`;
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return size >= 10 ? value.toFixed(1) : String(Number(value.toPrecision(size >= 1 ? 3 : 2)));
}

export function milliseconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value >= 1000 ? `${Number((value / 1000).toFixed(2))} s` : `${shortNumber(value)} ms`;
}

// Lines over seconds. rows: {at, values: [number | null, ...]}, one curve a value. Returns what
// maps a pixel to a row.
export function timeChart(box, rows, { now, span, label }) {
  const { svg, width, height } = canvas(box, label);
  const left = 46, right = 10, top = 8, bottom = 20;
  const most = Math.max(...rows.flatMap((row) => row.values).filter(Number.isFinite), 0);
  const ceiling = niceCeiling(most || 1);
  const x = (at) => left + (1 - (now - at) / span) * (width - left - right);
  const y = (value) => top + (1 - value / ceiling) * (height - top - bottom);
  for (const share of [0, 0.5, 1]) {
    const level = y(share * ceiling);
    svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: level, y2: level }));
    const text = share ? milliseconds(share * ceiling) : "0";
    svg.append(drawn("text", { x: left - 6, y: level + 4, "text-anchor": "end" }, text));
  }
  for (const share of [0, 0.5, 1]) {
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    const place = left + share * (width - left - right);
    const text = share === 1 ? "now" : `−${((1 - share) * span) / 60} min`;
    svg.append(drawn("text", { x: place, y: height - 4, "text-anchor": anchor }, text));
  }
  const names = ["", " two"];
  const curves = rows.length ? rows[0].values.length : 0;
  for (let index = curves - 1; index >= 0; index -= 1) {
    for (const run of unbroken(rows, index)) {
      const points = run.map((row) => [x(row.at), y(row.values[index])]);
      svg.append(mark(points, names[index] ?? ""));
    }
  }
  const rule = drawn("line", { class: "here", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(rule);
  return (pixel) => {
    const near = rows.filter((row) => Number.isFinite(row.values[0]))
      .sort((a, b) => Math.abs(x(a.at) - pixel) - Math.abs(x(b.at) - pixel))[0];
    rule.setAttribute("visibility", near ? "visible" : "hidden");
    if (near) for (const end of ["x1", "x2"]) rule.setAttribute(end, x(near.at));
    return near;
  };
}

function unbroken(rows, index) {
  const runs = [];
  let last = null;
  for (const row of rows) {
    if (!Number.isFinite(row.values[index])) continue;
    if (last === null || row.at - last > GAP_S) runs.push([]);
    runs[runs.length - 1].push(row);
    last = row.at;
  }
  return runs;
}

function mark(points, name) {
  if (points.length === 1) {
    return drawn("circle", { class: `dot${name}`, cx: points[0][0], cy: points[0][1], r: 2 });
  }
  const d = points.map(([px, py], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`);
  return drawn("path", { class: `curve${name}`, d: d.join("") });
}

// Bars side by side. bars: [{name, value}]
export function barChart(box, bars, label) {
  const { svg, width, height } = canvas(box, label);
  const left = 4, top = 18, bottom = 20, room = width - 2 * left;
  const most = Math.max(...bars.map((bar) => bar.value), 1);
  const step = room / Math.max(bars.length, 1);
  const wide = Math.min(step * 0.7, 48);
  const ground = height - bottom;
  svg.append(drawn("line", { class: "grid", x1: left, x2: width - left, y1: ground, y2: ground }));
  bars.forEach((bar, index) => {
    const middle = left + (index + 0.5) * step;
    const tall = (bar.value / most) * (ground - top);
    const place = { x: middle - wide / 2, y: ground - tall, width: wide, height: tall, rx: 2 };
    svg.append(drawn("rect", { class: "bar", ...place }));
    const above = { x: middle, y: ground - tall - 5, "text-anchor": "middle" };
    if (bar.value && step >= 22) svg.append(drawn("text", above, shortNumber(bar.value)));
    const below = { x: middle, y: height - 5, "text-anchor": "middle" };
    if (step >= 16 || index % 4 === 0) svg.append(drawn("text", below, bar.name));
  });
}

// One curve between stated limits.
export function curveChart(box, values, { low, high, label }) {
  const { svg, width, height } = canvas(box, label);
  const bottom = Math.min(low, ...values), top = Math.max(high, ...values);
  const pad = 5, across = width - 2 * pad, tall = height - 2 * pad;
  const x = (i) => pad + (values.length < 2 ? 0.5 : i / (values.length - 1)) * across;
  const y = (value) => pad + (1 - (value - bottom) / (top - bottom || 1)) * tall;
  for (const [name, value] of [["grid", low], ["grid", high], ["zero", 0]]) {
    if (value < bottom || value > top) continue;
    const level = y(value);
    svg.append(drawn("line", { class: name, x1: 0, x2: width, y1: level, y2: level }));
  }
  svg.append(mark(values.map((value, i) => [x(i), y(value)]), ""));
}
