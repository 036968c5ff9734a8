// Asks two models the same question, shows both answers as they are written, and sends votes to /v1/feedback.
// Nothing that a model or the server said is ever read as HTML: all of it goes through textContent.

const $ = (id) => document.getElementById(id);
const models = [$("model-0"), $("model-1")];
const histories = [[], []]; // what each model has been asked and has answered, in the order of the selects
const asking = { stop: null, round: null };

// what a reload should find again; a browser may forbid it
const kept = {
  get(name, where = localStorage) { try { return where.getItem(`topwork.${name}`); } catch { return null; } },
  set(name, value, where = localStorage) { try { where.setItem(`topwork.${name}`, value); } catch { /* not kept */ } },
};
let key = kept.get("key", sessionStorage);

function headers() {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function told(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? `${response.status} ${response.statusText}`;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// --- which models there are

async function listModels() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    $("key-told").textContent = "The server cannot be reached.";
    $("key-form").hidden = false;
    return;
  }
  if (response.status === 401) {
    $("key-form").hidden = false;
    $("key-told").textContent = key ? "The server does not know this key." : "";
    $("key").focus();
    return;
  }
  const names = response.ok ? (await response.json()).data.map((card) => card.id) : [];
  $("key-form").hidden = true;
  models.forEach((select, index) => {
    const wanted = select.value || kept.get(`model-${index}`);
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = names.includes(wanted) ? wanted : names[Math.min(index, names.length - 1)] ?? "";
  });
}

// --- one question, two answers

async function ask(question) {
  $("welcome")?.remove();
  const { element, answers } = newRound(question);
  const blind = $("blind").checked;
  const turned = blind && Math.random() < 0.5;
  const sides = turned ? [1, 0] : [0, 1]; // the model on the left, on the right
  const round = { element, answers: [], voted: null };
  asking.round = round;
  asking.stop = new AbortController();
  writing(true);
  const asked = sides.map((which, side) => {
    const answer = newAnswer(answers[side], which, blind ? ["First answer", "Second answer"][side] : null);
    round.answers.push(answer);
    return write(answer, question, asking.stop.signal);
  });
  scrollDown();
  await Promise.all(asked);
  writing(false);
  asking.stop = null;
  if (round.answers.every((answer) => answer.id && !answer.failed)) offerVotes(round);
  else round.answers.forEach(reveal);
  scrollDown();
}

function newRound(question) {
  const element = $("round").content.firstElementChild.cloneNode(true);
  element.querySelector(".question").textContent = question;
  $("rounds").append(element);
  return { element, answers: [...element.querySelectorAll(".answer")] };
}

function newAnswer(element, which, hiddenAs) {
  element.append($("answer").content.cloneNode(true));
  element.classList.remove("one", "two");
  element.classList.add(hiddenAs ? "hidden-name" : which ? "two" : "one", "writing");
  const name = models[which].value;
  element.querySelector("h3").textContent = hiddenAs ?? name;
  return { element, which, name, id: null, arm: null, text: "", failed: false };
}

function reveal(answer) {
  answer.element.classList.replace("hidden-name", answer.which ? "two" : "one");
  answer.element.querySelector("h3").textContent = answer.name;
  answer.element.querySelector(".arm").textContent = answer.arm ? `arm ${answer.arm}` : "";
}

function request(answer, question) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const system = $("system").value.trim();
  const history = histories[answer.which];
  return {
    model: answer.name,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: question }],
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function write(answer, question, signal) {
  const text = answer.element.querySelector(".text");
  const clock = { began: performance.now(), first: null, last: null, tokens: 0 };
  let note = "";
  try {
    const body = JSON.stringify(request(answer, question));
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal });
    if (!response.ok) throw new Error(await told(response));
    answer.arm = response.headers.get("x-topwork-arm");
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      answer.id = chunk.id ?? answer.id;
      if (chunk.usage) clock.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content ?? "";
      if (piece) {
        clock.last = performance.now();
        clock.first ??= clock.last;
        answer.text += piece;
        text.append(piece);
        scrollDown();
      }
      if (choice?.finish_reason === "length") note = "cut at the longest answer";
    }
    if (!answer.text) note = "an empty answer";
    histories[answer.which].push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  } catch (error) {
    answer.failed = true;
    note = signal.aborted ? "stopped" : String(error.message ?? error);
    if (!signal.aborted) answer.element.classList.add("failed");
  }
  answer.element.classList.remove("writing");
  if (note) text.append(Object.assign(document.createElement("span"), { className: "note", textContent: note }));
  showFigures(answer, clock);
  if (answer.element.classList.contains("hidden-name") === false) reveal(answer);
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function showFigures(answer, clock) {
  if (clock.first === null) return;
  const show = (name, value) => { answer.element.querySelector(`[data-figure="${name}"]`).textContent = value; };
  const seconds = (milliseconds) =>
    milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
  const speed = clock.tokens > 1 && clock.last > clock.first ? (1000 * (clock.tokens - 1)) / (clock.last - clock.first) : null;
  show("first", seconds(clock.first - clock.began));
  show("speed", speed === null ? "–" : `${speed >= 10 ? Math.round(speed) : speed.toFixed(1)} tokens/s`);
  show("tokens", clock.tokens || "–");
  show("total", seconds(performance.now() - clock.began));
  answer.element.querySelector(".figures").hidden = false;
}

// --- votes

function offerVotes(round) {
  const bar = round.element.querySelector(".votes");
  bar.hidden = false;
  if (document.activeElement === document.body || document.activeElement === $("question") && !$("question").value) {
    bar.focus({ preventScroll: true }); // keys vote now; letters go to the next question
  }
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) vote(round, button.dataset.vote);
  });
}

async function vote(round, choice) {
  const [left, right] = round.answers;
  const bodies = {
    left: { preferred: left.id, rejected: right.id },
    right: { preferred: right.id, rejected: left.id },
    good: { tied: [left.id, right.id], good: true },
    bad: { tied: [left.id, right.id], good: false },
  };
  const line = round.element.querySelector(".told");
  line.classList.remove("wrong");
  try {
    const body = JSON.stringify(bodies[choice]);
    const response = await fetch("v1/feedback", { method: "POST", headers: headers(), body });
    if (!response.ok) throw new Error(await told(response));
    const { kept: onDisk } = await response.json();
    line.textContent = onDisk ? "Your vote is kept." : "Your vote counts until the server ends (it has no state_folder).";
  } catch (error) {
    line.textContent = `The vote was not taken: ${error.message}`;
    line.classList.add("wrong");
    return;
  }
  for (const button of round.element.querySelectorAll(".votes button")) {
    button.setAttribute("aria-pressed", String(button.dataset.vote === choice));
  }
  left.element.classList.toggle("better", choice === "left");
  right.element.classList.toggle("better", choice === "right");
  round.answers.forEach(reveal);
  line.textContent += await standing(left.name, right.name);
}

// what votes on these two came to, where one may know it
async function standing(one, other) {
  try {
    const response = await fetch("v1/comparisons", { headers: headers() });
    if (!response.ok) return "";
    const pair = (await response.json()).data.find((entry) => [entry.first, entry.second].sort().join("\n") === [one, other].sort().join("\n"));
    if (!pair) return "";
    const ties = pair.both_good + pair.both_bad;
    return ` So far ${pair.first} ${pair.first_preferred}, ${pair.second} ${pair.second_preferred}, ties ${ties}: ${pair.told}.`;
  } catch {
    return "";
  }
}

// --- the page

function writing(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

function scrollDown() {
  const page = document.scrollingElement;
  if (page.scrollHeight - page.scrollTop - page.clientHeight < 240) page.scrollTop = page.scrollHeight;
}

// what was said before is not gone on with
function begin() {
  asking.stop?.abort();
  const spoken = histories.some((history) => history.length);
  histories.forEach((history) => { history.length = 0; });
  if (spoken) $("rounds").append(Object.assign(document.createElement("p"), { className: "begin", textContent: "A new conversation" }));
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || asking.stop || !models.every((select) => select.value)) return;
  $("question").value = "";
  ask(question);
});

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking.stop?.abort();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input, textarea, select")) return;
  const bar = asking.round?.element.querySelector(".votes");
  const choice = { 1: "left", 2: "good", 3: "bad", 4: "right" }[event.key];
  if (choice && bar && !bar.hidden) {
    event.preventDefault();
    vote(asking.round, choice);
  } else if (event.key.length === 1 && event.key !== " ") {
    $("question").focus(); // where the letter then lands
  }
});

$("stop").addEventListener("click", () => asking.stop?.abort());
$("anew").addEventListener("click", () => {
  begin();
  $("rounds").replaceChildren();
  asking.round = null;
  $("question").focus();
});
$("swap").addEventListener("click", () => {
  [models[0].value, models[1].value] = [models[1].value, models[0].value];
  models.forEach((select) => select.dispatchEvent(new Event("change")));
});
models.forEach((select, index) => select.addEventListener("change", () => {
  kept.set(`model-${index}`, select.value);
  begin();
}));
for (const id of ["system", "temperature", "max-tokens", "seed"]) {
  $(id).value = kept.get(id) ?? $(id).value;
  $(id).addEventListener("change", () => kept.set(id, $(id).value));
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  kept.set("key", key, sessionStorage);
  listModels();
});

listModels();
