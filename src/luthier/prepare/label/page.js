"use strict";
// The labelling page. What rows say is put into the page as text only, never as markup.
const $ = (id) => document.getElementById(id);
const KEYS = "1234567890qwertyiopdfghjklzxvbnm"; // of labels, in order; those of actions (u, s, a, c) are not among them
let task = null, row = null, by = "", chosen = [], spans = [], at = 0, from = 0, busy = false, again = false, since = 0;

async function ask(what, body) {
  const answer = await fetch("api/" + what, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({by, ...body}),
  });
  const told = await answer.json();
  if (!answer.ok) throw new Error(told.error || answer.statusText);
  return told;
}

// One request at a time: keys pressed while one is on its way would be meant for another row.
async function act(what, body) {
  if (busy) return;
  busy = true;
  $("problem").textContent = "";
  try { show(await ask(what, {again, seconds: (performance.now() - since) / 1000, ...body})); }
  catch (error) { $("problem").textContent = error instanceof TypeError ? "The server cannot be reached; nothing of this was kept. Start it again: it goes on where it stood." : error.message; }
  finally { busy = false; document.body.dataset.ready = String(Date.now()); }
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function text(role, said) {
  return element("div", {className: "text"}, element("span", {className: "role", textContent: role}), element("div", {className: "said", textContent: said}));
}

function button(name, key, press) {
  const made = element("button", {type: "button", onclick: press}, name, " ");
  if (key) made.append(element("kbd", {textContent: key}));
  made.dataset.name = name;
  return made;
}

// ------------------------------------------------------------------------ a row

function show(told) {
  row = told.row === null ? null : told;
  const p = told.progress;
  $("progress").max = p.rows; $("progress").value = p.labelled + p.skipped;
  $("told").textContent = `${p.labelled} of ${p.rows} labelled` + (p.skipped ? `, ${p.skipped} skipped` : "");
  for (const id of ["texts", "words", "answers", "choices"]) $(id).replaceChildren();
  $("edited").classList.toggle("hidden", !row || task.kind !== "edit");
  $("actions").classList.toggle("hidden", !row);
  $("end").classList.toggle("hidden", !!row);
  $("again").classList.toggle("hidden", !p.skipped);
  $("place").textContent = row ? `row ${row.row} (${row.place})` : "";
  since = performance.now();
  chosen = []; spans = []; at = from = 0;
  if (!row) return;
  $("texts").replaceChildren(...row.texts.map((one) => text(one.role, one.text)));
  ({classes: showClasses, spans: showSpans, preference: showPair, edit: showEdit})[task.kind]();
  scrollTo(0, 0);
}

function showClasses() {
  chosen = task.several ? [...(row.before || [])] : row.before ? [row.before] : [];
  $("choices").replaceChildren(...task.labels.map((name, i) => button(name, KEYS[i], () => choose(name))));
  mark();
}

function choose(name) {
  if (!task.several) return act("label", {row: row.row, label: name});
  chosen = chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name];
  mark();
}

function mark() {
  for (const one of $("choices").children) one.setAttribute("aria-pressed", String(chosen.includes(one.dataset.name)));
}

function showPair() {
  $("answers").replaceChildren(...row.answers.map((said, i) => text("AB"[i], said)));
  const said = (label) => () => act("label", {row: row.row, label});
  $("choices").replaceChildren(button("A is better", "a", said("first")), button("B is better", "b", said("second")));
  if (task.ties) $("choices").append(button("Neither", "t", said("tie")));
}

function showEdit() {
  $("edited").value = row.before || "";
  $("edited").focus();
}

// ------------------------------------------------------------------------ spans of words: [first, last, label]

function showSpans() {
  spans = (row.before || []).map((one) => [...one]);
  $("choices").replaceChildren(...task.labels.map((name, i) => button(name, KEYS[i], () => tag(name))), button("no entity", "backspace", untag));
  drawWords();
}

function drawWords() {
  const made = [];
  const [low, high] = [Math.min(from, at), Math.max(from, at)];
  row.words.forEach(([gap, word], i) => {
    const span = spans.find((one) => one[0] <= i && i <= one[1]);
    const before = span && i > span[0];
    if (gap) made.push(element("span", {className: before ? "word inside" : "", textContent: gap}));
    const one = element("span", {className: "word", textContent: word});
    one.dataset.at = i;
    if (span) one.classList.add("inside");
    if (i >= low && i <= high) one.classList.add("chosen");
    if (i === at) one.classList.add("at");
    if (span && i === span[1]) one.append(element("span", {className: "tag", textContent: span[2]}));
    made.push(one);
  });
  $("words").replaceChildren(...made, row.tail);
}

function clear() {
  const [low, high] = [Math.min(from, at), Math.max(from, at)];
  spans = spans.filter((one) => one[1] < low || one[0] > high);
  return [low, high];
}

function tag(name) {
  const [low, high] = clear();
  spans.push([low, high, name]);
  from = at;
  drawWords();
}

function untag() { clear(); from = at; drawWords(); }

function move(step, extend) {
  at = Math.max(0, Math.min(row.words.length - 1, at + step));
  if (!extend) from = at;
  drawWords();
  $("words").querySelector(".at").scrollIntoView({block: "nearest"});
}

function nearest(event) { // the word under the mouse, else the one closest to it
  let found = 0, least = Infinity;
  for (const one of $("words").querySelectorAll(".word[data-at]")) {
    for (const box of one.getClientRects()) {
      const beside = Math.max(box.left - event.clientX, 0, event.clientX - box.right);
      const above = Math.max(box.top - event.clientY, 0, event.clientY - box.bottom);
      const distance = 1000 * above + beside; // of the same line first
      if (distance < least) [found, least] = [Number(one.dataset.at), distance];
    }
  }
  return found;
}

function grab(event) {
  if (event.button !== 0 || !row) return;
  event.preventDefault(); // the browser's own selection would stand beside ours
  if (document.activeElement) document.activeElement.blur();
  at = nearest(event);
  if (!event.shiftKey) from = at;
  drawWords();
}

function drag(event) {
  if (!(event.buttons & 1) || !row) return;
  const now = nearest(event);
  if (now !== at) { at = now; drawWords(); }
}

// ------------------------------------------------------------------------ actions and keys

function save() {
  if (!row || task.kind === "preference") return;
  if (task.kind === "spans") return act("label", {row: row.row, label: spans});
  if (task.kind === "edit") return act("label", {row: row.row, label: $("edited").value});
  if (task.several) return act("label", {row: row.row, label: chosen});
  if (chosen.length) return act("label", {row: row.row, label: chosen[0]});
}
const skip = () => row && act("skip", {row: row.row});
const undo = () => act("undo", {});

function pressed(event) {
  if (event.isComposing || !task || $("name").offsetParent) return;
  const editing = event.target === $("edited"), key = event.key.toLowerCase();
  if (editing || task.kind === "edit") {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
    else if (event.altKey && key === "s") { event.preventDefault(); skip(); }
    else if (event.altKey && key === "u") { event.preventDefault(); undo(); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.repeat && !key.startsWith("arrow")) return;
  if (event.target instanceof HTMLButtonElement && (event.key === "Enter" || event.key === " ")) return; // its own press
  const taken = handled(event, key);
  if (taken) event.preventDefault();
}

function handled(event, key) {
  if (key === "u") return undo(), true;
  if (!row) return false;
  if (key === "s") return skip(), true;
  if (key === "enter") return save(), true;
  if (task.kind === "preference") {
    const i = {a: 0, arrowleft: 0, b: 1, arrowright: 1, t: 2}[key];
    if (i === undefined || !$("choices").children[i]) return false;
    return $("choices").children[i].click(), true;
  }
  if (task.kind === "spans") {
    if (key === "arrowright" || key === "arrowleft") return move(key === "arrowright" ? 1 : -1, event.shiftKey), true;
    if (key === "backspace" || key === "delete") return untag(), true;
  }
  const i = key.length === 1 ? KEYS.indexOf(key) : -1;
  if (i < 0 || i >= task.labels.length) return false;
  return task.kind === "spans" ? tag(task.labels[i]) : choose(task.labels[i]), true;
}

async function begin(event) {
  event.preventDefault();
  by = $("by").value.trim();
  if (!by) return;
  sessionStorage.setItem("by", by);
  $("name").classList.add("hidden");
  $("work").classList.remove("hidden");
  $("who").textContent = by;
  await act("next", {});
}

async function write() {
  try {
    const told = await ask("write", {});
    $("written").textContent = `${told.labelled} rows written to ${told.out}` + (told.aside ? `, ${told.aside} aside` : "");
  } catch (error) { $("written").textContent = error.message; }
}

const HELP = {
  classes: "A key chooses a class", spans: "Arrow keys move, with Shift they choose several words; the mouse does, too. A key tags what is chosen, Backspace takes a tag away",
  preference: "A or ← and B or → say which is better", edit: "Ctrl+Enter saves, Alt+S skips, Alt+U goes back",
};

(async () => {
  task = await ask("task", {});
  $("by").value = sessionStorage.getItem("by") || task.by;
  $("instructions").textContent = task.instructions;
  const saves = task.kind === "spans" || task.several ? ", Enter saves" : "";
  $("help").textContent = HELP[task.kind] + saves + (task.kind === "edit" ? "." : ". S skips, U takes back what was said last.");
  $("save").classList.toggle("hidden", task.kind === "preference" || (task.kind === "classes" && !task.several));
  $("name").onsubmit = begin;
  $("save").onclick = save; $("skip").onclick = skip; $("undo").onclick = undo; $("undo2").onclick = undo; $("write").onclick = write;
  $("again").onclick = () => { again = true; act("next", {}); };
  $("words").onmousedown = grab;
  $("words").onmousemove = drag;
  document.addEventListener("keydown", pressed);
  $("by").select();
  document.body.dataset.ready = "0";
})();
