"use strict";
// One panel shows the details of a token: of the one under the pointer, or of the one that a click has opened.
// Whatever comes from the dataset is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const words = document.getElementById("text");
  const panel = document.getElementById("panel");
  const strip = document.getElementById("strip");
  const marker = document.getElementById("marker");
  const tokens = new Map([...words.querySelectorAll("[data-i]")].map((token) => [Number(token.dataset.i), token]));
  const stops = data.answer.map((position) => tokens.get(position)); // what the arrow keys stop at
  const place = new Map(data.strip.map((position, index) => [position, index]));
  const hint = panel.firstElementChild;
  let entry = stops[0]; // where the tab key comes in
  let shown = null;
  let isKept = false;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const bar = ([label, share, number, kind]) => {
    const row = element("div", `prediction ${kind}`);
    const track = element("div", "track");
    const fill = element("div", "fill");
    fill.style.width = `${100 * share}%`;
    track.append(fill);
    const name = element("span", "", label);
    name.title = label;
    row.append(name, track, element("span", "number", number));
    return row;
  };

  const facts = (pairs) => {
    const list = element("dl");
    for (const [name, value] of pairs) {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", value));
      list.append(pair);
    }
    return list;
  };

  const fill = (detail) => {
    const close = element("button", "", "×");
    close.id = "close";
    close.type = "button";
    close.title = "Close (Esc)";
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", release);
    panel.replaceChildren(close, element("h3", "", detail.token), element("p", "quiet", detail.place));
    if (detail.facts) panel.append(facts(detail.facts));
    for (const group of detail.groups ?? []) {
      if (group.title) panel.append(element("h4", "", group.title));
      panel.append(...group.bars.map(bar));
    }
  };

  const show = (token) => {
    shown?.classList.remove("open");
    shown = token;
    const position = Number(token.dataset.i);
    fill(data.details[position]);
    panel.classList.remove("idle");
    panel.classList.toggle("kept", isKept);
    token.classList.toggle("open", isKept);
    marker.hidden = !place.has(position);
    marker.style.left = `${(100 * (place.get(position) + 0.5)) / data.strip.length}%`;
  };

  const keep = (token) => {
    isKept = true;
    show(token);
  };

  const release = () => {
    if (panel.contains(document.activeElement)) entry.focus({ preventScroll: true });
    isKept = false;
    shown?.classList.remove("open");
    shown = null;
    marker.hidden = true;
    panel.className = "idle";
    panel.replaceChildren(hint);
  };

  const enterAt = (token) => {
    entry.tabIndex = -1;
    entry = token;
    entry.tabIndex = 0;
    entry.setAttribute("role", "button");
    entry.setAttribute("aria-describedby", "panel");
  };

  const goTo = (token) => {
    if (!token) return;
    enterAt(token);
    token.focus({ preventScroll: true });
    token.scrollIntoView({ block: "nearest" });
    keep(token);
    panel.parentElement.scrollTop = 0;
  };

  // The token of the line above (-1) or below (1) that lies nearest.
  const across = (token, step) => {
    const middle = (rect) => (rect.left + rect.right) / 2;
    const here = token.getBoundingClientRect();
    let line = null;
    let best = null;
    for (let i = stops.indexOf(token) + step; i >= 0 && i < stops.length; i += step) {
      const rect = stops[i].getBoundingClientRect();
      if (Math.abs(rect.bottom - here.bottom) < here.height / 2) continue;
      line ??= rect.bottom;
      if (Math.abs(rect.bottom - line) > here.height / 2) break;
      const away = Math.abs(middle(rect) - middle(here));
      if (!best || away < best.away) best = { away, token: stops[i] };
    }
    return best?.token;
  };

  const moves = {
    ArrowRight: (i) => stops[i + 1],
    ArrowLeft: (i) => stops[i - 1],
    ArrowDown: (i) => across(stops[i], 1),
    ArrowUp: (i) => across(stops[i], -1),
    Home: () => stops[0],
    End: () => stops.at(-1),
    Enter: (i) => stops[i],
    " ": (i) => stops[i],
  };

  const tokenOf = (event) => event.target.closest?.("[data-i]");

  words.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token && !isKept) show(token);
  });
  words.addEventListener("pointerleave", () => isKept || release());
  words.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token || getSelection().type === "Range") return; // text is being selected
    if (isKept && token === shown) release();
    else goTo(token);
  });
  words.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token && !isKept) show(token);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return release();
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const focused = document.activeElement.closest("[data-i]");
    const token = focused ?? (isKept ? shown : null);
    if (!token || (!focused && ["Enter", " "].includes(event.key))) return; // a button's, or the page's own
    event.preventDefault();
    const index = stops.indexOf(token);
    goTo(index < 0 ? stops[0] : moves[event.key](index));
  });
  strip.addEventListener("click", (event) => {
    const { left, width } = strip.getBoundingClientRect();
    const index = Math.min(data.strip.length - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * data.strip.length)));
    goTo(tokens.get(data.strip[index]));
  });
  document.getElementById("listed").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) goTo(tokens.get(Number(button.dataset.go)));
  });
  enterAt(stops[0]);
})();
