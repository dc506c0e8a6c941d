"use strict";

// The page of a memory server: a chat, and beside it what the conversation's memory holds.
// Texts reach the page as text nodes only, whatever is in them.

const $ = (id) => document.getElementById(id);
const PAGE = 200;
const known = new Map(); // ids of conversations, and when they were last changed
let current = null; // id of the conversation; null: one that has not begun
let running = null; // AbortController of the answer on its way
let last = null; // last id that the server has listed, for the next page
let following = true; // whether the end of the messages is in view, and should stay there

// ------------------------------------------------------------------ talking to the server

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "The server cannot be reached.");
    }
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => ({}));
    const message = body.error?.message ?? `The server answered ${answer.status}.`;
    if (answer.status !== 401) throw new Refused(answer.status, message);
    const given = await ask("This server asks for an API key. It is kept until this tab is closed.", "OK", true);
    if (!given) throw new Refused(401, message);
    sessionStorage.setItem("key", given);
  }
}

const json = async (path, options) => (await call(path, options)).json();
const post = (path, body, options = {}) =>
  call(path, {
    ...options,
    method: "POST",
    headers: { "Content-Type": "application/json", ...options.headers },
    body: JSON.stringify(body),
  });
const address = (id, rest = "") => `/v1/memories/${encodeURIComponent(id)}${rest}`;

/** The data of a stream of server-sent events, one after another. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((text) => text.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// ------------------------------------------------------------------ showing

function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function shown(role, text) {
  $("log").querySelector(".hello")?.remove();
  return $("log").appendChild(element("div", text, `message ${role}`));
}

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

/** A readable id for a conversation that begins with these words, or for a copy of one of that name. */
function named(text) {
  const words = text.replace(/-[0-9a-f]{8}$/, "").toLowerCase().match(/[a-z0-9]+/g) ?? ["chat"];
  const [random] = crypto.getRandomValues(new Uint32Array(1));
  return `${words.slice(0, 6).join("-").slice(0, 40)}-${random.toString(16).padStart(8, "0")}`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let place = 0;
  while (count >= 1000 && place < units.length - 1) {
    count /= 1000;
    place += 1;
  }
  return `${count.toFixed(place ? 1 : 0)} ${units[place]}`;
}

/** Tokens in two digits, which is enough where segments differ in length. */
const about = (count) => `~${Number(count.toPrecision(2)).toLocaleString()} tokens`;

/** What a memory holds; `view` is what the server says of it. */
function meter({ stats, precision, error }) {
  const { nbytes: held, full_context_nbytes: full } = stats;
  const smaller = held < full;
  $("ratio").textContent = held ? `${(smaller ? full / held : held / full).toFixed(1)}×` : "empty";
  if (held) $("ratio").append(element("small", smaller ? "smaller than full context" : "full context, so far"));
  const most = Math.max(held, full, 1);
  $("held").style.width = `${(100 * held) / most}%`;
  $("whole").style.width = `${(100 * full) / most}%`;
  const rows = [
    ["held", bytes(held)],
    ["full context", bytes(full)],
    ["slots", stats.slots],
    ["raw tokens", stats.sink + stats.window],
    ["tokens folded", stats.tokens_folded],
    ["tokens seen", stats.tokens_seen],
    ["turns", stats.turns],
  ];
  if (stats.reach !== undefined) {
    const lost = stats.tokens_merged + stats.tokens_dropped;
    rows.push(["reaches back", lost ? about(stats.reach) : "to the start"]);
    if (!lost) rows.push(["when full", about(stats.reach_when_full)]);
  }
  if (precision !== "float32") {
    rows.push([`stored as ${precision}`, `${(100 * Math.max(error.keys, error.values)).toFixed(2)} % off`]);
  }
  $("numbers").replaceChildren(
    ...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value.toLocaleString())]),
  );
}

const WHO = { user: "you", assistant: "model", system: "rules", tool: "tool" };

/** What a turn said, or which tools it asked for. */
const words = ({ content, tool_calls }) =>
  content || tool_calls.map((call) => `${call.name}(${call.arguments})`).join(" ");

function timeline(turns, stats = {}) {
  const said = turns.reduce((sum, { tokens }) => sum + tokens, 0); // an imported memory has seen more
  let blurred = (stats.tokens_merged ?? 0) + (stats.tokens_dropped ?? 0) - (stats.tokens_seen - said);
  const state = ({ tokens, folded }) => {
    blurred -= tokens;
    if (blurred >= 0) return ["folded blurred", "beyond the memory's reach: its facts blur"];
    return folded ? ["folded", "folded into slots"] : ["raw", "held word for word"];
  };
  $("turns").replaceChildren(
    ...turns.map((turn) => {
      const [kind, fate] = state(turn);
      const row = element("li", "", kind);
      row.append(
        element("span", WHO[turn.role] ?? turn.role, "who"),
        element("span", words(turn), "what"),
        element("span", turn.tokens.toLocaleString(), "tokens"),
      );
      row.title = `${turn.role}, ${turn.tokens} tokens, ${fate}`;
      return row;
    }),
  );
}

const NOTHING = {
  stats: { nbytes: 0, full_context_nbytes: 0, slots: 0, sink: 0, window: 0, tokens_folded: 0, tokens_seen: 0, turns: 0 },
  precision: "float32",
};

function blank() {
  $("log").replaceChildren(
    element("p", "Every turn is folded into a small memory that stays, whatever the length of the conversation.", "hello"),
  );
  meter(NOTHING);
  timeline([]);
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("log").setAttribute("aria-busy", String(on));
  for (const id of ["fork", "export", "delete"]) $(id).disabled = on || current === null;
  for (const id of ["new", "import", "more"]) $(id).disabled = on;
  for (const button of $("list").querySelectorAll("button")) button.disabled = on;
}

// ------------------------------------------------------------------ conversations

async function list(more = false) {
  const after = more && last ? `&after=${encodeURIComponent(last)}` : "";
  const { data, has_more } = await json(`/v1/memories?limit=${PAGE}${after}`);
  for (const { id, updated } of data) known.set(id, updated);
  last = data.at(-1)?.id ?? last;
  $("more").hidden = !has_more;
  draw();
}

/** The list of conversations, the newest first, and which of them is open. */
function draw() {
  const rows = [...known].sort((one, other) => other[1] - one[1]);
  $("list").replaceChildren(
    ...rows.map(([id, updated]) => {
      const button = element("button", id);
      button.type = "button";
      button.title = id;
      button.append(element("small", new Date(updated * 1000).toLocaleString()));
      button.dataset.id = id;
      button.setAttribute("aria-current", String(id === current));
      button.addEventListener("click", () => act(() => open(id)));
      const row = element("li", "");
      row.append(button);
      return row;
    }),
  );
  $("name").textContent = current ?? "New conversation";
  busy(running !== null);
}

async function open(id) {
  const memory = await json(address(id));
  current = id;
  document.body.classList.remove("menu");
  blank();
  for (const turn of memory.turns) shown(turn.role, turn.content === null ? `(${turn.tokens} tokens, text not kept)` : words(turn));
  toEnd();
  meter(memory);
  timeline(memory.turns, memory.stats);
  known.set(id, memory.updated);
  draw();
  $("text").focus();
}

/** What an answer has changed of a conversation. */
async function refresh(id) {
  const memory = await json(address(id));
  known.set(id, memory.updated);
  if (current === id) {
    meter(memory);
    timeline(memory.turns, memory.stats);
  }
  draw();
}

function begin() {
  current = null;
  document.body.classList.remove("menu");
  blank();
  draw();
  $("text").focus();
}

async function say(text) {
  const session = current ?? named(text);
  for (const old of $("log").querySelectorAll(".unsent")) old.remove();
  const question = shown("user", text);
  const answer = shown("assistant", "");
  answer.classList.add("running");
  toEnd();
  running = new AbortController();
  busy(true);
  try {
    const body = {
      model: "ccm",
      messages: [{ role: "user", content: text }],
      stream: true,
      temperature: Number($("temperature").value),
      max_tokens: Number($("tokens").value),
      top_p: 0.9,
      repetition_penalty: 1.1,
    };
    const response = await post("/v1/chat/completions", body, {
      // what is sent is always new
      headers: { "X-Session-Id": session, "X-CCM-On-Disconnect": "drop", "X-CCM-Resend": "refuse" },
      signal: running.signal,
    });
    let kept = false;
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Refused(0, chunk.error.message);
      answer.append(chunk.choices?.[0]?.delta?.content ?? "");
      if (following) toEnd();
      kept ||= "memory" in chunk;
    }
    if (!kept) throw new Refused(0, "The answer broke off: reload to see whether this turn was kept.");
    current = session;
  } catch (error) {
    for (const message of [question, answer]) message.classList.add("unsent");
    if (!answer.textContent) answer.remove();
    $("text").value ||= text;
    throw error.name === "AbortError" ? new Refused(0, "Stopped: this turn is not remembered.") : error;
  } finally {
    answer.classList.remove("running");
    running = null;
    busy(false);
  }
  await refresh(session);
}

// ------------------------------------------------------------------ what the controls do

/** Ask for a yes, or for a secret; null is a no. */
function ask(question, yes, secret = false) {
  $("question").textContent = question;
  $("yes").textContent = yes;
  $("answer").hidden = !secret;
  $("answer").value = "";
  $("ask").returnValue = "no";
  $("ask").showModal();
  return new Promise((resolve) => {
    $("ask").addEventListener(
      "close",
      () => resolve($("ask").returnValue === "yes" ? (secret ? $("answer").value : yes) : null),
      { once: true },
    );
  });
}

/** Do something that may fail, and say so in words. */
async function act(what) {
  notice("");
  try {
    await what();
  } catch (error) {
    notice(error instanceof Refused ? error.message : "This page failed: reload it.");
    if (!(error instanceof Refused)) console.error(error);
  }
}

async function fork() {
  const made = await (await post(address(current, "/fork"), { id: named(current) })).json();
  await open(made.id);
}

async function save() {
  const blob = await (await call(address(current, "/export"))).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${current.replace(/[^\w-]+/g, "_")}.ccm`;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function forget() {
  if (!(await ask(`Forget “${current}”? Its memory and texts are deleted.`, "Delete"))) return;
  await call(address(current), { method: "DELETE" });
  known.delete(current);
  begin();
}

async function load(file) {
  const name = named(file.name.replace(/\.ccm$/, ""));
  const answer = await call(`/v1/memories/import?id=${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
  });
  await open((await answer.json()).id);
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  $("text").style.height = "";
  act(() => say(text));
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("text").addEventListener("input", () => {
  $("text").style.height = "";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
});
$("log").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("log");
  following = scrollHeight - scrollTop - clientHeight < 40;
});
new ResizeObserver(() => following && toEnd()).observe($("log"));
$("stop").addEventListener("click", () => running?.abort());
$("no").addEventListener("click", () => $("ask").close("no"));
$("new").addEventListener("click", () => act(begin));
$("more").addEventListener("click", () => act(() => list(true)));
$("fork").addEventListener("click", () => act(fork));
$("export").addEventListener("click", () => act(save));
$("delete").addEventListener("click", () => act(forget));
$("import").addEventListener("change", () => {
  const [file] = $("import").files;
  $("import").value = "";
  if (file) act(() => load(file));
});
$("menu").addEventListener("click", () => {
  const on = document.body.classList.toggle("menu");
  $("menu").setAttribute("aria-expanded", String(on));
});

const wide = matchMedia("(min-width: 1001px)"); // elsewhere there is room for the memory's summary only
const fit = () => ($("memory").open = wide.matches);
wide.addEventListener("change", fit);
fit();
begin();
act(async () => {
  const { data } = await json("/v1/models");
  $("model").textContent = data[0].id;
  await list();
});
