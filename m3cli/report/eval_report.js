"use strict";
(() => {
  // 1. One group at a time, where the page has a map for several.
  for (const maps of document.querySelectorAll(".maps")) {
    const choice = maps.querySelector("fieldset");
    if (!choice) continue;
    const show = () => {
      const chosen = choice.querySelector(":checked").value;
      for (const map of maps.querySelectorAll(".map")) map.classList.toggle("off", map.dataset.group !== chosen);
    };
    choice.addEventListener("change", show);
    choice.hidden = false;
    maps.classList.add("chosen");
    show();
  }
  for (const hint of document.querySelectorAll(".keys")) hint.hidden = false;

  // 2. What is behind a cell, beside it.
  const tip = document.getElementById("tip");
  const showTip = (cell) => {
    const [score, where] = cell.querySelector(".words").childNodes;
    const line = (className, text) => {
      const element = document.createElement("div");
      element.className = className;
      element.textContent = text;
      return element;
    };
    tip.replaceChildren(line("", score.textContent.replace(/: $/, "")));
    if (where) tip.append(line("size", where.textContent));
    tip.hidden = false;
    const around = cell.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(around.left, document.documentElement.clientWidth - width - 8));
    const below = around.bottom + 6 + height < document.documentElement.clientHeight;
    Object.assign(tip.style, { left: `${left}px`, top: `${below ? around.bottom + 6 : Math.max(8, around.top - height - 6)}px` });
  };
  const hideTip = () => (tip.hidden = true);

  // 3. One stop of the Tab key a table, and arrows within it.
  for (const table of document.querySelectorAll(".heats")) {
    const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll(".heat")]);
    for (const cell of rows.flat()) cell.tabIndex = -1;
    if (rows.length && rows[0].length) rows[0][0].tabIndex = 0;
    const cellAt = (event) => event.target.closest(".heat");
    table.addEventListener("pointerover", (event) => {
      const cell = cellAt(event);
      if (cell) showTip(cell);
      else hideTip();
    });
    table.addEventListener("pointerleave", hideTip);
    table.addEventListener("focusin", (event) => {
      const cell = cellAt(event);
      if (cell && cell.matches(":focus-visible")) showTip(cell);
    });
    table.addEventListener("focusout", hideTip);
    table.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key === "Escape") hideTip();
      const cell = cellAt(event);
      const y = rows.findIndex((row) => row.includes(cell));
      if (y < 0) return;
      const x = rows[y].indexOf(cell);
      const last = rows[y].length - 1;
      const steps = { ArrowRight: [y, x + 1], ArrowLeft: [y, x - 1], ArrowDown: [y + 1, x], ArrowUp: [y - 1, x], Home: [y, 0], End: [y, last] };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const [row, column] = steps[event.key];
      const target = rows[row] && rows[row][column];
      if (!target) return;
      cell.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    });
  }
})();
