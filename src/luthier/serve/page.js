"use strict";
const at = id => document.getElementById(id);
const panes = [];
let stopping = null;

function make(kind, parent, text = "", name = "") {
  const made = document.createElement(kind);
  made.textContent = text;  // never as HTML: what a model says is text
  if (name) made.className = name;
  parent.append(made);
  return made;
}

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function problemOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function load() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (answer.status === 401) {
    at("keyed").hidden = false;
    at("problem").textContent = "This server wants a key.";
    return;
  }
  const models = (await answer.json()).data.filter(model => model.does.includes("chat"));
  at("problem").textContent = models.length ? "" : "None of the models here chats.";
  for (const side of ["left", "right"]) {
    at(side).replaceChildren();
    if (side === "right") make("option", at(side), "none").value = "";
    for (const model of models) make("option", at(side), model.id).value = model.id;
  }
  const tuned = models.find(model => model.base);
  if (tuned) {  // base against tuned
    at("left").value = tuned.base;
    at("right").value = tuned.id;
  }
  begin();
}

function begin() {
  if (stopping) stopping.abort();
  panes.length = 0;
  at("panes").replaceChildren();
  for (const side of ["left", "right"]) {
    const model = at(side).value;
    if (!model) continue;
    const box = make("section", at("panes"));
    box.dataset.model = model;
    make("h2", box, model);
    panes.push({ model, box, turns: [] });
  }
}

async function answer(pane, signal) {
  const system = at("system").value.trim();
  const body = {
    model: pane.model, stream: true, stream_options: { include_usage: true },
    messages: [...(system ? [{ role: "system", content: system }] : []), ...pane.turns],
    temperature: Number(at("temperature").value), max_tokens: Number(at("most").value),
  };
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  const shown = make("div", pane.box, "", "turn assistant");
  const told = make("div", pane.box, "...", "told");
  const started = performance.now();
  let text = "", said = 0, reason = "stopped";
  try {
    const got = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!got.ok) throw new Error(await problemOf(got));
    const reader = got.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        if (event.usage) said = event.usage.completion_tokens;
        for (const choice of event.choices) {
          text += choice.delta.content ?? "";
          reason = choice.finish_reason ?? reason;
        }
        shown.textContent = text;
        pane.box.scrollTop = pane.box.scrollHeight;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reason = "failed";
      at("problem").textContent = error.message;
    }
  }
  const seconds = (performance.now() - started) / 1000;
  told.textContent = `${reason}${said ? `, ${said} tokens` : ""}, ${seconds.toFixed(1)} s`;
  if (text) pane.turns.push({ role: "assistant", content: text });
  else pane.turns.pop();
}

async function send() {
  const question = at("question").value.trim();
  if (!question || stopping || !panes.length) return;
  at("question").value = "";
  at("problem").textContent = "";
  stopping = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  for (const pane of panes) {
    pane.turns.push({ role: "user", content: question });
    make("div", pane.box, question, "turn user");
  }
  const { signal } = stopping;
  await Promise.all(panes.map(pane => answer(pane, signal)));
  stopping = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("question").focus();
}

at("ask").addEventListener("submit", event => { event.preventDefault(); send(); });
at("question").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
at("stop").addEventListener("click", () => stopping?.abort());
at("clear").addEventListener("click", begin);
at("left").addEventListener("change", begin);
at("right").addEventListener("change", begin);
at("key").addEventListener("change", load);
load();
