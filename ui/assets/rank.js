// The ranking sheet. Everything a model or a person wrote goes in by textContent.
// Order is a list of tie groups of letters, best first; Python checks it again.
const state = { task: null, order: [], tie: false, flags: new Set(), panel: false, keys: 0, at: 0, sent: false, note: "" };

function el(tag, cls, text, attrs) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attrs || {})) node.setAttribute(key, value);
  return node;
}
const root = () => element.querySelector(".rk");
const sheet = () => props.value || {};
const letters = () => (sheet().answers || []).map((a) => a.letter);
const named = () => state.order.flat();
const left = () => letters().filter((l) => !named().includes(l));

// What Enter would send: the last answer falls into place by itself.
function filled() {
  const rest = left();
  if (rest.length === 1 && state.order.length) return [...state.order, rest];
  return rest.length ? null : state.order;
}
function rankOf(letter) {
  const order = filled() || state.order;
  let rank = 1;
  for (const group of order) {
    if (group.includes(letter)) return { rank, tied: group.length > 1, sure: named().includes(letter) };
    rank += group.length;
  }
  return null;
}

function place(letter) {
  if (!left().includes(letter)) return;
  if (state.tie && state.order.length) state.order[state.order.length - 1].push(letter);
  else state.order.push([letter]);
  state.tie = false;
  draw();
}
function take(letter) {
  state.order = state.order.map((g) => g.filter((l) => l !== letter)).filter((g) => g.length);
  state.tie = false;
  draw();
}
function back() {
  const last = state.order[state.order.length - 1];
  if (state.tie) state.tie = false;
  else if (last) {
    last.pop();
    if (!last.length) state.order.pop();
  }
  draw();
}
function insert(letter, index, join) {
  const target = join ? state.order[index] : null;
  state.order = state.order.map((g) => g.filter((l) => l !== letter));
  if (target) state.order[index].push(letter);
  else state.order.splice(index, 0, [letter]);
  state.order = state.order.filter((g) => g.length);
  draw();
}

function send(outcome) {
  if (!state.task || state.sent) return;
  const order = outcome === "decided" ? filled() : [];
  if (outcome === "decided" && !order) {
    say("Rank all answers first: " + left().join(", ") + " left.");
    return;
  }
  state.sent = true;
  draw();
  trigger("submit", {
    task: state.task, order, outcome, flags: [...state.flags], note: state.note, keys: state.keys,
    ms: Math.round(performance.now() - state.at),
    device: matchMedia("(pointer: coarse)").matches ? "mobile" : "desktop",
  });
  // Should the answer be lost, the sheet must not stay locked.
  setTimeout(() => { if (state.sent) { state.sent = false; draw(); } }, 4000);
}
function say(text) {
  const line = element.querySelector(".rk-status");
  if (line) { line.textContent = text; line.className = "rk-status status"; }
}

const ACTIONS = [
  ["=", "Tie", "= tie with the one before", () => { if (state.order.length) { state.tie = !state.tie; draw(); } }],
  ["\u232b", "Back", "Backspace: take the last one back", back],
  ["X", "All bad", "X: all are bad", () => send("both_bad")],
  ["S", "Skip", "S: skip this task", () => send("skip")],
  ["flag", "Flag", "flags", () => { state.panel = !state.panel; draw(); }],
  ["U", "Undo", "U: take the saved ranking back", () => { if (sheet().undo) trigger("undo"); }],
];

function card(answer) {
  const rank = rankOf(answer.letter);
  const label = rank ? `${rank.rank}${rank.tied ? " =" : ""}` : "";
  const says = rank ? `, rank ${rank.rank}${rank.tied ? ", tied" : ""}` : ", not ranked";
  const node = el("button", "rk-card" + (rank ? " ranked" : "") + (rank && !rank.sure ? " implied" : ""), undefined, {
    type: "button", draggable: "true", "data-letter": answer.letter, "aria-pressed": String(Boolean(rank && rank.sure)),
    "aria-label": `Answer ${answer.letter}${says}: ${answer.text}`,
  });
  const head = el("span", "rk-head");
  head.append(el("span", "rk-letter", answer.letter), el("span", "rk-rank", label));
  node.append(head, el("span", "rk-text", answer.text));
  if (answer.note) node.append(el("span", "rk-note", answer.note));
  node.addEventListener("click", () => { state.keys += 1; named().includes(answer.letter) ? take(answer.letter) : place(answer.letter); });
  node.addEventListener("dragstart", (e) => { e.dataTransfer.setData("text/plain", answer.letter); e.dataTransfer.effectAllowed = "move"; });
  return node;
}
function gap(index) {
  const node = el("span", "rk-gap", index ? ">" : "", { "data-gap": index });
  droppable(node, (letter) => insert(letter, index, false));
  return node;
}
function droppable(node, drop) {
  node.addEventListener("dragover", (e) => { e.preventDefault(); node.classList.add("over"); });
  node.addEventListener("dragleave", () => node.classList.remove("over"));
  node.addEventListener("drop", (e) => {
    e.preventDefault();
    const letter = e.dataTransfer.getData("text/plain");
    if (letters().includes(letter)) { state.keys += 1; drop(letter); }
  });
}
function strip() {
  const node = el("div", "rk-strip", undefined, { role: "group", "aria-label": "Order, best first" });
  node.append(el("span", "rk-best", "best"));
  const order = state.order;
  node.append(gap(0));
  order.forEach((group, index) => {
    const box = el("span", "rk-group" + (group.length > 1 ? " tied" : ""));
    group.forEach((letter, i) => {
      if (i) box.append(el("span", "rk-eq", "="));
      const chip = el("button", "rk-chip", letter, { type: "button", draggable: "true", "data-chip": letter, "aria-label": `Take ${letter} out of the order` });
      chip.addEventListener("click", () => take(letter));
      chip.addEventListener("dragstart", (e) => e.dataTransfer.setData("text/plain", letter));
      box.append(chip);
    });
    droppable(box, (letter) => insert(letter, index, true));
    node.append(box, gap(index + 1));
  });
  const rest = left();
  if (state.tie) node.append(el("span", "rk-eq pending", "= ?"));
  if (rest.length === 1 && order.length) node.append(el("span", "rk-chip implied", rest[0]));
  else if (rest.length) node.append(el("span", "rk-rest", order.length ? rest.join(" ") + " left" : "press letters, tap or drag, best first"));
  return node;
}
// With six answers F is one of them.
const flagKey = () => (letters().includes("F") ? "N" : "F");

function actions() {
  const node = el("div", "rk-actions");
  for (const [name, label, says, act] of ACTIONS) {
    const flags = name === "flag", key = flags ? flagKey() : name, title = flags ? `${key}: ${says}` : says;
    const pressed = (key === "=" && state.tie) || (flags && (state.panel || state.flags.size));
    const button = el("button", "rk-action" + (pressed ? " on" : ""), undefined, { type: "button", title, "data-key": key });
    button.append(el("kbd", "", key), el("span", "", label + (flags && state.flags.size ? ` (${state.flags.size})` : "")));
    button.disabled = key === "U" ? !sheet().undo : !state.task || state.sent;
    button.addEventListener("click", () => { state.keys += 1; act(); });
    node.append(button);
  }
  const save = el("button", "rk-action primary", undefined, { type: "button", title: "Enter: save", "data-key": "Enter" });
  save.append(el("kbd", "", "\u23ce"), el("span", "", "Save"));
  save.disabled = !state.task || state.sent || !filled();
  save.addEventListener("click", () => { state.keys += 1; send("decided"); });
  node.prepend(save);
  return node;
}
function flagPanel() {
  const node = el("fieldset", "rk-flags");
  node.append(el("legend", "", "Flags for this task"));
  for (const flag of props.flags || []) {
    const label = el("label", "");
    const box = el("input", "", undefined, { type: "checkbox", value: flag.name });
    box.checked = state.flags.has(flag.name);
    box.addEventListener("change", () => { box.checked ? state.flags.add(flag.name) : state.flags.delete(flag.name); });
    label.append(box, document.createTextNode(" " + flag.label));
    node.append(label);
  }
  const note = el("input", "rk-note-box", undefined, { type: "text", maxlength: "2000", placeholder: "A note (optional)", "aria-label": "A note" });
  note.value = state.note;
  note.addEventListener("input", () => { state.note = note.value; });
  node.append(note);
  return node;
}

function draw() {
  const data = sheet(), host = root();
  if (!host) return;
  if (data.task !== state.task) {
    Object.assign(state, { task: data.task, order: [], tie: false, panel: false, keys: 0, note: "", at: performance.now(), sent: false });
    state.flags.clear();
  }
  const focused = focusedIn(host);
  host.replaceChildren();
  const top = el("div", "rk-top");
  // What lay ready when this was drawn; more is made meanwhile, so that none is not worth telling.
  const ready = data.task && data.ready ? `${data.ready} more ready` : "";
  top.append(el("span", "rk-tally", data.tally || ""), el("span", "rk-ready", ready));
  host.append(top);
  if (data.task) {
    host.append(el("div", "prompt", data.prompt, { id: "rank-prompt" }), strip());
    const cards = el("div", data.answers.length === 4 ? "rk-cards rk-four" : "rk-cards");
    for (const answer of data.answers) cards.append(card(answer));
    host.append(cards);
  } else {
    const wait = el("div", "rk-wait");
    if (!data.failed) wait.append(el("span", "rk-spin", "", { "aria-hidden": "true" }));
    wait.append(el("span", "", data.tone && !data.failed ? "The next answers are being made." : data.status));
    host.append(wait);
  }
  host.append(actions());
  if (state.panel) host.append(flagPanel());
  const mark = { good: "\u2713 ", bad: "! " }[data.tone] || "";
  const said = data.task && !data.tone && filled() ? "All are placed. Enter saves." : data.status || "";
  host.append(el("div", "rk-status status " + (data.tone || ""), data.task || data.tone ? mark + said : ""));
  if (data.reveal) host.append(...revealed(data.reveal));
  const again = focused && host.querySelector(focused);
  if (again) again.focus();
}
// Its letters are not those of the cards above.
function revealed(before) {
  const list = el("ul", "rk-reveal", undefined, { "aria-labelledby": "rank-before" });
  for (const [place, text] of before.lines) {
    const line = el("li", "");
    if (place) line.append(el("span", "rk-place", place));
    line.append(el("span", "", text));
    list.append(line);
  }
  return [el("p", "rk-before", before.title, { id: "rank-before" }), list];
}
// What somebody at the keyboard had the focus on, to give it back after drawing. After a click it
// stays away, so that Enter saves and does not press the same button again.
function focusedIn(host) {
  const node = document.activeElement;
  if (!host.contains(node) || !node.matches(":focus-visible")) return "";
  for (const name of ["data-letter", "data-key", "data-chip"])
    if (node.hasAttribute(name)) return `[${name}="${CSS.escape(node.getAttribute(name))}"]`;
  return "";
}

function onKey(event) {
  if (!element.isConnected || element.offsetParent === null) return;
  if (!window.studio || !window.studio.wants(event)) return;
  const key = event.key.length === 1 ? event.key.toUpperCase() : event.key;
  const act = () => { event.preventDefault(); state.keys += 1; };
  if (key === "U") { act(); if (sheet().undo) trigger("undo"); return; }
  if (!state.task || state.sent) return;
  if (letters().includes(key)) { act(); place(key); }
  else if (key === "=") { act(); if (state.order.length) { state.tie = !state.tie; draw(); } }
  else if (key === "Backspace") { act(); back(); }
  else if (key === "Enter") { if (saves(event.target)) { act(); send("decided"); } }
  else if (key === "X") { act(); send("both_bad"); }
  else if (key === "S") { act(); send("skip"); }
  else if (key === flagKey()) { act(); state.panel = !state.panel; draw(); }
}
// Enter on an answer saves, which Space chooses; on anything else that it presses, it presses that.
function saves(target) {
  const control = target.closest && target.closest("button, a, input, select, summary, [role=tab], [role=button], [tabindex]");
  return !control || control.matches('.rk-card, .rk-chip, [role="tab"][aria-selected="true"]');
}
document.addEventListener("keydown", onKey);
watch("value", draw);
draw();
