"""The sections of a report about one evaluation, from what the run left in its files."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fusionreid.engine.evaluation.names import cosine_text
from fusionreid.engine.reporting.charts import COLOURS, Line, Tick, line_chart, stairs, ticks
from fusionreid.engine.reporting.html import Cell, Fact, Section, Table, text_table
from fusionreid.engine.reporting.run_record import (
    CameraPair,
    Confusion,
    Metrics,
    Pairs,
    Queries,
    Result,
    Threshold,
)

SHOWN_RANKS = 1, 5, 10
LAST_RANK = 20  # of the chart
PERCENT_TICKS = range(0, 101, 20)
SUGGESTED_RATE = 1e-3  # of false pairs accepted, or the next one that there are enough pairs for
ENOUGH_PAIRS = 30  # the rule of 30 (Doddington et al., 2000): so many errors tell their rate within about a third
SHOWN_CAMERAS = 20
HEAT = 0.85  # of the strongest colour, so that the text on it stays readable


def result_sections(results: Mapping[str, Result]) -> list[Section]:
    """Results as figures and a table."""
    if not results:
        return [Section("Results", "This run has not been evaluated yet.")]
    first = next(iter(results.values()))
    rates = {"mAP": first.mAP, "Rank-1": first.rate_at(1), "mINP": first.mINP}
    figures = [
        Fact(name, f"{percent(rate)} %", _interval(first, name, "95 % interval {} to {}"))
        for name, rate in rates.items()
    ]
    queries = f"{first.unmatched_queries:,} without a match left out" if first.unmatched_queries else "all with a match"
    figures.append(Fact("Queries", f"{first.valid_queries:,}", queries))
    text = ""
    if first.unmatched_queries:
        text = (
            f"{first.unmatched_queries:,} of {first.valid_queries + first.unmatched_queries:,} queries have no match: "
            "the gallery has no image of their person by another camera. They do not count."
        )
    return [Section("Results", text, figures=figures, table=results_table(results))]


def _interval(result: Result, name: str, text: str) -> str:
    limits = result.interval_95.get(name)
    return text.format(*map(percent, limits)) if limits and all(map(math.isfinite, limits)) else ""


def results_table(results: Mapping[str, Result]) -> Table:
    """Lay out measures in %, the best of each in bold where several rows are of one data set."""
    rates = [[r.mAP, r.mINP, *(r.rate_at(rank) for rank in SHOWN_RANKS)] for r in results.values()]
    groups: dict[str, list[list[float]]] = {}  # measures on different data are not compared
    for result, row in zip(results.values(), rates):
        groups.setdefault(result.data, []).append(row)
    best = {
        data: [max(filter(math.isfinite, c), default=math.nan) for c in zip(*rows)] for data, rows in groups.items()
    }
    measures = "mAP", "mINP", *(f"Rank-{rank}" for rank in SHOWN_RANKS)
    head = ("%", *measures, "mAP, 95 % interval", "valid queries", "without a match")
    rows = [
        [
            Cell(name),
            *(Cell(percent(r), len(groups[result.data]) > 1 and r == top) for r, top in zip(row, best[result.data])),
            Cell(_interval(result, "mAP", "{} to {}") or "n/a"),
            Cell(f"{result.valid_queries:,}"),
            Cell(f"{result.unmatched_queries:,}"),
        ]
        for (name, result), row in zip(results.items(), rates)
    ]
    return Table(head, rows)


def cmc_sections(results: Mapping[str, Result]) -> list[Section]:
    """CMC curves."""
    if not results:
        return []
    last = max(2, min(LAST_RANK, max(len(result.cmc) for result in results.values())))
    curves = [[(float(k), 100 * result.rate_at(k)) for k in range(1, last + 1)] for result in results.values()]
    lines = [
        Line(name, [point for point in curve if math.isfinite(point[1])], i, i // COLOURS)
        for i, (name, curve) in enumerate(zip(results, curves))
    ]
    chart = line_chart("rank k", lines, (1, *range(5, last + 1, 5)), PERCENT_TICKS)
    return [Section("CMC, %", "Share of the queries with a match among the first k images.", chart=chart, half=True)]


def pair_sections(metrics: Metrics) -> list[Section]:
    """Threshold with the ROC curve, and the histogram of cosines or distances."""
    if metrics.pairs is None:
        return []
    best = suggested(metrics.pairs, metrics.thresholds)
    return [_threshold_section(metrics.pairs, metrics.thresholds, best), _histogram_section(metrics.pairs, best)]


def suggested(pairs: Pairs, thresholds: Sequence[Threshold]) -> Threshold | None:
    """Choose the strictest threshold that enough pairs stand for, no stricter than SUGGESTED_RATE, else the loosest."""
    loose = [point for point in thresholds if point.false_positive_rate >= SUGGESTED_RATE * (1 - 1e-9)]
    trusted = [point for point in loose if _accepted(pairs, point) >= ENOUGH_PAIRS]
    by_rate = sorted(trusted or loose, key=lambda point: point.false_positive_rate)
    return (by_rate[0] if trusted else by_rate[-1]) if by_rate else None


def explained(pairs: Pairs, point: Threshold | None) -> str:
    """Say in plain words what a threshold does, and whether there were enough pairs to tell."""
    if point is None:
        return f"{pairs.other_person:,} pairs of two persons are too few to suggest a threshold; 100 are the least."
    text = (
        f"{_limit(point).capitalize()} finds {percent(point.true_positive_rate)} % of true pairs and accepts "
        f"1\N{NO-BREAK SPACE}in\N{NO-BREAK SPACE}{1 / point.false_positive_rate:,.0f} false ones."
    )
    few = []
    if (accepted := _accepted(pairs, point)) < ENOUGH_PAIRS:
        few.append(f"it rests on {accepted:,} false pairs of {pairs.other_person:,}")
    if pairs.same_person < ENOUGH_PAIRS:
        few.append(f"there are only {pairs.same_person:,} true pairs")
    return f"{text} Too few pairs to trust: {' and '.join(few)}; {ENOUGH_PAIRS} are the least." if few else text


def _limit_of(point: Threshold) -> float:
    return math.sqrt(max(point.distance, 0)) if point.cosine is None else point.cosine


def _limit(point: Threshold) -> str:
    if point.cosine is None:
        return f"distance \N{LESS-THAN OR EQUAL TO}\N{NO-BREAK SPACE}{_limit_of(point):.3f}"
    return f"cosine \N{GREATER-THAN OR EQUAL TO}\N{NO-BREAK SPACE}{cosine_text(point.cosine)}"


def _accepted(pairs: Pairs, point: Threshold) -> int:
    return int(point.false_positive_rate * pairs.other_person + 1e-9)


def _threshold_section(pairs: Pairs, thresholds: Sequence[Threshold], best: Threshold | None) -> Section:
    chart, table = None, None
    if len(pairs.roc) > 1:
        decades = range(math.floor(math.log10(pairs.roc[0][0])), 1)
        shown = [power for power in decades if len(decades) <= 4 or power % 2 or not power]  # as many as a phone fits
        x_ticks = [Tick(power, f"1 in {10**-power:,}" if power else "all") for power in shown]
        curve = Line("true pairs found", [(math.log10(rate), 100 * found) for rate, found in pairs.roc])
        mark = Tick(math.log10(best.false_positive_rate), "suggested") if best else None
        chart = line_chart("false pairs accepted", [curve], x_ticks, PERCENT_TICKS, mark)
    if thresholds:
        head = "threshold", "true pairs found, %", "false pairs accepted", "pairs it rests on"
        rows = [
            [
                Cell(_limit(point), point is best),
                Cell(percent(point.true_positive_rate)),
                Cell(f"1 in {1 / point.false_positive_rate:,.0f}"),
                Cell(f"{_accepted(pairs, point):,}{'' if _accepted(pairs, point) >= ENOUGH_PAIRS else ', too few'}"),
            ]
            for point in sorted(thresholds, key=lambda point: point.false_positive_rate)
        ]
        table = Table(head, rows)
    text = "A true pair shows one person by two cameras, a false pair two persons."
    lead = explained(pairs, best)
    return Section("Threshold and ROC, %", text, lead=lead, chart=chart, table=table, half=True)


def _histogram_section(pairs: Pairs, best: Threshold | None) -> Section:
    counts = (pairs.same_counts, pairs.other_counts)
    used = [i for i, both in enumerate(zip(*counts)) if any(both)] or [0]
    first, last = used[0], used[-1] + 1
    edges = pairs.edges[first : last + 1]
    names = f"same person, {pairs.same_person:,} pairs", f"other person, {pairs.other_person:,} pairs"
    shares = [[100 * count / max(sum(kind), 1) for count in kind[first:last]] for kind in counts]
    lines = [Line(name, stairs(edges, share), i, filled=True) for i, (name, share) in enumerate(zip(names, shares))]
    highest = max(map(max, shares))
    mark = Tick(_limit_of(best), "suggested") if best else None
    chart = line_chart(pairs.measure, lines, ticks(edges[-1], edges[0]), ticks(highest), mark)
    text = "The less the two overlap, the better a threshold tells persons apart."
    return Section(f"Pairs by their {pairs.measure}, % of each kind", text, chart=chart, half=True)


def camera_sections(pairs: Sequence[CameraPair]) -> list[Section]:
    """Heat map of the mAP from each camera to each other one."""
    if not pairs:
        return []
    queries: Counter[str] = Counter()
    for pair in pairs:
        queries.update({str(pair.query): pair.num_valid, str(pair.gallery): 0})
    shown = {name for name, _ in queries.most_common(SHOWN_CAMERAS)}
    names = [name for name in queries if name in shown]
    by_names = {(str(pair.query), str(pair.gallery)): pair for pair in pairs}
    rows = [[Cell(a), *(_heat(by_names.get((a, b))) for b in names)] for a in names]
    text = "Queries by the camera on the left, gallery images by the one above; below each mAP the number of queries."
    if len(queries) > len(names):
        text += f" The {SHOWN_CAMERAS} cameras with the most queries of {len(queries):,}; metrics.json has all."
    table = Table(("query \N{RIGHTWARDS ARROW} gallery", *names), rows)
    return [Section("mAP by camera pair, %", text, table=table, half=True)]


def _heat(pair: CameraPair | None) -> Cell:
    if pair is None or not math.isfinite(pair.mAP):
        return Cell("\N{EN DASH}")
    return Cell(percent(pair.mAP), heat=round(HEAT * pair.mAP, 3), note=f"{pair.num_valid:,}")


def query_sections(shown: Queries) -> list[Section]:
    """Best, median and worst queries."""
    if not shown.queries:
        return []
    text = (
        "The nearest gallery images, without those of the query's person by its own camera. AP is the average "
        "precision: 100 % if all images of the person come first."
    )
    if any(query.maps for query in shown.queries):
        text += (
            " Below, a query is lit where the class token of one branch attends among the patches of the other in the "
            "last fusion, and by Grad-CAM where the CNN finds it like the nearest image of its person."
        )
    return [Section("Best, median and worst queries", text, queries=shown.queries, measure=shown.measure)]


def confusion_sections(confused: Sequence[Confusion] | None) -> list[Section]:
    """Table of the persons that are taken for another."""
    if confused is None:
        return []
    if not confused:
        return [Section("Most confused persons", "Each query finds its own person first.", half=True)]
    text = "Persons whose queries find another person first. Look at both: they may be one person under two names."
    rows = [[c.person, c.taken_for, f"{c.queries:,} of {c.of:,}"] for c in confused]
    table = text_table(("person", "taken for", "queries"), rows)
    return [Section("Most confused persons", text, table=table, half=True)]


def percent(rate: float) -> str:
    """A rate in %, without the sign."""
    return f"{100 * rate:.1f}" if math.isfinite(rate) else "n/a"
