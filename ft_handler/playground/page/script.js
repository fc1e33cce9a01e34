"use strict";

// Whatever a server or a reader of this page wrote goes in as text, never as markup.

const $ = (id) => document.getElementById(id);

/** An element with a class, attributes and children; strings become text. */
function make(name, options = {}, ...children) {
  const { className, ...attributes } = options;
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const value = (id) => $(id).value;
const isShare = (number) => number >= 0 && number <= 1;

function score(number) {
  return isShare(number) ? `${(100 * number).toFixed(1)} %` : number.toFixed(3);
}

function milliseconds(number) {
  return `${number < 10 ? number.toFixed(1) : Math.round(number)} ms`;
}

/** Rows of a name and a score; a bar where scores are shares of a whole. */
function bars(rows, label, ordered = false) {
  const shares = rows.every((row) => isShare(row.score));
  const list = make(ordered ? "ol" : "ul", { className: "bars", "aria-label": label });
  for (const row of rows) {
    const head = make("span", { className: "head" },
      make("span", { className: "name" }, row.name),
      make("span", { className: "score" }, score(row.score)));
    const item = make("li", {}, head);
    if (shares) {
      const fill = make("span", { className: "fill" });
      fill.style.width = `${100 * row.score}%`;
      item.append(make("span", { className: "track", "aria-hidden": "true" }, fill));
    }
    list.append(item);
  }
  return list;
}

/** A text with stretches of it marked; `start` and `end` count characters, as the server does. */
function marked(text, spans) {
  const characters = Array.from(text);
  const shown = make("p", { className: "text", tabindex: "0", role: "group" });
  let at = 0;
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    if (span.start < at || span.end <= span.start) continue;
    shown.append(characters.slice(at, span.start).join(""));
    const mark = make("mark", { className: span.className || "" },
      characters.slice(span.start, span.end).join(""));
    if (span.label) mark.append(make("span", { className: "label" }, span.label));
    shown.append(mark);
    at = span.end;
  }
  shown.append(characters.slice(at).join(""));
  return shown;
}

const listed = (answer) => (Array.isArray(answer) ? answer : [answer]);
const cut = (answer) => listed(answer).some((one) => one && one.truncated);
const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

function showAnswers(found, context) {
  const place = make("div");
  const buttons = found.map((one, index) => {
    const button = make("button", { type: "button" },
      make("span", {}, one.answer || "no answer"),
      make("span", { className: "score" }, score(one.score)));
    button.addEventListener("click", () => choose(index));
    return button;
  });
  function choose(index) {
    buttons.forEach((button, own) => button.setAttribute("aria-pressed", String(own === index)));
    const text = marked(context, [found[index]]);
    text.setAttribute("aria-label", "Context with the answer marked");
    place.replaceChildren(text);
  }
  choose(0);
  const list = make("ol", { className: "answers", "aria-label": "Answers, best first" });
  for (const button of buttons) list.append(make("li", {}, button));
  return [place, list];
}

/** Label -> one of six colours; the label stands beside what is coloured. */
function kinds(labels) {
  return new Map([...new Set(labels)].sort().map((label, index) => [label, index % 6]));
}

function showEntities(found, text) {
  const name = (one) => one.entity_group ?? one.entity;
  const colour = kinds(found.map(name));
  const spans = found.map((one) => ({
    start: one.start, end: one.end, label: name(one), className: `kind-${colour.get(name(one))}`,
  }));
  const shown = marked(text, spans);
  shown.setAttribute("aria-label", "Text with entities marked");
  if (!found.length) return [shown];
  const head = make("tr", {}, ...["Entity", "Label", "Score"].map((title) =>
    make("th", { scope: "col" }, title)));
  const body = make("tbody");
  for (const one of found) {
    body.append(make("tr", {}, make("td", {}, one.word), make("td", {}, name(one)),
      make("td", {}, score(one.score))));
  }
  return [shown, make("table", {}, make("caption", {}, "Entities"), make("thead", {}, head), body)];
}

function cosine(first, second) {
  let dot = 0, one = 0, two = 0;
  for (let i = 0; i < first.length; i++) {
    dot += first[i] * second[i];
    one += first[i] ** 2;
    two += second[i] ** 2;
  }
  return one && two ? dot / Math.sqrt(one * two) : 0;
}

/** Task -> its button, the body of a request, and what is shown of an answer. */
const TASKS = {
  sequence_classification: {
    verb: "Classify",
    explains: true,
    body() {
      const body = { text: value("cls-text") };
      if (value("cls-pair")) body.text_pair = value("cls-pair");
      return body;
    },
    more: { top_k: null },
    show(answer) {
      const rows = listed(answer).map((one) => ({ name: one.label, score: one.score }));
      return [`${rows[0].name}, ${score(rows[0].score)}`, [bars(rows, "Labels, best first")]];
    },
  },
  question_answering: {
    verb: "Ask",
    explains: true,
    body: () => ({ question: value("qa-question"), context: value("qa-context") }),
    get more() {
      return { top_k: Number(value("qa-top")), handle_impossible_answer: $("qa-none").checked };
    },
    show(answer, body) {
      const found = listed(answer);
      const best = found[0];
      return [`${best.answer || "no answer"}, ${score(best.score)}`,
        showAnswers(found, body.context)];
    },
  },
  token_classification: {
    verb: "Find entities",
    body: () => ({ text: value("tok-text") }),
    get more() { return { aggregation_strategy: value("tok-strategy") }; },
    show(answer, body) {
      const count = answer.length;
      return [count === 1 ? "1 entity" : `${count || "No"} entities`,
        showEntities(answer, body.text)];
    },
  },
  reranking: {
    verb: "Rank",
    body: () => ({ query: value("rank-query"), texts: lines(value("rank-texts")) }),
    show(answer, body) {
      const rows = answer.map((one) => ({ name: body.texts[one.index], score: one.score }));
      return [`Best: ${rows[0].name}`, [bars(rows, "Documents, best first", true)]];
    },
  },
  zero_shot_classification: {
    verb: "Classify",
    body: () => ({
      text: value("zero-text"),
      candidate_labels: value("zero-labels").split(",").map((one) => one.trim()).filter(Boolean),
      multi_label: $("zero-multi").checked,
    }),
    show(answer) {
      const rows = answer.labels.map((name, index) => ({ name, score: answer.scores[index] }));
      return [`${rows[0].name}, ${score(rows[0].score)}`, [bars(rows, "Labels, best first")]];
    },
  },
  embeddings: {
    verb: "Compare",
    body: () => [{ text: value("emb-first") }, { text: value("emb-second") }],
    show(answer) {
      const [first, second] = answer;
      const likeness = cosine(first.embedding, second.embedding);
      const body = make("tbody");
      for (const [name, one] of [["First text", first], ["Second text", second]]) {
        body.append(make("tr", {}, make("th", { scope: "row" }, name),
          make("td", {}, String(one.tokens)), make("td", {}, String(one.embedding.length))));
      }
      const head = make("tr", {}, ...["Text", "Tokens", "Dimensions"].map((title) =>
        make("th", { scope: "col" }, title)));
      const table = make("table", {}, make("caption", {}, "Vectors"), make("thead", {}, head), body);
      const shown = likeness >= 0 ? [bars([{ name: "Cosine", score: likeness }], "Similarity")] : [];
      return [`Cosine similarity ${likeness.toFixed(3)}`, [...shown, table]];
    },
  },
};

/** Words with what each does for the answer, a list for every text they stand in. */
function showWords(answer) {
  const kinds = "importances" in answer
    ? [["What each word does", answer.importances]]
    : [["For where the answer starts", answer.importances_answer_start],
      ["For where it ends", answer.importances_answer_end]];
  const shown = [];
  for (const [title, importances] of kinds) {
    const most = Math.max(...importances.map(Math.abs), 1e-9);
    for (const field of new Set(answer.fields)) {
      const name = field.replace("_", " ");
      shown.push(make("h3", {}, `${title}: ${name}`));
      const list = make("ul", { className: "words", "aria-label": `${title}: ${name}` });
      answer.words.forEach((word, index) => {
        if (answer.fields[index] !== field) return;
        const number = importances[index];
        const item = make("li", { className: number < 0 ? "against" : "for" },
          make("span", {}, word),
          make("span", { className: "number" }, (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2)));
        item.style.setProperty("--strength", String(Math.abs(number) / most));
        list.append(item);
      });
      shown.push(list);
    }
  }
  const what = answer.label ?? (answer.answer || "no answer");
  return [`${what}, ${score(answer.score)}, explained`, shown];
}

/** The model that the address names, so that a page can be kept. */
function namedModel() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

const modelName = () => ($("model").hidden ? value("model-name").trim() : value("model"));
const task = () => TASKS[value("task")];

function chooseTask() {
  for (const fields of document.querySelectorAll("fieldset[data-task]")) {
    const chosen = fields.dataset.task === value("task");
    fields.hidden = fields.disabled = !chosen;
  }
  $("send").textContent = task().verb;
  $("explain").hidden = !task().explains;
}

async function json(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error((await answer.json()).message);
  return answer.json();
}

async function chooseModel() {
  const name = modelName();
  if (!name) return;
  history.replaceState(null, "", `#${encodeURIComponent(name)}`);
  try {
    const { mode } = await json(`/models/${encodeURIComponent(name)}`);
    if (name === modelName() && mode in TASKS) {
      $("task").value = mode;
      chooseTask();
    }
  } catch {
    // Without a description the reader says what the model does.
  }
}

async function start() {
  chooseTask();
  try {
    const { server, models } = await json("/models");
    $("server").textContent = server;
    $("model").append(...models.map((name) => make("option", { value: name }, name)));
    if (models.includes(namedModel())) $("model").value = namedModel();
    if (!models.length) fail("The server has no model.");
  } catch (error) {
    $("model").hidden = true;
    $("model-name").hidden = false;
    $("model-name").value = namedModel();
    fail(`The models could not be listed: ${error.message}`);
  }
  await chooseModel();
  document.body.dataset.ready = "true";
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
}

const counters = (name) => json(`/counters/${encodeURIComponent(name)}`).catch(() => null);
const pause = (time) => new Promise((done) => setTimeout(done, time));

/** How far the model's counters went on, once they count this request; null where they do not. */
async function counted(name, before) {
  // Workers tell what they count about once a second, one counter after another: what is read twice
  // alike is told to the end.
  let last = "";
  for (let attempt = 0; before && attempt < 30; attempt++) {
    const now = await counters(name);
    if (now && now.requests > before.requests) {
      if (JSON.stringify(now) === last) {
        return Object.fromEntries(Object.keys(now).map((key) => [key, now[key] - before[key]]));
      }
      last = JSON.stringify(now);
    }
    await pause(100);
  }
  return null;
}

function showTime(roundTrip, header) {
  const stages = [];
  for (const part of (header || "").split(",")) {
    const [name, ...settings] = part.trim().split(";").map((one) => one.trim());
    const duration = settings.find((one) => one.startsWith("dur="));
    if (name && duration) stages.push(`${name} ${milliseconds(Number(duration.slice(4)))}`);
  }
  $("time").replaceChildren(milliseconds(roundTrip),
    make("small", {}, stages.length ? stages.join(", ") : "there and back"));
}

function showCounts(counts) {
  if (counts === null || counts.requests !== 1) {
    const why = counts === null ? "not told by this server"
      : counts.requests ? "counted together with other requests" : "being counted";
    for (const id of ["tokens", "padding"]) $(id).replaceChildren("–", make("small", {}, why));
    return;
  }
  const { tokens, padded_fixed: padded } = counts;
  const all = tokens + padded;
  $("tokens").replaceChildren(tokens.toLocaleString("en"), make("small", {}, "computed"));
  $("padding").replaceChildren(all ? `${Math.round((100 * padded) / all)} %` : "–",
    make("small", {}, `${padded.toLocaleString("en")} more tokens, had each sequence been padded to the longest length allowed`));
}

let latest = 0;

async function send(route) {
  const own = ++latest;
  const { explains, more, body: written, show } = task();
  const explaining = route === "explanations" && explains;
  const name = modelName();
  const base = written();
  const body = explaining || Array.isArray(base) ? base : { ...base, ...more };
  const path = `/${route}/${encodeURIComponent(name)}`;
  const sent = JSON.stringify(body);
  busy(true);
  try {
    const before = await counters(name);
    const began = performance.now();
    const answer = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: sent,
    });
    const text = await answer.text();
    const took = performance.now() - began;
    if (own !== latest) return;
    showRaw(path, body, answer.status, text);
    const found = JSON.parse(text);
    if (!answer.ok) throw new Error(`${answer.status} ${found.type ?? ""}: ${found.message}`);
    const [summary, parts] = explaining ? showWords(found) : show(found, body);
    const note = cut(found) ? " (the text was cut: it is too long for this model)" : "";
    $("status").textContent = summary + note;
    $("result").replaceChildren(...parts);
    showTime(took, answer.headers.get("Server-Timing"));
    showCounts({ requests: 0 });
    $("facts").hidden = false;
    busy(false);
    const counts = await counted(name, before);
    if (own === latest) showCounts(counts);
  } catch (error) {
    if (own !== latest) return;
    $("status").textContent = "No answer.";
    $("result").replaceChildren();
    fail(error instanceof SyntaxError ? "The server's answer is not JSON." : error.message);
  } finally {
    if (own === latest) busy(false);
  }
}

function busy(now) {
  $("answer").setAttribute("aria-busy", String(now));
  for (const id of ["send", "explain"]) $(id).setAttribute("aria-disabled", String(now));
  if (now) {
    $("status").textContent = "Asking …";
    $("error").hidden = true;
    $("facts").hidden = true;
    $("raw").hidden = true;
  }
}

function showRaw(path, body, status, text) {
  $("raw-path").textContent = path;
  $("raw-request").textContent = JSON.stringify(body, null, 1);
  $("raw-status").textContent = String(status);
  $("raw-answer").textContent = text.length > 20000 ? `${text.slice(0, 20000)} …` : text;
  $("raw").hidden = false;
}

function ask(route) {
  if ($("send").getAttribute("aria-disabled") === "true") return;
  if ($("form").reportValidity()) send(route);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask("predictions");
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask("predictions");
  }
});
$("explain").addEventListener("click", () => ask("explanations"));
$("task").addEventListener("change", chooseTask);
$("model").addEventListener("change", chooseModel);
$("model-name").addEventListener("change", chooseModel);
start();
