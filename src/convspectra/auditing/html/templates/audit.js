"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const remember = {
    get() { try { return localStorage.getItem("convspectra-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("convspectra-theme", value); } catch { /* forgotten */ } },
  };

  const themeButton = document.getElementById("theme");
  const darkPreferred = matchMedia("(prefers-color-scheme: dark)");
  function setTheme(name) {
    root.dataset.theme = name;
    themeButton.setAttribute("aria-pressed", String(name === "dark"));
  }
  const preferred = () => remember.get() || (darkPreferred.matches ? "dark" : "light");
  setTheme(preferred());
  darkPreferred.addEventListener("change", () => setTheme(preferred()));
  themeButton.addEventListener("click", () => {
    const name = root.dataset.theme === "dark" ? "light" : "dark";
    setTheme(name);
    remember.set(name);
  });

  // In the frame of a notebook "#layer-1" would be resolved against the page around it.
  if (location.protocol === "about:") {
    document.addEventListener("click", (event) => {
      const link = event.target.closest('a[href^="#"]');
      if (!link) return;
      event.preventDefault();
      location.hash = link.getAttribute("href");
    });
  }

  // A browser may clear the focus when it draws the target, so ours is set with that frame.
  const focus = (element) => requestAnimationFrame(() => element.focus({ preventScroll: true }));
  const title = document.title;
  function follow() {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    const layer = target && target.matches(".layer");
    const heading = layer && target.querySelector("h2");
    document.title = layer ? `${heading.textContent}: ${title}` : title;
    if (layer) {
      focus(heading);
      scrollTo(0, 0);
    } else if (target && target.matches("tr")) {
      focus(target.querySelector("a"));
      target.scrollIntoView({ block: "center" });
    }
  }
  addEventListener("hashchange", follow);
  if (location.hash) follow();
  addEventListener("keydown", (event) => {
    const back = document.querySelector(".layer:target .back");
    if (event.key === "Escape" && back) location.hash = back.getAttribute("href");
  });

  const table = document.getElementById("table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];

  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const ascending = header.getAttribute("aria-sort") !== "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(column, header.dataset.type === "number", ascending ? 1 : -1);
    });
  });

  function sort(column, numeric, direction) {
    const collator = new Intl.Collator("en", { numeric: true });
    const compare = numeric ? (a, b) => (a < b ? -1 : a > b ? 1 : 0) : collator.compare;
    const keyed = rows.map((row, order) => {
      const text = row.cells[column]?.dataset.key ?? "";
      return { row, order, absent: text === "", key: numeric ? Number(text) : text };
    });
    keyed.sort((a, b) =>
      a.absent - b.absent
      || (a.absent ? 0 : direction * compare(a.key, b.key))
      || a.order - b.order);
    body.append(...keyed.map((entry) => entry.row));
  }

  const search = document.getElementById("filter");
  const kinds = all(".kinds button");
  const count = document.getElementById("count");
  const nothing = document.getElementById("nothing");
  let kind = "";
  function filter() {
    const text = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const match = row.dataset.text.includes(text)
        && (!kind || row.dataset.kinds.split(" ").includes(kind));
      row.hidden = !match;
      shown += match;
    }
    count.textContent = shown === rows.length ? "" : `${shown} of ${rows.length} shown`;
    nothing.hidden = shown > 0;
  }
  search.addEventListener("input", filter);
  for (const button of kinds) {
    button.addEventListener("click", () => {
      kind = button.dataset.kind;
      for (const other of kinds) other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  }

  // The picture is drawn anew with the colors of the page as attributes: outside the page there is
  // no style sheet.
  const painted = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size",
    "font-family", "text-anchor", "display"];
  document.getElementById("save-png").addEventListener("click", () => {
    const plot = document.getElementById("overview-plot");
    const copy = plot.cloneNode(true);
    const elements = (svg) => [svg, ...svg.querySelectorAll("*")];
    const drawn = elements(copy);
    elements(plot).forEach((element, i) => {
      const style = getComputedStyle(element);
      for (const name of painted) drawn[i].setAttribute(name, style.getPropertyValue(name));
    });
    for (const text of copy.querySelectorAll("title, desc, .hit")) text.remove();
    const { width, height } = plot.viewBox.baseVal;
    const [scale, above] = [2, 34];
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", scale * width);
    copy.setAttribute("height", scale * height);
    const image = new Image();
    image.addEventListener("load", () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [scale * width, scale * (height + above)];
      const page = getComputedStyle(document.body);
      const context = canvas.getContext("2d");
      context.fillStyle = page.backgroundColor;
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 0, scale * above);
      context.scale(scale, scale);
      context.fillStyle = page.color;
      context.font = `15px ${page.fontFamily}`;
      const legend = all(".legend li", plot.closest("figure")).map((li) => li.textContent.trim());
      const signs = ["\u25cf", "\u25c6", "\u2336", "\u25cb"];
      const words = legend.map((text, i) => `${signs[i]} ${text}`);
      context.fillText(`${title}     ${words.join("   ")}`, 58, 22, width - 78);
      const link = document.createElement("a");
      link.download = "audit.png";
      link.href = canvas.toDataURL("image/png");
      link.click();
    });
    const source = new XMLSerializer().serializeToString(copy);
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source)}`;
  });

  // The plot is one stop of the Tab key; the arrow keys move from layer to layer.
  const marks = all("#overview-plot .mark");
  const readout = document.getElementById("readout");
  const usual = readout.textContent;
  marks.forEach((mark, index) => {
    mark.setAttribute("tabindex", index === 0 ? "0" : "-1");
    const tell = () => { readout.textContent = mark.querySelector("title").textContent; };
    const rest = () => { readout.textContent = usual; };
    mark.addEventListener("mouseenter", tell);
    mark.addEventListener("focus", tell);
    mark.addEventListener("mouseleave", rest);
    mark.addEventListener("blur", rest);
    mark.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: marks.length - 1 };
      const next = marks[moves[event.key]];
      if (!next) return;
      event.preventDefault();
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
})();
