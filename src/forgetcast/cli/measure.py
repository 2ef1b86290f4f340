"""Commands that measure models: score, diff, generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forgetcast.cli.app import (
    app,
    err,
    is_first,
    load_data,
    out,
    print_all,
    print_json,
    progress,
    require_single_process,
    show,
)
from forgetcast.cli.options import (
    MEASURE,
    AsJson,
    Columns,
    Date,
    Format,
    Loading,
    ModelName,
    NoThinking,
    Output,
    PoolPath,
    Seed,
    Strict,
    loads_a_model,
)

if TYPE_CHECKING:
    from forgetcast.measure import Scores


@app.command(rich_help_panel=MEASURE)
@loads_a_model
def score(
    model: ModelName,
    pool: PoolPath,
    output: Output,
    max_length: Annotated[int | None, typer.Option(help="Longest input in tokens; default: the context.")] = None,
    answers: Annotated[
        bool, typer.Option("--exact-match", help="Also answer the prompts, and compare with the completions.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens, with --exact-match.")] = 32,
    stride: Annotated[
        int | None, typer.Option(help="Score longer texts in windows this many tokens apart; default: truncate.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch, with padding.")] = None,
    date: Date = None,
    no_thinking: NoThinking = False,
    format: Format = None,
    column: Columns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Measure how well a model predicts each example: nats per target token.

    Example: forgetcast score ./my-model pool.jsonl -o before.parquet
    """
    import numpy as np

    from forgetcast.data import Rendering
    from forgetcast.lm import exact_match, load
    from forgetcast.lm import score as score_pool

    examples = load_data(pool, format, column, strict)
    rendering = Rendering(date or Rendering.date, not no_thinking)
    language_model = replace(load(model, **loading.arguments()), rendering=rendering)
    done = 0

    with progress() as report:

        def count(finished: int, what: str = "scoring") -> None:
            nonlocal done
            done += finished
            report(what, done, len(examples))

        scores = score_pool(
            language_model,
            examples,
            max_length=max_length,
            stride=stride,
            batch_tokens=batch_tokens,
            partial=output.with_name(f"{output.name}.partial"),
            on_progress=count,
        )
        if answers:
            done = 0
            right, predictions = exact_match(
                language_model, examples, max_new_tokens=max_new_tokens, on_progress=lambda n: count(n, "answering")
            )
            scores = replace(scores, exact_match=right, predictions=predictions)
    if not is_first():
        return
    if examples.report is not None and (examples.skipped or examples.report.duplicates):
        scores = replace(scores, metadata={**scores.metadata, "read": examples.report.as_dict()})
    scores.save(output)
    unscored = [id_ for id_, reason in zip(scores.ids, scores.reasons, strict=True) if reason]
    right_answers = None
    if scores.exact_match is not None and not np.isnan(scores.exact_match).all():
        right_answers = float(np.nanmean(scores.exact_match))
    facts = {
        "examples": len(scores),
        "skipped": len(examples.skipped) or None,
        "unscored": len(unscored),
        "truncated": int(scores.truncated.sum()),
        "tokens": int(scores.tokens.sum()),
        "mean_nll": float(np.nanmean(scores.nll)) if len(unscored) < len(scores) else None,
        "right_answers": right_answers,
        "output": str(output),
    }
    if answers and right_answers is None:
        err.print("warning: no example has a prompt to answer")
    if left_out := scores.metadata["thinking_left_out"]:
        err.print(f"warning: the chat template leaves out thinking of {left_out} example(s); it is not scored")
    if unscored:
        err.print(f"warning: {len(unscored)} example(s) could not be scored, e.g. {unscored[0]!r}", markup=False)
    show(facts, as_json, title="Scores")


@app.command(rich_help_panel=MEASURE)
def diff(
    before: Annotated[Path, typer.Argument(help="Scores, or logs of lm-evaluation-harness or Inspect; a folder too.")],
    after: Annotated[Path, typer.Argument(help="The same for the changed model.")],
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Exit with code 1 if this holds, such as mean>0.05; repeatable.")
    ] = None,
    pool: Annotated[Path | None, typer.Option(help="The scored pool, for results by source.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models' scores of the same examples: how much was forgotten, with what confidence, and where.

    A condition names a statistic: mean, median, lower or upper (ends of the mean's 95 % interval), worst_tenth,
    worst_hundredth, share_worse, wilcoxon_p, right_before, right_after, right_to_wrong, wrong_to_right, mcnemar_p.

    Exit code 0: no condition holds. 1: at least one does. 2: the comparison was not possible.

    Example: forgetcast diff before.parquet after.parquet --fail-if "lower>0.02" --fail-if "worst_tenth>0.5"
    """
    from forgetcast.cli.tables import difference_markdown, difference_tables
    from forgetcast.measure import Gate, difference

    gates = [Gate.parse(text) for text in fail_if or ()]
    (scores_before, sources), (scores_after, _) = _scores(before), _scores(after)
    if pool is not None:
        examples = load_data(pool)
        source_of = dict(zip(examples.ids, examples.sources, strict=True))
        sources = tuple(source_of.get(id_, "") for id_ in scores_before.ids)
    result = difference(scores_before, scores_after, sources=sources)
    failed = [gate.text for gate in gates if gate.fails(result)]
    if as_json:
        print_json(result.as_dict() | {"failed": failed})
    elif markdown:
        typer.echo(difference_markdown(result, failed))
    else:
        print_all(difference_tables(result))
    for text in failed:
        err.print(f"failed: {text}", markup=False)
    if failed:
        raise typer.Exit(1)


def _scores(path: Path) -> tuple[Scores, tuple[str, ...] | None]:
    """Read a score file, ours or another tool's, with the sources that it names."""
    from forgetcast.measure import Scores, is_inspect, read_inspect, read_lm_eval

    if path.suffix == ".parquet":
        return Scores.load(path), None
    scores, tasks = (read_inspect if is_inspect(path) else read_lm_eval)(path)
    for note in scores.metadata["notes"]:
        err.print(f"warning: {path}: {note}", markup=False)
    return scores, tasks


@app.command(rich_help_panel=MEASURE)
@loads_a_model
def generate(
    model: ModelName,
    output: Output,
    count: Annotated[int, typer.Option("-n", help="Number of texts.")] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    seed: Seed = 0,
    *,
    loading: Loading,
) -> None:
    """Sample a pool from a model, for replay when its training data is not available.

    Example: forgetcast generate ./my-model -n 1000 -o pool.jsonl
    """
    from forgetcast.lm import load, sample_texts

    require_single_process("generate")
    language_model = load(model, **loading.arguments())
    done = 0
    with progress(resumable=False) as report:

        def add(finished: int) -> None:
            nonlocal done
            done += finished
            report("writing", done, count)

        texts = sample_texts(
            language_model, count, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_progress=add
        )
    texts.save(output)
    out.print(f"{len(texts)} texts written to {output}; next: use it as the pool of a sweep, see collect", markup=False)
