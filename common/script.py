"""The frame around a script's `main`: how a training ends, and what it tells whoever has started it."""

import os
import sys
import traceback

from common import cluster, errors, interruption, saving


def run(main, args):
    """Call `main(args)`; end with one line and exit code 1 for a UserError or OSError, 143 or 130 after a signal.

    Where several workers train one model, the end of one is the end of all.
    """
    try:
        try:
            main(args)
        finally:
            saving.wait()
        interruption.check()
        cluster.leave()
    except interruption.Interrupted as interrupted:
        cluster.leave()  # after the leader has saved
        interruption.tell(str(interrupted))
        errors.tell_sagemaker(str(interrupted))
        interruption.ignore()
        sys.exit(interrupted.exit_code)
    except Exception as error:
        if not isinstance(error, errors.UserError):
            cluster.end_if_another_failed()
        cluster.fail(str(error) if isinstance(error, errors.UserError) else f"{type(error).__name__}: {error}")
        try:
            _fail(error)
        finally:
            if cluster.size > 1:  # do not wait for the threads of an engine that wait for the other workers
                os._exit(1)


def _fail(error):
    """End with one line for what a user can mend, otherwise with a traceback for a programmer."""
    if isinstance(error, ImportError):
        errors.fail(f"{error}. Install what is missing with: pip install {error.name}")
    if isinstance(error, (errors.UserError, OSError)):
        errors.fail(error)
    traceback.print_exception(type(error), error, error.__traceback__)
    sys.exit(1)
