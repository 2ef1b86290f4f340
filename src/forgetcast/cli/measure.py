"""Commands that measure models: score, diff, generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forgetcast.cli.app import (
    app,
    check_models,
    err,
    import_torch,
    is_first,
    load_data,
    out,
    print_all,
    print_json,
    print_text,
    progress,
    require_single_process,
    show,
)
from forgetcast.cli.options import (
    MEASURE,
    AllowDifferentTokens,
    AsJson,
    Cluster,
    Columns,
    Date,
    Format,
    Loading,
    ModelName,
    NoThinking,
    Output,
    PoolColumns,
    PoolFormat,
    PoolPath,
    Seed,
    Strict,
    loads_a_model,
)
from forgetcast.defaults import MOST_EXAMPLES
from forgetcast.errors import ConfigError, MismatchError
from forgetcast.files import check_destination
from forgetcast.progress import counted

if TYPE_CHECKING:
    import numpy as np

    from forgetcast.data import Pool
    from forgetcast.lm import LanguageModel
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
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=10**6, help="Longest answer in tokens, with --exact-match.")
    ] = 32,
    stride: Annotated[
        int | None, typer.Option(help="Score longer texts in windows this many tokens apart; default: truncate.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens in a batch, with padding.")] = None,
    repeat: Annotated[
        int, typer.Option(min=1, max=2, help="2: measure again with other batches, so that `diff` knows the noise.")
    ] = 1,
    reference: Annotated[
        str | None,
        typer.Option(help="Also measure the KL divergence from this model, usually the base; it is not quantised."),
    ] = None,
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

    An interrupted run continues with the same command, also within what --repeat, --reference and --exact-match add.

    Example: forgetcast score ./my-model pool.jsonl -o before.parquet
    """
    import numpy as np

    from forgetcast.data import Rendering
    from forgetcast.experiments.meter import Meter, Work, scoring_work
    from forgetcast.measure import Scores

    check_destination(output)
    check_models(loading, model, reference)
    examples = load_data(pool, format, column, strict)
    import_torch()
    from forgetcast.lm import exact_match, kl_divergence, load, score_again
    from forgetcast.lm import score as score_pool
    from forgetcast.lm.score import partial_files

    rendering = Rendering(date or Rendering.date, not no_thinking)
    language_model = replace(load(model, **loading.arguments()), rendering=rendering)
    compared = None
    if reference is not None:
        # The base of a model that is quantised while it is loaded is not.
        compared = replace(load(reference, **replace(loading, load_in=None).arguments()), rendering=rendering)
    settings: dict[str, Any] = {"max_length": max_length, "stride": stride}
    # What is added to the scores has files of its own; while they exist, the scores themselves are complete.
    again, divergence, answered = (
        output.with_name(f"{output.name}.{name}.partial") for name in ("repeat", "kl", "answers")
    )
    added = [file for file, asked in ((again, repeat > 1), (divergence, compared), (answered, answers)) if asked]
    resumed = output.is_file() and any(file.is_file() for file in added)
    with progress() as report:
        meter, longest = Meter(report), max_length or language_model.context

        def count(what: str, kind: str = "scoring") -> Callable[[int], None]:
            meter.begin(Work(**{kind: scoring_work(examples, longest).scoring}))
            return meter.scored(examples, longest, what, kind)

        if resumed:
            scores = Scores.load(output)
            _check_resumed(output, scores, language_model, examples, settings)
        else:
            scores = score_pool(
                language_model,
                examples,
                **settings,
                batch_tokens=batch_tokens,
                partial=output.with_name(f"{output.name}.partial"),
                on_progress=count("scoring"),
            )
        if repeat > 1 and scores.repeats is None:
            _keep(scores, output)
            repeats = score_again(
                language_model,
                examples,
                scores,
                batch_tokens=batch_tokens,
                partial=again,
                on_progress=count("scoring again"),
            )
            scores = replace(scores, repeats=repeats)
        if compared is not None and scores.kl is None:
            _keep(scores, output)
            kl = kl_divergence(
                language_model,
                compared,
                examples,
                **settings,
                batch_tokens=batch_tokens,
                partial=divergence,
                on_progress=count("comparing with the reference"),
            )
            named = {"reference": compared.name, "reference_hash": compared.weights_hash}
            scores = replace(scores, kl=kl, metadata={**scores.metadata, **named})
        if answers:
            _keep(scores, output)
            right, predictions = exact_match(
                language_model,
                examples,
                max_new_tokens=max_new_tokens,
                partial=answered,
                on_progress=count("answering", "answering"),
            )
            scores = replace(scores, exact_match=right, predictions=predictions)
    if not is_first():
        return
    if examples.report is not None and (examples.skipped or examples.report.duplicates):
        scores = replace(scores, metadata={**scores.metadata, "read": examples.report.as_dict()})
    scores.save(output)
    if answers:
        for file in partial_files(answered):
            file.unlink(missing_ok=True)
    unscored = [id_ for id_, reason in zip(scores.ids, scores.reasons, strict=True) if reason]
    right_answers = None if scores.exact_match is None else _mean(scores.exact_match)
    facts = {
        "examples": len(scores),
        "skipped": len(examples.skipped) or None,
        "unscored": len(unscored),
        "truncated": int(scores.truncated.sum()),
        "tokens": int(scores.tokens.sum()),
        "mean_nll": _mean(scores.nll),
        "mean_kl": None if scores.kl is None else _mean(scores.kl),
        "right_answers": right_answers,
        "output": str(output),
    }
    if answers and right_answers is None:
        err.print("warning: no example has a prompt to answer")
    if left_out := scores.metadata["thinking_left_out"]:
        err.print(f"warning: the chat template leaves out thinking of {left_out} example(s); it is not scored")
    if unscored:
        err.print(f"warning: {len(unscored)} example(s) could not be scored, e.g. {unscored[0]!r}", markup=False)
    if scores.kl is not None and (missing := int((np.isnan(scores.kl) & ~np.isnan(scores.nll)).sum())):
        err.print(f"warning: {missing} example(s) have a loss, but no finite KL divergence")
    show(facts, as_json, title="Scores")


def _keep(scores: Scores, output: Path) -> None:
    """Write what is complete, before more is measured."""
    if is_first():
        scores.save(output)


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of what is not NaN, or None if there is nothing."""
    import numpy as np

    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _check_resumed(
    output: Path, scores: Scores, language_model: LanguageModel, pool: Pool, settings: dict[str, int | None]
) -> None:
    """Raise MismatchError if the scores that more is to be added to are of another model, pool or settings."""
    from forgetcast import __version__

    expected = {
        "model_hash": language_model.weights_hash,
        "pool": pool.fingerprint,
        "max_length": settings["max_length"] or language_model.context,
        "stride": settings["stride"],
        "text": language_model.text_settings,
        "version": __version__,
    }
    if any(scores.metadata.get(name) != value for name, value in expected.items()):
        raise MismatchError(
            f"{output} is unfinished and of another model, pool or settings; finish it with the command that began it, "
            f"or remove it and {output.name}.*.partial"
        )


@app.command(rich_help_panel=MEASURE)
def diff(
    before: Annotated[Path, typer.Argument(help="Scores, or logs of lm-evaluation-harness or Inspect; a folder too.")],
    after: Annotated[Path, typer.Argument(help="The same for the changed model.")],
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Exit with code 1 if this holds, such as mean>0.05; repeatable.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Largest mean forgetting to accept, in the unit of the losses: worse, not worse, or inconclusive."
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with code 3 if --margin is inconclusive; fail on a row of --pool that is not usable."
        ),
    ] = False,
    cluster: Annotated[
        Cluster | None,
        typer.Option(
            help="What changes together: a source, or a document (the id up to its last #). Default: nothing."
        ),
    ] = None,
    allow_unscored: Annotated[
        bool, typer.Option("--allow-unscored", help="Pass although examples are without a score in AFTER only.")
    ] = False,
    pool: Annotated[Path | None, typer.Option(help="The scored pool, for results by source.")] = None,
    format: Format = None,
    column: Columns = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    allow_different_tokens: AllowDifferentTokens = False,
    as_json: AsJson = False,
) -> None:
    """Compare two models' scores of the same examples: how much was forgotten, with what confidence, and where.

    A condition names a statistic: mean, median, lower or upper (ends of the mean's 95 % interval), standard_error,
    worst_tenth, worst_hundredth, share_worse, per_token (weighted by target tokens), few_tokens, few_tokens_mean,
    wilcoxon_p, right_before, right_after, right_to_wrong, wrong_to_right, mcnemar_p, unscored, unscored_share,
    noise, and with `score --reference` kl_mean, kl_lower, kl_upper, kl_median, kl_standard_error, kl_worst_tenth,
    kl_worst_hundredth.

    Exit code 0: passes. 1: a condition holds, the mean is worse by more than the margin, or examples lost their score.
    2: the comparison was not possible. 3, only with `--strict`: the margin is inconclusive.

    Example: forgetcast diff before.parquet after.parquet --margin 0.02 --fail-if "worst_tenth>0.5"
    """
    from forgetcast.cli.tables import difference_markdown, difference_tables, judgement_lines
    from forgetcast.measure import Gate, difference, judge
    from forgetcast.measure.gates import INCONCLUSIVE

    gates = [Gate.parse(text) for text in fail_if or ()]
    if strict and margin is None and pool is None:
        raise ConfigError("--strict is about --margin or --pool; give one of them")
    if pool is None and (format is not None or column):
        raise ConfigError("--format and --column are about --pool; give it too")
    (scores_before, sources), (scores_after, _) = _scores(before), _scores(after)
    examples = None if pool is None else load_data(pool, format, column, strict)
    if examples is not None and pool is not None:
        sources = _sources(examples, pool, scores_before.ids)
    clusters = _clusters(cluster, scores_before.ids, sources)
    result = difference(
        scores_before,
        scores_after,
        sources=sources,
        clusters=clusters,
        allow_different_tokens=allow_different_tokens,
    )
    if result.different_tokens is None:
        err.print("warning: it is unknown whether both sides were scored on the same tokens")
    judgement = judge(result, gates, margin=margin, allow_unscored=allow_unscored)
    if as_json:
        print_json(result.as_dict() | judgement.as_dict())
    elif markdown:
        print_text(difference_markdown(result, judgement))
    else:
        print_all(difference_tables(result, examples))
        print_all(judgement_lines(judgement))
    if result.lost and not judgement.failed:
        err.print(f"warning: {result.lost} example(s) have no score in the candidate but in the base")
    for text in judgement.failed:
        err.print(f"failed: {text}", markup=False)
    if judgement.failed:
        raise typer.Exit(1)
    if strict and judgement.verdict == INCONCLUSIVE:
        raise typer.Exit(3)


def _sources(examples: Pool, path: Path, ids: Sequence[str]) -> tuple[str, ...]:
    """Return the source of each example in the pool, which was read from a path."""
    source_of = dict(zip(examples.ids, examples.sources, strict=True))
    if unknown := [id_ for id_ in ids if id_ not in source_of]:
        raise MismatchError(f"{path} lacks {len(unknown)} of the scored examples, e.g. {unknown[0]!r}; give their pool")
    return tuple(source_of[id_] for id_ in ids)


def _clusters(cluster: Cluster | None, ids: Sequence[str], sources: Sequence[str] | None) -> Sequence[str] | None:
    """Return the cluster of each example."""
    from forgetcast.measure import documents

    if cluster is None:
        return None
    if cluster is Cluster.DOCUMENT:
        found = documents(ids)
        if found == tuple(ids):
            raise ConfigError('--cluster document: no id has a "#" after that of its document, so all would be alone')
        return found
    if sources is None:
        raise ConfigError("--cluster source needs --pool, which has the sources")
    if unnamed := sum(not source for source in sources):
        raise ConfigError(f"--cluster source: {unnamed} example(s) have no source; name one for each in the pool")
    return sources


def _scores(path: Path) -> tuple[Scores, tuple[str, ...] | None]:
    """Read a score file, ours or another tool's, with the sources that it names."""
    from forgetcast.measure import Scores, read_inspect, read_lm_eval
    from forgetcast.measure.inspect_logs import is_inspect

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
    count: Annotated[
        int | None, typer.Option("-n", min=1, max=MOST_EXAMPLES, help="Number of texts; default: 1000.")
    ] = None,
    on_policy: Annotated[
        Path | None, typer.Option(help="Answer the prompts of this pool instead, under its ids.")
    ] = None,
    right_only: Annotated[
        bool, typer.Option("--right-only", help="With --on-policy: keep answers that are the expected ones.")
    ] = False,
    most_likely: Annotated[
        float, typer.Option(help="With --on-policy: share of the answers to keep, the most likely ones.")
    ] = 1.0,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="With --on-policy: keep answers that were cut at their limit.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Longest text in tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature; default: 1, with --on-policy 0, which is greedy.")
    ] = None,
    seed: Seed = 0,
    pool_format: PoolFormat = None,
    pool_column: PoolColumns = None,
    strict: Strict = False,
    as_json: AsJson = False,
    *,
    loading: Loading,
) -> None:
    """Sample a pool from a model, for replay when its training data is not available.

    Example: forgetcast generate ./my-model -n 1000 -o pool.jsonl

    With --on-policy, the base model answers the prompts of a pool: examples for on-policy replay. They keep their ids,
    so that held-out examples stay so; `plan --on-policy` and `verify --on-policy` take the file.

    Example: forgetcast generate ./my-model --on-policy pool.jsonl --right-only -o own.jsonl
    """
    require_single_process("generate")
    check_destination(output)
    if on_policy is None:
        if right_only or keep_unfinished or most_likely != 1 or pool_format or pool_column or strict or as_json:
            raise ConfigError(
                "--right-only, --most-likely, --keep-unfinished, --pool-format, --pool-column, --strict and --json are "
                "for --on-policy"
            )
    elif count is not None:
        raise ConfigError("-n is for texts without a prompt; --on-policy answers every prompt of the pool")
    check_models(loading, model)
    upstream = load_data(on_policy, pool_format, pool_column, strict) if on_policy is not None else None
    import_torch()
    from forgetcast.lm import answer_prompts, load, sample_texts

    language_model = load(model, **loading.arguments())
    if upstream is None:
        count = count or 1000
        with progress(resumable=False) as report:
            texts = sample_texts(
                language_model,
                count,
                max_new_tokens=max_new_tokens,
                temperature=1.0 if temperature is None else temperature,
                seed=seed,
                on_progress=counted(report, "writing", count),
            )
        texts.save(output)
        out.print(
            f"{len(texts)} texts written to {output}; next: use it as the pool of a sweep, see collect", markup=False
        )
        return
    with progress(resumable=False) as report:
        own = answer_prompts(
            language_model,
            upstream,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 0.0,
            right_only=right_only,
            most_likely=most_likely,
            keep_unfinished=keep_unfinished,
            seed=seed,
            on_progress=counted(report, "answering", len(upstream)),
        )
    own.pool.save(output)
    facts: dict[str, Any] = {
        "kept": len(own.pool),
        "of_prompts": own.asked,
        "without_prompt": len(upstream) - own.asked,
    }
    facts |= {name: getattr(own, name) for name in ("empty", "unfinished", "wrong", "unlikely")}
    show(facts | {"generated_tokens": own.tokens, "output": str(output)}, as_json, title="On-policy texts")
