// Which number shades the tokens, and the threshold below which there is no shade.
const legend = document.getElementById("legend");
const slider = document.getElementById("threshold");
const told = document.getElementById("told");
const found = document.getElementById("found");
const line = document.getElementById("line");
const measured = data.measured.map((position) => tokens.get(position));
const thresholds = data.measures.map((measure) => measure.start); // the stop at which each measure's stands
let chosen = 0;

const measure = () => data.measures[chosen];
const threshold = () => measure().stops[thresholds[chosen]];
const shadesNow = () => {
  const { values, shades } = measure();
  const [least] = threshold();
  return values.map((value, i) => (value >= least ? `s${shades[i]}` : "s0"));
};
let drawn = shadesNow(); // as the page comes

const drawTokens = () => {
  const wanted = shadesNow();
  measured.forEach((token, i) => wanted[i] === drawn[i] || token.classList.replace(drawn[i], wanted[i]));
  drawn = wanted;
};

const tell = () => {
  const { values, unit } = measure();
  const [least, label, height] = threshold();
  const above = values.filter((value) => value >= least).length;
  const text = `${label}${unit && ` ${unit}`}`;
  told.textContent = `${text}: ${above.toLocaleString("en")} of ${values.length.toLocaleString("en")} ${data.noun}s`;
  slider.setAttribute("aria-valuetext", told.textContent);
  line.style.setProperty("--height", 0.0097 * height);
  line.hidden = !thresholds[chosen];
  found.textContent = "";
};

const drawStrip = () => {
  const { strip: drawing, name, title, legend: scale } = measure();
  const picture = strip.querySelector("svg");
  picture.setAttribute("aria-label", `${name} over the answer`);
  picture.replaceChildren(
    ...drawing.paths.map(([shade, path]) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
      made.setAttribute("class", `bar${shade}`);
      made.setAttribute("d", path);
      return made;
    }),
  );
  strip.title = `${name} of each ${data.noun} of the answer; a click goes there`;
  document.getElementById("top").textContent = drawing.top;
  document.getElementById("named").textContent = title;
  legend.replaceChildren(...scale.map(([label, shade]) => element("span", `s${shade}`, label)));
};

const choose = (number) => {
  chosen = number;
  slider.max = measure().stops.length - 1;
  slider.value = thresholds[chosen];
  drawStrip();
  drawTokens();
  tell();
};

// The next (1) or previous (-1) token that is not below the threshold, from the one that is open or has the focus.
const goToAbove = (step) => {
  const { values } = measure();
  const [least] = threshold();
  const here = document.activeElement.closest("[data-i]") ?? (isKept ? shown : null);
  const at = here ? positionOf(here) : -1;
  const above = data.measured.filter((_, i) => values[i] >= least);
  const index = step > 0 ? above.findIndex((position) => position > at) : above.findLastIndex((position) => position < at);
  if (index < 0) {
    found.textContent = step > 0 ? "No more of them after this." : "No more of them before this.";
    return;
  }
  goTo(tokens.get(above[index]));
  found.textContent = `${index + 1} of ${above.length}`;
};

document.getElementById("measures").addEventListener("change", (event) => choose(Number(event.target.value)));
slider.addEventListener("input", () => {
  thresholds[chosen] = Number(slider.value);
  drawTokens();
  tell();
});
document.getElementById("after").addEventListener("click", () => goToAbove(1));
document.getElementById("before").addEventListener("click", () => goToAbove(-1));
document.addEventListener("keydown", (event) => {
  if (!isPlainKey(event) || isTyping(event)) return;
  if (event.key === "n") goToAbove(1);
  if (event.key === "p") goToAbove(-1);
});
// What a browser kept of the controls when the page was loaded again is what it shows.
thresholds[0] = data.measures[0].start;
for (const radio of document.querySelectorAll("#measures input")) radio.checked = radio.value === "0";
slider.value = thresholds[0];
tell();
