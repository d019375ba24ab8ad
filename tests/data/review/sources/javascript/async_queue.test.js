import assert from "node:assert/strict";
import { test } from "node:test";

import { AsyncQueue, QueueClosedError, mapLimited } from "./async_queue.js";

/** A promise with its functions, so that a test decides when a task ends. */
function deferred() {
  const parts = {};
  parts.promise = new Promise((resolve, reject) => Object.assign(parts, { resolve, reject }));
  return parts;
}

test("runs no more tasks at a time than allowed", async () => {
  const queue = new AsyncQueue(2);
  const gates = [deferred(), deferred(), deferred()];
  let started = 0;
  const results = gates.map((gate) =>
    queue.push(() => {
      started += 1;
      return gate.promise;
    }),
  );
  assert.equal(started, 2);
  gates[0].resolve("a");
  assert.equal(await results[0], "a");
  await Promise.resolve();
  assert.equal(started, 3);
  gates[1].resolve("b");
  gates[2].resolve("c");
  assert.deepEqual(await Promise.all(results), ["a", "b", "c"]);
});

test("starts tasks with a higher priority first", async () => {
  const queue = new AsyncQueue(1);
  const order = [];
  const note = (name) => () => order.push(name);
  await Promise.all([
    queue.push(note("first")),
    queue.push(note("low"), -1),
    queue.push(note("high"), 5),
    queue.push(note("normal")),
  ]);
  assert.deepEqual(order, ["first", "high", "normal", "low"]);
});

test("a task that fails does not stop the others", async () => {
  const queue = new AsyncQueue(1);
  const failing = queue.push(() => {
    throw new Error("boom");
  });
  const working = queue.push(() => 7);
  await assert.rejects(failing, /boom/);
  assert.equal(await working, 7);
});

test("closing rejects what waits and lets the rest finish", async () => {
  const queue = new AsyncQueue(1);
  const gate = deferred();
  const running = queue.push(() => gate.promise);
  const waiting = queue.push(() => "never");
  const closed = queue.close();
  await assert.rejects(waiting, QueueClosedError);
  gate.resolve("done");
  assert.equal(await running, "done");
  await closed;
  assert.equal(queue.size, 0);
  await assert.rejects(queue.push(() => 1), QueueClosedError);
});

test("mapLimited keeps the order", async () => {
  const doubled = await mapLimited([1, 2, 3], 2, async (value) => value * 2);
  assert.deepEqual(doubled, [2, 4, 6]);
});
