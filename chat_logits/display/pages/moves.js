// Ways through the tokens: the pointer, the arrow keys, the strip, the list.
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

// Whether keys are for what is typed into, or for a control that has its own use of them.
const isTyping = (event) => Boolean(event.target.closest?.("textarea, select, [contenteditable], input:not([type=radio], [type=range])"));
const isOnControl = (event) => Boolean(event.target.closest?.("input, textarea, select, summary"));
const isPlainKey = (event) => !(event.ctrlKey || event.metaKey || event.altKey || event.shiftKey);

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return closeCopied() || release();
  if (!moves[event.key] || !isPlainKey(event) || isOnControl(event)) return;
  const focused = document.activeElement.closest("[data-i]");
  const token = focused ?? (isKept ? shown : null);
  if (!token || (!focused && ["Enter", " "].includes(event.key))) return; // a button's, or the page's own
  event.preventDefault();
  const index = stops.indexOf(token);
  goTo(index < 0 ? stops[0] : moves[event.key](index));
});
strip.addEventListener("click", (event) => {
  const { left, width } = strip.getBoundingClientRect();
  const share = (event.clientX - left) / width;
  const index = Math.min(data.measured.length - 1, Math.max(0, Math.floor(share * data.measured.length)));
  goTo(tokens.get(data.measured[index]));
});
document.getElementById("listed").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // to be opened elsewhere
  event.preventDefault();
  goTo(tokens.get(Number(link.dataset.go)));
});
enterAt(stops[0]);
