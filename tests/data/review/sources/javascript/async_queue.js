// Runs asynchronous tasks, a limited number of them at a time.

/** Thrown by tasks that were still waiting when the queue was closed. */
export class QueueClosedError extends Error {
  constructor() {
    super("the queue is closed");
    this.name = "QueueClosedError";
  }
}

export class AsyncQueue {
  #waiting = [];
  #running = 0;
  #closed = false;
  #idle = [];

  /** @param {number} concurrency how many tasks run at the same time */
  constructor(concurrency = 4) {
    if (!Number.isInteger(concurrency) || concurrency < 1) {
      throw new RangeError("concurrency must be a positive integer");
    }
    this.concurrency = concurrency;
  }

  get size() {
    return this.#waiting.length + this.#running;
  }

  /** Resolves or rejects as the task does. Tasks with a higher priority start first. */
  push(task, priority = 0) {
    if (this.#closed) {
      return Promise.reject(new QueueClosedError());
    }
    return new Promise((resolve, reject) => {
      const entry = { task, priority, resolve, reject };
      const position = this.#waiting.findIndex((other) => other.priority < priority);
      if (position < 0) {
        this.#waiting.push(entry);
      } else {
        this.#waiting.splice(position, 0, entry);
      }
      this.#next();
    });
  }

  #next() {
    while (this.#running < this.concurrency && this.#waiting.length > 0) {
      this.#running += 1;
      this.#run(this.#waiting.shift());
    }
    if (this.#running === 0) {
      this.#idle.splice(0).forEach((resolve) => resolve());
    }
  }

  async #run({ task, resolve, reject }) {
    try {
      resolve(await task());
    } catch (error) {
      reject(error);
    } finally {
      this.#running -= 1;
      this.#next();
    }
  }

  /** Resolves when nothing runs or waits any more. */
  whenIdle() {
    if (this.size === 0) {
      return Promise.resolve();
    }
    return new Promise((resolve) => this.#idle.push(resolve));
  }

  /** Refuse new tasks and reject those that wait; running ones finish. */
  async close() {
    this.#closed = true;
    for (const { reject } of this.#waiting.splice(0)) {
      reject(new QueueClosedError());
    }
    await this.whenIdle();
  }
}

/** Map over `items` with a limited number of calls at a time; results keep the order of the items. */
export async function mapLimited(items, limit, mapper) {
  const queue = new AsyncQueue(limit);
  return Promise.all(items.map((item, index) => queue.push(() => mapper(item, index))));
}
