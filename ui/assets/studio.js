// Keys, the clock of a judgement, and the list of shortcuts. Runs once, when the page has loaded.
() => {
  if (window.studio) return;
  const OFF = "lora-rlhf-keys-off";
  const began = {}, keys = {}, along = {};
  const start = (tab) => { began[tab] = performance.now(); keys[tab] = 0; };

  const typing = (node) => Boolean(node && node.closest("input, textarea, select, [contenteditable=true]")) &&
    !(node.type === "checkbox" || node.type === "radio" || node.type === "range" || node.type === "button");
  const on = () => { try { return localStorage.getItem(OFF) !== "1"; } catch { return true; } };

  window.studio = {
    // Whether a key is meant for the page: not while somebody types, holds Ctrl, or repeats it.
    wants: (event) => on() && !event.ctrlKey && !event.metaKey && !event.altKey && !event.repeat &&
      !event.defaultPrevented && !typing(event.target) && !document.querySelector("dialog[open]"),
    shown: (tab) => {
      if (!along[tab]) start(tab);
      along[tab] = false;
    },
    done: (tab) => {
      along[tab] = false;
      return JSON.stringify({
        ms: began[tab] ? Math.round(performance.now() - began[tab]) : null,
        keys: (keys[tab] || 0),
        device: matchMedia("(pointer: coarse)").matches ? "mobile" : "desktop",
      });
    },
  };

  const visible = (node) => node && node.isConnected && node.offsetParent !== null;
  const press = (id) => {
    const node = document.getElementById(id);
    const button = node && (node.matches("button") ? node : node.querySelector("button"));
    if (!visible(button) || button.disabled) return false;
    button.click();
    return true;
  };
  // By place on the keyboard for digits, so that French and German ones work too.
  const COMPARE = {
    Digit1: "cmp-a", Numpad1: "cmp-a", Digit2: "cmp-b", Numpad2: "cmp-b", Digit0: "cmp-tie", Numpad0: "cmp-tie",
    Digit9: "cmp-bad", Numpad9: "cmp-bad",
  };
  const SHIFTED = { Digit1: "cmp-a-much", Digit2: "cmp-b-much" };
  // Where prompts are drawn, the next one is drawn once this one is judged or skipped.
  const another = () => (visible(document.getElementById("cmp-another")) ? "cmp-another" : "cmp-next");
  const LETTERS = { s: () => "cmp-skip", u: () => "cmp-undo", n: another };

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      const dialog = document.querySelector("dialog[open]");
      if (!dialog && typing(event.target)) event.target.blur();
      return;
    }
    if (!window.studio.wants(event)) return;
    if (event.key === "?") { event.preventDefault(); help(); return; }
    if (event.key === "/") {
      const box = [...document.querySelectorAll("#chat-box textarea, #cmp-box textarea")].find(visible);
      if (box) { event.preventDefault(); box.focus(); }
      return;
    }
    if (!visible(document.getElementById("cmp-votes"))) return;
    keys.cmp = (keys.cmp || 0) + 1;
    const id = event.shiftKey ? SHIFTED[event.code] : COMPARE[event.code] || LETTERS[event.key.toLowerCase()]?.();
    if (id && press(id)) event.preventDefault();
  });

  // After Enter the box would keep the focus, and "1" would be typed into it instead of voting.
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && event.target.closest && event.target.closest("#cmp-box"))
      setTimeout(() => event.target.blur(), 0);
  });

  const SHORTCUTS = [
    ["Compare", [["1 / 2", "A or B is better"], ["Shift+1 / Shift+2", "much better"], ["0", "tie"], ["9", "both bad"], ["S", "skip"], ["U", "undo the saved vote"], ["N", "next held-out prompt, or ask both again"]]],
    ["Rank", [["A \u2026 I", "next best answer"], ["=", "tie with the one before"], ["Backspace", "take the last back"], ["Enter", "save (the last answer falls into place)"], ["X", "all bad"], ["S", "skip"], ["F", "flags (N where F is an answer)"], ["U", "undo the saved ranking"]]],
    ["Everywhere", [["/", "type a prompt"], ["Esc", "leave the field"], ["?", "this list"]]],
  ];
  function help() {
    let dialog = document.getElementById("studio-help");
    if (!dialog) {
      dialog = document.createElement("dialog");
      dialog.id = "studio-help";
      dialog.setAttribute("aria-label", "Keyboard shortcuts");
      const title = document.createElement("h2");
      title.textContent = "Keyboard shortcuts";
      dialog.append(title);
      for (const [name, rows] of SHORTCUTS) {
        const heading = document.createElement("h3");
        heading.textContent = name;
        const list = document.createElement("dl");
        for (const [key, what] of rows) {
          const dt = document.createElement("dt"), dd = document.createElement("dd"), kbd = document.createElement("kbd");
          kbd.textContent = key; dt.append(kbd); dd.textContent = what; list.append(dt, dd);
        }
        dialog.append(heading, list);
      }
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox"; box.checked = on();
      box.addEventListener("change", () => { try { localStorage.setItem(OFF, box.checked ? "0" : "1"); } catch { /* a private window forgets it */ } });
      label.append(box, document.createTextNode(" Single-key shortcuts are on"));
      const close = document.createElement("button");
      close.textContent = "Close"; close.className = "studio-close";
      close.addEventListener("click", () => dialog.close());
      dialog.append(label, close);
      dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
      document.body.append(dialog);
    }
    dialog.showModal();
  }
  document.addEventListener("click", (event) => {
    if (event.target.closest && event.target.closest("#studio-shortcuts")) help();
  });

  const region = (id, role) => {
    const node = document.createElement("div");
    node.id = id;
    node.setAttribute("role", role);
    document.body.append(node);
    return node;
  };
  // Screen readers read a change of what they know; status lines are made anew each time. Only
  // what has stood still for a moment is read, not every token.
  const live = region("studio-live", "status");
  // Who reads along while answers are written has read them when they end.
  let written = false;
  const readAlong = () => {
    const has = [...document.querySelectorAll("#cmp-answer-a, #cmp-answer-b")].some((node) => node.textContent.trim());
    if (has && !written) { start("cmp"); along.cmp = true; }
    written = has;
  };
  const served = () => (document.getElementById("studio-bar") || { dataset: {} }).dataset.server;
  const first = served();
  let settled = 0;
  new MutationObserver((changes) => {
    if (changes.every((change) => change.target === live)) return;
    readAlong();
    clearTimeout(settled);
    settled = setTimeout(() => {
      // What the old server knew of this page is gone; what waits for a vote is in the store.
      if (first && served() && served() !== first) location.reload();
      const line = [...document.querySelectorAll(".status")].find(visible);
      if (!lost && line && line.textContent !== live.textContent) live.textContent = line.textContent;
    }, 300);
  }).observe(document.body, { childList: true, subtree: true, characterData: true });

  // Gradio keeps to itself why a call that went around its queue was refused.
  const toast = region("studio-toast", "alert");
  let fading = 0;
  const complain = (sentence) => {
    const plain = new DOMParser().parseFromString(sentence, "text/html").body.textContent;
    if (plain !== toast.textContent) toast.textContent = plain;
    clearTimeout(fading);
    fading = setTimeout(() => { toast.textContent = ""; }, 8000);
  };
  // A server that is gone, or a proxy without one behind it. The page looks until it is back; what
  // happens then to a page that is older than the server, is told above.
  const ask = window.fetch, GONE = [502, 503, 504], AGAIN_MS = 1500;
  let lost = false;
  const lose = (is) => {
    if (is === lost) return;
    lost = is;
    document.body.classList.toggle("studio-lost", is);
    live.textContent = is ? "Connection lost. Trying again." : "Connected again.";
    if (is) look();
  };
  const look = () => setTimeout(() =>
    ask("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(4000) })
      .then((answer) => (GONE.includes(answer.status) ? look() : lose(false)), look), AGAIN_MS);
  window.fetch = async (...call) => {
    let answer;
    try { answer = await ask(...call); }
    catch (error) { if (error.name !== "AbortError") lose(true); throw error; }
    if (GONE.includes(answer.status)) lose(true);
    if (answer.status >= 400 && new URL(answer.url).pathname.endsWith("/run/predict"))
      answer.clone().json().then((told) => complain(told.error || told.detail || "That went wrong; the log of the server says why."), () => {});
    return answer;
  };

  // A reload comes back to the tab where it happened.
  const OPEN = "lora-rlhf-tab", TABS = '#studio-tabs [role="tab"]';
  const outer = (tab) => tab && tab.closest(".tabs").id === "studio-tabs";
  document.addEventListener("click", (event) => {
    const tab = event.target.closest && event.target.closest(TABS);
    try { if (outer(tab)) sessionStorage.setItem(OPEN, tab.textContent.trim()); } catch { /* a private window forgets it */ }
  });
  try {
    const before = sessionStorage.getItem(OPEN);
    const tab = [...document.querySelectorAll(TABS)].find((node) => outer(node) && node.textContent.trim() === before);
    if (tab) tab.click();
  } catch { /* it was not remembered */ }
  document.documentElement.lang = "en";
}
