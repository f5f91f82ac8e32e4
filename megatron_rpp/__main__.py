"""The command line: `rpp`, or `python -m megatron_rpp`. Thin: it reads settings, finds out which rank it is, and hands over."""

from __future__ import annotations

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # before any other import: see search_path.py

import argparse
import contextlib
import difflib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from megatron_rpp import launch
from megatron_rpp.config.correction import describe
from megatron_rpp.config.geometry import num_ranks
from megatron_rpp.config.load import load_with_lines
from megatron_rpp.config.presets import PRESETS
from megatron_rpp.config.schema import Config
from megatron_rpp.config.validate import Checked, validate
from megatron_rpp.data.tokenizer_file import preview_tokenizer
from megatron_rpp.display import printable, printable_lines
from megatron_rpp.dist import leaving, watch
from megatron_rpp.dist.world import World
from megatron_rpp.errors import RppError
from megatron_rpp.files import refuse_unusable, storage_errors_named
from megatron_rpp.host import num_gpus
from megatron_rpp.search_path import add_working_directory, python_module
from megatron_rpp.signals import hold_warning, unwind_once
from megatron_rpp.version import __version__

_RUN_COMMANDS = {
    "train": "train a policy; goes on from the newest checkpoint in run.dir",
    "sft": "supervised warm-up on the rows of sft.train; writes the HF directory sft.out",
    "eval": "accuracy of model.hf on data.eval",
}

_ROLLOUT_DTYPES = {"model": "{0}, as the model", "fp8_block": "matrices in E4M3, blocks of 128 x 128; the rest in {0}"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code of the process. An error that a user can act on is one message, without a traceback."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not in UTF-8 cannot show every text
    arguments = list(sys.argv[1:] if argv is None else argv)
    add_working_directory()
    options = _parse(arguments)
    try:
        with storage_errors_named():
            return options.run(options, arguments)
    except RppError as error:
        print(f"rpp {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"rpp {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, e.g. `rpp check run.yaml | head`
        sys.stderr.close()
        return 141


def _open_closed_streams() -> None:
    """Lead standard streams that the caller has closed (`2>&-`) to /dev/null. A file of the run would get their numbers otherwise."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, f"__{name}__") is None:  # Python found it closed
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            if null > 2:
                os.close(null)
            stream = open(fd, "r" if fd == 0 else "w", closefd=False)  # noqa: SIM115 -- for the life of the process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="rpp", description="REINFORCE++ post-training on Megatron-Core and SGLang")
    parser.add_argument("--version", action="version", version=f"megatron_rpp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, help_text in _RUN_COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        _add_settings(command)
        command.add_argument("--report", type=Path, help=argparse.SUPPRESS)  # set by launch.py
        command.set_defaults(run=_run)
    check = commands.add_parser("check", help="read and check the settings, print what follows from them")
    _add_settings(check)
    check.set_defaults(run=_check)
    score = commands.add_parser("score", help="judge the responses in a file with a reward")
    score.set_defaults(run=_score)
    doctor = commands.add_parser("doctor", help="look at this host and its packages for what would stop a run")
    doctor.add_argument("--clean", action="store_true", help="remove what dead runs of this user have left in TMPDIR and /dev/shm")
    doctor.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    doctor.set_defaults(run=_doctor)

    given = next((argument for argument in arguments if not argument.startswith("-")), None)
    if given is not None and given not in commands.choices:
        close = difflib.get_close_matches(given, commands.choices, n=1)
        parser.error(
            f"unknown command {given!r}" + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(commands.choices)}")
        )
    if given == "score":
        from megatron_rpp.reward import score_file

        score_file.add_arguments(score)
    return parser.parse_args(arguments)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help="the YAML file with the settings")
    command.add_argument("overrides", nargs="*", metavar="section.name=value", help="settings that win over the file, e.g. optim.lr=1e-6")


def _load(options: argparse.Namespace, *, world_size: int | None = None) -> tuple[Config, Checked]:
    cfg, lines = load_with_lines(options.config, options.overrides)
    is_sft, is_eval, source = options.command == "sft", options.command == "eval", str(options.config)
    return cfg, validate(cfg, world_size=world_size, for_sft=is_sft, for_eval=is_eval, lines=lines, source=source)


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    """As one rank when a launcher started us or one rank is enough; else by starting all ranks on this host."""
    hold_warning()  # the loop asks for it once it can save; engines and workers inherit the peace
    world = World.from_env()
    cfg, checked = _load(options, world_size=None if world.launcher == "single" else world.size)
    refuse_unusable(cfg.run.dir, "run.dir")
    if world.rank == 0 and options.report is None:
        _print_warnings(checked.warnings)
    if world.launcher == "single" and num_ranks(cfg) > 1:
        command, log_dir = [*python_module("megatron_rpp"), *arguments], cfg.run.dir / "logs"
        return launch.run_ranks(command, num_ranks(cfg), log_dir=log_dir, is_cpu=_is_cpu(cfg), silence_s=cfg.run.deadline_s)
    _run_as_rank(options, cfg, world)


def _run_as_rank(options: argparse.Namespace, cfg: Config, world: World) -> NoReturn:
    """Does not return: a rank ends by `leaving.leave`, because an ordinary exit waits for threads that wait for dead peers."""
    unwind_once()
    if options.report is None:
        leaving.print_errors(world.rank, options.command)
    else:
        leaving.report_to(options.report)
    watch.start(world.rank, cfg.run.deadline_s, None if options.report is None else launch.beat_file(options.report))
    if _is_cpu(cfg):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: the patches and SGLang ask it whether there is a GPU
    code = 0
    try:
        with _own_log(options, cfg, world), storage_errors_named():
            _command(options.command)(cfg)
    except BaseException as error:  # noqa: BLE001 -- `tell` reports it, and there is nobody above who could
        code = leaving.tell(error)
    leaving.leave(code)


@contextlib.contextmanager
def _own_log(options: argparse.Namespace, cfg: Config, world: World) -> Iterator[None]:
    """Ranks other than 0 print into run.dir/logs; our own launcher has already seen to that."""
    if world.rank == 0 or options.report is not None:
        yield
        return
    from megatron_rpp.observe.rundir import RunDir, output_to

    with output_to(RunDir(cfg.run.dir).rank_log(world.rank)):
        yield


def _command(name: str) -> Callable[[Config], object]:
    """The function behind a command; imported here, so that `rpp check` and `--help` answer at once."""
    if name == "train":
        from megatron_rpp.train import train

        return train
    if name == "sft":
        from megatron_rpp.supervised import supervise

        return supervise
    from megatron_rpp.evaluate import evaluate_model

    return evaluate_model


def _is_cpu(cfg: Config) -> bool:
    """Whether the ranks will compute on the CPU, told without importing torch."""
    return cfg.run.device == "cpu" or (cfg.run.device == "auto" and num_gpus() == 0)


def _check(options: argparse.Namespace, arguments: list[str]) -> int:
    cfg, checked = _load(options)
    refuse_unusable(cfg.run.dir, "run.dir")
    tokenizer = preview_tokenizer(cfg)
    lines = [
        f"{options.config}: every setting holds",
        f"  {'model':30} {checked.hf.model_type}, {checked.hf.num_parameters:,} parameters, {cfg.model.dtype}",
        f"  {'roll-out':30} {_ROLLOUT_DTYPES[cfg.rollout.dtype].format(cfg.model.dtype)}",
        f"  {'stop tokens':30} {tokenizer.stop_tokens}",
        f"  {'correction':30} {describe(cfg.correction)}",
    ]
    if cfg.algo.estimator == "gae":
        lines.append(f"  {'gae lambda':30} {_lambdas(cfg)}")
    lines += [f"  {line}" for line in _preset_lines(cfg)]
    known = {name.replace("_", " "): value for name, value in asdict(checked.geometry).items() if value is not None}
    for name, value in known.items():
        lines.append(f"  {name:30} {' to '.join(map(str, value)) if isinstance(value, tuple) else value}")
    for line in lines:
        print(printable(line))
    _print_warnings((*checked.warnings, *tokenizer.warnings))
    return 0


def _lambdas(cfg: Config) -> str:
    """The policy's lambda and that of the critic's targets."""
    algo, critic = cfg.algo, cfg.critic.gae_lambda
    policy = str(algo.gae_lambda)
    if algo.gae_length_alpha is not None:
        policy = f"1 - 1 / ({algo.gae_length_alpha} * tokens of the response)"
    return f"policy {policy}, critic {algo.gae_lambda if critic is None else critic}"


def _preset_lines(cfg: Config) -> Iterator[str]:
    """What the preset says, and where something written lies over it."""
    named = [(section, name, value) for section, values in PRESETS.get(cfg.preset, {}).items() for name, value in values.items()]
    for section, name, value in named:
        found = getattr(getattr(cfg, section), name)
        over = "" if found == value else f", over the preset's {value}"
        yield f"{'preset ' + cfg.preset:30} {section}.{name}: {found}{over}"


def _print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(printable_lines(f"warning: {warning}", indent=4), file=sys.stderr)


def _score(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_rpp.reward import score_file

    return score_file.run(options)


def _doctor(options: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_rpp import doctor

    return doctor.main(as_json=options.json, clean=options.clean)


if __name__ == "__main__":
    sys.exit(main())
