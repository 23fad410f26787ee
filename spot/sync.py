"""Copy between the checkpoint folder and S3 in a separate process, as the service does.

At the start all objects under the prefix are copied into the folder. While the training runs, new and changed
files are uploaded one after the other, and files deleted in the folder are deleted in S3.
`<name>.sagemaker-uploading` and `<name>.sagemaker-uploaded` beside a file mark the progress of its upload;
files whose names end with `.sagemaker-ignore` are not uploaded.

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
    """Copies new files of `folder` to S3 while `run` runs.

    Args:
        s3: a boto3 client.
        folder: the local checkpoint path.
        uri: its address in S3, whose content has been copied into the folder.
        rate: bytes per second.
        stall_upload: the number of the upload, counted from 1, that stops half way until `stop` is called;
            0: none.
        emit: called with the event and the name of the file.
        stop_after: the number of uploads after which copying stops, a known fault of the service.
    """

    def __init__(self, s3, folder, uri, rate, stall_upload, emit, stop_after=None):
        self.s3, self.folder, self.stall_upload, self.emit = s3, folder, stall_upload, emit
        self.bucket, self.prefix = split_uri(uri)
        self.rate, self.stop_after = rate, stop_after
        self.num_uploads = 0
        self.stopping = False
        self.copied = self.scan()

    def stop(self):
        """Let `run` copy the rest and end."""
        self.stopping = True

    def run(self):
        """Copy until `stop` is called, and then copy the rest."""
        ending, parent = False, os.getppid()
        while not ending and os.getppid() == parent:  # ends with the simulator
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
        """Return size and modification time of each file to copy, by its name in the folder."""
        found = {}
        for path in self.folder.rglob("*"):
            if not path.name.endswith(NOT_COPIED):
                with contextlib.suppress(FileNotFoundError):  # deleted by the training
                    if path.is_file():
                        status = path.stat()
                        found[str(path.relative_to(self.folder))] = (status.st_size, status.st_mtime_ns)
        return found

    def upload(self, name, version):
        """Copy a file to S3, with a marker beside it for the progress."""
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
                self.emit("stalled", name)
                while not self.stopping:
                    time.sleep(SCAN_SECONDS)

        uploading.touch()
        uploaded.unlink(missing_ok=True)
        try:
            self.s3.upload_file(str(path), self.bucket, self.prefix + name, Callback=count, Config=ONE_BY_ONE)
        except FileNotFoundError:  # deleted by the training
            uploading.unlink()
            return
        uploading.rename(uploaded)
        self.copied[name] = version
        self.emit("uploaded", name)

    def delete(self, name):
        """Repeat the changes of the folder in S3."""
        self.s3.delete_object(Bucket=self.bucket, Key=self.prefix + name)
        path = self.folder / name
        path.with_name(path.name + UPLOADED).unlink(missing_ok=True)
        del self.copied[name]
        self.emit("deleted", name)


def main():
    """Copy until SIGTERM, and print each event as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("uri")
    parser.add_argument("--rate", type=float, required=True, help="bytes per second")
    parser.add_argument("--stall-upload", type=int, default=0)
    parser.add_argument("--stop-after", type=int)
    args = parser.parse_args()

    def emit(event, name):
        print(json.dumps({"event": event, "name": name}), flush=True)

    options = args.rate, args.stall_upload, emit, args.stop_after
    sync = Sync(boto3.client("s3"), args.folder, args.uri, *options)
    signal.signal(signal.SIGTERM, lambda number, frame: sync.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulator handles Ctrl-C and ends this process
    emit("ready", "")
    sync.run()


if __name__ == "__main__":
    main()
