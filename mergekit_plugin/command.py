"""The `mergekit-phlora` command: what `mergekit-yaml` does, and the adapter."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import click
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_plugin import register
from mergekit_plugin.merge import Merge
from mergekit_plugin.method import NAME, PHLORA
from mergekit_plugin.models import described
from mergekit_plugin.no_code import no_code, refuse_trust
from mergekit_plugin.recipe import mergekit_refuses, read_recipe, validated
from peft_posthoc.adapters.writer import check_target
from peft_posthoc.checkpoints.beside import files_of_text
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.cli.options import CHOICE, option
from peft_posthoc.cli.output import one_line_errors, quiet_hosts, show
from peft_posthoc.cli.ranks import RANK, Asked
from peft_posthoc.cli.refining import AND_REFINE, refining_if_asked
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import PosthocError, noting
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.prepare import prepare
from peft_posthoc.extraction.request import OPTIONS, Options, Request
from peft_posthoc.models.remote_code import no_prompts
from peft_posthoc.ranks.rules import Rank
from peft_posthoc.refinement.refined import Refined
from peft_posthoc.text import asked_on

logger = logging.getLogger(__name__)


class _Command(PrettyPrintHelp):  # type: ignore[misc]
    """Tells in one line what is wrong with an option, of mergekit's ones too, which `main` never sees."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with one_line_errors("mergekit-phlora", debug=False):
            try:
                made: click.Context = super().make_context(*args, **extra)
            except (ValueError, LookupError) as error:
                raise click.UsageError(f"One of the options has no value that mergekit takes: {error}.") from error
            return made

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors("mergekit-phlora", debug=False, option="-vv"):
            return super().invoke(ctx)


@click.command("mergekit-phlora", cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config_file", metavar="CONFIG", type=click.Path(exists=True, dir_okay=False))
@click.argument("out_path", metavar="OUT", type=click.Path())
@click.option("--adapter-out", metavar="DIR", help="Of the adapter.  [default: OUT/phlora; with --no-model, OUT]")
@click.option("--no-model", is_flag=True, help="Write the adapter alone: the merge is computed, but never stored.")
@click.option("--base", help="The model that the adapter is for.  [default: base_model of CONFIG]")
@click.option("--force", is_flag=True, help="Replace an adapter that is there; what else lies there stays.")
@RANK
@option("rank_pattern")
@option("dtype")
@option("form")
@option("min_energy")
@CHOICE
@option("serve_as")
@option("for_base")
@option("with_tokenizer")
@option(
    "vocab",
    default=None,
    show_default=False,
    help=f"{OPTIONS['vocab'].help}  [default: leave embeddings out]",
)
@AND_REFINE
@add_merge_options  # type: ignore[untyped-decorator]
def main(
    merge_options: MergeOptions,
    config_file: str,
    out_path: str,
    adapter_out: str | None,
    no_model: bool,
    base: str | None,
    force: bool,
    dtype: str | None,
    form: str,
    min_energy: float | None,
    rank: Asked,
    rank_pattern: dict[str, int],
    serve_as: str | None,
    for_base: str | None,
    vocab: str | None,
    with_tokenizer: bool,
    **choice: Any,
) -> None:
    """Run the merge that CONFIG describes into the folder OUT, and write the adapter that leads there from the base.

    `merge_method: phlora` has its ranks among the `parameters` in CONFIG; with any other method the options here say
    what the adapter carries, and --refine fits it to the merged model. A budget goes with either. All other options are
    mergekit-yaml's; --trust-remote-code is refused.
    """
    debug = merge_options.verbosity > 1
    with (
        one_line_errors("mergekit-phlora", debug=debug, option="-vv", nothing="There is no adapter."),
        no_prompts(),
        no_code(),
        contextlib.ExitStack() as done,
    ):
        refuse_trust(merge_options)
        refining = refining_if_asked(choice)
        if refining is not None and no_model:
            raise PosthocError("`--refine` fits to the merged model, which `--no-model` does not write.")
        target = Path(adapter_out or (out_path if no_model else Path(out_path) / NAME))
        if not no_model and target.resolve() == Path(out_path).resolve():
            raise PosthocError(
                f"`--adapter-out {adapter_out}` is the merged model's folder: transformers would load the adapter on "
                "top of the model that holds it already. Choose another folder."
            )
        if no_model and (with_tokenizer or vocab == "extend"):
            raise PosthocError(
                f"`{'--with-tokenizer' if with_tokenizer else '--vocab extend'}` makes an adapter for the merge's "
                "tokenizer, which `--no-model` does not write. Leave one of them out."
            )
        # Bad arguments are told before the work, not after it.
        check_target(target, force=force)
        pick_device(merge_options.device or "cpu")
        try:
            merge_options.apply_global_options()
        except RuntimeError as error:
            raise ValueError(f"An option of mergekit's has no value that PyTorch takes: {error}.") from error
        register()
        recipe = Path(config_file)
        source, read = read_recipe(recipe)
        config = validated(read, recipe)
        with mergekit_refuses(recipe):
            merge = Merge(config, merge_options, base=base, stored=not no_model, vocab=vocab)
            out_dtype = dtype_from_name(read.get("out_dtype"))
        if merge.by_phlora and refining is not None:
            raise PosthocError(
                f"With `merge_method: {NAME}` the merged model is base + adapter, and `--refine` has nothing to come "
                "near to. For the fine-tune itself use `phlora extract --refine`."
            )
        if merge.by_phlora:
            beyond = {name: choice.pop(name) for name in ("conv", "experts")}
            if not rank.shares_out():
                choice |= dict.fromkeys(rank.given(), True)
            _only_parameters({"rank_pattern": rank_pattern, **choice}, form)
            _as_merged({"serve-as": serve_as, "vocab": vocab, **beyond})
            choice = {"choose": merge.choose, "exact": merge.exact}
            rule: Rank | Mapping[str, Rank] = (rank.one() or 32) if rank.shares_out() else merge.ranks
        else:
            choice |= {"rank_pattern": rank_pattern, "serve_as": serve_as, "vocab": vocab or "error"}
            rule = rank.one() or 32
        _warn(merge, merge_options, no_model=no_model)
        asked: dict[str, Any] = {
            "leave_out": merge.leave_out,
            "form": form,
            "min_energy": min_energy,
            "for_base": for_base,
            "dtype": dtype or out_dtype or merge.dtype,
            "device": merge_options.device or "cpu",
            **choice,
        }
        request = Request.of(rule, **cast(Options, asked))
        progress = not merge_options.quiet
        model = noting(f"The merged model is in `{out_path}`, without an adapter.")
        if merge.by_phlora or no_model:
            if merge.by_phlora:  # What is carried is said in CONFIG.
                done.enter_context(asked_on("mergekit"))
            adapter = extract(merge.base, merge.result, request, progress=progress)
        if merge.by_phlora and not no_model:
            factors = {name: layer.lowrank for name, layer in adapter.layers.items()}
            with PHLORA.knowing(factors, but=merge.leave_out):
                _run(read, source, out_path, merge_options)
            done.enter_context(model)
        elif not no_model:
            result = merge.result
            prepare(merge.base, described(result.headers, result.label, result.config), request)
            _run(read, source, out_path, merge_options)
            done.enter_context(model)
            stored = Folder(Path(out_path), label=out_path)
            adapter = extract(merge.base, stored, request, progress=progress)
        if with_tokenizer:
            adapter = replace(adapter, beside=files_of_text(Folder(Path(out_path), label=out_path)))
        made: Adapter | Refined = adapter
        if refining is not None:
            quiet_hosts()
            device = merge_options.device or "cpu"
            # Nothing is kept to go on from: the next merge is another model.
            made = refining(adapter, merge.base, Path(out_path), device=device, progress=progress)
        made.save(target, force=force)
        done.close()
        with noting(f"The adapter is at `{target}`."):
            tables = [adapter.report.table(), *([made.table()] if isinstance(made, Refined) else [])]
            more = [f"Adapter written to {target}"]
            show(adapter.report, None, quiet=merge_options.quiet, table="\n\n".join(tables), more=more)


def _only_parameters(asked: Mapping[str, Any], form: str) -> None:
    if form == "peft":
        raise PosthocError(
            f"With `merge_method: {NAME}` the merged model is the base and factors, and so is its adapter: `--form "
            "peft` would hold more than the model. For the fine-tune itself use `phlora extract --form peft`."
        )
    given = sorted(name.replace("_", "-") for name, value in asked.items() if value)
    if given:
        raise PosthocError(
            f"With `merge_method: {NAME}`, `--{given[0]}` belongs among the `parameters` of CONFIG, where the merged "
            "model is told the same (rank 0 leaves a weight out)."
        )


def _as_merged(asked: Mapping[str, Any]) -> None:
    given = [name for name, value in asked.items() if value]
    if given:
        raise PosthocError(
            f"With `merge_method: {NAME}` the merged model holds the adapter's factors in its own layers, by its own "
            f"names, and takes no `--{given[0]}`. For the fine-tune itself use `phlora extract --{given[0]}`."
        )


def _warn(merge: Merge, options: MergeOptions, *, no_model: bool) -> None:
    if no_model and options.multi_gpu:
        logger.warning("--multi-gpu is not used with --no-model: the merge is computed on one device.")
    if not no_model and merge.narrow:
        logger.warning(
            "`dtype` is narrower than the files of %s: small changes are rounded away before they are merged. Give "
            "`dtype: float32`, and `out_dtype` for the type of the result.",
            " and ".join(f"`{label}`" for label in merge.narrow),
        )


def _run(config: Mapping[str, Any], source: str, out: str, options: MergeOptions) -> None:
    """Merge as `mergekit-yaml` does; and tell where the files and their config.json disagree about the type."""
    run_merge(MergeConfiguration.model_validate(config), out, options=options, config_source=source)
    told = json.loads((Path(out) / "config.json").read_text(encoding="utf-8"))
    wanted = told.get("dtype") or told.get("torch_dtype")
    headers = Folder(Path(out), label=out).headers.values()
    found = {str(header.dtype).removeprefix("torch.") for header in headers if header.dtype.is_floating_point}
    if wanted and found != {wanted}:
        logger.warning(
            "The files of `%s` hold %s, its config.json says %s, and transformers will cast to that. Give `dtype` or "
            "`out_dtype` in the configuration.",
            out,
            " and ".join(sorted(found)),
            wanted,
        )
