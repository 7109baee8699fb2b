"""The command line: flags become a dataclass or keywords, and these one call."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import tyro

from resseq import classification, inspection, publication
from resseq.ablation.grid import AblateOptions
from resseq.card import BASELINES
from resseq.inspection import InspectOptions
from resseq.options import TrainOptions


def _train(options: TrainOptions) -> None:
    result = classification.train(**asdict(options))
    test, validation, baselines = result["test"], result["validation"], result["baselines"]
    score = "weighted_accuracy" if options.class_weights else "accuracy"
    beside = ", ".join(f"{name} {baselines[key]:.4f}" for key, name in BASELINES.items() if key in baselines)
    print(
        f"test accuracy {test['accuracy']:.4f}, macro-F1 {test['macro_f1']:.4f}, loss {test['loss']:.4f} "
        f"on {result['rows']['test']:,} {options.task}s\n"
        f"beside it: {beside}\n"
        f"weights of step {validation['step']:,} of {result['steps']:,}, chosen by validation "
        f"{score.replace('_', ' ')} {validation[score]:.4f}; {result['parameters']:,} parameters, "
        f"{result['seconds']:.0f} s\n"
        f"{_caveats(result, options)}"
        f"run folder {result['output_dir']}: learning_curve.png, confusion_matrix.png, README.md"
    )


def _caveats(result: dict[str, Any], options: TrainOptions) -> str:
    """A line on each thing that one should know before trusting the numbers."""
    lines = []
    if result["truncated"]:
        allowed = "--max-length and the checkpoint allow" if options.fine_tunes else f"{options.max_length} tokens"
        lines.append(f"{result['truncated']:.1%} of the training texts are longer than {allowed}, and cut there")
    if result["repeated"]:
        lines.append(f"{result['repeated']:,} of the test {options.task}s stand among those for training too")
    if options.warmup_steps and 3 * options.warmup_steps > result["steps"]:
        lines.append(
            f"a warm-up of {options.warmup_steps} steps is long for a training of {result['steps']:,}: "
            f"try --warmup-steps {result['steps'] // 10}, or a longer training"
        )
    return "".join(f"{line}\n" for line in lines)


def _by_class(classes: dict[str, dict[str, float]]) -> str:
    """A table for people to read."""
    width = max(map(len, ["class", *classes]))
    lines = [f"{'class':{width}}  precision  recall      F1    rows"]
    for name, row in classes.items():
        lines.append(f"{name:{width}}  {row['precision']:9.4f}{row['recall']:8.4f}{row['f1']:8.4f}{row['rows']:8,}")
    return "\n".join(lines)


def _ablate(options: AblateOptions) -> int:
    """The exit status: 1 where no cell could be trained."""
    from tqdm import tqdm

    from resseq.ablation.plan import plan
    from resseq.ablation.runner import ablate_with

    if options.dry_run:
        print(plan(options))
        return 0

    def tell(line: str) -> None:
        tqdm.write(line)  # above the bar
        sys.stdout.flush()

    found = ablate_with(options, tell)
    cells = sum(row["seconds"] or 0 for row in found.findings.rows)
    print(
        f"\n{found.table}\n\n{found.summary}\n\n"
        f"{found.findings.seconds:.0f} s in all; the cells alone, one after the other: {cells:.0f} s\n"
        f"folder {found.folder}: report.html, report.md, results.csv, accuracy.png, curves.png, gradients.png"
    )
    return int(all(row["status"] == "failed" for row in found.findings.rows))


def _inspect(options: InspectOptions) -> None:
    report = inspection.inspect_with(options)
    print(report.text, *report.verdict, f"pictures, tables and inspect.html: {options.folder}", sep="\n")


VERBS = {
    "train": TrainOptions,
    "evaluate": classification.evaluate,
    "predict": classification.predict,
    "ablate": AblateOptions,
    "inspect": InspectOptions,
    "export": publication.export,
    "push-to-hub": publication.push_to_hub,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="resseq",
            description="The residual toolkit for Transformers and sequence models.",
            args=arguments,
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        if isinstance(result, TrainOptions):
            _train(result)
        elif isinstance(result, AblateOptions):
            return _ablate(result)
        elif isinstance(result, InspectOptions):
            _inspect(result)
        elif isinstance(result, Iterator):  # of predictions
            for row in result:
                print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(json.dumps(result, indent=2, ensure_ascii=False), flush=True)
            if "classes" in result:
                print(_by_class(result["classes"]), file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stopped:
        if str(stopped):
            print(f"resseq: {stopped}", file=sys.stderr)
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        print(f"resseq: {error}", file=sys.stderr)
        return 1
    return 0
