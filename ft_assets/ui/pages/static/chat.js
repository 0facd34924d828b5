// Ask a question, and show each model's answer when it is there.
const form = document.getElementById("chat");
if (form) {
  const status = form.querySelector("[role=status]");
  const box = document.getElementById("answers");

  const made = (tag, text, name = "") => Object.assign(document.createElement(tag), {textContent: text, className: name});
  const send = async (path, body) => {
    const answer = await fetch(`/ft/chat/${path}`, body && {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.errors.map((error) => error.message).join("\n"));
    return found;
  };
  const show = (columns, state) => {
    columns.replaceChildren(...state.answers.map(({who, text}) => {
      const column = document.createElement("div");
      column.append(made("h3", who), made("p", text, "text"));
      return column;
    }));
    status.textContent = state.error || (state.done ? "" : `${state.note} …`);
  };
  const follow = async (columns, state) => {
    show(columns, state);
    while (!state.done) {
      await new Promise((resolve) => setTimeout(resolve, 400));
      const now = await send("answers");
      if (now.number !== state.number) throw new Error("another question was asked meanwhile");
      show(columns, state = now);
    }
  };

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const section = made("section", "", "card"), columns = made("div", "", "columns");
    section.append(made("h2", form.message.value, "text"), columns);
    form.ask.disabled = true;
    status.textContent = "…";
    try {
      const state = await send("ask", {
        base_model: form.dataset.baseModel, message: form.message.value, system: form.system.value,
      });
      box.prepend(section);
      form.stop.disabled = false;
      await follow(columns, state);
      if (!status.textContent) form.message.select();
    } catch (error) {
      status.textContent = error.message;
    }
    form.ask.disabled = false;
  });
  form.stop.addEventListener("click", async () => {
    try {
      await send("stop", {});
      form.stop.disabled = true;
      status.textContent = "stopped: the models have left the memory";
    } catch (error) {
      status.textContent = error.message;
    }
  });
  form.message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
}
