// A conversation's mark, on its own page: beside the way back to the list.
const frame = document.getElementById("mine"), markButton = document.getElementById("mark");

async function mark() {
  const {source, note, tags, token} = frame.dataset;
  const kept = await askMark(token, Number(source), "Mark this conversation", note, tags);
  if (kept) {
    frame.dataset.note = kept.note;
    frame.dataset.tags = kept.tags.join(", ");
    markButton.classList.toggle("marked", Boolean(kept.note || kept.tags.length));
    markButton.replaceChildren(...(kept.tags.length ? kept.tags : ["Mark"]).map(text => {
      const part = document.createElement(kept.tags.length ? "i" : "span");
      part.textContent = text;
      return part;
    }));
    frame.querySelector(".note").textContent = kept.note;
  }
  markButton.focus();
}

document.querySelector("nav.frame")?.append(frame);
if (frame.dataset.source) markButton.addEventListener("click", mark);
else markButton.disabled = true;
document.addEventListener("keydown", event => {
  if (event.key === "m" && !isTyped(event) && !markButton.disabled) {
    event.preventDefault();
    mark();
  }
});
