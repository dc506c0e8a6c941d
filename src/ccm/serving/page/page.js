"use strict";

// The page of a memory server: a chat, and beside it what the conversation's memory holds.
// Texts reach the page as text nodes only, whatever is in them (markdown.js makes nodes of answers).

const $ = (id) => document.getElementById(id);
const PAGE = 200;
const known = new Map(); // conversations by id: when they were last changed, and their titles
let facts = { parameters: 0, kv_bytes_per_token: 0 }; // of the model
let current = null; // id of the conversation; null: one that has not begun
let turns = []; // of the conversation, as the server knows them
let inside = null; // which turns each entry of its memory stands for
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
    const given = await ask("This server asks for an API key. It is kept until this tab is closed.", "OK", "password");
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

/** A button of a message. */
function tool(name, title, what) {
  const button = element("button", name);
  button.type = "button";
  button.title = title;
  button.addEventListener("click", what);
  return button;
}

/** A message at the end; what a model says is Markdown, what a person says is not. */
function shown(role, text) {
  $("log").querySelector(".hello")?.remove();
  const message = element("div", "", `message ${role}`);
  const body = element("div", "", "body");
  const tools = element("div", "", "tools");
  message.append(body, tools);
  write(message, text);
  tools.append(tool("Copy", "Copy this text", (event) => copy(message.dataset.text, event.currentTarget)));
  if (role === "user") tools.append(tool("Edit", "Say something else here: what came after is taken back", () => edit(message)));
  if (role === "assistant") tools.append(tool("Try again", "Another answer: this one is taken back", () => again(message)));
  for (const kind of ["mouseenter", "mouseleave"]) {
    message.addEventListener(kind, () => light(Number(message.dataset.index ?? -1), kind === "mouseenter"));
  }
  return $("log").appendChild(message);
}

function write(message, text) {
  const body = message.querySelector(".body");
  message.dataset.text = text;
  const rich = message.classList.contains("assistant");
  body.classList.toggle("markdown", rich);
  body.replaceChildren(rich ? markdown(text) : text);
}

/** A word on what became of a message. */
function mark(message, text) {
  message.append(element("span", text, "mark"));
}

/** Where an answer breaks off, and at which token. */
function broken({ by, tokens }) {
  const count = `${tokens.toLocaleString()} ${tokens === 1 ? "token" : "tokens"}`;
  return by === "length" ? `cut here, at ${count} (Settings: longest answer)` : `stopped here, after ${count}`;
}

async function copy(text, button) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text).catch(() => {});
  } else { // pages without HTTPS have none
    const field = document.body.appendChild(document.createElement("textarea"));
    field.value = text;
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const name = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = name), 1200);
}

/** Light up a turn wherever it is shown, and what stands for it in the memory. */
function light(index, on) {
  for (const found of document.querySelectorAll(`[data-index="${index}"]`)) found.classList.toggle("lit", on);
  for (const found of document.querySelectorAll("[data-turns]")) {
    const [first, end] = found.dataset.turns.split(" ").map(Number);
    if (first <= index && index < end) found.classList.toggle("lit", on);
  }
}

/** Show lines of text beside an element as long as it is pointed at or has the focus. */
function peeking(element_, lines) {
  const show = () => {
    const [name, what, words] = lines();
    const peek = $("peek");
    peek.replaceChildren(element("p", name), element("p", what));
    if (words) peek.append(element("p", words, "words"));
    peek.hidden = false;
    const { left, top, bottom } = element_.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = peek;
    peek.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
    peek.style.top = `${bottom + height + 8 < innerHeight ? bottom + 6 : Math.max(8, top - height - 6)}px`;
  };
  const own = () => {
    const [first, end] = (element_.dataset.turns ?? `${element_.dataset.index} ${Number(element_.dataset.index) + 1}`).split(" ");
    return Array.from({ length: Number(end) - Number(first) }, (_, i) => Number(first) + i);
  };
  for (const kind of ["mouseenter", "focus"]) {
    element_.addEventListener(kind, () => (show(), own().forEach((index) => light(index, true))));
  }
  for (const kind of ["mouseleave", "blur"]) {
    element_.addEventListener(kind, () => (($("peek").hidden = true), own().forEach((index) => light(index, false))));
  }
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

/** What a conversation is called: as it was named, or by the words that it began with. */
function titled(id) {
  const own = known.get(id)?.title;
  if (own) return own;
  const words = id.replace(/-[0-9a-f]{8}$/, "").replace(/^conv_.*/, "untitled");
  return /^[a-z0-9-]+$/.test(words) ? words[0].toUpperCase() + words.slice(1).replaceAll("-", " ") : words;
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
    ["raw tokens", (stats.pinned ?? 0) + stats.sink + stats.window],
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

function timeline(stats = {}) {
  const said = turns.reduce((sum, { tokens }) => sum + tokens, 0); // an imported memory has seen more
  let blurred = (stats.tokens_merged ?? 0) + (stats.tokens_dropped ?? 0) - (stats.tokens_seen - said);
  const state = ({ tokens, folded }) => {
    blurred -= tokens;
    if (blurred >= 0) return ["folded blurred", "beyond the memory's reach: its facts blur"];
    return folded ? ["folded", "folded into slots"] : ["raw", "held word for word"];
  };
  $("turns").replaceChildren(
    ...turns.map((turn, index) => {
      const [kind, fate] = state(turn);
      const row = element("li", "", kind);
      row.append(
        element("span", WHO[turn.role] ?? turn.role, "who"),
        element("span", words(turn), "what"),
        element("span", turn.tokens.toLocaleString(), "tokens"),
      );
      row.dataset.index = index;
      row.tabIndex = 0;
      peeking(row, () => [
        `turn ${index + 1}, ${WHO[turn.role] ?? turn.role}: ${turn.tokens} tokens, ${fate}`,
        (inside && standing(inside, index)) || "",
        words(turn),
      ]);
      return row;
    }),
  );
}

/** The entries of the memory, and no longer what an older answer has read. */
function taken() {
  $("strip").replaceChildren(...(inside ? strip(inside, peeking) : []));
  const kinds = Object.entries(KINDS).filter(([kind]) => inside?.lines.some((line) => line.kind === kind));
  $("legend").replaceChildren(
    ...kinds.map(([kind, text]) => {
      const part = element("span", "", kind);
      part.append(element("i", ""), text);
      return part;
    }),
  );
  $("heat").replaceChildren();
  $("read").disabled = !turns.some(({ role, content }) => role === "assistant" && content);
}

const NOTHING = {
  stats: { nbytes: 0, full_context_nbytes: 0, slots: 0, sink: 0, window: 0, tokens_folded: 0, tokens_seen: 0, turns: 0 },
  precision: "float32",
};

// Things to say. Where several are said, the last one is asked of the full context and of nothing, too. They are
// answered in the same way for everybody (EXACT), so that what is shown can be tested.
const EXAMPLES = [
  {
    title: "Tell it who you are and what you do, and ask",
    said: ["My name is Elena.", "I work as a carpenter.", "What is my name?"],
  },
  {
    title: "Ask for a list",
    said: ["Give me three ideas for a rainy day, as a list."],
  },
];

const EXACT = { temperature: 0, repetition_penalty: 1.1, max_tokens: 48 };

function hello() {
  const made = element("div", "", "hello");
  const name = ($("model").dataset.name ?? "").split("+")[0];
  made.append(
    element("h2", "A memory that stays small"),
    element("p", "Every turn is folded into a few slots of keys and values, whatever the length of the conversation."),
  );
  if (facts.parameters && facts.parameters < 1e9) {
    const size = `${name} is a small model of ${Math.round(facts.parameters / 1e6)} million parameters`;
    const small = element("p", `${size}: its answers are simple and often wrong. Your own goes in by `, "small");
    small.append(element("code", "ccm serve --model"), ".");
    made.append(small);
  }
  const examples = element("div", "", "examples");
  for (const example of EXAMPLES) {
    const button = element("button", example.title);
    button.type = "button";
    button.append(element("small", example.said.join("  →  ")));
    button.addEventListener("click", () => act(() => play(example.said)));
    examples.append(button);
  }
  made.append(examples);
  return made;
}

/** Say one thing after another; with several, compare what is answered to the last. */
async function play(said) {
  const several = said.length > 1;
  const drawn = several ? EXACT : {};
  for (const text of said.slice(0, -1)) await say(text, { compare: false, drawn });
  await say(said.at(-1), { compare: $("compare").checked || several, drawn });
}

function blank() {
  turns = [];
  inside = null;
  $("log").replaceChildren(hello());
  meter(NOTHING);
  timeline();
  taken();
}

function busy(on) {
  $("stop").hidden = !on;
  $("send").hidden = on;
  $("log").setAttribute("aria-busy", String(on));
  for (const id of ["rename", "fork", "export", "delete"]) $(id).disabled = on || current === null;
  $("system").disabled = on || current !== null;
  for (const id of ["new", "import", "more"]) $(id).disabled = on;
  for (const button of document.querySelectorAll("#list button, .tools button, .examples button")) button.disabled = on;
}

// ------------------------------------------------------------------ conversations

async function list(more = false) {
  const after = more && last ? `&after=${encodeURIComponent(last)}` : "";
  const { data, has_more } = await json(`/v1/memories?limit=${PAGE}${after}`);
  for (const { id, updated, metadata } of data) known.set(id, { updated, title: metadata.title });
  last = data.at(-1)?.id ?? last;
  $("more").hidden = !has_more;
  draw();
}

/** The list of conversations, the newest first, and which of them is open. Branches of other programs are not shown. */
function draw() {
  const rows = [...known].filter(([id]) => !id.startsWith("mem_")).sort(([, one], [, other]) => other.updated - one.updated);
  $("list").replaceChildren(
    ...rows.map(([id, { updated }]) => {
      const button = element("button", titled(id));
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
  $("name").textContent = current === null ? "New conversation" : titled(current);
  $("name").dataset.id = current ?? "";
  busy(running !== null);
}

async function open(id) {
  const [memory] = await Promise.all([json(address(id)), look(id)]);
  current = id;
  document.body.classList.remove("menu");
  const found = inside;
  blank();
  inside = found;
  for (const turn of memory.turns) {
    shown(turn.role, turn.content === null ? `(${turn.tokens} tokens, text not kept)` : words(turn));
  }
  toEnd();
  show(id, memory);
  $("text").focus();
}

/** Fetch which turns each entry of a memory stands for; one that another model made does not say. */
async function look(id) {
  inside = await json(address(id, "/inside")).catch((error) => {
    if (error instanceof Refused && error.status === 409) return null;
    throw error;
  });
}

/** What the server knows of the conversation that is open. */
function show(id, memory) {
  turns = memory.turns;
  known.set(id, { updated: memory.updated, title: memory.metadata.title });
  $("log").querySelectorAll(".message:not(.unsent)").forEach((message, index) => {
    message.dataset.index = index;
    if (turns[index].cut && !message.querySelector(".mark")) mark(message, broken(turns[index].cut));
  });
  meter(memory);
  timeline(memory.stats);
  taken();
  draw();
}

/** What an answer has changed of a conversation. */
async function refresh(id) {
  const [memory] = await Promise.all([json(address(id)), look(id)]);
  if (memory.turns.length !== $("log").querySelectorAll(".message:not(.unsent)").length) return open(id);
  show(id, memory);
  return memory;
}

function begin() {
  current = null;
  document.body.classList.remove("menu");
  blank();
  draw();
  $("text").focus();
}

/** How answers are drawn: what is not given here is the model's own. */
function sampling() {
  const temperature = $("temperature").value;
  return { max_tokens: Number($("tokens").value), ...(temperature ? { temperature: Number(temperature) } : {}) };
}

/** The pieces of an answer, as they come; at the end why it ended, and what it took. */
async function* answered(messages, headers, drawn) {
  const how = { ...sampling(), ...drawn };
  const body = { model: "ccm", messages, stream: true, stream_options: { include_usage: true }, ...how };
  const response = await post("/v1/chat/completions", body, { headers, signal: running.signal });
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Refused(0, chunk.error.message);
    yield chunk;
  }
}

/**
 * Say something and show the answer.
 *
 * keep: go back to so many turns first; what came after is taken back, in the memory as well.
 * compare: ask the full context and nothing, too.
 * drawn: how the answer is drawn, where that is not what the settings say.
 */
async function say(text, { keep = turns.length, compare = $("compare").checked, drawn = {} } = {}) {
  const session = current ?? named(text);
  const back = keep < turns.length;
  const past = turns.slice(0, keep);
  const rules = current === null ? $("system").value.trim() : "";
  const messages = [...(rules ? [{ role: "system", content: rules }] : []), { role: "user", content: text }];
  for (const old of $("log").querySelectorAll(".unsent")) old.remove();
  for (const old of [...$("log").querySelectorAll(".message")].slice(keep)) old.remove();
  const asked = messages.map(({ role, content }) => shown(role, content));
  const answer = shown("assistant", "");
  const others = compare ? columns(answer) : null;
  answer.classList.add("running");
  toEnd();
  running = new AbortController();
  busy(true);
  let memory;
  try {
    memory = await told(session, messages, keep, answer, drawn);
    current = session;
    memory = await refresh(session);
    if (others && memory) await compared(others, [...past, ...messages], memory, drawn);
  } catch (error) {
    const stopped = error.name === "AbortError";
    running = null;
    if (memory) {
      if (!stopped) throw error; // the turn is kept: what broke off is the comparison
    } else if (back) {
      await open(session);
      if (turns[keep].content !== text) edit($("log").querySelector(`[data-index="${keep}"]`), text);
      throw stopped ? new Refused(0, "Stopped: all is as it was before.") : error;
    } else {
      for (const message of [...asked, answer]) message.classList.add("unsent");
      if (answer.dataset.text) mark(answer, `${stopped ? "stopped" : "broken off"}: this turn is not remembered`);
      else answer.remove();
      $("text").value ||= text;
      throw stopped ? new Refused(0, "Stopped: this turn is not remembered.") : error;
    }
  } finally {
    answer.classList.remove("running");
    running = null;
    busy(false);
  }
}

/** Let the memory answer; what it says of itself then. */
async function told(session, messages, keep, answer, drawn) {
  const headers = {
    "X-Session-Id": session,
    "X-CCM-On-Disconnect": "drop",
    "X-CCM-Resend": "refuse", // what is sent is always new
    "X-CCM-Ephemeral": "false",
    ...(keep < turns.length ? { "X-CCM-Keep": String(keep) } : {}),
  };
  let kept = null;
  let text = "";
  for await (const chunk of answered(messages, headers, drawn)) {
    const [choice] = chunk.choices ?? [];
    if (choice?.delta?.content) write(answer, (text += choice.delta.content));
    if (following) toEnd();
    kept = chunk.memory ?? kept;
  }
  if (!kept) throw new Refused(0, "The answer broke off: reload to see whether this turn was kept.");
  return kept;
}

/** Three columns in place of one answer: the memory's, that of the full context, and that of nothing. */
function columns(answer) {
  const made = element("div", "", "compared");
  const column = (name, title) => {
    const section = element("section", "", name);
    const head = element("h3", title);
    head.append(element("span", ""));
    section.append(head);
    return made.appendChild(section);
  };
  const own = column("memory", "memory");
  own.append(answer.querySelector(".body"));
  answer.prepend(made);
  const rest = [column("whole", "full context"), column("nothing", "nothing")];
  for (const section of rest) section.append(element("div", "", "body other markdown"));
  return { own, rest };
}

/** Ask the model itself, without a conversation: behind all that was said, and behind nothing. */
async function compared({ own, rest: [whole, nothing] }, said, memory, drawn) {
  own.querySelector("span").textContent = bytes(memory.stats.nbytes);
  const history = said.filter(({ role, content }) => WHO[role] && role !== "tool" && content);
  const lost = said.length - history.length;
  for (const [section, messages] of [[whole, history], [nothing, said.slice(-1)]]) {
    const body = section.querySelector(".body");
    if (section === whole && lost) {
      body.append(element("p", `${lost} turns have no text here: there is no full context to compare with.`, "refused"));
      continue;
    }
    try {
      let text = "";
      const asked = messages.map(({ role, content }) => ({ role, content }));
      for await (const { choices, usage } of answered(asked, { "X-CCM-Ephemeral": "true" }, drawn)) {
        text += choices?.[0]?.delta?.content ?? "";
        body.replaceChildren(markdown(text));
        if (usage) section.querySelector("span").textContent = bytes(usage.total_tokens * facts.kv_bytes_per_token);
        if (following) toEnd();
      }
    } catch (error) {
      if (error.name === "AbortError") throw error;
      body.replaceChildren(element("p", error.message, "refused"));
    }
  }
}

/** Another answer to the same question: the memory goes back to before it. */
function again(message) {
  const asked = turns.findLastIndex(({ role }, index) => role === "user" && index < Number(message.dataset.index));
  if (running || asked < 0 || turns[asked].content === null) return;
  act(() => say(turns[asked].content, { keep: asked }));
}

/** Say something else in place of a message: the memory goes back to before it. */
function edit(message, text = message.dataset.text) {
  const index = Number(message.dataset.index ?? -1);
  if (running || index < 0 || turns[index].content === null || message.querySelector("textarea")) return;
  const field = document.createElement("textarea");
  field.value = text;
  field.setAttribute("aria-label", "Edited message");
  const [body, tools] = [message.querySelector(".body"), message.querySelector(".tools")];
  const bar = element("div", "", "actions");
  const close = () => (field.remove(), bar.remove(), (body.hidden = tools.hidden = false));
  const done = () => field.value.trim() && (close(), act(() => say(field.value.trim(), { keep: index })));
  const no = tool("Cancel", "Leave it as it is", close);
  no.classList.add("quiet");
  bar.append(no, tool("Send", "What came after is taken back", done));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), done());
  });
  body.hidden = tools.hidden = true;
  message.append(field, bar);
  field.focus();
}

async function rename() {
  const title = await ask("A title for this conversation", "Rename", "text", titled(current));
  if (title === null) return;
  const place = `/v1/conversations/${encodeURIComponent(current)}`;
  const { metadata } = await json(place);
  delete metadata.title;
  await post(place, { metadata: title.trim() ? { ...metadata, title: title.trim().slice(0, 200) } : metadata });
  known.get(current).title = title.trim();
  draw();
}

/** Let the model read its newest answer again, and show what of the memory it read. */
async function reading() {
  $("read").disabled = true;
  $("read").textContent = "Reading…";
  try {
    const found = await (await call(address(current, "/reading"), { method: "POST" })).json();
    $("heat").replaceChildren(...heat(found, peeking));
  } finally {
    $("read").disabled = false;
    $("read").textContent = "What did the last answer read?";
  }
}

// ------------------------------------------------------------------ what the controls do

/** Ask for a yes, or for a text of a kind ("text", "password"); null is a no. */
function ask(question, yes, kind = "", text = "") {
  $("question").textContent = question;
  $("yes").textContent = yes;
  $("answer").hidden = !kind;
  $("answer").type = kind || "text";
  $("answer").value = text;
  $("ask").returnValue = "no";
  $("ask").showModal();
  if (kind) $("answer").select();
  return new Promise((resolve) => {
    $("ask").addEventListener(
      "close",
      () => resolve($("ask").returnValue === "yes" ? (kind ? $("answer").value : yes) : null),
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
  if (!(await ask(`Forget “${titled(current)}”? Its memory and texts are deleted.`, "Delete"))) return;
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
$("rename").addEventListener("click", () => act(rename));
$("read").addEventListener("click", () => act(reading));
for (const name of ["memory", "inside"]) {
  $(`tab-${name}`).addEventListener("click", () => {
    for (const other of ["memory", "inside"]) {
      $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
      $(`pane-${other}`).hidden = other !== name;
    }
  });
}
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
  facts = data[0];
  $("model").dataset.name = facts.id;
  $("model").textContent = facts.id;
  if (current === null && !$("log").querySelector(".message")) blank();
  await list();
});
