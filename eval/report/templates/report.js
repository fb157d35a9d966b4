
"use strict";
// Without this script everything is there to read. It sorts a table by a click on a head, opens
// settings in a dialog, and gives every strip of pairs a slider from original to reconstruction.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, at, numeric) => {
    const text = row.cells[at].textContent.trim();
    if (!numeric) return text;
    const number = text.startsWith("\u221e") ? Infinity : parseFloat(text.replaceAll(",", ""));
    return Number.isNaN(number) ? -Infinity : number;
  };
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    const numeric = head.classList.contains("number");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const state = down ? "descending" : "ascending";
      heads.forEach(other => other.setAttribute("aria-sort", other === head ? state : "none"));
      const order = (a, b) => {
        const [x, y] = [value(a, at, numeric), value(b, at, numeric)];
        return (numeric ? (x > y) - (x < y) : x.localeCompare(y)) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
const dialog = document.createElement("dialog"), shown = document.createElement("pre");
const close = document.createElement("button");
close.type = "button";
close.textContent = "Close";
close.addEventListener("click", () => dialog.close());
dialog.addEventListener("click", event => event.target === dialog && dialog.close());
dialog.append(shown, close);
document.body.append(dialog);
for (const fold of document.querySelectorAll("details:not(.help)")) {
  fold.querySelector("summary").addEventListener("click", event => {
    event.preventDefault();
    shown.textContent = fold.querySelector("pre").textContent;
    dialog.showModal();
    shown.scrollTop = 0;
  });
}
for (const help of document.querySelectorAll("details.help")) {
  help.addEventListener("toggle", () => {  // one at a time
    if (!help.open) return;
    for (const other of document.querySelectorAll("details.help[open]")) {
      if (other !== help) other.open = false;
    }
  });
}
for (const strip of document.querySelectorAll("img[data-pairs]")) {
  const pairs = Number(strip.dataset.pairs), gap = 2;  // as tokenizer.data.grid lays them out
  const make = name => document.createElement(name);
  const [canvas, view, panel] = ["canvas", "div", "div"].map(make);
  const range = (text, max, start) => {
    const label = make("label"), input = make("input");
    Object.assign(input, { type: "range", min: 0, max: max, value: start });
    label.append(text, input);
    panel.append(label);
    input.addEventListener("input", draw);
    return input;
  };
  const chosen = range("Image", pairs - 1, 0);
  const edge = range("Original to the left, reconstruction to the right", 100, 50);
  view.className = "slider";
  canvas.setAttribute("role", "img");
  view.append(canvas, panel);
  strip.closest("figure").append(view);
  function draw() {
    const width = (strip.naturalWidth - gap) / pairs - gap;
    const height = (strip.naturalHeight - gap) / 3 - gap;
    const left = gap + chosen.value * (width + gap), cut = Math.round(width * edge.value / 100);
    const pen = canvas.getContext("2d");
    canvas.width = width;
    canvas.height = height;
    pen.drawImage(strip, left, gap + height + gap, width, height, 0, 0, width, height);
    if (cut) pen.drawImage(strip, left, gap, cut, height, 0, 0, cut, height);
    pen.fillStyle = "#c89211";
    pen.fillRect(Math.min(width - 1, cut), 0, Math.max(1, width / 200), height);
    const text = `Image ${Number(chosen.value) + 1} of ${pairs}`;
    const sides = `original up to ${edge.value} % from the left, then reconstruction`;
    chosen.setAttribute("aria-valuetext", text);
    canvas.setAttribute("aria-label", `${text}: ${sides}`);
  }
  strip.addEventListener("click", event => {
    chosen.value = Math.floor(event.offsetX / strip.clientWidth * pairs);
    draw();
  });
  strip.complete ? draw() : strip.addEventListener("load", draw);
}
