// A search box that asks the server while the user types, but not for every key.

const DEBOUNCE_MS = 250;
const MIN_LENGTH = 2;

/**
 * Call `action` once `delay` milliseconds have passed since the last call.
 * `cancel()` forgets a pending call.
 */
export function debounce(action, delay) {
  let timer = null;
  function debounced(...args) {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = null;
      action(...args);
    }, delay);
  }
  debounced.cancel = () => {
    clearTimeout(timer);
    timer = null;
  };
  return debounced;
}

/** Text as HTML. */
export function escapeHtml(text) {
  return String(text)
    .replaceAll("&", "&amp;")
    .replaceAll("<", "&lt;")
    .replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;")
    .replaceAll("'", "&#39;");
}

/** The title as HTML, with the first occurrence of the query marked. */
export function highlight(title, query) {
  const at = title.toLowerCase().indexOf(query.toLowerCase());
  if (query === "" || at < 0) {
    return escapeHtml(title);
  }
  const end = at + query.length;
  const marked = escapeHtml(title.slice(at, end));
  return `${escapeHtml(title.slice(0, at))}<mark>${marked}</mark>${escapeHtml(title.slice(end))}`;
}

/**
 * Connects an input and a list.
 * `search(query)` resolves to an array of `{ id, title }`.
 */
export class SearchBox {
  constructor(input, list, search) {
    this.input = input;
    this.list = list;
    this.search = search;
    this.latest = 0;
    this.update = debounce((query) => this.run(query), DEBOUNCE_MS);
    this.onInput = () => this.update(this.input.value.trim());
    this.input.addEventListener("input", this.onInput);
  }

  /** Ask for results; answers that a later request has overtaken are dropped. */
  async run(query) {
    const request = ++this.latest;
    if (query.length < MIN_LENGTH) {
      this.list.innerHTML = "";
      return;
    }
    let results;
    try {
      results = await this.search(query);
    } catch (error) {
      console.error("search failed", error);
      results = [];
    }
    if (request !== this.latest) {
      return;
    }
    this.show(results, query);
  }

  show(results, query) {
    this.list.innerHTML = results
      .map(({ id, title }) => `<li data-id="${escapeHtml(id)}">${highlight(title, query)}</li>`)
      .join("");
  }

  /** Undo what the constructor did. */
  destroy() {
    this.latest += 1;
    this.update.cancel();
    this.input.removeEventListener("input", this.onInput);
  }
}
