// One panel shows the details of a token: of the one under the pointer, or of the one that a click has opened.
// Whatever comes from the dataset is set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const words = document.getElementById("text");
const panel = document.getElementById("panel");
const strip = document.getElementById("strip");
const marker = document.getElementById("marker");
const tokens = new Map([...words.querySelectorAll("[data-i]")].map((token) => [Number(token.dataset.i), token]));
const stops = data.answer.map((position) => tokens.get(position)); // what the arrow keys stop at
const place = new Map(data.measured.map((position, index) => [position, index]));
const hint = panel.firstElementChild;
let entry = stops[0]; // where the tab key comes in
let shown = null;
let isKept = false;

const positionOf = (token) => Number(token.dataset.i);

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const bar = ([label, share, number, kind]) => {
  const row = element("div", `prediction ${kind}`);
  const track = element("div", "track");
  const filled = element("div", "fill");
  filled.style.width = `${100 * share}%`;
  track.append(filled);
  const name = element("span", "", label);
  name.title = label;
  row.append(name, track, element("span", "number", number));
  return row;
};

const facts = ([kind, ...values]) => {
  const list = element("dl");
  for (const [i, value] of values.entries()) {
    const name = data.facts[kind][i];
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    list.append(pair);
  }
  return list;
};

const closeButton = () => {
  const close = element("button", "", "×");
  close.id = "close";
  close.type = "button";
  close.title = "Close (Esc)";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", release);
  return close;
};

const placeLine = (text, position) => {
  const line = element("p", "quiet", text);
  if (place.has(position)) {
    const link = element("a", "", `#t=${place.get(position)}`);
    link.href = `#t=${place.get(position)}`;
    link.title = `A link to this ${data.noun}`;
    line.append(" ", link);
  }
  return line;
};

const fill = (detail, position) => {
  panel.replaceChildren(closeButton(), element("h3", "", detail.token), placeLine(detail.place, position));
  if (detail.facts) panel.append(facts(detail.facts));
  for (const group of detail.groups ?? []) {
    if (group.title) panel.append(element("h4", "", group.title));
    panel.append(...group.bars.map(bar));
  }
};

const show = (token) => {
  shown?.classList.remove("open");
  shown = token;
  const position = positionOf(token);
  fill(data.details[position], position);
  panel.classList.remove("idle");
  panel.classList.toggle("kept", isKept);
  token.classList.toggle("open", isKept);
  marker.hidden = !place.has(position);
  marker.style.left = `${(100 * (place.get(position) + 0.5)) / data.measured.length}%`;
};

const keep = (token) => {
  isKept = true;
  show(token);
  setLink(positionOf(token));
};

const release = () => {
  if (panel.contains(document.activeElement)) entry.focus({ preventScroll: true });
  if (isKept) setLink(null);
  isKept = false;
  shown?.classList.remove("open");
  shown = null;
  marker.hidden = true;
  panel.className = "idle";
  panel.replaceChildren(hint);
};
