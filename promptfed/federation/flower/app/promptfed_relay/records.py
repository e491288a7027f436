"""A frame as the content of a Flower message."""

from __future__ import annotations

import json
import secrets

from flwr.app import ConfigRecord, RecordDict

from .frames import Frame

_RECORD = "promptfed"


def to_content(frame: Frame) -> RecordDict:
    """The frame as content. A nonce is added: Flower names messages and objects by the hash of their content, and a
    registered node that guesses a name may ask for it."""
    fields = json.dumps(frame.fields)
    record = ConfigRecord({"kind": frame.kind, "fields": fields, "body": frame.body, "nonce": secrets.token_bytes(16)})
    return RecordDict({_RECORD: record})


def from_content(content: RecordDict) -> Frame:
    """The frame in a message's content. Raises ValueError when there is none."""
    record = content.get(_RECORD)
    if not isinstance(record, ConfigRecord):
        raise ValueError("not a message of promptfed")
    kind, fields, body = record.get("kind"), record.get("fields"), record.get("body")
    if not (isinstance(kind, str) and isinstance(fields, str) and isinstance(body, bytes)):
        raise ValueError("not a message of promptfed")
    return Frame(kind, json.loads(fields), body)
