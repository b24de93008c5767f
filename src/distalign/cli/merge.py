"""`distalign merge`: one model of a run's adapter and its base."""

from __future__ import annotations

import shlex
import shutil
from typing import Annotated

import typer

from distalign.cli import shared

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of llama.cpp.
CONVERTER = "convert_hf_to_gguf.py"


def merge(
    run: Annotated[
        str, typer.Argument(help="A run's folder (runs/NAME/train/METHOD), or an adapter's.", metavar="RUN")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder of the merged model; by default merged in RUN.", metavar="FOLDER")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of its weights: float32, bfloat16, float16; auto is that of the base's files.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
    check: Annotated[
        bool, typer.Option(help="Of an adapter trained on 4-bit weights: compare both models, which loads both.")
    ] = True,
) -> None:
    """Merge the adapter of a run into its base: a model in full precision, with tokenizer and card."""
    if dtype not in DTYPES:
        shared.refuse(f"--dtype {dtype}: take one of {', '.join(DTYPES)}")
    shared.quiet()
    from distalign.experiments.merge import agreement
    from distalign.experiments.merge import merge as run_merge

    merged = run_merge(run, out, dtype=dtype, overwrite=overwrite, check=check)
    if merged.kl is not None:
        print(f"trained on 4-bit weights: {agreement(merged)}")
    print(f"model: {merged.folder} ({merged.dtype})")
    if shutil.which(CONVERTER):
        place = shlex.quote(str(merged.folder))
        print(f"as GGUF: {CONVERTER} {place} --outfile {place}/model.gguf --outtype auto")
