"""The small JSON files of a remote: versions, tags and attachments, read as a stranger's."""

from __future__ import annotations

from typing import Any

from adapterkit.hub.findings import clean
from adapterkit.hub.remotes.base import Published
from adapterkit.registry.attaching import fields, is_key
from adapterkit.registry.blobs import bare
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.records import Attachment
from adapterkit.registry.refs import Ref, check_tag
from adapterkit.registry.versions import normal


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
