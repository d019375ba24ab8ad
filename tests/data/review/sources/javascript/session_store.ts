// Sessions in memory: signed cookies, a limit per user, and a sweep of those that have expired.

import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";

export interface Session {
  readonly id: string;
  readonly userId: string;
  /** Milliseconds since the epoch. */
  expiresAt: number;
}

export interface Options {
  readonly secret: string;
  readonly lifetimeMs?: number;
  readonly maxPerUser?: number;
  readonly now?: () => number;
}

const DAY_MS = 24 * 60 * 60 * 1000;

export class SessionStore {
  private readonly sessions = new Map<string, Session>();
  private readonly secret: string;
  private readonly lifetimeMs: number;
  private readonly maxPerUser: number;
  private readonly now: () => number;

  constructor({ secret, lifetimeMs = 14 * DAY_MS, maxPerUser = 5, now = Date.now }: Options) {
    if (secret.length < 32) {
      throw new RangeError("the secret is too short");
    }
    this.secret = secret;
    this.lifetimeMs = lifetimeMs;
    this.maxPerUser = maxPerUser;
    this.now = now;
  }

  private sign(id: string): string {
    return createHmac("sha256", this.secret).update(id).digest("base64url");
  }

  /** Begin a session; the user's oldest ones end if there are too many. Returns the cookie's value. */
  create(userId: string): string {
    const own = [...this.sessions.values()].filter((session) => session.userId === userId);
    own.sort((a, b) => a.expiresAt - b.expiresAt);
    for (const session of own.slice(0, Math.max(0, own.length - this.maxPerUser + 1))) {
      this.sessions.delete(session.id);
    }
    const id = randomBytes(24).toString("base64url");
    this.sessions.set(id, { id, userId, expiresAt: this.now() + this.lifetimeMs });
    return `${id}.${this.sign(id)}`;
  }

  /** The session of a cookie, whose life begins anew; null if it is forged, unknown or expired. */
  resume(cookie: string): Session | null {
    const [id, signature, ...rest] = cookie.split(".");
    if (!id || !signature || rest.length > 0) {
      return null;
    }
    const expected = Buffer.from(this.sign(id));
    const given = Buffer.from(signature);
    if (given.length !== expected.length || !timingSafeEqual(given, expected)) {
      return null;
    }
    const session = this.sessions.get(id);
    if (session === undefined) {
      return null;
    }
    if (session.expiresAt <= this.now()) {
      this.sessions.delete(id);
      return null;
    }
    session.expiresAt = this.now() + this.lifetimeMs;
    return session;
  }

  /** End all sessions of a user, but for one to keep; returns how many ended. */
  endAll(userId: string, keepId?: string): number {
    let ended = 0;
    for (const session of [...this.sessions.values()]) {
      if (session.userId === userId && session.id !== keepId) {
        this.sessions.delete(session.id);
        ended += 1;
      }
    }
    return ended;
  }

  /** Forget expired sessions every `intervalMs`; returns a function that stops it. */
  startSweep(intervalMs = 60_000): () => void {
    const timer = setInterval(() => {
      const now = this.now();
      for (const [id, session] of this.sessions) {
        if (session.expiresAt <= now) {
          this.sessions.delete(id);
        }
      }
    }, intervalMs);
    timer.unref();
    return () => clearInterval(timer);
  }
}
