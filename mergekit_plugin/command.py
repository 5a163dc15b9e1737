"""The `mergekit-phlora` command: what `mergekit-yaml` does, and the adapter."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

from mergekit_plugin import register
from mergekit_plugin.merge import Merge
from mergekit_plugin.method import NAME, PHLORA
from peft_posthoc.adapter import Adapter
from peft_posthoc.cli import CHOICE, DTYPE, RANK, dtype_of, one_line_errors, rule_of, show
from peft_posthoc.errors import PosthocError
from peft_posthoc.extract import extract
from peft_posthoc.folder import Folder
from peft_posthoc.peft_format import check_target

logger = logging.getLogger(__name__)


@click.command("mergekit-phlora", cls=PrettyPrintHelp, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("config_file", metavar="CONFIG", type=click.Path(exists=True, dir_okay=False))
@click.argument("out_path", metavar="OUT", type=click.Path())
@click.option("--adapter-out", metavar="DIR", help="Of the adapter.  [default: OUT/phlora; with --no-model, OUT]")
@click.option("--no-model", is_flag=True, help="Write the adapter alone: the merge is computed, but never stored.")
@click.option("--base", help="The model that the adapter is for.  [default: base_model of CONFIG]")
@click.option("--force", is_flag=True, help="Replace an adapter that is there.")
@RANK
@DTYPE
@CHOICE
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
    rank: int | None,
    energy: float | None,
    **choice: Any,
) -> None:
    """Run the merge that CONFIG describes into the folder OUT, and write the adapter that leads to it from its base.

    `merge_method: phlora` has its ranks among the `parameters` in CONFIG; with any other method the options here say
    what the adapter carries. All other options are mergekit-yaml's.
    """
    with one_line_errors("mergekit-phlora", debug=merge_options.verbosity > 1, option="-vv"):
        target = Path(adapter_out or (out_path if no_model else Path(out_path) / NAME))
        if not no_model and target.absolute() == Path(out_path).absolute():
            raise PosthocError(
                f"`--adapter-out {adapter_out}` is the merged model's folder: transformers would load the adapter on "
                "top of the model that holds it already. Choose another folder."
            )
        check_target(target, force=force)
        register()
        merge_options.apply_global_options()
        source = Path(config_file).read_text(encoding="utf-8")
        read: Mapping[str, Any] = yaml.safe_load(source)
        merge = Merge(MergeConfiguration.model_validate(read), merge_options, base=base)
        asked = {"rank": rank, "energy": energy, **choice}
        options = {
            "dtype": dtype_of(dtype),
            "device": merge_options.device or "cpu",
            "progress": not merge_options.quiet,
        }
        if no_model and merge_options.multi_gpu:
            logger.warning("--multi-gpu is not used with --no-model: the merge is computed on one device.")

        if merge.by_phlora:
            adapter = _by_phlora(merge, asked, options)
        elif no_model:
            adapter = extract(merge.base, merge.result, rule_of(rank, energy), **choice, **options)
        else:
            _run(read, source, out_path, merge_options)
            result = Folder(Path(out_path), label=out_path)
            adapter = extract(merge.base, result, rule_of(rank, energy), **choice, **options)
        adapter.save(target, force=force)
        if merge.by_phlora and not no_model:
            with PHLORA.knowing({name: layer.factors for name, layer in adapter.layers.items()}):
                _run(read, source, out_path, merge_options)
        show(adapter.report, None, quiet=merge_options.quiet, more=[f"Adapter written to {target}"])


def _run(config: Mapping[str, Any], source: str, out: str, options: MergeOptions) -> None:
    """What `mergekit-yaml` does; and tell where the files and their config.json disagree about the type."""
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


def _by_phlora(merge: Merge, asked: Mapping[str, Any], options: Mapping[str, Any]) -> Adapter:
    given = sorted(name for name, value in asked.items() if value)
    if given:
        raise PosthocError(
            f"With `merge_method: {NAME}`, `--{given[0]}` belongs among the `parameters` of CONFIG, where the merged "
            "model is told the same."
        )
    return extract(merge.base, merge.result, merge.ranks, choose=merge.choose, exact=merge.exact, **options)
