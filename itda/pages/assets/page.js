// Files of data, the address, and which view is shown.
"use strict";

(() => {
  const { html, render } = htmPreact;
  const data = {}, waiting = {};

  // Called by the files of data. What names them is ours alone: the address never does.
  itda.data = (name, said) => { data[name] = said; };
  itda.load = (name) => waiting[name] ||= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => (name in data ? done(data[name]) : failed(new Error(`data/${name}.js has no data`)));
    script.onerror = () => failed(new Error(`data/${name}.js is missing`));
    document.head.append(script);
  });

  function state() {
    const said = new URLSearchParams(location.hash.slice(1)), index = data.index;
    const atom = /^\d{1,9}$/.test(said.get("atom") || "") ? Number(said.get("atom")) : null;
    return {
      atom: atom !== null && atom < index.n_atoms ? atom : null,
      find: said.get("find") || "",
      sort: ["atom", "label", "uses", "below", "norm"].includes(said.get("sort")) ? said.get("sort") : "",
      up: said.get("up") === "1",
      only: ["used", "unused", "below", "massive"].includes(said.get("only")) ? said.get("only") : "",
    };
  }

  itda.address = (changes) => {
    const said = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...state(), ...changes })) {
      if (value !== null && value !== "" && value !== false) said.set(name, value === true ? "1" : String(value));
    }
    return `#${said}`;
  };
  itda.change = (changes) => location.replace(itda.address(changes) === "#" ? "#find=" : itda.address(changes));

  let before;

  function draw() {
    if (location.hash === "#search") { // the link that skips to it
      const field = document.getElementById("search");
      if (field) { field.focus(); return; }
    }
    const now = state(), root = document.getElementById("page");
    render(html`<${itda.Page} index=${data.index} state=${now} />`, root);
    document.title = now.atom === null ? "Dictionary" : `Atom ${now.atom} ${itda.shown(itda.first(data.index.token[now.atom], 40))}`;
    if (before !== undefined && before !== now.atom) {
      window.scrollTo(0, 0);
      const heading = document.querySelector("h1");
      if (heading) heading.focus({ preventScroll: true });
    }
    before = now.atom;
  }

  itda.load("index").then(() => {
    document.querySelector("noscript")?.remove();
    window.addEventListener("hashchange", draw);
    document.addEventListener("keydown", (event) => {
      const field = document.getElementById("search");
      if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || !field || event.target === field) return;
      event.preventDefault();
      field.focus();
    });
    draw();
  }, (error) => { document.getElementById("page").textContent = `${error.message}: write the pages again.`; });
})();
