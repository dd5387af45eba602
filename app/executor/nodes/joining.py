"""Who a node is, and whether it may join.

A node is known by its home: a random id in `DEEPE_NODE_HOME`, made at the first start. A join token keeps machines out
that were not meant to join (one that was cloned, one of another installation). It guards against mistakes: who holds
the URL of the database can write there in any case.
"""

import hashlib
import hmac
import os
import uuid

from sqlmodel.ext.asyncio.session import AsyncSession

from app.store import installation
from app.store.clock import database_now
from app.store.home import NodeHome
from app.store.nodes import RegistrationRefused

KEY = "join_token"


class JoinTokenWrong(RegistrationRefused):
    """The worker's token is not that of the API."""

    def __init__(self, *, given: bool) -> None:
        what = "differs from" if given else "is not set, unlike"
        super().__init__(
            f"DEEPE_JOIN_TOKEN of this worker {what} that of the API. Set it to the same value and start the worker "
            "again; after a change of the token the API is restarted first."
        )


class NodeIdUnreadable(RegistrationRefused):
    """The file does not hold what was written there."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} holds no node id. If it was damaged, delete it: the node joins as a new one, and a node that had "
            "its name has to be declared dead or removed first."
        )


def node_id(home: NodeHome) -> str:
    """Return the id of this node home; made at first use. The caller holds the node's lock."""
    try:
        text = home.node_id.read_text("ascii").strip()
        return str(uuid.UUID(text))
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise NodeIdUnreadable(str(home.node_id)) from error
    made = str(uuid.uuid4())
    draft = home.node_id.with_suffix(".new")
    with draft.open("w", encoding="ascii") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(home.node_id)
    return made


async def set_join_token(session: AsyncSession, token: str | None) -> None:
    """Ask for this token from now on, or for none; nodes that joined already stay."""
    value = None if token is None else {"sha256": _digest(token)}
    if await installation.get(session, KEY) != value:
        await installation.put(session, KEY, value, now=await database_now(session))


async def require_join_token(session: AsyncSession, token: str | None) -> None:
    """Raise `JoinTokenWrong` unless the worker's token is the one that the API asks for."""
    wanted = await installation.get(session, KEY)
    if wanted is not None and not hmac.compare_digest(_digest(token or ""), str(wanted.get("sha256"))):
        raise JoinTokenWrong(given=token is not None)


def _digest(token: str) -> str:
    """Return the digest. SHA-256 is enough for high-entropy tokens; no salt is needed."""
    return hashlib.sha256(f"deepe join token: {token}".encode()).hexdigest()
