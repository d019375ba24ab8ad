"use strict";
(() => {
  const HEADER = 19; // px that the name of a directory takes above its entries
  const INSET = 2; // px around them
  const SMALLEST = 220; // px² of a cell; what is smaller is grouped with others
  const GROUP = 1000; // px² of such a group
  const LETTER = 6.6; // px that a letter takes on average
  const SHORTEST = 7; // letters of a name; one that has to be cut further is not written at all
  const COLOURS = 8; // .c0 to .c7 of the style sheet; .c8 is for all the rest
  const DOMINANT = 0.6; // share of the tokens from which a directory is no colour of its own
  const PAGE = 50; // rows of the table of files

  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("pack-data").textContent);
  const number = (count) => count.toString().replace(/\B(?=(\d{3})+$)/g, ",");
  const amount = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
  const percent = (share) => {
    const rounded = Math.floor(share * 1000 + 0.5) / 10;
    return rounded || !share ? `${rounded.toFixed(1)}%` : "<0.1%";
  };
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // 1. The tree. A group stands for siblings that are too small to be drawn; only `entriesFor` makes them.
  const files = [];
  const read = (raw, parent) => {
    const [name, tokens, count, rest, type] = raw;
    const path = parent && parent.path ? `${parent.path}/${name}` : name;
    const node = { name, tokens, parent, path, hits: 1 };
    if (Array.isArray(rest)) {
      node.files = count;
      node.entries = rest.map((entry) => read(entry, node));
    } else {
      Object.assign(node, { chunks: count, omitted: rest, type, files: 1, key: path.toLowerCase() });
      files.push(node);
    }
    return node;
  };
  const root = read(data.root, null);
  const total = root.tokens;
  files.sort((a, b) => b.tokens - a.tokens); // stable, as the order of the table in the page is
  const shareOf = (tokens) => percent(total ? tokens / total : 0);

  const grouped = (entries, parent) => {
    const sum = (key) => entries.reduce((so_far, entry) => so_far + entry[key], 0);
    const count = sum("files");
    const name = `${amount(count, "more file")}`;
    return { name, tokens: sum("tokens"), files: count, hits: sum("hits"), parent, path: parent.path, entries, group: true };
  };

  /** The entries of `node` that are drawn on `area` px², the largest first: some of them groups. */
  const entriesFor = (node, area) => {
    const scale = area / node.tokens;
    const entries = node.entries.filter((entry) => entry.tokens > 0);
    const first = entries.findIndex((entry) => entry.tokens * scale < SMALLEST);
    if (first < 0 || first === entries.length - 1) return entries;
    const groups = [];
    let members = [];
    let size = 0;
    for (const entry of entries.slice(first)) {
      members.push(entry);
      size += entry.tokens * scale;
      if (size >= GROUP) {
        groups.push(members);
        members = [];
        size = 0;
      }
    }
    if (groups.length) groups[groups.length - 1].push(...members);
    else groups.push(members);
    const drawn = [...entries.slice(0, first), ...groups.map((group) => grouped(group, node))];
    return drawn.sort((a, b) => b.tokens - a.tokens);
  };

  /** Squarified treemap (Bruls, Huizing and van Wijk, 2000): rows of cells that are as square as can be. */
  const squarify = (entries, x, y, width, height, place) => {
    let rest = entries.reduce((sum, entry) => sum + entry.tokens, 0);
    for (let start = 0; start < entries.length; ) {
      const side = Math.min(width, height);
      const scale = (width * height) / rest;
      let end = start;
      let sum = 0;
      for (let worst = Infinity; end < entries.length; end++) {
        const thickness = ((sum + entries[end].tokens) * scale) / side;
        const ratios = [entries[start], entries[end]].map((entry) => (entry.tokens * scale) / thickness ** 2);
        const ratio = Math.max(ratios[0], 1 / ratios[1]);
        if (ratio > worst) break;
        worst = ratio;
        sum += entries[end].tokens;
      }
      const thickness = (sum * scale) / side;
      let offset = 0;
      for (const entry of entries.slice(start, end)) {
        const length = (entry.tokens * scale) / thickness;
        if (width >= height) place(entry, x, y + offset, thickness, length);
        else place(entry, x + offset, y, length, thickness);
        offset += length;
      }
      if (width >= height) [x, width] = [x + thickness, width - thickness];
      else [y, height] = [y + thickness, height - thickness];
      rest -= sum;
      start = end;
    }
  };

  // 2. The map.
  const map = byId("map");
  const tip = byId("tip");
  const ring = make("div", "ring"); // round the cell with the focus, above the cells that lie on it
  ring.setAttribute("role", "presentation");
  let shown = root;
  let colourBy = "directory";
  let nodeOf = new Map();
  let searching = false;

  /** The directories below `shown` that have colours of their own: its own, or where one of them holds
   * most of the tokens, those in that one. */
  const colouredDirectories = () => {
    const directories = (node) => node.entries.filter((entry) => entry.entries);
    let coloured = directories(shown);
    for (;;) {
      const largest = coloured.reduce((a, b) => (b.tokens > a.tokens ? b : a), { tokens: 0 });
      if (largest.tokens <= DOMINANT * shown.tokens || !directories(largest).length) return coloured;
      coloured = coloured.filter((node) => node !== largest).concat(directories(largest));
    }
  };

  /** Colours of what is shown: a function of a node and of the colour around it, and the legend's rows. */
  const palette = () => {
    const tokens = new Map(); // of each type or directory
    const byType = colourBy === "type";
    if (byType) {
      const visit = (node) => {
        if (node.entries) node.entries.forEach(visit);
        else tokens.set(node.type, (tokens.get(node.type) || 0) + node.tokens);
      };
      visit(shown);
    } else for (const node of colouredDirectories()) tokens.set(node, node.tokens);
    if (!tokens.size) tokens.set(null, shown.tokens); // files alone
    const rows = [...tokens].sort((a, b) => b[1] - a[1]);
    const colour = new Map(rows.slice(0, COLOURS).map(([key], i) => [key, i]));
    const prefix = shown.path ? shown.path.length + 1 : 0;
    const title = (key) => (key === null ? "files" : byType ? data.types[key] : `${key.path.slice(prefix)}/`);
    const legend = rows.slice(0, COLOURS).map(([key, sum], i) => ({ name: title(key), sum, colour: i }));
    const others = shown.tokens - legend.reduce((sum, row) => sum + row.sum, 0);
    if (others > 0) legend.push({ name: "other", sum: others, colour: COLOURS });
    const outer = colour.get(null) ?? COLOURS;
    const of = (node, around = outer) => {
      if (node.group) {
        const colours = new Set(node.entries.map((entry) => of(entry, around)));
        return colours.size === 1 ? [...colours][0] : COLOURS;
      }
      if (byType) return node.entries ? COLOURS : (colour.get(node.type) ?? COLOURS);
      return colour.get(node) ?? (tokens.has(node) ? COLOURS : around);
    };
    return { of, legend };
  };

  const describe = (node) => {
    const where = node.group ? `${node.path ? `${node.path}/: ` : ""}${node.name}` : node.entries ? `${node.path}/` : node.path;
    const parts = [amount(node.tokens, "token"), shareOf(node.tokens)];
    if (node.entries) parts.push(node.group ? "click to see them" : amount(node.files, "file"));
    else parts.push(node.omitted ? `${number(node.chunks)} of ${amount(node.chunks + node.omitted, "chunk")}` : amount(node.chunks, "chunk"));
    return [where, parts.join(" · ")];
  };

  /** The name and tokens of `node`, as far as there is room for what a person can read. */
  const label = (cell, node, opened, w, h) => {
    const room = (w - 15) / LETTER; // characters
    const size = number(node.tokens);
    let name = node.entries && !node.group ? `${node.name}/` : node.name;
    if (node.group && room < name.length) name = `+${number(node.files)}`;
    if (h < 18 || room < Math.min(name.length, SHORTEST)) return;
    cell.append(make("bdi", "name", name));
    if (opened ? room > 1.1 * name.length + size.length + 1 : h > 34 && room > size.length) cell.append(make("span", "size", size));
  };

  const draw = () => {
    const width = map.clientWidth;
    const height = map.clientHeight;
    nodeOf = new Map();
    tip.hidden = true;
    const cells = document.createDocumentFragment();
    const colours = palette();
    const place = (node, around, level, x, y, w, h) => {
      const colour = colours.of(node, around);
      const innerWidth = w - 2 * INSET - 1;
      const innerHeight = h - HEADER - INSET - 1;
      const opened = node.entries && !node.group && innerWidth > 36 && innerHeight > 24;
      const cell = make("div", `cell c${colour}`);
      cell.classList.add(opened ? "directory" : "leaf");
      cell.classList.toggle("group", Boolean(node.group));
      cell.classList.toggle("zooms", Boolean(node.entries));
      cell.setAttribute("role", "treeitem");
      cell.setAttribute("aria-level", level);
      cell.setAttribute("aria-label", describe(node).join(", "));
      if (opened) cell.setAttribute("aria-expanded", "true");
      cell.tabIndex = nodeOf.size ? -1 : 0;
      // In percent, so that a sheet of paper, which is smaller, still holds all of it.
      const box = { left: x / width, top: y / height, width: w / width, height: h / height };
      for (const [side, part] of Object.entries(box)) cell.style[side] = `${100 * part}%`;
      label(cell, node, opened, w, h);
      nodeOf.set(cell, node);
      cells.append(cell);
      if (!opened) return;
      squarify(entriesFor(node, innerWidth * innerHeight), x + INSET, y + HEADER, innerWidth, innerHeight, (entry, ...box) =>
        place(entry, colour, level + 1, ...box));
    };
    if (width > 40 && shown.tokens > 0) {
      squarify(entriesFor(shown, width * height), 0, 0, width, height, (entry, ...box) => place(entry, undefined, 1, ...box));
    }
    ring.hidden = true;
    map.replaceChildren(cells, ring);
    byId("legend").replaceChildren(
      ...colours.legend.map(({ name, sum, colour }) => {
        const row = make("span", "");
        row.append(make("i", `c${colour}`), make("bdi", "", name), make("b", "", percent(sum / shown.tokens || 0)));
        return row;
      }),
    );
    drawCrumbs();
    dim();
  };

  const drawCrumbs = () => {
    const trail = [];
    for (let node = shown; node; node = node.parent) trail.unshift(node);
    const nav = byId("crumbs");
    nav.replaceChildren();
    for (const node of trail) {
      const name = node === root ? root.name || "all files" : node.name;
      const last = node === shown;
      const crumb = make(last ? "span" : "button", "");
      crumb.append(make("bdi", "", name));
      if (last) crumb.setAttribute("aria-current", "location");
      else {
        crumb.type = "button";
        crumb.addEventListener("click", () => zoom(node, shown));
      }
      if (node !== root) nav.append(make("span", "sep", "/"));
      nav.append(crumb);
    }
    nav.append(make("span", "sum", `${amount(shown.tokens, "token")} · ${shareOf(shown.tokens)} · ${amount(shown.files, "file")}`));
  };

  const dim = () => {
    for (const [cell, node] of nodeOf) cell.classList.toggle("dim", searching && !node.hits);
  };

  /** Show `node`, with the keyboard's focus on `target` if it is drawn there, else on the first cell. */
  const zoom = (node, target) => {
    shown = node;
    draw();
    const cells = [...nodeOf.keys()];
    focus(cells.find((cell) => nodeOf.get(cell) === target) || cells[0]);
  };

  const focus = (cell) => {
    if (!cell) return;
    for (const other of map.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus({ preventScroll: true });
  };

  /** A directory or group is zoomed into; a file shows the directory that it is in. */
  const open = (node) => {
    const target = node.entries ? node : node.parent;
    if (target !== shown && !(shown.group && target === shown.parent)) zoom(target, node);
  };

  const showTip = (node, x, y) => {
    const [path, size] = describe(node);
    tip.replaceChildren(make("bdi", "path", path), make("span", "size", size));
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, document.documentElement.clientWidth - width - 8));
    const below = y + 18 + height < document.documentElement.clientHeight;
    Object.assign(tip.style, { left: `${left}px`, top: `${below ? y + 18 : Math.max(8, y - height - 10)}px` });
  };

  const cellAt = (event) => event.target.closest(".cell");
  map.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) open(nodeOf.get(cell));
  });
  map.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell) showTip(nodeOf.get(cell), event.clientX, event.clientY);
  });
  map.addEventListener("pointerleave", () => (tip.hidden = true));
  map.addEventListener("focusin", (event) => {
    const cell = cellAt(event);
    if (!cell || !cell.matches(":focus-visible")) return;
    const { left, top, width, height } = cell.style;
    Object.assign(ring.style, { left, top, width, height });
    ring.hidden = false;
    cell.scrollIntoView({ block: "nearest" });
    const box = cell.getBoundingClientRect();
    showTip(nodeOf.get(cell), box.left, Math.min(box.bottom, box.top + 40));
  });
  map.addEventListener("focusout", () => (tip.hidden = ring.hidden = true));
  map.addEventListener("keydown", (event) => {
    const cells = [...nodeOf.keys()];
    const at = cells.indexOf(cellAt(event));
    const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: cells.length - 1 };
    if (event.ctrlKey || event.altKey || event.metaKey || at < 0) return;
    if (event.key in steps) focus(cells[steps[event.key]]);
    else if (event.key === "Enter" || event.key === " ") open(nodeOf.get(cells[at]));
    else if ((event.key === "Backspace" || event.key === "Escape") && shown.parent) zoom(shown.parent, shown);
    else return;
    event.preventDefault();
  });
  byId("colours").addEventListener("change", (event) => {
    colourBy = event.target.value;
    draw();
  });

  // 3. The table of files, and the search that goes through all of them.
  const search = byId("search");
  const body = byId("files").tBodies[0];
  const anyBar = body.querySelector(".bar"); // the page has one row at least: nothing packs no files
  const more = byId("more");
  const found = byId("found");
  const emptyText = found.textContent;
  let matches = files;
  let limit = PAGE;

  const row = (file) => {
    const line = make("tr", "");
    const path = make("td", "path");
    path.append(make("bdi", "", file.path));
    const bar = anyBar.cloneNode(true);
    bar.firstElementChild.setAttribute("width", `${files[0].tokens ? (100 * file.tokens) / files[0].tokens : 0}%`);
    const share = make("td", "share");
    share.append(bar);
    const chunks = file.omitted ? `${number(file.chunks)} of ${number(file.chunks + file.omitted)}` : number(file.chunks);
    line.append(path, make("td", "n", chunks), make("td", "n", number(file.tokens)), make("td", "n", shareOf(file.tokens)), share);
    return line;
  };

  const list = () => {
    body.replaceChildren(...matches.slice(0, limit).map(row));
    more.hidden = matches.length <= limit;
  };

  const wordsOf = (field) => field.value.toLowerCase().split(/\s+/).filter(Boolean);

  search.addEventListener("input", () => {
    const words = wordsOf(search);
    searching = words.length > 0;
    for (const file of files) file.hits = words.every((word) => file.key.includes(word)) ? 1 : 0;
    const count = (node) => {
      if (node.entries) node.hits = node.entries.reduce((sum, entry) => sum + count(entry), 0);
      return node.hits;
    };
    count(root);
    for (const node of nodeOf.values()) if (node.group) count(node);
    if (shown.group) count(shown);
    matches = searching ? files.filter((file) => file.hits) : files;
    limit = PAGE;
    list();
    dim();
    const tokens = matches.reduce((sum, file) => sum + file.tokens, 0);
    found.textContent = searching
      ? `${amount(matches.length, "file")} found: ${amount(tokens, "token")}, ${shareOf(tokens)}.`
      : emptyText;
  });
  more.addEventListener("click", () => {
    limit += 4 * PAGE;
    list();
    if (!searching) found.textContent = "";
  });
  more.hidden = files.length <= PAGE;

  const skipSearch = byId("skip-search");
  if (skipSearch) {
    skipSearch.hidden = false;
    skipSearch.addEventListener("input", () => {
      const words = wordsOf(skipSearch);
      for (const group of document.querySelectorAll("details.skips")) {
        let left = 0;
        for (const item of group.querySelectorAll("li")) {
          item.hidden = !words.every((word) => item.textContent.toLowerCase().includes(word));
          if (!item.hidden) left++;
        }
        group.hidden = left === 0;
        group.open = words.length > 0;
      }
    });
  }

  search.hidden = false;
  byId("map-section").hidden = false;
  draw();
  let drawnAt = map.clientWidth;
  new ResizeObserver(() => {
    if (map.clientWidth === drawnAt || matchMedia("print").matches) return;
    drawnAt = map.clientWidth;
    draw();
  }).observe(map);
})();
