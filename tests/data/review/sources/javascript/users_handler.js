// HTTP handlers of /users, in the form Express expects: (request, response, next).

const PAGE_SIZE = 25;
const MAX_PAGE_SIZE = 100;
const EDITABLE_FIELDS = ["name", "email", "locale"];

/** An error with the status that the client gets. */
export class HttpError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Hand rejections of an async handler to Express. */
export const wrap = (handler) => (request, response, next) => handler(request, response, next).catch(next);

/** What clients may see of a user. */
export function publicUser({ id, name, email, locale, createdAt }) {
  return { id, name, email, locale, createdAt };
}

function parsePaging({ page = "1", size = String(PAGE_SIZE) }) {
  const pageNumber = Number(page);
  const pageSize = Number(size);
  if (!Number.isInteger(pageNumber) || pageNumber < 1 || !Number.isInteger(pageSize) || pageSize < 1) {
    throw new HttpError(400, "page and size must be positive integers");
  }
  const limit = Math.min(pageSize, MAX_PAGE_SIZE);
  return { limit, offset: (pageNumber - 1) * limit };
}

/** Only administrators and the user itself. */
function requireAccess(request, id) {
  if (!request.user) {
    throw new HttpError(401, "not signed in");
  }
  if (request.user.role !== "admin" && request.user.id !== id) {
    throw new HttpError(403, "not allowed");
  }
}

/**
 * @param {object} store with find(id), list({limit, offset}), update(id, changes) and remove(id),
 *   all of which return promises
 * @param {object} audit with record(event), which returns a promise
 */
export function makeHandlers(store, audit) {
  async function list(request, response) {
    if (request.user?.role !== "admin") {
      throw new HttpError(403, "not allowed");
    }
    const { users, total } = await store.list(parsePaging(request.query));
    response.json({ users: users.map(publicUser), total });
  }

  async function show(request, response) {
    const { id } = request.params;
    requireAccess(request, id);
    const user = await store.find(id);
    if (!user) {
      throw new HttpError(404, "no such user");
    }
    response.json(publicUser(user));
  }

  async function update(request, response) {
    const { id } = request.params;
    requireAccess(request, id);
    const changes = {};
    for (const field of EDITABLE_FIELDS) {
      if (Object.hasOwn(request.body, field)) {
        changes[field] = request.body[field];
      }
    }
    const user = await store.update(id, changes);
    if (!user) {
      throw new HttpError(404, "no such user");
    }
    await audit.record({ type: "user.updated", id, by: request.user.id, fields: Object.keys(changes) });
    response.json(publicUser(user));
  }

  async function remove(request, response) {
    const { id } = request.params;
    requireAccess(request, id);
    const removed = await store.remove(id);
    if (!removed) {
      throw new HttpError(404, "no such user");
    }
    await audit.record({ type: "user.removed", id, by: request.user.id });
    response.status(204).end();
  }

  return { list: wrap(list), show: wrap(show), update: wrap(update), remove: wrap(remove) };
}

/** The last of all handlers: turns errors into answers, without details of those that are our fault. */
export function errorHandler(error, request, response, next) {
  if (response.headersSent) {
    next(error);
    return;
  }
  const status = error instanceof HttpError ? error.status : 500;
  if (status === 500) {
    console.error(request.method, request.path, error);
  }
  response.status(status).json({ error: status === 500 ? "internal error" : error.message });
}
