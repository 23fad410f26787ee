"""The first difference between two trainings, and its likely cause."""

from typing import NamedTuple

from verify import compare

OTHER_GENERATOR = (
    "random numbers from another generator, or data that changes. In `augment`, use `rng`; in a data set, "
    "use `random`, `numpy.random` or the framework, which are seeded for each sample"
)
OUTSIDE = (
    "state outside the checkpoint: training changes an attribute, a global variable, gradients, a callback "
    "or a random generator that `state_dict()` does not return"
)
UNSEEDED = "random numbers without a seed, or kernels that are not deterministic (--no-deterministic, a GPU)"


class Difference(NamedTuple):
    """The first difference, with its position and likely cause."""

    what: str
    cause: str


def find_difference(whole, interrupted):
    """Return the first Difference between two trainings in chronological order, or None."""
    expected = {(record.kind, record.position): record.facts for record in whole.records}
    restored = {}  # by process number: the parts of the state that were not restored
    for record in interrupted.records:
        kind = record.kind
        if kind == "restored":
            kind = "step" if record.position[1] else "epoch"
        facts = expected.get((kind, record.position))
        if facts is None:
            continue  # before the first step
        state = record.facts["state"]
        parts = [part for part, checksum in facts["state"].items() if state.get(part) != checksum]
        if record.kind == "restored":
            restored[record.run] = parts
            continue
        found = describe(record, facts, parts)
        if found:
            moment = interrupted.exits[record.run - 2][0] if record.run > 1 else None
            since = f"after {moment}" if moment else "before any interruption"
            reason = cause(record, facts, parts, restored.get(record.run, []))
            return Difference(f"since {record.name}, {since}: {found}", reason)
    return lost_steps(interrupted) or difference_at_the_end(whole, interrupted)


def describe(record, facts, parts):
    """Return a description of the difference; empty without one.

    Args:
        record: the record of the interrupted training.
        facts: the facts of the uninterrupted training at the same position.
        parts: the parts of the training state that differ.
    """
    words = []
    if record.facts.get("batch") != facts.get("batch"):
        words.append("the batch")
    words += parts
    if record.facts.get("validation") != facts.get("validation"):
        words.append("the validation data")
    return ", ".join(words)


def cause(record, facts, parts, not_restored):
    """Return the likely cause of the first difference; for the arguments see `describe`."""
    if record.facts.get("batch") != facts.get("batch") or not parts:
        return OTHER_GENERATOR  # the training or validation data differ
    if record.facts.get("draws"):
        generators = " and ".join(record.facts["draws"])
        return f"the step draws random numbers from {generators}, which are seeded for samples only"
    if record.run == 1:
        return UNSEEDED
    forgotten = [part for part in not_restored if part in parts]
    if forgotten:
        return f"`load_state_dict` does not restore {', '.join(forgotten)} as returned by `state_dict`"
    return OUTSIDE


def lost_steps(training):
    """Return the Difference if steps were repeated after a SIGTERM, which must not lose any."""
    steps = [record for record in training.records if record.kind == "step"]
    for run, (moment, code) in enumerate(training.exits, 1):
        if not moment or code != 128 + moment.signal:
            continue
        done = {record.position for record in steps if record.run == run}
        again = [record for record in steps if record.run == run + 1 and record.position in done]
        if again:
            what = f"since {again[0].name}, which was repeated after {moment}"
            return Difference(what, "the checkpoint saved at SIGTERM was not used")
    return None


def difference_at_the_end(whole, interrupted):
    """Return the Difference of history and model, or None."""
    history = "data/history.csv"
    rows = compare.read_history(whole.folder / history)
    others = compare.read_history(interrupted.folder / history)
    for row, other in zip(rows, others):
        columns = ", ".join(name for name in row if row[name] != other.get(name))
        if columns:
            what = f"since epoch {row['epoch']}: {columns}; the weights are the same"
            return Difference(what, f"in a metric, {OUTSIDE}")
    if len(rows) != len(others):
        return Difference(f"at the end: {len(others)} epochs instead of {len(rows)}", OUTSIDE)
    names = compare.differences(whole.folder, interrupted.folder, history)
    if names:
        what = f"in the exported model only: {', '.join(names)}"
        return Difference(
            what, f"{OUTSIDE}, which only `export_model` uses; or the export changes from run to run"
        )
    return None
