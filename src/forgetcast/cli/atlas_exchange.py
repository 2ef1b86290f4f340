"""Commands by which atlases are checked, joined and shared: atlas validate, merge, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetcast.cli.app import atlas_app, err, out, print_json
from forgetcast.cli.options import AsJson, AtlasPath, NewAtlas, Output
from forgetcast.errors import ConfigError

if TYPE_CHECKING:
    from forgetcast.atlas import Atlas


@atlas_app.command()
def validate(atlas: AtlasPath, as_json: AsJson = False) -> None:
    """Read every byte of an atlas, and say what is damaged, lost or foreign, and what to do about it.

    Exit code: 0 the atlas is whole, 1 it is not, 2 there is no atlas.

    Example: forgetcast atlas validate runs.atlas
    """
    from forgetcast.atlas.validate import validate as check

    findings = check(atlas)
    errors = sum(finding.severity == "error" for finding in findings)
    if as_json:
        print_json({"atlas": atlas, "whole": not errors, "findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            out.print(f"{finding.severity}: {finding.file}: {finding.message}", markup=False, soft_wrap=True)
        out.print(f"{atlas} {f'is not whole: {errors} errors' if errors else 'is whole'}", markup=False)
    if errors:
        raise typer.Exit(1)


@atlas_app.command()
def merge(
    atlases: Annotated[list[str], typer.Argument(help="Directories or URLs of atlases of the same base model.")],
    output: NewAtlas,
    as_prior: Annotated[
        list[str] | None,
        typer.Option(help="Atlas of another version of the model, whose rows inform forecasts; may be repeated."),
    ] = None,
    keep_both: Annotated[
        bool, typer.Option("--keep-both", help="Keep rows of one name and other numbers, the later as TASK@ATLAS.")
    ] = False,
) -> None:
    """Join atlases of one base model in a new one, with all their examples and rows.

    Examples are the same if their ids are; then their texts, tokens and base losses have to be the same too.

    Example: forgetcast atlas merge law.atlas code.atlas -o team.atlas
    """
    from forgetcast.atlas.merge import merge as join

    merged = join(output, atlases, priors=as_prior or (), keep_both=keep_both)
    _say(merged)


@atlas_app.command()
def export(atlas: AtlasPath, output: Output) -> None:
    """Write an atlas as a data set of the Hugging Face Hub, with a card; `atlas import` reads it back.

    Texts, names and recipes are written too: look them over before you share them.

    Example: forgetcast atlas export runs.atlas -o shared
    """
    from forgetcast.atlas import Atlas
    from forgetcast.atlas.exchange import export_dataset

    export_dataset(Atlas.open(atlas), output)
    out.print(
        f"{output}: a data set with a card, README.md; next: hf upload NAME {output} --repo-type dataset",
        markup=False,
        soft_wrap=True,
    )


@atlas_app.command("import")
def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folder or URL that `atlas export` wrote, such as hf://datasets/NAME. With --logs: the logs of the "
            "base model, then those of each fine-tune."
        ),
    ],
    output: NewAtlas,
    logs: Annotated[
        bool, typer.Option("--logs", help="Read logs of lm-evaluation-harness or Inspect: a folder for each model.")
    ] = False,
) -> None:
    """Make an atlas of a data set that `atlas export` wrote, or of logs of a base model and its fine-tunes.

    A matrix in a file (.npy, .json, .pkl) has no texts and no base losses and becomes no atlas: `bench` and `analyze`
    read it as it is.

    Example: forgetcast atlas import shared -o shared.atlas
    """
    from forgetcast.atlas.exchange import import_dataset
    from forgetcast.atlas.logs import import_logs

    if logs:
        base, *tuned = map(Path, sources)
        if not tuned:
            raise ConfigError("--logs needs the logs of the base model and those of at least one fine-tune")
        atlas, notes = import_logs(base, tuned, output)
        for note in notes:
            err.print(f"warning: {note}", markup=False, soft_wrap=True)
        _say(atlas)
        return
    if len(sources) > 1:
        raise ConfigError("one data set is imported at a time; join atlases with `forgetcast atlas merge`")
    if Path(sources[0]).is_file():
        raise ConfigError(
            f"{sources[0]} is a file; without texts and base losses it makes no atlas: give it to `bench` or `analyze`"
        )
    _say(import_dataset(sources[0], output))


def _say(atlas: Atlas) -> None:
    out.print(f"{atlas.path}: {len(atlas.tasks)} tasks x {len(atlas.examples)} examples", markup=False, soft_wrap=True)
