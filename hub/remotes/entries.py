"""The small JSON files of a remote: versions, tags and attachments, read as a stranger's."""

from __future__ import annotations

import re
from typing import Any

from adapterkit.hub.findings import clean
from adapterkit.hub.remotes.base import Published
from adapterkit.registry.attaching import fields, is_key
from adapterkit.registry.blobs import bare
from adapterkit.registry.clock import now
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.naming import MAX_REASON
from adapterkit.registry.records import Attachment, Yank
from adapterkit.registry.refs import Ref, check_tag
from adapterkit.registry.versions import normal

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")

_OLDEST = "1970-01-01T00:00:00.000000Z"


def is_name(text: str) -> bool:
    try:
        return Ref.parse(text).full_name == text
    except InvalidError:
        return False


def of_version(version: Published) -> dict[str, Any]:
    return {"id": version.id, "name": version.name, "version": version.version}


def published(value: dict[str, Any], name: str, shown: str) -> Published:
    """Raises DamagedError unless it is a version of `name`; `shown`: its subject."""
    try:
        if value["name"] != name:
            raise DamagedError(f"{shown} is about {clean(ascii(value['name']))}")
        return Published(name, normal(value["version"]), bare(value["id"]))
    except (KeyError, TypeError, AttributeError, InvalidError) as error:
        raise DamagedError(f"{shown} is not a version: {_what(error)}") from error


def tagged(value: dict[str, Any], name: str, shown: str) -> tuple[str, Published]:
    try:
        return check_tag(value["tag"]), published(value, name, shown)
    except (KeyError, TypeError, InvalidError) as error:
        raise DamagedError(f"{shown} is not a tag: {_what(error)}") from error


def of_yank(version: Published, said: Yank) -> dict[str, Any]:
    state = {"yanked": said.yanked, "reason": said.reason, "since": said.since}
    return of_version(version) | state


def yank(value: dict[str, Any], version: Published, shown: str) -> Yank:
    """Raises DamagedError unless it is about `version`. What was said in the future is taken for
    the oldest: it must not outlast all that is said later."""
    if published(value, version.name, shown) != version:
        raise DamagedError(f"{shown} is not about {version.ref}")
    yanked, reason, since = value.get("yanked"), value.get("reason"), value.get("since")
    if not isinstance(yanked, bool) or not isinstance(since, str) or not _TIME.fullmatch(since):
        raise DamagedError(f"{shown} does not say whether {version.ref} was yanked")
    if not isinstance(reason, str) or len(reason) > MAX_REASON or not reason.isprintable():
        raise DamagedError(f"{shown} gives no reason of one line, up to {MAX_REASON} characters")
    return Yank(yanked, reason, since if since <= now() else _OLDEST)


def of_redirect(name: str, target: str) -> dict[str, Any]:
    return {"name": name, "target": target}


def redirect(value: dict[str, Any], name: str, shown: str) -> str:
    target = value.get("target")
    if value.get("name") != name or not isinstance(target, str) or not is_name(target):
        raise DamagedError(f"{shown} does not say what {name} is called now")
    return target


def of_attachment(attachment: Attachment) -> dict[str, Any]:
    return {
        "attachment": fields(attachment),
        "author": attachment.author,
        "created": attachment.created,
        "subject": attachment.subject,
    }


def attachment(value: dict[str, Any], shown: str, subject: str) -> Attachment:
    """Raises DamagedError unless it is about the version `subject`."""
    try:
        given = value["attachment"]
        texts = [given["kind"], given["name"], value["created"], value["author"]]
        good = (
            value["subject"] == subject
            and all(isinstance(text, str) and text.isprintable() for text in texts)
            and is_key(given["kind"], given["name"])
            and isinstance(given["size"], int)
            and 0 <= given["size"] < 2**53
        )
        if not good:
            raise DamagedError(f"{shown} is not an attachment of {subject[:12]}")
        digest = bare(given["digest"])
        return Attachment(
            subject, given["kind"], given["name"], digest, given["size"], texts[2], texts[3]
        )
    except (KeyError, TypeError, AttributeError, InvalidError) as error:
        raise DamagedError(f"{shown} is not an attachment: {_what(error)}") from error


def _what(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else clean(str(error))
