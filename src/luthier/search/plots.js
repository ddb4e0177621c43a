"use strict";
// Draws a search: its history, its settings on parallel axes, its curves, its front. Nothing is loaded from elsewhere.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const trials = data.trials, metrics = data.metrics, dimensions = data.dimensions;
const marks = new Map(trials.map((t) => [t.trial, []]));  // trial -> everything that is drawn of it
const brushes = new Map();  // axis -> [low, high] of its pixels
let pinned = null;

function make(parent, name, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function short(value) {
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  const size = Math.abs(value);
  return value !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function described(t) {
  const values = t.values ? metrics.map((m) => `${m.name} ${short(t.values[m.name])}`).join(", ") : t.reason || "no value";
  const settings = dimensions.filter((d) => d.key in t.settings).map((d) => `${d.key}=${short(t.settings[d.key])}`);
  return `trial ${t.trial}, ${t.state}: ${values}; ${settings.join(", ")}`;
}

function show(number) {
  const chosen = number === null ? pinned : number;
  for (const [other, nodes] of marks) for (const node of nodes) node.classList.toggle("chosen", other === chosen);
  const t = trials.find((one) => one.trial === chosen);
  document.getElementById("told").textContent = t ? described(t) : "Point at a trial, or click it to keep it.";
}

function of(node, t) {
  node.dataset.trial = t.trial;
  marks.get(t.trial).push(node);
  node.addEventListener("pointerenter", () => show(t.trial));
  node.addEventListener("pointerleave", () => show(null));
  node.addEventListener("click", () => { pinned = pinned === t.trial ? null : t.trial; show(null); });
  if (node.namespaceURI === SVG) make(node, "title", {}, described(t));
  return node;
}

function spread(low, high, from, to, log) {
  const f = log ? Math.log : (x) => x;
  const width = f(high) - f(low) || 1;
  return (x) => from + (to - from) * (f(x) - f(low)) / width;
}

function ticks(low, high, log) {
  if (log && high / low >= 10) {
    const out = [];
    for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++) out.push(Number(`1e${e}`));
    return out.length > 1 ? out : [low, high];
  }
  return [low, (low + high) / 2, high];
}

function reach(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(low) || 1) * 0.05;
  return [low - room, high + room];
}

function frame(id, height, left, right) {
  const svg = document.getElementById(id);
  const width = 900;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return { svg, x0: left, x1: width - right, y0: 16, y1: height - 34 };
}

function axes(f, xs, ys, x, y, xname, yname) {
  make(f.svg, "path", { d: `M${f.x0} ${f.y0}V${f.y1}H${f.x1}`, class: "axis" });
  for (const v of xs) make(f.svg, "text", { x: x(v), y: f.y1 + 15, "text-anchor": "middle" }, short(v));
  for (const v of ys) make(f.svg, "text", { x: f.x0 - 6, y: y(v) + 4, "text-anchor": "end" }, short(v));
  make(f.svg, "text", { x: f.x1, y: f.y1 + 29, "text-anchor": "end", class: "name" }, xname);
  make(f.svg, "text", { x: f.x0 + 6, y: f.y0 - 4, class: "name" }, yname);
}

function history() {
  const m = metrics[0], f = frame("history", 260, 70, 20);
  const known = trials.filter((t) => t.values);
  if (!known.length) return;
  const [low, high] = reach(known.map((t) => t.values[m.name]));
  const x = spread(0, Math.max(1, trials.length - 1), f.x0 + 8, f.x1, false), y = spread(low, high, f.y1, f.y0, false);
  axes(f, [0, trials.length - 1], ticks(low, high, false), x, y, "trial", m.name);
  let best = null, path = "";
  for (const t of known) {
    const value = t.values[m.name];
    if (best === null || (m.less ? value < best : value > best)) best = value;
    path += `${path ? "H" : "M"}${x(t.trial)}${path ? `V${y(best)}` : ` ${y(best)}`}`;
  }
  make(f.svg, "path", { d: path + `H${f.x1}`, class: "best-so-far" });
  for (const t of trials) {
    const at = t.values ? y(t.values[m.name]) : f.y1;
    const kind = data.best.includes(t.trial) ? "best" : t.state === "complete" ? "complete" : "ended";
    of(make(f.svg, "circle", { cx: x(t.trial), cy: at, r: 5, class: `dot ${kind}` }), t);
  }
}

function place(d, f) {  // of a value on the axis of a setting or of a metric
  if (d.choices) {
    const n = d.choices.length;
    const at = (i) => n === 1 ? (f.y0 + f.y1) / 2 : f.y1 - (f.y1 - f.y0) * i / (n - 1);
    const index = (v) => d.choices.findIndex((c) => JSON.stringify(c) === JSON.stringify(v));
    return { y: (v) => at(index(v)), ticks: d.choices };
  }
  return { y: spread(d.low, d.high, f.y1, f.y0, d.log), ticks: ticks(d.low, d.high, d.log) };
}

function parallel() {
  const f = frame("parallel", 340, 60, 110);
  f.y0 = 34;
  const known = trials.filter((t) => t.values);
  const own = metrics.map((m) => {
    const [low, high] = reach(known.length ? known.map((t) => t.values[m.name]) : [0, 1]);
    return { key: m.name, metric: true, low, high, log: false };
  });
  const columns = [...dimensions, ...own];
  const x = spread(0, columns.length - 1 || 1, f.x0, f.x1, false);
  columns.forEach((d, i) => { d.x = x(i); d.place = place(d, f); });
  const value = (t, d) => d.metric ? (t.values ? t.values[d.key] : undefined) : t.settings[d.key];
  const missing = f.y1 + 18;
  const order = [...known].sort((a, b) => a.values[metrics[0].name] - b.values[metrics[0].name]);
  if (!metrics[0].less) order.reverse();
  for (const t of trials) {
    const points = columns.map((d) => {
      const v = value(t, d);
      return [d.x, v === undefined || v === null ? missing : d.place.y(v)];
    });
    const rank = order.indexOf(t);
    const share = rank < 0 ? 1 : rank / Math.max(1, order.length - 1);
    const line = make(f.svg, "polyline", {
      points: points.map((p) => p.map((n) => n.toFixed(1)).join(",")).join(" "),
      class: `line${rank < 0 ? " ended" : ""}${data.best.includes(t.trial) ? " best" : ""}`,
      stroke: rank < 0 ? "" : `hsl(${(210 + 150 * share).toFixed(0)} 65% ${(38 + 12 * share).toFixed(0)}%)`,
    });
    line.ys = points.map((p) => p[1]);
    of(line, t);
  }
  columns.forEach((d, i) => {
    const g = make(f.svg, "g", {});
    make(g, "path", { d: `M${d.x} ${f.y0}V${f.y1}`, class: "axis" });
    for (const v of d.place.ticks) make(g, "text", { x: d.x + 5, y: d.place.y(v) + 4, class: "tick" }, short(v));
    make(g, "text", { x: d.x, y: f.y0 - 12, "text-anchor": i ? "middle" : "start", class: "name" }, d.key);
    brush(f, g, d, i);
  });
  make(f.svg, "text", { x: f.x0, y: missing + 12, class: "tick" }, "below: not set, or no value");
}

function brush(f, g, d, i) {  // drag along an axis to keep the trials that pass there; click to let all pass again
  const area = make(g, "rect", { x: d.x - 12, y: f.y0, width: 24, height: f.y1 - f.y0, class: "grip", "data-axis": d.key });
  const box = make(g, "rect", { x: d.x - 7, y: 0, width: 14, height: 0, class: "brush" });
  let from = null;
  const at = (event) => {
    const r = f.svg.getBoundingClientRect();
    const y = (event.clientY - r.top) / r.height * f.svg.viewBox.baseVal.height;
    return Math.min(f.y1, Math.max(f.y0, y));
  };
  const set = (low, high) => {
    if (high - low < 2) brushes.delete(i); else brushes.set(i, [low, high]);
    box.setAttribute("y", low);
    box.setAttribute("height", brushes.has(i) ? high - low : 0);
    filter();
  };
  area.addEventListener("pointerdown", (event) => { from = at(event); area.setPointerCapture(event.pointerId); });
  area.addEventListener("pointermove", (event) => {
    if (from !== null) set(Math.min(from, at(event)), Math.max(from, at(event)));
  });
  area.addEventListener("pointerup", (event) => { if (Math.abs(at(event) - from) < 2) set(0, 0); from = null; });
}

function filter() {
  let left = 0;
  for (const t of trials) {
    const line = marks.get(t.trial).find((node) => node.ys);
    const stays = [...brushes].every(([i, [low, high]]) => line.ys[i] >= low && line.ys[i] <= high);
    left += stays;
    for (const node of marks.get(t.trial)) node.classList.toggle("out", !stays);
  }
  document.getElementById("count").textContent = `${left} of ${trials.length} trials`;
}

function curves() {
  const known = trials.filter((t) => t.curve.length);
  if (!known.length) { document.getElementById("curves-section").hidden = true; return; }
  const f = frame("curves", 260, 70, 20), points = known.flatMap((t) => t.curve);
  const [low, high] = reach(points.map((p) => p[1])), last = Math.max(...points.map((p) => p[0]));
  const x = spread(0, last, f.x0, f.x1, false), y = spread(low, high, f.y1, f.y0, false);
  axes(f, [0, last], ticks(low, high, false), x, y, "step", metrics[0].name);
  for (const t of known) {
    const corners = t.curve.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`);
    const kind = data.best.includes(t.trial) ? " best" : t.state === "complete" ? "" : " ended";
    of(make(f.svg, "polyline", { points: corners.join(" "), class: `curve${kind}` }), t);
    const [endx, endy] = corners[corners.length - 1].split(",");
    of(make(f.svg, "circle", { cx: endx, cy: endy, r: 3, class: `dot${kind || " complete"}` }), t);
  }
}

function front() {
  if (metrics.length < 2) { document.getElementById("front-section").hidden = true; return; }
  const [a, b] = metrics, f = frame("front", 320, 70, 20), known = trials.filter((t) => t.values);
  const xs = reach(known.map((t) => t.values[b.name])), ys = reach(known.map((t) => t.values[a.name]));
  const x = spread(...xs, f.x0, f.x1, false), y = spread(...ys, f.y1, f.y0, false);
  axes(f, ticks(...xs, false), ticks(...ys, false), x, y, b.name, a.name);
  for (const t of known) {
    const kind = data.best.includes(t.trial) ? "best" : "complete";
    of(make(f.svg, "circle", { cx: x(t.values[b.name]), cy: y(t.values[a.name]), r: 5, class: `dot ${kind}` }), t);
  }
}

function table() {
  for (const row of document.querySelectorAll("tr[data-trial]")) {
    const t = trials.find((one) => one.trial === Number(row.dataset.trial));
    of(row, t);
    row.addEventListener("focus", () => show(t.trial));
    row.addEventListener("blur", () => show(null));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") row.click(); });
  }
}

history();
parallel();
curves();
front();
table();
filter();
show(null);
document.body.dataset.drawn = document.querySelectorAll("svg [data-trial]").length;
