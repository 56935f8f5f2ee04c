// A token's address (#t=52), the conversation as text or JSON, and the conversations before and after.
const isAlone = location.protocol === "about:"; // in a notebook's frame, which has no address
const problem = document.getElementById("problem");
const copied = document.getElementById("copied");
const by_hand = document.getElementById("by_hand");

const setLink = (position) => {
  if (isAlone) return;
  const address = position !== null && place.has(position) ? `#t=${place.get(position)}` : location.pathname + location.search;
  if (location.hash !== address) history.replaceState(null, "", address);
};

const complain = (text) => {
  problem.textContent = text;
  problem.hidden = !text;
};

const openLink = () => {
  complain("");
  if (!location.hash) return;
  const last = data.measured.length - 1;
  const number = /^#t=(\d{1,9})$/.exec(location.hash)?.[1];
  if (number === undefined) return complain(`${location.hash.slice(0, 40)} is no link to a ${data.noun}; expected #t=0 to #t=${last}`);
  if (Number(number) > last) return complain(`There is no ${data.noun} ${number}: the extracted ones are 0 to ${last}`);
  goTo(tokens.get(data.measured[number]));
};

// --- copies ---

const lazy = () => JSON.parse(document.getElementById("numbers").textContent);

const entryOf = (column, i, texts) => {
  if (Array.isArray(column)) return column[i];
  if (column.values) return column.values[column.at[i]];
  const { probabilities, pairs } = column;
  return pairs[i].map(([token_id, code]) => ({ token_id, text: texts[token_id], probability: probabilities[code] }));
};

const rowOf = (columns, i, texts) =>
  Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, entryOf(column, i, texts)]));

const tokenOfRow = ({ columns, models, texts }, i) => {
  const row = rowOf(columns, i, texts);
  const token = { ...row, text: texts[row.token_id] };
  const isExtracted = row.status === "extracted";
  for (const [name, model] of Object.entries(models ?? {})) token[name] = isExtracted ? rowOf(model, i, texts) : null;
  if (models) return token;
  const isFinite = row.log_prob !== null; // null is −∞ where there is a number
  token.probability = isExtracted ? (isFinite ? Math.exp(row.log_prob) : 0) : null;
  token.surprisal = isFinite ? -row.log_prob : null;
  return token;
};

const asJson = () => {
  const numbers = lazy();
  if (numbers.spans) return `${JSON.stringify({ ...numbers.head, spans: numbers.spans }, null, 2)}\n`;
  const rows = numbers.columns.position.map((_, i) => tokenOfRow(numbers, i));
  return `${JSON.stringify({ ...numbers.head, tokens: rows }, null, 2)}\n`;
};

const copyByHand = (text) => {
  by_hand.value = text;
  by_hand.hidden = false;
  by_hand.select();
  if (document.execCommand("copy")) {
    by_hand.hidden = true;
    return true;
  }
  return false;
};

const copy = async (text, name) => {
  let isDone = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    isDone = copyByHand(text);
  }
  const size = text.length.toLocaleString("en");
  copied.textContent = isDone ? `${name} copied, ${size} characters` : "Not allowed to copy: the field has it, selected";
};

const closeCopied = () => {
  const wasOpen = !by_hand.hidden;
  by_hand.hidden = true;
  return wasOpen;
};

document.getElementById("copy_text").addEventListener("click", () => copy(lazy().text, "Text"));
document.getElementById("copy_json").addEventListener("click", () => copy(asJson(), "JSON"));

// --- the frame ---

document.addEventListener("keydown", (event) => {
  if (!isPlainKey(event) || isTyping(event)) return;
  if (event.key === "j") document.querySelector("a[rel=next]")?.click();
  if (event.key === "k") document.querySelector("a[rel=prev]")?.click();
});
addEventListener("hashchange", openLink);
openLink();
