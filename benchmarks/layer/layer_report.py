"""From the rounds of ``layer.py`` to its JSON file and Markdown table."""

import argparse
from statistics import median, quantiles
from typing import Any

from benchmarks.common.results import save
from benchmarks.layer.layer_cases import SPARSE_SHARE, TOKENS_PER_IMAGE, Case

OTHERS = ("classic", "autoep", "naive")


def summarise(case: Case, num_ranks: int, times: dict[str, list[float]], errors: dict[str, float]) -> dict[str, Any]:
    """Quartiles per contender; ratios are medians over rounds of contender / ours *in the same round*."""
    timed = {}
    for name, rounds in times.items():
        q1, _, q3 = quantiles(rounds, n=4, method="inclusive")
        ratio = median(mine / ours for mine, ours in zip(rounds, times["ours"], strict=True))
        timed[name] = {"median_ms": median(rounds), "q1_ms": q1, "q3_ms": q3, "ratio_to_ours": ratio}
    best = min(OTHERS, key=lambda name: timed[name]["ratio_to_ours"])
    label = f"{case.shape.name}, {case.presence}, {case.routing}"
    cells = ", ".join(f"{name} {timed[name]['median_ms']:.2f} ms" for name in times)
    return {
        "case": label,
        "shape": vars(case.shape),
        "presence": case.presence,
        "routing": case.routing,
        "num_ranks": num_ranks,
        "tokens_per_rank": case.num_tokens,
        "rounds": len(times["ours"]),
        "contenders": timed,
        "relative_error": errors,
        "best_other": best,
        "best_other_ratio": timed[best]["ratio_to_ours"],
        "line": f"{num_ranks} rank(s), {label}: {cells}; best other {best} x{timed[best]['ratio_to_ours']:.2f}",
    }


def write_results(results: list[dict[str, Any]], setting: dict[str, Any], args: argparse.Namespace) -> None:
    cases = [{key: value for key, value in result.items() if key != "line"} for result in results]
    save(args.out, {"conditions": setting, "cases": cases}, markdown(results, setting, args))
    print(f"wrote {args.out}")


def markdown(results: list[dict[str, Any]], setting: dict[str, Any], args: argparse.Namespace) -> str:
    slower = [result for result in results if result["best_other_ratio"] < 1]
    verdict = f"Ours is the fastest in {len(results) - len(slower)} of {len(results)} cases."
    if slower:
        verdict += " It is slower than the best of the others in:\n\n" + "\n".join(
            f"- {result['case']}, {result['num_ranks']} rank(s): {result['best_other']} takes "
            f"{result['best_other_ratio']:.3f} of our time"
            for result in slower
        )
    sections = [
        "# One expert-parallel MoE layer: ours, DeepSpeed's two, a naive loop",
        verdict,
        "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in setting.items() if value != ""),
        METHOD.format(images=args.images, tokens=TOKENS_PER_IMAGE, share=f"{SPARSE_SHARE:.0%}"),
    ]
    for num_ranks in args.ranks:
        sections += [f"## {num_ranks} rank(s)", table([r for r in results if r["num_ranks"] == num_ranks])]
    return "\n\n".join(sections) + "\n"


METHOD = """\
Times are milliseconds of dispatch, experts and combine (router given, no shared expert): median over rounds
[quartiles] of the slowest rank; every contender runs once per round, in an order drawn anew. (xR) is the median over
rounds of contender / ours in the same round: above 1 ours is faster. Weights, tokens and routing are the same for all;
the outputs agreed before anything was timed (relative L2 at most 1e-4 in fp32, 2e-2 in bf16). Each rank brings {images}
images of {tokens} tokens ("full"), or {share} of those tokens with all their branches ("sparse"). "balanced": uniform
distinct experts; "skewed": half of the branches (k = 5: 40%, as a token has an expert only once) go to two experts,
both on the first rank.

- **classic**: `deepspeed.moe.layer.MoE`, `use_rts=False`, `top2_2nd_expert_sampling=False`, `min_capacity=0`,
  `drop_tokens=False`: in each call the capacity is the largest row count of any expert on any rank, the smallest that
  loses no token. Its gate is fed the logits that give our routing; what the gate takes (a softmax and top-k among it,
  which the others are not charged for) is the column *classic gate*.
- **autoep**: `AutoEPMoELayer` in its default configuration (grouped GEMM), its router replaced by the given routing.
- **naive**: all-gather of all tokens, loop over the rank's experts (nonzero, index_select, FFN, index_add),
  reduce-scatter. It sends P - 1 rows per token and leg, ours one for each other rank that has experts of the token.

*others' cores*: how many of the machine's cores worked for somebody else while the case was measured."""


def table(results: list[dict[str, Any]]) -> str:
    header = ("case", "tokens / rank", "ours", *OTHERS, "classic gate", "best other", "others' cores")
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for result in results:
        timed = result["contenders"]
        cells = [result["case"], str(result["tokens_per_rank"]), spread(timed["ours"])]
        cells += [f"{spread(timed[name])} (x{timed[name]['ratio_to_ours']:.2f})" for name in OTHERS]
        cells += [f"{timed['classic gate']['median_ms']:.2f}"]
        cells += [f"{result['best_other']} x{result['best_other_ratio']:.2f}", f"{result['cores_used_by_others']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(timed: dict[str, float]) -> str:
    return f"{timed['median_ms']:.2f} [{timed['q1_ms']:.2f}-{timed['q3_ms']:.2f}]"
