"""How the results of `benchmarks.yardstick` are shown: a page for each setting, a leaderboard, the README's table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.paper_page import table

Report = dict[str, Any]
LDS_KINDS = ("held out", "training", "generated")
SANITY = "sanity"
FITTED = ", dampings fitted to every second subset, judged by the others"
MARKERS = "<!-- yardstick -->\n", "<!-- /yardstick -->\n"


def setting_page(report: Report) -> str:
    """Everything that was found on one setting, as Markdown."""
    said = "; ".join(f"`{name}`: {sentence}" for name, sentence in report["truths"].items())
    text = [
        f"# The yardstick: {report['setting']}",
        f"`{report['command']}`, {report['date']}, {machines([report])}. Written by that command.",
        f"{report['samples']} training images. {said}. Brackets: 95 % intervals, of LDS over queries and subsets, "
        "of the rest over queries. Pairs and bytes: of a training sample; seconds: CPU time from images and weights to "
        "the scores of all queries.",
    ]
    several = len({row["machine"] for row in report["rows"]}) > 1
    for name in report["truths"]:
        for squared, title in ((False, name), (True, f"{name}, squares")):
            lines = [
                line | ({"machine": row["machine"].split(",")[0]} if several else {})
                for row in report["rows"]
                if bool(row["form"]) == squared
                for line in _figures(row, name)
            ]
            if lines:
                text += [f"## {title}", table([ceilings(report, name), *ranked(lines)])]
    compared = [{**head(row), **row["ahead"]} for row in report["rows"] if row.get("ahead") and row["group"] != SANITY]
    if compared:
        text += [
            "## How far the recipe is ahead",
            f"LDS of {report['recipe']} under common noise minus that of the row; of its signed squares, where the row "
            "is of squares; where half of the subsets judge, of the first row that they do. Intervals are of the "
            "differences.",
            table(compared),
        ]
    return "\n\n".join(text) + "\n"


def machines(reports: list[Report]) -> str:
    """Those that rows were computed on."""
    return " and ".join(dict.fromkeys(row["machine"] for report in reports for row in report["rows"]))


def head(row: dict[str, Any]) -> dict[str, Any]:
    """What a row is called."""
    return {"method": ", ".join(filter(None, (row["method"], row["form"]))), "noise": row["noise"]}


def _figures(row: dict[str, Any], truth: str) -> list[dict[str, Any]]:
    """One line of a truth's table, or none."""
    found = {column(one): one["value"] for one in row["figures"].get(truth, [])}
    half = " (judged by half of the subsets)" if row["half"] else ""
    cost = {"pairs": row["pairs"], "bytes": row["bytes"], "seconds": row["seconds"]}
    return [{"method": row["method"] + half, "noise": row["noise"], **found, **cost}] if found else []


def column(figure: dict[str, Any]) -> str:
    """Metric and kind of query."""
    return f"{figure['metric']}, {figure['queries']}"


def ceilings(report: Report, truth: str) -> dict[str, Any]:
    """A line with what can be reached."""
    row = next(row for row in report["rows"] if row["figures"].get(truth) and not row["half"])
    found = {column(one): ceiling(one) for one in row["figures"][truth]}
    return {"method": "*ceiling*", "noise": "", **found, "pairs": "", "bytes": "", "seconds": ""}


def ceiling(figure: dict[str, Any]) -> Any:
    """What a figure can reach; of LDS it is not known without further seeds."""
    return figure["ceiling"] or ("-" if figure["metric"] == "LDS" else 1.0)


def ranked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By falling "in top 10", or else by the first metric."""
    metrics = [name for name in lines[0] if name not in ("method", "noise")]
    key = next((name for name in metrics if name.startswith("in top 10")), metrics[0])
    return sorted(lines, key=lambda line: -line[key]["value"] if isinstance(line.get(key), dict) else 1)


def lds_of(report: Report, row: dict[str, Any]) -> dict[str, Any]:
    """{kind: figure} of a row's LDS."""
    return {one["queries"]: one for one in row["figures"].get(f"{report['setting']}-lds", []) if one["metric"] == "LDS"}


def leaderboard(reports: list[Report], removals: list[Report]) -> str:
    """The page that compares settings, and what removing top samples did."""
    text = [INTRODUCTION.format(date=max(report["date"] for report in reports), machine=machines(reports))]
    text += ["## What to use when", WHEN, table([line for report in reports for line in advice(report)])]
    text += ["## Baselines, and what must fall", *filter(None, map(baselines, reports))]
    text += [SANE, table([line for report in reports for line in falls(report)])]
    for report in removals:
        text += [f"## Removal: {report['setting']}", REMOVED.format(**report), table(list(removed(report)))]
    for report in reports:
        name = report["setting"]
        text += [
            f"## {name}",
            f"Everything, with the other truths: [{name}](../benchmarks/results/yardstick-{name}.md).",
        ]
        for half in (False, True):
            for squared in (False, True):
                lines = [
                    {
                        **head(row),
                        "group": row["group"],
                        **{f"LDS, {k}": f["value"] for k, f in lds_of(report, row).items()},
                    }
                    | {"bytes": row["bytes"], "seconds": row["seconds"]}
                    for row in report["rows"]
                    if (bool(row["form"]), row["half"]) == (squared, half) and lds_of(report, row)
                ]
                if lines:
                    text.append("### " + ("Squares" if squared else "Scores as they are") + FITTED * half)
                    text.append(table([*top(report, half), *sorted(lines, key=by_held_out)]))
        for truth, sentence in report["truths"].items():
            tables = list(other_tables(report, truth))
            if tables:
                text += [f"### {truth}", f"{sentence.capitalize()}. Scores as they are.", *tables]
    return "\n\n".join(text) + "\n"


def other_tables(report: Report, truth: str) -> Iterator[str]:
    """Of a truth that is no LDS: of groups a table of each metric, else one of all, or of the first of each kind."""
    rows = [row for row in report["rows"] if row["figures"].get(truth) and not row["form"]]
    figures = [one for one in (rows[0]["figures"][truth] if rows else []) if one["metric"] != "LDS"]
    metrics = list(dict.fromkeys(one["metric"] for one in figures))
    parts = [metrics[:1] if len({one["queries"] for one in figures}) > 1 else metrics] if metrics else []
    for shown in [[metric] for metric in metrics] if truth.endswith("-groups") else parts:
        lines = [
            {**head(row), **found, "bytes": row["bytes"], "seconds": row["seconds"]}
            for row in rows
            if (found := {column(one): one["value"] for one in row["figures"][truth] if one["metric"] in shown})
        ]
        top = {column(one): ceiling(one) for one in figures if one["metric"] in shown}
        yield table([{"method": "*ceiling*", "noise": "", **top, "bytes": "", "seconds": ""}, *ranked(lines)])


def removed(report: Report) -> Iterator[dict[str, Any]]:
    """What the loss and the image of a query did without a method's top samples, a line for each method."""
    for method, line in report["lines"].items():
        parts = ("", ", beyond random", ", beyond others")
        yield {"method": method, "queries": line["queries"]} | {
            f"{what}{part}": line[f"{what}{part}"] for what in ("loss", "image") for part in parts
        }
    most = max(report["lines"].values(), key=lambda line: line["queries"])
    at_random = {what: most[f"{what} at random"] for what in ("loss", "image")}
    yield {"method": "as many random samples", "queries": most["queries"], **at_random}


def top(report: Report, half: bool) -> list[dict[str, Any]]:
    """The line of ceilings; none for half of the subsets, whose ceiling is the same."""
    found = {f"LDS, {kind}": ceiling(figure) for kind, figure in lds_of(report, report["rows"][0]).items()}
    return [] if half else [{"method": "*ceiling*", "noise": "", "group": "", **found, "bytes": "", "seconds": ""}]


def by_held_out(line: dict[str, Any]) -> float:
    """For sorting by falling LDS."""
    figure = line.get("LDS, held out")
    return -figure["value"] if figure else 1.0


def advice(report: Report) -> list[dict[str, Any]]:
    """Which rows the recipe, or the first of its kind, is not clear of: a line for each kind of scores and queries."""
    lines = []
    for half in (False, True):
        for squared in (False, True):
            same = [row for row in report["rows"] if (bool(row["form"]), row["half"]) == (squared, half)]
            leader = next((row for row in same if "ahead" not in row and row["group"] == "ours"), None)
            if leader is None:
                continue
            for kind, figure in lds_of(report, leader).items():
                rivals = [row for row in same if row["group"] != SANITY and kind in row.get("ahead", {})]
                better = [named(row) for row in rivals if row["ahead"][kind]["high"] < 0]
                level = [named(row) for row in rivals if row["ahead"][kind]["low"] <= 0 <= row["ahead"][kind]["high"]]
                lines.append(
                    {
                        "setting": report["setting"],
                        "scores": ("signed squares" if squared else "as they are") + ", dampings fitted" * half,
                        "queries": kind,
                        "of": str(leader["method"]).removesuffix(", damping fitted"),
                        "LDS": figure["value"],
                        "clearly better": "; ".join(better) or "none",
                        "not clearly worse": "; ".join(level) or "none",
                    }
                )
    return lines


def baselines(report: Report) -> str:
    """How many rows two baselines are ahead of, on held-out queries."""

    def held_out(row: dict[str, Any]) -> float:
        return float(lds_of(report, row)["held out"]["value"]["value"])

    rows = [row for row in report["rows"] if "held out" in lds_of(report, row) and not row["half"]]
    elsewhere = [row for row in rows if row["group"] in ("ours", "published") and row["noise"] != "common"]
    sentences = []
    for name in BASELINES:
        baseline = next((row for row in rows if (row["method"], row["form"]) == (name, "squared")), None)
        if baseline is not None and elsewhere:
            behind = sum(held_out(row) < held_out(baseline) for row in elsewhere)
            sentences.append(
                f"{name}, squared, with an LDS of {held_out(baseline):.2f} on held-out queries, is ahead "
                f"of {behind} of the {len(elsewhere)} rows with gradients under noise that is not common"
            )
    return f"*{report['setting']}.* {'; '.join(sentences)}." if sentences else ""


def falls(report: Report) -> list[dict[str, Any]]:
    """One figure of each truth, of the trained model and of each sanity row."""
    lines = []
    rows = [row for row in report["rows"] if not row["form"] and not row["half"]]
    bases = {row["method"].split(", ")[0] for row in rows if row["group"] == SANITY} or {report["recipe"]}
    trained = next(row for row in rows if row["method"] in bases)
    for truth in report["truths"]:
        every = reversed(trained["figures"].get(truth, []))  # of the first kind of query, the first grouping
        told = {one["metric"].split(" of ")[0]: one for one in every}
        figure = next((told[metric] for metric in TELLING if metric in told), None)
        if figure is None:
            continue
        line = {"truth": truth, "figure": column(figure), "the trained model": figure["value"]}
        for row in rows:
            if row["group"] == SANITY:
                same = [one for one in row["figures"].get(truth, []) if column(one) == column(figure)]
                line |= {row["method"].split(", ", 1)[1]: one["value"] for one in same}
        lines.append(line)
    return lines


def named(row: dict[str, Any]) -> str:
    """A row in a sentence, whose scores are in the form of the recipe's unless it says otherwise."""
    name = str(row["method"]).removesuffix(", damping fitted")
    noise = f" ({row['noise']})" if row["noise"] != "-" else ""
    return name + (", squared" if row["form"] == "squared" else "") + noise


def with_comparison(readme: str, reports: list[Report]) -> str:
    """The README with its table between the markers, unchanged where it has none."""
    before, after = MARKERS
    if before not in readme:
        return readme
    start, end = readme.index(before) + len(before), readme.index(after)
    return readme[:start] + comparison(reports) + "\n" + readme[end:]


BASELINES = "pixel ridge", "middle activations, same ridge"
"""That a method must beat, squared."""
TELLING = ("LDS", "in top 10", "first")
"""Metrics by which truths are compared."""
COMPARED = (
    ("ReTracRidge, loss and output", "common", ""),
    ("ReTracRidge, loss and output", "common", "signed squares"),
    ("ReTracRidge", "common", ""),
    ("ReTracRidge", "common", "signed squares"),
    ("D-TRAK, its authors' script", None, ""),
    ("DAS, its authors' script", None, "squared"),
    ("TRAK's package, 4096 entries, our damping", None, ""),
    ("TRAK", "own", ""),
    ("influence function, EK-FAC", "own", ""),
    ("ReTrac", "own", ""),
    ("TracIn", "recorded", ""),
    ("middle activations, same ridge", None, "squared"),
    ("pixel ridge", None, "squared"),
    ("ReTracRidge, the model before training", None, "signed squares"),
)
"""Of the README: method, noise, form; of a baseline its best."""


def comparison(reports: list[Report]) -> str:
    """LDS on held-out queries and its ceiling, a column for each setting."""
    top = {
        report["setting"]: ceiling(lds_of(report, report["rows"][0])["held out"]) for report in reports if _has(report)
    }
    lines: list[dict[str, Any]] = [{"method": "*ceiling*", "noise": "", **top}]
    for method, noise, form in COMPARED:
        line: dict[str, Any] = {}
        for report in reports:
            for row in report["rows"]:
                if (row["method"], row["form"]) == (method, form) and noise in (None, row["noise"]):
                    figure = lds_of(report, row).get("held out")
                    if figure:
                        line |= {**head(row), report["setting"]: figure["value"]}
        if line:
            lines.append(line)
    return table(lines)


def _has(report: Report) -> bool:
    return "held out" in lds_of(report, report["rows"][0])


INTRODUCTION = """# Leaderboard

`python -m benchmarks.yardstick --setting NAME` for each setting, last on {date}, {machine}. Written by that
command.

Every method that we could run, ours, others' and baselines that need no gradient, judged by the same retrained models.
LDS: do the scores predict the loss of a query under models trained on random halves of the images? 1 is perfect, 0 is
chance; the ceiling is what a method can reach given the luck of a training. Brackets: 95 % intervals over queries and
subsets. All rows share these, so that two rows can differ clearly although their intervals overlap; the sentences below
go by the interval of the difference. Bytes: of a training sample; seconds: CPU time from images and weights to the
scores of all queries.

No damping is tuned on what it is judged by. Where others' scripts pick the best of 27 by the score that they report,
the row here has the damping of our rule, which knows no label; the page of a setting has a second row, fitted to every
second subset and judged by the others. "By place in the batch": both published scripts seed their noise anew for each
batch, so that a query shares its noise with the samples at its own place in their batches.

`evaluate.judge` gives such a row for any array `[queries, samples]`, whatever made it: see
[the yardstick](yardstick.md)."""

WHEN = """- **What would retraining without these images do?** The gradients of the loss and of the model's output over
  four timesteps under common noise, whose scores `ReTracRidge` adds up ([how](methods.md#d-trak)): what `init` writes,
  and `measure=("mse", "mean_squared_output")` in Python. In all three settings with retrained models their
  signed squares are clearly ahead of those of the loss alone, for every kind of picture, and so are the scores
  as they are but for pictures that were trained on. They do not stand there alone: the table below names the
  rows that are clearly better, and those that are not clearly worse, most of them other functions under the
  same noise with such a ridge. The sign is that of the influence. For sums over sets of images, as those here,
  squares with the sign of the score, `scores * abs(scores)`, foretell losses better than the scores themselves;
  no list changes its order by them.
- **Half of the bytes?** The loss alone, rows *ReTracRidge* (`measure = "mse"`), or both in *256 entries each*, whose
  sums of signed squares are as good as those of 512, and whose other figures fall behind. *Eight timesteps* of the
  loss, as many bytes as the default and more time, bring less on emoji16 and flow16 for pictures that the model made,
  and more on digits8. Where combinations are asked for that training never had (shapes16), the loss's lists hold both
  parents more often.
- **Common noise and a ridge decide more than what is differentiated.** The loss, D-TRAK's and DAS's functions,
  and on digits plain activations, come out close together under the same noise with a ridge whose damping suits
  them: see the rows of fitted dampings. A comparison in which one method has its noise in common, or its
  damping fitted, and the other has not, says little about the methods.
- **No gradients at hand, or no time for them?** The middle activations of a forward pass under common noise,
  with the same ridge. They tell what the model takes to be alike; where they are named below as not clearly
  worse, take the cheaper one.
- **Only pictures?** Pixel ridge, squared. How many rows with gradients it is ahead of is said below.
- **A store under noise of its own, or of the training's, that cannot be measured again?** A ridge (`TRAK`,
  `ReTracRidge`), not an inner product (`TracIn`, `ReTrac`, `GradCos`).
- **What did the training do, step by step?** `TracIn` and `ReTrac` with recorded timesteps: that is their
  question. They do not foretell what a model trained without an image would do.
- **D-TRAK and DAS** need less damping than the loss. Under our rule DAS stays below what it can do, and far
  below under a rule that gives too little: that, and not what is normalised, is why it was once found near zero
  here. Fit it on retrained models that do not judge it.

What follows is computed: rows for which the interval of the difference to the row under "of" lies above zero, or holds
it."""

REMOVED = """`{command}`, {date}, {machine}; {hours} hours of training on a machine that others used too. Written by
that command.

The model is trained again, from the same seed, without the {removed} of {samples} samples that a method puts first for
a generated image: how much does the loss of that image rise, and how far is the image that the same noise becomes (root
mean square, pixels in -1 .. 1)? Beyond random: than without as many random samples, mean of {random} models. Beyond
others: than the other generated images of the same model. Brackets: 95 % intervals over queries. Models of one seed
that differ in any tenth of their samples make other images of the same noise: the difference counts, not the
distance."""

SANE = """Of the loss alone. Shuffled samples must leave nothing, shuffled queries what is the same for every query.
A model before training, or of another seed, is not the model that was asked: what its gradients keep is owed to the
pictures, the architecture and the common noise, not to what this model learnt. Where they keep nearly
all, a figure shows that a method knows which pictures are alike to a network of this kind, and does not
show that it explains this network; where they fall, it is about the model."""
