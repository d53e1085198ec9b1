"""`check` and `schema`.

`check` says whether a config is valid, what in it probably is not meant so, and whether its upstreams can be used.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import uvloop

from proxy.commands.context import NO, config_file, config_option, show, show_json
from proxy.config.document import Diagnostic
from proxy.config.json_schema import json_schema, settings_page
from proxy.config.lint import missing_programs, warnings
from proxy.config.loader import MISTAKES_SHOWN, BadConfig, Config
from proxy.config.messages import finding_at
from proxy.config.sentences import sentences
from proxy.server import public_address, sqlite_path, wall_clock_ms
from proxy.upstreams.client import Upstreams
from proxy.upstreams.models import ModelLists
from proxy.upstreams.trial import Trial, try_upstream

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Report:
    """All that `check` says. Without a valid file there are only mistakes."""

    mistakes: tuple[Diagnostic, ...] = ()
    warnings: tuple[Diagnostic, ...] = ()
    database: str | None = None
    sentences: tuple[str, ...] = ()
    trials: tuple[Trial, ...] | None = None

    def passes(self, *, strict: bool) -> bool:
        """Whether the exit code is 0."""
        return not self.mistakes and not (strict and self.warnings)

    def as_json(self, *, strict: bool) -> dict[str, object]:
        """The report for programs, as docs/running.md has it."""
        found = [
            *(_finding_json("error", each) for each in self.mistakes),
            *(_finding_json("warning", each) for each in self.warnings),
        ]
        tried = None if self.trials is None else [_trial_json(each) for each in self.trials]
        return {
            "ok": self.passes(strict=strict),
            "findings": found,
            "database": self.database,
            "sentences": list(self.sentences),
            "upstreams": tried,
        }


@click.command("check")
@config_option
@click.option("--strict", is_flag=True, help="Exit with 1 also if there are only warnings.")
@click.option("--connect", is_flag=True, help="Also ask each upstream for its models: address, certificate, key.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(path: str, strict: bool, connect: bool, as_json: bool) -> None:
    """Check a config: print its mistakes, or warnings and what each group may do."""
    try:
        config = config_file(path).load()
    except BadConfig as error:
        report = Report(error.mistakes)
    else:
        report = _report(config, uvloop.run(_try_upstreams(config)) if connect else None)
    if as_json:
        show_json(report.as_json(strict=strict))
    else:
        _print(report)
    if not report.passes(strict=strict):
        raise SystemExit(NO)


def _report(config: Config, trials: tuple[Trial, ...] | None) -> Report:
    database, missing = _database(config)
    likely = (*warnings(config, wall_clock_ms()), *missing_programs(config))
    failed = {
        verdict: [
            config.document.locate(finding_at(("upstreams", each.upstream), each.text))
            for each in trials or ()
            if each.verdict == verdict
        ]
        for verdict in ("warning", "error")
    }
    return Report(
        mistakes=tuple(sorted(failed["error"])),
        warnings=tuple(sorted((*likely, *missing, *failed["warning"]))),
        database=database,
        sentences=sentences(config),
        trials=trials,
    )


def _database(config: Config) -> tuple[str, list[Diagnostic]]:
    """The database as a person would look for it, and a warning if its folder does not exist."""
    url = config.settings.database
    if not url.startswith("sqlite:"):
        return public_address(url), []
    path = sqlite_path(url)
    whole = path.absolute()
    where = "" if path.is_absolute() else f", relative to the working directory {Path.cwd()}"
    if whole.parent.is_dir():
        return f"{whole}{where}", []
    text = f"the folder {whole.parent} does not exist{where}; create it, or write another path"
    return f"{whole}{where}", [config.document.locate(finding_at(("database",), text))]


async def _try_upstreams(config: Config) -> tuple[Trial, ...]:
    catalog = config.catalog
    names: dict[str, dict[str, None]] = {name: {} for name in catalog.upstreams}
    for listed in catalog.names:
        for target in (catalog.models or {})[listed].targets:
            names[target.upstream.name][target.upstream_model] = None
    upstreams = Upstreams()
    upstreams.open()
    try:
        lists = ModelLists(upstreams, now=wall_clock_ms)
        trials = (try_upstream(lists, each, names[each.name]) for each in catalog.upstreams.values())
        redact = config.document.interpolator.redact
        return tuple(replace(each, text=redact(each.text)) for each in await asyncio.gather(*trials))
    finally:
        await upstreams.close()


def _print(report: Report) -> None:
    _complain(report.mistakes[:MISTAKES_SHOWN], "", "red")
    if len(report.mistakes) > MISTAKES_SHOWN:
        click.secho(f"and {len(report.mistakes) - MISTAKES_SHOWN} more", fg="red", err=True)
    _complain(report.warnings, "warning: ", "yellow")
    if report.database is not None:
        show(f"The database is {report.database}.")
    for trial in report.trials or ():
        if trial.verdict == "ok":
            show(f"upstream {trial.upstream}: {trial.text}.")
    for sentence in report.sentences:
        show(sentence)


def _complain(found: Iterable[Diagnostic], prefix: str, color: str) -> None:
    for each in found:
        click.secho(f"{prefix}{each}", fg=color, err=True)


def _finding_json(severity: Severity, found: Diagnostic) -> dict[str, Any]:
    path = {"path": found.path} if found.path else {}
    return {"file": found.file, "line": found.line, **path, "severity": severity, "text": found.text}


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {"upstream": trial.upstream, "ok": trial.verdict != "error", "models": trial.models, "text": trial.text}


@click.command("schema")
@click.option("--markdown", is_flag=True, help="Print a page of documentation instead, with every setting.")
def schema(*, markdown: bool) -> None:
    """Print the JSON Schema of the config, for editors."""
    click.echo(settings_page() if markdown else json_schema(), nl=False)
