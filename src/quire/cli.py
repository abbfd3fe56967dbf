"""The command line: `quire generate`, `serve`, `chat`, `explain`, `bench`. Words become options (`options`), errors one line.

Loads no torch before a command needs it, and does not know how a command does its work.

Exit codes: 0 done, 1 done but some lines failed, 2 an error that the user can mend, 130 interrupted, 141 nobody reads on.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, get_type_hints

import quire.bench
from quire.config import EngineConfig
from quire.errors import ConfigError, QuireError
from quire.options import (
    Parser,
    add_engine_arguments,
    add_option,
    add_sampling_arguments,
    engine_config_from,
    parse_sampling_setting,
    sampling_options_from,
)
from quire.sampling_params import SamplingParams
from quire.server.options import CHOICES, ServerOptions
from quire.server.options import HELP as SERVER_HELP
from quire.version import __version__

if TYPE_CHECKING:
    from quire.engine.llm import LLM
    from quire.offline import Output

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


# -- quire generate ----------------------------------------------------------------------------------------------------------
def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a file of prompts",
        description="Answers each line of INPUT with a JSON line in OUTPUT, in the same order. If it is stopped, however "
        "rudely, the same command goes on where it was.",
    )
    parser.add_argument("input", nargs="?", default="-", metavar="INPUT", help="a file; - is stdin (default)")
    parser.add_argument("-o", "--output", default="-", help="a file; - is stdout (default)")
    parser.add_argument("--restart", action="store_true", help="overwrite OUTPUT instead of going on with it")
    parser.add_argument(
        "--input-format",
        choices=("text", "jsonl"),
        help='text: a prompt a line. jsonl: {"prompt": …}, {"prompt_token_ids": …} or {"messages": …} a line, with an "id" '
        'and sampling parameters ("max_tokens", "seed", …) if wanted (default: jsonl for a file named .jsonl, .ndjson or '
        ".json, or with --field; text otherwise)",
    )
    parser.add_argument("--field", help="key of the prompt's text in a JSON line, instead of prompt")
    parser.add_argument("--chat", action="store_true", help="send texts through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of each chat; implies --chat")
    parser.add_argument("--token-ids", action="store_true", help="tell the token ids of answers too")
    parser.add_argument("--json", metavar="FILE", help="write the summary as JSON; - is stdout, if OUTPUT is a file")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(run=_generate, parser=parser)


def _generate(args: argparse.Namespace) -> int:
    from quire import offline

    input_format = args.input_format
    if input_format is None:
        is_json = args.field is not None or Path(args.input).suffix in (".jsonl", ".ndjson", ".json")
        input_format = "jsonl" if is_json else "text"
    job = offline.Job(
        config=engine_config_from(args),
        sampling=sampling_options_from(args),
        input_format=input_format,
        text_field=args.field,
        chat=args.chat,
        system=args.system,
        with_token_ids=args.token_ids,
    )
    if args.json == "-" and args.output == "-":
        raise ConfigError("--json - and the answers cannot both go to stdout: name a file for one of them")
    if "-" not in (args.input, args.output) and _is_same_file(args.input, args.output):
        raise ConfigError(f"{args.input} is both input and output")

    def load() -> LLM:
        from quire.engine.llm import LLM

        return LLM.from_config(job.config)

    with _open_input(args.input) as lines, _open_output(args.output, restart=args.restart) as output:
        total = _count_lines(args.input) if sys.stderr.isatty() else None
        try:
            summary = offline.run(job, lines, output, load, total=total)
        except KeyboardInterrupt:
            how = "" if args.output == "-" else "; the same command goes on from there"
            print(f"stopped after {output.num_lines} lines{how}", file=sys.stderr)
            raise
    print(*summary.describe(), sep="\n", file=sys.stderr)
    if args.json is not None:
        text = json.dumps(summary.as_dict(), indent=2)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
    return FAILED if summary.num_failed else 0


def _open_input(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(name, "rb")
    except OSError as error:
        raise ConfigError(f"cannot open the input {name}: {error.strerror}") from error


def _open_output(name: str, *, restart: bool) -> Output:
    """What isn't a regular file (a pipe, /dev/null) is a stream as stdout is: there is nothing to go on with."""
    from quire.offline import Output, OutputFile

    if name == "-":
        return Output(os.fdopen(os.dup(sys.stdout.fileno()), "wb"), "stdout")
    if Path(name).exists() and not Path(name).is_file():
        try:
            return Output(open(name, "wb"), name)
        except OSError as error:
            raise ConfigError(f"cannot open the output {name}: {error.strerror}") from error
    return OutputFile(name, restart=restart)


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # one of them isn't there


def _count_lines(name: str) -> int | None:
    """None where counting would use the lines up."""
    if not Path(name).is_file():
        return None
    with open(name, "rb") as file:
        chunks = iter(lambda: file.read(1 << 20), b"")
        count, last = 0, b"\n"
        for chunk in chunks:
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


# -- quire serve -------------------------------------------------------------------------------------------------------------
def _add_serve(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP, as OpenAI's API does",
        description="Serves MODEL at http://HOST:PORT/v1 for the clients of OpenAI's API.",
    )
    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    group = parser.add_argument_group("server")
    types = get_type_hints(ServerOptions)
    for field in dataclasses.fields(ServerOptions):
        choices = CHOICES.get(field.name)
        default = None if field.default == () else field.default
        add_option(group, field.name, types[field.name], SERVER_HELP[field.name], default=default, choices=choices)
    group.add_argument(
        "--enable-auto-tool-choice",
        action="store_true",
        help="taken for vLLM's sake: tools are always the model's choice",
    )
    add_engine_arguments(parser, model_required=False)
    parser.set_defaults(run=_serve, parser=parser)


def _serve(args: argparse.Namespace) -> int:
    if args.api_key is None and (keys := os.environ.get("QUIRE_API_KEY")):
        args.api_key = [key.strip() for key in keys.split(",")]
    if args.api_keys_file is None:
        args.api_keys_file = os.environ.get("QUIRE_API_KEYS_FILE") or None
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(ServerOptions)}
    chosen = ServerOptions(**{name: value for name, value in options.items() if value is not None})
    config = engine_config_from(args, model=_model_to_serve(args))
    from quire.server.serve import run  # here, since the HTTP libraries take a while to load

    run(config, chosen)
    return 0


def _model_to_serve(args: argparse.Namespace) -> str:
    if args.served and args.model and args.served != args.model:
        raise ConfigError(f"two models: {args.served} and --model {args.model}")
    model: str | None = args.served or args.model
    if not model:
        from quire.pocket import model_directory

        return str(model_directory())
    return model


# -- quire chat --------------------------------------------------------------------------------------------------------------
def _add_chat(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation with MODEL, or with a server's. In a terminal, /help lists its commands; otherwise "
        "each line of stdin is a turn. Answers have no limit but the model's, unless --max-tokens gives one.",
    )
    parser.add_argument("served", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--url", help="talk with a server at http://HOST:PORT instead; MODEL is then one of its names")
    parser.add_argument("--api-key", metavar="KEY", help="for --url (default: the environment's QUIRE_API_KEY)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_arguments(parser)
    add_engine_arguments(parser, model_required=False)
    parser.set_defaults(run=_chat, parser=parser)


def _chat(args: argparse.Namespace) -> int:
    sampling = sampling_options_from(args)
    SamplingParams(**sampling)  # what is out of range is told before anything is loaded
    model = None if args.url and not (args.served or args.model) else _model_to_serve(args)
    config = engine_config_from(args, model=model or "the server's")
    if args.url and config != EngineConfig(model=config.model):
        names = [f.name for f in dataclasses.fields(config)[1:] if getattr(config, f.name) != f.default]
        raise ConfigError(f"with --url, {', '.join(names)} is the server's to choose")
    from quire.chat import Chat, Terminal
    from quire.chat_models import LocalModel, RemoteModel

    who = (
        RemoteModel(args.url, model, args.api_key or os.environ.get("QUIRE_API_KEY"))
        if args.url
        else LocalModel(config)
    )
    with contextlib.closing(who):
        return Chat(who, Terminal(), parse_sampling_setting, sampling, args.system).run()


# -- quire explain -----------------------------------------------------------------------------------------------------------
def _add_explain(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "explain",
        help="tell why a request took its time",
        description="Asks a server why a request took its time: one that runs, or one of the last 512 that did. REQUEST_ID is "
        "its answer's id, or the x-request-id of its response.",
    )
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="the one of the request (default: the environment's QUIRE_API_KEY)"
    )
    parser.add_argument("--json", action="store_true", help="the data, instead of sentences")
    parser.set_defaults(run=_explain, parser=parser)


def _explain(args: argparse.Namespace) -> int:
    from quire import explain

    found = explain.ask(args.url, args.request_id, args.api_key or os.environ.get("QUIRE_API_KEY"))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        explain.show(found)
    return 0


# -- quire bench -------------------------------------------------------------------------------------------------------------
def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "bench", help="measure something", description="Runs a benchmark; without NAME, lists them."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its options: see quire bench NAME --help")
    parser.set_defaults(run=_bench, parser=parser)


def _bench(args: argparse.Namespace) -> int:
    benches = find_benches()
    if args.name is None:
        width = max(map(len, benches), default=0)
        for name, text in benches.items():
            print(f"{name:{width}}  {text}")
        return 0
    args.name = args.name.replace("-", "_")
    if args.name not in benches:
        raise ConfigError(f"there is no benchmark {args.name}; there are: {', '.join(benches) or 'none'}")
    module = importlib.import_module(f"quire.bench.{args.name}")
    parser = Parser(prog=f"quire bench {args.name}", description=module.HELP)
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(args.arguments))
    return status


def find_benches() -> dict[str, str]:
    """Modules of quire.bench that say what they measure (`HELP: str`), without importing them: most would load torch."""
    found = {}
    for path in sorted(Path(quire.bench.__path__[0]).glob("*.py")):
        if (text := _help_of(path)) is not None:
            found[path.stem] = text
    return found


def _help_of(path: Path) -> str | None:
    """The literal that a module's source assigns to HELP."""
    for node in ast.parse(path.read_bytes()).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == "HELP" for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            return str(ast.literal_eval(node.value))
    return None


# -- the command -------------------------------------------------------------------------------------------------------------
def build_parser() -> Parser:
    """Of the whole command; a command's function is `run` of what it parses, None if none was named."""
    parser = Parser(prog="quire", description="Serves language models with a KV cache kept in blocks.")
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    _add_generate(commands)
    _add_serve(commands)
    _add_chat(commands)
    _add_explain(commands)
    _add_bench(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. `argv`: what follows the program's name."""
    argv = sys.argv[1:] if argv is None else argv
    show_traceback = "--debug" in argv or os.environ.get("QUIRE_DEBUG", "0") not in ("", "0")
    try:
        return _run(argv)
    except BrokenPipeError:
        # the interpreter flushes stdout once more when it ends, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        if show_traceback:
            raise
        return INTERRUPTED
    except QuireError as error:
        if show_traceback:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return USAGE


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help(sys.stderr)
        return USAGE
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("quire").setLevel(logging.INFO)
    status: int = args.run(args)
    sys.stdout.flush()  # a broken pipe shows here, where it is dealt with
    return status
