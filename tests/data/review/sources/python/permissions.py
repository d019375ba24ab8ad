"""Who may do what with a document, and the tokens that share links carry."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from dataclasses import dataclass, field
from enum import IntEnum


class Role(IntEnum):
    """Roles in a workspace; each may do what those below it may."""

    NONE = 0
    VIEWER = 1
    COMMENTER = 2
    EDITOR = 3
    OWNER = 4


REQUIRED_ROLE = {
    "read": Role.VIEWER,
    "comment": Role.COMMENTER,
    "edit": Role.EDITOR,
    "share": Role.OWNER,
    "delete": Role.OWNER,
}


@dataclass(frozen=True)
class User:
    id: str
    suspended: bool = False
    is_admin: bool = False


@dataclass
class Document:
    id: str
    owner_id: str
    archived: bool = False
    roles: dict[str, Role] = field(default_factory=dict)

    def role_of(self, user: User) -> Role:
        """The role of `user`; the owner's needs no entry."""
        if user.id == self.owner_id:
            return Role.OWNER
        return self.roles.get(user.id, Role.NONE)


def is_allowed(user: User, action: str, document: Document) -> bool:
    """Whether `user` may do `action`; nothing may be done that is not known.

    Suspended users may do nothing, also if they are administrators. Archived documents can be read and
    deleted, not changed.
    """
    required = REQUIRED_ROLE.get(action)
    if required is None or user.suspended:
        return False
    if document.archived and action not in ("read", "delete"):
        return False
    return user.is_admin or document.role_of(user) >= required


def grant(actor: User, document: Document, user_id: str, role: Role) -> None:
    """Give `user_id` a role; only who may share can, and nobody can make a second owner."""
    if not is_allowed(actor, "share", document):
        raise PermissionError(f"{actor.id} may not share {document.id}")
    if role == Role.OWNER:
        raise ValueError("a document has one owner")
    document.roles[user_id] = role


def _signature(secret: bytes, payload: str) -> str:
    digest = hmac.new(secret, payload.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def make_share_token(secret: bytes, document_id: str, expires_at: int) -> str:
    """A token that lets its bearer read a document until `expires_at`, in seconds since the epoch."""
    payload = f"{document_id}.{expires_at}"
    return f"{payload}.{_signature(secret, payload)}"


def read_share_token(secret: bytes, token: str, now: float | None = None) -> str | None:
    """The document's id if the token is genuine and has not expired."""
    payload, _, signature = token.rpartition(".")
    document_id, _, expires_at = payload.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(secret, payload).encode()):
        return None
    if int(expires_at) <= (time.time() if now is None else now):
        return None
    return document_id
