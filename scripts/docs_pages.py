"""Write the pages of the documentation that are generated: command line, strategies, public names.

`make docs` runs it before the site is built; the pages are not committed. Usage: python scripts/docs_pages.py [DOCS]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import griffe
import typer

import forgetcast
from forgetcast.cli import app
from forgetcast.replay import STRATEGIES

DOCS = Path(__file__).parents[1] / "docs"

# Forgetting relative to random replay (mean / worst tenth), and when a strategy pays; from explanation/results.md.
MEASURED: dict[str, tuple[str, str]] = {
    "none": ("1.479 / 1.437", "Baseline."),
    "padding": ("1.554 / 1.491", "Never. It shows that more steps alone do not help."),
    "random": ("1", "Needs no atlas and avoids most of what replay can avoid. The baseline that a forecast must beat."),
    "stratified": ("1.001 / 0.999", "No difference from `random` was measured."),
    "forecast": ("0.898 / 0.872", "Gains little more than half of what `top` gains on the tail."),
    "ranked": ("0.887 / 0.847", "Between `forecast` and `top`."),
    "top": (
        "0.856 / 0.773",
        "Default. With probes of the task it was better than `random` in all settings of one fine-tune.",
    ),
    "half": ("0.854 / 0.808", "As good as `top` on the mean, between `random` and `top` on the tail."),
    "coverage": ("0.860 / 0.868", "As good as `top` on the mean only."),
    "coverage-facility": ("0.892 / 0.865", "Between `random` and `top`."),
    "coverage-herding": ("0.903 / 0.847", "Between `random` and `top`."),
    "loss": ("1.178 / 1.095", "Worse than `random`: what is predicted badly is not what is forgotten."),
    "median-loss": ("1.043 / 1.007", "Worse than `random` on the mean."),
    "gradient": ("1.016 / 0.976", "Not better than `random`."),
    "most-forgotten": (
        "0.864 / 0.852",
        "Better than `random`; costs the forward passes of four candidates each.",
    ),
    "truth": ("0.891 / 0.874", "Upper bound of `forecast`; it needs the forgetting to be measured."),
}


def strategies() -> str:
    """Return the page of replay strategies, from the registry."""
    if odd := set(MEASURED) ^ set(STRATEGIES):
        raise SystemExit(f"{__file__}: MEASURED and the registry differ in: {', '.join(sorted(odd))}")
    rows = []
    for name, strategy in STRATEGIES.items():
        figures, pays = MEASURED[name]
        needs = ", ".join(sorted(strategy.needs)) or "-"
        figures = figures.replace(" ", "&nbsp;")  # not broken over lines
        rows.append(f"| `{name}` | {_cell(strategy.summary)} | {needs} | {figures} | {_cell(pays)} |")
    return _page(
        "Replay strategies",
        "Select one with `forgetcast plan --strategy NAME`. The default is `top`. *Needs* names the signals that a "
        "strategy reads; without a forecast file, `plan` takes the atlas's mean as the forecast.",
        "Figures are forgetting relative to random replay, on the mean and on the worst tenth: less than 1 is better. "
        "They were measured on the demo model at one replayed example for eight new ones; "
        "[Results](../explanation/results.md) has intervals, other ratios and other settings.",
        "| strategy | what it does | needs | mean / worst tenth | when it pays |\n|---|---|---|---|---|\n"
        + "\n".join(rows),
        "To write one, see [Add a replay strategy](../how-to/replay-strategy.md).",
    )


def commands() -> str:
    """Return the page of the command line, from the Typer application."""
    group: Any = typer.main.get_command(app)
    parts = [
        "`forgetcast COMMAND --help` prints the same. Most commands take `--json`.",
        "Exit codes: 0 done; 1 a condition of `diff --fail-if` holds, or `add` could not add some of the models, which "
        "it names; 2 bad input: one line on standard error says "
        "what and where, and no stored file has changed; 130 interrupted: the same command resumes.",
        "`score`, `train`, `start`, `collect`, `verify` and `sequence` resume after an interruption.",
    ]
    for name, command in _all_commands(group):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
        words = [_metavar(p) for p in arguments] + [f"{p.opts[0]} {_metavar(p)}" for p in options if p.required]
        parts += [f"## {name}", f"    forgetcast {name} {' '.join([*words, '[OPTIONS]'])}"]
        for paragraph in (command.help or "").split("\n\n"):
            text = " ".join(paragraph.split())
            example = text.removeprefix("Example: ")
            parts.append(text if example == text else f"Example:\n\n    {example}")
        rows = [f"| `{_metavar(p)}` | {_help(p)} | required |" for p in arguments]
        rows += [f"| {_names(p)} | {_help(p)} | {_default(p)} |" for p in options]
        parts.append("| argument or option | meaning | default |\n|---|---|---|\n" + "\n".join(rows))
    return _page("Command line", *parts)


def _all_commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _all_commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def public_names() -> str:
    """Return the front page of the API, with every name that a package exports."""
    parts = [
        "Every public name, with the page that documents it. Importing `forgetcast` never imports torch; "
        "only `forgetcast.lm` does, and it needs the extra `lm`."
    ]
    package = griffe.load("forgetcast", search_paths=[str(Path(forgetcast.__file__).parents[1])])
    for module in exporting_modules(package):
        rows = []
        for name in sorted(module.exports or ()):
            target = exported(module, name)
            if target.is_module:  # has a heading of its own
                continue
            summary = target.docstring.value.split("\n\n")[0] if target.docstring else ""
            rows.append(f"| [`{name}`][{target.path}] | {_cell(summary)} |")
        parts += [f"## {module.path}", "| name | |\n|---|---|\n" + "\n".join(rows)]
    return _page("Python API", *parts)


def exporting_modules(package: Any) -> list[Any]:
    """Return the modules of a package that declare `__all__`, top first, without those of the command line."""
    found = [package] if package.exports else []
    for module in package.modules.values():
        if not module.is_alias and module.name not in ("cli", "demo"):
            found += exporting_modules(module)
    return found


def exported(module: Any, name: str) -> Any:
    """Return the object that a module exports under a name, where it is defined.

    A package that exports a function of a submodule of the same name has the function at run time; griffe finds the
    submodule.
    """
    found = module.members[name]
    if found.is_alias:
        found = found.final_target
    return found.members[name] if found.is_module and name in found.members else found


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", "<!-- Written by scripts/docs_pages.py -->", *parts]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _metavar(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"{parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}"
    given = parameter.type_descriptor.annotation
    value = next(iter(get_args(given)), given)  # the first of "Path | None" and "list[Path]"
    return {int: "N", float: "X", Path: "PATH"}.get(value, "TEXT")


def _names(parameter: Any) -> str:
    value = "" if parameter.is_flag else f" {_metavar(parameter)}"
    return ", ".join(f"`{option}{value}`" for option in parameter.opts)


def _help(parameter: Any) -> str:
    return _cell(parameter.help or "")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.is_flag or parameter.default is None or callable(parameter.default):
        return ""
    return f"`{parameter.default}`"


PAGES = {
    "reference/commands.md": commands,
    "reference/strategies.md": strategies,
    "reference/api/index.md": public_names,
}


def main() -> None:
    """Write the pages whose content has changed."""
    docs = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    for name, write in PAGES.items():
        path, text = docs / name, write()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
