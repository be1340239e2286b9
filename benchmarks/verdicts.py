# SPDX-License-Identifier: Apache-2.0
"""What the gate catches, what it names, and whether it ever cries wolf.

    python benchmarks/verdicts.py [--parts PART ...] [--families NAME ...]
                                  [--changes NAME ...] [--device cuda] [--table]

Four families of models with seeded random weights (families.py). `faults` plants every
kind of fault at places from a seeded generator and judges against a clean capture, at
L0, L1 and mix; `cross` does so against a golden of another numerics key; `benign`
changes something harmless and judges. Engines run in processes of their own, one at a
time; each part is saved when it is done, so that parts can be run one by one. On a GPU
only `benign` is run.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from families import FAMILIES, write_family

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OUTPUTS = {"cpu": RESULTS / "verdicts.json", "cuda": RESULTS / "verdicts-cuda.json"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "MSPROBE_ATTACH": "1",
}
PARTS = ("faults", "cross", "benign")
MIXTURES = ("Qwen2-MoE", "gpt-oss")
LEVELS = ("L0", "L1", "mix")
PLACES = 3
SEED = 20261126
SETS = 12
TOKENS = 2
# Sizes of the faults; those of a kind that are not named are its usual one.
SAME_SIZES = {"weight_row": (0.01, 0.25)}
# Larger ones: limits across keys are 40 to 50 times those for the same key.
CROSS_SIZES = {
    "scale": (0.3,),
    "element": (4.0,),
    "epsilon": (0.1,),
    "weight_row": (4.0,),
    "attention_scale": (1.0,),
    "rope_base": (9.0,),
    "precision": (0.5,),
    "argument": (0.3,),
    "result": (0.3,),
}
NO_AMX = ["_is_amx_tile_supported"]
NO_AVX512 = ["_is_avx512_supported", "_is_avx512_bf16_supported", *NO_AMX]
# Name: environment, what torch.cpu is made to deny.
AVX512_BF16 = ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, NO_AMX)
AVX2 = ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, NO_AVX512)
AVX512 = (
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    ["_is_avx512_bf16_supported", *NO_AMX],
)
PLAIN = ({}, [])
TWO_RANKS = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
# Name: environment and cap, engine arguments, whether prompts are handed over at once.
BENIGN = {
    "batch mates": (PLAIN, {"max_num_seqs": 4}, True),
    "chunked prefill": (
        PLAIN,
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 8},
        False,
    ),
    "custom_ops none": (PLAIN, {"compilation_config": {"custom_ops": ["none"]}}, False),
    "AVX512 without bf16": (AVX512, {}, False),
    "AVX2": (AVX2, {}, False),
    "TP=2": ((TWO_RANKS, []), {"tensor_parallel_size": 2}, False),
    "another engine": (PLAIN, {}, False),
    "TRITON_ATTN": (PLAIN, {"attention_backend": "TRITON_ATTN"}, False),
}
CPU_ONLY = {"AVX512 without bf16", "AVX2", "TP=2"}
GPU_ONLY = {"another engine", "TRITON_ATTN"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--changes", nargs="+", choices=BENIGN)
    parser.add_argument("--device", choices=OUTPUTS, default="cpu")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--table", action="store_true", help="print what is saved")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_cuda = arguments.device == "cuda"
    others = CPU_ONLY if is_cuda else GPU_ONLY
    arguments.changes = arguments.changes or [n for n in BENIGN if n not in others]
    arguments.save = arguments.save or OUTPUTS[arguments.device]
    if is_cuda:
        arguments.parts = ("benign",)
        ENVIRONMENT["VERDICTS_DEVICE"] = "cuda"
    return arguments


# In a process with an engine ------------------------------------------------------


def run_child(task):
    """Starts an engine and does what the task says."""
    import torch

    for name in task["cap"]:
        setattr(torch.cpu, name, lambda: False)

    from pytest_msprobe.config.debugger_config import DebuggerConfig
    from pytest_msprobe.engine.launch import (
        engine_arguments,
        start_engine,
        stop_engine,
    )
    from pytest_msprobe.engine.trial import Trial

    for run in task["runs"]:
        given = {"model": run["model"], "dtype": "bfloat16", "max_model_len": 128}
        if "VERDICTS_DEVICE" in os.environ:
            given["gpu_memory_utilization"] = 0.1
        llm = start_engine(engine_arguments({**given, **run["engine"]}, "benchmark"))
        try:
            folder = Path(task["folder"]) / run["name"]
            config = DebuggerConfig(level="L0", extra_info=False)
            trial = Trial(llm, config, (), folder / "captures", prompts_of(0)[:1])
            trial.tokens, trial.decode_steps = TOKENS, TOKENS - 1
            trial.is_batch = run["is_batch"]
            trial.generate()
            answer = CHILDREN[task["do"]](trial, run["name"], folder, task)
        finally:
            stop_engine(llm)
        (folder / "answer.json").write_text(json.dumps(answer))


def prompts_of(number):
    """Two prompts of the vocabulary."""
    generator = random.Random(f"{SEED} {number}")  # noqa: S311 - not for secrets
    sizes = (generator.randrange(17, 48), generator.randrange(17, 48))
    return [[0, *(generator.randrange(3, 320) for _ in range(n - 1))] for n in sizes]


def at_level(trial, level):
    """Has the trial record at a level."""
    from dataclasses import replace

    trial.config = replace(trial.config, level=level)


def record_goldens(trial, family, folder, task):
    """Captures at some levels; their files by level."""
    del family
    files = {}
    for level in task["levels"]:
        at_level(trial, level)
        (path,) = trial.record(folder / f"golden-{level}")
        files[level] = str(path)
    return files


def record_sets(trial, family, folder, task):
    """Captures of every set of prompts at L0; their files, by rank."""
    del family
    found = []
    for number in range(task["sets"]):
        trial.prompts = prompts_of(number)
        files = trial.record(folder / f"set{number}")
        found.append([str(path) for path in files])
    return found


def try_faults(trial, family, folder, task):
    """Plants every kind of fault at its places, at every level."""
    from pytest_msprobe.dump.capture import read_capture
    from pytest_msprobe.engine.plants import KINDS
    from pytest_msprobe.errors import MsprobeError

    del folder
    generator = random.Random(f"{SEED} {family}")  # noqa: S311 - likewise
    places = trial.places()
    plan, skipped = [], []
    for kind in KINDS.values():
        found = [place for place in places if place.kind == kind.name]
        generator.shuffle(found)
        for size in task["sizes"].get(kind.name, [kind.standard]):
            taken = 0
            for place in found:
                if taken == PLACES:
                    break
                try:
                    moved = trial.measure(place, size)
                except MsprobeError as error:
                    skipped.append([kind.name, place.called, str(error)])
                    continue
                if not moved:
                    skipped.append([kind.name, place.called, "changed nothing"])
                    continue
                taken += 1
                plan.append((place, size, moved))
            if not found:
                skipped.append([kind.name, "", "no place in this model"])
    at_level(trial, "mix")
    (golden,) = trial.capture()
    operators = operators_of(golden)
    files = task["goldens"].get(family, {})
    goldens = {level: read_capture(Path(path)) for level, path in files.items()}
    lines, clean = [], []
    for level in task["levels"]:
        at_level(trial, level)
        (first,) = trial.capture()
        golden = goldens.get(level, first)
        clean.append([level, *judged(trial, golden, trial.capture()[0])])
        for place, size, moved in plan:
            lines.append(try_one(trial, golden, place, size, moved))
            lines[-1] |= {"level": level}
            lines[-1]["is_right"] = is_right(place, lines[-1], operators)
        clean.append([level, *judged(trial, golden, trial.capture()[0])])
    return {
        "lines": lines,
        "clean": clean,
        "skipped": skipped,
        "header": facts_of(first),
        "golden": facts_of(golden),
    }


def facts_of(capture):
    """What made a capture."""
    return {"key": capture.header.key, **capture.header.provenance}


def judged(trial, golden, candidate):
    """Whether the verdict is green, rows judged, rows equal, what is off."""
    from pytest_msprobe.engine.trial import described

    verdict = trial.judge([golden], [candidate])
    what = described(verdict, 0.0, 0.0)
    text = f"{what.metric} in {what.call}: {what.observed} > {what.allowed}"
    reasons = "; ".join(verdict.reasons)
    is_named = bool(what.metric)
    return [
        verdict.is_green,
        verdict.judged,
        verdict.equal,
        verdict.mode,
        "" if verdict.is_green else f"{text if is_named else ''} {reasons}".strip(),
    ]


def try_one(trial, golden, place, size, moved):
    """One fault at one level."""
    from pytest_msprobe.engine.trial import described

    with trial.planted(place, size):
        (candidate,) = trial.capture()
    verdict = trial.judge([golden], [candidate])
    attempt = described(verdict, size, moved)
    finding = verdict.divergence.finding if verdict.divergence else None
    return {
        "fault": place.kind,
        "guilty": place.guilty,
        "called": place.called,
        "step": finding.row.step if finding else None,
        **attempt.as_json(),
    }


def operators_of(capture):
    """Operators of a capture at mix, in the order of execution.

    Returns:
        By step: each operator's name, and the paths of the modules around it.
    """
    from pytest_msprobe.compare.divergence import enclosing_calls
    from pytest_msprobe.model.names import parse_call_name

    by_step = defaultdict(list)
    for step, call in capture.calls():
        by_step[step].append(call)
    operators = defaultdict(list)
    for step, calls in by_step.items():
        parents = enclosing_calls(calls)
        paths = []
        for call in calls:
            name = parse_call_name(call.c)
            paths.append(name.module_path if name and name.is_module else None)
        for number, call in enumerate(calls):
            if paths[number] is not None:
                continue
            around, node = [], parents[number]
            while node >= 0:
                around.append(paths[node])
                node = parents[node]
            operators[step].append((call.c, around))
    return operators


def is_right(place, line, operators):
    """Whether the guilty module is named.

    At L1 nothing is recorded of modules: then an operator inside the module that was
    changed has to be named, or one of the next three behind it.
    """
    if not line["is_caught"]:
        return False
    if line["level"] != "L1":
        return line["named"] == place.guilty
    inside = [place.called in around for _, around in operators[line["step"]]]
    for number, (name, _) in enumerate(operators[line["step"]]):
        if name == line["call"]:
            before = [n for n in range(number + 1) if inside[n]]
            return bool(before) and number - before[-1] <= HANDED_ON
    return False


HANDED_ON = 3
CHILDREN = {"goldens": record_goldens, "sets": record_sets, "faults": try_faults}


# In the process that starts the others ---------------------------------------------


def ask_child(folder, do, runs, machine=PLAIN, **more):
    """What a process with engines answers, by run.

    Args:
        folder: Where it works.
        do: What it does, of CHILDREN.
        runs: Name: model, engine arguments, whether prompts are handed over at once.
        machine: Environment, and what torch.cpu is made to deny.
        more: Of the task.
    """
    variables, cap = machine
    task = {"do": do, "folder": str(folder), "cap": cap, "runs": [], **more}
    for name, (model, engine, is_batch) in runs.items():
        (folder / name).mkdir(parents=True)
        values = {"name": name, "model": str(model)}
        task["runs"].append({**values, "engine": engine, "is_batch": is_batch})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(task)],
        env={**os.environ, **ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr[-3000:]}")
    return {
        name: json.loads((folder / name / "answer.json").read_text()) for name in runs
    }


def plain_runs(models):
    """Runs with the default engine, by family."""
    return {family: (model, {}, False) for family, model in models.items()}


def faults(models, folder, _changes):
    """Every kind of fault against a clean capture of the same engine."""
    more = {"levels": LEVELS, "goldens": {}, "sizes": SAME_SIZES}
    return ask_child(folder / "faults", "faults", plain_runs(models), **more)


def cross(models, folder, _changes):
    """Larger faults on AVX2 against goldens of AVX512-bf16."""
    levels, runs = ["L0", "mix"], plain_runs(models)
    place = folder / "goldens"
    goldens = ask_child(place, "goldens", runs, AVX512_BF16, levels=levels)
    more = {"levels": levels, "goldens": goldens, "sizes": CROSS_SIZES}
    return ask_child(folder / "cross", "faults", runs, AVX2, **more)


def benign(models, folder, changes):
    """Harmless changes; one line a judgement."""
    groups = defaultdict(dict)  # a process for each kind of machine
    for family, model in models.items():
        # Of this machine as it is.
        groups[json.dumps(PLAIN)][f"{family}-base"] = (model, {}, False)
        for name in changes:
            machine, engine, is_batch = BENIGN[name]
            run = (model, engine, is_batch)
            groups[json.dumps(machine)][f"{family}-{name}"] = run
    found = {}
    for number, (machine, runs) in enumerate(groups.items()):
        place = folder / f"machine{number}"
        found |= ask_child(place, "sets", runs, json.loads(machine), sets=SETS)
    result = {}
    for family in models:
        lines = []
        for name in changes:
            sides = found[f"{family}-base"], found[f"{family}-{name}"]
            lines += [
                {"change": name, "set": number, **judge_sets(*pair)}
                for number, pair in enumerate(zip(*sides, strict=True))
            ]
            print_benign(family, lines, name)
        result[family] = {"lines": lines}
    return result


def judge_sets(old, new):
    """What the gate says of a capture; each side is a list of files, by rank."""
    from pytest_msprobe.compare.against import judge_against
    from pytest_msprobe.compare.judge import judge, measure_noise
    from pytest_msprobe.compare.ranks import combine_ranks, without_sharded
    from pytest_msprobe.dump.capture import read_capture
    from pytest_msprobe.model.verdict import portable

    goldens, candidates = ([read_capture(Path(p)) for p in side] for side in (old, new))
    golden, candidate = goldens[0], candidates[0]
    if len(candidates) > 1:
        combined = combine_ranks(goldens), combine_ranks(candidates)
        golden, candidate = without_sharded(*combined)
    made = golden.header.provenance, candidate.header.provenance
    is_alike = made[0].keys() == made[1].keys()
    is_alike &= made[0]["attention"] == made[1]["attention"]
    if is_alike and len(candidates) == 1:
        verdict = judge(golden, candidate).verdict
    else:  # other kernels, backends or ranks: A against B
        verdict = judge_against(golden, candidate)
    noise = measure_noise(golden, candidate, mode=verdict.mode)
    is_float = noise.pairs.candidate.has_sums(noise.pairs.new[noise.rows])
    return {
        "greatest": {
            metric: portable(errors[is_float].max(initial=0.0))
            for metric, errors in noise.errors.items()
        },
        "logprob": float(verdict.tokens.largest),
        "mode": verdict.mode,
        "is_green": verdict.is_green,
        "judged": verdict.judged,
        "equal": verdict.equal,
        "rerouted": verdict.rerouted,
        "key": verdict.key,
        "why": "" if verdict.is_green else alarm(verdict),
    }


def alarm(verdict):
    """Why a verdict is not green."""
    divergence = verdict.divergence
    text = "; ".join(verdict.reasons)
    if divergence is None or divergence.finding is None:
        return text
    finding = divergence.finding
    where = f"{finding.metric} {finding.observed} > {finding.allowed}"
    return f"{finding.row.text}: {where}; {verdict.failed} rows {text}"


def print_benign(family, lines, name):
    chosen = [line for line in lines if line["change"] == name]
    red = [line for line in chosen if not line["is_green"]]
    unequal = sum(line["equal"] < line["judged"] for line in chosen)
    print(
        f"  {family}, {name}: {len(chosen)} judged, {unequal} unequal, {len(red)} red"
    )
    for line in red[:2]:
        print(f"    {line['why']}")
    sys.stdout.flush()


def is_above(line):
    """Whether a fault is above the power."""
    return float(line["moved"]) >= line["power"]


def counts(lines):
    """Cells of a table: tried, above the power, caught, named right."""
    above = [line for line in lines if is_above(line)]
    caught = [line for line in above if line["is_caught"]]
    right = [line for line in caught if line["is_right"]]
    cells = [str(len(lines)), str(len(above))]
    for found, of in ((caught, above), (right, above)):
        share = f" ({100 * len(found) / len(of):.1f} %)" if of else ""
        cells.append(f"{len(found)}{share}")
    return " | ".join(cells)


def print_faults(found, part, powers):
    """Tables of planted faults, by family and level, and by kind.

    Args:
        found: What is saved.
        part: faults or cross.
        powers: What the power is, of models without and with experts.
    """
    by_family = {
        family: [
            {**line, "power": powers[family in MIXTURES]}
            for line in found["parts"].get(f"{part}/{family}", {}).get("lines", [])
        ]
        for family in FAMILIES
    }
    lines = [line for family in by_family.values() for line in family]
    columns = "planted | above the power | caught | named right"
    text = " and ".join(f"{power:g}" for power in dict.fromkeys(powers))
    print(f"\n{part}, power {text}\n\n| family | level | {columns} |")
    print("| --- " * 6 + "|")
    for family, own in by_family.items():
        for level in LEVELS:
            chosen = [line for line in own if line["level"] == level]
            if chosen:
                print(f"| {family} | {level} | {counts(chosen)} |")
    print(f"| all | | {counts(lines)} |")
    print(f"\n| fault | size | {columns} |")
    print("| --- " * 6 + "|")
    for fault, size in dict.fromkeys((n["fault"], n["size"]) for n in lines):
        chosen = [n for n in lines if (n["fault"], n["size"]) == (fault, size)]
        print(f"| `{fault}` | {size:g} | {counts(chosen)} |")
    for title, is_listed in (
        ("not caught", lambda n: is_above(n) and not n["is_caught"]),
        (
            "named elsewhere",
            lambda n: is_above(n) and n["is_caught"] and not n["is_right"],
        ),
    ):
        chosen = [
            f"- {family}, {line['level']}: {describe(line)}"
            for family, own in by_family.items()
            for line in own
            if is_listed(line)
        ]
        print(f"\n{title}: {len(chosen)}\n", *chosen, sep="\n")
    below = [n for n in lines if not is_above(n)]
    caught = sum(n["is_caught"] for n in below)
    print(f"\nbelow the power: {len(below)}, of them caught: {caught}")
    clean = [
        line
        for family in FAMILIES
        for line in found["parts"].get(f"{part}/{family}", {}).get("clean", [])
    ]
    red = [line for line in clean if not line[1]]
    lines = [f"- level {line[0]}: {line[5]}" for line in red]
    text = f"\nclean captures between them: {len(clean)}, red: {len(red)}\n"
    print(text, *lines, sep="\n")


def print_alarms(found):
    """The table of benign changes."""
    columns = "judged | bits differ | rerouted | red | rel_l2 | logprob"
    print(f"\n| change | families | {columns} |")
    print("| --- " * 8 + "|")
    total = Counter()
    dense = [family for family in FAMILIES if family not in MIXTURES]
    groups = {"dense": dense, "experts": MIXTURES}
    for name in BENIGN:
        for title, families in groups.items():
            chosen = [
                line
                for family in families
                for line in found["parts"].get(f"benign/{family}", {}).get("lines", [])
                if line["change"] == name
            ]
            if not chosen:
                continue
            unequal = sum(line["equal"] < line["judged"] for line in chosen)
            red = sum(not line["is_green"] for line in chosen)
            error = max(float(line["greatest"]["rel_l2"]) for line in chosen)
            logprob = max(line["logprob"] for line in chosen)
            moved = sum(bool(line.get("rerouted")) for line in chosen)
            numbers = f"{len(chosen)} | {unequal} | {moved} | {red}"
            print(f"| {name} | {title} | {numbers} | {error:.2g} | {logprob:.2g} |")
            key = "the same key" if chosen[0]["mode"] == "same" else "another key"
            total[title, key, "judged"] += len(chosen)
            total[title, key, "differ"] += unequal
            total[title, key, "red"] += red
    print()
    for title, key in dict.fromkeys((title, key) for title, key, _ in total):
        judged, differ, red = (
            total[title, key, n] for n in ("judged", "differ", "red")
        )
        text = f"{judged} judged, bits differ in {differ}, {red} red"
        print(f"- {title}, limits for {key}: {text}")


def table(found):
    """Prints what is saved."""
    same, cross = [found["power"]] * 2, [found["cross_power"]]
    cross.append(found.get("cross_power_mixture", cross[0]))
    for part, powers in (("faults", same), ("cross", cross)):
        if any(name.startswith(part) for name in found["parts"]):
            print_faults(found, part, powers)
    print_alarms(found)


def describe(line):
    """A fault and what was said of it."""
    text = (
        f"`{line['fault']}` {line['size']:g} in `{line['called']}` moved "
        f"{float(line['moved']):.2g}"
    )
    if not line["is_caught"]:
        return text
    return f"{text}, named `{line['named'] or line['call']}` ({line['divergence']})"


# What the tables do not need.
LEFT_OUT = ("step", "between", "observed", "allowed", "rule", "argument", "tokens")


def save(found, path):
    """Writes what was found, one judgement a line."""
    whole = {**found, "parts": {}}
    for name, result in found["parts"].items():
        # The lines of a table, for a diff that can be read.
        kept = [
            {k: v for k, v in n.items() if k not in LEFT_OUT} for n in result["lines"]
        ]
        lines = [f"@{json.dumps(line)}@" for line in kept]
        whole["parts"][name] = {**result, "lines": lines}
    text = json.dumps(whole, indent=1)
    text = re.sub(r'"@(.*)@"', lambda m: json.loads(f'"{m[1]}"'), text)
    path.write_text(text + "\n", encoding="utf-8")


def main():
    arguments = parse_arguments()
    if arguments.child:
        run_child(arguments.child)
        return
    from pytest_msprobe.compare.tolerance import default_limits
    from pytest_msprobe.engine.trial import POWER_MULTIPLE, stated_power

    found = {"parts": {}}
    if arguments.save.is_file():  # other parts and families are kept
        found = json.loads(arguments.save.read_text(encoding="utf-8"))
    if arguments.table:
        table(found)
        return
    limits = [
        default_limits("cross", "bfloat16", is_mixture=is_mixture)["rel_l2"]
        for is_mixture in (False, True)
    ]
    found |= {
        "what": "planted faults and benign changes: what the gate said",
        "python": platform.python_version(),
        "power": stated_power("bfloat16"),
        "cross_power": POWER_MULTIPLE * limits[0],
        "cross_power_mixture": POWER_MULTIPLE * limits[1],
    }
    for part in arguments.parts:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            models = {
                family: write_family(family, folder / f"model-{family}")
                for family in arguments.families
            }
            results = globals()[part](models, folder, arguments.changes)
            for family, result in results.items():
                result["date"] = time.strftime("%Y-%m-%d")
                name = f"{part}/{family}"
                if part == "benign":  # changes may be measured one by one
                    known = found["parts"].get(name, {}).get("lines", [])
                    others = [n for n in known if n["change"] not in arguments.changes]
                    result["lines"] = others + result["lines"]
                found["parts"][name] = result
        save(found, arguments.save)
        print(f"{part}: {time.monotonic() - began:.0f} s")
    table(found)


if __name__ == "__main__":
    main()
