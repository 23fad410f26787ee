"""The part of the service that copies between the checkpoint folder and S3; a process of its own, as there.

At the start all objects under the prefix are copied into the folder. While the training runs, new and changed
files are copied out one after the other, and what is deleted in the folder is deleted in S3.
`<name>.sagemaker-uploading` and `<name>.sagemaker-uploaded` beside a file tell the training how far its
upload is; names ending in `.sagemaker-ignore` stay where they are.

https://docs.aws.amazon.com/sagemaker/latest/dg/model-checkpoints.html
"""

import argparse
import contextlib
import json
import os
import signal
import time
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from common.s3 import split_uri

UPLOADING, UPLOADED = ".sagemaker-uploading", ".sagemaker-uploaded"
NOT_COPIED = (UPLOADING, UPLOADED, ".sagemaker-ignore")
SCAN_SECONDS = 0.5
ONE_BY_ONE = TransferConfig(use_threads=False)


class Sync:
    """Copies what is new in `folder` to S3, as long as `run` runs.

    Args:
        s3: a boto3 client.
        folder: the local checkpoint path.
        uri: its address in S3, whose content has been copied into the folder.
        rate: bytes per second.
        stall_upload: the number of the upload, counted from 1, that stops half way until `stop` is called;
            0: none.
        tell: called with what happens and the name of the file.
        stop_after: the number of uploads after which nothing more is copied, a known fault of the service.
    """

    def __init__(self, s3, folder, uri, rate, stall_upload, tell, stop_after=None):
        self.s3, self.folder, self.stall_upload, self.tell = s3, folder, stall_upload, tell
        self.bucket, self.prefix = split_uri(uri)
        self.rate, self.stop_after = rate, stop_after
        self.num_uploads = 0
        self.stopping = False
        self.copied = self.scan()

    def stop(self):
        """Let `run` copy what is left, and end."""
        self.stopping = True

    def run(self):
        """Copy until `stop` is called, and then once more what is left."""
        ending, parent = False, os.getppid()
        while not ending and os.getppid() == parent:  # not without the simulator
            time.sleep(SCAN_SECONDS)
            ending = self.stopping
            if self.num_uploads == self.stop_after:
                continue
            found = self.scan()
            for name in self.copied.keys() - found.keys():
                self.delete(name)
            for name in sorted(found, key=lambda name: found[name][1]):  # the oldest first
                if self.copied.get(name) != found[name] and self.num_uploads != self.stop_after:
                    self.upload(name, found[name])

    def scan(self):
        """Return size and time of change of each file that is to be copied, by its name in the folder."""
        found = {}
        for path in self.folder.rglob("*"):
            if not path.name.endswith(NOT_COPIED):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    if path.is_file():
                        status = path.stat()
                        found[str(path.relative_to(self.folder))] = (status.st_size, status.st_mtime_ns)
        return found

    def upload(self, name, version):
        """Copy a file to S3, with a marker beside it that tells how far this is."""
        path = self.folder / name
        uploading, uploaded = (path.with_name(path.name + marker) for marker in (UPLOADING, UPLOADED))
        self.num_uploads += 1
        sent, began = 0, time.monotonic()

        def count(size):
            nonlocal sent
            sent += size
            time.sleep(max(0, began + sent / self.rate - time.monotonic()))
            if self.num_uploads == self.stall_upload and sent >= version[0] / 2 and not self.stopping:
                self.stall_upload = 0
                self.tell("stalled", name)
                while not self.stopping:
                    time.sleep(SCAN_SECONDS)

        uploading.touch()
        uploaded.unlink(missing_ok=True)
        try:
            self.s3.upload_file(str(path), self.bucket, self.prefix + name, Callback=count, Config=ONE_BY_ONE)
        except FileNotFoundError:  # deleted meanwhile
            uploading.unlink()
            return
        uploading.rename(uploaded)
        self.copied[name] = version
        self.tell("uploaded", name)

    def delete(self, name):
        """Repeat in S3 what has happened in the folder."""
        self.s3.delete_object(Bucket=self.bucket, Key=self.prefix + name)
        path = self.folder / name
        path.with_name(path.name + UPLOADED).unlink(missing_ok=True)
        del self.copied[name]
        self.tell("deleted", name)


def main():
    """Copy until SIGTERM, telling each event as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("uri")
    parser.add_argument("--rate", type=float, required=True, help="bytes per second")
    parser.add_argument("--stall-upload", type=int, default=0)
    parser.add_argument("--stop-after", type=int)
    args = parser.parse_args()

    def tell(event, name):
        print(json.dumps({"event": event, "name": name}), flush=True)

    options = args.rate, args.stall_upload, tell, args.stop_after
    sync = Sync(boto3.client("s3"), args.folder, args.uri, *options)
    signal.signal(signal.SIGTERM, lambda number, frame: sync.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the simulator, which ends this
    tell("ready", "")
    sync.run()


if __name__ == "__main__":
    main()
