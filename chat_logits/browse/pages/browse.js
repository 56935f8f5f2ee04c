// The list: every state is an address. Links work by themselves; this swaps the part of the page that they change.
const token = document.querySelector("meta[name=browse-token]").content;
const filters = document.getElementById("filters");
let asked = null;  // the request whose answer is waited for
let linesAsked = null;

const view = () => document.getElementById("view");

// Show the list of a query, as a new step of the history unless it only brings what is shown up to date.
async function show(query, {isNew = true, focus = null} = {}) {
  if (asked) asked.abort();
  const own = asked = new AbortController();
  view().setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(`/view?${query}`, {signal: own.signal});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const part = page.getElementById("view");
    if (own !== asked) return;
    if (!part) throw new Error(page.body.textContent.trim());
    if (isNew) history.pushState(null, "", query ? `/?${query}` : "/");
    const kept = focus || (view().contains(document.activeElement) ? document.activeElement.id : null);
    const isOpen = document.getElementById("out").open;
    view().replaceWith(document.adoptNode(part));
    document.getElementById("out").open = isOpen;
    prepare();
    fillMarks();
    if (typeof kept === "function") kept();
    else if (kept) document.getElementById(kept)?.focus({preventScroll: true});
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    if (own === asked) {
      asked = null;
      view().removeAttribute("aria-busy");
    }
  }
}

function complain(message) {
  let notice = view().querySelector(".notice.error");
  if (!notice) {
    notice = document.createElement("p");
    notice.className = "notice error";
    notice.role = "alert";
    view().querySelector(".bar").before(notice);
  }
  notice.textContent = message === "Failed to fetch" ? "The server does not answer: it may have been ended." : message;
}

function current() {
  return new URLSearchParams(view().dataset.query);
}

function prepare() {
  for (const plot of view().querySelectorAll(".hist")) place(plot);
  requestAnimationFrame(() => setTimeout(() => {  // once the list is drawn
    fillMarks();
    fillLines();
  }));
  document.body.dataset.shown = view().dataset.query;
  if (view().hasAttribute("data-wait")) setTimeout(() => asked || show(current().toString(), {isNew: false}), 500);
}

// --- the lines: question, sparkline and the least expected token of the rows that are shown ---

async function fillLines() {
  if (linesAsked) linesAsked.abort();
  const own = linesAsked = new AbortController();
  const rows = [...view().querySelectorAll("tr[data-row]")];
  try {
    for (let start = 0; start < rows.length; start += 10) {
      const some = rows.slice(start, start + 10);
      const answer = await fetch(`/lines?rows=${some.map(row => row.dataset.row)}`, {signal: own.signal});
      if (!answer.ok) throw new Error("These rows cannot be read now.");
      const lines = await answer.json();
      lines.forEach((line, i) => fillLine(some[i], line));
    }
    view().dataset.lines = "all";
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  }
}

function fillLine(row, line) {
  const link = row.querySelector(".question a"), spark = row.querySelector(".spark"), worst = row.querySelector(".worst");
  if (row.hasAttribute("data-bare")) link.textContent = line.question || "(no question)";
  if (!spark) return;
  if (line.fault) {
    worst.textContent = line.fault;
    worst.classList.add("fault");
    return;
  }
  const surprisal = line.surprisal ?? Infinity;  // null in JSON
  spark.replaceChildren(sparkline(line.bars.map(nats => nats ?? Infinity)));
  const place = document.createElement("a"), text = document.createElement("b"), before = document.createElement("bdi");
  const address = new URL(link.href);
  address.hash = `t=${line.at}`;
  place.href = address;
  place.title = `${line.before}${line.token}: ${natsText(surprisal, 2)} nats`;
  before.textContent = line.before;
  before.className = "context";
  text.textContent = line.token;
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = natsText(surprisal, 1);
  place.append(before, text, number);
  worst.replaceChildren(place);
}

function natsText(nats, digits) {
  return nats < 999.5 ? nats.toFixed(digits) : "∞";
}

// Bars of surprisal in nats, shaded as the tokens of a conversation are.
function sparkline(bars) {
  const bounds = [0.1, 0.5, 1, 2, 3, 5, 8], space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), paths = new Map();
  bars.forEach((nats, i) => {
    const shade = bounds.filter(bound => nats >= bound).length, height = 6 + 94 * Math.min(1, nats / 12);
    paths.set(shade, (paths.get(shade) || "") + `M${i} 100v${-height}h.8v${height}z`);
  });
  svg.setAttribute("viewBox", `0 0 ${bars.length} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `surprisal over the answer, up to ${natsText(Math.max(...bars), 1)} nats`);
  for (const [shade, path] of paths) {
    const drawn = document.createElementNS(space, "path");
    drawn.setAttribute("d", path);
    drawn.setAttribute("class", `bar${shade}`);
    svg.append(drawn);
  }
  return svg;
}

// --- histograms: a range between two thumbs, by drawing over the bars or with the arrow keys ---

function place(hist) {
  const bins = hist.dataset.edges.split(" ").length - 1;
  const low = Number(hist.dataset.low), high = Number(hist.dataset.high);
  const labels = hist.dataset.labels.split(" ");
  for (const [name, bin] of [["low", low], ["high", high]]) {
    const thumb = hist.querySelector(`.thumb.${name}`);
    thumb.style.left = `${100 * bin / bins}%`;
    thumb.setAttribute("aria-valuenow", bin);
    thumb.setAttribute("aria-valuetext", labels[bin]);
  }
  const brushed = hist.querySelector(".brushed");
  brushed.setAttribute("x", low);
  brushed.setAttribute("width", high - low);
  hist.classList.toggle("chosen", low > 0 || high < bins);
}

function brush(hist, low, high) {
  hist.dataset.low = low;
  hist.dataset.high = high;
  place(hist);
  const labels = hist.dataset.labels.split(" ");
  hist.querySelector(".span").textContent = `${labels[low]} – ${labels[high]}`;
}

function filterBy(hist, focus) {
  const edges = hist.dataset.edges.split(" "), query = current();
  const low = Number(hist.dataset.low), high = Number(hist.dataset.high), last = edges.length - 1;
  query.delete(hist.dataset.name);
  query.delete("page");
  if (low > 0 || high < last) {
    query.set(hist.dataset.name, `${low > 0 ? edges[low] : ""}..${high < last ? edges[high] : ""}`);
  }
  show(query.toString(), {focus});
}

document.addEventListener("pointerdown", event => {
  const sheet = document.getElementById("out");
  if (!sheet.contains(event.target)) sheet.open = false;
  const plot = event.target.closest(".plot");
  if (!plot || event.button) return;
  event.preventDefault();
  const hist = plot.closest(".hist"), box = plot.getBoundingClientRect(), bins = hist.dataset.edges.split(" ").length - 1;
  const at = x => Math.min(bins, Math.max(0, bins * (x - box.left) / box.width));
  const thumb = event.target.closest(".thumb"), start = at(event.clientX);
  const fixed = !thumb ? start : Number(thumb.matches(".low") ? hist.dataset.high : hist.dataset.low);
  thumb?.focus();
  const move = moved => {
    const ends = [fixed, at(moved.clientX)].sort((a, b) => a - b);
    const low = thumb ? Math.round(ends[0]) : Math.floor(ends[0]), high = thumb ? Math.round(ends[1]) : Math.ceil(ends[1]);
    brush(hist, low, Math.max(high, low < bins ? low + 1 : low));
  };
  const end = ended => {
    plot.removeEventListener("pointermove", move);
    plot.removeEventListener("pointerup", end);
    plot.removeEventListener("pointercancel", end);
    if (ended.type === "pointerup") {
      move(ended);
      filterBy(hist, thumb?.id);
    } else show(current().toString(), {isNew: false});
  };
  plot.setPointerCapture(event.pointerId);
  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerup", end);
  plot.addEventListener("pointercancel", end);
});

function moveThumb(thumb, key) {
  const hist = thumb.closest(".hist"), bins = hist.dataset.edges.split(" ").length - 1;
  let low = Number(hist.dataset.low), high = Number(hist.dataset.high);
  const isLow = thumb.matches(".low"), from = isLow ? low : high;
  const steps = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -5, PageUp: 5, Home: -bins, End: bins};
  if (key === "Escape") [low, high] = [0, bins];
  else if (!(key in steps)) return false;
  else if (isLow) low = Math.min(high - 1, Math.max(0, from + steps[key]));
  else high = Math.max(low + 1, Math.min(bins, from + steps[key]));
  brush(hist, low, high);
  filterBy(hist, thumb.id);
  return true;
}

// --- links, filters, history ---

document.addEventListener("click", event => {
  const link = event.target.closest("a[data-view]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.button) {
    event.preventDefault();
    show(new URL(link.href).search.slice(1)).then(fillFilters);
  }
  const button = event.target.closest("button.mark");
  if (button) markRow(button.closest("tr"));
  if (event.target.id === "summarize") post("/losses", token, {}).then(swapLosses, error => complain(error.message));
});

function applyFilters() {
  const query = current();
  for (const name of ["q", "where", "tag"]) query.set(name, filters[name].value);
  query.set("marked", filters.marked.checked ? "1" : "");
  const {least, most, of} = filters;
  query.set("role", least.value || most.value ? `${of.value}:${least.value}..${most.value}` : "");
  query.delete("page");
  for (const [name, value] of [...query]) if (!value) query.delete(name);
  if (query.toString() !== current().toString()) show(query.toString());
}

let typed = 0;
filters.addEventListener("submit", event => {
  event.preventDefault();
  applyFilters();
});
filters.addEventListener("input", event => {
  clearTimeout(typed);
  if (event.target.name !== "where") typed = setTimeout(applyFilters, 200);
});
filters.addEventListener("change", applyFilters);

function fillFilters() {
  const query = current();
  for (const name of ["q", "where", "tag"]) filters[name].value = query.get(name) || "";
  filters.marked.checked = query.get("marked") === "1";
  const [, role, least, most] = /^(.*):(.*)\.\.(.*)$/.exec(query.get("role") || "") || ["", "", "", ""];
  if (role) filters.of.value = role;
  filters.least.value = least;
  filters.most.value = most;
}

addEventListener("popstate", () => show(location.search.slice(1), {isNew: false}).then(fillFilters));
addEventListener("pageshow", event => event.persisted && show(location.search.slice(1), {isNew: false}));

// --- keys ---

const rowLinks = () => [...view().querySelectorAll("tr[data-row] .question a")];

function turn(name) {
  const link = view().querySelector(`.pager #${name}`);
  if (!link) return false;
  const place = {prev: -1, last: -1}[name] ?? 0;
  show(new URL(link.href).search.slice(1), {focus: () => rowLinks().at(place)?.focus()});
  return true;
}

document.addEventListener("keydown", event => {
  const sheet = document.getElementById("out");
  if (event.key === "Escape" && sheet.contains(event.target) && sheet.open) {
    sheet.open = false;
    sheet.querySelector("summary").focus();
    return;
  }
  if (isTyped(event)) {
    if (event.key === "Escape" && event.target.matches("#filters input") && event.target.value) {
      event.target.value = "";
      applyFilters();
    }
    return;
  }
  const thumb = event.target.closest(".thumb"), row = event.target.closest("tr[data-row]");
  const inList = row || event.target === document.body || event.target.id === "list";
  let isDone = false;
  if (thumb) isDone = moveThumb(thumb, event.key);
  else if (event.key === "/") {
    filters.q.focus();
    filters.q.select();
    isDone = true;
  } else if (event.key === "m" && row) {
    markRow(row);
    isDone = true;
  } else if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp" || event.key === "j" || event.key === "k")) {
    const links = rowLinks(), at = row ? links.indexOf(row.querySelector(".question a")) : -1;
    const isDown = event.key === "ArrowDown" || event.key === "j", next = at + (isDown ? 1 : -1);
    if (next >= links.length) isDone = turn("next");
    else if (next < 0) isDone = row ? turn("prev") : false;
    else {
      links[next].focus();
      isDone = true;
    }
  } else if (inList && !event.shiftKey) {
    const names = {PageDown: "next", PageUp: "prev", Home: "first", End: "last"};
    if (event.key in names) isDone = turn(names[event.key]);
  }
  if (isDone) event.preventDefault();
});

// --- marks, taking along, the summary ---

// The buttons that open a row's mark, which say what it is.
function fillMarks() {
  for (const row of view().querySelectorAll("tr[data-row]")) {
    const cell = row.querySelector(".marks");
    if (cell.querySelector("button")) continue;
    const button = document.createElement("button"), {note = ""} = cell.dataset;
    const tags = [...cell.querySelectorAll("i")].map(tag => tag.textContent);
    button.type = "button";
    button.id = `mark-${row.dataset.row}`;
    button.className = cell.hasChildNodes() ? "mark marked" : "mark";
    Object.assign(button.dataset, {note, tags: tags.join(", ")});
    button.setAttribute("aria-label", `Mark row ${row.dataset.row}`);
    button.title = note || "Note and tags (m)";
    button.disabled = !row.dataset.source;
    button.append(...(cell.hasChildNodes() ? cell.childNodes : ["+"]));
    cell.append(button);
  }
}

async function markRow(row) {
  fillMarks();
  const button = row.querySelector("button.mark"), id = button.id;
  if (button.disabled) return;
  const {note, tags} = button.dataset;
  const kept = await askMark(token, Number(row.dataset.source), `Row ${row.dataset.row}`, note, tags);
  const back = () => document.getElementById(id)?.closest("tr").querySelector(".question a").focus();
  if (!kept) return back();
  for (const tag of kept.tags) {
    if (![...filters.tag.options].some(option => option.value === tag)) filters.tag.add(new Option(tag, tag));
  }
  await show(current().toString(), {isNew: false, focus: back});
}

document.addEventListener("submit", async event => {
  if (event.target.id !== "save") return;
  event.preventDefault();
  const told = document.getElementById("saved");
  told.textContent = "Writing…";
  try {
    const answer = await post("/save", token, {folder: event.target.folder.value, query: view().dataset.query});
    told.textContent = (await answer.json()).told;
  } catch (error) {
    told.textContent = error.message;
  }
});

async function swapLosses(answer) {
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.getElementById("losses").replaceWith(document.adoptNode(page.getElementById("losses")));
  watchLosses();
}

function watchLosses() {
  if (!document.querySelector("#losses[data-wait]")) return;
  setTimeout(() => fetch("/losses").then(swapLosses, () => {}), 700);
}

prepare();
watchLosses();
