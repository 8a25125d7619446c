#!/usr/bin/env python3
"""Times `mmfp4 bench` and llama.cpp's llama-bench in turn, on random weights of GLM-4.7-Flash's shapes.

    tools/build_llama_bench.sh                      # once: llama-bench, and the Python environment below
    cargo build --release --features cli
    target/llama-bench/python/bin/python tools/bench_llama_cpp.py slice
    target/llama-bench/python/bin/python tools/bench_llama_cpp.py full --formats mxfp4,q4_k_m

Needs Linux, Python 3.11 and tools/requirements-bench.txt. `slice` is the dense and three sparse layers with the whole
vocabulary: 5 GB of disk, some minutes. `full` is all 47 layers: 35 GB of disk, 20 GB of memory, about an hour. Run
it on a machine that does nothing else.

What it does, for each format of llama.cpp's file (tools/glm_gguf.py says what they are):
- writes target/llama-bench/MODEL-FORMAT-1.gguf where it is not there yet; `mmfp4 bench` makes its own checkpoint
  under target/synthetic. CARGO_TARGET_DIR is honoured. Of `full` one file is on the disk at a time, and removed
  afterwards unless --keep.
- runs rounds of one process each; the order changes from round to round, so that a drift of the machine helps neither.
  The first round is shown and discarded, three follow (--rounds). Before each process the other program's file leaves
  the page cache, which holds only one of two full models, and its own is read once from end to end.
- takes the median of each process's repetitions, and the ratio of the medians of the rounds.
Both programs see as many processors as --threads says, and run each test once more before the repetitions that count.

Markdown goes to stdout, with every run; progress to stderr; --json FILE writes the same numbers and all repetitions.
A run is of little worth while other programs take processor time: the last column shows how much they took, of
all processors, during the whole process. GB/s of decoding is bytes of weights a token times tokens a second.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import glm_gguf  # noqa: E402

# Our name of each model.
SYNTHETIC = {"slice": "slice", "full": "glm-4.7-flash"}
OURS, THEIRS = "mmfp4", "llama.cpp"
# Other programs' share of the processors beyond which a run tells more of them than of what was timed.
QUIET = 0.03


class Failure(Exception):
    """Says what was expected, what was found, and what to do."""


@dataclass
class Run:
    """One test of one process. `samples` are tokens a second of its repetitions where the program tells them,
    `read_gb_s` the read bandwidth that ours measured in the same run, `foreign` other programs' share of all
    processors' time while the process ran."""

    format: str
    round: int
    discarded: bool
    program: str
    test: str
    tokens_per_s: float
    samples: list[float]
    gb_per_s: float | None
    read_gb_s: float | None
    noisy: bool
    foreign: float


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def parse_numbers(text: str) -> list[int]:
    return [parse_number(part) for part in text.split(",")]


def parse_formats(text: str) -> list[str]:
    formats = text.split(",")
    for name in formats:
        if name not in glm_gguf.FILE_TYPES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(glm_gguf.FILE_TYPES)}, found {name!r}")
    return formats


def parse_rounds(text: str) -> int:
    rounds = parse_number(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("the first round is discarded: expected 2 or more, and 4 for numbers to keep")
    return rounds


def parse(arguments: list[str] | None, target: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=glm_gguf.SHAPES)
    parser.add_argument("--formats", type=parse_formats, default=["mxfp4", "q4_k_m"], metavar="LIST",
                        help="of mxfp4, q4_k_m, mxfp4_moe (default: mxfp4,q4_k_m)")
    parser.add_argument("-p", dest="prompts", type=parse_numbers, default=[128, 512], metavar="LIST",
                        help="lengths of prompts (default: 128,512)")
    parser.add_argument("-n", dest="tokens", type=parse_number, default=64, help="tokens to decode (default: 64)")
    parser.add_argument("-r", dest="repetitions", type=parse_number, default=3,
                        help="repetitions a process (default: 3)")
    parser.add_argument("-t", "--threads", type=parse_number, default=2, help="default: 2")
    parser.add_argument("--rounds", type=parse_rounds, default=4,
                        help="processes of each program, the discarded first included (default: 4)")
    parser.add_argument("--mmfp4", type=Path, default=target / "release/mmfp4", metavar="FILE")
    parser.add_argument("--mmfp4-args", type=shlex.split, default=[], metavar="ARGS",
                        help="more arguments of ours, as in --mmfp4-args=--exact")
    parser.add_argument("--llama-bench", type=Path, default=target / "llama-bench/bin/llama-bench", metavar="FILE")
    parser.add_argument("--llama-bench-args", type=shlex.split, default=[], metavar="ARGS",
                        help="more arguments of llama-bench's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--keep", action="store_true", help="leave the full model's GGUF files on the disk")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="tell files, bytes and commands; run nothing")
    what.add_argument("--write-only", action="store_true", help="write the GGUF files, and run nothing")
    return parser.parse_args(arguments)


class Bench:
    """What one call of the program works with."""

    def __init__(self, options: argparse.Namespace, target: Path):
        self.options = options
        # Ours looks there for its checkpoint, and is to find it where this program does.
        self.environment = {**os.environ, "CARGO_TARGET_DIR": str(target)}
        self.shape = glm_gguf.SHAPES[options.model]
        self.folder = target / "llama-bench"
        self.checkpoint = target / "synthetic" / SYNTHETIC[options.model]

    def gguf(self, mixture: str) -> Path:
        return self.folder / f"{self.options.model}-{mixture}-{glm_gguf.GENERATION}.gguf"

    def command(self, program: str, mixture: str) -> list[str]:
        o = self.options
        prompts = ",".join(map(str, o.prompts))
        if program == OURS:
            return [str(o.mmfp4), "bench", "--synthetic", SYNTHETIC[o.model], "-p", prompts, "-n", str(o.tokens),
                    "-r", str(o.repetitions), "--json", *o.mmfp4_args]
        return [str(o.llama_bench), "-m", str(self.gguf(mixture)), "-t", str(o.threads), "-p", prompts,
                "-n", str(o.tokens), "-r", str(o.repetitions), "-o", "json", *o.llama_bench_args]

    def bytes_per_token(self, mixture: str) -> int:
        return glm_gguf.bytes_per_token(glm_gguf.tensors(self.shape, mixture))

    def write(self, mixture: str) -> None:
        """Makes llama.cpp's file where it is not there."""
        path = self.gguf(mixture)
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.options.model == "full" and not (self.options.keep or self.options.write_only):
            for other in glm_gguf.FILE_TYPES:
                self.gguf(other).unlink(missing_ok=True)
        needed = sum(t.nbytes for t in glm_gguf.tensors(self.shape, mixture))
        free = shutil.disk_usage(self.folder).free
        if free < needed + (1 << 30):
            raise Failure(f"{path} needs {needed / 1e9:.1f} GB and 1 GB to spare, {free / 1e9:.1f} GB are free: "
                          "make room, or choose another disk with CARGO_TARGET_DIR")
        shown = 0.0

        def progress(done, total):
            nonlocal shown
            if time.monotonic() > shown + 2 or done == total:
                shown = time.monotonic()
                say(f"writing {path.name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

        glm_gguf.write(path, self.shape, mixture, progress)

    def files(self, program: str, mixture: str) -> list[Path]:
        """What a process will read; empty before our first run has made the checkpoint."""
        if program == THEIRS:
            return [self.gguf(mixture)]
        return sorted(self.checkpoint.glob("*.safetensors"))

    def run_process(self, program: str, mixture: str, round_: int) -> list[Run]:
        other = OURS if program == THEIRS else THEIRS
        for path in self.files(other, mixture):
            forget(path)
        for path in self.files(program, mixture):
            read(path)
        if round_ > 1 and not self.files(program, mixture):
            raise Failure(f"expected the checkpoint that mmfp4 bench made in {self.checkpoint}, found none")
        command = self.command(program, mixture)
        say(f"round {round_}, {mixture}: {shlex.join(command)}")
        before = processor_times()
        # stderr is the program's progress, and goes where ours goes.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=self.environment, preexec_fn=self.pin)
        foreign = foreign_share(before, processor_times())
        if done.returncode != 0:
            raise Failure(f"expected numbers, found exit status {done.returncode} of: {shlex.join(command)}")
        try:
            rows = json.loads(done.stdout)
        except json.JSONDecodeError as error:
            raise Failure(f"expected a JSON array from {shlex.join(command)}, found {done.stdout[:200]!r}: {error}")
        runs = []
        for prompt, generated in [(p, 0) for p in self.options.prompts] + [(0, self.options.tokens)]:
            numbers = (our_numbers if program == OURS else their_numbers)(rows, prompt, generated)
            rate = numbers["tokens_per_s"]
            # Ours tells its own bytes; theirs are counted from the shapes.
            bytes_ = numbers.pop("bytes_per_token") or self.bytes_per_token(mixture)
            run = Run(
                format=mixture, round=round_, discarded=round_ == 1, program=program,
                test=f"pp{prompt}" if prompt else f"tg{generated}", foreign=foreign,
                gb_per_s=bytes_ * rate / 1e9 if generated else None, **numbers,
            )
            say(f"  {run.test}: {rate:.2f} tok/s, foreign load {foreign:.1%}")
            runs.append(run)
        return runs

    def pin(self) -> None:
        """Runs in the child: as many processors as threads were asked for, so that both programs have the same."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: self.options.threads])

    def run(self) -> list[Run]:
        runs = []
        for mixture in self.options.formats:
            self.write(mixture)
            for round_ in range(1, self.options.rounds + 1):
                order = [OURS, THEIRS] if round_ % 2 else [THEIRS, OURS]
                for program in order:
                    runs += self.run_process(program, mixture, round_)
            if self.options.model == "full" and not self.options.keep:
                self.gguf(mixture).unlink()
        return runs


def read(path: Path) -> None:
    """Reads a file from end to end, so that it is in the page cache as far as memory goes."""
    buffer = bytearray(16 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(path: Path) -> None:
    """Lets the page cache drop a file."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def processor_times() -> tuple[float, float, float]:
    """Seconds: by the clock, of all processors' work, and of our finished children's and our own work."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    return time.monotonic(), busy, sum(u.ru_utime + u.ru_stime for u in used)


def foreign_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """Share of all processors' time that other programs took between two results of processor_times."""
    clock, busy, own = (b - a for a, b in zip(before, after))
    return max(0.0, busy - own) / (max(clock, 0.01) * (os.cpu_count() or 1))


def only(rows: list[dict], what: str) -> dict:
    if len(rows) != 1:
        raise Failure(f"expected one row of {what}, found {len(rows)}: {json.dumps(rows)[:500]}")
    return rows[0]


def our_numbers(rows: list[dict], prompt: int, generated: int) -> dict:
    """Run's fields of `mmfp4 bench --json`. Rows of latencies have other names than pp and tg."""
    kind = "pp" if prompt else "tg"
    row = only([
        r for r in rows
        if r["test"] == kind and r["depth"] == 0
        and (r["prompt_tokens"], r["generated_tokens"]) == (prompt, generated)
    ], f"{kind}, {prompt} prompt and {generated} generated tokens, in the output of mmfp4 bench")
    return {
        "tokens_per_s": row["tokens_per_s"],
        "samples": [(prompt or generated) * 1000 / ms for ms in row["samples_ms"]],
        "bytes_per_token": row["bytes_per_token"],
        "read_gb_s": row["read_bandwidth_gb_s"],
        "noisy": row["noisy"],
    }


def their_numbers(rows: list[dict], prompt: int, generated: int) -> dict:
    """Run's fields of `llama-bench -o json`."""
    row = only([r for r in rows if (r["n_prompt"], r["n_gen"], r["n_depth"]) == (prompt, generated, 0)],
               f"{prompt} prompt and {generated} generated tokens in the output of llama-bench")
    samples = row["samples_ts"]
    return {
        "tokens_per_s": statistics.median(samples),
        "samples": samples,
        "bytes_per_token": None,
        "read_gb_s": None,
        "noisy": False,
    }


def ratios(runs: list[Run]) -> list[dict]:
    """For each format and test the medians over kept rounds, their ratio, and the ratios of single rounds."""
    result = []
    for mixture, test in dict.fromkeys((r.format, r.test) for r in runs):
        kept = {
            program: {r.round: r for r in runs
                      if (r.format, r.test, r.program) == (mixture, test, program) and not r.discarded}
            for program in (OURS, THEIRS)
        }
        ours, theirs = (statistics.median(r.tokens_per_s for r in kept[p].values()) for p in (OURS, THEIRS))
        single = [kept[OURS][i].tokens_per_s / kept[THEIRS][i].tokens_per_s for i in sorted(kept[OURS])]
        shares = [r.gb_per_s / r.read_gb_s for r in kept[OURS].values() if r.gb_per_s and r.read_gb_s]
        result.append({
            "format": mixture, "test": test, "mmfp4_tokens_per_s": ours, "llama_cpp_tokens_per_s": theirs,
            "ratio": ours / theirs, "lowest_ratio": min(single), "highest_ratio": max(single),
            "mmfp4_share_of_bandwidth": statistics.median(shares) if shares else None,
        })
    return result


def output_of(*command: str) -> str:
    """A program's first line, "unknown" where there is none."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    except OSError:
        lines = []
    return lines[0].strip() if lines else "unknown"


def circumstances(bench: Bench) -> dict:
    """Date, machine and versions."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    built = bench.options.llama_bench.with_name("VERSION")
    commit = output_of("git", "describe", "--always", "--dirty")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model}, {os.cpu_count()} processors, {memory / 2**30:.0f} GiB, "
                   f"{platform.system()} {platform.release()}; {bench.options.threads} threads",
        "mmfp4": f"{output_of(str(bench.options.mmfp4), '--version')}, commit {commit}",
        "llama.cpp": built.read_text().strip() if built.exists() else "unknown",
        "python": f"Python {platform.python_version()}, gguf {version('gguf')}, numpy {version('numpy')}",
    }


def version(package: str) -> str:
    from importlib.metadata import version as installed

    return installed(package)


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(bench: Bench, about: dict, runs: list[Run]) -> str:
    o = bench.options
    lines = [f"## `{o.model}`: mmfp4 and llama.cpp in turn", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    for mixture in o.formats:
        lines.append(f"- {mixture}: {bench.bytes_per_token(mixture) / 1e9:.3f} GB of weights a decoded token")
    lines += ["", "```sh"]
    lines += [shlex.join(bench.command(OURS, ""))]
    lines += [shlex.join(bench.command(THEIRS, mixture)) for mixture in o.formats]
    lines += ["```", ""]
    lines += [
        f"Tokens a second, medians of rounds 2 to {o.rounds}; the ratio of these, and the ratios of single rounds.", "",
        "| llama.cpp's format | test | mmfp4 | llama.cpp | ratio | rounds | mmfp4, share of bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in ratios(runs):
        share = r["mmfp4_share_of_bandwidth"]
        lines.append(
            f"| {r['format']} | {r['test']} | {r['mmfp4_tokens_per_s']:.1f} | {r['llama_cpp_tokens_per_s']:.1f} "
            f"| **{r['ratio']:.2f}** | {r['lowest_ratio']:.2f} to {r['highest_ratio']:.2f} "
            f"| {'' if share is None else f'{share:.0%}'} |"
        )
    kept = [r for r in runs if not r.discarded]
    void = [r for r in kept if r.noisy or r.foreign > QUIET]
    if void:
        lines += ["", f"**To be repeated**: in {len(void)} of {len(kept)} runs other programs took more than "
                  f"{QUIET:.0%} of the processors, or the read bandwidth was noisy."]
    lines += [
        "", "Every run, in order:", "",
        "| format | round | program | test | tok/s | repetitions | GB/s | read GB/s | other programs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        lines.append(
            f"| {r.format} | {r.round}{', discarded' if r.discarded else ''} | {r.program} | {r.test} "
            f"| {r.tokens_per_s:.1f} | {', '.join(number(s) for s in r.samples)} | {number(r.gb_per_s)} "
            f"| {number(r.read_gb_s)}{', noisy' if r.noisy else ''} | {r.foreign:.1%} |"
        )
    return "\n".join(lines)


def write_json(path: Path, bench: Bench, about: dict, runs: list[Run]) -> None:
    o = bench.options
    document = {
        **about,
        "model": o.model,
        "threads": o.threads,
        "bytes_per_token": {mixture: bench.bytes_per_token(mixture) for mixture in o.formats},
        "commands": [bench.command(OURS, "")] + [bench.command(THEIRS, mixture) for mixture in o.formats],
        "ratios": ratios(runs),
        "runs": [asdict(run) for run in runs],
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    aside.rename(path)


def plan(bench: Bench) -> str:
    """What would be done."""
    lines = []
    for mixture in bench.options.formats:
        all_tensors = glm_gguf.tensors(bench.shape, mixture)
        size = sum(t.nbytes for t in all_tensors)
        path = bench.gguf(mixture)
        kinds = {}
        for t in all_tensors:
            kinds[t.kind.name] = kinds.get(t.kind.name, 0) + t.nbytes
        lines += [
            f"{path}: {'there' if path.exists() else 'to be written'}, {size / 1e9:.2f} GB "
            f"({', '.join(f'{kind} {share / 1e9:.2f}' for kind, share in kinds.items())}), "
            f"{bench.bytes_per_token(mixture) / 1e9:.3f} GB a decoded token",
            f"{bench.options.rounds} times each:",
            f"  {shlex.join(bench.command(OURS, mixture))}",
            f"  {shlex.join(bench.command(THEIRS, mixture))}",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).absolute()
    options = parse(arguments, target)
    bench = Bench(options, target)
    if options.dry_run:
        print(plan(bench))
        return
    if options.write_only:
        for mixture in options.formats:
            bench.write(mixture)
        return
    for program, build in (
        (options.mmfp4, "cargo build --release --features cli"),
        (options.llama_bench, "tools/build_llama_bench.sh"),
    ):
        if not os.access(program, os.X_OK):
            raise Failure(f"expected a program at {program}, found none: {build}")
    if options.threads > len(os.sched_getaffinity(0)):
        raise Failure(f"--threads {options.threads}, but there are {len(os.sched_getaffinity(0))} processors to use")
    about = circumstances(bench)
    runs = bench.run()
    if options.json:
        write_json(options.json, bench, about, runs)
    print(markdown(bench, about, runs))


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"error: {failure}")
