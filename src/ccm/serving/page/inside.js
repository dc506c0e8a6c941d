"use strict";

// Inside a memory: its entries by what they stand for, and how much of each an answer has read.

const KINDS = { pinned: "pinned", sink: "sink: first tokens", slots: "slots", window: "window: word for word" };

/** Which entries these are. */
function place({ kind, entries: [first, last] }) {
  if (kind === "prompt") return "the answer";
  return last - first === 1 ? `${kind} ${first}` : `${kind} ${first}–${last - 1}`;
}

/** Which turns they stand for. */
function speakers({ kind, how, turns: [first, last] }, all) {
  if (kind === "prompt") return "its place, and what is written of it";
  if (kind === "pinned") return `read in front of everything, ${how}`;
  if (first === last) return `earlier text, ${how}`;
  if (last - first > 1) return `turns ${first + 1}–${last}, ${how}`;
  return `turn ${last}, ${WHO[all[first].role] ?? all[first].role}, ${how}`;
}

/** The parts of a memory that stand for a turn, in words. */
function standing(inside, index) {
  const own = inside.lines.filter(({ kind, turns: [first, last] }) => kind !== "prompt" && first <= index && index < last);
  const words = own.map((line) => {
    const [first, last] = line.turns;
    const shared = last - first > 1 ? `, with turns ${first + 1}–${last}` : "";
    return `${place(line)} (${line.how}${shared})`;
  });
  return words.join(" · ");
}

/** A bar of all entries; `peeking` shows what a piece stands for. */
function strip(inside, peeking) {
  return inside.lines
    .filter(({ kind }) => kind !== "prompt")
    .map((line) => {
      const piece = node("button");
      piece.type = "button";
      piece.className = line.kind;
      piece.style.flexGrow = line.entries[1] - line.entries[0];
      piece.dataset.turns = line.turns.join(" ");
      piece.setAttribute("aria-label", `${place(line)}: ${speakers(line, inside.turns)}`);
      peeking(piece, () => [place(line), speakers(line, inside.turns), said(line, inside)]);
      return piece;
    });
}

function said({ kind, turns: [first, last] }, { turns: all, pins }) {
  if (kind === "pinned") return pins.join(" · ");
  return last - first === 1 ? all[first].text ?? "" : "";
}

/** What an answer has read: a row for each stretch of the memory, a column for each layer group. */
function heat(inside, peeking) {
  const held = inside.lines.filter(({ kind }) => kind === "slots" || kind === "window");
  const tops = inside.layers.map((_, i) => Math.max(...held.map(({ read }) => read[i]), 1e-9));
  const percent = (share) => `${(100 * share).toFixed(1)}`;
  const head = node("tr", node("th", "layers"), ...inside.layers.map(([a, b]) => node("th", `${a + 1}–${b}`)));
  const rows = inside.lines.map((line) => {
    const name = node("th", place(line));
    name.append(node("small", said(line, inside) || speakers(line, inside.turns)));
    const row = node(
      "tr",
      name,
      ...line.read.map((share, i) => {
        const cell = node("td", percent(share));
        const dark = Math.min(1, share / tops[i]); // the sink collects what no other wants: the scale is that of the rest
        cell.style.setProperty("--dark", `${Math.round(85 * dark)}%`);
        if (dark > 0.6) cell.className = "dark";
        return cell;
      }),
    );
    row.className = line.kind;
    row.dataset.turns = line.turns.join(" ");
    peeking(row, () => [place(line), speakers(line, inside.turns), said(line, inside)]);
    return row;
  });
  const answer = node("blockquote", inside.answer);
  const note = node(
    "p",
    "Per cent of the answer’s attention, by groups of layers: the model’s own, as a mean over heads and over the " +
      "answer’s tokens. Darkest is the largest share of slots and window in a column.",
  );
  note.className = "hint";
  return [answer, node("table", node("thead", head), node("tbody", ...rows)), note];
}
