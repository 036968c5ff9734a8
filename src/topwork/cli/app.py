"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

import os
import sys
import warnings

import typer

from topwork.cli.advise import EPILOG as ADVISE_EPILOG
from topwork.cli.advise import advise
from topwork.cli.chat import EPILOG as CHAT_EPILOG
from topwork.cli.chat import chat
from topwork.cli.combine import EPILOG as COMBINE_EPILOG
from topwork.cli.combine import combine
from topwork.cli.compare import EPILOG as COMPARE_EPILOG
from topwork.cli.compare import compare
from topwork.cli.convert import EPILOG as CONVERT_EPILOG
from topwork.cli.convert import convert
from topwork.cli.count import EPILOG as COUNT_EPILOG
from topwork.cli.count import count
from topwork.cli.doctor import EPILOG as DOCTOR_EPILOG
from topwork.cli.doctor import doctor
from topwork.cli.evaluate import EPILOG as EVALUATE_EPILOG
from topwork.cli.evaluate import evaluate
from topwork.cli.export import EPILOG as EXPORT_EPILOG
from topwork.cli.export import export
from topwork.cli.home import AtHome
from topwork.cli.import_ import EPILOG as IMPORT_EPILOG
from topwork.cli.import_ import import_
from topwork.cli.init import EPILOG as INIT_EPILOG
from topwork.cli.init import init
from topwork.cli.lint import EPILOG as LINT_EPILOG
from topwork.cli.lint import lint
from topwork.cli.merge import EPILOG as MERGE_EPILOG
from topwork.cli.merge import merge
from topwork.cli.models import EPILOG as MODELS_EPILOG
from topwork.cli.models import models
from topwork.cli.plan import EPILOG as PLAN_EPILOG
from topwork.cli.plan import plan
from topwork.cli.push import EPILOG as PUSH_EPILOG
from topwork.cli.push import push
from topwork.cli.quantize import EPILOG as QUANTIZE_EPILOG
from topwork.cli.quantize import quantize
from topwork.cli.recipes import EPILOG as RECIPES_EPILOG
from topwork.cli.recipes import recipes
from topwork.cli.report import EPILOG as REPORT_EPILOG
from topwork.cli.report import report
from topwork.cli.serve import EPILOG as SERVE_EPILOG
from topwork.cli.serve import serve
from topwork.cli.serve_key import EPILOG as SERVE_KEY_EPILOG
from topwork.cli.serve_key import serve_key
from topwork.cli.sweep import EPILOG as SWEEP_EPILOG
from topwork.cli.sweep import sweep
from topwork.cli.train import EPILOG as TRAIN_EPILOG
from topwork.cli.train import train
from topwork.cli.version import version
from topwork.common.errors import TopworkError
from topwork.common.memory import memory_for
from topwork.common.os_errors import as_topwork, os_error_in
from topwork.common.streams import SureStreams
from topwork.common.threads import let_waiting_threads_sleep
from topwork.training.interrupts import Stopped, ending_on_signals

app = typer.Typer(
    name="topwork",
    cls=AtHome,
    help="One frozen base, many adapters, one pass: LoRA fine-tuning of open LLMs, from a recipe to an adapter in use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


ONLY_PRINT = ("lint", "chat", "count", "compare", "models", "plan", "doctor")
"""Commands that leave nothing behind: they end where nobody reads what they print. The others go on."""


def main() -> None:
    """The entry point: runs a command and turns Topwork's errors into one message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    let_waiting_threads_sleep()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    streams = SureStreams(ends=sys.argv[1:2] != [] and sys.argv[1] in ONLY_PRINT)
    sys.exit(streams.close(_ended()))


def _ended() -> int:
    """How the command ended, as an exit code."""
    try:
        memory = memory_for("running this command", "give more memory, or ask for less at once")
        with ending_on_signals(), memory:
            app()
    except Stopped as stopped:
        print(f"stopped by {stopped.name}; what was written before is whole", file=sys.stderr)
        return int(str(stopped.code))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except TopworkError as error:
        return _told(error)
    except Exception as error:  # a place that the operating system refuses; anything else is a fault of Topwork's
        found = os_error_in(error)
        if found is None:
            raise
        return _told(as_topwork(found))
    return 0


def _told(error: TopworkError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


app.callback()(version)

app.command(epilog=INIT_EPILOG)(init)

app.command(epilog=RECIPES_EPILOG)(recipes)

app.command(epilog=MODELS_EPILOG)(models)

app.command(epilog=TRAIN_EPILOG)(train)

app.command(epilog=SWEEP_EPILOG)(sweep)

app.command(epilog=LINT_EPILOG)(lint)

app.command(name="eval", epilog=EVALUATE_EPILOG)(evaluate)

app.command(epilog=CHAT_EPILOG)(chat)

app.command(epilog=REPORT_EPILOG)(report)

app.command(epilog=MERGE_EPILOG)(merge)

app.command(epilog=COMBINE_EPILOG)(combine)

app.command(epilog=COMPARE_EPILOG)(compare)

app.command(epilog=EXPORT_EPILOG)(export)

app.command(epilog=CONVERT_EPILOG)(convert)

app.command(name="import", epilog=IMPORT_EPILOG)(import_)

app.command(epilog=PUSH_EPILOG)(push)

app.command(epilog=QUANTIZE_EPILOG)(quantize)

app.command(epilog=COUNT_EPILOG)(count)

app.command(epilog=PLAN_EPILOG)(plan)

app.command(epilog=ADVISE_EPILOG)(advise)

app.command(epilog=DOCTOR_EPILOG)(doctor)

app.command(epilog=SERVE_EPILOG)(serve)

app.command(name="serve-key", epilog=SERVE_KEY_EPILOG)(serve_key)
