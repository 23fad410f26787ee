"""Addresses in S3 such as `s3://bucket/folder/`; nothing imports boto3: its client is an argument."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def split_uri(uri: str) -> tuple[str, str]:
    """Return (bucket, key) of `s3://bucket/key`."""
    bucket, _, key = uri[len("s3://") :].partition("/")
    return bucket, key


def list_objects(s3: Any, uri: str) -> dict[str, float]:
    """Return the modification time of all objects whose address begins with `uri`, by key."""
    bucket, prefix = split_uri(uri)
    lister = s3.get_paginator("list_objects_v2")
    changes = {}
    for page in lister.paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            key = entry["Key"]
            changed = entry["LastModified"]
            changes[key] = changed.timestamp()
    return changes


def download(s3: Any, uri: str, folder: Path) -> int:
    """Copy all objects whose address begins with `uri` into `folder`; return their number."""
    bucket, prefix = split_uri(uri)
    changes = list_objects(s3, uri)
    for key, changed in changes.items():
        name = key[len(prefix) :]
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(path))
        os.utime(path, (changed, changed))
    return len(changes)
