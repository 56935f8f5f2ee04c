// The dialog in which a conversation gets its note and tags, on any page of the server.
const dialog = document.getElementById("marking"), markForm = dialog.querySelector("form");
const complaint = dialog.querySelector(".error");

// Ask for a mark, and keep it: resolves to what is kept, or to null where it is left as it was.
function askMark(token, sourceIndex, title, note, tags) {
  dialog.querySelector("h2").textContent = title;
  markForm.note.value = note;
  markForm.tags.value = tags;
  complaint.hidden = true;
  dialog.returnValue = "cancel";
  dialog.showModal();
  markForm.note.focus();
  return new Promise(resolve => {
    const save = async event => {
      if (event.submitter && event.submitter.value === "cancel") return;
      event.preventDefault();
      const names = markForm.tags.value.split(",").map(name => name.trim()).filter(Boolean);
      const content = {source_index: sourceIndex, note: markForm.note.value, tags: names};
      try {
        const kept = await post("/marks", token, content);
        finish(await kept.json());
        dialog.close();
      } catch (error) {
        complaint.textContent = error.message;
        complaint.hidden = false;
      }
    };
    const finish = kept => {
      markForm.removeEventListener("submit", save);
      dialog.removeEventListener("close", left);
      resolve(kept);
    };
    const left = () => finish(null);
    markForm.addEventListener("submit", save);
    dialog.addEventListener("close", left);
  });
}

markForm.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    markForm.requestSubmit(markForm.querySelector("[value=save]"));
  }
  event.stopPropagation();
});

async function post(path, token, content) {
  const answer = await fetch(path, {
    method: "POST", body: JSON.stringify(content), headers: {"content-type": "application/json", "x-browse-token": token},
  });
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}

// Whether a key is typed into something, or meant for the browser.
function isTyped(event) {
  const at = event.target;
  return event.ctrlKey || event.metaKey || event.altKey || dialog.open || event.defaultPrevented
    || at.matches("input:not([type=checkbox]), textarea, select") || at.isContentEditable;
}
