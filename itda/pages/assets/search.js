// Texts that are safe to look at, and the search that `itda show --find` does.
"use strict";

const itda = (() => {
  const MATCHES = ["token", "in token", "part of it", "used on it", "near it"];
  const BEFORE = 60, AFTER = 30; // characters around a token that count as its context
  // What commands terminals, turns the direction of writing, or cannot be seen at all; and halves of characters.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

  function symbol(character) {
    const code = character.charCodeAt(0);
    if (code === 10) return "↵";
    if (code === 9) return "⇥";
    if (code < 32) return String.fromCharCode(0x2400 + code);
    if (code === 127) return "␡";
    return `⟦U+${code.toString(16).toUpperCase().padStart(4, "0")}⟧`;
  }

  const shown = (text) => text.replace(HIDDEN, symbol);

  // A place in a text that is not amid a character of two units.
  function whole(text, place) {
    const code = text.charCodeAt(place);
    return place > 0 && code >= 0xdc00 && code <= 0xdfff ? place - 1 : place;
  }

  const first = (text, n) => (text.length > n ? text.slice(0, whole(text, n)) + "…" : text);
  const last = (text, n) => (text.length > n ? "…" + text.slice(whole(text, text.length - n)) : text);

  let lower = null; // the labels in lower case, made when first asked

  function ofLabel(index, i, wanted) {
    const n = wanted.length, spelt = index.spelt[i], token = lower.token[i];
    if (token.trim() === wanted) return "token";
    if (!spelt || token.includes(wanted)) return spelt ? "in token" : null;
    const before = lower.before[i].slice(-n), around = before + token + lower.after[i].slice(0, n);
    const place = around.indexOf(wanted, Math.max(0, before.length - n + 1));
    const begin = before.length + token.length - token.trimStart().length;
    return place >= 0 && place < before.length + token.length && place + n > begin ? "part of it" : null;
  }

  // Of each key (2 atom + 1 below 0), of how many examples the text is on the token, and near it.
  function ofContexts(texts, contexts, wanted) {
    const pattern = new RegExp(wanted.replace(/[\\^$.*+?()[\]{}|/-]/g, (c) => (c === "-" ? "\\x2d" : "\\" + c)), "giu");
    const found = new Map();
    texts.forEach((text, number) => {
      const spans = Array.from(text.matchAll(pattern), (match) => [match.index, match.index + match[0].length]);
      const row = spans.length ? contexts[number] : [];
      for (let i = 0; i < row.length; i += 3) {
        const [key, start, end] = row.slice(i, i + 3);
        const on = spans.some(([from, to]) => start < to && from < end);
        if (!on && !spans.some(([from, to]) => start - BEFORE <= from && to <= end + AFTER)) continue;
        const one = found.get(key) || found.set(key, { on: 0, near: 0 }).get(key);
        one[on ? "on" : "near"] += 1;
      }
    });
    return found;
  }

  // Rows {atom, match, examples}, the best first; `contexts` and `texts` may not be there.
  function find(index, texts, contexts, text) {
    const wanted = text.trim(), small = wanted.toLowerCase();
    if (!lower) {
      const all = (some) => some.map((one) => one.toLowerCase());
      lower = { before: all(index.before), token: all(index.token), after: all(index.after) };
    }
    const rows = new Map();
    for (let i = 0; i < index.n_atoms; i++) {
      const match = ofLabel(index, i, small);
      if (match) rows.set(i, { atom: i, match, examples: 0 });
    }
    if (texts && contexts) {
      for (const [key, { on, near }] of ofContexts(texts, contexts, wanted)) {
        const atom = key >> 1, match = on ? "used on it" : "near it", examples = on || near, known = rows.get(atom);
        if (!known) rows.set(atom, { atom, match, examples });
        else if (MATCHES.indexOf(match) < MATCHES.indexOf(known.match)) Object.assign(known, { match, examples });
        else if (match === known.match) known.examples += examples;
      }
    }
    const uses = (i) => (index.positive ? index.positive[i] + index.negative[i] : index.sampled ? index.sampled[i] : 0);
    return [...rows.values()].sort((a, b) => MATCHES.indexOf(a.match) - MATCHES.indexOf(b.match)
      || b.examples - a.examples || uses(b.atom) - uses(a.atom) || a.atom - b.atom);
  }

  return { shown, whole, first, last, find };
})();
