// What is drawn: the overview with its list, and an atom. Every text becomes text, never markup.
"use strict";

(() => {
  const { html, useEffect, useState } = htmPreact;
  const { shown, first, last, whole } = itda;
  const SHOWN = 200; // rows of the list at first, and at each asking for more
  const INTERVALS = ["weakest fifth", "fourth fifth", "middle fifth", "second fifth", "strongest fifth", "largest"];
  const SIGNS = ["above 0", "below 0"];
  const WAIT = 150; // milliseconds after the last key until the list is searched

  const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 4 }));
  const count = (value, what) => `${value.toLocaleString("en")} ${what}${value === 1 ? "" : "s"}`;
  const percent = (value) => (value === 0 ? "0 %" : value < 1e-4 ? "< 0.01 %" : `${(100 * value).toPrecision(3).replace(/\.?0+$/, "")} %`);

  function useData(name) {
    const [found, set] = useState({});
    useEffect(() => {
      if (name) itda.load(name).then((data) => set({ name, data }), (error) => set({ name, error: error.message }));
    }, [name]);
    return found.name === name ? found : {};
  }

  function Context({ before, token, after, most = 60 }) {
    const blank = token.trim() ? token.match(/^ */)[0] : ""; // before the mark, or it stays at the end of a line
    return html`<bdi class="context">${shown(last(before, most)) + blank}<mark>${
      shown(first(token.slice(blank.length), 200)) || "∅"}</mark>${shown(first(after, most))}</bdi>`;
  }

  const Label = ({ index, atom }) => html`<${Context} before=${index.before[atom]} token=${index.token[atom]} after=${index.after[atom]} most=${window.innerWidth < 640 ? 8 : 48} />`;
  const Short = ({ index, atom }) => html`<${Context} before=${index.before[atom]} token=${index.token[atom]} after=${index.after[atom]} most=${24} />`;

  // -- overview -----------------------------------------------------------------------------------------------------

  function Facts({ rows }) {
    const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
    return html`<dl class="facts">${known.map(([name, value]) => html`<div><dt>${name}</dt><dd>${
      typeof value === "number" ? number(value) : shown(first(String(value), 300))}</dd></div>`)}</dl>`;
  }

  function About({ index }) {
    const { cfg, uses } = index, model = cfg.model || {}, stream = cfg.stream || {};
    return html`<section aria-labelledby="about"><h2 id="about">What it was built from</h2>
      <${Facts} rows=${[["model", model.id], ["revision", model.revision], ["hook point", model.hook_point],
        ["data", stream.data], ["tokens", cfg.tokens], ["context length", stream.context_length],
        ["atoms", index.n_atoms], ["size of an activation", index.d], ["atoms a token (k)", index.k],
        ["admission", cfg.admission], ["threshold", cfg.threshold], ["FVU on its sample", cfg.fvu],
        ["uses counted on", uses && count(uses.tokens, "token")], ["atoms a token uses", uses && uses.l0],
        ["itda", index.version]]} />
      ${!uses && html`<p class="note">What its atoms do is not known yet: run <code>itda uses DIR DATA</code>, and write these pages again.</p>`}
      <details><summary>All settings</summary><pre tabindex="0">${shown(JSON.stringify(cfg, null, 1).replace(/\n/g, "\u0000")).replace(/␀/g, "\n")}</pre></details>
    </section>`;
  }

  function Figures({ evaluation }) {
    if (!evaluation) return null;
    const names = Object.keys(evaluation.systems), columns = Object.keys(evaluation.systems[names[0]] || {});
    return html`<section aria-labelledby="figures"><h2 id="figures">How good it is</h2>
      <p>${shown(first(`${evaluation.verdict || ""} ${count(evaluation.tokens || 0, "token")} of ${evaluation.data || "held-out data"}.`.trim(), 600))}</p>
      <div class="wide" tabindex="0" role="region" aria-label="Figures of itda eval"><table><thead><tr><th scope="col">system</th>${
        columns.map((name) => html`<th scope="col" class="n">${name.replace(/_/g, " ")}</th>`)}</tr></thead>
      <tbody>${names.map((name) => html`<tr><th scope="row">${shown(name)}</th>${
        columns.map((column) => html`<td class="n">${number(evaluation.systems[name][column])}</td>`)}</tr>`)}</tbody></table></div></section>`;
  }

  const usesOf = (index, i) => (index.positive ? index.positive[i] + index.negative[i] : index.sampled ? index.sampled[i] : 0);
  const below = (index, i) => (index.positive && usesOf(index, i) ? index.negative[i] / usesOf(index, i) : 0);
  const KEYS = {
    atom: () => (i) => i,
    label: (index) => (i) => index.token[i].trim().toLowerCase(),
    uses: (index) => (i) => usesOf(index, i),
    below: (index) => (i) => below(index, i),
    norm: (index) => (i) => index.norm[i],
  };

  // Rows of the list as the address asks for them.
  function rowsOf(index, state, texts, contexts) {
    const massive = new Set(index.massive);
    const kept = {
      used: (i) => usesOf(index, i) > 0, unused: (i) => usesOf(index, i) === 0,
      below: (i) => below(index, i) > 0.5, massive: (i) => massive.has(i),
    }[state.only] || (() => true);
    const rows = state.find.trim()
      ? itda.find(index, texts, contexts, state.find)
      : Array.from({ length: index.n_atoms }, (_, atom) => ({ atom }));
    const left = rows.filter((row) => kept(row.atom));
    const by = state.sort || (state.find.trim() ? "" : "uses");
    if (!by) return left;
    const key = KEYS[by](index), sign = state.up || (!state.sort && by === "atom") ? 1 : -1;
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    return left.sort((a, b) => sign * compare(key(a.atom), key(b.atom)) || a.atom - b.atom);
  }

  function Sorter({ name, by, state, children, ...more }) {
    const up = by === "atom" || by === "label", now = state.sort === by;
    const said = now ? (state.up ? "ascending" : "descending") : "none";
    const pressed = () => itda.change({ sort: by, up: now ? !state.up : up });
    return html`<th scope="col" aria-sort=${said} ...${more}><button type="button" onClick=${pressed}>${name}${
      now ? html`<span aria-hidden="true">${state.up ? " ↑" : " ↓"}</span>` : null}</button></th>`;
  }

  function List({ index, state }) {
    const [text, type] = useState(state.find), [most, more] = useState(SHOWN);
    const asked = Boolean(state.find.trim()) && Boolean(index.uses);
    const texts = useData(asked && "texts"), contexts = useData(asked && "contexts");
    useEffect(() => { type(state.find); more(SHOWN); }, [state.find]);
    useEffect(() => {
      if (text === state.find) return undefined;
      const timer = setTimeout(() => itda.change({ find: text }), WAIT);
      return () => clearTimeout(timer);
    }, [text]);
    const rows = rowsOf(index, state, texts.data, contexts.data);
    const ready = !asked || (texts.data && contexts.data) || texts.error || contexts.error;
    const finding = Boolean(state.find.trim());
    const all = index.positive ? index.uses.tokens : null;
    return html`<section aria-labelledby="atoms"><h2 id="atoms">Atoms</h2>
      <form role="search" class="controls" onSubmit=${(event) => event.preventDefault()}>
        <label>Search labels and contexts <input id="search" type="search" autocomplete="off" spellcheck=${false} value=${text}
          onInput=${(event) => type(event.target.value)} /></label>
        <label>Show <select value=${state.only} onChange=${(event) => itda.change({ only: event.target.value })}>
          <option value="">all atoms</option><option value="used">those that are used</option><option value="unused">those never used</option>
          ${index.positive && html`<option value="below">those mostly below 0</option>`}<option value="massive">massive tokens</option></select></label>
      </form>
      <p role="status" data-ready=${ready && text === state.find ? "yes" : "no"}>${count(rows.length, "atom")}${ready ? "" : ", contexts are being read …"}${
        texts.error || contexts.error ? `; ${texts.error || contexts.error}` : ""}</p>
      <table class="list"><thead><tr>
        <${Sorter} name="atom" by="atom" state=${state} class="n" /><${Sorter} name="label" by="label" state=${state} />
        ${finding && html`<th scope="col" class="match">found</th>`}
        <${Sorter} name=${all ? "uses" : "in sample"} by="uses" state=${state} class="n" />
        ${all && html`<${Sorter} name="below 0" by="below" state=${state} class="n extra" />`}
        <${Sorter} name="norm" by="norm" state=${state} class="n extra" /></tr></thead>
      <tbody>${rows.slice(0, most).map((row) => html`<tr key=${row.atom}>
        <td class="n">${row.atom}</td>
        <td><a href=${itda.address({ atom: row.atom })} data-atom=${row.atom}><${Label} index=${index} atom=${row.atom} /></a></td>
        ${finding && html`<td class="match">${row.match}</td>`}
        <td class="n">${all || index.sampled ? usesOf(index, row.atom).toLocaleString("en") : "–"}</td>
        ${all && html`<td class="n extra">${percent(below(index, row.atom))}</td>`}
        <td class="n extra">${number(index.norm[row.atom])}</td></tr>`)}</tbody></table>
      ${rows.length > most && html`<button type="button" class="more" onClick=${() => more(most + SHOWN)}>Show more (${(rows.length - most).toLocaleString("en")} left)</button>`}
    </section>`;
  }

  const Overview = ({ index, state }) => html`<main><h1 tabindex="-1">${shown(first(
    [(index.cfg.model || {}).id, (index.cfg.model || {}).hook_point].filter(Boolean).map((s) => String(s).split("/").pop()).join(" · ") || "Dictionary", 120))}</h1>
    <${List} index=${index} state=${state} /><${About} index=${index} /><${Figures} evaluation=${index.evaluation} /></main>`;

  // -- an atom ------------------------------------------------------------------------------------------------------

  function Bars({ values, labels, title }) {
    const top = Math.max(...values, 1e-12), wide = 100 / values.length;
    return html`<figure><svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label=${title}>${values.map((value, i) => html`<rect
      x=${i * wide + wide * 0.06} width=${wide * 0.88} y=${40 - (38 * value) / top} height=${(38 * value) / top}><title>${labels[i]}</title></rect>`)}</svg>
      <figcaption><span>${labels[0].split(":")[0]}</span><span>${title}</span><span>${labels[labels.length - 1].split(":")[0]}</span></figcaption></figure>`;
  }

  function Promoted({ name, tokens, sign }) {
    return html`<div><h4>${name}</h4><ul class="chips">${tokens.map(([token, logit]) => html`<li><bdi>${shown(token) || "∅"}</bdi> <small>${
      sign * logit > 0 ? "+" : ""}${number(sign * logit)}</small></li>`)}</ul></div>`;
  }

  function Examples({ examples, texts }) {
    if (!texts.data) return html`<p>${texts.error || "Texts are being read …"}</p>`;
    const groups = new Map();
    for (const one of examples) groups.set(one[0], [...(groups.get(one[0]) || []), one]);
    return [...groups].map(([interval, some]) => html`<h4>${INTERVALS[interval]}</h4><ol class="examples">${some.map(([, coefficient, number_, position, start, end]) => {
      const text = texts.data[number_], from = Math.max(0, start), to = Math.max(from, end);
      return html`<li><span class="n" title="coefficient">${number(coefficient)}</span><${Context} before=${text.slice(0, from)}
        token=${to > from ? text.slice(from, to) : `<token at ${position}>`} after=${text.slice(to)} most=${80} /></li>`;
    })}</ol>`);
  }

  function Beside({ index, rows, head }) {
    return html`<ul class="beside">${rows.map(([atom, said]) => html`<li><a href=${itda.address({ atom })}>${atom} <${Short} index=${index} atom=${atom} /></a> <small title=${head}>${said}</small></li>`)}</ul>`;
  }

  function Sign({ index, atom, found, negative, texts }) {
    const sign = found.signs[Number(negative)], uses = index.uses, used = (negative ? index.negative : index.positive)[atom];
    const name = SIGNS[Number(negative)], id = `sign-${Number(negative)}`;
    if (!used) return html`<section class="sign" aria-labelledby=${id}><h2 id=${id}>Coefficients ${name}</h2><p>No token of ${uses.tokens.toLocaleString("en")}.</p></section>`;
    const ends = negative ? [found.down, found.up] : [found.up, found.down], turn = negative ? -1 : 1;
    const places = uses.positions.map((all, i) => [all, sign.positions[i], i]).filter(([all]) => all);
    const span = (i) => (i < 2 ? `${i}` : `${2 ** (i - 1)}–${2 ** i - 1}`);
    return html`<section class="sign" aria-labelledby=${id}><h2 id=${id}>Coefficients ${name}</h2>
      <p>${count(used, "token")}, ${percent(used / uses.tokens)} of all.</p>
      <div class="plots"><${Bars} title="coefficients" values=${sign.histogram} labels=${sign.histogram.map((n, i) =>
        `${number(turn * uses.edges[sign.first + i])}: ${count(n, "token")}`)} />
      <${Bars} title="share by position" values=${places.map(([all, own]) => own / all)} labels=${places.map(([all, own, i]) =>
        `${span(i)}: ${percent(own / all)}`)} /></div>
      ${found.up.length > 0 && html`<h3>Promotes</h3><${Promoted} name="raises" tokens=${ends[0]} sign=${turn} /><${Promoted} name="lowers" tokens=${ends[1]} sign=${turn} />`}
      <h3>Examples</h3><${Examples} examples=${sign.examples} texts=${texts} />
      <h3>Used together with</h3>${sign.together.length ? html`<${Beside} index=${index} head="how much more often than by chance" rows=${sign.together.map(([key, tokens, lift]) =>
        [key >> 1, `${key % 2 ? "below 0, " : ""}lift ${number(lift)}, ${count(tokens, "token")}`])} />` : html`<p>None beyond chance.</p>`}
    </section>`;
  }

  function Atom({ index, state }) {
    const { atom } = state;
    const shard = useData(`atoms-${String(Math.floor(atom / index.shard)).padStart(3, "0")}`), texts = useData(index.uses && "texts");
    const found = shard.data && shard.data[atom % index.shard];
    const label = found ? found.label : { before: index.before[atom], token: index.token[atom], after: index.after[atom] };
    return html`<main class="atom"><nav aria-label="Atoms"><a href=${itda.address({ atom: null }) === "#" ? "#find=" : itda.address({ atom: null })}>← all atoms</a>
        ${atom > 0 && html`<a href=${itda.address({ atom: atom - 1 })} rel="prev">previous</a>`}
        ${atom + 1 < index.n_atoms && html`<a href=${itda.address({ atom: atom + 1 })} rel="next">next</a>`}</nav>
      <h1 tabindex="-1">Atom ${atom}</h1>
      <p class="label"><${Context} ...${label} most=${160} /></p>
      ${!found ? html`<p role="status">${shard.error ? `${shard.error}: write the pages again.` : "It is being read …"}</p>` : html`
        <${Facts} rows=${[["seen in prompt", label.prompt], ["at position", label.position], ["document", label.document >= 0 ? label.document : null],
          ["norm", index.norm[atom]], ["loss when admitted", found.loss], ["cosine with its activation", found.moved],
          ["massive token", index.massive.includes(atom) ? "yes" : null],
          ["uses in the sample", index.sampled && index.sampled[atom]]]} />
        ${index.uses ? html`
          ${index.uses.no_lens && html`<p class="note">What it promotes is not known, since ${shown(index.uses.no_lens)}.</p>`}
          <div class="signs">${[false, true].map((negative) => html`<${Sign} index=${index} atom=${atom} found=${found} negative=${negative} texts=${texts} />`)}</div>
          <section aria-labelledby="near"><h2 id="near">Nearest by cosine</h2><${Beside} index=${index} head="cosine" rows=${found.nearest.map(([other, cosine]) => [other, number(cosine)])} /></section>`
        : html`<p class="note">What it does is not known yet: run <code>itda uses DIR DATA</code>, and write these pages again.</p>`}`}
    </main>`;
  }

  itda.Page = ({ index, state }) => (state.atom === null
    ? html`<${Overview} index=${index} state=${state} />` : html`<${Atom} key=${state.atom} index=${index} state=${state} />`);
})();
