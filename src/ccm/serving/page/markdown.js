"use strict";

// Markdown as nodes. marked reads the text; every node is made here, of these kinds and no others, and its words are
// text nodes. HTML stays what it is: characters. Pictures are not fetched, and links lead to web and mail alone.

const LONGEST = 50_000; // characters; a longer text is shown as it is
const SPANS = { strong: "strong", em: "em", del: "del" };

/** A text as a fragment of nodes. */
function markdown(text) {
  const made = document.createDocumentFragment();
  try {
    if (text.length > LONGEST) throw new RangeError("too long");
    made.append(...marked.lexer(text, { gfm: true, breaks: true }).map(block));
  } catch {
    made.replaceChildren(node("p", text)); // too long, or nested too deeply
  }
  return made;
}

function node(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}

function block(token) {
  switch (token.type) {
    case "space":
      return "";
    case "heading":
      return node(`h${Math.min(6, token.depth + 2)}`, ...inline(token.tokens));
    case "paragraph":
      return node("p", ...inline(token.tokens));
    case "text": // of an item in a list
      return node("span", ...inline(token.tokens ?? [token]));
    case "code":
      return node("pre", node("code", token.text));
    case "blockquote":
      return node("blockquote", ...token.tokens.map(block));
    case "hr":
      return node("hr");
    case "list": {
      const list = node(token.ordered ? "ol" : "ul", ...token.items.map(item));
      if (token.ordered && Number.isInteger(token.start)) list.start = token.start;
      return list;
    }
    case "table":
      return table(token);
    default: // HTML, definitions of links
      return node("p", token.raw.trim());
  }
}

function item(token) {
  const children = token.tokens.filter((child) => child.type !== "checkbox").map(block);
  return node("li", token.task ? (token.checked ? "☑ " : "☐ ") : "", ...children);
}

function table(token) {
  const row = (cells, tag) => node("tr", ...cells.map((cell) => node(tag, ...inline(cell.tokens))));
  const rows = token.rows.map((cells) => row(cells, "td"));
  return node("div", node("table", node("thead", row(token.header, "th")), node("tbody", ...rows)));
}

function inline(tokens) {
  return tokens.map((token) => {
    if (SPANS[token.type]) return node(SPANS[token.type], ...inline(token.tokens));
    if (token.type === "codespan") return node("code", token.text);
    if (token.type === "br") return node("br");
    if (token.type === "link") return link(token);
    if (token.type === "text" && token.tokens) return node("span", ...inline(token.tokens));
    return token.type === "text" || token.type === "escape" ? token.text : token.raw;
  });
}

function link(token) {
  if (!/^(https?:\/\/|mailto:)/i.test(token.href)) return token.raw;
  const made = node("a", ...inline(token.tokens));
  made.href = token.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = token.href;
  return made;
}
