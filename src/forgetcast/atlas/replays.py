"""Outcomes of fine-tunes with and without replay that an atlas keeps: a file each, and a receipt, so that none is lost.

replays/KEY.json               an outcome, in the place of an earlier one of the same settings
receipts/~replays/KEY.json     empty
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from forgetcast.atlas import rows
from forgetcast.atlas.index import now
from forgetcast.atlas.storage import Storage
from forgetcast.errors import DataError
from forgetcast.files import check_digest, json_bytes, parse_json, with_digest


def lost_replays(storage: Storage) -> list[tuple[str, str]]:
    """Return the outcomes of fine-tunes that were stored and are not there, each with its receipt."""
    receipts = storage.names(f"receipts/{rows.OTHERS}")
    present = set(storage.names("replays"))
    named = [(f"replays/{receipt.rpartition('/')[2]}", receipt) for receipt in receipts]
    return [(name, receipt) for name, receipt in named if name not in present]


def read_replays(storage: Storage) -> list[dict[str, Any]]:
    """Return all outcomes, oldest first; raise DataError if one is lost or damaged."""
    for name, receipt in lost_replays(storage):
        raise DataError(f"{storage} has lost {name}; put back a copy, or remove {receipt} to do without it")
    kept = [(*read_replay(storage, name), name) for name in storage.names("replays")]
    return [run for _, run, _ in sorted(kept, key=lambda each: (each[0], each[2]))]


def read_replay(storage: Storage, name: str) -> tuple[str, dict[str, Any]]:
    """Return when the outcome of a fine-tune was added, and the outcome; raise DataError if the file is damaged."""
    where = f"{storage}/{name}"
    content = check_digest(parse_json(storage.read(name), where), where)
    if not isinstance(content.get("run"), dict):
        raise DataError(f"{where} is not a fine-tune; remove it, and verify or pilot again")
    return str(content.get("added")), content["run"]


def write_replay(storage: Storage, run: Mapping[str, Any]) -> None:
    """Store the outcome of a fine-tune in a file of its own, in the place of one of the same settings."""
    key = json.dumps([run.get(name) for name in ("task", "setup", "seed", "strategy", "ratio")])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with storage.write(f"replays/{name}") as file:
        file.write_bytes(json_bytes(with_digest({"added": now(), "run": dict(run)})))
    storage.mark(f"receipts/{rows.OTHERS}/{name}")
