# SPDX-License-Identifier: Apache-2.0
"""The command `pytest-msprobe`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pytest_msprobe.cli import (
    calibrate,
    compare,
    doctor,
    explain,
    goldens,
    init,
    inspect,
    narrow,
    runs,
)
from pytest_msprobe.errors import MsprobeError

USAGE_ERROR = 4


class _Parser(argparse.ArgumentParser):
    """A parser that leaves with the exit code that pytest has for wrong use."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and leaves."""
        self.print_usage(sys.stderr)
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = _Parser(
        prog="pytest-msprobe",
        description="Precision regression testing of vLLM models.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _pytest_command(
        commands, "update", runs.update, "run tests, write goldens, say what moved"
    )
    _pytest_command(
        commands, "gate", runs.gate, "run tests read-only and write reports for CI"
    )
    _pytest_command(
        commands,
        "calibrate",
        calibrate.calibrate,
        "run tests several times, store each row's noise in the goldens",
    )
    _narrow_command(commands)
    check = commands.add_parser("check", help="judge a saved run again")
    check.add_argument("run", help="run folder, or a folder in it")
    check.add_argument(
        "--golden",
        metavar="DIR",
        help="golden tree, where it no longer lies where the run found it",
    )
    check.set_defaults(action=lambda o: inspect.check(o.run, golden=o.golden))
    _compare_command(commands)
    _golden_commands(commands)
    why = commands.add_parser(
        "explain", help="say what decides a test or a row: key, rules, history"
    )
    why.add_argument("what", help="node id of a test, part of one, or a row")
    why.add_argument("row", nargs="?", help="glob over the rows of that test")
    why.add_argument("--msprobe-config", metavar="FILE", help="configuration")
    why.set_defaults(
        action=lambda o: explain.explain(o.what, o.row, config=o.msprobe_config)
    )
    show = commands.add_parser("show", help="print what a golden or capture holds")
    show.add_argument("path", help="golden or capture file")
    show.add_argument("--calls", action="store_true", help="list its calls as well")
    show.set_defaults(action=lambda o: inspect.show(o.path, has_calls=o.calls))
    _doctor_command(commands)
    return parser


def _doctor_command(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser(
        "doctor",
        help="plant faults into the configured engine: does the gate see them?",
    )
    command.add_argument(
        "--env",
        action="store_true",
        help="only say what runs here and what will not; starts no engine",
    )
    command.add_argument("--msprobe-config", metavar="FILE", help="configuration")
    command.add_argument(
        "--faults", metavar="NAME,...", help="kinds of fault; default: all"
    )
    command.add_argument(
        "--places", type=int, default=1, metavar="N", help="places of each kind"
    )
    command.add_argument(
        "--runs", type=int, default=3, metavar="N", help="clean runs that must pass"
    )
    command.add_argument(
        "--power",
        type=float,
        metavar="X",
        help="relative L2 change of a row that must be caught; default: twice the "
        "default limit",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of places and prompts"
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="do not search for the smallest size that is caught",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(
        action=lambda o: (
            doctor.environment()
            if o.env
            else doctor.examine(
                doctor.Options(
                    o.msprobe_config,
                    o.faults,
                    o.places,
                    o.runs,
                    o.power,
                    o.seed,
                    o.quick,
                    o.json,
                )
            )
        )
    )


def _golden_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    for name, action, text in (
        ("review", goldens.review, "show what accepting a saved run would change"),
        ("accept", goldens.accept, "make a saved run's captures the goldens"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("run", help="run folder, or a folder in it")
        command.add_argument("--test", help="only tests with this in their name")
        command.set_defaults(action=lambda o, act=action: act(o.run, test=o.test))
    prune = commands.add_parser("prune", help="list goldens of tests that are gone")
    prune.add_argument("--msprobe-config", metavar="FILE", help="configuration")
    prune.add_argument("--yes", action="store_true", help="remove them")
    prune.add_argument("tests", nargs="*", help="where all tests are")
    prune.set_defaults(
        action=lambda o: goldens.prune(o.tests, config=o.msprobe_config, is_sure=o.yes)
    )
    report = commands.add_parser("report", help="write the HTML page of a saved run")
    report.add_argument("run", help="run folder")
    report.add_argument("--output", metavar="FILE", help="default: in the run")
    report.set_defaults(action=lambda o: runs.report(o.run, output=o.output))
    start = commands.add_parser("init", help="write a configuration and a first test")
    start.add_argument("--model", required=True, help="name or folder of the model")
    start.set_defaults(action=lambda o: init.init(o.model))


def _compare_command(commands: "argparse._SubParsersAction[_Parser]") -> None:
    what = "capture, golden, dump.json, or a folder: of a rank, step, dump, test or run"
    command = commands.add_parser("compare", help="judge one capture against another")
    command.add_argument("golden", help=what)
    command.add_argument("candidate", help="likewise")
    command.add_argument(
        "--json", action="store_true", help="print verdicts as JSON, one a line"
    )
    command.add_argument(
        "--table", metavar="FILE", help="write msProbe's metrics of every row as CSV"
    )
    command.add_argument(
        "--msprobe-config", metavar="FILE", help="configuration with tolerances"
    )
    command.add_argument(
        "--data-mapping",
        "-dm",
        metavar="FILE",
        help="YAML: row of the candidate: row of the golden",
    )
    command.add_argument(
        "--layer-mapping",
        "-lm",
        metavar="FILE",
        help="YAML: path.Class of the candidate: path.Class of the golden",
    )
    command.add_argument(
        "--fuzzy",
        "-fm",
        action="store_true",
        help="pair modules of other classes, too",
    )
    command.set_defaults(
        action=lambda o: compare.compare(
            o.golden,
            o.candidate,
            compare.Options(
                o.json,
                o.table,
                o.msprobe_config,
                o.data_mapping,
                o.layer_mapping,
                o.fuzzy,
            ),
        )
    )


def _narrow_command(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = commands.add_parser(
        "narrow", help="repeat a failing test at mix on two sides, name the operator"
    )
    command.add_argument("nodeid", help="the test, as pytest names it")
    command.add_argument(
        "--good",
        required=True,
        metavar="REF|PYTHON|CAPTURE",
        help="side that is right: a git ref, another environment's interpreter, or a "
        "saved capture or run",
    )
    command.add_argument(
        "--replay",
        action="store_true",
        help="give each module that differs its good inputs: own and inherited error",
    )
    command.set_defaults(
        action=lambda o: narrow.narrow(o.nodeid, o.good, o.rest, has_replay=o.replay),
        takes_rest=True,
    )


def _pytest_command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    run: Callable[[Sequence[str]], int],
    text: str,
) -> None:
    command = commands.add_parser(name, help=text, add_help=False)
    command.set_defaults(action=None, run=run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 for a finding, 4 for wrong use."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if options.action is not None and rest and not hasattr(options, "takes_rest"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.action is None:
            return int(options.run(rest))
        return int(options.action(options))
    except MsprobeError as error:
        print(f"pytest-msprobe: {error}", file=sys.stderr)
        return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
