"""The architecture checker."""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from rimet.arch_checker.arch_checker_rules import NODE_CHECK_DICT, PATTERN_CHECK_LIST
from rimet.arch_checker.constants import ArchCheckerReportConstants as Constants
from rimet.common.connected_graph.operation import Op
from rimet.meta.connectedgraph import ConnectedGraph
from rimet.quantsim._files import write_text

__all__ = ["ArchChecker"]

logger = logging.getLogger(__name__)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #bbb; padding: 0.3em 0.6em; text-align: left; vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{table}
</body>
</html>
"""


class ArchChecker:
    """Runs checks on the modules and on the graph of a model, and writes what they find.

    Checks that are added, and the folder that is set, hold for all further calls in the process.
    """

    _node_check_dict: ClassVar[dict[type, list[Callable[[Any], bool]]]] = {
        cls: list(checks) for cls, checks in NODE_CHECK_DICT.items()
    }
    _pattern_checks: ClassVar[list[Callable[[ConnectedGraph], Any]]] = list(PATTERN_CHECK_LIST)
    _export_dir: ClassVar[str] = "/tmp"

    @staticmethod
    def set_export_dir(dir_path: str) -> None:
        """Sets the folder of the report, ``/tmp`` at first; it is made when the report is."""
        ArchChecker._export_dir = dir_path

    @staticmethod
    def add_node_check(
        check_target_type: type[nn.Module], arch_check: Callable[[Any], bool]
    ) -> None:
        """Adds a check on every module of a class.

        Args:
            check_target_type: the class; its subclasses count.
            arch_check: called with the module; True means passed. Its name stands in the report.
        """
        ArchChecker._node_check_dict.setdefault(check_target_type, []).append(arch_check)

    @staticmethod
    def add_pattern_check(arch_check: Callable[[ConnectedGraph], Iterable[Op]]) -> None:
        """Adds a check on the graph.

        Args:
            arch_check: called with the graph; gives the operations that fail. Its name stands in
                the report.
        """
        ArchChecker._pattern_checks.append(arch_check)

    @staticmethod
    def check_model_arch(model: nn.Module, dummy_input: Any, result_dir: str | None = None) -> None:
        """Runs all checks and writes ``arch_checker_report.html``, a table of layer, issue and
        recommendation; what fails is logged, too.

        Args:
            model: any module; it runs once, in evaluation mode.
            dummy_input: example input, as for :class:`rimet.QuantizationSimModel`.
            result_dir: folder of the report; by default that of :meth:`set_export_dir`. A folder
                given here holds for further calls.
        """
        if result_dir is not None:
            ArchChecker.set_export_dir(result_dir)
        graph = ConnectedGraph(model, dummy_input)
        rows: list[tuple[str, str, str]] = []
        for op in graph.ordered_ops:
            module = op.get_module()
            for cls, checks in ArchChecker._node_check_dict.items():
                if isinstance(module, cls):
                    failed = (check for check in checks if not check(module))
                    rows.extend(_row(op, check) for check in failed)
        for pattern_check in ArchChecker._pattern_checks:
            rows.extend(_row(op, pattern_check) for op in pattern_check(graph) or ())
        for row in rows:
            logger.info("%s: %s %s", *row)
        target = Path(ArchChecker._export_dir) / "arch_checker_report.html"
        write_text(target, _page(type(model).__name__, rows))
        logger.info("%d issues, report in %s", len(rows), target)


def _row(op: Op, check: Callable[..., Any]) -> tuple[str, str, str]:
    name = getattr(check, "__name__", type(check).__name__)
    known = Constants.ERR_MSG_DICT.get(name, {})
    issue = known.get(Constants.DF_ISSUE, Constants.UNDEFINED_ISSUE.format(name))
    advice = known.get(Constants.DF_RECOMM, Constants.UNDEFINED_RECOMM.format(name))
    return op.dotted_name, issue, advice


def _page(model: str, rows: list[tuple[str, str, str]]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    body = [line("th", Constants.OUTPUT_CSV_HEADER), *(line("td", row) for row in rows)]
    return _PAGE.format(
        title=html.escape(f"Architecture of {model}"),
        summary=f"{len(rows)} issues." if rows else "No issues.",
        table="<table>\n" + "\n".join(body) + "\n</table>" if rows else "",
    )
