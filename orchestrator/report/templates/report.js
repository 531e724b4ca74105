// The page of one run: draws the figures, and shows what is best under the chosen latency budget.
// All text of the run goes in through textContent or attributes, so nothing of it can become markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const PART_COLOURS = ["#56B4E9", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#332288"];
  const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const EMPTY = {
    front: "No trials yet.", prediction: "No held-out latency predictions yet.", best: "No trials yet.",
    hypervolume: "No trials yet.", training: "No training epochs recorded.",
  };

  const element = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const svg = (tag, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };

  // --- numbers as a person reads them ---------------------------------------------------------------------------
  const known = (value) => value !== null && value !== undefined;
  const percent = (value) => known(value) ? (100 * value).toFixed(2) + " %" : "?";
  const ms = (value) => known(value) ? value.toPrecision(4) + " ms" : "?";
  const count = (value) => {
    if (!known(value)) return "?";
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (value >= size) return (value / size).toPrecision(3) + unit;
    return String(value);
  };

  // --- what is best under a budget ------------------------------------------------------------------------------
  let view = data.views[0];  // of the chosen target
  // The front is sorted by latency and strictly increases in accuracy, so its last member under the budget is the best.
  const bestTrial = (budget) => view.front.filter((row) => row.latency_ms <= budget).at(-1);
  const bestModel = (budget) => view.models.filter((row) => row.latency_ms <= budget)
    .reduce((best, row) => !best || row.accuracy > best.accuracy
      || (row.accuracy === best.accuracy && row.latency_ms < best.latency_ms) ? row : best, undefined);

  // --- drawing of an architecture, block by block ---------------------------------------------------------------
  const parts = data.drawing ? [...new Set(data.drawing.blocks.flatMap((block) => block.parts))].sort() : [];
  const coloured = parts.filter((part) => !["other", "none", "kernel 1"].includes(part));
  const colour = (part) => coloured.includes(part) ? PART_COLOURS[coloured.indexOf(part) % PART_COLOURS.length]
    : { other: "#9aa5b1", none: "#e4e7eb" }[part] || "#52606d";
  const SLOT = 24, HEIGHT = 84, STAGE_GAP = 9, LABEL = 16;

  const drawBlock = (block, x, hint) => {
    const width = Math.max(5, (SLOT - 3) * block.width), height = HEIGHT * block.height;
    const left = x + (SLOT - width) / 2, top = (HEIGHT - height) / 2;
    const group = svg("g", { class: "block", tabindex: "0", "data-label": block.label }, svg("title", {}, block.label + "\n" + block.detail));
    block.parts.forEach((part, index) => group.append(svg("rect", {
      x: left, y: top + index * height / block.parts.length, width, height: height / block.parts.length, rx: 2,
      fill: colour(part), stroke: "white", "stroke-width": 0.6,
    })));
    const say = () => { hint.textContent = block.label + ": " + block.detail; };
    for (const event of ["pointerenter", "focus", "click"]) group.addEventListener(event, say);
    return group;
  };

  const draw = (archId) => {
    const row = data.drawing && data.drawing.architectures[archId];
    const box = element("div");
    if (!row) return box;
    const hint = element("div", { class: "hint" }, data.drawing.hint + " Point at a block for its settings.");
    const group = svg("g");
    let x = 2, start = 2, stage = null;
    const endStage = (end) => {
      if (stage === null || stage < 0) return;
      group.append(svg("text", { x: (start + end) / 2, y: HEIGHT + LABEL - 3, "text-anchor": "middle", "font-size": 10, fill: "#616e7c" }, (end - start > SLOT ? "stage " : "") + (stage + 1)));
    };
    data.drawing.slots.forEach((slot, index) => {
      if (stage !== null && slot.stage !== stage) {
        endStage(x);
        group.append(svg("line", { x1: x + STAGE_GAP / 2, x2: x + STAGE_GAP / 2, y1: 0, y2: HEIGHT + LABEL, stroke: "#e4e7eb", "stroke-width": 1 }));
        x += STAGE_GAP; start = x;
      }
      stage = slot.stage;
      if (row[index] >= 0) group.append(drawBlock(data.drawing.blocks[row[index]], x, hint));
      else group.append(svg("rect", { class: "skipped", x: x + 5, y: HEIGHT / 2 - 14, width: SLOT - 10, height: 28, rx: 2, fill: "none", stroke: "#9aa5b1", "stroke-dasharray": "3 2", "stroke-width": 0.8 }, svg("title", {}, "skipped layer")));
      x += SLOT;
    });
    endStage(x);
    const used = new Set(row.filter((i) => i >= 0).flatMap((i) => data.drawing.blocks[i].parts));
    const legend = element("div", { class: "legend" }, ...parts.filter((part) => used.has(part)).map((part) =>
      element("span", {}, element("i", { style: "background:" + colour(part) }), part)));
    if (row.includes(-1)) legend.append(element("span", {}, element("i", { class: "gap" }), "skipped layer"));
    box.append(svg("svg", { class: "drawing", viewBox: `0 0 ${x + 2} ${HEIGHT + LABEL}`, role: "img", "aria-label": "architecture " + archId, "data-arch": archId }, group), legend, hint);
    return box;
  };

  // --- the two cards --------------------------------------------------------------------------------------------
  const fact = (name, value, field) => element("div", {}, element("dt", {}, name), element("dd", { "data-field": field }, value));
  const card = (kind, title, subtitle, ...children) => element("div", { class: "choice " + kind, id: "choice-" + kind },
    element("h3", {}, title + " ", element("small", {}, subtitle)), ...children);

  const modelCard = (model, budget) => {
    const bare = model ? !model.file : view.bare;  // an architecture without a model
    const title = bare ? "Chosen architecture" : "Handed-over model";
    if (!model) {
      const target = data.views.length > 1 ? ` --target ${view.label}` : "";
      return card("model", title, "none at or under " + ms(budget),
        element("p", {}, bare ? "Choose one: " : "Make one: ", element("code", {}, `paretoray generate ${data.run} --budget ${Number(budget.toPrecision(4))}ms${target}`)));
    }
    const budgets = view.models.filter((row) => row.arch_id === model.arch_id).map((row) => Number(row.budget_ms.toPrecision(4)));
    const error = known(model.latency_stderr_ms) ? " ± " + model.latency_stderr_ms.toPrecision(2) : "";
    const file = model.href ? element("a", { href: model.href }, model.file) : model.file || "none";
    return card("model", title, (bare ? "not trained or exported; for " : "trained, exported and measured for ") + budgets.join(", ") + " ms",
      element("dl", {}, fact("Test accuracy", percent(model.test_accuracy), "test"), fact("Validation", percent(model.accuracy), "accuracy"),
        fact(bare ? "Latency (looked up)" : "Measured latency", ms(model.latency_ms).replace(" ms", error + " ms"), "latency"), fact("Predicted", ms(model.predicted_ms), "predicted"),
        fact("Multiply-adds", count(model.madds), "madds"), fact("Parameters", count(model.params), "params"),
        fact(bare ? "Model" : "File", file, "file")), draw(model.arch_id));
  };
  const trialCard = (trial, budget) => {
    if (!trial) return card("trial", "Best trial of the search", "none at or under " + ms(budget));
    return card("trial", "Best trial of the search", `number ${trial.sequence}, accuracy from ${trial.accuracy_source || "unknown source"}`,
      element("dl", {}, fact("Validation accuracy", percent(trial.accuracy), "accuracy"), fact(`Latency (${trial.latency_source || "unknown source"})`, ms(trial.latency_ms), "latency"),
        fact("Multiply-adds", count(trial.madds), "madds"), fact("Parameters", count(trial.params), "params")), draw(trial.arch_id));
  };

  // --- figures and the slider -----------------------------------------------------------------------------------
  const range = byId("budget"), number = byId("budget-number"), choices = byId("choices"), plot = byId("figure-front");
  let pending = null;

  const drawFigures = (figures, hidden) => {
    for (const [name, figure] of Object.entries(figures)) {
      const box = byId("figure-" + name);
      Plotly.purge(box);
      box.replaceChildren();
      box.classList.toggle("empty", !figure);
      const frame = box.closest("figure");
      if (frame) frame.hidden = hidden.includes(name);
      if (figure && !hidden.includes(name)) Plotly.newPlot(box, figure.data, figure.layout, CONFIG);
      else if (!figure) box.textContent = EMPTY[name] || "";
    }
  };
  const show = (budget, from) => {
    if (from !== range) range.value = budget;
    if (from !== number) number.value = Number(budget.toPrecision(4));
    const model = bestModel(budget), trial = bestTrial(budget);
    choices.replaceChildren(modelCard(model, budget), trialCard(trial, budget));
    if (pending) cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => Plotly.relayout(plot, { shapes: [
      { type: "line", x0: budget, x1: budget, y0: 0, y1: 1, yref: "paper", line: { color: "#0072B2", width: 2, dash: "dot" } },
      { type: "rect", x0: budget, x1: 10 * view.budget.max, y0: 0, y1: 1, yref: "paper", fillcolor: "#9aa5b1", opacity: 0.12, line: { width: 0 }, layer: "below" },
    ] }));
  };
  const choose = (chosen) => {
    view = chosen;
    drawFigures(view.figures, view.hidden);
    for (const note of document.querySelectorAll("[data-note]")) note.textContent = view.notes[note.dataset.note];
    for (const tab of byId("targets").children) tab.setAttribute("aria-selected", tab.dataset.target === view.label);
    byId("slider").hidden = !view.budget;
    choices.replaceChildren();
    if (!view.budget) return;
    range.min = view.budget.min;
    range.max = view.budget.max;
    if (view.figures.front) plot.on("plotly_click", (event) => show(event.points[0].x, null));
    show(view.budget.start, null);
  };

  range.addEventListener("input", () => show(Number(range.value), range));
  number.addEventListener("input", () => { if (number.value > 0) show(Number(number.value), number); });
  if (data.views.length > 1) {
    byId("targets").hidden = false;
    byId("targets").append(...data.views.map((one) => {
      const tab = element("button", { type: "button", role: "tab", "data-target": one.label }, one.label);
      tab.addEventListener("click", () => choose(one));
      return tab;
    }));
  }
  drawFigures(data.figures, data.hidden);
  choose(data.views[0]);
})();
