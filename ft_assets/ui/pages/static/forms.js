// Send forms that have data-post as JSON, because the guard accepts no other change.
for (const form of document.querySelectorAll("form[data-post]")) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const status = form.querySelector("[role=status]");
    const show = (text) => { if (status) status.textContent = text; };
    const fields = Object.fromEntries(new FormData(form, event.submitter));
    for (const button of form.querySelectorAll("button")) button.disabled = true;
    show("…");
    try {
      const answer = await fetch(form.getAttribute("action"), {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify(fields),
      });
      const found = await answer.json();
      if (!answer.ok) show(found.errors.map((error) => error.message).join("\n"));
      else if (found.location) location.assign(found.location);
      else location.reload();
    } catch (error) {
      show(`no answer from the server: ${error.message}`);
    }
    for (const button of form.querySelectorAll("button")) button.disabled = false;
  });
}
