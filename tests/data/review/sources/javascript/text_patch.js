// Line diffs: compute them, show them, apply them to a text that may have moved.

/** Lengths of the longest common subsequences of all suffixes. */
function lcsTable(before, after) {
  const table = Array.from({ length: before.length + 1 }, () => new Uint32Array(after.length + 1));
  for (let i = before.length - 1; i >= 0; i -= 1) {
    for (let j = after.length - 1; j >= 0; j -= 1) {
      table[i][j] =
        before[i] === after[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  return table;
}

/**
 * The steps from one list of lines to another: `{ type, line }` with the types
 * "keep", "remove" and "add"; removals stand before additions.
 */
export function diffLines(before, after) {
  const table = lcsTable(before, after);
  const steps = [];
  let i = 0;
  let j = 0;
  while (i < before.length && j < after.length) {
    if (before[i] === after[j]) {
      steps.push({ type: "keep", line: before[i] });
      i += 1;
      j += 1;
    } else if (table[i + 1][j] >= table[i][j + 1]) {
      steps.push({ type: "remove", line: before[i] });
      i += 1;
    } else {
      steps.push({ type: "add", line: after[j] });
      j += 1;
    }
  }
  for (; i < before.length; i += 1) {
    steps.push({ type: "remove", line: before[i] });
  }
  for (; j < after.length; j += 1) {
    steps.push({ type: "add", line: after[j] });
  }
  return steps;
}

/** Group steps into hunks with up to `context` unchanged lines around them; `start` counts from 0. */
export function toHunks(steps, context = 3) {
  const changed = steps.flatMap(({ type }, index) => (type === "keep" ? [] : [index]));
  const hunks = [];
  for (const index of changed) {
    const from = Math.max(0, index - context);
    const to = Math.min(steps.length, index + context + 1);
    const last = hunks.at(-1);
    if (last && from <= last.to) {
      last.to = to;
    } else {
      hunks.push({ from, to });
    }
  }
  return hunks.map(({ from, to }) => ({
    start: steps.slice(0, from).filter(({ type }) => type !== "add").length,
    steps: steps.slice(from, to),
  }));
}

/** Where `wanted` stands in `lines`, as near to `near` as possible; -1 if nowhere. */
function locate(lines, wanted, near) {
  const fits = (at) => wanted.every((line, offset) => lines[at + offset] === line);
  for (let distance = 0; distance <= lines.length; distance += 1) {
    for (const at of [near - distance, near + distance]) {
      if (at >= 0 && at + wanted.length <= lines.length && fits(at)) {
        return at;
      }
    }
  }
  return -1;
}

/** Apply hunks to lines; throws if the lines of a hunk are not there. */
export function applyHunks(lines, hunks) {
  const result = [...lines];
  let shift = 0;
  hunks.forEach(({ start, steps }, number) => {
    const old = steps.filter(({ type }) => type !== "add").map(({ line }) => line);
    const fresh = steps.filter(({ type }) => type !== "remove").map(({ line }) => line);
    const at = locate(result, old, start + shift);
    if (at < 0) {
      throw new Error(`hunk ${number + 1} does not apply`);
    }
    result.splice(at, old.length, ...fresh);
    shift = at - start + fresh.length - old.length;
  });
  return result;
}
