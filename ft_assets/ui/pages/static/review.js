// Rank answers by keys: numbers from the best to the worst. The last answer needs no key.
const form = document.getElementById("review");
if (form) {
  const status = form.querySelector("[role=status]");
  const picks = [...form.querySelectorAll("[data-pick]")];
  const rank = picks.map(() => 0);
  let level = 0, same = false, sending = false;

  const send = async (path, more) => {
    if (sending) return;
    sending = true;
    const {baseModel, reviewer} = form.dataset;
    try {
      const answer = await fetch(`/ft/review/${path}`, {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify({base_model: baseModel, reviewer, ...more}),
      });
      if (answer.ok) return location.reload();
      status.textContent = (await answer.json()).errors.map((error) => error.message).join("\n");
    } catch (error) {
      status.textContent = `no answer from the server: ${error.message}`;
    }
    sending = false;
    clear();
  };
  const clear = () => { rank.fill(0); level = 0; same = false; show(); };
  const show = () => picks.forEach((button, place) => {
    button.querySelector(".rank").textContent = rank[place] ? `rank ${rank[place]}` : "";
    button.closest("li").classList.toggle("picked", rank[place] > 0);
  });
  const finish = () => {
    const {key, seal} = form.dataset;
    send("judge", {key, seal, ranks: rank, correction: form.correction.value, reason: form.reason.value});
  };
  const pick = (place) => {
    if (place >= rank.length || rank[place] || sending) return;
    if (!same) level += 1;
    same = false;
    rank[place] = level;
    status.textContent = "";
    show();
    const left = rank.flatMap((one, index) => (one ? [] : [index]));
    if (left.length === 1) rank[left[0]] = level + 1;
    if (left.length <= 1) { show(); finish(); }
  };
  const write = (name) => {
    for (const one of form.querySelectorAll(".more")) if (one.querySelector(`[name=${name}]`)) one.hidden = false;
    form.querySelector(".more ~ .soft").hidden = false;
    form[name].focus();
  };
  const act = {
    tie: () => {
      if (sending) return;
      const next = same ? level : level + 1;
      rank.forEach((one, place) => { if (!one) rank[place] = next; });
      show();
      finish();
    },
    same: () => {
      if (!level || rank.length < 3) return;
      same = true;
      status.textContent = "The next answer gets the same rank as the last.";
    },
    undo: () => {
      if (level) { status.textContent = ""; clear(); }
      else if (form.dataset.undo === "true") send("undo", {});
      else status.textContent = "There is nothing to undo.";
    },
    correct: () => write("correction"),
    why: () => write("reason"),
  };
  const keys = {t: act.tie, "=": act.same, u: act.undo, c: act.correct, r: act.why};

  document.addEventListener("keydown", (event) => {
    if (event.target.matches("textarea, input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (/^[1-9]$/.test(event.key)) pick(Number(event.key) - 1);
    else if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  picks.forEach((button, place) => button.addEventListener("click", () => pick(place)));
  for (const button of form.querySelectorAll("[data-do]")) button.addEventListener("click", () => act[button.dataset.do]());
  form.addEventListener("submit", (event) => event.preventDefault());
}
