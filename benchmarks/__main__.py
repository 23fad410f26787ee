"""Run the benchmarks of the scripts and write the results to `benchmarks/results/`."""

import argparse
import importlib

from benchmarks import harness

NAMES = harness.NAMES


def main():
    """Run the named benchmarks, or all; a missed limit is reported but is not an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; default: all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--report", action="store_true", help="only write the report, from the saved figures")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(unknown)}; expected one or more of {', '.join(NAMES)}")
    if args.report:
        harness.write_report(NAMES)
        return
    for name in args.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"{name}: {module.__doc__.splitlines()[0]}", flush=True)
        figures = []
        for figure in module.measure(args.repetitions):
            figures.append(figure)
            reached = {None: "", True: "reached", False: "MISSED"}[figure.reached]
            print(
                f"  {figure.what}: {figure.value:.3g} {figure.limit} {reached} ({figure.detail})", flush=True
            )
        harness.write_results(name, module.__doc__, figures, args.repetitions)
        harness.write_report(NAMES)


if __name__ == "__main__":
    main()
