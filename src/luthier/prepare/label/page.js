"use strict";
// The labelling page. What rows say is put into the page as text only, never as markup.
const $ = (id) => document.getElementById(id);
const KEYS = "1234567890qwertyiopdfghjklzxvbnm"; // of labels, in order; those of actions (u, s, a, c) are not among them
const LONG = 100000; // characters of a text that are shown at once
const RUN = 1000; // letters without a blank, after which a line may break: browsers take minutes to lay out more
const LEFTWARD = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}\p{Script=Adlam}]/u;
let onward = []; // for each word, the step to the right
let cells = []; // of a row of words: {gap, word, drawn}, in order
let task = null, row = null, by = "", chosen = [], spans = [], at = 0, from = 0, busy = false, again = false, since = 0;

async function ask(what, body) {
  const answer = await fetch("api/" + what, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify({by, ...body}),
  });
  const told = await answer.json();
  if (answer.status === 404) throw new Error("This address is of a server that has ended; open the one that the new server printed.");
  if (!answer.ok) throw Object.assign(new Error(told.error || answer.statusText), {state: answer.status});
  return told;
}

// One request at a time: keys pressed while one is on its way would be meant for another row.
async function act(what, body) {
  if (busy) return;
  busy = true;
  $("problem").textContent = "";
  try { show(await ask(what, {again, seconds: (performance.now() - since) / 1000, ...body})); }
  catch (error) {
    if (error.state === 409) await ask("next", {again}).then(show, () => {}); // said in another window
    $("problem").textContent = error instanceof TypeError ? "The server cannot be reached; nothing of this was kept. Start it again: it goes on where it stood." : error.message;
  }
  finally { busy = false; document.body.dataset.ready = String(Date.now()); }
}

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function broken(said) { // as it is, with places where long runs of letters may break
  const parts = said.split(new RegExp(`(\\S{${RUN}})`, "u")).filter(Boolean);
  return parts.flatMap((part) => part.length >= RUN ? [part, element("wbr", {})] : [part]);
}

function text(role, said) {
  const shown = element("div", {className: "said"}, ...broken(said.length > LONG ? said.slice(0, LONG) : said));
  const made = element("div", {className: "text"}, element("span", {className: "role", textContent: role}), shown);
  if (said.length > LONG) {
    const rest = element("button", {type: "button", className: "rest", textContent: `Show the other ${(said.length - LONG).toLocaleString("en")} characters`});
    rest.onclick = () => { shown.replaceChildren(...broken(said)); rest.remove(); };
    made.append(rest);
  }
  return made;
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
  onward = directions(row.words);
  cells = row.words.map(([gap, word], i) => {
    const made = {gap: gap ? element("span", {}, ...broken(gap)) : null, word: element("span", {className: "word"}, ...broken(word)), drawn: ""};
    made.word.dataset.at = i;
    if (gap) made.gap.dataset.gap = i;
    return made;
  });
  $("words").replaceChildren(...cells.flatMap((one) => one.gap ? [one.gap, one.word] : [one.word]), ...broken(row.tail));
  $("choices").replaceChildren(...task.labels.map((name, i) => button(name, KEYS[i], () => tag(name))), button("no entity", "backspace", untag));
  drawWords();
}

function drawWords() { // what has changed only: rows can have tens of thousands of words
  const [low, high] = [Math.min(from, at), Math.max(from, at)];
  const of = new Map();
  for (const one of spans) for (let i = one[0]; i <= one[1]; i++) of.set(i, one);
  cells.forEach((cell, i) => {
    const span = of.get(i), last = span && i === span[1];
    const names = ["word", span && "inside", i >= low && i <= high && "chosen", i === at && "at"].filter(Boolean).join(" ");
    const before = span && i > span[0] ? "word inside" : "";
    const drawn = JSON.stringify([names, before, last && span[2]]);
    if (drawn === cell.drawn) return;
    cell.drawn = drawn;
    cell.word.className = names;
    if (cell.gap) cell.gap.className = before;
    cell.word.querySelector(".tag")?.remove();
    if (last) cell.word.append(element("span", {className: "tag", textContent: span[2]}));
  });
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
  cells[at].word.scrollIntoView({block: "nearest"});
}

function directions(words) { // of each word: 1, or -1 in a paragraph whose first letter is of a script that runs to the left
  const made = [];
  let first = 0, sign = 0;
  words.forEach(([gap, word], i) => {
    if (gap.includes("\n")) [first, sign] = [i, 0];
    const letter = sign ? null : word.match(/\p{L}/u);
    if (letter) made.fill(sign = LEFTWARD.test(letter[0]) ? -1 : 1, first);
    made[i] = sign || 1;
  });
  return made;
}

function nearest(event) { // the word under the mouse, else the one closest to it
  const under = document.elementFromPoint(event.clientX, event.clientY)?.closest("#words span[data-at], #words span[data-gap]");
  if (under && under.dataset.at) return Number(under.dataset.at);
  const gap = under && Number(under.dataset.gap);
  let found = 0, least = Infinity;
  for (const {word: one} of under ? cells.slice(Math.max(0, gap - 1), gap + 1) : cells) {
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
  if (task.kind === "edit") { // a text field has its own line breaks; what was not changed stays as it was
    const was = row.before || "", now = $("edited").value;
    return act("label", {row: row.row, label: now === was.replace(/\r\n?/g, "\n") ? was : now});
  }
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
    if (key === "arrowright" || key === "arrowleft") return move(key === "arrowright" ? onward[at] : -onward[at], event.shiftKey), true;
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
